"""Sign-flip tests and error rates: against SciPy, against the rule applied to flipped effects, and by simulation."""

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control, nct, permutation_test

from cellcircuits.calibration import Calibrator, FeatureCalibration, hedges_g
from cellcircuits.edge_fdr import (
    CalibrationSettings,
    Family,
    PCounts,
    by_degree,
    calibration_lines,
    false_discovery_rate,
    graph_calibration,
    packed,
    unpacked,
)
from cellcircuits.sign_flips import Flips, SignedSums, flips_of, random_signs
from cellcircuits.stats import EdgeRule, effect_statistics

CPU = torch.device("cpu")
RULE = EdgeRule()
FEW = CalibrationSettings(n_draws=2000, n_resamples=40)


def effects_of(n_cells: int, n_targets: int, seed: int = 0, zeros: float = 0.4) -> np.ndarray:
    """Effects with exact zeros, each target non-zero in some cell; sizes differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(0.5, 1, (n_cells, n_targets)) * 10.0 ** rng.uniform(-8, 3, n_targets)
    effects[rng.random(effects.shape) < zeros] = 0
    return effects[:, (effects != 0).any(axis=0)]


def n_edges(effects: np.ndarray, rule: EdgeRule = RULE) -> int:
    return int(effect_statistics(effects, rule).is_edge.sum())


class TestSignFlips:
    @pytest.mark.parametrize("n_cells", range(9))
    def test_all_vectors_up_to_a_common_sign(self, n_cells: int):
        flips = flips_of(n_cells, 7, np.random.default_rng(0))
        assert flips.is_exact and flips.signs.shape == (max(1, 2 ** (n_cells - 1)), n_cells)
        assert len(np.unique(flips.signs, axis=0)) == len(flips.signs)
        assert (flips.signs[:, :1] == 1).all() and set(np.unique(flips.signs)) <= {-1, 1}

    @pytest.mark.parametrize("n_cells", [2, 3, 5, 8, 12])
    def test_exact_p_is_scipy_s(self, n_cells: int):
        effects = effects_of(n_cells, 12)
        flips = flips_of(n_cells, 7, np.random.default_rng(0))
        numerator, denominator = flips.fractions(SignedSums(effects, CPU).test(flips, RULE)[0])
        for j, of_target in enumerate(effects.T):
            expected = permutation_test(
                (of_target,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=10**5
            )
            assert numerator[j] / denominator == pytest.approx(expected.pvalue, abs=1e-12)

    def test_drawn_p_is_near_the_exact_one_and_never_zero(self):
        effects = effects_of(12, 30)
        exact, drawn = flips_of(12, 0, np.random.default_rng(0)), random_signs((20_000, 12), np.random.default_rng(1))
        sums = SignedSums(effects, CPU)
        counts = [sums.test(flips, RULE)[0] for flips in (exact, Flips(drawn, is_exact=False))]
        p, q = (flips.fractions(n) for flips, n in zip((exact, Flips(drawn, False)), counts, strict=True))
        assert np.abs(p[0] / p[1] - q[0] / q[1]).max() < 0.02 and (q[0] > 0).all()

    @pytest.mark.parametrize("n_cells", [1, 2, 4, 7, 20])
    def test_edges_of_flipped_effects_are_the_rule_s(self, n_cells: int):
        effects = effects_of(n_cells, 40)
        flips = flips_of(n_cells, 25, np.random.default_rng(0))
        expected = [n_edges(effects * signs[:, None]) for signs in flips.signs]
        sums = SignedSums(effects, CPU)
        assert sums.test(flips, RULE)[1].tolist() == expected
        once = np.ones((1, n_cells), dtype=np.int64)
        assert sums.n_edges(once, flips.signs[None], RULE).tolist() == [expected]

    def test_edges_of_resampled_cells_are_the_rule_s(self):
        rng = np.random.default_rng(0)
        effects = effects_of(15, 60)
        weights, signs = rng.multinomial(15, np.full(15, 1 / 15), size=20), random_signs((20, 3, 15), rng)
        expected = [
            [n_edges(np.repeat(effects * sign[:, None], weight, axis=0)) for sign in of_sample]
            for weight, of_sample in zip(weights, signs, strict=True)
        ]
        assert SignedSums(effects, CPU).n_edges(weights, signs, RULE).tolist() == expected

    def test_a_table_of_thresholds(self):
        effects = effects_of(6, 40)
        signs = flips_of(6, 0, np.random.default_rng(0)).signs
        rules = [[EdgeRule(d, consistency) for consistency in (0.6, 0.9999)] for d in (0.3, 0.5, 2.0)]
        expected = [[sum(n_edges(effects * s[:, None], rule) for s in signs) for rule in row] for row in rules]
        assert SignedSums(effects, CPU).sweep(signs, rules).tolist() == expected


class TestErrorRates:
    def test_q_values_are_scipy_s(self):
        rng = np.random.default_rng(0)
        counts, every_p = PCounts(), []
        for denominator in (1, 4, 16, 2048, 10_001, 16):
            numerators = rng.integers(1, denominator + 1, 300) // rng.integers(1, 9, 300)
            numerators = np.maximum(numerators, 1)
            counts.add(denominator, numerators)
            every_p.append(numerators / denominator)
        p = np.concatenate(every_p)
        q_bh, q_by = counts.q_values().of(p)
        np.testing.assert_allclose(q_bh, false_discovery_control(p), rtol=1e-12)
        np.testing.assert_allclose(q_by, false_discovery_control(p, method="by"), rtol=1e-12)

    def test_an_empty_family(self):
        q_values = PCounts().q_values()
        assert [len(values) for values in q_values.of(np.zeros(0))] == [0, 0]
        content = graph_calibration([], q_values, FEW)
        assert content["n_tests"] == 0 and content["published_rule"]["fdr"] is None
        assert [*calibration_lines(content)] == []

    def test_fractions_come_back(self):
        numerators, denominator = unpacked(packed(np.array([3, 1, 10_001]), 10_001))
        assert (numerators.tolist(), denominator) == ([3, 1, 10_001], 10_001)

    def test_what_is_calibrated(self):
        counts = PCounts()
        counts.add(1000, np.array([1, 1, 1, 1, 900]))
        family = Family(counts.q_values(), RULE, 8)
        columns = [np.array([0.001, 0.001, 0.001, 0.001, 0.9]), np.array([0.9, -0.9, 0.4, 0.9, 0.9])]
        *_, calibrated = family.columns(*columns, np.array([1, 0.6, 1, 1, 1]), np.array([8, 8, 8, 7, 8]))
        assert calibrated.tolist() == [True, False, False, False, False]

    def test_a_feature_without_calibrated_edges_is_no_hub(self):
        """Of 30 features the first 20 by number must not pass for those that keep most edges."""
        features = [facts(i, n_edges=30 - i, degree_calibrated=kept) for i, kept in enumerate([0, None, 7] + 27 * [0])]
        content = graph_calibration(features, one_test().q_values(), FEW)
        assert (content["n_hubs"], content["n_hubs_kept"]) == (20, 1)
        assert "1 of the 20 features with most edges" in "\n".join(calibration_lines(content))
        content = graph_calibration(features[:12], one_test().q_values(), FEW)
        assert "with most edges" not in "\n".join(calibration_lines(content))  # any that keeps an edge stays

    def test_p_too_coarse_for_the_number_of_tests_are_said(self):
        drawn = [facts(0, n_edges=30, degree_calibrated=3)]
        step = FEW.n_draws + 1

        def lines(denominator: int, numerators: np.ndarray) -> tuple[dict, str]:
            counts = PCounts()
            counts.add(denominator, numerators)
            of_run = [x | {"calibration": x["calibration"] | {"p": {"denominator": denominator}}} for x in drawn]
            content = graph_calibration(of_run, counts.q_values(), FEW)
            return content, "\n".join(calibration_lines(content))

        content, said = lines(step, np.array([1] * 40 + [step] * 60))
        assert content["largest_p_bh"] == content["smallest_p"] == 1 / step and content["n_tests_drawn"] == 1
        assert content["n_needed_at_smallest_p"] == 1 and "with another seed other tests pass" in said
        assert "another seed" not in lines(step, np.array([1] * 5 + [60] * 195))[1]  # up to p 0.03
        assert "another seed" not in lines(64, np.array([1] * 60 + [64] * 10))[1]  # all vectors: no seed
        content, said = lines(16, np.array([1, 2, 16]))
        assert (
            content["largest_p_bh"] is None
            and "none could be called, since no p of so few cells is below 0.062" in said
        )
        assert "150 with the smallest p, 0.0005, would be needed" in lines(step, np.full(15_001, step))[1]


def facts(feature: int, **numbers) -> dict:
    tests = {
        "p": {"denominator": FEW.n_draws + 1}, "n_live_targets": 1, "null_edges": 1.0, "resampled_edges": [3, 4],
        "resampled_null_edges": [1, 1], "sweep_edges": np.ones((6, 5)), "sweep_null_edges": np.ones((6, 5)),
    }  # fmt: skip
    return {"feature_idx": feature, "n_edges_bh": 0, "n_cells_active": 20, **numbers, "calibration": tests}


def one_test() -> PCounts:
    counts = PCounts()
    counts.add(FEW.n_draws + 1, np.array([1]))
    return counts


def calibrated(effects: np.ndarray, feature: int = 3, settings: CalibrationSettings = FEW) -> FeatureCalibration:
    measured = np.ones(len(effects), dtype=bool)
    return Calibrator(RULE, settings, len(effects), 5, CPU).calibrate(feature, effects, measured)


class TestOneFeature:
    def test_only_live_targets_are_tested(self):
        effects = np.zeros((6, 5))
        effects[:, 1], effects[2, 4] = [1, 2, 3, 4, 5, 6], -2.0
        found = calibrated(effects)
        assert found.columns.tolist() == [1, 4] and found.counts["n_live_targets"] == 2
        assert found.p.tolist() == [2 / 2**6, 1.0]
        assert found.n_nonzero.tolist() == [6, 1] and found.consistency.tolist() == [1.0, 1.0]

    def test_active_nowhere(self):
        found = Calibrator(RULE, FEW, 6, 5, CPU).calibrate(3, np.zeros((0, 4)), np.zeros(6, dtype=bool))
        assert found.columns.size == 0 and found.counts["null_edges"] == 0
        assert found.counts["resampled_edges"] == [0] * FEW.n_resamples

    def test_draws_depend_on_the_feature_and_the_seed_only(self):
        effects = effects_of(20, 30)
        calibrator = Calibrator(RULE, FEW, 20, 5, CPU)
        everywhere = np.ones(20, dtype=bool)
        first = calibrator.calibrate(3, effects, everywhere)
        calibrator.calibrate(4, effects, everywhere)
        assert calibrator.calibrate(3, effects, everywhere).counts == first.counts == calibrated(effects).counts
        assert calibrated(effects, feature=4).counts != first.counts
        assert calibrated(effects, settings=CalibrationSettings(1, 2000, n_resamples=40)).counts != first.counts

    def test_hedges_g_and_its_interval(self):
        rng = np.random.default_rng(0)
        effects = rng.normal(0.8, 1.0, (20, 3000))
        g, low, high = hedges_g(effects)
        assert np.mean((low <= 0.8) & (high >= 0.8)) == pytest.approx(0.95, abs=0.012)
        assert g.mean() == pytest.approx(0.8, abs=0.015)  # d itself is biased by 4%
        few = rng.normal(2.0, 1.0, (8, 3000))  # where a correction of the ends would cost 3%
        _, low, high = hedges_g(few)
        assert np.mean((low <= 2.0) & (high >= 2.0)) == pytest.approx(0.95, abs=0.012)
        t = 3.0 * np.sqrt(8)  # the ends are the effect sizes at which a d of 3 is at the edge of what is usual
        of_three = (few - few.mean(axis=0)) / few.std(axis=0, ddof=1) + 3.0
        _, low, high = hedges_g(of_three[:, :1])
        assert nct.sf(t, 7, low[0] * np.sqrt(8)) == pytest.approx(0.025, abs=1e-6)
        assert nct.cdf(t, 7, high[0] * np.sqrt(8)) == pytest.approx(0.025, abs=1e-6)
        constant = hedges_g(np.ones((5, 1)))
        assert np.isnan(constant[1]).all() and np.isnan(hedges_g(effects[:2])[0]).all()

    @pytest.mark.parametrize("n_cells", [3, 13, 20, 50])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_interval_of_copies_of_one_cell(self, n_cells: int, sign: int):
        """They differ by rounding alone: d is beyond what SciPy's noncentral t takes, which never ends or is wrong."""
        noise = np.random.default_rng(n_cells).normal(size=n_cells)
        noise = (noise - noise.mean()) / noise.std(ddof=1)
        d = sign * 10.0 ** np.array([2, 3, 4, 5, 7, 9])
        g, low, high = hedges_g(noise[:, None] + d)
        assert (low < d).all() and (d < high).all() and (low < g).all() and (g < high).all()
        ratios = np.stack([low, high]) / d  # far out the interval is the same multiple of d
        np.testing.assert_allclose(ratios, np.broadcast_to(ratios[:, :1], ratios.shape), rtol=0.02)


@pytest.mark.parametrize("n_cells", [5, 8, 10, 20, 50])
def test_pure_noise_makes_no_discoveries_and_the_rule_s_rate_is_estimated(n_cells: int):
    rng = np.random.default_rng(n_cells)
    counts, features, every_p = PCounts(), [], []
    for feature in range(12):
        noise = rng.normal(size=(n_cells, 250)) * rng.gamma(2.0, size=250)
        found = calibrated(noise, feature)
        counts.add(*reversed(unpacked(found.counts["p"])))
        every_p.append(found.p)
        features.append({"n_edges": n_edges(noise), "calibration": found.counts})
    p = np.concatenate(every_p)
    assert (counts.q_values().bh < 0.05).sum() == 0
    assert np.mean(p < 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(p))
    if n_cells == 5:  # the smallest p of five cells is 1/16
        assert p.min() == 1 / 16
    rule = false_discovery_rate(features)
    if rule["observed_edges"] > 50:
        assert rule["fdr"] == pytest.approx(1, abs=4 / np.sqrt(rule["observed_edges"]))
    assert sum(stratum["observed_edges"] for stratum in by_degree(features)) == rule["observed_edges"]


def test_planted_effects_are_found_and_few_others():
    rng = np.random.default_rng(0)
    counts, found_in, is_planted = PCounts(), [], []
    features = []
    for feature in range(10):
        planted = rng.random(250) < 0.1
        effects = rng.normal(np.where(planted, 1.2, 0.0), 1.0, (20, 250))
        found = calibrated(effects, feature)
        counts.add(*reversed(unpacked(found.counts["p"])))
        found_in.append(found.p)
        is_planted.append(planted)
        features.append({"n_edges": n_edges(effects), "calibration": found.counts})
    planted, q = np.concatenate(is_planted), counts.q_values().of(np.concatenate(found_in))[0]
    assert np.mean(q[planted] < 0.05) > 0.9
    assert np.mean(~planted[q < 0.05]) < 0.09
    rule = false_discovery_rate(features)
    assert rule["fdr_low"] < rule["fdr"] < rule["fdr_high"] and 0.05 < rule["fdr"] < 0.3
