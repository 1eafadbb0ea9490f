"""The tests of controlled steering: against slow ones and scipy, error rates, power, what they leave out."""

import json
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from cellcircuits import steering_tests
from cellcircuits.controlled_results import report_lines
from cellcircuits.layered_difference import Layered, difference, difference_interval, difference_p
from cellcircuits.steering_controls import CONTROLS
from cellcircuits.steering_figures import controlled_figure
from cellcircuits.steering_readouts import LINEAR, N_MOVED, N_MOVED_MASKED, PROBABILITY, READOUTS
from cellcircuits.steering_tests import (
    MIN_CELLS,
    cell_interval,
    grand_mean,
    of_features,
    primary_definition,
    run_tests,
    sign_flip_p,
)

DOSES = [{"norm": 0.1, "alpha": None}, {"norm": 1.0, "alpha": None}]


def values_of(rng, n_cells: int, effect: float, missing: float = 0.0) -> dict[str, list[float | None]]:
    """What one edit gives in every cell: an effect that all cells share, one of its own, and noise."""
    is_missing = rng.random(n_cells) < missing
    of_edit = {}
    for name in (*READOUTS, PROBABILITY, *LINEAR.values()):
        drawn = effect + 0.3 * rng.standard_normal() + 0.2 * rng.standard_normal(n_cells)
        of_edit[name] = [None if gone else float(x) for gone, x in zip(is_missing, drawn, strict=True)]
    for name in (N_MOVED, N_MOVED_MASKED):
        of_edit[name] = [None if gone else 4 for gone in is_missing]
    return of_edit


def record(layer: int, index: int, kind: str | None, effect: float = 0.0, **more) -> dict:
    """A record of a feature whose controls have no effect; `n_cells`, `missing`, `seed`, `n_draws`, `analytic`."""
    n_cells, missing = more.get("n_cells", 12), more.get("missing", 0.2)
    rng = np.random.default_rng([more.get("seed", 0), layer, index])
    doses = [
        {
            "dose": {**dose, "length": 1.0},
            "feature": values_of(rng, n_cells, effect * dose["norm"], missing),
            "controls": {
                kind: [
                    {"draw": draw, "feature_idx": 7, **values_of(rng, n_cells, 0.0, missing)}
                    for draw in range(more.get("n_draws", 2))
                ]
                for kind in CONTROLS
            },
        }
        for dose in DOSES
    ]
    return {
        "layer": layer,
        "feature_idx": index,
        "kind": kind,
        "label": "a label",
        "switch_d": 1.0 if kind == "ON" else -1.0,
        "frequency": 0.01,
        "analytic": more.get("analytic", False),
        "steered_cells": [f"c{i}" for i in range(n_cells)],
        "doses": doses,
    }


def declaration(layers=(0, 5, 17)) -> dict:
    facts = {"n_blocks_after": 3, "mean_norm": 1.0, "n_control_candidates": 9}
    return {
        "primary": primary_definition(DOSES[1]),
        "doses": DOSES,
        "n_draws": 2,
        "halves": {"n_steered": 12, "n_first": 20, "n_second": 21, "features": "chosen in the first half"},
        "probe": {"auc": 0.9, "auc_low": 0.8, "auc_high": 0.95, "n_cells": 50, "cells": "others"},
        "layers": {str(layer): {"analytic": layer == 17, **facts} for layer in layers},
        "panel": [],
        "fingerprint": "run",
    }


def study(effect: float, seed: int = 0, n: int = 5, layers=(0, 5), **more) -> list[dict]:
    return [
        record(layer, i + 20 * (kind == "OFF"), kind, effect if kind == "ON" else -effect, seed=seed, **more)
        for layer in layers
        for kind in ("ON", "OFF")
        for i in range(n)
    ]


def summary_of(records: list[dict], declared: dict) -> dict:
    """What `run_tests` says, with fewer resamples and permutations than a run takes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(steering_tests, "N_RESAMPLES", 100)
        monkeypatch.setattr(steering_tests, "N_PERMUTATIONS", 999)
        return run_tests(records, declared, 42)


class TestParts:
    def test_the_mean_over_draws_of_the_mean_over_cells(self):
        matrix = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
        assert grand_mean(matrix) == pytest.approx((2 + 5) / 2)
        assert np.isnan(grand_mean(np.full((3, 2), np.nan))) and np.isnan(grand_mean(np.zeros((3, 0))))
        stacked = np.stack([matrix, matrix + 1])
        assert grand_mean(stacked) == pytest.approx([3.5, 4.5])

    @pytest.mark.parametrize("n", [2, 5, 9, 12])
    def test_sign_flips_are_scipy_s_exact_ones(self, n: int):
        x = np.random.default_rng(n).normal(0.5, 1, n)
        exact = stats.permutation_test(
            (x,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
        ).pvalue
        assert sign_flip_p(x, (0,)) == pytest.approx(exact)

    def test_many_cells_have_drawn_flips_and_one_has_none(self):
        x = np.random.default_rng(0).normal(0.3, 1, 40)
        assert sign_flip_p(x, (0,)) == pytest.approx(stats.ttest_1samp(x, 0).pvalue, abs=0.02)
        assert sign_flip_p(np.full(40, 2.0), (0,)) == pytest.approx(1 / 10000)
        assert sign_flip_p(x[:1], (0,)) is None and sign_flip_p(np.zeros(5), (0,)) == 1.0

    def test_the_interval_is_that_of_resampled_cells(self):
        matrix = np.random.default_rng(0).normal(1.0, 1.0, (30, 2))
        matrix[3:9, 1] = np.nan
        matrix[20] = np.nan
        low, high = cell_interval(matrix, (0,))
        rng, used = np.random.default_rng(5), np.delete(matrix, 20, axis=0)
        slow = []
        for _ in range(1500):
            drawn = used[rng.integers(0, len(used), len(used))]
            slow.append(np.mean([np.nanmean(drawn[:, 0]), np.nanmean(drawn[:, 1])]))
        assert (low, high) == pytest.approx(tuple(np.percentile(slow, (2.5, 97.5))), abs=0.05)
        assert cell_interval(matrix[:1], (0,)) == (None, None)

    def test_few_features_are_permuted_exactly(self):
        rng = np.random.default_rng(2)
        on, off = rng.normal(1, 1, 4), rng.normal(0, 1, 5)
        exact = stats.permutation_test(
            (on, off), lambda a, b: a.mean() - b.mean(), vectorized=False, n_resamples=np.inf
        ).pvalue
        found = of_features(one_layer(on), one_layer(off), "ON_minus_OFF", (0,))
        assert found["p"] == pytest.approx(exact)
        assert found["estimate"] == pytest.approx(on.mean() - off.mean())
        assert found["low"] < found["estimate"] < found["high"]
        assert (found["n"], found["n_on"], found["n_off"], found["reason"]) == (9, 4, 5, None)

    def test_too_few_features_give_a_reason(self):
        ones, zeros = one_layer(np.ones(3)), one_layer(np.zeros(6))
        found = of_features(ones, zeros, "ON_minus_OFF", (0,))
        assert found["p"] is None and found["low"] is None and found["estimate"] == 1.0
        assert "3 features of a side" in found["reason"]
        assert of_features(ones, zeros, "OFF", (0,))["p"] == 1.0
        assert of_features(one_layer(np.zeros(0)), zeros, "ON", (0,))["estimate"] is None
        elsewhere = Layered(np.zeros(6), np.ones(6, dtype=np.int64))
        found = of_features(one_layer(np.ones(8)), elsewhere, "ON_minus_OFF", (0,))
        assert found["p"] is found["estimate"] is None and (found["n_on"], found["n_off"]) == (0, 0)


def one_layer(values: np.ndarray) -> Layered:
    return Layered(values, np.zeros(len(values), dtype=np.int64))


def unbalanced(rng, layer_shift: float, effect: float) -> tuple[Layered, Layered]:
    """Layer 0 with ten ON and four OFF features, layer 5 the other way round and shifted, layer 11 with ON alone."""
    layers = np.repeat([0, 5], [10, 4]), np.repeat([0, 5], [4, 10])
    on, off = (layer_shift * (of > 0) + rng.standard_normal(14) for of in layers)
    alone = Layered(np.append(on + effect, [50.0] * 3), np.append(layers[0], [11] * 3))
    return alone, Layered(off, layers[1])


class TestWithinLayers:
    def test_the_difference_is_that_of_a_regression_on_kind_and_layer(self):
        on, off = unbalanced(np.random.default_rng(0), 3.0, 0.7)
        values, layers = np.append(on.values, off.values), np.append(on.layers, off.layers)
        is_on = np.arange(len(values)) < len(on.values)
        columns = [is_on, *(layers == layer for layer in (0, 5, 11))]
        slope = np.linalg.lstsq(np.array(columns, dtype=float).T, values, rcond=None)[0][0]
        assert difference(on, off) == pytest.approx(slope)
        low, high = difference_interval(on, off, 500, np.random.default_rng(0))
        assert low < slope < high and high - low < 4

    def test_p_is_that_of_every_permutation_within_layers(self):
        rng = np.random.default_rng(4)
        on = Layered(rng.normal(1, 1, 4), np.array([0, 0, 5, 5]))
        off = Layered(rng.normal(0, 1, 4), np.array([0, 0, 5, 5]))
        pools = [np.append(on.values[at], off.values[at]) for at in ([0, 1], [2, 3])]
        splits = [(c, [i for i in range(4) if i not in c]) for c in combinations(range(4), 2)]
        each = [[pool[list(c)].mean() - pool[rest].mean() for c, rest in splits] for pool in pools]
        every = np.array([(a + b) / 2 for a, b in product(*each)])
        exact = np.mean(np.abs(every) >= abs(every[0]) - 1e-12)
        assert difference_p(on, off, 20_000, np.random.default_rng(0)) == pytest.approx(exact, abs=0.01)

    @pytest.mark.parametrize(("effect", "low", "high"), [(0.0, 0.0, 0.1), (1.5, 0.9, 1.0)])
    def test_layers_that_differ_make_no_difference_of_kinds(self, effect, low, high, monkeypatch):
        """Permuted over all layers at once, 47 of the 100 without an effect are called."""
        monkeypatch.setattr(steering_tests, "N_RESAMPLES", 10)
        monkeypatch.setattr(steering_tests, "N_PERMUTATIONS", 499)
        drawn = [unbalanced(np.random.default_rng(seed), 4.0, effect) for seed in range(100)]
        found = [of_features(*kinds, "ON_minus_OFF", (0,)) for kinds in drawn]
        assert low <= np.mean([one["p"] <= 0.05 for one in found]) <= high
        assert (found[0]["n_on"], found[0]["n_off"]) == (14, 14)


ANALYTIC = [record(17, i, kind, 3.0, analytic=True) for i, kind in enumerate(["ON", "OFF"] * 4)]


class TestErrorRates:
    """The primary test on simulated records: only its own numbers are computed, as `run_tests` does."""

    def primary_p(self, records: list[dict]) -> float:
        values = {
            kind: one_layer(
                np.array(
                    [
                        steering_tests.less_controls(r, 1)["probe", "frequency_matched"][0]
                        for r in records
                        if r["kind"] == kind and not r["analytic"]
                    ]
                )
            )
            for kind in ("ON", "OFF")
        }
        return of_features(values["ON"], values["OFF"], "ON_minus_OFF", (0, 0))["p"]

    def test_features_without_an_effect_are_called_at_the_nominal_rate(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(steering_tests, "N_RESAMPLES", 10)  # intervals are not asked for here
        p = [self.primary_p(study(0.0, seed, n=4, layers=(0,))) for seed in range(200)]
        # 70 ways to choose four of eight features; three standard errors
        for level in (0.05, 0.2):
            assert abs(np.mean(np.array(p) <= level) - level) < 3 * np.sqrt(level * (1 - level) / 200) + 1 / 70

    def test_planted_effects_are_found(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(steering_tests, "N_RESAMPLES", 10)
        p = [self.primary_p(study(0.4, seed, n=6, layers=(0,))) for seed in range(40)]
        assert np.mean(np.array(p) < 0.05) > 0.9


@pytest.fixture(scope="module", name="tests")
def tests_of_a_study() -> dict:
    return summary_of([*study(0.6)[::-1], *ANALYTIC], declaration())


class TestSummary:
    def test_the_primary_contrast_is_found_and_kept_apart(self, tests: dict):
        primary = tests["primary"]
        assert primary["p"] < 0.01 and primary["low"] > 0 and (primary["n_on"], primary["n_off"]) == (10, 10)
        assert primary["estimate"] == pytest.approx(1.2, abs=0.4)
        keys = ("readout", "control", "contrast", "layer", "dose")
        assert not any(all(c[key] == primary[key] for key in keys) for c in tests["contrasts"])
        assert len(tests["contrasts"]) == 4 * 2 * 3 * 3 * 3 - 1

    def test_the_excess_is_what_the_direct_path_leaves(self, tests: dict):
        records = [r for r in study(0.6) if r["kind"] == "ON"]

        def excess(draw: dict) -> float:
            pairs = zip(draw["probe"], draw["probe_linear"], strict=True)
            return np.mean([x - y for x, y in pairs if x is not None])

        expected = []
        for r in records:
            dose = r["doses"][1]
            controls = [excess(draw) for draw in dose["controls"]["random_direction"]]
            expected.append(excess(dose["feature"]) - np.mean(controls))
        (found,) = (
            c
            for c in tests["contrasts"]
            if (c["layer"], c["readout"], c["control"], c["contrast"]) == ("all", "probe", "random_direction", "ON")
            and c["dose"]["norm"] == 1.0
        )
        assert found["excess_estimate"] == pytest.approx(np.mean(expected))
        assert found["excess_low"] < found["excess_estimate"] < found["excess_high"]

    def test_analytic_features_are_in_no_test_over_cells_and_not_in_the_primary_one(self, tests: dict):
        for feature in tests["features"]:
            for readout in feature["readouts"].values():
                for of in (readout, *readout["controls"].values()):
                    assert (of["p"] is None) == (of["low"] is None) == feature["analytic"]
                    assert feature["analytic"] == (of["reason"] is not None)
        assert {c["analytic"] for c in tests["contrasts"] if c["layer"] == "17"} == {True}
        assert all(c["n"] == 20 for c in tests["contrasts"] if c["layer"] == "all" and c["contrast"] == "ON_minus_OFF")

    def test_q_is_over_every_secondary_test(self, tests: dict):
        of_features = [
            of for f in tests["features"] for r in f["readouts"].values() for of in (r, *r["controls"].values())
        ]
        tested = [test for test in (*tests["contrasts"], *of_features) if test["p"] is not None]
        q = stats.false_discovery_control([test["p"] for test in tested])
        assert [test["q"] for test in tested] == pytest.approx(q)
        assert tests["family"]["n_tests"] == len(tested) and "q" not in tests["primary"]

    def test_numbers_of_a_feature_are_those_of_its_record(self, tests: dict):
        r = study(0.6)[0]
        (found,) = (f for f in tests["features"] if (f["layer"], f["feature_idx"], f["dose"]["norm"]) == (0, 0, 1.0))
        own = [x for x in r["doses"][1]["feature"]["probe"] if x is not None]
        linear = [x for x in r["doses"][1]["feature"]["probe_linear"] if x is not None]
        probe = found["readouts"]["probe"]
        assert probe["mean"] == pytest.approx(np.mean(own)) and probe["n"] == len(own) == found["n_cells"]
        assert probe["linear_prediction"] == pytest.approx(np.mean(linear))
        assert probe["excess"] == pytest.approx(np.mean(own) - np.mean(linear))
        draws = [[x for x in d["probe"] if x is not None] for d in r["doses"][1]["controls"]["random_feature"]]
        control = probe["controls"]["random_feature"]
        assert control["mean"] == pytest.approx(np.mean([np.mean(of) for of in draws]))
        assert control["draws_as_large"] == sum(abs(np.mean(of)) >= abs(np.mean(own)) for of in draws)
        paired = []
        for i, x in enumerate(r["doses"][1]["feature"]["probe"]):
            others = [d["probe"][i] for d in r["doses"][1]["controls"]["random_feature"]]
            others = [other for other in others if other is not None]
            if x is not None and others:
                paired.append(x - np.mean(others))
        assert control["n"] == len(paired) and control["p"] == pytest.approx(
            sign_flip_p(np.array(paired), (0,)), abs=0.02
        )

    def test_the_order_of_the_records_does_not_matter(self, tests: dict):
        assert summary_of([*ANALYTIC, *study(0.6)], declaration()) == tests

    def test_it_is_json_with_a_reason_for_every_gap(self, tests: dict):
        json.dumps(tests, allow_nan=False)
        text = "\n".join(report_lines(tests))
        assert "primary: probe log-odds at a norm of 1" in text and "layer 17: closed form" in text
        assert len(text.splitlines()) <= 12
        figure = controlled_figure(tests)
        assert len(figure.axes) == 9 and "closed form" in figure.axes[2].get_title()

    def test_features_steered_in_few_cells_do_not_count(self):
        few = study(0.5, n=5, layers=(0,), n_cells=MIN_CELLS - 1, missing=0.0)
        tests = summary_of(few, declaration((0,)))
        assert tests["primary"]["p"] is None and "0 features" in tests["primary"]["reason"]
        assert tests["features"][0]["readouts"]["probe"]["p"] is not None

    def test_a_panel_of_the_last_layer_alone_has_no_primary_test(self):
        records = [record(17, i, "ON", 1.0, analytic=True, missing=1.0) for i in range(2)]
        tests = summary_of(records, declaration((17,)))
        assert tests["primary"]["p"] is None and tests["primary"]["reason"]
        assert tests["family"]["n_tests"] == 0
        json.dumps(tests, allow_nan=False)
        assert "no test" in "\n".join(report_lines(tests))
        controlled_figure(tests)
        assert summary_of([], declaration((0,)))["primary"]["p"] is None
