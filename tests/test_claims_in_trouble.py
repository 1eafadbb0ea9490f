"""Claims whose files cannot be read, touched or removed."""

import errno
import json
import os
import socket
import time
from pathlib import Path

import pytest

from cellcircuits import claims
from cellcircuits.claims import claimed
from cellcircuits.errors import UserError
from test_claims import ELSEWHERE, by, leave, names, take, target  # noqa: F401


def test_what_one_says(tmp_path: Path):
    """In a folder that is not there yet, nor the one above it."""
    with claimed(tmp_path / "new" / "blocks" / "block_00016.parquet") as claim:
        owner = json.loads(claim.path.read_bytes())
        assert list(owner) == ["machine", "host", "pid", "started_ns", "is_locked"]
        assert owner["host"] == socket.gethostname() and abs(owner["started_ns"] / 1e9 - time.time()) < 60


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError) as refused, claimed(tmp_path / "file" / "blocks" / "block_00016.parquet"):
        pytest.fail("claimed")
    path = tmp_path / "file" / "blocks" / "block_00016.claim.0"
    assert str(refused.value).startswith(f"{path}: cannot be written (Not a directory); ")


class FullDisk:
    """Stands for the file of a claim on a disk that takes some bytes and no more, or of a run told to stop."""

    def __init__(self, stream, outcome: object):
        self.stream, self.outcome = stream, outcome

    def write(self, content: bytes) -> int:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.stream.write(content[: self.outcome])

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@pytest.mark.parametrize(
    "outcome", [0, 10, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=repr
)
def test_one_that_cannot_be_written_whole_is_removed(target: Path, monkeypatch, outcome: object):  # noqa: F811
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **how: FullDisk(real(path, mode, **how), outcome) if "x" in mode
        else real(path, mode, **how)
    )  # fmt: skip
    is_stop = isinstance(outcome, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt if is_stop else UserError) as refused:
        take(target)
    path = target.with_name("block_00016.claim.0")
    assert is_stop or str(refused.value).startswith(
        f"{path}: cannot be written (No space left on device); free some space"
    )
    assert names(target) == []


def test_one_that_cannot_be_read_is_named(target: Path):  # noqa: F811
    path = target.with_name("block_00016.claim.0")
    path.mkdir(parents=True)
    with pytest.raises(UserError) as refused, claimed(target):
        pytest.fail("claimed")
    assert str(refused.value).startswith(f"{path}: cannot be read (Is a directory); ")


def test_one_that_is_gone_between_two_looks_is_not_held(target: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    claim = take(target)
    monkeypatch.setattr(claims, "_generations", lambda path: {})
    assert claim.is_held() is False
    claim.stream.close()


def test_removing_what_is_gone_harms_nobody(target: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """Another process removed the dead claim below this one first."""
    leave(target, 0, by(claims.machine()))
    claim, real = take(target), Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **how: (real(path), real(path)))
    claim.release()
    assert names(target) == []


def test_a_touch_that_fails_once_is_tried_again(target: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    real, n_failed = os.utime, []

    def utime(*args: object) -> None:
        if len(n_failed) < 2:
            n_failed.append(1)
            raise OSError("stale file handle")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(claims, "TOUCH_EVERY_SECONDS", 0.01)
        patch.setattr(claims.os, "utime", utime)
        with claimed(target) as claim:
            real(claim.path, (0, 0))
            deadline = time.monotonic() + 10
            while claim.path.stat().st_mtime == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert claim.path.stat().st_mtime > 0 and len(n_failed) == 2


def test_the_time_is_that_of_the_folder_in_which_the_claim_lies(target: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    leave(target, 0, by(ELSEWHERE))
    real, folders = claims.tempfile.NamedTemporaryFile, []

    def recorded(**how: object):
        file = real(**how)
        folders.append(Path(file.name).parent)
        return file

    monkeypatch.setattr(claims.tempfile, "NamedTemporaryFile", recorded)
    with claimed(target) as claim:
        assert claim is None
    assert folders == [target.parent]
