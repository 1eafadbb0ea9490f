"""additivity.py against full hooked passes and scipy's permutation test; rounding of exactly additive effects."""

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test

import reference_combinations as slow
import test_additive_toy as toys
from cellcircuits.additivity import above_rounding, combination_additivity
from cellcircuits.additivity_summary import fractions
from cellcircuits.combination_stats import AdditivitySettings, CombinationEffects, condition_name, conditions
from cellcircuits.combination_stats import interaction as by_inclusion_and_exclusion
from cellcircuits.edge_fdr import unpacked
from cellcircuits.joint import ROUNDING, JointBench
from test_joint_reference import CASES, Case, slow_case

SETTINGS = AdditivitySettings(n_draws=500, n_resamples=300, n_refined=3_000)
CPU = torch.device("cpu")


def measured(model, saes, cells, features, target) -> tuple[CombinationEffects, np.ndarray]:
    """The engine's effects over all cells, and its bound on rounding."""
    bench = JointBench(model, saes, [layer for layer, _ in features], target)
    per_cell = [bench.effects(bench.clean(cell), features) for cell in cells]
    names = ("measured", "published", "union", "additive")
    effects = CombinationEffects(*(np.stack([getattr(of_one, name) for of_one in per_cell]) for name in names))
    return effects, np.stack([of_one.rounding for of_one in per_cell])


@pytest.fixture(params=["ascending", "two_on_the_later_layer", "pair", "pair_descending"])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_interactions_and_p_are_those_of_full_passes(case: Case) -> None:
    """Every live target: mean interaction by hand from full passes, p from scipy's complete enumeration."""
    expected = slow_case(case)
    effects, rounding = measured(case.model(), case.saes(), case.cells(), expected.features, case.target)
    found = combination_additivity(effects, rounding, expected.features, SETTINGS, CPU)
    union = expected.effects.union
    n_cells = len(expected.effects.union_cells)
    assert found["n_cells"] == n_cells <= 10
    live = np.flatnonzero(np.any([(abs(rows) > 1e-9).any(axis=0) for rows in union.values()], axis=0))
    assert unpacked(found["live_targets"])[0].tolist() == live.tolist() and found["n_live_targets"] == len(live)
    means, n_compared = slow.mean_interactions(union), 0
    for name, condition in found["conditions"].items():
        between = interactions_of_cells(union, name)[:, live]
        np.testing.assert_allclose(between.mean(axis=0), means[name][live], atol=1e-12)
        numerators, denominator = unpacked(condition["p"])
        moved = np.flatnonzero((abs(between) > 1e-9).any(axis=0))
        assert (
            condition["n_changed"] == len(moved)
            and (numerators[np.setdiff1d(range(len(live)), moved)] >= denominator).all()
        )
        signs = 1 - 2 * ((np.arange(2**n_cells)[:, None] >> np.arange(n_cells)) & 1)
        for j in moved:
            values = np.where(abs(between[:, j]) > 1e-9, between[:, j], 0.0)
            as_large = abs(signs @ values) >= abs(values.sum()) - 1e-5 * abs(values).sum()  # equal but for rounding
            assert numerators[j] / denominator == pytest.approx(as_large.mean(), abs=1e-12)
            if abs(values[values != 0]).min() > 1e-3 * abs(values).sum() and n_compared < 12:
                test = permutation_test(
                    (values,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
                )
                assert numerators[j] / denominator == pytest.approx(test.pvalue, abs=1e-12)
                n_compared += 1
        for strong in condition["strongest"]:
            target = strong["target"]
            assert strong["mean_interaction"] == pytest.approx(means[name][target], rel=1e-6, abs=1e-11)
            assert strong["mean_joint"] == pytest.approx(union[name][:, target].mean(), rel=1e-6, abs=1e-11)
            single = sum(union[letter][:, target].mean() for letter in name)
            assert strong["mean_sum"] == pytest.approx(single, rel=1e-6, abs=1e-11)
        joint, summed = union[name], sum(union[letter] for letter in name)
        plug_in = 1 - np.linalg.norm(joint.mean(axis=0)) / np.linalg.norm(summed.mean(axis=0))
        assert condition["redundancy_index_plug_in"] == pytest.approx(plug_in, rel=1e-6)
    assert n_compared >= 4


def interactions_of_cells(union: dict, name: str) -> np.ndarray:
    if len(name) == 2:
        return union[name] - union[name[0]] - union[name[1]]
    a, b, c = name
    return union[name] - union[a + b] - union[a + c] - union[b + c] + union[a] + union[b] + union[c]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [toys.PAIR, toys.TRIPLET, toys.SAME_LAYER], ids=["pair", "triplet", "one_layer"])
def test_in_an_additive_network_nothing_is_called_and_the_index_is_0(features, dtype: torch.dtype) -> None:
    """In float32 the same passes do not add up exactly: without the bound on rounding, interactions would be there."""
    toy = toys.make_toy(3, toys.N_FEATURES, features, toys.independent(len(features)))
    saes = {layer: sae.to(dtype) for layer, sae in toy.saes.items()}
    effects, rounding = measured(toy.model.to(dtype), saes, toy.cells, features, toys.TARGET)
    subsets = conditions(len(features))
    union = {s: effects.union[:, c] for c, s in enumerate(subsets)}
    off = abs(by_inclusion_and_exclusion(union, subsets[-1]))
    assert off.max() > 0 and (off <= 2 ** len(features) * rounding).all()
    found = combination_additivity(effects, rounding, features, SETTINGS, CPU)
    assert found["n_live_targets"] == toys.N_TARGETS
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for condition in found["conditions"].values():
        numerators, denominator = unpacked(condition["p"])
        assert condition["n_changed"] == 0 and (numerators == denominator).all() and not condition["strongest"]
        for end in ("", "_low", "_high"):
            assert condition[f"redundancy_index{end}"] == pytest.approx(0, abs=tolerance)
            assert condition[f"projection{end}"] == pytest.approx(1, abs=tolerance)


def test_in_a_network_with_mediation_interactions_are_there() -> None:
    toy = toys.make_toy(5, toys.N_FEATURES, toys.PAIR, toys.correlated(2), mediated=True)
    effects, rounding = measured(toy.model, toy.saes, toy.cells, toys.PAIR, toys.TARGET)
    condition = combination_additivity(effects, rounding, toys.PAIR, SETTINGS, CPU)["conditions"]["AB"]
    numerators, denominator = unpacked(condition["p"])
    assert condition["n_changed"] == toys.N_TARGETS and (numerators / denominator).min() < 0.01


@pytest.mark.parametrize("name", ["ascending", "two_on_the_later_layer", "around_the_middle"])
def test_rounding_of_float32_is_within_its_bound(name: str) -> None:
    """Float32 against float64, every effect of every condition in cells without a near tie."""
    case = CASES[name]
    exact, _ = measured(case.model(), case.saes(), case.cells(), case.features(), case.target)
    rough, rounding = measured(
        case.model(torch.float32), case.saes(torch.float32), case.cells(), case.features(), case.target
    )
    off = abs(exact.union - rough.union)
    quiet = off.max(axis=(1, 2)) < 1e-4  # a near tie moves a latent by far more than rounding
    assert quiet.sum() >= len(quiet) - 1 and off[quiet].max() > 0
    assert (off[quiet] <= 2 * rounding[quiet, None]).all()
    assert (off[quiet] > 2 * rounding[quiet, None] / (100 * ROUNDING)).any()  # and it is not absurdly wide


def synthetic(joint_of, n_cells: int = 14, n_targets: int = 20) -> CombinationEffects:
    singles = np.random.default_rng(0).normal(1.0, 0.2, (n_cells, 2, n_targets))
    effects = np.concatenate([singles, joint_of(singles)[:, None]], axis=1)
    return CombinationEffects(np.ones((n_cells, 3), dtype=bool), effects, effects, effects)


@pytest.mark.parametrize(
    ("joint_of", "direction"),
    [(lambda x: 0.7 * x.sum(axis=1), 2), (lambda x: 1.4 * x.sum(axis=1), 1), (lambda x: -2.0 * x.sum(axis=1), 1)],
    ids=["smaller", "larger", "turned round and larger"],
)
def test_direction_is_that_of_the_size_of_the_sum(joint_of, direction: int) -> None:
    effects = synthetic(joint_of)
    condition = combination_additivity(effects, np.zeros((14, 20)), ((0, 1), (1, 2)), SETTINGS, CPU)["conditions"]["AB"]
    assert (unpacked(condition["direction"])[0] == direction).all()
    assert unpacked(condition["p"])[1] == SETTINGS.n_draws + 1  # 14 cells: drawn


def test_draws_depend_on_the_features_the_condition_and_the_seed_only() -> None:
    noise = np.random.default_rng(1).normal(0, 1, (14, 20))
    effects = synthetic(lambda x: x.sum(axis=1) + noise)

    def answer(features=((0, 1), (1, 2)), seed: int = 0) -> dict:
        settings = AdditivitySettings(seed, 500, 300, 3_000)
        return combination_additivity(effects, np.zeros((14, 20)), features, settings, CPU)["conditions"]["AB"]

    assert answer() == answer()
    for other in (answer(((0, 1), (1, 3))), answer(seed=1)):
        assert np.divide(*fractions(other)).tolist() != np.divide(*fractions(answer())).tolist()
        assert other["redundancy_index"] == answer()["redundancy_index"]
        assert other["redundancy_index_low"] != answer()["redundancy_index_low"]


def test_cells_without_any_feature_do_not_count() -> None:
    effects = synthetic(lambda x: 0.7 * x.sum(axis=1))
    measured_in = np.arange(14) % 2 == 0
    sparse = CombinationEffects(effects.measured & measured_in[:, None], *(effects.union,) * 3)
    some = CombinationEffects(effects.measured[measured_in], *(effects.union[measured_in],) * 3)
    features = ((0, 1), (1, 2))
    found = combination_additivity(sparse, np.zeros((14, 20)), features, SETTINGS, CPU)
    assert found == combination_additivity(some, np.zeros((7, 20)), features, SETTINGS, CPU) and found["n_cells"] == 7


@pytest.mark.parametrize("n_cells", [0, 1])
def test_no_cell_and_one(n_cells: int) -> None:
    effects = synthetic(lambda x: x.sum(axis=1) + 1, n_cells=1)
    none = CombinationEffects(effects.measured & (n_cells > 0), *(effects.union,) * 3)
    found = combination_additivity(none, np.zeros((1, 20)), ((0, 1), (1, 2)), SETTINGS, CPU)
    assert found["n_cells"] == n_cells and found["n_live_targets"] == 20 * n_cells
    condition = found["conditions"]["AB"]
    assert condition["reason"] == "fewer than two cells" and condition["redundancy_index"] is None
    numerators, denominator = unpacked(condition["p"])
    assert len(numerators) == 20 * n_cells and (numerators == denominator).all()


def test_rounding_counts_per_cell_and_condition() -> None:
    union = {(0,): np.zeros((2, 3)), (1,): np.zeros((2, 3)), (0, 1): np.array([[3.9, 4.1, -4.1], [-4.1, 0.0, 9.0]])}
    kept = above_rounding(union, (0, 1), np.ones((2, 3)))
    np.testing.assert_array_equal(kept, [[0, 4.1, -4.1], [-4.1, 0, 9.0]])
    assert condition_name((0, 1)) == "AB"


@pytest.mark.parametrize(("n_cells", "n_refined"), [(14, 30_000), (14, 0), (12, 30_000)])
def test_small_p_are_refined(n_cells: int, n_refined: int) -> None:
    """Against the complete list of sign vectors; targets from no interaction to one in every cell."""
    rng = np.random.default_rng(5)
    shift = np.linspace(0, 3, 20)
    effects = synthetic(lambda x: x.sum(axis=1) + rng.normal(shift, 1.0, (n_cells, 20)), n_cells)
    settings = AdditivitySettings(0, 1_000, 100, n_refined)
    features = ((0, 1), (1, 2))
    condition = combination_additivity(effects, np.zeros((n_cells, 20)), features, settings, CPU)["conditions"]["AB"]
    p = np.divide(*fractions(condition))
    between = effects.union[:, 2] - effects.union[:, :2].sum(axis=1)
    signs = 1 - 2 * ((np.arange(2**n_cells)[:, None] >> np.arange(n_cells)) & 1)
    exact = (abs(signs @ between) >= abs(between.sum(axis=0)) * (1 - 1e-9)).mean(axis=0)
    assert exact.min() < 1e-3 < exact.max()
    n_small = len(unpacked(condition["p_refined"])[0])
    if n_cells <= 12:
        assert n_small == 0 and p == pytest.approx(exact)
        return
    n_vectors = np.where(p <= 12 / 1_001, 1_001 + n_refined, 1_001)
    assert (abs(p - exact) <= 5 * np.sqrt(exact / n_vectors) + 2 / n_vectors).all()
    assert (n_small > 3) == (n_refined > 0) and (p.min() < 1 / 1_001) == (n_refined > 0)
