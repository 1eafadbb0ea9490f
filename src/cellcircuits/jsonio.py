"""JSON in and out: strict and atomic when written, tolerant of old `Infinity` tokens when read."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from cellcircuits.errors import UserError


def read_json(path: Path) -> Any:
    """Read one JSON file.

    `Infinity` and `NaN` tokens, which older releases wrote, are admitted.

    Raises:
        UserError: the file is missing, unreadable, not UTF-8 or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore or remove the file.") from None


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that `path` holds either the whole new file or what it held before.

    Raises:
        ValueError: `content` holds a NaN or an infinity.
        UserError: the folder cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False)
    write_atomically(path, lambda stream: stream.write(text.encode("utf-8")))


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary sibling of `path`, then move it into place.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free or choose another folder.") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
