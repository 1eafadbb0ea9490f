"""Which matrix of a cell file holds raw counts, checked on the selected cells."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellcircuits.errors import UserError

if TYPE_CHECKING:  # anndata takes long to import
    from cellcircuits.h5ad import H5adFile

AUTO = "auto"
MAX_DRAWN_FROM = 1_000_000_000  # NumPy's limit for this distribution


@dataclass(frozen=True)
class CountMatrix:
    """Raw counts of the selected cells.

    Attributes:
        name: `X`, `raw` or `layer:NAME`.
        counts: (n_cells, n_columns) CSR, float64, non-negative integers.
        var: the table of its columns.
    """

    name: str
    counts: sp.csr_matrix
    var: pd.DataFrame


def read_counts(file: "H5adFile", wanted: str, rows: np.ndarray, cell_names: pd.Index) -> CountMatrix:
    """Read the matrix asked for, or with `auto` the first one that holds counts.

    Args:
        file: the open file.
        wanted: `auto`, `X`, `raw` or `layer:NAME`.
        rows: (n_cells,) ascending row numbers.
        cell_names: (n_rows,) names of all cells of the file.

    Raises:
        UserError: no such matrix, or values that are no counts.
    """
    there_are = file.matrices
    if wanted != AUTO and wanted not in there_are:
        raise UserError(f"{file.path}: has no {wanted} (--counts); there are {', '.join(there_are)}.")
    problems = []
    for name in there_are if wanted == AUTO else (wanted,):
        found = _read_if_counts(file, name, rows, cell_names)
        if isinstance(found, CountMatrix):
            return found
        problems.append(found)
    if wanted == AUTO:
        raise UserError(
            f"{file.path}: no matrix holds raw counts of the selected cells: {'; '.join(problems)}. The "
            "tokenization needs raw counts (integers, not normalized or logged); give a file that holds them."
        )
    others = [
        name
        for name in there_are
        if name != wanted and isinstance(_read_if_counts(file, name, rows, cell_names), CountMatrix)
    ]
    hint = (
        f"--counts {others[0]} holds integers"
        if others
        else "no other matrix of the file holds integers either; give a file with raw counts"
    )
    raise UserError(f"{file.path}: {problems[0]}, so it does not hold raw counts; {hint}.")


def _read_if_counts(file: "H5adFile", name: str, rows: np.ndarray, cell_names: pd.Index) -> CountMatrix | str:
    """The matrix, or in words what is wrong with it."""
    var = file.var(name)
    blocks, n_read = [], 0
    for block in file.blocks(name, rows, (len(cell_names), len(var))):
        problem = first_problem(block)
        if problem:
            row, column, what = problem
            cell, gene = cell_names[rows[n_read + row]], var.index[column]
            return f"{name} holds {what} (cell {cell}, gene {gene})"
        blocks.append(block)
        n_read += block.shape[0]
    counts = sp.vstack(blocks, format="csr")
    return CountMatrix(name, counts, var) if counts.nnz else f"{name} is 0 everywhere"


def downsampled(matrix: CountMatrix, kept: np.ndarray, rows: np.ndarray, depth: int, seed: int) -> CountMatrix:
    """Draw `depth` of each kept cell's counts without replacement, over all columns.

    Every cell has a generator of its own, so its draw depends on no other cell.

    Args:
        matrix: the counts.
        kept: (n_kept,) positions in `matrix` of the cells to keep; each has at least `depth` counts.
        rows: (n_kept,) their rows in the file, which seed their draws.
        depth: counts per cell afterwards.
        seed: of all draws.

    Raises:
        UserError: a cell has more counts than the draw can handle.
    """
    drawn = matrix.counts[kept]
    bounds = zip(drawn.indptr[:-1], drawn.indptr[1:], rows, strict=True)
    for start, stop, row in bounds:
        generator = np.random.default_rng([seed, int(row)])
        counts = drawn.data[start:stop].astype(np.int64)
        if counts.sum() >= MAX_DRAWN_FROM:
            raise UserError(f"the cell in row {row} has {counts.sum()} counts, too many for --downsample-to.")
        drawn.data[start:stop] = generator.multivariate_hypergeometric(counts, depth)
    drawn.eliminate_zeros()
    return CountMatrix(matrix.name, drawn, matrix.var)


def first_problem(block: sp.csr_matrix) -> tuple[int, int, str] | None:
    """Row, column and description of the first value that is no count; None where all are."""
    values = block.data
    bad = np.flatnonzero(~np.isfinite(values) | (values < 0) | (values != np.floor(values)))
    if not bad.size:
        return None
    first = bad[0]
    value = float(values[first])
    if np.isnan(value):
        what = "NaN"
    elif np.isinf(value):
        what = f"an infinite value ({value})"
    elif value < 0:
        what = f"a negative value ({value:g})"
    else:
        what = f"a value that is no integer ({value:g})"
    row = int(np.searchsorted(block.indptr, first, side="right")) - 1
    return row, int(block.indices[first]), what
