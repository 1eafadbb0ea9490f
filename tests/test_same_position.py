"""The same-position effect against slow implementations of its definition."""

import logging

import numpy as np
import pytest
import torch

import reference_same_position as reference
from cellcircuits import same_position
from cellcircuits.cells import Cell
from cellcircuits.effects import Bench, ablation_effect
from cellcircuits.graph_store import EDGE_SCHEMA
from cellcircuits.same_position import SamePositionBench, same_position_effect
from cellcircuits.stats import EdgeRule
from cellcircuits.tail import Tail
from cellcircuits.tracing import BlockEffects, block_shard, trace_block
from test_engine import SETUPS, Setup, random_cells, small


@pytest.fixture(params=SETUPS.values(), ids=SETUPS)
def setup(request: pytest.FixtureRequest) -> Setup:
    return request.param


def in_float64(setup: Setup) -> tuple:
    return setup.model().double(), {layer: sae.double() for layer, sae in setup.saes().items()}


def active_features(clean) -> list[int]:
    return [int(feature) for feature in np.unique(clean.source.features)]


def side_by_side(effects: dict[int, np.ndarray], targets: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([effects[layer] for layer in targets])


class TestAgainstReference:
    def test_putting_streams_back_is_the_definition(self) -> None:
        for name in ("right_after_and_far", "no_special_tokens"):
            setup = SETUPS[name]
            model, saes = in_float64(setup)
            for cell, feature in zip(setup.cells()[:3], (0, 3, 5), strict=True):
                put_back = reference.edited_streams(model, saes, cell, setup.source, feature)
                for layer, streams in reference.literal_streams(model, saes, cell, setup.source, feature).items():
                    for position, stream in streams.items():
                        np.testing.assert_allclose(put_back[layer][position].numpy(), stream, rtol=0, atol=1e-10)

    @pytest.mark.parametrize(("dtype", "noise"), [(torch.float64, 1e-10), (torch.float32, 5e-6)])
    def test_effects(self, setup: Setup, dtype: torch.dtype, noise: float) -> None:
        model = setup.model().to(dtype)
        saes = {layer: sae.to(dtype) for layer, sae in setup.saes().items()}
        bench = SamePositionBench(model, saes, setup.source)
        n_compared = 0
        for cell in setup.cells()[:4]:
            clean = bench.clean(cell)
            features = active_features(clean)[:8]
            ours = bench.effects(clean, features)
            for feature, found in zip(features, ours, strict=True):
                expected = reference.cell_effect(model, saes, cell, setup.source, feature, setup.targets)
                np.testing.assert_allclose(found, side_by_side(expected, setup.targets), rtol=0, atol=noise)
                n_compared += expected[setup.targets[0]].any()
        assert n_compared > 10

    def test_hooked_definition(self, setup: Setup) -> None:
        model, saes = in_float64(setup)
        bench = SamePositionBench(model, saes, setup.source)
        n_measured = 0
        for cell in setup.cells()[:2]:
            for feature in setup.features():
                expected = reference.cell_effect(model, saes, cell, setup.source, feature, setup.targets)
                found = same_position_effect(bench, cell, feature)
                assert (found is None) == (expected is None)
                if expected is not None:
                    n_measured += 1
                    assert list(found) == list(setup.targets)
                    for layer in setup.targets:
                        np.testing.assert_allclose(found[layer], expected[layer], rtol=0, atol=1e-10)
        assert n_measured > 1

    @pytest.mark.parametrize("specials", [True, False])
    @pytest.mark.parametrize("positions", [[4], [4, 5], [2, 7], [1, 2, 3, 4, 5, 6, 7]])
    def test_wherever_the_feature_is_active(self, specials: bool, positions: list[int]) -> None:
        """At one position, at neighbours, at distant ones, at all but the ends."""
        model, saes, _ = small()
        model, saes = model.double(), {layer: sae.double() for layer, sae in saes.items()}
        cell = random_cells(5, (9,), specials)[0]
        saes[1].W_enc.bias[5] = 50.0  # active everywhere; the cell's list of gene positions leaves the rest out
        cell = Cell(cell.name, cell.row, cell.tokens, np.array(positions))
        bench = SamePositionBench(model, saes, 1)
        clean = bench.clean(cell)
        assert len(clean.active_rows(5)) == len(positions)
        expected = reference.cell_effect(model, saes, cell, 1, 5, (2, 3))
        found = bench.effects(clean, [5])[0]
        np.testing.assert_allclose(found, side_by_side(expected, (2, 3)), rtol=0, atol=1e-10)
        assert found.any()

    @pytest.mark.parametrize("specials", [True, False])
    def test_at_every_position(self, specials: bool) -> None:
        """Without special tokens nothing is left to stay clean, and the quantity is the total effect."""
        model, saes, _ = small()
        model, saes = model.double(), {layer: sae.double() for layer, sae in saes.items()}
        saes[1].W_enc.bias[5] = 50.0
        bench = SamePositionBench(model, saes, 1)
        for cell in random_cells(3, (3, 9, 14), specials):
            found = bench.effects(bench.clean(cell), [5])[0]
            expected = reference.cell_effect(model, saes, cell, 1, 5, (2, 3))
            np.testing.assert_allclose(found, side_by_side(expected, (2, 3)), rtol=0, atol=1e-10)
            total = side_by_side(ablation_effect(bench, cell, 5), (2, 3))
            assert np.allclose(found, total, rtol=0, atol=1e-10) == (not specials)

    def test_one_block_on_it_is_the_total_effect(self) -> None:
        """Other positions first differ in what block source + 1 writes, which only the block after it reads."""
        model, saes, cells = small()
        model, saes = model.double(), {layer: sae.double() for layer, sae in saes.items()}
        bench, plain = SamePositionBench(model, saes, 1), Bench(model, saes, 1)
        differs = False
        for cell in cells:
            clean = bench.clean(cell)
            features = active_features(clean)
            same, total = bench.effects(clean, features), plain.effects(clean, features)
            np.testing.assert_allclose(same[:, bench.columns[2]], total[:, bench.columns[2]], rtol=0, atol=1e-12)
            differs |= not np.allclose(same[:, bench.columns[3]], total[:, bench.columns[3]], rtol=0, atol=1e-6)
        assert differs

    def test_at_one_position_of_the_only_token(self) -> None:
        model, saes, _ = small()
        model, saes = model.double(), {layer: sae.double() for layer, sae in saes.items()}
        cell = Cell("one", 0, np.array([7]), np.array([0]))
        bench = SamePositionBench(model, saes, 1)
        clean = bench.clean(cell)
        features = active_features(clean)
        expected = [
            side_by_side(reference.cell_effect(model, saes, cell, 1, feature, (2, 3)), (2, 3)) for feature in features
        ]
        np.testing.assert_allclose(bench.effects(clean, features), expected, rtol=0, atol=1e-10)


class TestAsABench:
    def test_looks_like_a_bench(self) -> None:
        setup = SETUPS["no_special_tokens"]
        model, saes = setup.model(), setup.saes()
        total, same = Bench(model, saes, setup.source), SamePositionBench(model, saes, setup.source)
        assert (same.targets, same.columns, same.n_targets) == (total.targets, total.columns, total.n_targets)
        assert same.batch_size(20) >= 1
        cell = setup.cells()[0]
        one, other = total.clean(cell), same.clean(cell)
        assert torch.equal(one.residual, other.residual)
        for layer in total.targets:
            np.testing.assert_array_equal(one.targets[layer].values, other.targets[layer].values)

    def test_some_targets_and_a_shared_tail(self) -> None:
        """Targets are those asked for, and the tail may start before the source layer and end after its targets."""
        setup = SETUPS["source_0_every_layer"]
        model, saes = setup.model().double(), {layer: sae.double() for layer, sae in setup.saes().items()}
        cell = setup.cells()[1]
        whole = SamePositionBench(model, saes, 1)
        part = SamePositionBench(model, saes, 1, targets=[2, 3], tail=Tail(model, 0, [2, 3]))
        assert part.targets == whole.targets == (2, 3)
        clean = whole.clean(cell)
        features = active_features(clean)[:5]
        np.testing.assert_allclose(
            part.effects(part.clean(cell), features), whole.effects(clean, features), rtol=0, atol=1e-12
        )
        first = SamePositionBench(model, saes, 1, targets=[2])
        np.testing.assert_allclose(
            first.effects(first.clean(cell), features), whole.effects(clean, features)[:, whole.columns[2]], atol=1e-12
        )

    @pytest.mark.parametrize("batch_size", [1, 3, None])
    def test_traces_blocks(self, batch_size: int | None) -> None:
        setup = SETUPS["right_after_and_far"]
        model, saes = in_float64(setup)
        bench = SamePositionBench(model, saes, setup.source)
        cells, features = setup.cells()[:5], range(6)
        block = BlockEffects.empty(features, len(cells), bench.n_targets)
        trace_block(bench, [bench.clean(cell) for cell in cells], block, batch_size=batch_size)
        for j, feature in enumerate(features):
            for i, cell in enumerate(cells):
                expected = reference.cell_effect(model, saes, cell, setup.source, feature, setup.targets)
                assert block.measured[j, i] == (expected is not None)
                if expected is not None:
                    expected = side_by_side(expected, setup.targets)
                    np.testing.assert_allclose(block.effects[j, i], expected, rtol=0, atol=1e-10)
        shard = block_shard(bench, block, EdgeRule(), "fingerprint")
        assert shard.edges.schema.equals(EDGE_SCHEMA)
        assert len(shard.edges) > 0

    @pytest.mark.parametrize("rows_per_run", [1, 5, 20])
    def test_how_rows_are_divided_does_not_matter(self, rows_per_run: int, monkeypatch: pytest.MonkeyPatch) -> None:
        setup = SETUPS["no_special_tokens"]
        model, saes = in_float64(setup)
        bench = SamePositionBench(model, saes, setup.source)
        clean = bench.clean(setup.cells()[3])
        features = active_features(clean)
        at_once = bench.effects(clean, features)
        monkeypatch.setattr(same_position, "ROWS_PER_RUN", rows_per_run)
        np.testing.assert_allclose(bench.effects(clean, features), at_once, rtol=0, atol=1e-12)
        np.testing.assert_allclose(bench.effects(clean, features[::-1])[::-1], at_once, rtol=0, atol=1e-12)

    def test_active_nowhere_is_refused(self) -> None:
        model, saes, cells = small()
        saes[1].W_enc.bias[5] = -50.0
        bench = SamePositionBench(model, saes, 1)
        assert same_position_effect(bench, cells[0], 5) is None
        with pytest.raises(ValueError, match="active nowhere"):
            bench.effects(bench.clean(cells[0]), [5])

    def test_selected_but_zero_changes_nothing(self) -> None:
        model, saes, cells = small(12, 10)
        saes[1].W_enc.bias[:] = -60.0
        saes[1].W_enc.bias[[5, 6]] = -50.0
        saes[1].W_enc.bias[7] = 5.0
        bench = SamePositionBench(model, saes, 1)
        effects = bench.effects(bench.clean(cells[0]), [5, 7, 6])
        assert effects[1].any()
        assert not effects[[0, 2]].any()
        assert not bench.effects(bench.clean(cells[0]), [5, 6]).any()

    def test_an_edit_of_almost_nothing_leaves_rounding_only(self) -> None:
        """Clean latents come from whole streams, edited ones from rows: their rounding must not look like an effect."""
        model, saes, cells = small()
        bench = SamePositionBench(model, saes, 1)
        clean = bench.clean(cells[0])
        features = active_features(clean)
        effects = abs(bench.effects(clean, features)).max()
        saes[1].W_dec.weight *= 1e-12
        assert abs(bench.effects(clean, features)).max() < 1e-5 * effects

    def test_the_clean_run_is_left_alone(self) -> None:
        model, saes, cells = small()
        bench = SamePositionBench(model, saes, 1)
        clean = bench.clean(cells[0])
        before = clean.residual.clone()
        features = active_features(clean)
        np.testing.assert_array_equal(bench.effects(clean, features), bench.effects(clean, features))
        assert torch.equal(clean.residual, before)


class TestMemory:
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        passes = []
        plain = Tail.advance

        def counting(tail: Tail, streams: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            passes.append(stop)
            return plain(tail, streams, start, stop)

        monkeypatch.setattr(Tail, "advance", counting)
        return passes

    def test_keys_and_values_are_computed_once_per_cell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, saes, cells = small()
        passes = self.counted(monkeypatch)
        bench = SamePositionBench(model, saes, 1)
        cleans = [bench.clean(cell) for cell in cells]
        for _ in range(3):
            for clean in cleans:
                bench.effects(clean, active_features(clean)[:3])
        assert len(passes) == len(cells)  # the block between source and last target, once per cell

    def test_without_room_they_are_computed_again(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        model, saes, cells = small()
        roomy = SamePositionBench(model, saes, 1)
        cleans = [roomy.clean(cell) for cell in cells]
        expected = [roomy.effects(clean, active_features(clean)) for clean in cleans]
        one_cell = 2 * 2 * 24 * len(cells[0].tokens) * 4  # blocks, keys and values, d_model, tokens, bytes
        monkeypatch.setattr(same_position, "host_memory", lambda: one_cell / 0.3 + 1)
        passes = self.counted(monkeypatch)
        tight = SamePositionBench(model, saes, 1)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                for clean, whole in zip(cleans, expected, strict=True):
                    features = active_features(clean)
                    halves = [tight.effects(clean, features[:2]), tight.effects(clean, features[2:])]
                    np.testing.assert_allclose(np.concatenate(halves), whole, rtol=0, atol=2e-5)
        assert len(passes) == 1 + 2 * (len(cells) - 1)
        assert [record.message for record in caplog.records] == [
            "Memory has room for the clean keys and values of 1 of the cells; those of the others are computed again "
            "for every block of features."
        ]

    def test_room_is_counted_for_all_cells_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, saes, _ = small()
        cells = random_cells(4, (9, 9, 9, 9))
        one_cell = 2 * 2 * 24 * 9 * 4
        monkeypatch.setattr(same_position, "host_memory", lambda: 2.5 * one_cell / 0.3)
        passes = self.counted(monkeypatch)
        bench = SamePositionBench(model, saes, 1)
        cleans = [bench.clean(cell) for cell in cells]
        for _ in range(2):
            for clean in cleans:
                bench.effects(clean, active_features(clean)[:3])
        assert len(passes) == 4 + 2

    def test_cells_of_one_name_are_told_apart(self) -> None:
        model, saes, cells = small()
        cells = [Cell("the same", 0, cell.tokens, cell.gene_positions) for cell in cells[:2]]
        together = SamePositionBench(model, saes, 1)
        for cell in cells:
            clean, alone = together.clean(cell), SamePositionBench(model, saes, 1)
            features = active_features(clean)
            np.testing.assert_array_equal(together.effects(clean, features), alone.effects(clean, features))

    @pytest.mark.parametrize("n_rows", [[1], [600], [512, 1], [100] * 12, [1, 511, 1, 700, 2, 3]])
    def test_runs_have_a_limit(self, n_rows: list[int]) -> None:
        batches = list(same_position._batches(n_rows))
        assert [i for batch in batches for i in batch] == list(range(len(n_rows)))
        sizes = [sum(n_rows[i] for i in batch) for batch in batches]
        assert all(size <= 512 or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
        assert all(one + n_rows[later[0]] > 512 for one, later in zip(sizes, batches[1:], strict=False))
