"""Faults below the code: full disks, read-only folders, limits of file size, quotas; every script ends in a sentence.

What was there before stays whole, and once there is room the same command goes on to the same files.
"""

import errno
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crash_runs import EARLIER
from forked_runs import FSYNC, SOURCES, Forker, Run, command, contents, is_unfinished, start_alone

SCRIPTS = ("exhaustive", "selective", "triplets", "trajectory", "steering", "prepare")
PAGE = 4096


@dataclass(frozen=True)
class Case:
    """One script on small inputs, and what it makes undisturbed."""

    name: str
    forker: Forker
    study: Path
    finished: Path

    def run(self, out_dir: Path, **limits: Any) -> Run:
        """Run it to its end."""
        script, flags = command(self.name, self.study, out_dir)
        run = self.forker.start(script, flags, self.study / "said.log", **limits)
        run.wait(120)
        return run

    def refused(self, out_dir: Path, reason: int, **limits: Any) -> None:
        """Run it, and find one sentence with the error's words; all files are those of an undisturbed run."""
        run = self.run(out_dir, **limits)
        errors = [line for line in run.said().splitlines() if line.startswith("error: ")]
        assert run.status() == 2 and len(errors) == 1 and "Traceback" not in run.said(), run.said()
        mends = (f"({os.strerror(reason)}); ", "; free some, ")  # the second where the room was looked at before
        assert any(words in errors[0] for words in mends), errors[0]
        expected = contents(self.finished)
        for name, found in contents(out_dir).items():
            assert not isinstance(found, str), f"{name}: {found}"
            assert not name.endswith(".tmp"), name
            is_earlier = Path(name).name in EARLIER or is_unfinished(name)
            assert is_earlier or found == expected[name], name

    def completed(self, out_dir: Path) -> None:
        """Run it, and find the files of an undisturbed run."""
        run = self.run(out_dir)
        assert run.status() == 0, run.said()
        assert contents(out_dir) == contents(self.finished)

    def half(self, out_dir: Path) -> Path:
        """A folder in which every second result file is missing."""
        shutil.copytree(self.finished, out_dir, dirs_exist_ok=True)
        for path in sorted(path for path in out_dir.rglob("*") if path.is_file())[::2]:
            if path.name not in ("manifest.json", "results.json"):  # nobody could say whose the others are
                path.unlink()
        return out_dir


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Forker, Path]]:
    """The process that runs are forked from, and the inputs."""
    study = tmp_path_factory.mktemp("study") / "study"
    with Forker(shutil.copytree(SOURCES, study.with_name("src"))) as process:  # manifests hold a hash of it
        process.ask({"inputs": str(study)})
        yield process, study


@pytest.fixture(scope="module", params=SCRIPTS)
def case(request: pytest.FixtureRequest, forker: tuple[Forker, Path], tmp_path_factory) -> Case:
    """One script."""
    made = Case(request.param, *forker, tmp_path_factory.mktemp("finished") / "out")
    run = made.run(made.finished)
    assert run.status() == 0, run.said()
    return made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own, in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    mount(f"-t tmpfs -o size={PAGE}", "tmpfs", path)
    yield path
    subprocess.run(["umount", path], check=True)


def mount(options: str, *words: str | Path) -> None:
    """Call mount, which is root's."""
    done = subprocess.run(["mount", *options.split(), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.strip()}")


def test_a_full_disk_then_a_read_only_one(case: Case, disk: Path):
    out_dir = disk / "out"
    case.refused(out_dir, errno.ENOSPC)
    sizes = [path.stat().st_size for path in case.finished.rglob("*") if path.is_file()]
    n_pages = sum(-(-size // PAGE) for size in sizes)
    mount(f"-o remount,size={PAGE * (n_pages // 2)}", disk)
    case.refused(out_dir, errno.ENOSPC)
    mount("-o remount,ro,size=64m", disk)
    before = contents(out_dir)
    case.refused(out_dir, errno.EROFS)
    assert contents(out_dir) == before
    mount("-o remount,rw", disk)
    case.completed(out_dir)


def test_limits_of_the_user(case: Case, tmp_path: Path):
    out_dir = case.half(tmp_path / "out")
    before = contents(out_dir)
    folders = [out_dir, *(path for path in out_dir.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    case.refused(out_dir, errno.EACCES, powerless=True)
    for folder in folders:
        folder.chmod(0o755)
    # where blocks are counted late, as on NFS, it is fsync that says that a quota is used up
    if platform.machine() in FSYNC:
        case.refused(out_dir, errno.EDQUOT, no_sync=errno.EDQUOT)
    assert contents(out_dir) == before
    files = (path for path in case.finished.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    (out_dir / largest.relative_to(case.finished)).unlink(missing_ok=True)
    case.refused(out_dir, errno.EFBIG, file_bytes=largest.stat().st_size // 2)
    case.completed(out_dir)


def test_nowhere_to_print(case: Case, tmp_path: Path):
    case.refused(tmp_path / "out", errno.ENOSPC, full=True)
    assert contents(tmp_path / "out") == contents(case.finished)


def test_nowhere_to_print_in_a_fresh_interpreter(forker: tuple[Forker, Path], tmp_path: Path):
    script, flags = command("triplets", forker[1], tmp_path / "out")
    run = start_alone(SOURCES, script, flags, Path("/dev/full"))
    assert run.wait(120) == 2
