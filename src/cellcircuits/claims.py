"""Which of several processes makes a file that takes long to make. Standard library only.

A claim on `block_00016.parquet` is a file beside it, `block_00016.claim.<generation>`; the highest generation
counts. Its owner keeps it locked and touches it every half minute. A claim is dead when its owner's lock is gone
(same machine) or it has not been touched for ten minutes (another machine, or a file system without locks). A dead
claim is not removed, since someone else may be at that too, but overruled by one of the next generation, which only
one process can create. Two living processes never both hold a claim: each looks for others after it has made its
own file, so the later one sees the earlier one's.

What this cannot exclude is an owner that is suspended for longer than ten minutes and wakes up when another machine
has taken over: both then do the same work, and `Claim.is_held` tells the sleeper.
"""

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cellcircuits.errors import UserError, cannot_write

EXPIRE_SECONDS = 600.0
TOUCH_EVERY_SECONDS = 30.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Claim:
    """A claim that this process has made: its file, open and where possible locked, and what it says."""

    path: Path
    stream: IO[bytes]
    content: bytes

    def is_held(self) -> bool:
        """Whether it still counts: nobody has taken over from a process that was thought dead."""
        return self.is_there() and max(_generations(self.path), default=None) == _generation(self.path)

    def release(self) -> None:
        """Let others claim the file, and remove the dead claims below this one."""
        if self.is_held():  # else all of this is the new owner's
            # its own file last and while it is locked, so that the claim which counts is a living one to the end
            for generation, path in sorted(_generations(self.path).items()):
                if generation <= _generation(self.path):
                    _remove(path)
        self.stream.close()

    def withdraw(self) -> None:
        """Remove this claim alone."""
        if self.is_there():
            _remove(self.path)
        self.stream.close()

    def is_there(self) -> bool:
        """Whether the path is this claim, and not a later one after others have released it."""
        try:
            return self.path.read_bytes() == self.content
        except OSError:
            return False


@contextmanager
def claimed(target: Path) -> Iterator[Claim | None]:
    """Hold the claim on making `target` inside the `with`, or None where another living process holds it.

    Whether `target` is there must be looked at inside the `with`: whoever held the claim before may have finished.

    Raises:
        UserError: the folder cannot be written.
    """
    claim = _take(target)
    if claim is None:
        yield None
        return
    over = threading.Event()
    heartbeat = threading.Thread(target=_keep_fresh, args=(claim.stream, over), daemon=True)
    try:
        heartbeat.start()
        yield claim
    finally:
        over.set()
        try:
            if heartbeat.is_alive():
                heartbeat.join()  # before the stream is closed and its number may stand for another file
        finally:  # a signal may come at any of these lines
            claim.release()


def is_claimed(target: Path) -> bool:
    """Whether there is any claim on `target`, dead or living."""
    return bool(_generations(target))


def _take(target: Path) -> Claim | None:
    there = _generations(target)
    newest = max(there, default=-1)
    if there and _is_alive(there[newest]):
        return None
    claim = _make(target.with_name(f"{target.stem}.claim.{newest + 1}"))
    if claim is None:
        return None
    # Between the look and the making, the claims seen may have been released and others have begun anew below, or an
    # owner above may have been about to release and have removed this one with its own. Where two processes see each
    # other here, both give way, and the next look finds the file free.
    try:
        others = [path for path in _generations(target).values() if path != claim.path]
        is_mine = not any(_is_alive(path) for path in others) and claim.is_there()
    except BaseException:  # a signal, or an error of the file system
        claim.withdraw()
        raise
    if not is_mine:
        claim.withdraw()
        return None
    return claim


def _make(path: Path) -> Claim | None:
    """Create the claim file, or None where another process was faster."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("x+b", buffering=0)  # "x": of several processes one succeeds
    except OSError as error:
        if isinstance(error, FileExistsError) and path.parent.is_dir():
            return None
        raise cannot_write(path, error) from None
    try:
        locked = _lock(stream, fcntl.LOCK_EX)
        # Only now does it say anything: others try the lock of a claim only after they have read whose it is, so
        # they never find it open in between.
        content = json.dumps(
            {
                "machine": machine(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "started_ns": time.time_ns(),  # tells two claims of one process apart
                "is_locked": bool(locked),
            }
        ).encode()
        if stream.write(content) < len(content):  # unbuffered: the part that fits is no error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except BaseException as error:  # a signal too: a claim that says nothing counts as living for ten minutes
        _remove(path)
        stream.close()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from None
        raise
    return Claim(path, stream, content)


def _is_alive(path: Path) -> bool:
    """Whether a claim's owner is still there, as far as one can tell."""
    try:
        with path.open("rb") as stream:
            owner = _owner(stream.read())
            if owner.get("machine") == machine() and owner.get("is_locked") is True:
                # LOCK_SH: two that look at the same time must not take each other for the owner
                got_lock = _lock(stream, fcntl.LOCK_SH)
                if got_lock is not None:
                    return not got_lock
            touched = os.fstat(stream.fileno()).st_mtime
        # a time far in the future is no sign of life either: a clock was set back, or the folder was copied
        return abs(_file_system_time(path.parent) - touched) <= EXPIRE_SECONDS
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # released meanwhile
            return False
        raise UserError(f"{path}: cannot be read ({error.strerror}); free or choose another folder.") from None


def _owner(content: bytes) -> dict[str, object]:
    """What a claim says; nothing where it is damaged or not written yet."""
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _lock(stream: IO[bytes], kind: int) -> bool | None:
    """Whether the lock could be had at once; None where the file system has none."""
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _keep_fresh(stream: IO[bytes], over: threading.Event) -> None:
    """Touch a claim until `over`; through the open file, so that one which others have removed stays removed."""
    while not over.wait(TOUCH_EVERY_SECONDS):
        with suppress(OSError):
            os.utime(stream.fileno())


def _file_system_time(folder: Path) -> float:
    """What the time is for the files of a folder, whose server's clock need not be this machine's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock.", suffix=".tmp") as file:
        return os.fstat(file.fileno()).st_mtime


def machine() -> str:
    """Names this machine since it was started, so that processes here know each other's locks."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _generations(path: Path) -> dict[int, Path]:
    """Every claim on a file by its generation; `path` is the file or one of its claims."""
    stem = path.name.partition(".")[0]
    return {_generation(claim): claim for claim in path.parent.glob(f"{stem}.claim.*") if claim.suffix[1:].isdecimal()}


def _generation(claim: Path) -> int:
    return int(claim.suffix[1:])


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
