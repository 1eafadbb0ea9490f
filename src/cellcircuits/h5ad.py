"""Reading single-cell files: tables whole, matrices only at the wanted rows.

The one file that touches h5py and anndata. A 17 GB matrix stays on disk: rows are read in blocks, whatever
the storage (dense, CSR, CSC). Nothing outside the file itself is opened, whatever its links ask for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem, sparse_dataset

from cellcircuits.errors import UserError

BLOCK_BYTES = 64 * 2**20  # memory of one block of rows


class H5adFile:
    """One open .h5ad file; use it in a `with` statement.

    Matrices are called as on the command line: `X`, `raw` (its own `raw/var` names the genes), `layer:NAME`.
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
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise UserError(
                f"{path}: is not a readable HDF5 file ({error}); give an .h5ad file, and fetch it "
                "again if it is truncated."
            ) from None
        try:
            self._check_structure()
        except BaseException:
            self._file.close()
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
        self._file.close()

    def _check_structure(self) -> None:
        with _reading(self.path, "the list of contents"):
            outside = _links_outside(self._file)
        if outside:
            raise UserError(
                f"{self.path}: {outside} points to another file, which is never followed; write the data "
                "into the file itself."
            )
        for part in ("obs", "var"):
            if part not in self._file:
                raise UserError(f"{self.path}: has no {part}; it is not an AnnData (.h5ad) file.")
        if not self.matrices:
            raise UserError(f"{self.path}: has no X, raw or layers, so there are no counts to read.")

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the matrices there are: X, raw, then the layers, those named like counts first."""
        layers = self._file["layers"] if isinstance(self._file.get("layers"), h5py.Group) else {}
        by_name = sorted(layers, key=lambda name: "count" not in name.lower())
        names = ["X", "raw", *(f"layer:{name}" for name in by_name)]
        return tuple(name for name in names if _is_matrix(self._file.get(_key(name))))

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
        with _reading(self.path, key):
            table = read_elem(self._file[key])
        if not isinstance(table, pd.DataFrame):
            raise UserError(f"{self.path}: {key} is not a table; the file is damaged or not an AnnData file.")
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
        with _reading(self.path, matrix):
            stored = self._file[_key(matrix)]
            is_dense = isinstance(stored, h5py.Dataset)
            source = stored if is_dense else sparse_dataset(stored)
            dtype = stored.dtype if is_dense else stored["data"].dtype
            starts = None if is_dense else stored["indptr"]
            found_shape = tuple(source.shape)
        if found_shape != shape:
            raise UserError(
                f"{self.path}: {matrix} has shape {found_shape}, but its tables describe "
                f"{shape[0]} cells and {shape[1]} genes; the file is damaged."
            )
        if dtype.kind not in "biuf":
            raise UserError(f"{self.path}: {matrix} holds no numbers (type {dtype}).")
        with _reading(self.path, matrix):
            if starts is None:
                raw_blocks = _dense_blocks(source, rows)
            else:
                raw_blocks = (_csr_blocks if source.format == "csr" else _csc_blocks)(source, rows, starts)
            for block in raw_blocks:
                yield _canonical(block)


def _key(matrix: str) -> str:
    if matrix == "raw":
        return "raw/X"
    return "layers/" + matrix.removeprefix("layer:") if matrix.startswith("layer:") else matrix


def _is_matrix(item: Any) -> bool:
    if isinstance(item, h5py.Dataset):
        return len(item.shape or ()) == 2
    if not isinstance(item, h5py.Group):
        return False
    kind = item.attrs.get("encoding-type", item.attrs.get("h5sparse_format", ""))
    return (kind.decode() if isinstance(kind, bytes) else str(kind)).removesuffix("_matrix") in ("csr", "csc")


def _links_outside(file: h5py.File) -> str | None:
    """Name of the first object whose content lies in another file, None where there is none."""

    def outside(name: str, link: Any) -> str | None:
        if isinstance(link, h5py.ExternalLink):
            return name
        item = file.get(name) if isinstance(link, h5py.HardLink) else None
        stored_outside = isinstance(item, h5py.Dataset) and (item.external or item.is_virtual)
        return name if stored_outside else None

    return file.visititems_links(outside)


@contextmanager
def _reading(path: Path, part: str) -> Iterator[None]:
    """Turn what h5py and anndata raise on damaged content into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # anndata raises its own types, which are not public, and h5py almost any
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: {part} cannot be read ({reason}); the file is damaged, truncated or not an AnnData (.h5ad) file."
        ) from error


def _dense_blocks(stored: h5py.Dataset, rows: np.ndarray) -> Iterator[sp.csr_matrix]:
    row_bytes = max(1, stored.shape[1] * 8)
    for part in _parts(rows, max(1, BLOCK_BYTES // row_bytes)):
        yield sp.csr_matrix(stored[part].astype(np.float64))


def _csr_blocks(source: Any, rows: np.ndarray, row_starts: h5py.Dataset) -> Iterator[sp.csr_matrix]:
    n_stored = np.diff(row_starts[:])[rows]
    largest = max(1, int(n_stored.max(initial=0)))
    for part in _parts(rows, max(1, BLOCK_BYTES // (largest * 16))):
        yield source[part]


def _csc_blocks(source: Any, rows: np.ndarray, column_starts: h5py.Dataset) -> Iterator[sp.csr_matrix]:
    """Rows of a matrix stored by column: columns are read in groups, and the wanted rows kept of each."""
    starts = column_starts[:]
    n_columns = source.shape[1]
    kept, first = [], 0
    while first < n_columns:
        budget = starts[first] + BLOCK_BYTES // 16
        last = max(first + 1, int(np.searchsorted(starts, budget, side="right")) - 1)
        columns = source[:, first:last]
        _check_indices(columns)
        kept.append(columns[rows])
        first = last
    yield sp.hstack(kept, format="csr") if kept else sp.csr_matrix((len(rows), 0))


def _parts(rows: np.ndarray, n_rows: int) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), n_rows):
        yield rows[first : first + n_rows]


def _check_indices(block: Any) -> None:
    # scipy trusts stored indices; a damaged one would read or write outside the array.
    bound = block.shape[1] if block.format == "csr" else block.shape[0]
    if block.indices.size and not 0 <= block.indices.min() <= block.indices.max() < bound:
        raise ValueError("an index lies outside the matrix")
    if (np.diff(block.indptr) < 0).any():
        raise ValueError("row starts are not ascending")


def _canonical(block: Any) -> sp.csr_matrix:
    _check_indices(block)
    matrix = sp.csr_matrix(block, dtype=np.float64)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix
