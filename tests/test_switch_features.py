"""Activations per cell and the rule for switch features, against slow and obvious versions."""

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control, linregress, pearsonr, rankdata, spearmanr

from cellcircuits import switch_features as switches
from cellcircuits.cells import Cell
from cellcircuits.errors import UserError
from conftest import random_model, random_sae
from reference import dense_encode, streams_of

N_CELLS, N_FEATURES = 40, 30


def random_order(rng: np.random.Generator, n_left_out: int = 4) -> switches.CellOrder:
    time = rng.permutation(np.linspace(0, 1, N_CELLS))
    time[rng.choice(N_CELLS, n_left_out, replace=False)] = np.nan
    low, high = np.percentile(time[~np.isnan(time)], [33.3, 66.7])
    n_genes = rng.integers(200, 220, N_CELLS).astype(np.float64)
    return switches.CellOrder(time, np.flatnonzero(time <= low), np.flatnonzero(time >= high), n_genes)


def random_activations(rng: np.random.Generator, order: switches.CellOrder, strength: float = 1.0) -> np.ndarray:
    """Sparse activations, some of which follow pseudotime; 0 is a frequent value, so ranks are tied."""
    time = np.nan_to_num(order.pseudotime, nan=0.5)
    slope = strength * rng.normal(0, 3, N_FEATURES)
    noise = rng.normal(0, 1, (N_CELLS, N_FEATURES))
    return np.maximum(0, slope * (time[:, None] - 0.5) + noise).astype(np.float32)


class TestStatistics:
    @pytest.fixture(params=range(3))
    def case(self, request):
        rng = np.random.default_rng(request.param)
        order = random_order(rng)
        activations = random_activations(rng, order)
        activations[:, 4] = 0  # never active
        activations[:, 9] = 0.5  # the same in all cells
        activations[1:, 11] = 0  # in one cell of forty
        activations[0, 11] = 1
        return activations, order

    def test_tested_features_are_active_in_enough_cells_and_vary(self, case):
        activations, order = case
        used = ~np.isnan(order.pseudotime)
        found = switches.layer_statistics(activations, order, 0.05)
        expected = [
            f for f in range(N_FEATURES)
            if sum(activations[used, f] > 0) / sum(used) >= 0.05 and len(set(activations[used, f])) > 1
        ]  # fmt: skip
        assert found.features.tolist() == expected
        assert not {4, 9, 11} & set(expected)
        for i, feature in enumerate(expected):
            assert found.freq[i] == np.mean(activations[used, feature] > 0)

    def test_sizes_and_correlations(self, case):
        activations, order = case
        used = ~np.isnan(order.pseudotime)
        found = switches.layer_statistics(activations, order, 0.05)
        for i, feature in enumerate(found.features):
            values = activations[:, feature].astype(np.float64)
            early, late = values[order.early], values[order.late]
            pooled = ((len(early) - 1) * np.var(early, ddof=1) + (len(late) - 1) * np.var(late, ddof=1)) / (
                len(early) + len(late) - 2
            )
            assert found.d[i] == pytest.approx((late.mean() - early.mean()) / pooled**0.5, rel=1e-9)
            slow = spearmanr(values[used], order.pseudotime[used])
            assert found.rho[i] == pytest.approx(slow.statistic, abs=1e-12)
            assert found.p[i] == pytest.approx(slow.pvalue, rel=1e-6)
            ranks = [rankdata(x[used]) for x in (values, order.pseudotime, order.n_genes)]
            residuals = []
            for rank in ranks[:2]:
                line = linregress(ranks[2], rank)
                residuals.append(rank - line.slope * ranks[2] - line.intercept)
            assert found.rho_given_n_genes[i] == pytest.approx(pearsonr(*residuals).statistic, abs=1e-9)

    def test_nothing_to_control_for_where_all_cells_detect_as_many_genes(self, case):
        activations, order = case
        same = switches.CellOrder(order.pseudotime, order.early, order.late, np.full(N_CELLS, 300.0))
        found = switches.layer_statistics(activations, same, 0.05)
        np.testing.assert_allclose(found.rho_given_n_genes, found.rho, atol=1e-12)

    def test_a_feature_that_counts_genes_has_no_partial_correlation(self, case):
        _, order = case
        activations = np.repeat(order.n_genes[:, None], N_FEATURES, axis=1) / 1000
        found = switches.layer_statistics(activations, order, 0.05)
        assert np.isnan(found.rho_given_n_genes).all()
        assert np.isfinite(found.rho).all()

    def test_a_perfect_switch_has_no_size_but_a_correlation(self, case):
        _, order = case
        step = np.zeros((N_CELLS, 1))
        step[order.late] = 1.0
        found = switches.layer_statistics(step, order, 0.05)
        assert np.isnan(found.d).all()
        panel = switches.switch_features({3: found}, switches.SwitchRule(), {3: {0: "x"}})
        assert panel == []

    def test_a_perfect_correlation(self):
        time = np.linspace(0, 1, N_CELLS)
        rho, p = switches.spearman(np.stack([time, -time], axis=1), time)
        np.testing.assert_allclose(rho, [1, -1])
        assert (p < 1e-100).all()


def slow_panel(statistics, rule, labels):
    """The rule, feature by feature."""
    p = [x for found in statistics.values() for x in found.p]
    q = iter(false_discovery_control(p))
    panel = []
    for layer, found in statistics.items():
        rows = [
            {"layer": layer, "idx": int(f), "d": float(d), "freq": float(freq),
             "spearman_rho": float(rho), "q": float(next(q)),
             "rho_given_n_genes": float(partial), "label": labels[layer][int(f)]}
            for f, d, freq, rho, partial in zip(
                found.features, found.d, found.freq, found.rho, found.rho_given_n_genes, strict=True
            )
        ]  # fmt: skip
        on = sorted((r for r in rows if r["d"] >= rule.min_abs_d), key=lambda r: (-r["d"], r["idx"]))[: rule.n_on]
        off = sorted((r for r in rows if r["d"] <= -rule.min_abs_d), key=lambda r: (r["d"], r["idx"]))[: rule.n_off]
        panel += [{**r, "kind": "ON"} for r in on] + [{**r, "kind": "OFF"} for r in off]
    return panel


class TestRule:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("rule", [switches.SwitchRule(), switches.SwitchRule(0.05, 0.2, 3, 2)], ids=["own", "few"])
    def test_equals_the_slow_version(self, seed, rule):
        rng = np.random.default_rng(seed)
        order = random_order(rng)
        statistics = {
            layer: switches.layer_statistics(random_activations(rng, order, 0.6), order, rule.min_freq)
            for layer in (0, 5)
        }
        labels = {layer: {i: f"L{layer}F{i}" for i in range(N_FEATURES)} for layer in (0, 5)}
        panel = switches.switch_features(statistics, rule, labels)
        assert panel == slow_panel(statistics, rule, labels)
        assert {x["kind"] for x in panel} == {"ON", "OFF"}

    def test_equal_sizes_go_by_index(self):
        order = random_order(np.random.default_rng(0))
        one = random_activations(np.random.default_rng(1), order, 2.0)
        chosen = max(
            range(N_FEATURES), key=lambda f: np.nan_to_num(abs(switches.late_early_d(one, order.early, order.late)[f]))
        )
        found = switches.layer_statistics(np.repeat(one[:, [chosen]], 20, axis=1), order, 0.05)
        panel = switches.switch_features({0: found}, switches.SwitchRule(), {0: dict.fromkeys(range(20), "")})
        assert [x["idx"] for x in panel] == list(range(12 if panel[0]["kind"] == "ON" else 8))

    def test_the_smallest_size_counts(self):
        d = np.array([0.5, -0.5, 0.499, -0.499])
        found = switches.LayerStatistics(np.arange(4), *(np.ones(4), d, np.zeros(4), np.ones(4), np.zeros(4)))
        panel = switches.switch_features({0: found}, switches.SwitchRule(), {0: dict.fromkeys(range(4), "")})
        assert [(x["idx"], x["kind"]) for x in panel] == [(0, "ON"), (1, "OFF")]

    def test_nothing_tested_gives_nothing(self):
        order = random_order(np.random.default_rng(0))
        found = switches.layer_statistics(np.zeros((N_CELLS, 5), dtype=np.float32), order, 0.05)
        assert switches.switch_features({2: found}, switches.SwitchRule(), {2: {}}) == []

    def test_a_missing_number_is_null(self):
        order = random_order(np.random.default_rng(0))
        by_genes = switches.CellOrder(order.pseudotime, order.early, order.late, np.nan_to_num(order.pseudotime))
        found = switches.layer_statistics(random_activations(np.random.default_rng(1), order), by_genes, 0.05)
        panel = switches.switch_features({2: found}, switches.SwitchRule(), {2: dict.fromkeys(range(N_FEATURES), "")})
        assert panel
        assert all(x["rho_given_n_genes"] is None for x in panel)


class TestActivations:
    def cells(self):
        rng = np.random.default_rng(0)
        lengths = (7, 12, 1)
        return [
            Cell(f"c{n}", n, np.array([2, *rng.integers(4, 64, n_gene), 3]), np.arange(1, n_gene + 1))
            for n, n_gene in enumerate(lengths)
        ]

    def test_mean_largest_and_share_over_gene_positions(self):
        model, cells = random_model(), self.cells()
        saes = {1: random_sae(1, 24, 40, 4), 3: random_sae(3, 24, 33, 5)}
        found = switches.cell_activations(model, saes, cells)
        assert sorted(found) == sorted(f"layer_{n}{kind}" for n in saes for kind in ("", "_max", "_frac"))
        for number, cell in enumerate(cells):
            streams = streams_of(model, torch.from_numpy(cell.tokens))
            for layer, sae in saes.items():
                latents, chosen = dense_encode(sae, streams[layer][torch.from_numpy(cell.gene_positions)])
                expected = {"": latents.mean(0), "_max": latents.max(0).values, "_frac": chosen.float().mean(0)}
                for kind, of_kind in expected.items():
                    values = found[f"layer_{layer}{kind}"][number]
                    assert values.dtype == np.float32
                    np.testing.assert_allclose(values, of_kind.numpy(), rtol=1e-4, atol=1e-6)

    def test_a_broken_model_is_named(self):
        model = random_model()
        model.bert.encoder.layer[0].output.dense.weight += float("nan")
        words = "cell c0: NaN or infinite values in the residual stream at layer 1, first at position"
        with pytest.raises(UserError, match=words):
            switches.cell_activations(model, {1: random_sae(1, 24, 40, 4)}, self.cells())
