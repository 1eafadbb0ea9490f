"""What keeps runs apart that meet in one output folder: its lock, its manifest, and files made once."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest

from cellcircuits import results
from cellcircuits.errors import UserError
from cellcircuits.jsonio import create_json, write_json
from cellcircuits.manifest import claim_folder, settings_fingerprint
from cellcircuits.results import exclusive, one_at_a_time, shared

SETTINGS = {"source_layer": 5, "min_abs_d": 0.5}


def at_once(tasks: Sequence[Callable[[], object]]) -> None:
    """Run all tasks in threads that start together; each opens its own files, as processes do."""
    barrier = Barrier(len(tasks))

    def run(task: Callable[[], object]) -> None:
        barrier.wait()
        task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        for _ in pool.map(run, tasks):
            pass


class TestShared:
    def test_several_at_once_and_nothing_is_removed_under_another(self, tmp_path: Path):
        half_written = tmp_path / ".edges.parquet.17.0a1b2c3d.tmp"
        half_written.write_text("of a killed run")
        with shared(tmp_path):
            assert not half_written.exists()
            half_written.write_text("of the first run")
            with shared(tmp_path), shared(tmp_path):
                pass
            assert half_written.exists()
        with shared(tmp_path):
            assert not half_written.exists()

    def test_exclusive_excludes_it_and_it_excludes_exclusive(self, tmp_path: Path):
        for first, second in ((exclusive, shared), (shared, exclusive)):
            with first(tmp_path):
                with pytest.raises(UserError, match="another run is at work"), second(tmp_path):
                    pytest.fail("let in")
            with second(tmp_path):
                pass

    def test_an_exclusive_run_that_slips_in_between_its_two_locks_is_seen(self, tmp_path: Path, monkeypatch):
        real = results._remove_half_written

        def slip_in(out_dir: Path) -> None:
            real(out_dir)
            fcntl.flock(locks[0], fcntl.LOCK_UN)  # what the kernel does on the way from LOCK_EX to LOCK_SH
            monkeypatch.setattr(results, "_remove_half_written", real)
            running.enter_context(exclusive(out_dir))

        real_lock_file, locks = results._lock_file, []

        @contextmanager
        def remembered(out_dir: Path, name: str):
            with real_lock_file(out_dir, name) as lock:
                locks.append(lock)
                yield lock

        monkeypatch.setattr(results, "_lock_file", remembered)
        monkeypatch.setattr(results, "_remove_half_written", slip_in)
        with ExitStack() as running:
            with pytest.raises(UserError, match="another run is at work"), shared(tmp_path):
                pytest.fail("let in")

    def test_many_that_start_at_once_are_all_let_in(self, tmp_path: Path):
        def start() -> None:
            for _ in range(20):
                with shared(tmp_path):
                    pass

        at_once([start] * 6)

    def test_a_file_system_without_locks_is_said_and_nothing_is_removed(self, tmp_path: Path, monkeypatch, caplog):
        def flock(*_: object) -> None:
            raise OSError(errno.ENOTSUP, "not supported")

        monkeypatch.setattr(fcntl, "flock", flock)
        half_written = tmp_path / ".edges.parquet.17.tmp"
        half_written.write_text("perhaps of a run elsewhere")
        with shared(tmp_path):
            assert half_written.exists()
        assert "cannot be locked (not supported); let no run of another experiment work in it" in caplog.text


def test_one_at_a_time_is_one_at_a_time(tmp_path: Path):
    inside, worst = [], []

    def enter() -> None:
        for _ in range(20):
            with one_at_a_time(tmp_path):
                inside.append(1)
                worst.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    at_once([enter] * 4)
    assert worst == [1] * 80


class TestClaimsOfOneFolderAtOnce:
    def test_every_provenance_is_kept(self, tmp_path: Path):
        origins = [{"device": f"cuda:{i}"} for i in range(8)]
        at_once([partial(claim_folder, tmp_path, SETTINGS, origin) for origin in origins])
        kept = json.loads((tmp_path / "manifest.json").read_text())
        assert kept["settings"] == SETTINGS
        assert sorted(kept["provenance"], key=str) == origins

    @pytest.mark.parametrize("with_locks", [True, False])
    def test_of_several_settings_one_wins_and_the_others_are_refused(self, tmp_path: Path, monkeypatch, with_locks):
        if not with_locks:
            monkeypatch.setattr(results, "one_at_a_time", lambda out_dir: nullcontext())
        refused = []

        def claim(n_cells: int) -> None:
            try:
                claim_folder(tmp_path, SETTINGS | {"n_cells": n_cells}, {})
            except UserError as error:
                assert "other settings (n_cells is " in str(error)
                refused.append(n_cells)

        at_once([partial(claim, n_cells) for n_cells in range(8)])
        assert len(refused) == 7
        winner = json.loads((tmp_path / "manifest.json").read_text())["settings"]["n_cells"]
        assert {winner, *refused} == set(range(8))

    def test_results_that_a_run_makes_meanwhile_are_no_stranger_s(self, tmp_path: Path, monkeypatch):
        """Between the two looks of a start, another one makes the manifest and then its first results."""
        real = Path.glob

        def glob(self: Path, pattern: str):
            monkeypatch.setattr(Path, "glob", real)
            found = list(real(self, pattern))
            claim_folder(tmp_path, SETTINGS, {})
            (tmp_path / "features.parquet").write_text("")
            return found

        monkeypatch.setattr(Path, "glob", glob)
        assert claim_folder(tmp_path, SETTINGS, {}) == settings_fingerprint(SETTINGS)


class TestCreateJson:
    @pytest.mark.parametrize("with_links", [True, False])
    def test_only_where_nothing_is(self, tmp_path: Path, monkeypatch, with_links: bool):
        if not with_links:

            def link(*_: object) -> None:
                raise OSError(errno.EPERM, "no hard links here")

            monkeypatch.setattr(os, "link", link)
        path = tmp_path / "new" / "a.json"
        assert create_json(path, {"a": 1}) is True
        assert create_json(path, {"a": 2}) is False
        assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]

    def test_of_many_at_once_one_succeeds(self, tmp_path: Path):
        made = []
        at_once([lambda i=i: made.append((create_json(tmp_path / "a.json", {"a": i}), i)) for i in range(8)])
        ((_, winner),) = [entry for entry in made if entry[0]]
        assert json.loads((tmp_path / "a.json").read_text()) == {"a": winner}


def test_threads_that_write_one_file_at_once_do_not_meet(tmp_path: Path):
    def write(i: int) -> None:
        for _ in range(10):
            write_json(tmp_path / "a.json", [i] * 2000)

    at_once([partial(write, i) for i in range(4)])
    assert len(set(json.loads((tmp_path / "a.json").read_text()))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
