"""Cells for the model: choose rows of an .h5ad file, recognize its genes, rank them into tokens.

The report of a `CellSet` says what was read and what was left out, so that no run works on almost empty
cells unnoticed.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellcircuits.clock import recorded_moment
from cellcircuits.errors import UserError
from cellcircuits.tokenizer import TOKENIZATIONS, n_expressed, n_gene_limit, rank_tokens, wrap
from cellcircuits.vocabulary import GeneVocabulary

if TYPE_CHECKING:
    import pandas as pd

    from cellcircuits.counts import CountMatrix
    from cellcircuits.genes import GeneMatch

MIN_MAX_TOKENS = 3
NO_KNOWN_GENE = "no expressed gene has a token"
TOO_SHALLOW = "fewer counts than --downsample-to"


@dataclass(frozen=True)
class Cell:
    """One cell as the model reads it.

    Attributes:
        name: its name in the file.
        row: its row in the file.
        tokens: (n_pos,) int64.
        gene_positions: (n_gene,) int64, positions whose token is a gene.
    """

    name: str
    row: int
    tokens: np.ndarray
    gene_positions: np.ndarray


@dataclass(frozen=True)
class CellSelection:
    """Which cells to take and how to turn them into tokens; the defaults are the published run's.

    Attributes:
        cells: `controls` (rows whose `control_column` is one of `control_values`) or `all`.
        control_column: column of obs that names the target.
        control_values: its values for controls.
        obs_filters: (column, value) pairs, compared as text; pairs of one column mean any of the values.
        n_cells: cells to take.
        pool: controls drawn first when there are more; the first `n_cells` of them, in file order, are taken.
            With `all`, `n_cells` rows are drawn at once.
        seed: seed of that draw.
        counts: `auto`, `X`, `raw` or `layer:NAME`.
        gene_column: `auto`, `index` or a column of var.
        tokenization: `published` or `geneformer` (without the log1p).
        max_tokens: most tokens of a cell, special ones included.
        min_mapped: smallest share of the counts that must be in known genes.
        min_median_tokens: gene tokens the median cell must have, before any cut.
        downsample_to: counts drawn from every cell, which must have as many; None takes all counts.

    Raises:
        UserError: a setting is outside its range.
    """

    cells: str = "controls"
    control_column: str = "gene"
    control_values: tuple[str, ...] = ("non-targeting", "Non-targeting", "non_targeting")
    obs_filters: tuple[tuple[str, str], ...] = ()
    n_cells: int = 50
    pool: int = 2000
    seed: int = 42
    counts: str = "auto"
    gene_column: str = "auto"
    tokenization: str = "published"
    max_tokens: int = 2048
    min_mapped: float = 0.5
    min_median_tokens: int = 100
    downsample_to: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that could only fail later."""
        kinds = " or ".join(TOKENIZATIONS)
        rules = (
            ("cells", self.cells in ("controls", "all"), "must be controls or all"),
            ("tokenization", self.tokenization in TOKENIZATIONS, f"must be {kinds}"),
            ("n-cells", self.n_cells >= 1, "must be at least 1"),
            ("pool", self.pool >= 1, "must be at least 1"),
            ("seed", 0 <= self.seed < 2**32, "must be between 0 and 4294967295"),
            ("max-tokens", self.max_tokens >= MIN_MAX_TOKENS, f"must be at least {MIN_MAX_TOKENS}"),
            ("min-mapped", 0 <= self.min_mapped <= 1, "must be between 0 and 1"),
            ("min-median-tokens", self.min_median_tokens >= 0, "must not be negative"),
            ("downsample-to", self.downsample_to is None or self.downsample_to >= 1, "must be at least 1"),
        )
        for flag, holds, rule in rules:
            if not holds:
                raise UserError(f"--{flag} is {getattr(self, flag.replace('-', '_'))}, but {rule}.")


@dataclass(frozen=True)
class CellSet:
    """The chosen cells and a JSON-able report of how they came about."""

    cells: tuple[Cell, ...]
    report: dict[str, Any]

    def seeds(self) -> dict[str, int]:
        """The seed of every draw that was made, for the run's record."""
        selection = self.report["selection"]
        draws = ("cells",) if selection.get("downsample_to") is None else ("cells", "downsampling")
        return dict.fromkeys(draws, selection["seed"])

    def fingerprint(self) -> str:
        """SHA-256 over the names and tokens of all cells, in order."""
        digest = hashlib.sha256()
        for cell in self.cells:
            name = cell.name.encode("utf-8")
            digest.update(f"{len(name)} {len(cell.tokens)} ".encode())
            digest.update(name)
            digest.update(cell.tokens.astype("<i8").tobytes())
        return digest.hexdigest()


def load_cells(path: Path, vocabulary: GeneVocabulary, selection: CellSelection, model_positions: int) -> CellSet:
    """Read the selected cells of an .h5ad file and tokenize them.

    Args:
        path: the file.
        vocabulary: the genes the model knows.
        selection: which cells, and how.
        model_positions: longest input of the model.

    Raises:
        UserError: unreadable file, no such column, no cell left, no raw counts, too few of them to down-sample,
            genes not recognized.
    """
    # pandas, scipy and anndata take long to import, and `--help` needs none of them.
    from cellcircuits.cell_rows import draw_rows, mixture_notes, select_rows
    from cellcircuits.counts import read_counts
    from cellcircuits.genes import match_genes
    from cellcircuits.h5ad import H5adFile

    special = (vocabulary.cls, vocabulary.eos)
    limit = n_gene_limit(selection.max_tokens, model_positions, special)
    with H5adFile(path) as file:
        obs = file.obs()
        matched = select_rows(obs, selection, str(path))
        # the first rows of a pool of all cells would come from the start of the file: one donor, one tissue
        pool = selection.pool if selection.cells == "controls" else selection.n_cells
        rows = draw_rows(matched, pool, selection.n_cells, selection.seed)
        matrix = read_counts(file, selection.counts, rows, obs.index)
        where = f"{path}: {file.var_name(matrix.name)}"
    n_selected, dropped = len(rows), []
    if selection.downsample_to is not None:
        matrix, rows, dropped = _equal_depth(matrix, rows, obs.index, selection, str(path))
    totals = np.asarray(matrix.counts.sum(axis=0)).ravel()  # (n_columns,)
    genes = match_genes(matrix.var, selection.gene_column, totals, vocabulary, where)
    ranked, n_without_rank = _rank_cells(matrix, genes, selection.tokenization)
    _check_mapping(where, genes, ranked, selection)
    names = [str(name) for name in obs.index[rows]]
    cells = tuple(
        Cell(name, int(row), *wrap(tokens, limit, special))
        for name, row, tokens in zip(names, rows, ranked, strict=True)
        if len(tokens)
    )
    if not cells:
        raise UserError(f"{path}: none of the {len(rows)} selected cells expresses a known gene.")
    report = {
        **_file_report(path),
        "matrix": matrix.name,
        **genes.report(),
        "selection": _settings(selection),
        "n_rows_in_file": len(obs),
        "n_rows_matched": len(matched),
        "n_rows_selected": n_selected,
        **_dropped_report(dropped, names, rows, ranked),
        "n_without_rank": n_without_rank,
        "max_tokens": min(selection.max_tokens, model_positions),
        **_token_report(cells, ranked, limit),
        "notes": mixture_notes(obs, matched, selection),
    }
    return CellSet(cells, report)


def _equal_depth(
    matrix: "CountMatrix", rows: np.ndarray, names: "pd.Index", selection: CellSelection, where: str
) -> tuple["CountMatrix", np.ndarray, list[dict[str, Any]]]:
    """The matrix and its rows with `downsample_to` counts per cell, and a record of the cells that had fewer."""
    from cellcircuits.counts import downsampled

    depth = selection.downsample_to
    totals = np.asarray(matrix.counts.sum(axis=1)).ravel()  # (n_cells,)
    deep = totals >= depth
    if not deep.any():
        raise UserError(
            f"{where}: none of the {len(rows)} selected cells has {depth} counts (--downsample-to); the deepest has "
            f"{totals.max():.0f}, the median cell {np.median(totals):.0f}."
        )
    dropped = [
        {"name": str(names[row]), "row": int(row), "reason": f"has {total:.0f} counts, fewer than {depth}"}
        for row, total in zip(rows[~deep], totals[~deep], strict=True)
    ]
    return downsampled(matrix, np.flatnonzero(deep), rows[deep], depth, selection.seed), rows[deep], dropped


def _dropped_report(
    too_shallow: list[dict[str, Any]], names: list[str], rows: np.ndarray, ranked: list[np.ndarray]
) -> dict[str, Any]:
    """The selected cells that are not used, counted by reason and one by one."""
    empty = [
        {"name": name, "row": int(row), "reason": NO_KNOWN_GENE}
        for name, row, tokens in zip(names, rows, ranked, strict=True)
        if not len(tokens)
    ]
    counted = {TOO_SHALLOW: len(too_shallow), NO_KNOWN_GENE: len(empty)}
    return {
        "n_dropped_cells": {reason: n for reason, n in counted.items() if n},
        "dropped_cells": [*too_shallow, *empty],
    }


def _rank_cells(matrix: "CountMatrix", genes: "GeneMatch", tokenization: str) -> tuple[list[np.ndarray], int]:
    """Uncut gene tokens of every cell, empty where there are none, and how many expressed known genes have no rank."""
    counts = matrix.counts
    bounds = zip(counts.indptr[:-1], counts.indptr[1:], strict=True)
    of_cells = [(counts.indices[start:stop], counts.data[start:stop], genes.columns) for start, stop in bounds]
    ranked = [rank_tokens(*of_cell, tokenization) for of_cell in of_cells]
    return ranked, sum(n_expressed(*of_cell) for of_cell in of_cells) - sum(map(len, ranked))


def _check_mapping(where: str, genes: "GeneMatch", ranked: list[np.ndarray], selection: CellSelection) -> None:
    """Refuse cells that would be almost empty.

    Raises:
        UserError: too small a share of the counts, or too few genes of the median cell, have a token.
    """
    median_tokens = float(np.median([len(tokens) for tokens in ranked]))
    if genes.share_mapped < selection.min_mapped:
        required = f"{selection.min_mapped:.1%} of the counts (--min-mapped)"
    elif median_tokens < selection.min_median_tokens:
        required = f"{selection.min_median_tokens} gene tokens in the median cell (--min-median-tokens)"
    else:
        return
    examples = ", ".join(genes.unmapped_examples)
    raise UserError(
        f"{where}: {genes.n_mapped} of {len(genes.columns.gene_of_column)} genes, with "
        f"{genes.share_mapped:.1%} of the counts, are in the model's dictionary, and the median cell has "
        f"{median_tokens:g} gene tokens; required are {required}. The best ids are in {genes.column!r}"
        f"{f'; not recognized are, for example, {examples}' if examples else ''}. Give human genes as "
        "Ensembl ids or symbols (--gene-column), or lower the limit."
    )


def _settings(selection: CellSelection) -> dict[str, Any]:
    """The settings as JSON gives them back: lists for tuples."""
    settings = asdict(selection) | {
        "control_values": list(selection.control_values),
        "obs_filters": [list(pair) for pair in selection.obs_filters],
    }
    if selection.downsample_to is None:  # records made before the flag existed stay equal
        del settings["downsample_to"]
    return settings


def _file_report(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"file": path.name, "size_bytes": status.st_size, "mtime": recorded_moment(status.st_mtime)}


def _token_report(cells: tuple[Cell, ...], ranked: list[np.ndarray], limit: int) -> dict[str, Any]:
    n_gene = np.array([len(cell.gene_positions) for cell in cells])
    return {
        "max_gene_tokens": limit,
        "n_cells": len(cells),
        "n_cells_truncated": sum(len(tokens) > limit for tokens in ranked),
        "n_gene_tokens_truncated": sum(max(0, len(tokens) - limit) for tokens in ranked),
        "median_gene_tokens": float(np.median(n_gene)),
        "min_gene_tokens": int(n_gene.min()),
        "max_gene_tokens_of_a_cell": int(n_gene.max()),
    }
