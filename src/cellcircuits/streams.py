"""Standard output and error: where they cannot be written (a full disk, none there at all), and what reaches them."""

import logging
import os
from contextlib import suppress
from typing import Any, TextIO

from cellcircuits.errors import printable


class OneLine(logging.Formatter):
    """A message on one line, whatever the names of cells and genes in it hold."""

    def format(self, record: logging.LogRecord) -> str:
        """The message; of an error of a library its traceback too."""
        return super().format(record) if record.exc_info else printable(record.getMessage())


class Log:
    """Standard error that drops what it cannot write: a full disk below a log must not end a run."""

    def __init__(self, stream: TextIO | None) -> None:
        """Stand in for a stream."""
        self._stream = stream  # None where the process was started without one

    def write(self, text: str) -> int:
        """Write what can be written; all of it counts as written."""
        with suppress(OSError):
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError):
            if self._stream is not None:
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream has."""
        return getattr(self._stream, name)


def give_up(stream: TextIO | None) -> None:
    """Drop what a stream still holds and cannot write: Python would try again at its end, with a traceback."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
