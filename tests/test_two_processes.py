"""Several processes that trace into one folder: every pair once, the same files as of one process, and takeovers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import exhaustive_feature_tracing as script
from cellcircuits import claims, graph_store, trace_run, tracing
from cellcircuits.claims import claimed
from cellcircuits.effects import Bench
from cellcircuits.graph_store import shard_path
from cellcircuits.trace_run import Tracer
from conftest import Study
from test_tracing_script import refusal, trace, without_times

# Imports once, then forks a process for every line it reads: a file to log to, how often to measure before it waits,
# and the flags of the script. Each has blocks of 4 features, logs every (feature, cell) pair that it measures, and
# waits for `<log>.on` where it was told to.
DRIVER = """
import json, os, sys, time
from pathlib import Path
import anndata
from transformers import BertForMaskedLM
import exhaustive_feature_tracing as script
from cellcircuits import graph_store, inputs, trace_folder, trace_run, tracing
from cellcircuits.effects import Bench

graph_store.BLOCK_SIZE = 4
tracing.SAVE_EVERY_SECONDS = -1.0
trace_run.Tracer.check_engine = lambda *_: None
real = Bench.effects

def run(log, hold_after, flags):
    n_calls = 0

    def effects(self, clean, features):
        nonlocal n_calls
        with open(log, "a") as file:
            file.write("".join(f"{feature} {clean.cell.row}\\n" for feature in features))
        n_calls += 1
        while n_calls == hold_after and not os.path.exists(log + ".on"):
            time.sleep(0.01)
        time.sleep(0.005)
        return real(self, clean, features)

    Bench.effects = effects
    with open(log + ".said", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    status = script.main(flags)
    Path(log + ".status").write_text(str(status))

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            run(*json.loads(line))
        finally:
            os._exit(0)
    print(pid, flush=True)
"""


class Runner:
    """One process that traces a study, in steps that a test decides."""

    def __init__(self, driver: subprocess.Popen[str], log: Path, flags: Sequence[str], hold_after: int = 0) -> None:
        """Start it."""
        self.log = log
        driver.stdin.write(json.dumps([str(log), hold_after, flags]) + "\n")
        driver.stdin.flush()
        self.pid = int(driver.stdout.readline())

    def file(self, suffix: str) -> Path:
        """`.on` lets it go on, `.said` is what it printed, `.status` its exit status."""
        return self.log.with_name(self.log.name + suffix)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait for something that it does."""
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert condition(), self.file(".said").read_text()

    def pairs(self) -> list[str]:
        """Every (feature, cell) pair whose measurement was begun."""
        return self.log.read_text().split("\n")[:-1] if self.log.exists() else []

    def end(self) -> None:
        """Wait until it has ended well."""
        self.wait_for(self.file(".status").exists)
        self.wait_for(lambda: self.file(".status").read_text() == "0")


@pytest.fixture(scope="module")
def driver():
    """The process that has done the imports."""
    environment = os.environ | {"PYTHONPATH": str(Path(script.__file__).parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def start(driver: subprocess.Popen[str], tmp_path: Path, study_template: Study):
    """Starts runners that do not outlive the test."""
    made: list[Runner] = []

    def new(name: str, hold_after: int = 0) -> Runner:
        made.append(Runner(driver, tmp_path / name, study_template.flags(tmp_path / "out"), hold_after))
        return made[-1]

    yield new
    for runner in made:
        if not runner.file(".status").exists():
            os.kill(runner.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of blocks of 4."""
    out_dir = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_store, "BLOCK_SIZE", 4)
        assert trace(study_template, out_dir) == 0
    return out_dir


def test_two_processes_split_the_blocks(start, alone: Path, tmp_path: Path):
    """They start at the same moment and get in each other's way for every block."""
    first, second = start("first"), start("second")
    first.end()
    second.end()
    assert first.pairs() and second.pairs()
    assert set(Counter(first.pairs() + second.pairs()).values()) == {1}
    assert without_times(tmp_path / "out") == without_times(alone)


def test_a_killed_process_s_block_is_taken_over_with_its_cells(start, alone: Path, tmp_path: Path):
    first = start("first", hold_after=6)  # in the first block, after some cells
    first.wait_for(lambda: len(cells_of(first)) == 6)
    second = start("second", hold_after=20)
    second.wait_for(lambda: any(pair.startswith("8 ") for pair in second.pairs()))  # past the block of the first
    os.kill(first.pid, signal.SIGKILL)
    second.file(".on").touch()
    second.end()
    again = {pair for pair, n in Counter(first.pairs() + second.pairs()).items() if n > 1}
    assert again and {pair.split()[1] for pair in again} == {cells_of(first)[-1]}
    assert without_times(tmp_path / "out") == without_times(alone)


def cells_of(runner: Runner) -> list[str]:
    """Cells whose measurement was begun, in order; the features of a block of 4 are one batch."""
    return list(dict.fromkeys(pair.split()[1] for pair in runner.pairs()))


class TestBesideAnother:
    """The other process is this test."""

    @pytest.fixture
    def left(self, study_template: Study, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder in which the second and the last block are missing."""
        monkeypatch.setattr(graph_store, "BLOCK_SIZE", 4)
        out_dir = shutil.copytree(alone, tmp_path / "out")
        for block in (4, 36):
            shard_path(out_dir, block).unlink()
            for feature in range(block, block + 4):
                (out_dir / f"feature_{feature:04d}.json").unlink()
        return out_dir

    def test_what_it_holds_is_left_to_it(self, study_template: Study, left: Path, alone: Path, caplog):
        caplog.set_level("INFO")
        with claimed(shard_path(left, 4)):
            assert trace(study_template, left) == 0
        assert "4 features are left to other processes" in caplog.text
        assert json.loads((left / "progress.json").read_text()) == {"n_features": 39, "n_features_done": 35}
        assert not (left / "feature_0004.json").exists() and (left / "feature_0036.json").exists()
        assert trace(study_template, left) == 0
        assert without_times(left) == without_times(alone)

    def test_what_it_finishes_meanwhile_is_not_traced(
        self, study_template: Study, left: Path, alone: Path, monkeypatch
    ):
        real, traced = Bench.effects, set()
        bars = []
        monkeypatch.setattr(trace_run.tqdm, "refresh", lambda bar, *_, **__: bars.append((bar.n, bar.total)))

        def effects(self, clean, features):
            shutil.copy(shard_path(alone, 36), shard_path(left, 36))
            traced.update(features)
            return real(self, clean, features)

        monkeypatch.setattr(Tracer, "check_engine", lambda *_: None)
        monkeypatch.setattr(Bench, "effects", effects)
        assert trace(study_template, left) == 0
        assert traced and traced <= {4, 5, 6, 7} and bars[-1][1] == 4 * 12
        assert without_times(left) == without_times(alone)

    def test_what_it_finishes_while_it_holds_it_counts(
        self, study_template: Study, left: Path, alone: Path, monkeypatch
    ):
        other = claims._take(shard_path(left, 4))
        real = Bench.effects

        def effects(self, clean, features):
            if clean.cell.row > 5 and other.is_held():
                shutil.copy(shard_path(alone, 4), shard_path(left, 4))
                other.release()
            return real(self, clean, features)

        monkeypatch.setattr(Bench, "effects", effects)
        assert trace(study_template, left) == 0
        assert without_times(left) == without_times(alone)

    def test_it_dies_and_is_taken_over_at_the_end(self, study_template: Study, left: Path, alone: Path, monkeypatch):
        other = claims._take(shard_path(left, 4))
        real, order = Bench.effects, []

        def effects(self, clean, features):
            other.stream.close()  # its lock is gone
            order.extend(features)
            return real(self, clean, features)

        monkeypatch.setattr(Tracer, "check_engine", lambda *_: None)
        monkeypatch.setattr(Bench, "effects", effects)
        assert trace(study_template, left) == 0
        assert order[0] >= 36 and order[-1] < 8
        assert without_times(left) == without_times(alone)

    def test_this_one_sleeps_and_the_other_finishes_first(
        self, study_template: Study, left: Path, alone: Path, monkeypatch
    ):
        """The other's claim, partial and shard stay as they are, and no edge is there twice."""
        monkeypatch.setattr(tracing, "SAVE_EVERY_SECONDS", -1.0)
        real, path, n_calls = Bench.effects, shard_path(left, 4), []
        partial, others = path.with_suffix(".partial.npz"), path.with_suffix(".claim.1")

        def effects(self, clean, features):
            n_calls.append(1)
            if len(n_calls) == 4:  # asleep here
                others.write_text("of another machine")
                partial.write_bytes(b"of another machine")
            if len(n_calls) == 8:
                assert partial.read_bytes() == b"of another machine"
                shutil.copy(shard_path(alone, 4), path)
                written.append(path.stat())
                others.unlink()
            return real(self, clean, features)

        written: list[os.stat_result] = []
        monkeypatch.setattr(Tracer, "check_engine", lambda *_: None)
        monkeypatch.setattr(Bench, "effects", effects)
        assert trace(study_template, left) == 0
        assert [path.stat()] == written
        assert without_times(left) == without_times(alone)


def test_ctrl_c_saves_the_cells_and_gives_the_block_back(study_template: Study, tmp_path: Path, monkeypatch):
    real, n_calls = Bench.effects, []

    def interrupted(self, clean, features):
        n_calls.append(1)
        if len(n_calls) == 5:
            raise KeyboardInterrupt
        return real(self, clean, features)

    monkeypatch.setattr(Bench, "effects", interrupted)
    assert trace(study_template, tmp_path) == 130
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["block_00000.partial.npz"]
    with np.load(tmp_path / "blocks" / "block_00000.partial.npz") as kept:
        assert kept["measured"].shape[1] == 3  # the first call is the self-check's


def test_a_failed_run_gives_the_block_back(study_template: Study, tmp_path: Path, capsys, monkeypatch):
    real, n_calls = Bench.effects, []

    def broken(self, clean, features):
        n_calls.append(1)
        return real(self, clean, features) * (np.nan if len(n_calls) == 5 else 1)

    monkeypatch.setattr(Bench, "effects", broken)
    assert "NaN or infinite values in the effect of an ablation" in refusal(capsys, trace(study_template, tmp_path))
    assert list((tmp_path / "blocks").iterdir()) == []


def test_what_a_kill_after_the_last_write_leaves_is_removed(
    study_template: Study, alone: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(graph_store, "BLOCK_SIZE", 4)
    out_dir = shutil.copytree(alone, tmp_path / "out")
    dead = claims._take(shard_path(out_dir, 8))
    dead.stream.close()
    shard_path(out_dir, 12).with_suffix(".partial.npz").write_bytes(b"")
    with claimed(shard_path(out_dir, 16)):
        living = shard_path(out_dir, 16).with_suffix(".partial.npz")
        living.write_bytes(b"other features of the block")
        assert trace(study_template, out_dir) == 0
        assert living.exists()
        living.unlink()
    assert without_times(out_dir) == without_times(alone)
