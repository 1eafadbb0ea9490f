"""JSON in and out: strict and atomic when written, tolerant of old `Infinity` tokens when read."""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cellcircuits.errors import UserError

MAX_JSON_BYTES = 1 << 30
MAX_JSON_DEPTH = 100  # what is nested deeper could not be printed in an error or copied


def read_json(path: Path) -> Any:
    """Read one JSON file.

    `Infinity` and `NaN` tokens, which older releases wrote, are admitted.

    Raises:
        UserError: the file is missing, unreadable, not UTF-8, not JSON, too large or too deeply nested.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: is too large a file for JSON; restore or remove the file.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
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


def _writer(content: Any) -> Callable[[IO[bytes]], Any]:
    text = json.dumps(content, indent=2, allow_nan=False)
    return lambda stream: stream.write(text.encode("utf-8"))


@contextmanager
def _written(path: Path, write: Callable[[IO[bytes]], Any]) -> Iterator[Path]:
    """A sibling of `path` that `write` has filled; it is gone after the `with`."""
    # two machines may have the same process id, and threads of one process do
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free or choose another folder.") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
