"""Joint ablations against the slow and obvious implementation in `reference_combinations.py`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM

import reference
import reference_combinations as slow
from cellcircuits.cells import Cell
from cellcircuits.combination_stats import CombinationEffects, combination_statistics, condition_name, conditions
from cellcircuits.joint import JointBench, joint_ablation_effect
from cellcircuits.stats import EdgeRule, effect_statistics
from conftest import random_model, random_sae
from reference_combinations import Answer, Features, answer
from sae_model import TopKSAE
from test_engine import random_cells

Comparison = tuple[str, list[int], np.ndarray, np.ndarray]
LENGTHS = (14, 9, 3, 17, 6, 12, 8, 11, 4, 10)
NOISE = 5e-6  # of float32 effects of order 0.1, as in test_engine.py
TIE = 1e-4  # pre-activations this close may change places in float32


@dataclass(frozen=True)
class Case:
    """One random study: layers of A, B and C in that order; each feature is active in about 2/3 of the cells."""

    seed: int
    layers: tuple[int, ...]
    target: int
    n_layers: int
    d_model: int = 24
    n_heads: int = 3
    n_features: int = 30
    k: int = 3
    lengths: tuple[int, ...] = LENGTHS
    specials: bool = True

    def model(self, dtype: torch.dtype = torch.float64) -> BertForMaskedLM:
        model = random_model(self.seed, n_layers=self.n_layers, d_model=self.d_model, n_heads=self.n_heads)
        return model.to(dtype)

    def saes(self, dtype: torch.dtype = torch.float64) -> dict[int, TopKSAE]:
        """SAEs of different n_features and k per layer; the target's has many latents to move."""
        saes = {
            layer: random_sae(50 * self.seed + layer, self.d_model, self.n_features + 2 * layer, self.k + layer % 2)
            for layer in sorted({*self.layers})
        }
        saes[self.target] = random_sae(50 * self.seed + self.target, self.d_model, 50, 12)
        return {layer: sae.to(dtype) for layer, sae in saes.items()}

    def cells(self) -> list[Cell]:
        return random_cells(self.seed, self.lengths, self.specials)

    def features(self) -> Features:
        """Different features, active in a share of the cells that is as near to 2/3 as can be."""
        model, saes, cells = self.model(), self.saes(), self.cells()
        chosen: list[tuple[int, int]] = []
        for layer in self.layers:
            share = np.mean([active_anywhere(model, saes[layer], cell, layer) for cell in cells], axis=0)
            order = np.argsort(abs(share - 2 / 3), kind="stable")
            chosen.append(next((layer, int(j)) for j in order if (layer, int(j)) not in chosen))
        return tuple(chosen)


def active_anywhere(model: BertForMaskedLM, sae: TopKSAE, cell: Cell, layer: int) -> np.ndarray:
    chosen = reference.dense_encode(sae, reference.streams_of(model, cell.tokens)[layer])[1]
    return chosen[cell.gene_positions].any(dim=0).numpy()


CASES = {
    "ascending": Case(1, (0, 2, 4), 5, 6),
    "descending": Case(2, (5, 3, 0), 7, 8, d_model=16, n_heads=2),
    "one_layer": Case(3, (1, 1, 1), 2, 4, k=4),
    "two_on_the_later_layer": Case(4, (0, 2, 2), 3, 5, d_model=32, n_heads=4),
    "around_the_middle": Case(5, (2, 0, 2), 5, 7, specials=False),
    "target_in_the_middle": Case(6, (1, 0, 2), 4, 8, d_model=12, n_heads=1, k=2),
    "pair": Case(7, (0, 3), 4, 5),
    "pair_on_one_layer": Case(28, (2, 2), 3, 4, specials=False),
    "pair_descending": Case(49, (3, 1), 6, 7, d_model=16, n_heads=4),
}


@cache
def slow_case(case: Case) -> Answer:
    return answer(case.model(), case.saes(), case.cells(), case.features(), case.target)


def measured_effects(
    model: BertForMaskedLM,
    saes: dict[int, TopKSAE],
    cells: Sequence[Cell],
    features: Features,
    target: int,
    batch_size: int | None = None,
) -> CombinationEffects:
    """What the engine says over all cells."""
    bench = JointBench(model, saes, [layer for layer, _ in features], target)
    per_cell = [bench.effects(bench.clean(cell), features, batch_size) for cell in cells]
    return CombinationEffects(
        *(np.stack([getattr(of_one, name) for of_one in per_cell]) for name in ("measured", "published", "union")),
        additive=np.stack([of_one.additive for of_one in per_cell]),
    )


def engine_case(case: Case, dtype: torch.dtype) -> CombinationEffects:
    return measured_effects(case.model(dtype), case.saes(dtype), case.cells(), slow_case(case).features, case.target)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def by_name(order: int) -> dict[str, int]:
    return {condition_name(members): c for c, members in enumerate(conditions(order))}


def arrays_side_by_side(fast: CombinationEffects, expected: Answer) -> list[Comparison]:
    """(condition, numbers of the cells, the engine's effects, the reference's) of every average."""
    pairs = []
    for name, c in by_name(len(expected.features)).items():
        counted, everywhere = expected.effects.cells[name], expected.effects.union_cells
        assert np.flatnonzero(fast.measured[:, c]).tolist() == counted
        pairs.append((name, counted, fast.published[counted, c], expected.effects.published[name]))
        pairs.append((name, everywhere, fast.union[everywhere, c], expected.effects.union[name]))
        if len(name) > 1:
            pairs.append((name, counted, fast.additive[counted, c], expected.effects.surrogate[name]))
    return pairs


def assert_numbers(found: Any, expected: Any, relative: float, where: str = "") -> None:
    """The keys of `expected` and its integers exactly, its floats within `relative`."""
    if isinstance(expected, dict):
        assert set(expected) <= set(found), where
        for key, value in expected.items():
            assert_numbers(found[key], value, relative, f"{where}/{key}")
    elif isinstance(expected, int):
        assert found == expected, where
    else:
        assert math.isclose(found, expected, rel_tol=relative, abs_tol=relative), (where, found, expected)


class TestRandomModels:
    def test_there_is_something_to_compare(self, case: Case) -> None:
        """Cells without any of the features, cells without one of them, joint effects that are not sums."""
        expected = slow_case(case)
        n_counted = {name: len(cells) for name, cells in expected.effects.cells.items()}
        full = slow.LETTERS[: len(case.layers)]
        assert min(n_counted.values()) < n_counted[full]
        assert min(n_counted.values()) >= 2
        assert len(expected.per_target.targets) >= 15
        gap = expected.effects.published[full] - expected.effects.surrogate[full]
        assert abs(gap).max() > 1e-3 * abs(expected.effects.published[full]).max()

    def test_float64(self, case: Case) -> None:
        expected = slow_case(case)
        fast = engine_case(case, torch.float64)
        for _, _, ours, theirs in arrays_side_by_side(fast, expected):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-11)
        for name, c in by_name(len(case.layers)).items():
            statistics = effect_statistics(fast.published[fast.measured[:, c], c], EdgeRule())
            np.testing.assert_allclose(statistics.d, expected.per_target.d[name], rtol=1e-6, atol=1e-9)
            np.testing.assert_array_equal(statistics.consistency, expected.per_target.consistency[name])
            np.testing.assert_array_equal(statistics.is_edge, expected.per_target.significant[name])
        numbers = combination_statistics(fast, len(case.layers), EdgeRule())
        assert_numbers(numbers, expected.numbers, 1e-6)
        assert_numbers(numbers, expected.numbers_if_additive, 1e-6)

    def test_float32(self, case: Case) -> None:
        """Effects within NOISE but in a cell with a near tie; d, ratios and classes within 1e-3 of their spread."""
        expected = slow_case(case)
        fast = engine_case(case, torch.float32)
        tied = {
            cell
            for _, cells, ours, theirs in arrays_side_by_side(fast, expected)
            for cell, off in zip(cells, (abs(ours - theirs) > NOISE).any(axis=1), strict=True)
            if off
        }
        for cell in tied:
            assert smallest_gap(case, case.cells()[cell]) < TIE
        assert len(tied) <= 1
        if tied:
            return
        shaky = set()
        for name, c in by_name(len(case.layers)).items():
            statistics = effect_statistics(fast.published[fast.measured[:, c], c], EdgeRule())
            theirs = np.array(expected.per_target.d[name])
            assert (abs(statistics.d - theirs) <= 1e-3 * (1 + abs(theirs))).all()
            for target in np.flatnonzero(statistics.is_edge != expected.per_target.significant[name]):
                at_threshold = abs(abs(theirs[target]) - 0.5) < 1e-3
                assert at_threshold or (abs(expected.effects.published[name][:, target]) <= NOISE).any()
                shaky.add(int(target))
        assert len(shaky) <= 1
        numbers = combination_statistics(fast, len(case.layers), EdgeRule())
        if not shaky:
            assert_numbers(numbers, without_counts_of_classes(expected.numbers), 1e-3)
        assert_classes_up_to_the_boundary(numbers, expected, len(shaky))

    @pytest.mark.parametrize("batch_size", [1, 2, 3])
    def test_batches_do_not_matter(self, batch_size: int) -> None:
        case = CASES["ascending"]
        features = slow_case(case).features
        model, saes, cells = case.model(), case.saes(), case.cells()
        one = measured_effects(model, saes, cells, features, case.target)
        other = measured_effects(model, saes, cells, features, case.target, batch_size)
        np.testing.assert_array_equal(one.measured, other.measured)
        for name in ("published", "union", "additive"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=0, atol=1e-11)

    def test_hooked_definition(self, case: Case) -> None:
        expected = slow_case(case)
        bench = JointBench(case.model(), case.saes(), case.layers, case.target)
        full = slow.LETTERS[: len(case.layers)]
        rows = iter(expected.effects.published[full])
        for i, cell in enumerate(case.cells()):
            found = joint_ablation_effect(bench, cell, expected.features)
            assert (found is None) == (i not in expected.effects.cells[full])
            if found is not None:
                np.testing.assert_allclose(found, next(rows), rtol=0, atol=1e-10)


def smallest_gap(case: Case, cell: Cell) -> float:
    """Smallest distance between the last latent selected and the next, in any stream that a condition encodes."""
    model, saes, features = case.model(), case.saes(), slow_case(case).features
    gaps = []
    for members in [(), *conditions(len(features))]:
        by_layer: dict[int, list[int]] = {}
        for i in members:
            by_layer.setdefault(features[i][0], []).append(features[i][1])
        edits = {layer: reference.scaling(saes[layer], cell.gene_positions, of) for layer, of in by_layer.items()}
        streams = reference.streams_of(model, cell.tokens, edits)
        for layer, sae in saes.items():
            sizes = sae.pre_activations(streams[layer]).topk(sae.k + 1, dim=-1).values
            gaps.append(float((sizes[:, -2] - sizes[:, -1]).min()))
    return min(gaps)


def without_counts_of_classes(numbers: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in numbers.items() if "additive" not in key}


def assert_classes_up_to_the_boundary(numbers: dict[str, Any], expected: Answer, n_shaky: int) -> None:
    """A target may change its class where its ratio is within 1e-3 of 0.8 or 1.2."""
    order = len(expected.features)
    full, suffix = slow.LETTERS[:order], "" if order == 2 else "_3way"
    ratios = slow.ratios_on_targets(expected.per_target.d[full], expected.per_target, full)
    n_near = sum(1 for ratio in ratios if min(abs(ratio - 0.8), abs(ratio - 1.2)) < 1e-3)
    for name in ("subadditive", "additive", "superadditive"):
        difference = numbers[f"n_{name}{suffix}"] - expected.numbers[f"n_{name}{suffix}"]
        assert abs(difference) <= n_near + n_shaky


def small(n_cells: int = 6) -> tuple[Case, BertForMaskedLM, dict[int, TopKSAE], list[Cell]]:
    case = Case(21, (0, 1, 2), 3, 4, lengths=tuple(range(7, 7 + n_cells)))
    return case, case.model(), case.saes(), case.cells()


def both(
    model: BertForMaskedLM, saes: dict[int, TopKSAE], cells: Sequence[Cell], features: Features, target: int = 3
) -> tuple[CombinationEffects, Answer]:
    """The engine's effects and the reference's, which agree."""
    fast = measured_effects(model, saes, cells, features, target)
    expected = answer(model, saes, cells, features, target)
    for _, _, ours, theirs in arrays_side_by_side(fast, expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
    assert_numbers(combination_statistics(fast, len(features), EdgeRule()), expected.numbers, 1e-6)
    return fast, expected


NOTHING = {
    "pairwise_ratios": {"AB": 1.0, "AC": 1.0, "BC": 1.0},
    "threeway_ratio": 1.0,
    "n_subadditive_3way": 0,
    "n_additive_3way": 0,
    "n_superadditive_3way": 0,
    "higher_order_interaction_median": 0.0,
    "marginal_C_given_AB_median": 0.0,
}


class TestEdgesOfTheDefinition:
    def test_one_cell(self) -> None:
        case, model, saes, cells = small(1)
        fast, expected = both(model, saes, cells, case.features())
        assert fast.union.any()
        assert set(expected.numbers["n_significant"].values()) == {0}
        numbers = combination_statistics(fast, 3, EdgeRule())
        assert_numbers(numbers, NOTHING | {"threeway_ratio_if_additive": 1.0}, 0.0)

    def test_all_active_nowhere(self) -> None:
        _, model, saes, cells = small()
        for layer in (0, 1, 2):
            saes[layer].W_enc.bias[5] = -50.0
        fast, _ = both(model, saes, cells, ((0, 5), (1, 5), (2, 5)))
        assert not fast.measured.any()
        assert not fast.union.any()
        numbers = combination_statistics(fast, 3, EdgeRule())
        assert set(numbers["n_active"].values()) == {0}
        assert_numbers(numbers, NOTHING, 0.0)

    @pytest.mark.parametrize("silent", [0, 1, 2])
    def test_one_active_nowhere(self, silent: int) -> None:
        """Every condition with it equals the condition without it; alone it is no condition of any cell."""
        case, model, saes, cells = small()
        features = case.features()
        layer, index = features[silent]
        saes[layer].W_enc.bias[index] = -50.0
        fast, _ = both(model, saes, cells, features)
        names = by_name(3)
        letter = "ABC"[silent]
        assert not fast.measured[:, names[letter]].any()
        for name, c in names.items():
            if letter in name and len(name) > 1:
                rest = names[name.replace(letter, "")]
                np.testing.assert_allclose(fast.published[:, c], fast.published[:, rest], rtol=0, atol=0)
                np.testing.assert_allclose(fast.union[:, c], fast.union[:, rest], rtol=0, atol=0)
                np.testing.assert_array_equal(fast.measured[:, c], fast.measured[:, rest])

    def test_empty_unions(self) -> None:
        """Features that share no cell, and cells with none of them: every condition has its own cells."""
        case = Case(22, (0, 1), 3, 4, k=1, lengths=(4, 5, 4, 6, 4, 5, 4, 6, 5, 4))
        model, saes, cells = case.model(), case.saes(), case.cells()
        active = {layer: np.array([active_anywhere(model, saes[layer], c, layer) for c in cells]) for layer in (0, 1)}
        a, b = next(
            (a, b)
            for a in np.flatnonzero(active[0].sum(axis=0) >= 2)
            for b in np.flatnonzero(active[1].sum(axis=0) >= 2)
            if not (active[0][:, a] & active[1][:, b]).any() and not (active[0][:, a] | active[1][:, b]).all()
        )
        _, expected = both(model, saes, cells, ((0, int(a)), (1, int(b))))
        n = expected.numbers["n_active"]
        assert n["A"] + n["B"] == n["AB"] < len(cells)

    @pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, NOISE), (torch.float64, 1e-12)])
    def test_selected_but_zero(self, dtype: torch.dtype, noise: float) -> None:
        """B is among the k wherever it counts, but its latent is 0: measured, and its own effect is exactly 0."""
        case, model, saes, cells = small()
        features = case.features()
        saes[1].W_enc.bias[:] = -60.0
        saes[1].W_enc.bias[[5, 6, 7, 8]] = -50.0
        features = (features[0], (1, 5), features[2])
        if dtype == torch.float64:
            both(model, saes, cells, features)
        model, saes = model.to(dtype), {layer: sae.to(dtype) for layer, sae in saes.items()}
        fast, names = measured_effects(model, saes, cells, features, 3), by_name(3)
        assert fast.measured[:, names["B"]].all()
        assert not fast.published[:, names["B"]].any()
        for with_b, without in (("AB", "A"), ("BC", "C"), ("ABC", "AC")):
            np.testing.assert_allclose(fast.union[:, names[with_b]], fast.union[:, names[without]], rtol=0, atol=0)

    def test_wakes_up_only_after_the_earlier_ablation(self) -> None:
        """B is active nowhere in the clean pass, but A's removal lets it in: the joint ablation removes it too."""
        n_woken = 0
        for seed in range(30, 36):
            case = Case(seed, (0, 2), 3, 4, lengths=(8,), k=2)
            model, saes, cells = case.model(), case.saes(), case.cells()
            tokens, genes = cells[0].tokens, cells[0].gene_positions
            clean = reference.streams_of(model, tokens)
            seen = reference.dense_encode(saes[2], clean[2])[1][genes].any(dim=0)
            for a in np.flatnonzero(active_anywhere(model, saes[0], cells[0], 0)):
                ablated = reference.streams_of(model, tokens, {0: reference.scaling(saes[0], genes, [int(a)])})
                woken = reference.dense_encode(saes[2], ablated[2])[0][genes].any(dim=0) & ~seen
                for b in np.flatnonzero(woken.numpy())[:1]:
                    fast, _ = both(model, saes, cells, ((0, int(a)), (2, int(b))))
                    assert fast.measured[0].tolist() == [True, False, True]
                    assert (fast.published[0, 2] != fast.published[0, 0]).any()
                    n_woken += 1
        assert n_woken >= 3

    def test_order_of_the_list_only_renames(self) -> None:
        """Layers decide what is removed first, not the order in which the features are named."""
        case, model, saes, cells = small()
        a, b, c = case.features()
        one = measured_effects(model, saes, cells, (a, b, c), 3)
        other = measured_effects(model, saes, cells, (c, a, b), 3)
        names = by_name(3)
        for name, renamed in {"A": "B", "B": "C", "C": "A", "AB": "BC", "AC": "AB", "BC": "AC", "ABC": "ABC"}.items():
            np.testing.assert_allclose(
                one.published[:, names[name]], other.published[:, names[renamed]], rtol=0, atol=1e-11
            )
