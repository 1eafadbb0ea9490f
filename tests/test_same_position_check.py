"""The comparison of same-position and total effects against counting pair by pair."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

import reference_same_position as reference
from cellcircuits.effects import Bench, ablation_effect
from cellcircuits.same_position import SamePositionBench
from cellcircuits.same_position_check import compare, run_check, sample_features
from cellcircuits.stats import EdgeRule, EffectStatistics, effect_statistics
from test_engine import SETUPS, small
from test_same_position import in_float64, side_by_side


def statistics(effects: np.ndarray) -> EffectStatistics:
    return effect_statistics(effects, EdgeRule())


class TestComparison:
    def test_against_pairs_counted_one_by_one(self) -> None:
        rng = np.random.default_rng(0)
        columns = {2: slice(0, 7), 5: slice(7, 12)}
        total = [rng.normal(0.3, 1, (9, 12)) * (rng.random(12) < 0.7) for _ in range(4)]
        same = [0.5 * x + rng.normal(0, 0.2, (9, 12)) * (rng.random(12) < 0.6) for x in total]
        found = compare([statistics(x) for x in total], [statistics(x) for x in same], columns)
        for name, chosen in {"overall": range(12), "2": range(7), "5": range(7, 12)}.items():
            means, ds, edges = [], [], []
            for one, other in zip(map(statistics, total), map(statistics, same), strict=True):
                for j in chosen:
                    edges.append((one.is_edge[j], other.is_edge[j]))
                    if one.mean[j] != 0 or other.mean[j] != 0:
                        means.append((one.mean[j], other.mean[j]))
                        ds.append((one.d[j], other.d[j]))
            of = found["overall"] if name == "overall" else found["per_layer"][name]
            assert of["n_pairs"] == len(means)
            assert of["spearman_mean"] == pytest.approx(spearmanr(*zip(*means, strict=True)).statistic)
            ranked = spearmanr(*zip(*ds, strict=True)).statistic
            assert of["spearman_d"] == pytest.approx(ranked)
            both = sum(a and b for a, b in edges)
            assert of["n_edges_total_effect"] == sum(a for a, _ in edges)
            assert of["n_edges_same_position"] == sum(b for _, b in edges)
            assert of["n_edges_both"] == both
            assert of["edge_jaccard"] == pytest.approx(both / sum(a or b for a, b in edges))

    def test_opposite_signs_are_counted(self) -> None:
        effects = np.random.default_rng(1).normal(2, 0.5, (8, 3))
        found = compare([statistics(effects)], [statistics(effects * [1, -1, 1])], {4: slice(0, 3)})
        assert found["overall"]["n_edges_both"] == 3
        assert found["overall"]["n_edges_both_opposite_sign"] == 1

    @pytest.mark.parametrize("effects", [np.zeros((5, 3)), np.zeros((0, 3)), np.tile([0.0, 2.0, 0.0], (5, 1))])
    def test_undefined_is_none(self, effects: np.ndarray) -> None:
        """Nothing moved, nothing measured, or a single pair: no correlation, and never NaN."""
        found = compare([statistics(effects)], [statistics(effects)], {4: slice(0, 3)})
        json.dumps(found, allow_nan=False)
        assert found["overall"]["spearman_mean"] is None
        assert found["overall"]["spearman_d"] is None
        assert (found["overall"]["edge_jaccard"] is None) == (not effects.any())

    def test_equal_sizes_are_ties_whatever_the_rounding(self) -> None:
        """Targets that move in one of n cells have |d| = 1 / sqrt(n), and the last digit says nothing about them."""
        rng = np.random.default_rng(2)
        lone = np.zeros((7, 40))
        lone[rng.integers(0, 7, 40), np.arange(40)] = rng.uniform(0.1, 3, 40)
        effects = np.hstack([lone, rng.normal(0, 1, (7, 20))])
        found = compare([statistics(effects)], [statistics(1.1 * effects)], {4: slice(0, 60)})["overall"]
        assert found["spearman_d"] == pytest.approx(1, abs=1e-12)

    def test_no_features_at_all(self) -> None:
        assert compare([], [], {4: slice(0, 3)})["overall"]["n_pairs"] == 0

    def test_the_same_effects_agree_perfectly(self) -> None:
        effects = np.random.default_rng(1).normal(1, 1, (8, 30))
        found = compare([statistics(effects)], [statistics(effects)], {4: slice(0, 30)})["overall"]
        assert found["spearman_mean"] == found["spearman_d"] == found["edge_jaccard"] == pytest.approx(1)


class TestRun:
    def test_against_both_references(self) -> None:
        setup = SETUPS["right_after_and_far"]
        model, saes = in_float64(setup)
        total, same = Bench(model, saes, setup.source), SamePositionBench(model, saes, setup.source)
        cells, features = setup.cells(), list(range(6))
        found = run_check(total, same, [total.clean(cell) for cell in cells], features, EdgeRule())
        json.dumps(found, allow_nan=False)
        both = []
        for effect in (
            lambda cell, feature: ablation_effect(total, cell, feature),
            lambda cell, feature: reference.cell_effect(model, saes, cell, setup.source, feature, setup.targets),
        ):
            of_all = []
            for feature in features:
                rows = [effects for cell in cells if (effects := effect(cell, feature)) is not None]
                rows = [side_by_side(effects, setup.targets) for effects in rows]
                of_all.append(statistics(np.array(rows).reshape(-1, total.n_targets)))
            both.append(of_all)
        expected = compare(*both, total.columns)
        assert found["n_cells"] == len(cells)
        assert found["features"] == features
        assert found["overall"]["n_edges_both"] == expected["overall"]["n_edges_both"] > 20
        assert set(found["per_layer"]) == {"2", "3"}
        for name in ("spearman_mean", "spearman_d", "edge_jaccard"):
            assert found["overall"][name] == pytest.approx(expected["overall"][name], abs=1e-6)
            assert 0 < found["overall"][name] <= 1
        assert found["overall"]["spearman_mean"] < 1, "two quantities, not one"
        assert found["seconds_per_pair_total_effect"] > 0
        assert found["seconds_per_pair_same_position"] > 0

    def test_nothing_active(self) -> None:
        model, saes, cells = small()
        saes[1].W_enc.bias[5] = -50.0
        total, same = Bench(model, saes, 1), SamePositionBench(model, saes, 1)
        found = run_check(total, same, [total.clean(cell) for cell in cells], [5], EdgeRule())
        json.dumps(found, allow_nan=False)
        assert found["n_features_active"] == 0
        assert found["seconds_per_pair_total_effect"] is None

    def test_benches_of_different_layers_are_refused(self) -> None:
        model, saes, cells = small()
        total, same = Bench(model, saes, 1), SamePositionBench(model, saes, 1, targets=[2])
        with pytest.raises(ValueError, match="targets"):
            run_check(total, same, [total.clean(cells[0])], [5], EdgeRule())


class TestSample:
    def test_spread_evenly_and_ascending(self) -> None:
        assert sample_features(range(100), 4) == [12, 37, 62, 87]
        assert sample_features([9, 3, 7], 10) == [3, 7, 9]
        assert sample_features([9, 3, 7], 1) == [7]
        assert sample_features([], 5) == []
        for n in range(1, 40):
            chosen = sample_features(range(0, 74, 2), n)
            assert len(set(chosen)) == min(n, 37)
            assert chosen == sorted(chosen)
