"""Networks in which effects add exactly: what the published ratio says where there is no redundancy at all.

A `BertForMaskedLM` becomes linear when its layer norms and its activation are identities and its attention
is uniform (queries and keys 0). Its SAEs write in directions that no later SAE reads, so that nothing is
mediated: removing two features together is the sum of removing each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM

import reference
import reference_combinations as slow
from cellcircuits.cells import Cell
from cellcircuits.combination_stats import CombinationEffects, combination_statistics, condition_name, conditions
from cellcircuits.stats import EdgeRule
from conftest import random_model, random_sae
from reference_combinations import Answer, Features, answer
from sae_model import TopKSAE
from test_joint_reference import assert_numbers, measured_effects

D_MODEL, N_FEATURES, N_TARGETS, N_CELLS, TARGET = 32, 5, 24, 12, 4
PAIR, TRIPLET, SAME_LAYER = ((0, 3), (3, 0)), ((3, 2), (0, 1), (1, 4)), ((0, 3), (2, 1), (2, 4))


def linear_model(seed: int) -> BertForMaskedLM:
    """A float64 model whose blocks are linear in the stream."""
    model = random_model(seed, n_layers=TARGET + 1, d_model=D_MODEL, n_heads=4).double()
    for block in model.bert.encoder.layer:
        for projection in (block.attention.self.query, block.attention.self.key):
            projection.weight.zero_()
            projection.bias.zero_()
        block.attention.output.LayerNorm = block.output.LayerNorm = nn.Identity()
        block.intermediate.intermediate_act_fn = nn.Identity()
        block.output.dense.weight *= 0.5
    return model


def apply_blocks(model: BertForMaskedLM, streams: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    for layer in range(start + 1, stop + 1):
        streams = reference.stream_of(model.bert.encoder.layer[layer](streams))
    return streams


def propagators(model: BertForMaskedLM, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a direction becomes (d_model, d_model): as a deviation from the mean over positions, and as that mean."""
    unit = torch.eye(D_MODEL, dtype=torch.float64)
    rest = apply_blocks(model, torch.zeros(1, 2, D_MODEL, dtype=torch.float64), start, stop)
    deviation = apply_blocks(model, torch.stack([unit, -unit], 1), start, stop) - rest
    common = apply_blocks(model, torch.stack([unit, unit], 1), start, stop) - rest
    return deviation[:, 0].T, common[:, 0].T


@dataclass(frozen=True)
class Toy:
    """A linear network with cells whose positions are all genes."""

    model: BertForMaskedLM
    saes: dict[int, TopKSAE]
    cells: list[Cell]


def make_toy(seed: int, k: int, features: Features, activations: np.ndarray | None, *, mediated: bool = False) -> Toy:
    """A toy in which the mean latents (n_cells, order) of `features` are as wanted, up to a constant, if given.

    Every target reads all the features' directions with one weight. `mediated` leaves the decoder directions as
    they are, so that later SAEs do read them.
    """
    rng = np.random.default_rng(seed)
    model = linear_model(seed)
    cells = []
    for i in range(N_CELLS):
        tokens = rng.choice(np.arange(4, 64), 6 + i % 5, replace=False)
        cells.append(Cell(f"cell{i}", i, tokens, np.arange(len(tokens))))
    layers = sorted({layer for layer, _ in features})
    saes = {layer: random_sae(10 * seed + layer, D_MODEL, N_FEATURES, k).double() for layer in layers}
    streams = [reference.streams_of(model, cell.tokens) for cell in cells]
    if activations is not None:
        for (layer, index), wanted in zip(features, activations.T, strict=True):
            read(saes[layer], index, torch.stack([stream[layer].mean(0) for stream in streams]), wanted)
        for layer, sae in saes.items():  # the same constant everywhere, so that every activation is positive
            everywhere = torch.cat([stream[layer] for stream in streams])
            sae.W_enc.bias[:] = -(everywhere - sae.input_mean).matmul(sae.W_enc.weight.T).min() + 1.0
        highest = max(float(sae.W_enc.bias.max()) for sae in saes.values())
        for sae in saes.values():
            sae.W_enc.bias[:] = highest
    for layer in [] if mediated else layers:
        unread_directions(model, saes, layer)
    saes[TARGET] = target_sae(seed, model, saes, features)
    return Toy(model, saes, cells)


def read(sae: TopKSAE, index: int, mean_streams: torch.Tensor, wanted: np.ndarray) -> None:
    """Make feature `index` encode `wanted` (n_cells,) from the cells' mean streams (n_cells, d_model)."""
    weights = torch.linalg.pinv(mean_streams - sae.input_mean) @ torch.from_numpy(wanted)
    sae.W_enc.weight[index] = weights


def unread_directions(model: BertForMaskedLM, saes: dict[int, TopKSAE], layer: int) -> None:
    """Turn the decoder directions of `layer` so that no later SAE sees them."""
    readers = [
        sae.W_enc.weight @ propagator
        for later, sae in saes.items()
        if layer < later < TARGET
        for propagator in propagators(model, layer, later)
    ]
    if readers:
        rows = torch.cat(readers)
        directions = saes[layer].W_dec.weight
        directions -= torch.linalg.pinv(rows) @ (rows @ directions)


def target_sae(seed: int, model: BertForMaskedLM, saes: dict[int, TopKSAE], features: Features) -> TopKSAE:
    """Targets that are linear in the stream, and read every direction with one weight per target."""
    sae = random_sae(10 * seed + TARGET, D_MODEL, N_TARGETS, N_TARGETS).double()
    seen = torch.stack(
        [propagators(model, layer, TARGET)[1] @ saes[layer].W_dec.weight[:, index] for layer, index in features]
    )  # (order, d_model): what is left of each direction at the target
    weight = sae.W_enc.weight
    wanted = torch.linspace(0.5, 2.0, N_TARGETS, dtype=torch.float64) * (-1) ** torch.arange(N_TARGETS)
    weight += (wanted[:, None] - weight @ seen.T) @ torch.linalg.pinv(seen).T
    sae.W_enc.bias[:] = 1e4  # never clipped
    return sae


def correlated(order: int) -> np.ndarray:
    """Activations that go up and down together."""
    return np.repeat(np.linspace(-1.0, 1.0, N_CELLS)[:, None], order, axis=1)


def independent(order: int) -> np.ndarray:
    """Activations without any correlation over these cells, of equal spread."""
    rng = np.random.default_rng(0)
    centred = rng.normal(size=(N_CELLS, order))
    centred -= centred.mean(axis=0)
    return np.linalg.qr(centred)[0]


@pytest.fixture(params=[PAIR, TRIPLET, SAME_LAYER], ids=["pair", "triplet", "two_on_one_layer"])
def features(request: pytest.FixtureRequest) -> Features:
    return request.param


def record_of(toy: Toy, features: Features) -> dict[str, Any]:
    """What the engine and its statistics say, after agreeing with the reference."""
    fast = measured_effects(toy.model, toy.saes, toy.cells, features, TARGET)
    expected = answer(toy.model, toy.saes, toy.cells, features, TARGET)
    record = combination_statistics(fast, len(features), EdgeRule())
    assert_numbers(record, expected.numbers | expected.numbers_if_additive, 1e-7)
    assert record["n_significant"]["any"] >= N_TARGETS // 2
    return record


def ratios(record: dict[str, Any], suffix: str = "") -> dict[str, float]:
    """Median ratio per joint condition; `suffix` "_if_additive" for that of the surrogate."""
    if f"ratio_median{suffix}" in record:
        return {"AB": record[f"ratio_median{suffix}"]}
    return record[f"pairwise_ratios{suffix}"] | {"ABC": record[f"threeway_ratio{suffix}"]}


class TestNothingIsMediated:
    """Effects add exactly, and every record says so, whatever the ratio is."""

    @pytest.mark.parametrize(
        ("activations", "pair", "triplet"), [(correlated, 1 / 2, 1 / 3), (independent, 2**-0.5, 3**-0.5)]
    )
    def test_ratio_is_far_below_1(
        self, features: Features, activations: Callable[[int], np.ndarray], pair: float, triplet: float
    ) -> None:
        """As correlated or independent activations make it, and so is that of the surrogate."""
        toy = make_toy(3, N_FEATURES, features, activations(len(features)))
        record = record_of(toy, features)
        for found in (ratios(record), ratios(record, "_if_additive")):
            for condition, ratio in found.items():
                assert ratio == pytest.approx({2: pair, 3: triplet}[len(condition)], abs=1e-7)
        assert_adds(record)

    def test_sparse_activations(self, features: Features) -> None:
        """Features active at some positions of some cells: averages over unions dilute, in the surrogate as well."""
        n_diluted = 0
        for seed in (4, 5, 6):
            toy = make_toy(seed, 2, features, None)
            fast = measured_effects(toy.model, toy.saes, toy.cells, features, TARGET)
            n_diluted += not np.allclose(fast.published, fast.union)
            record = record_of(toy, features)
            observed, additive = ratios(record), ratios(record, "_if_additive")
            for condition, ratio in observed.items():
                assert additive[condition] == pytest.approx(ratio, abs=1e-7)
            assert_adds(record)
            for name in ("subadditive", "additive", "superadditive"):
                key = f"n_{name}" if len(features) == 2 else f"n_{name}_3way"
                assert record[key] == record[f"{key}_if_additive"]
        assert n_diluted >= 2


def assert_adds(record: dict[str, Any]) -> None:
    for of_condition in record["additivity_of_means"].values():
        assert of_condition["norm_ratio"] == pytest.approx(1, abs=1e-8)
        assert of_condition["relative_interaction"] < 1e-8
        assert of_condition["relative_deviation"] < 1e-8


@pytest.mark.parametrize("features", [PAIR, TRIPLET], ids=["pair", "triplet"])
def test_mediation_is_seen(features: Features) -> None:
    """Where a later SAE reads what an earlier feature writes, effects do not add: the same numbers tell."""
    toy = make_toy(5, N_FEATURES, features, correlated(len(features)), mediated=True)
    record = record_of(toy, features)
    observed, additive = ratios(record), ratios(record, "_if_additive")
    assert any(abs(observed[condition] - additive[condition]) > 1e-3 for condition in observed)
    assert all(of_one["relative_deviation"] > 1e-2 for of_one in record["additivity_of_means"].values())


def test_only_the_norms_see_redundancy_in_proportion() -> None:
    """Half of the sum in every cell: d and its ratios stay as they are, the norm of the mean halves."""
    rng = np.random.default_rng(0)
    singles = rng.normal(1.0, 0.6, (40, 2, 30))
    summed = singles.sum(axis=1, keepdims=True)
    effects = CombinationEffects(
        measured=np.ones((40, 3), dtype=bool),
        published=np.concatenate([singles, 0.5 * summed], axis=1),
        union=np.concatenate([singles, 0.5 * summed], axis=1),
        additive=np.concatenate([singles, summed], axis=1),
    )
    record = combination_statistics(effects, 2, EdgeRule())
    assert record["ratio_median"] == pytest.approx(record["ratio_median_if_additive"])
    assert record["additivity_of_means"]["AB"]["norm_ratio"] == pytest.approx(0.5)


class TestStatisticsOfTables:
    """Synthetic effects, many targets: the record against loops."""

    @pytest.mark.parametrize("order", [2, 3])
    @pytest.mark.parametrize("n_cells", [0, 1, 2, 5, 9])
    def test_against_loops(self, order: int, n_cells: int) -> None:
        rng = np.random.default_rng(10 * n_cells + order)
        n_targets, subsets = 40, conditions(order)
        shape = (n_cells, len(subsets), n_targets)
        effects = rng.normal(rng.normal(0, 0.7, (1, len(subsets), n_targets)), 1.0, shape)
        effects *= rng.random(shape) < rng.random((1, 1, n_targets))
        active = rng.random((n_cells, order)) < 0.7
        measured = np.stack([active[:, list(members)].any(axis=1) for members in subsets], axis=1)
        effects[~measured] = 0.0
        additive = np.stack([effects[:, list(members)].sum(axis=1) for members in subsets], axis=1)
        fast = CombinationEffects(measured, effects, effects, additive)
        names = [condition_name(members) for members in subsets]
        table = slow.Effects(
            published={name: effects[measured[:, c], c] for c, name in enumerate(names)},
            surrogate={name: additive[measured[:, c], c] for c, name in enumerate(names) if len(name) > 1},
            cells={name: np.flatnonzero(measured[:, c]).tolist() for c, name in enumerate(names)},
            union={name: effects[measured[:, -1], c] for c, name in enumerate(names)},
            union_cells=np.flatnonzero(measured[:, -1]).tolist(),
        )
        expected = Answer(((0, 0),) * order, table, slow.per_target(table.published, order))
        numbers = combination_statistics(fast, order, EdgeRule())
        assert_numbers(numbers, expected.numbers, 1e-9)
        if expected.per_target.targets:
            assert_numbers(numbers, expected.numbers_if_additive, 1e-9)
        assert (n_cells < 2) or expected.per_target.targets

    def test_tiny_denominators_and_class_boundaries(self) -> None:
        """Ratios of exactly 0.8 and 1.2 are additive; a denominator of 0.01 or less gives a ratio of 1."""
        assert slow.classes([0.8, 1.2, 0.79999, 1.20001, 1.0]) == (1, 3, 1)
        spread = np.array([-1.0, 1.0]) / math.sqrt(2)  # sd 1, so that d is the mean
        means = np.array([[0.004, 0.005, 2.0], [0.5, 0.5, 0.81], [0.5, 0.5, 1.19], [0.5, 0.5, 0.79], [2.0, 0.0, -2.5]])
        rows = means.T[None] + spread[:, None, None]
        rule = EdgeRule(0.1, 0.0)  # with two cells, consistency would leave out most of them
        measured = np.ones((2, 3), dtype=bool)
        numbers = combination_statistics(CombinationEffects(measured, rows, rows, rows), 2, rule)
        assert numbers["n_significant"]["any"] == 5
        assert numbers["n_superadditive"] == 1
        assert numbers["n_subadditive"] == 1
        assert numbers["ratio_median"] == pytest.approx(1.0)
