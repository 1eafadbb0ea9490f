"""Computing a run's pseudotime: its counts, its root cell, and what to do where cells are not connected."""

import argparse
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellcircuits.errors import UserError
from cellcircuits.pseudotime import TARGET_SUM, diffusion_pseudotime, neighbour_graph, umap_pseudotime
from cellcircuits.trajectory_flags import counted

if TYPE_CHECKING:
    from cellcircuits.counts import CountMatrix
    from cellcircuits.inputs import ModelAndCells

log = logging.getLogger(__name__)
UMAP_NOTE = "Note: %s; taking the first UMAP axis, whose direction means nothing."


@dataclass(frozen=True)
class ComputedPseudotime:
    """Pseudotime (n_cells,), NaN where left out; how it was computed; the name of its root cell, if it has one."""

    pseudotime: NDArray[np.float64]
    source: str
    root: str | None


def compute_pseudotime(
    args: argparse.Namespace, opened: "ModelAndCells", cell_types: Sequence[str], tissues: Sequence[str]
) -> ComputedPseudotime:
    """Diffusion pseudotime of the run's cells from the root that the flags describe.

    Args:
        args: flags of `trajectory_flags.add_trajectory_flags`.
        opened: the run's cells.
        cell_types: type of each cell.
        tissues: tissue of each cell.

    Raises:
        UserError: no root or disconnected cells, and the flags name no way out.
    """
    candidates = root_candidates(cell_types, tissues, args.root_cell_type, args.root_tissue)
    wants_umap = args.pseudotime_fallback == "umap"
    if not len(candidates) and not wants_umap:
        raise UserError(
            f"no cell is of the root type {args.root_cell_type!r} (--root-cell-type); types there: "
            f"{counted(Counter(cell_types))}. Name one of those, or ask for --pseudotime-fallback umap."
        )
    matrix = read_run_counts(args, opened)
    log.info("Computing the pseudotime of %d cells", len(cell_types))
    graph = neighbour_graph(matrix.counts)
    if not len(candidates):
        log.warning(UMAP_NOTE, f"no cell is of the root type {args.root_cell_type!r}")
        return ComputedPseudotime(umap_pseudotime(graph), "umap axis 0", None)
    root = choose_root(candidates, args.root_markers, matrix, opened)
    times = diffusion_pseudotime(graph, root)
    infinite = ~np.isfinite(times)
    if infinite.any() and args.disconnected != "drop":
        what = disconnected_cells(infinite, cell_types)
        if wants_umap:
            log.warning(UMAP_NOTE, what)
            return ComputedPseudotime(umap_pseudotime(graph), "umap axis 0", None)
        raise UserError(
            f"{what}; leave those out with --disconnected drop, choose other cells (--cell-types, --tissues, "
            "--n-cells) or another root (--root-cell-type), or ask for --pseudotime-fallback umap."
        )
    name = opened.cells.cells[root].name
    return ComputedPseudotime(np.where(infinite, math.nan, times), "scanpy dpt", name)


def read_run_counts(args: argparse.Namespace, opened: "ModelAndCells") -> "CountMatrix":
    """The counts that the run's tokens came from, down-sampled if those were: one row per cell.

    Args:
        args: flags of `add_trajectory_flags`.
        opened: the run's cells.
    """
    from cellcircuits.counts import downsampled, read_counts
    from cellcircuits.h5ad import H5adFile

    rows = np.array([cell.row for cell in opened.cells.cells])
    with H5adFile(args.data_path) as file:
        matrix = read_counts(file, opened.cells.report["matrix"], rows, file.obs().index)
    if args.downsample_to is None:
        return matrix
    return downsampled(matrix, np.arange(len(rows)), rows, args.downsample_to, args.seed)


def disconnected_cells(infinite: NDArray[np.bool_], cell_types: Sequence[str]) -> str:
    """In words, how many cells of each type have an infinite pseudotime."""
    every = Counter(cell_types)
    lost = Counter(name for name, is_lost in zip(cell_types, infinite, strict=True) if is_lost)
    listed = ", ".join(f"{lost[name]} of {n} {name or '(missing)'}" for name, n in every.most_common())
    return (
        f"{int(infinite.sum())} of {len(infinite)} cells have an infinite pseudotime, so they are not connected with "
        f"the root (by cell type: {listed})"
    )


def root_candidates(
    cell_types: Sequence[str], tissues: Sequence[str], root_type: str, root_tissue: str
) -> NDArray[np.int64]:
    """Cells of the root type in the root tissue, or, where there is none, in any tissue; ascending.

    A cell whose type is missing, the empty text, is of no type.
    """
    of_type = np.array([name != "" and name.lower() == root_type.lower() for name in cell_types], dtype=bool)
    in_tissue = of_type & np.array([name == root_tissue for name in tissues], dtype=bool)
    return np.flatnonzero(in_tissue if in_tissue.any() else of_type)


def choose_root(
    candidates: NDArray[np.int64], markers: Sequence[str], matrix: "CountMatrix", opened: "ModelAndCells"
) -> int:
    """The candidate with the highest mean log-normalized expression of the markers; the first without markers.

    Raises:
        UserError: a marker is in no column of the file.
    """
    if not markers:
        return int(candidates[0])
    return int(candidates[np.argmax(expression_of(markers, matrix, opened)[:, candidates].mean(axis=0))])


def expression_of(markers: Sequence[str], matrix: "CountMatrix", opened: "ModelAndCells") -> NDArray[np.float64]:
    """Log-normalized expression of genes, (n_markers, n_cells); columns of one gene are summed before the log.

    Raises:
        UserError: a gene is in no column of the file.
    """
    totals = np.maximum(np.asarray(matrix.counts.sum(axis=1)).ravel(), 1.0)
    expression = np.zeros((len(markers), len(totals)))
    for number, columns in enumerate(marker_columns(markers, matrix, opened)):
        counts = np.asarray(matrix.counts[:, columns].sum(axis=1)).ravel()  # (n_cells,)
        expression[number] = np.log1p(TARGET_SUM * counts / totals)
    return expression


def marker_columns(markers: Sequence[str], matrix: "CountMatrix", opened: "ModelAndCells") -> list[NDArray[np.int64]]:
    """The columns of each marker gene, by symbol or Ensembl id as the tokens were matched, else by plain text.

    Raises:
        UserError: a marker is not there.
    """
    from cellcircuits.genes import gene_id, match_genes  # pandas takes long to import

    vocabulary = opened.vocabulary
    totals = np.asarray(matrix.counts.sum(axis=0)).ravel()
    genes = match_genes(matrix.var, opened.cells.report["gene_column"], totals, vocabulary, "the cells' genes").columns
    texts = [matrix.var.index.astype(str), *(matrix.var[name].astype(str) for name in matrix.var.columns)]
    found = []
    for marker in markers:
        known = gene_id(marker, vocabulary)
        of_token = np.flatnonzero(genes.tokens == vocabulary.token_of[known[0]]) if known else []
        columns = np.flatnonzero(np.isin(genes.gene_of_column, of_token))
        if not columns.size:
            columns = np.flatnonzero(np.any([np.asarray(text == marker) for text in texts], axis=0))
        if not columns.size:
            raise UserError(
                f"no gene of the cells is {marker!r} (--root-markers, --follow-genes); name one of the file."
            )
        found.append(columns)
    return found
