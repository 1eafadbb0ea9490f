"""The engine against the slow and obvious implementation in `reference.py`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM
from transformers.activations import ACT2FN

import reference
from cellcircuits.cells import Cell
from cellcircuits.effects import Bench, ablation_effect
from cellcircuits.geneformer import encoder_blocks
from cellcircuits.stats import EdgeRule, effect_statistics
from cellcircuits.tail import MeasuredPositions, Tail
from cellcircuits.tracing import BlockEffects, block_shard, trace_block
from conftest import random_model, random_sae
from sae_model import TopKSAE


@dataclass(frozen=True)
class Setup:
    """One small study; `specials` says whether cells are wrapped in <cls> (2) and <eos> (3)."""

    seed: int
    source: int
    targets: tuple[int, ...]
    lengths: tuple[int, ...]
    specials: bool = True
    n_layers: int = 4
    d_model: int = 24
    n_heads: int = 3
    n_features: int = 32
    k: int = 4
    n_traced: int = 8
    activation: str = "relu"

    def model(self) -> BertForMaskedLM:
        model = random_model(self.seed, n_layers=self.n_layers, d_model=self.d_model, n_heads=self.n_heads)
        return with_activation(model, self.activation)

    def saes(self) -> dict[int, TopKSAE]:
        """SAEs of different n_features and k per layer."""
        return {
            layer: random_sae(100 * self.seed + layer, self.d_model, self.n_features + 3 * layer, self.k + layer % 3)
            for layer in (self.source, *self.targets)
        }

    def cells(self) -> list[Cell]:
        return random_cells(self.seed, self.lengths, self.specials)

    def features(self) -> list[int]:
        return list(range(self.n_traced))


def random_cells(seed: int, lengths: Sequence[int], specials: bool = True, n_vocab: int = 64) -> list[Cell]:
    """Cells of the given numbers of tokens; without special tokens, 2 and 3 are genes like any other."""
    rng = np.random.default_rng(seed)
    cells = []
    for i, length in enumerate(lengths):
        if specials:
            genes = rng.choice(np.arange(4, n_vocab), length - 2, replace=False)
            tokens, positions = np.array([2, *genes, 3]), np.arange(1, length - 1)
        else:
            tokens, positions = rng.choice(np.arange(2, n_vocab), length, replace=False), np.arange(length)
            tokens = np.array([3, 2, *tokens[~np.isin(tokens, (2, 3))]])[:length]
        cells.append(Cell(f"cell{i}", i, tokens.astype(np.int64), positions.astype(np.int64)))
    return cells


def with_activation(model: BertForMaskedLM, name: str) -> BertForMaskedLM:
    """The model with another activation in its blocks."""
    for block in encoder_blocks(model):
        block.intermediate.intermediate_act_fn = ACT2FN[name]
    return model


@dataclass
class Traced:
    """What the engine says: facts per feature, d and consistency per edge, and the raw block."""

    bench: Bench
    block: BlockEffects
    facts: dict
    edges: dict = field(default_factory=dict)

    def effects(self, feature: int, layer: int) -> np.ndarray:
        j = self.block.features.index(feature)
        return self.block.effects[j][self.block.measured[j]][:, self.bench.columns[layer]]


def trace(
    model: BertForMaskedLM,
    saes: dict[int, TopKSAE],
    source: int,
    cells: Sequence[Cell],
    features: Sequence[int],
    batch_size: int | None = 7,
    rule: EdgeRule | None = None,
) -> Traced:
    bench = Bench(model, saes, source)
    block = BlockEffects.empty(features, len(cells), bench.n_targets)
    trace_block(bench, [bench.clean(cell) for cell in cells], block, batch_size=batch_size)
    shard = block_shard(bench, block, rule or EdgeRule(), "fingerprint")
    edges = {
        (row["source"], row["target_layer"], row["target"]): (row["cohens_d"], row["consistency"])
        for row in shard.edges.to_pylist()
    }
    return Traced(bench, block, dict(shard.facts), edges)


SETUPS = {
    "right_after_and_far": Setup(1, 1, (2, 3), (18, 25, 3, 31, 12, 22, 9, 16, 27, 20)),
    "source_0_every_layer": Setup(2, 0, (1, 2, 3), (14, 20, 11, 26, 17, 9, 23, 30, 12, 19)),
    "last_layer_only": Setup(3, 1, (4,), (15,) * 10, n_layers=5, d_model=32, n_heads=4, n_features=20, k=2),
    "no_special_tokens": Setup(4, 1, (2, 4), (10, 3, 17, 24, 8, 12, 21, 15, 13, 18), False, 5, 17, 1, 48, 6),
    "not_relu_and_last_target_before_end": Setup(
        5, 2, (3, 4), (12, 19, 16, 3, 9, 14, 13, 22, 11, 17), True, 7, 16, 2, 24, 3, activation="gelu"
    ),
    "one_block_away": Setup(6, 0, (1,), (11, 13, 3, 20, 3, 18, 15, 12, 9, 14), False, 2, 15, 5, 16, 5),
}


@pytest.fixture(params=SETUPS.values(), ids=SETUPS)
def setup(request: pytest.FixtureRequest) -> Setup:
    return request.param


class TestAgainstReference:
    def test_float64_same_edges_and_numbers(self, setup: Setup) -> None:
        model = setup.model().double()
        saes = {layer: sae.double() for layer, sae in setup.saes().items()}
        cells, features = setup.cells(), setup.features()
        traced = trace(model, saes, setup.source, cells, features)
        expected_edges = set()
        for feature in features:
            n_active, measured = reference.trace(model, saes, cells, [(setup.source, feature)], setup.targets)
            assert traced.facts[feature]["n_cells_active"] == n_active
            assert traced.facts[feature]["n_cells_measured"] == len(cells)
            for layer, of_layer in measured.items():
                ours = traced.effects(feature, layer)
                np.testing.assert_allclose(ours, of_layer.effects, rtol=0, atol=1e-10)
                statistics = effect_statistics(ours, EdgeRule())
                assert (abs(statistics.d - of_layer.d) <= 1e-6 * (1 + abs(of_layer.d))).all()
                np.testing.assert_array_equal(statistics.consistency, of_layer.consistency)
                expected_edges |= {(feature, layer, int(target)) for target in np.flatnonzero(of_layer.edges)}
        assert set(traced.edges) == expected_edges
        assert len(expected_edges) > 20, "the comparison must have something to compare"
        for (feature, layer, target), (d, consistency) in traced.edges.items():
            statistics = effect_statistics(traced.effects(feature, layer), EdgeRule())
            assert (d, consistency) == (statistics.d[target], statistics.consistency[target])

    def test_float32_same_edges_but_on_the_threshold(self, setup: Setup) -> None:
        """Effects agree within NOISE, d within 1e-3 (1 + |d|).

        An edge may differ where d is within 1e-3 of its threshold or the sign of an effect is noise: once at most.
        """
        model, saes, cells, features = setup.model(), setup.saes(), setup.cells(), setup.features()
        traced = trace(model, saes, setup.source, cells, features)
        noise, n_compared, n_excused = 5e-6, 0, 0
        for feature in features:
            n_active, measured = reference.trace(model, saes, cells, [(setup.source, feature)], setup.targets)
            assert traced.facts[feature]["n_cells_active"] == n_active
            if n_active < 2:
                continue
            for layer, of_layer in measured.items():
                ours = traced.effects(feature, layer)
                assert abs(ours - of_layer.effects).max() <= noise
                statistics = effect_statistics(ours, EdgeRule())
                assert (abs(statistics.d - of_layer.d) <= 1e-3 * (1 + abs(of_layer.d))).all()
                n_compared += len(of_layer.d)
                for target in np.flatnonzero(statistics.is_edge != of_layer.edges):
                    at_threshold = abs(abs(of_layer.d[target]) - 0.5) < 1e-3
                    sign_is_noise = (abs(of_layer.effects[:, target]) <= noise).any()
                    assert at_threshold or sign_is_noise
                    n_excused += 1
                zero = (of_layer.effects == 0).all(axis=0)
                assert not statistics.d[zero].any()
        assert n_compared >= 50
        assert n_excused <= 1

    def test_hooked_definition_agrees(self, setup: Setup) -> None:
        model = setup.model().double()
        saes = {layer: sae.double() for layer, sae in setup.saes().items()}
        bench = Bench(model, saes, setup.source)
        n_measured = 0
        for cell in setup.cells()[:3]:
            for feature in setup.features():
                expected = reference.cell_effect(model, saes, cell, [(setup.source, feature)], setup.targets)
                found = ablation_effect(bench, cell, feature)
                assert (found is None) == (expected is None)
                if expected is None:
                    continue
                n_measured += 1
                assert list(found) == list(setup.targets)
                for layer in setup.targets:
                    np.testing.assert_allclose(found[layer], expected[layer], rtol=0, atol=1e-10)
        assert n_measured > 3


class TestBatches:
    @pytest.mark.parametrize("name", ["right_after_and_far", "no_special_tokens"])
    def test_batch_size_does_not_matter(self, name: str) -> None:
        setup = SETUPS[name]
        model, saes, cells = setup.model(), setup.saes(), setup.cells()
        traces = [trace(model, saes, setup.source, cells, range(12), size) for size in (1, 2, 7, 100, None)]
        for other in traces[1:]:
            assert set(other.edges) == set(traces[0].edges)
            np.testing.assert_array_equal(other.block.measured, traces[0].block.measured)
            np.testing.assert_allclose(other.block.effects, traces[0].block.effects, rtol=0, atol=2e-5)

    def test_order_of_features_does_not_matter(self) -> None:
        setup = SETUPS["right_after_and_far"]
        model, saes, cells = setup.model(), setup.saes(), setup.cells()
        forward = trace(model, saes, setup.source, cells, [1, 4, 6, 9])
        backward = trace(model, saes, setup.source, cells, [9, 6, 4, 1])
        assert set(forward.edges) == set(backward.edges)

    def test_goes_on_after_the_cells_that_are_done(self) -> None:
        setup = SETUPS["right_after_and_far"]
        bench = Bench(setup.model(), setup.saes(), setup.source)
        cleans = [bench.clean(cell) for cell in setup.cells()]
        whole = BlockEffects.empty(range(6), len(cleans), bench.n_targets)
        trace_block(bench, cleans, whole)
        parts = BlockEffects.empty(range(6), len(cleans), bench.n_targets)
        parts.effects[:, :4], parts.measured[:, :4] = whole.effects[:, :4], whole.measured[:, :4]
        parts.n_cells_done = 4
        seen = []
        trace_block(bench, cleans, parts, on_cell=seen.append)
        assert seen == [6] * 6
        np.testing.assert_array_equal(parts.effects, whole.effects)

    def test_the_cells_clean_run_is_left_alone(self) -> None:
        setup = SETUPS["right_after_and_far"]
        bench = Bench(setup.model(), setup.saes(), setup.source)
        clean = bench.clean(setup.cells()[0])
        before = clean.residual.clone()
        features = [int(feature) for feature in np.unique(clean.source.features)[:5]]
        first, second = bench.effects(clean, features), bench.effects(clean, features)
        np.testing.assert_array_equal(first, second)
        assert torch.equal(clean.residual, before)
        assert not any(block._forward_hooks for block in encoder_blocks(bench.model))


def small(seed: int = 11, n_cells: int = 5) -> tuple[BertForMaskedLM, dict[int, TopKSAE], list[Cell]]:
    setup = Setup(seed, 1, (2, 3), tuple(range(8, 8 + n_cells)), n_features=24, k=3)
    return setup.model(), setup.saes(), setup.cells()


class TestWhereTheSourceIsActive:
    def test_nowhere(self) -> None:
        model, saes, cells = small()
        saes[1].W_enc.bias[5] = -50.0
        traced = trace(model, saes, 1, cells, [4, 5])
        assert traced.facts[5]["n_cells_active"] == 0
        assert traced.facts[5]["n_cells_measured"] == len(cells)
        assert not [edge for edge in traced.edges if edge[0] == 5]
        assert ablation_effect(traced.bench, cells[0], 5) is None
        with pytest.raises(ValueError, match="active nowhere"):
            traced.bench.effects(traced.bench.clean(cells[0]), [5])

    def test_a_block_without_any_active_feature(self) -> None:
        model, saes, cells = small()
        saes[1].W_enc.bias[[5, 6]] = -50.0
        traced = trace(model, saes, 1, cells, [5, 6])
        assert [traced.facts[feature]["n_cells_active"] for feature in (5, 6)] == [0, 0]
        assert traced.edges == {}

    def test_in_one_cell_only(self) -> None:
        model, saes, cells = small()
        lone = cells[2]
        saes[1].W_enc.bias[5] = -50.0
        stream = reference.streams_of(model, lone.tokens)[1][4] - saes[1].input_mean
        others = torch.cat([reference.streams_of(model, cell.tokens)[1] for cell in cells if cell is not lone])
        saes[1].W_enc.weight[5] = 100.0 * stream / stream.norm()
        margin = float(((others - saes[1].input_mean) @ saes[1].W_enc.weight[5]).max())
        peak = float(stream @ saes[1].W_enc.weight[5])
        assert peak > margin
        saes[1].W_enc.bias[5] = -max(margin, 0.9 * peak) - 10.0
        saes[1].W_enc.bias[6] = 1e3  # leaves k - 1 slots, so that -10 does not slip into the top k elsewhere
        traced = trace(model, saes, 1, cells, [5])
        n_active, measured = reference.trace(model, saes, cells, [(1, 5)], (2, 3))
        assert n_active == traced.facts[5]["n_cells_active"] == 1
        for layer in (2, 3):
            ours = effect_statistics(traced.effects(5, layer), EdgeRule())
            np.testing.assert_allclose(ours.mean, measured[layer].effects[0], atol=2e-5)
            assert ours.mean.any()
            assert not ours.d.any()
            assert not ours.consistency.any()
        assert traced.edges == {}

    @pytest.mark.parametrize("specials", [True, False])
    def test_at_every_position(self, specials: bool) -> None:
        """The average leaves <cls> and <eos> out, and so does the edit."""
        model, saes, _ = small()
        model, saes = model.double(), {layer: sae.double() for layer, sae in saes.items()}
        cells = random_cells(3, (3, 9, 14, 11), specials)
        saes[1].W_enc.bias[5] = 50.0
        traced = trace(model, saes, 1, cells, [5])
        assert len(traced.bench.clean(cells[1]).active_rows(5)) == len(cells[1].gene_positions)
        _, measured = reference.trace(model, saes, cells, [(1, 5)], (2, 3))
        for layer in (2, 3):
            np.testing.assert_allclose(traced.effects(5, layer), measured[layer].effects, rtol=0, atol=1e-10)

    def test_other_positions_never_make_a_cell_active(self) -> None:
        """A feature that fires where no gene is (as <cls> and <eos>) is active nowhere; elsewhere they do not count."""
        model, saes, cells = small()
        model, saes = model.double(), {layer: sae.double() for layer, sae in saes.items()}
        n_left_out = 0
        for cell in cells:
            chosen = reference.dense_encode(saes[1], reference.streams_of(model, cell.tokens)[1])[1]
            for feature in np.flatnonzero(chosen.any(dim=0).numpy())[:6]:
                fires = np.flatnonzero(chosen[:, feature].numpy())
                silent = np.setdiff1d(np.arange(len(cell.tokens)), fires)
                without = Cell(cell.name, cell.row, cell.tokens, silent)
                traced = trace(model, saes, 1, [without], [int(feature)])
                assert traced.facts[feature]["n_cells_active"] == 0
                if len(fires) < 2:
                    continue
                n_left_out += 1
                partly = Cell(cell.name, cell.row, cell.tokens, np.sort(np.append(silent, fires[0])))
                ours = trace(model, saes, 1, [partly], [int(feature)]).effects(int(feature), 3)
                expected = reference.cell_effect(model, saes, partly, [(1, int(feature))], [3])
                np.testing.assert_allclose(ours[0], expected[3], rtol=0, atol=1e-10)
        assert n_left_out > 3

    @pytest.mark.parametrize("batch_size", [1, 7])
    def test_selected_but_zero_is_active_without_effect(self, batch_size: int) -> None:
        """Among the k, but made 0 by the ReLU: the cell counts, and nothing whatsoever changes."""
        model, saes, cells = small()
        saes[1].W_enc.bias[:] = -60.0
        saes[1].W_enc.bias[[5, 6, 7]] = -50.0
        traced = trace(model, saes, 1, cells, [4, 5, 6, 7], batch_size)
        for feature in (5, 6, 7):
            assert traced.facts[feature]["n_cells_active"] == len(cells)
            for layer in (2, 3):
                assert not traced.effects(feature, layer).any()
        assert traced.edges == {}

    def test_zero_beside_features_that_do_something(self) -> None:
        """In one batch with features that move the stream, a zero latent still moves nothing: no edge from rounding."""
        model, saes, cells = small(12, 10)
        saes[1].W_enc.bias[:] = -60.0
        saes[1].W_enc.bias[[5, 6]] = -50.0
        saes[1].W_enc.bias[7] = 5.0
        traced = trace(model, saes, 1, cells, [5, 6, 7], 7)
        for layer in (2, 3):
            assert traced.effects(7, layer).any()
            assert not traced.effects(5, layer).any()
            assert not traced.effects(6, layer).any()
        assert {edge[0] for edge in traced.edges} == {7}

    def test_zero_whatever_a_batch_does_to_the_rounding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Kernels round differently at other batch sizes (GPUs always); an effect of exactly 0 must not see that."""
        model, saes, cells = small(12, 10)
        saes[1].W_enc.bias[:] = -60.0
        saes[1].W_enc.bias[[5, 6]] = -50.0
        saes[1].W_enc.bias[7] = 5.0
        plain = Tail.run

        def rounded(tail: Tail, streams: torch.Tensor, measured: MeasuredPositions, **start: int) -> Iterator[tuple]:
            for layer, stream in plain(tail, streams, measured, **start):
                yield layer, stream + 1e-6 * (len(streams) - 1)

        monkeypatch.setattr(Tail, "run", rounded)
        traced = trace(model, saes, 1, cells, [5, 6, 7], 7)
        assert not any(traced.effects(feature, layer).any() for feature in (5, 6) for layer in (2, 3))
        assert {edge[0] for edge in traced.edges} == {7}


class TestLayers:
    def test_layers_up_to_the_source_are_no_targets(self) -> None:
        """An SAE of an earlier layer is refused or left out, never read as a target that nothing fills."""
        setup = Setup(7, 2, (0, 3), (9, 12))
        try:
            bench = Bench(setup.model(), setup.saes(), 2)
        except ValueError:
            return
        assert bench.targets == (3,)

    def test_edges_name_their_layer_and_target(self) -> None:
        """Targets of different widths side by side are told apart."""
        model, saes, cells = small(13, 10)
        alone = trace(model, {layer: saes[layer] for layer in (1, 3)}, 1, cells, range(6))
        both = trace(model, saes, 1, cells, range(6))
        assert {edge for edge in both.edges if edge[1] == 3} == set(alone.edges)
        widths = {layer: saes[layer].n_features for layer in (2, 3)}
        assert widths[2] != widths[3]
        assert all(target < widths[layer] for _, layer, target in both.edges)
        assert {layer for _, layer, _ in both.edges} == {2, 3}

    def test_thresholds_reach_the_edges_of_a_trace(self) -> None:
        model, saes, cells = small(13, 10)
        rules = (EdgeRule(1.0, 0.9), EdgeRule(), EdgeRule(0.2, 0.5))
        strict, default, loose = (set(trace(model, saes, 1, cells, range(4), rule=rule).edges) for rule in rules)
        assert strict < default < loose
