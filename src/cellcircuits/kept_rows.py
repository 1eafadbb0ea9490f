"""Arrays that fill up cell by cell over hours, kept on disk meanwhile so that a kill costs minutes."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cellcircuits.jsonio import discard, write_atomically
from cellcircuits.tracing import SAVE_EVERY_SECONDS

log = logging.getLogger(__name__)


class KeptRows:
    """Arrays with one row per cell, of which the first `n_done` are there.

    A save writes the rows since the last one to a file of its own, `rows_<first row>.npz`, so that it costs as much
    near the end of a run as at its start.
    """

    def __init__(self, arrays: Mapping[str, NDArray], folder: Path | None, fingerprint: str) -> None:
        """Take up what an interrupted run left.

        Args:
            arrays: each (n_cells, ...), filled by the caller in place, row by row.
            folder: where to keep the rows; None keeps nothing.
            fingerprint: of what determines them; rows of another one are not used.
        """
        self.arrays, self.folder, self.fingerprint = arrays, folder, fingerprint
        self.n_done = 0
        while folder is not None and (n_rows := self._restore(self._path(self.n_done))):
            self.n_done += n_rows
        self._n_saved, self._last_save = self.n_done, time.monotonic()

    def finished(self, n_done: int) -> None:
        """Count the first `n_done` rows as there, and save them now and then.

        Raises:
            UserError: the folder cannot be written.
        """
        self.n_done = n_done
        if time.monotonic() - self._last_save > SAVE_EVERY_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the rows since the last save, whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.folder is not None and self.n_done > self._n_saved:
            rows = {name: array[self._n_saved : self.n_done] for name, array in self.arrays.items()}
            content = {"fingerprint": np.array(self.fingerprint), **rows}
            write_atomically(self._path(self._n_saved), lambda stream: np.savez(stream, **content))
            self._n_saved = self.n_done
        self._last_save = time.monotonic()

    def _path(self, first: int) -> Path:
        return Path(self.folder or ".") / f"rows_{first:07d}.npz"

    def _restore(self, path: Path) -> int:
        """Take up one file; returns its number of rows, 0 where there is none or it cannot be used, which is said."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
                if kept["fingerprint"].item() != self.fingerprint:
                    log.warning("%s is of another run: it is not used.", path)
                    return 0
                rows = {name: kept[name] for name in self.arrays}
        except FileNotFoundError:
            return 0
        except Exception as error:  # a damaged archive makes zipfile and NumPy raise almost anything
            log.warning("%s is damaged (%s): its cells are measured again.", path, type(error).__name__)
            return 0
        n_rows = len(next(iter(rows.values())))
        places = {name: array[self.n_done : self.n_done + n_rows] for name, array in self.arrays.items()}
        if any((rows[name].shape, rows[name].dtype) != (place.shape, place.dtype) for name, place in places.items()):
            log.warning("%s does not fit this run: it is not used.", path)
            return 0
        for name, place in places.items():
            place[:] = rows[name]
        return n_rows


def remove_rows(folder: Path) -> None:
    """Remove what `KeptRows` wrote, and the folder where nothing else is in it."""
    for path in folder.glob("rows_*.npz"):
        discard(path)
    with suppress(OSError):
        folder.rmdir()
