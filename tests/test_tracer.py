"""One run into a folder that others may work in too, with a bench that looks its effects up in a table."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cellcircuits import graph_store, trace_run
from cellcircuits.catalog import FeatureInfo
from cellcircuits.cells import Cell
from cellcircuits.claims import claimed
from cellcircuits.errors import UserError
from cellcircuits.graph_store import read_shard, shard_path
from cellcircuits.stats import EdgeRule
from cellcircuits.trace_run import Tracer
from cellcircuits.tracing import block_shard
from table_bench import (
    CELLS,
    FINGERPRINT,
    N_FEATURES,
    N_TARGETS,
    RULE,
    TABLE,
    TableBench,
    clean_cell,
    defined,
    expected_shard,
    traced,
)


class TestTracer:
    CATALOG = {i: FeatureInfo(i, i / 100, f"term {i}", ()) for i in range(N_FEATURES)}  # noqa: RUF012

    @pytest.fixture
    def tracer(self, tmp_path: Path) -> Callable[..., Tracer]:
        def make(before: Callable = lambda row, features: None, **changed: Any) -> Tracer:
            settings = {"definition": defined, "rule": RULE, "fingerprint": FINGERPRINT} | changed
            return Tracer(tmp_path, TableBench(before), CELLS, self.CATALOG, **settings)

        return make

    def progress(self, tmp_path: Path) -> dict[str, int]:
        return json.loads((tmp_path / "progress.json").read_text())

    def test_shards_records_and_progress(self, tracer, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO)
        features = [3, 7, 14, 17, 39]
        assert tracer().trace(features) is True
        assert expected_shard(tmp_path, 0, [3, 7, 14]) and expected_shard(tmp_path, 16, [17])
        assert expected_shard(tmp_path, 32, [39])
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
            *(f"feature_{f:04d}.json" for f in features), "progress.json",
        ]  # fmt: skip
        assert {path.suffix for path in (tmp_path / "blocks").iterdir()} == {".parquet"}
        record = json.loads((tmp_path / "feature_0017.json").read_text())
        assert (record["label"], record["activation_freq"], record["feature_idx"]) == ("term 17", 0.17, 17)
        assert self.progress(tmp_path) == {"n_features": 5, "n_features_done": 5}
        assert caplog.messages == ["5 features to trace, 0 of them already done"]

    def test_what_is_done_is_not_traced_again(self, tracer, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO)
        tracer().trace([3, 17])
        again = tracer()
        assert again.trace([3, 14, 17]) is True
        assert {feature for _, batch in again.bench.calls[1:] for feature in batch} == {14}  # the first is a check
        assert expected_shard(tmp_path, 0, [3, 14])
        assert caplog.messages[-1] == "3 features to trace, 2 of them already done"
        third = tracer()
        assert third.trace([3, 14, 17]) is True and third.bench.calls == []
        assert self.progress(tmp_path) == {"n_features": 3, "n_features_done": 3}

    def test_missing_and_damaged_records_are_made_from_the_shard(self, tracer, tmp_path: Path, caplog):
        tracer().trace([3, 4, 5])
        before = {path.name: path.read_text() for path in tmp_path.glob("feature_*.json")}
        (tmp_path / "feature_0003.json").unlink()
        (tmp_path / "feature_0004.json").write_text("{")
        again = tracer()
        again.trace([3, 4, 5])
        assert {path.name: path.read_text() for path in tmp_path.glob("feature_*.json")} == before
        assert caplog.messages == [f"{tmp_path / 'feature_0004.json'} was damaged or of another run; it is made again."]

    def test_interrupted_it_goes_on_after_the_last_cell(self, tracer, tmp_path: Path):
        def stop(row: int, features: Sequence[int]) -> None:
            if row == 4:
                raise KeyboardInterrupt

        features = [20, 21, 22]
        with pytest.raises(KeyboardInterrupt):
            tracer(stop).trace(features)
        assert (tmp_path / "blocks" / "block_00016.partial.npz").exists()
        assert self.progress(tmp_path) == {"n_features": 3, "n_features_done": 0}
        again = tracer()
        assert again.trace(features) is True
        assert {row for row, batch in again.bench.calls[1:]} == {4, 5}  # the first is the check of the engine
        assert expected_shard(tmp_path, 16, features)
        assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["block_00016.parquet"]

    def test_the_batch_size_and_the_rule_are_the_run_s(self, tracer, tmp_path: Path):
        one = tracer(batch_size=1, rule=EdgeRule(min_abs_d=1e6))
        one.trace([3, 4])
        assert {len(batch) for _, batch in one.bench.calls} == {1}
        assert len(read_shard(shard_path(tmp_path, 0), FINGERPRINT).edges) == 0

    def test_what_others_hold_is_left_to_them(self, tracer, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO)
        with claimed(shard_path(tmp_path, 0)):
            first = tracer()
            assert first.trace([3, 14, 17]) is False
            assert {feature for _, batch in first.bench.calls[1:] for feature in batch} == {17}
            assert self.progress(tmp_path) == {"n_features": 3, "n_features_done": 1}
            assert caplog.messages[-1] == (
                "2 features are left to other processes that work in this folder; the last one to end completes the "
                "tables. If one was killed on another machine, what it held is free ten minutes later."
            )
        assert tracer().trace([3, 14, 17]) is True

    def test_what_others_finish_meanwhile_is_counted_and_not_traced(self, tracer, tmp_path: Path):
        """While this process is at work on the second block, another one finishes the first and part of the third."""
        others = block_shard(TableBench(), traced(3, 14), RULE, FINGERPRINT)
        late = block_shard(TableBench(), traced(33), RULE, FINGERPRINT)
        seen = []

        def meanwhile(row: int, features: Sequence[int]) -> None:
            if tuple(features) != (17,):
                return
            graph_store.write_shard(shard_path(tmp_path, 0), others)
            graph_store.write_shard(shard_path(tmp_path, 32), late)
            seen.append(self.progress(tmp_path)["n_features_done"])

        with claimed(shard_path(tmp_path, 0)):
            ours = tracer(meanwhile)
            assert ours.trace([3, 14, 17, 33, 35]) is True
        assert set(seen) == {0}
        assert {feature for _, batch in ours.bench.calls[1:] for feature in batch} == {17, 35}
        assert expected_shard(tmp_path, 0, [3, 14]) and expected_shard(tmp_path, 32, [33, 35])
        assert self.progress(tmp_path) == {"n_features": 5, "n_features_done": 5}
        assert (tmp_path / "feature_0014.json").exists() and (tmp_path / "feature_0033.json").exists()

    def test_a_block_is_traced_by_one_only_even_if_that_one_slept(self, tracer, tmp_path: Path):
        """Another process took over and has finished: nothing is written over its results."""
        others = block_shard(TableBench(), traced(3), RULE, FINGERPRINT)
        others.facts[3]["elapsed_seconds"] = 77.0

        def sleep(row: int, features: Sequence[int]) -> None:
            if row == 5:
                graph_store.write_shard(shard_path(tmp_path, 0), others)

        ours = tracer(sleep)
        assert ours.trace([3]) is True
        assert read_shard(shard_path(tmp_path, 0), FINGERPRINT).facts[3]["elapsed_seconds"] == 77.0
        assert json.loads((tmp_path / "feature_0003.json").read_text())["elapsed_seconds"] == 77.0

    def test_only_new_features_are_added_to_a_shard(self, tracer, tmp_path: Path):
        run = tracer()
        shards = [block_shard(run.bench, traced(*features), RULE, FINGERPRINT) for features in ((3, 5), (4,), (5, 6))]
        assert [run.write_block(0, shard) for shard in shards] == [True, True, False]
        assert expected_shard(tmp_path, 0, [3, 4, 5])
        assert sorted(path.name for path in tmp_path.glob("*.json")) == [f"feature_000{i}.json" for i in (3, 4, 5)]

    def test_a_sleeper_does_not_save_over_the_new_owner_s_partial(self, tracer, tmp_path: Path):
        partial = tmp_path / "blocks" / "block_00000.partial.npz"

        def overruled(row: int, features: Sequence[int]) -> None:
            if row == 2:
                (tmp_path / "blocks" / "block_00000.claim.7").write_text("{}")
                partial.write_text("of the new owner")
            if row == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tracer(overruled).trace([3])
        assert partial.read_text() == "of the new owner"

    def test_what_a_killed_process_left_beside_a_finished_shard_is_removed(self, tracer, tmp_path: Path):
        tracer().trace([3, 17])
        blocks = tmp_path / "blocks"
        (blocks / "block_00000.partial.npz").write_text("")
        dead = blocks / "block_00016.claim.0"
        dead.write_text("{}")
        os.utime(dead, (0, 0))
        tracer().trace([3, 17])
        assert sorted(path.name for path in blocks.iterdir()) == ["block_00000.parquet", "block_00016.parquet"]

    def test_the_partial_of_one_who_is_at_work_stays(self, tracer, tmp_path: Path):
        """On other features of the same block."""
        tracer().trace([3])
        partial = tmp_path / "blocks" / "block_00000.partial.npz"
        with claimed(shard_path(tmp_path, 0)):
            partial.write_text("of another process")
            assert tracer().trace([3]) is True
            assert partial.exists()


class Bar:
    """Stands for a progress bar that is drawn."""

    def __init__(self, *, total: int, **how: object):
        self.total, self.n, self.disable = total, 0, False
        self.how = how

    def update(self, n: int) -> None:
        self.n += n

    def refresh(self) -> None: ...

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None: ...


class TestTheBar:
    """It counts pairs of a feature and a cell, and ends full."""

    @pytest.fixture
    def bars(self, monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
        made: list[Bar] = []
        monkeypatch.setattr(trace_run, "tqdm", lambda **how: made.append(Bar(**how)) or made[-1])
        return made

    def trace(self, out_dir: Path, before: Callable = lambda row, features: None) -> None:
        catalog = {i: FeatureInfo(i, 0.5, "term", ()) for i in range(N_FEATURES)}
        features = [3, 14, 17, 33, 35]
        Tracer(out_dir, TableBench(before), CELLS, catalog, RULE, FINGERPRINT, None, defined).trace(features)

    def test_of_a_run_that_is_alone_and_of_one_that_goes_on(self, bars: list[Bar], tmp_path: Path):
        def stop(row: int, features: Sequence[int]) -> None:
            if row == 4 and 35 in features:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.trace(tmp_path, stop)
        self.trace(tmp_path)
        self.trace(tmp_path)
        n = len(CELLS)
        assert [(bar.n, bar.total) for bar in bars] == [(3 * n + 2 * 4, 5 * n), (2 * n, 2 * n), (0, 0)]
        drawn = {"desc": "tracing", "unit": "pair", "disable": None}  # None: on a terminal
        assert [bar.how for bar in bars] == [drawn, drawn, drawn | {"disable": True}]

    def test_what_others_do_is_taken_off_its_end(self, bars: list[Bar], tmp_path: Path):
        others = block_shard(TableBench(), traced(3, 14), RULE, FINGERPRINT)

        def meanwhile(row: int, features: Sequence[int]) -> None:
            if 17 in features:
                graph_store.write_shard(shard_path(tmp_path, 0), others)

        with claimed(shard_path(tmp_path, 0)):
            self.trace(tmp_path, meanwhile)
        assert [(bar.n, bar.total) for bar in bars] == [(3 * len(CELLS), 3 * len(CELLS))]


class TestCheckOfTheEngine:
    """`definition` is what a full pass would give; TABLE what the engine does."""

    def check(self, tmp_path: Path, definition: Callable, bench: Any = None, features: Sequence[int] = (9, 10)) -> None:
        Tracer(tmp_path, bench or TableBench(), CELLS, {}, RULE, FINGERPRINT, None, definition).check_engine(features)

    def off(self, *columns: int, by: float) -> Callable:
        """A definition that differs from the table in some columns, by a share of 1 + its largest effect."""

        def differs(bench: Any, cell: Cell, feature: int) -> dict[int, np.ndarray]:
            row = TABLE[feature, cell.row].copy()
            row[list(columns)] += by * (1 + np.abs(row).max())
            return {layer: row[at] for layer, at in bench.columns.items()}

        return differs

    def test_one_that_agrees_passes(self, tmp_path: Path):
        self.check(tmp_path, defined)
        self.check(tmp_path, self.off(*range(N_TARGETS), by=0.5e-3))

    def test_a_few_near_ties_pass_and_more_do_not(self, tmp_path: Path):
        self.check(tmp_path, self.off(0, 2, 4, 6, by=0.1))
        with pytest.raises(UserError) as refused:
            self.check(tmp_path, self.off(0, 2, 4, 6, 7, by=0.1))
        assert str(refused.value) == (
            "--model: the engine and a full forward pass disagree on 5 of 8 effects of feature 9; this model is not "
            "built as a Geneformer is, or the device computes wrongly."
        )

    def test_the_tolerance_is_a_thousandth_of_one_plus_the_largest_effect(self, tmp_path: Path):
        self.check(tmp_path, self.off(*range(N_TARGETS), by=0.95e-3))
        with pytest.raises(UserError, match=r"disagree on [5-8] of 8 effects"):
            self.check(tmp_path, self.off(*range(N_TARGETS), by=1.05e-3))

    def test_an_effect_that_only_one_of_the_two_finds_counts(self, tmp_path: Path):
        bench = TableBench()
        bench.effects = lambda clean, features: np.zeros((1, N_TARGETS))
        with pytest.raises(UserError, match="disagree on 8 of 8 effects"):
            self.check(tmp_path, defined, bench)

    @pytest.mark.parametrize("n_differ, passes", [(8, True), (9, False)])
    def test_of_many_effects_a_share_may_differ(self, tmp_path: Path, n_differ: int, passes: bool):
        """2% of 400 effects that are not 0 in both."""
        bench = TableBench()
        bench.columns, bench.targets = {6: slice(0, 1000)}, (6,)
        fast = np.zeros(1000)
        fast[:400] = 1.0
        slow = fast.copy()
        slow[:n_differ] = 2.0
        bench.effects = lambda clean, features: fast[None]
        try:
            self.check(tmp_path, lambda bench, cell, feature: {6: slow}, bench)
        except UserError as error:
            assert not passes and "disagree on 9 of 400 effects" in str(error)
        else:
            assert passes

    def test_the_first_pair_that_is_active_is_taken(self, tmp_path: Path):
        bench, asked = TableBench(), []

        def definition(bench: Any, cell: Cell, feature: int) -> dict[int, np.ndarray]:
            asked.append((cell.row, feature))
            return defined(bench, cell, feature)

        self.check(tmp_path, definition, bench, features=(7, 4, 8, 13, 14))  # 4 and 8 are not active in the first cell
        assert asked == [(0, 13)] and bench.calls == [(0, (13,))]

    def test_where_nothing_is_active_there_is_nothing_to_check(self, tmp_path: Path):
        self.check(tmp_path, lambda *_: pytest.fail("asked"), features=(7,))

    def test_a_definition_that_finds_nothing_active_says_nothing(self, tmp_path: Path):
        self.check(tmp_path, lambda *_: None)

    def test_what_is_not_finite_is_named(self, tmp_path: Path):
        bench = TableBench()
        bench.effects = lambda clean, features: np.full((1, N_TARGETS), np.nan)
        with pytest.raises(UserError, match=r"^cell cell0: NaN or infinite values in the effect of an ablation"):
            self.check(tmp_path, defined, bench)

    def test_a_full_pass_that_does_not_fit_is_named(self, tmp_path: Path):
        def none_left(*_: object) -> None:
            raise torch.OutOfMemoryError("none left")

        with pytest.raises(UserError) as refused:
            self.check(tmp_path, none_left)
        assert str(refused.value) == (
            "cell cell0: a full forward pass does not fit in the device's memory; free some of it, lower --max-tokens "
            "or take --device cpu."
        )

    def test_a_low_precision_is_not_what_is_checked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        exact = TableBench()
        exact.clean = lambda cell: clean_cell(cell.row)
        made = []

        def bench_of(*how: object) -> TableBench:
            made.append(how)
            return exact

        coarse = TableBench()
        coarse.tail, coarse.model, coarse.saes = SimpleNamespace(precision="bf16"), "model", "SAEs"
        monkeypatch.setattr(trace_run, "Bench", bench_of)
        self.check(tmp_path, defined, coarse)
        assert made == [("model", "SAEs", 5, (6, 8))] and coarse.calls == [] and exact.calls == [(0, (9,))]
        exact.clean = lambda cell: SimpleNamespace(cell=cell, active_rows=lambda feature: [])
        self.check(tmp_path, lambda *_: pytest.fail("asked"), coarse)  # a near tie: active nowhere in float32


class TestProgress:
    @pytest.fixture
    def progress(self, tmp_path: Path) -> trace_run.Progress:
        return trace_run.Progress(tmp_path / "progress.json", 10, 6, 4)

    def test_the_bar_counts_pairs_of_what_is_traced_here(self, progress, tmp_path: Path):
        with progress.bar as bar:
            assert (bar.total, progress.n_left) == (24, 6)
            assert json.loads(progress.path.read_text()) == {"n_features": 10, "n_features_done": 4}
            progress.finished(1, here=True)
            assert (bar.total, progress.n_left) == (24, 5)
            progress.finished(2, here=False)
            assert (bar.total, progress.n_left) == (16, 3)
            assert json.loads(progress.path.read_text()) == {"n_features": 10, "n_features_done": 7}

    def test_a_line_now_and_then_where_no_bar_is_drawn(self, progress, monkeypatch, caplog):
        caplog.set_level(logging.INFO)
        now = [progress.last_line]
        monkeypatch.setattr(trace_run.time, "monotonic", lambda: now[0])
        for seconds, said in ((299, 0), (2, 1), (299, 1), (2, 2)):
            now[0] += seconds
            progress.bar.disable = True
            progress.finished(1, here=True)
            assert len(caplog.messages) == said
        assert caplog.messages == ["6 of 10 features done", "8 of 10 features done"]
        now[0] += 1000
        progress.bar.disable = False
        progress.finished(1, here=True)
        progress.bar.disable = True
        assert len(caplog.messages) == 2
