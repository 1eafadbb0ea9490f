"""Reading a whole file that others made. Standard library only."""

import stat
from pathlib import Path

from cellcircuits.errors import UserError


def read_bounded(path: Path, max_bytes: int, what: str) -> bytes:
    """Read a whole file that has an admitted size.

    Args:
        path: the file.
        max_bytes: most bytes it may have.
        what: what it should be, for errors: "a file of gene sets".

    Raises:
        UserError: missing, too large, unreadable, or a pipe or device, which may never end.
    """
    try:
        require_plain_file(path)
        with path.open("rb") as stream:
            content = stream.read(min(path.stat().st_size, max_bytes) + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    if len(content) > max_bytes:
        raise UserError(f"{path}: is too large for {what} (more than {max_bytes:,} bytes); give one that is.")
    return content


def require_plain_file(path: Path) -> None:
    """Refuse pipes, sockets and devices: reading one may wait for ever or never end.

    Raises:
        OSError: missing.
        UserError: it is none of a file and a folder.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder fails with a reason of its own
        raise UserError(f"{path}: cannot be read (it is a pipe or a device); give a file.")
