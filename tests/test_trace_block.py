"""Blocks of features, cell by cell: batches, memory, partial work and the shard, from made-up effects."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
import table_bench
from cellcircuits import graph_store, tracing
from cellcircuits.errors import UserError
from cellcircuits.tracing import block_shard, trace_and_save, trace_block
from table_bench import (
    CELLS,
    FINGERPRINT,
    N_ACTIVE,
    N_CELLS,
    N_TARGETS,
    RULE,
    TABLE,
    WIDTHS,
    TableBench,
    block_of,
    traced,
)

IN_EVERY_CELL = int(np.flatnonzero((N_ACTIVE > 0).all(axis=1))[0])


def out_of_memory(largest: int) -> Callable[[int, Sequence[int]], None]:
    def fail(row: int, features: Sequence[int]) -> None:
        if row and len(features) > largest:
            raise torch.OutOfMemoryError("none left")

    return fail


class TestTraceBlock:
    def test_every_active_pair_is_measured_and_no_other(self):
        block = traced(3, 7, 12, 38)
        for j, feature in enumerate(block.features):
            assert block.measured[j].tolist() == (N_ACTIVE[feature] > 0).tolist()
            assert np.array_equal(block.effects[j], TABLE[feature] * block.measured[j][:, None])
        assert block.n_cells_done == N_CELLS

    @pytest.mark.parametrize("batch_size", [None, 1, 3, 100])
    def test_batches_go_from_few_active_positions_to_many(self, batch_size: int | None):
        bench, features = TableBench(), tuple(range(20, 36))
        trace_block(bench, CELLS, block_of(*features), batch_size=batch_size)
        for row in range(N_CELLS):
            batches = [batch for of_cell, batch in bench.calls if of_cell == row]
            in_order = sorted((N_ACTIVE[f, row], f) for f in features if N_ACTIVE[f, row])
            assert [f for batch in batches for f in batch] == [f for _, f in in_order]
            size = batch_size or len(CELLS[row].cell.tokens) - 5
            assert {len(batch) for batch in batches[:-1]} <= {size} and len(batches[-1]) <= size

    def test_it_goes_on_after_the_cells_that_are_done(self):
        bench, block, seen = TableBench(), block_of(1, 2), []
        block.n_cells_done = 4
        trace_block(bench, CELLS, block, on_cell=lambda n: seen.append((n, block.n_cells_done)))
        assert {row for row, _ in bench.calls} <= {4, 5} and seen == [(2, 5), (2, 6)]
        assert not block.measured[:, :4].any() and not block.effects[:, :4].any()

    def test_out_of_memory_halves_the_batches_from_there_on(self, caplog: pytest.LogCaptureFixture):
        bench, block = TableBench(out_of_memory(4)), block_of(*range(20, 36))
        trace_block(bench, CELLS, block, batch_size=9)
        assert np.array_equal(block.effects, traced(*range(20, 36)).effects)
        sizes = {row: max(len(batch) for of_cell, batch in bench.calls if of_cell == row) for row in range(N_CELLS)}
        assert sizes == {0: 9} | dict.fromkeys(range(1, N_CELLS), 4)
        assert caplog.messages == ["Out of memory: going on with batches of 4 features."]
        assert caplog.records[0].levelno == logging.WARNING

    def test_of_a_last_batch_that_is_smaller_half_of_that(self):
        bench = TableBench(out_of_memory(2))
        trace_block(bench, CELLS[:2], block_of(*range(20, 36)), batch_size=100)
        (n_active,) = {sum(N_ACTIVE[f, 1] > 0 for f in range(20, 36))}
        first, halved = [len(batch) for row, batch in bench.calls if row == 1][:2], n_active
        while halved > 2:
            halved //= 2
        assert first == [halved] * 2

    def test_batches_shrink_to_one_feature_before_it_gives_up(self):
        bench, block = TableBench(out_of_memory(1)), block_of(*range(20, 36))
        trace_block(bench, CELLS, block)
        assert {len(batch) for row, batch in bench.calls if row} == {1}
        assert np.array_equal(block.effects, traced(*range(20, 36)).effects)

    def test_one_feature_that_does_not_fit_is_one_sentence(self):
        block = block_of(*range(20, 36))
        with pytest.raises(UserError) as refused:
            trace_block(TableBench(out_of_memory(0)), CELLS, block)
        assert str(refused.value) == (
            "cell cell1: not even one feature fits in the device's memory; free some of it, lower --max-tokens or take "
            "--device cpu."
        )
        assert block.n_cells_done == 1 and not block.measured[:, 1:].any()

    def test_another_failure_is_not_taken_for_it(self):
        def fail(*_: object) -> None:
            raise RuntimeError("a defect")

        with pytest.raises(RuntimeError, match="a defect"):
            trace_block(TableBench(fail), CELLS, block_of(1, 2))

    def test_what_is_not_finite_stops_before_the_cell_counts(self, monkeypatch: pytest.MonkeyPatch):
        broken = TABLE.copy()
        (feature,) = np.flatnonzero(N_ACTIVE[:, 2])[:1]
        broken[feature, 2, 3] = np.inf
        monkeypatch.setattr(table_bench, "TABLE", broken)
        block = block_of(int(feature))
        with pytest.raises(UserError, match=r"^cell cell2: NaN or infinite values in the effect of an ablation"):
            trace_block(TableBench(), CELLS, block)
        assert block.n_cells_done == 2 and not block.measured[:, 2:].any()

    def test_the_time_of_a_batch_is_shared_by_its_features(self, monkeypatch: pytest.MonkeyPatch):
        """Each batch takes as many seconds as the cell's row, plus one."""
        now = [100.0]

        def work(row: int, features: Sequence[int]) -> None:
            now[0] += row + 1

        monkeypatch.setattr(tracing.time, "perf_counter", lambda: now[0])
        bench, block = TableBench(work), block_of(*range(20, 36))
        trace_block(bench, CELLS, block, batch_size=4)
        expected = dict.fromkeys(block.features, 0.0)
        for row, batch in bench.calls:
            for feature in batch:
                expected[feature] += (row + 1) / len(batch)
        assert block.seconds == pytest.approx(list(expected.values()))


class TestTraceAndSave:
    @pytest.mark.parametrize(
        "periods_per_cell, cells_at_save", [(0.5, [3, 6]), (0.6, [2, 4, 6]), (2.0, [1, 2, 3, 4, 5, 6])]
    )
    def test_it_saves_when_minutes_have_passed(self, monkeypatch, periods_per_cell: float, cells_at_save: list[int]):
        now, seen, saved = [50.0], [], []

        def work(row: int, features: Sequence[int]) -> None:
            now[0] += tracing.SAVE_EVERY_SECONDS * periods_per_cell

        monkeypatch.setattr(tracing.time, "monotonic", lambda: now[0])
        block = block_of(IN_EVERY_CELL)  # one batch per cell
        trace_and_save(TableBench(work), CELLS, block, lambda: saved.append(block.n_cells_done), on_cell=seen.append)
        assert saved == cells_at_save and seen == [1] * N_CELLS
        assert np.array_equal(block.effects, traced(IN_EVERY_CELL).effects)

    @pytest.mark.parametrize("error, n_saves", [(KeyboardInterrupt(), 1), (RuntimeError("a defect"), 0)])
    def test_told_to_stop_it_saves_what_is_done(self, error: BaseException, n_saves: int):
        def stop(row: int, features: Sequence[int]) -> None:
            if row == 3:
                raise error

        block, saved = block_of(1, 2, 3), []
        with pytest.raises(type(error)):
            trace_and_save(TableBench(stop), CELLS, block, lambda: saved.append(block.n_cells_done))
        assert saved == [3] * n_saves

    def test_the_size_of_batches_is_handed_on(self):
        bench = TableBench()
        trace_and_save(bench, CELLS, block_of(*range(16)), lambda: None, batch_size=2)
        assert max(len(batch) for _, batch in bench.calls) == 2


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestPartials:
    def test_what_was_saved_comes_back_cell_by_cell(self, tmp_path: Path):
        block = traced(1, 2, 7)
        block.n_cells_done = 4
        block.save(tmp_path / "a.npz", FINGERPRINT)
        back = block_of(1, 2, 7)
        back.restore(tmp_path / "a.npz", FINGERPRINT)
        assert back.n_cells_done == 4 and back.seconds.tolist() == block.seconds.tolist()
        assert np.array_equal(back.effects[:, :4], block.effects[:, :4]) and not back.effects[:, 4:].any()
        assert np.array_equal(back.measured[:, :4], block.measured[:, :4]) and not back.measured[:, 4:].any()
        assert block.n_positions[:, :4].any() and block.removed_norm[:, :4].any()
        for name in ("n_positions", "removed_norm"):
            kept, saved = getattr(back, name), getattr(block, name)
            assert np.array_equal(kept[:, :4], saved[:, :4]) and not kept[:, 4:].any()
        trace_block(TableBench(), CELLS, back)
        assert np.array_equal(back.effects, block.effects) and np.array_equal(back.measured, block.measured)

    def test_where_none_is_nothing_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        back = block_of(1)
        back.restore(tmp_path / "a.npz", FINGERPRINT)
        assert back.n_cells_done == 0 and caplog.messages == []

    def test_why_one_is_not_used(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        path = tmp_path / "a.npz"
        traced(1, 2).save(path, FINGERPRINT)
        block_of(1, 2).restore(path, "of another run")
        block_of(1, 3).restore(path, FINGERPRINT)
        path.write_bytes(path.read_bytes()[:300])
        back = traced(1, 2)
        back.restore(path, FINGERPRINT)
        assert caplog.messages == [
            *[f"{path} is of another run or of other features: it is not used."] * 2,
            f"{path} is damaged (BadZipFile): its block is traced from its first cell.",
        ]
        assert back.n_cells_done == 0 and not (back.effects.any() or back.measured.any() or back.seconds.any())

    def test_code_in_one_never_runs(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        canary = tmp_path / "canary"
        arrays = {"fingerprint": np.array([Canary(canary)], dtype=object)}
        np.savez(tmp_path / "a.npz", allow_pickle=True, **arrays)
        block_of(1).restore(tmp_path / "a.npz", FINGERPRINT)
        assert not canary.exists() and "is damaged (ValueError)" in caplog.text

    def test_arrays_of_another_size_leave_nothing_behind(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        np.savez(
            tmp_path / "a.npz", fingerprint=FINGERPRINT, features=[1, 2], measured=np.ones((2, 3), bool),
            effects=np.ones((6, N_TARGETS)), seconds=np.ones(3),
            n_positions=np.ones((2, 3), int), removed_norm=np.ones((2, 3)),
        )  # fmt: skip
        back = block_of(1, 2)
        back.restore(tmp_path / "a.npz", FINGERPRINT)
        assert back.n_cells_done == 0 and not (back.effects.any() or back.measured.any() or back.seconds.any())
        assert not (back.n_positions.any() or back.removed_norm.any())
        assert "is damaged (ValueError)" in caplog.text


class TestBlockShard:
    def test_edges_and_facts_against_a_loop(self):
        block = traced(3, 7, 12, 13)
        block.seconds[:] = (1.5, 0.0, 2.5, 3.5)
        shard = block_shard(TableBench(), block, RULE, FINGERPRINT)
        assert [{k: v for k, v in facts.items() if k != "calibration"} for facts in shard.facts.values()] == [
            {"source_layer": 5, "feature_idx": f, "n_cells_active": int((N_ACTIVE[f] > 0).sum()),
             "n_cells_measured": N_CELLS, "n_positions": n_positions, "ablated_norm": norm and pytest.approx(norm),
             "elapsed_seconds": seconds, "fingerprint": FINGERPRINT}
            for f, seconds in ((3, 1.5), (7, 0.0), (12, 2.5), (13, 3.5))
            for n_positions in [N_ACTIVE[f][N_ACTIVE[f] > 0].mean() if N_ACTIVE[f].any() else None]
            for norm in [n_positions and f + n_positions / 8]
        ]  # fmt: skip
        expected = []
        for feature in block.features:
            effects = TABLE[feature][N_ACTIVE[feature] > 0]
            for layer, columns in TableBench.columns.items():
                for target, column in enumerate(effects[:, columns].T):
                    if len(column) > 1 and reference.is_edge(column):
                        d, agree = reference.cohens_d(column), reference.consistency_of(column)
                        expected.append((5, feature, layer, target, column.mean(), d, agree, len(column)))
        found = list(zip(*(column.to_pylist() for column in shard.edges.columns[:8]), strict=True))
        assert len(expected) > 10 and {edge[2] for edge in expected} == set(WIDTHS)
        assert [edge[:4] for edge in found] == [edge[:4] for edge in expected]
        assert np.array(found) == pytest.approx(np.array(expected))

    def test_of_features_that_are_active_nowhere_there_are_only_facts(self):
        shard = block_shard(TableBench(), traced(7), RULE, FINGERPRINT)
        assert shard.facts[7]["n_cells_active"] == 0 and len(shard.edges) == 0
        assert shard.edges.schema.equals(graph_store.EDGE_SCHEMA)


def test_stopped_in_the_middle_of_a_cell_the_cell_is_left_out(tmp_path: Path):
    block, calls = block_of(*range(20, 36)), []

    def stop(row: int, features: Sequence[int]) -> None:
        calls.append(row)
        if calls.count(2) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace_and_save(TableBench(stop), CELLS, block, lambda: block.save(tmp_path / "a.npz", "f"), batch_size=2)
    back = block_of(*range(20, 36))
    back.restore(tmp_path / "a.npz", "f")
    assert back.n_cells_done == 2 and not back.measured[:, 2:].any() and not back.effects[:, 2:].any()
