"""JSON in and out: strict and atomic when written, tolerant of old `Infinity` tokens when read."""

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from cellcircuits.errors import UserError, cannot_write
from cellcircuits.files import read_bounded

MAX_JSON_BYTES = 1 << 28
MAX_JSON_VALUES = 1 << 24  # each may take a hundred times its two bytes
MAX_JSON_DEPTH = 100  # what is nested deeper could not be printed in an error or copied
_HEX = "[0-9a-fA-F]"
# what is not kept is half a pair; an escaped backslash is kept so that it does not start anything
_ESCAPED = re.compile(
    rf"(?P<kept>\\\\|\\u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}})|\\u[dD][89a-fA-F]{_HEX}{{2}}"
)


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        UserError: see `parse_json`; or the file is missing, unreadable or too large.
    """
    return parse_json(read_bounded(path, MAX_JSON_BYTES, "JSON"), path)


def parse_json(raw: bytes, path: Path) -> Any:
    """Parse the content of a JSON file.

    `Infinity` and `NaN` tokens, which older releases wrote, are admitted. Half a surrogate pair, which no UTF-8 file
    could hold again, becomes `?`.

    Args:
        raw: the content.
        path: the file, for errors.

    Raises:
        UserError: not UTF-8, not JSON, too many values or too deeply nested.
    """
    if sum(map(raw.count, (b",", b":", b"[", b"{"))) > MAX_JSON_VALUES:
        raise UserError(f"{path}: holds more than {MAX_JSON_VALUES:,} values; restore or remove the file.")
    try:
        content = json.loads(_ESCAPED.sub(lambda found: found["kept"] or "?", raw.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore or remove the file.") from None
    if _is_deeper_than(MAX_JSON_DEPTH, content):
        raise UserError(f"{path}: is nested deeper than {MAX_JSON_DEPTH} levels; restore or remove the file.")
    return content


def _is_deeper_than(limit: int, content: Any) -> bool:
    level = [content]
    for _ in range(limit):
        parts = (item.values() if type(item) is dict else item for item in level if type(item) in (dict, list))
        level = [part for several in parts for part in several if type(part) in (dict, list)]
        if not level:
            return False
    return True


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that `path` holds either the whole new file or what it held before.

    Raises:
        ValueError: `content` holds a NaN or an infinity.
        UserError: the folder cannot be written.
    """
    write_atomically(path, _writer(content))


def create_json(path: Path, content: Any) -> bool:
    """Write `content` unless `path` is there already; of several processes that try at once, one succeeds.

    Returns:
        Whether this call made the file.

    Raises:
        ValueError: `content` holds a NaN or an infinity.
        UserError: the folder cannot be written.
    """
    with _written(path, _writer(content)) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: the best it can do
            if path.exists():
                return False
            temporary.replace(path)
        return True


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary sibling of `path`, then move it into place.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    with _written(path, write) as temporary:
        temporary.replace(path)


def discard(path: Path) -> None:
    """Remove a file that is no longer needed; where that cannot be done it stays, which harms nobody."""
    with suppress(OSError):
        path.unlink()


def _writer(content: Any) -> Callable[[IO[bytes]], Any]:
    text = json.dumps(content, indent=2, allow_nan=False)
    return lambda stream: stream.write(text.encode("utf-8"))


class _Recorded:
    """A file that remembers the first error of its writes: libraries turn it into errors of their own, or drop it.

    Nothing is written after it: NumPy 2.0 leaves its archive open, which closes itself when it is collected.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._n_bytes = 0
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._stream.write(data)
            except BaseException as error:  # a Ctrl-C inside torch.save would become a RuntimeError
                self.error = error
                raise
        self._n_bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def __getattr__(self, name: str) -> Any:
        # after an error `tell` and `seek` must not count backwards, and must not touch the file, which is closed
        return getattr(self._stream, name) if self.error is None else lambda *_: self._n_bytes


@contextmanager
def _written(path: Path, write: Callable[[IO[bytes]], Any]) -> Iterator[Path]:
    """A sibling of `path` that `write` has filled; it is gone after the `with`."""
    # two machines may have the same process id, and threads of one process do
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            recorded = _Recorded(stream)
            try:
                write(cast(IO[bytes], recorded))
            except BaseException as error:
                recorded.error = recorded.error or error
            if recorded.error is not None:
                raise recorded.error
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a power cut does not undo a move; not all systems can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
