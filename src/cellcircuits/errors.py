"""The one exception for mistakes that the user can mend, and how it words a file that cannot be written."""

import errno
from pathlib import Path

MENDS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "delete files of yours or ask for a larger quota",
    errno.EROFS: "make it writable, or choose another folder",
    errno.EACCES: "ask for the right to write there, or choose another folder",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f)",
}
FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # only a write meets these


def printable(text: str) -> str:
    r"""The text on one line: an escape code for a terminal, a line break or a lone surrogate is shown as `\x1b`."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class UserError(Exception):
    """A mistake the user can mend.

    Its text is one clear sentence that names the file, the field and the mend; a script prints it and
    exits with status 2, without a traceback.
    """

    def __init__(self, text: str) -> None:
        """Take the sentence; names from files may stand in it as they are."""
        super().__init__(printable(text))


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error to raise where `path` cannot be written: full disk, quota, read-only, permissions."""
    mend = MENDS.get(error.errno or 0, "free it, or choose another folder,")
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}); {mend} and run the same command again: what was "
        "finished is kept."
    )
