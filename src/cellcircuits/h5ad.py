"""Reading single-cell files: tables whole, matrices only at the wanted rows.

A 17 GB matrix stays on disk: rows are read in blocks, whatever the storage (dense, CSR, CSC). The HDF5 library runs
in a process of its own (`h5ad_child`): what a damaged or prepared file does to it ends in one error here.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellcircuits.errors import UserError
from cellcircuits.h5ad_frames import receive, send, texts_of

BLOCK_BYTES = 64 * 2**20  # memory of one block of rows
FREE_ROOM = 1 << 30  # bytes of memory for reading any file, however small
ROOM_PER_BYTE = 64  # and more for each of its bytes: text in Python takes ten times its place on disk
FREE_SECONDS = 4  # of computing, likewise; a damaged tree of names can send the library round in circles
BYTES_PER_SECOND = 1 << 20
_SOURCES = str(Path(__file__).resolve().parents[1])
# -P and the path: a module that lies in the working directory is never imported
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from cellcircuits.h5ad_child import main; main()"
# "::" turns off every HDF5 plug-in, which would be code from a folder named by the environment
_ENVIRONMENT = {"HDF5_PLUGIN_PRELOAD": "::", "HDF5_PLUGIN_PATH": "", "OPENBLAS_NUM_THREADS": "1"}


class H5adFile:
    """One open .h5ad file; use it in a `with` statement.

    Matrices are called as on the command line: `X`, `raw` (its own `raw/var` names the genes), `layer:NAME`;
    `matrices` names those there are: X, raw, then the layers, those named like counts first.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and check that it holds cells and nothing from elsewhere.

        Args:
            path: the file.

        Raises:
            UserError: no such file, no HDF5, no cells, or content that lies in another file.
        """
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: no such file.")
        size, physical = path.stat().st_size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._room = min(physical, FREE_ROOM + ROOM_PER_BYTE * size)
        self._seconds = FREE_SECONDS + size // BYTES_PER_SECOND
        try:
            self._reader = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, _SOURCES, str(path), str(self._room), str(self._seconds)],
                env={**os.environ, **_ENVIRONMENT},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is this process's to answer
            )
        except OSError as error:
            raise UserError(
                f"{path}: the process that reads it cannot be started ({error.strerror}); check {sys.executable} "
                "and the limit of processes."
            ) from None
        try:
            fields, _ = self._answer("the list of contents")
            with _sensible(path, "the list of contents"):
                self.matrices: tuple[str, ...] = tuple(fields["matrices"])
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        """Give the open file."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._close()

    def _close(self) -> None:
        self._reader.kill()
        self._reader.communicate()

    def obs(self) -> pd.DataFrame:
        """The table of cells."""
        return self._table("obs")

    def var(self, matrix: str) -> pd.DataFrame:
        """The table of genes that belongs to a matrix."""
        return self._table(self.var_name(matrix))

    def var_name(self, matrix: str) -> str:
        """Where the genes of a matrix are described."""
        return "raw/var" if matrix == "raw" else "var"

    def _table(self, key: str) -> pd.DataFrame:
        fields, arrays = self._ask(key, {"ask": "table", "key": key})
        with _sensible(self.path, key):
            names = [name for name, _ in fields["columns"]]
            table = pd.DataFrame(
                {name: _column(column, arrays) for name, column in fields["columns"]},
                index=_column(fields["index"], arrays),
                columns=names or None,
            )
            table.index.name = fields["index_name"]
        return table

    def blocks(self, matrix: str, rows: np.ndarray, shape: tuple[int, int]) -> Iterator[sp.csr_matrix]:
        """Read the wanted rows of one matrix, block after block.

        Args:
            matrix: one of `matrices`.
            rows: (n_cells,) ascending row numbers.
            shape: rows and columns the matrix must have, those of its tables.

        Yields:
            (n_block, shape[1]) CSR matrices, float64, indices sorted, without stored zeros.

        Raises:
            UserError: damaged, not numeric, or its shape does not belong to the tables.
        """
        request = {"ask": "blocks", "matrix": matrix, "shape": list(map(int, shape)), "block_bytes": BLOCK_BYTES}
        fields, arrays = self._ask(matrix, request, [np.asarray(rows, dtype=np.int64)])
        while "end" not in fields:
            with _sensible(self.path, matrix):
                values, places, columns = arrays
                block = sp.coo_matrix((values, (places, columns)), (fields["n_rows"], shape[1])).tocsr()
                block.eliminate_zeros()
            yield block
            fields, arrays = self._ask(matrix, {"ask": "next"})

    def _ask(
        self, part: str, request: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        try:
            send(self._reader.stdin, request, arrays)
        except BrokenPipeError:
            raise UserError(self._ended(part)) from None
        return self._answer(part)

    def _answer(self, part: str) -> tuple[dict[str, Any], list[np.ndarray]]:
        try:
            fields, arrays = receive(self._reader.stdout, self._room)
        except EOFError:
            raise UserError(self._ended(part)) from None
        except ValueError as error:
            raise UserError(f"{self.path}: {part} cannot be read ({error}); the file is damaged.") from None
        if "error" in fields:
            raise UserError(str(fields["error"]))
        return fields, arrays

    def _ended(self, part: str) -> str:
        """What to say when the reading process is gone."""
        status = self._reader.wait()
        if status == -signal.SIGXCPU:
            how = f"took more than {self._seconds} seconds of computing"
        else:
            how = f"ended with {signal.Signals(-status).name if status < 0 else f'status {status}'}"
        return (
            f"{self.path}: {part} cannot be read: the process that reads it {how}; the file is damaged, or the memory "
            "is too small. Fetch the file again."
        )


@contextmanager
def _sensible(path: Path, part: str) -> Iterator[None]:
    """Turn what pandas and SciPy raise on content that makes no sense into one sentence."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: {part} cannot be read ({reason:.300}); the file is damaged, truncated or not an AnnData (.h5ad) "
            "file."
        ) from error


def _column(column: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> Any:
    """One column of a table, of the type that AnnData gives it."""
    if column["kind"] == "categorical":
        categories = pd.Index(_column(column["categories"], arrays))
        return pd.Categorical.from_codes(arrays[column["codes"]], categories, ordered=column["ordered"])
    array = arrays[column["array"]]
    missing = arrays[column["missing"]] if "missing" in column else None
    if column["kind"] == "text":
        texts = np.array(texts_of(array), dtype=object)
        if missing is None:
            return texts
        texts[missing] = pd.NA
        return pd.array(texts, dtype="string")
    if missing is None:
        return array
    kind = pd.arrays.BooleanArray if array.dtype.kind == "b" else pd.arrays.IntegerArray
    return kind(array, mask=missing)
