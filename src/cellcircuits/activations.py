"""Residual streams of many cells: streamed through, or sampled into memory.

One cell is run at a time without padding, gene positions only, nothing subtracted. Which rows are kept is
drawn before the model runs, so that every layer gives the same positions.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BertForMaskedLM

from cellcircuits.cells import Cell
from cellcircuits.errors import UserError
from cellcircuits.finite import require_finite, stream_at
from cellcircuits.geneformer import residuals

FLOAT32_BYTES = 4
N_VALUES_SHOWN = 10


@dataclass(frozen=True)
class CellSplit:
    """Cells for training and cells for judging; no cell is in both."""

    train: tuple[Cell, ...]
    held_out: tuple[Cell, ...]


def split_at_random(cells: Sequence[Cell], held_out_share: float, seed: int) -> CellSplit:
    """Hold out a share of the cells, at least one, keeping the order within both parts.

    Raises:
        UserError: fewer than two cells, or a share that leaves no training cell.
    """
    n_held_out = max(1, round(held_out_share * len(cells)))
    if n_held_out >= len(cells):
        raise UserError(
            f"--held-out {held_out_share} of {len(cells)} cells leaves none to train on; "
            "use more cells or a smaller share."
        )
    drawn = np.random.default_rng(seed).choice(len(cells), n_held_out, replace=False)
    held_out = np.zeros(len(cells), dtype=bool)
    held_out[drawn] = True
    return split_by(cells, held_out)


def split_by_column(cells: Sequence[Cell], path: Path, column: str, held_out_value: str) -> CellSplit:
    """Hold out the cells whose value in a column of obs, as text, is `held_out_value`.

    Raises:
        UserError: no such column, or one part would be empty.
    """
    from cellcircuits.h5ad import H5adFile

    with H5adFile(path) as file:
        obs = file.obs()
    if column not in obs.columns:
        names = ", ".join(map(str, obs.columns)) or "none"
        raise UserError(f"{path}: obs has no column {column!r}; --split-column takes one of: {names}.")
    values = obs[column].iloc[[cell.row for cell in cells]].astype(str).to_numpy()
    held_out = values == held_out_value
    if held_out.all() or not held_out.any():
        found = ", ".join(sorted(set(values))[:N_VALUES_SHOWN])
        raise UserError(
            f"{path}: {held_out.sum()} of the {len(cells)} used cells have obs {column!r} = {held_out_value!r}, so "
            f"one part is empty; values there: {found} (--held-out-value)."
        )
    return split_by(cells, held_out)


def split_by(cells: Sequence[Cell], held_out: Sequence[bool] | np.ndarray) -> CellSplit:
    """Part cells by a flag each: True holds the cell out."""
    flagged = list(zip(cells, held_out, strict=True))
    return CellSplit(
        train=tuple(cell for cell, out in flagged if not out),
        held_out=tuple(cell for cell, out in flagged if out),
    )


def draw_rows(n_gene: Sequence[int], n_rows: int, seed: int) -> list[np.ndarray]:
    """Draw gene positions over all cells, without replacement and with equal chance each.

    Args:
        n_gene: gene positions of each cell.
        n_rows: how many to draw; all where there are fewer.
        seed: of the draw.

    Returns:
        Per cell the ascending offsets among its gene positions, int64; min(n_rows, sum(n_gene)) in all.
    """
    starts = np.concatenate([[0], np.cumsum(np.asarray(n_gene, dtype=np.int64))])
    total = int(starts[-1])
    if n_rows >= total:
        chosen = np.arange(total)
    else:
        chosen = np.sort(np.random.default_rng(seed).choice(total, n_rows, replace=False, shuffle=False))
    bounds = chosen.searchsorted(starts)
    return [chosen[bounds[cell] : bounds[cell + 1]] - starts[cell] for cell in range(len(n_gene))]


def layer_groups(layers: Sequence[int], bytes_per_layer: int, max_bytes: int) -> list[tuple[int, ...]]:
    """Part the layers so that each group's arrays fit in memory; one model pass serves a group.

    Raises:
        UserError: not even one layer fits.
    """
    n_together = max_bytes // bytes_per_layer
    if n_together < 1:
        raise UserError(
            f"--max-memory-gb {max_bytes / 2**30:g}: one layer needs {bytes_per_layer / 2**30:.1f} GiB; "
            "allow more or lower --train-rows."
        )
    n_groups = math.ceil(len(layers) / n_together)
    return [tuple(int(layer) for layer in group) for group in np.array_split(np.asarray(layers), n_groups)]


def stream(
    model: BertForMaskedLM, cells: Iterable[Cell], layers: Sequence[int], what: str, first: int = 0
) -> Iterator[tuple[int, Cell, Mapping[int, Tensor]]]:
    """Run cells one by one.

    Args:
        model: a Geneformer; runs on the device it is on.
        cells: the cells.
        layers: block indices to read.
        what: the progress bar's text.
        first: number of the cell to begin with.

    Yields:
        Number of the cell, the cell, {layer: (n_gene, d_model) residual stream on the model's device}.

    Raises:
        UserError: the model gives NaN or infinite values.
    """
    cells = list(cells)
    bar = tqdm(cells[first:], desc=what, unit="cell", disable=None, initial=first, total=len(cells))
    for number, cell in enumerate(bar, first):
        tokens = torch.tensor(cell.tokens, device=model.device)[None]  # (1, n_pos)
        positions = torch.tensor(cell.gene_positions, device=model.device)
        with torch.inference_mode():
            streams = residuals(model, tokens, layers)
            picked = {layer: streams[layer][0, positions] for layer in layers}
        for layer, residual in picked.items():
            require_finite(residual, cell, stream_at(layer), cell.gene_positions)
        yield number, cell, picked  # outside the `with`, which would else stay open in the caller


def collect_rows(
    model: BertForMaskedLM,
    cells: Sequence[Cell],
    offsets: Sequence[np.ndarray],
    rows: Mapping[int, np.ndarray],
    first: int = 0,
) -> Iterator[int]:
    """Gather the drawn rows of several layers in one pass, cell by cell.

    Args:
        model: the Geneformer.
        cells: training cells.
        offsets: from `draw_rows`, one array per cell.
        rows: {layer: (n_rows, d_model) float32}, filled in the order of the cells.
        first: number of the cell to begin with; the rows of those before it are left as they are.

    Yields:
        How many cells' rows are there, after each cell.

    Raises:
        UserError: the model gives NaN or infinite values.
    """
    stops = row_stops(offsets)
    for number, _, streams in stream(model, cells, list(rows), "sampling rows", first):
        part, stop = offsets[number], stops[number + 1]
        for layer, residual in streams.items():
            picked = residual[torch.tensor(part, device=residual.device)]
            rows[layer][stop - len(part) : stop] = picked.cpu().numpy()
        yield number + 1


def row_stops(offsets: Sequence[np.ndarray]) -> np.ndarray:
    """How many rows the first 0, 1, 2, ... cells have together, (n_cells + 1,) int64."""
    return np.cumsum([0, *map(len, offsets)])
