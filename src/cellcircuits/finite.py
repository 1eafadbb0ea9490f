"""The one check that what a model or an SAE computes are numbers; where they are not, the run stops and says where.

NaN compares as false with everything, so that it would pass for "not an edge", "not active" or "not above 0".
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellcircuits.cells import Cell
from cellcircuits.errors import UserError
from cellcircuits.precision import FP32

MEND = "check the weights of the model and the SAEs, or compute on another --device."
EFFECT = "the effect of an ablation"
SMALLER_ALPHAS = f"take smaller --alphas, {MEND}"


def mend_at(precision: str) -> str:
    """What to do about overflow in blocks that compute in a precision."""
    return MEND if precision == FP32 else f"--precision {precision} may overflow: take --precision fp32, or {MEND}"


def finite_rows(values: Tensor | NDArray[np.floating]) -> Tensor:
    """Which rows hold finite numbers only, (..., n) -> (n_rows,) bool, of a tensor on its device."""
    if isinstance(values, Tensor):
        return torch.isfinite(values).all(dim=-1).flatten()
    return torch.from_numpy(np.isfinite(values).all(axis=-1).ravel())  # float64 stays NumPy's: devices may lack it


def require_finite(
    values: Tensor | NDArray[np.floating],
    cell: Cell,
    what: str,
    positions: NDArray[np.int64] | None = None,
    mend: str = MEND,
) -> None:
    """Stop at values that are no numbers.

    Args:
        values: (..., n) computed in one cell, a row per position where `positions` is given.
        cell: the cell.
        what: what the values are, such as `the residual stream at layer 5`.
        positions: (n_rows,) positions of the rows in the cell's sequence; further rows go through them again.
        mend: what to do about it.

    Raises:
        UserError: a value is NaN or infinite; names the cell, `what` and the first position.
    """
    require_rows(finite_rows(values), cell, what, positions, mend)


def require_rows(
    are_finite: Tensor, cell: Cell, what: str, positions: NDArray[np.int64] | None = None, mend: str = MEND
) -> None:
    """As `require_finite`, from what `finite_rows` gave, (n_rows,) bool: the device need not be waited for earlier.

    Raises:
        UserError: a row is not finite.
    """
    if are_finite.all():
        return
    where = ""
    if positions is not None:
        row = int(are_finite.logical_not().nonzero()[0])
        position = int(positions[row % len(positions)])
        where = f", first at position {position} of {len(cell.tokens)} (token {cell.tokens[position]})"
    raise UserError(f"cell {cell.name}: NaN or infinite values in {what}{where}; {mend}")


def require_finite_stream(residual: Tensor, cell: Cell, layer: int) -> None:
    """Stop at a clean stream (n_pos, d_model) of a whole cell that is no numbers.

    Raises:
        UserError: see `require_finite`.
    """
    require_finite(residual, cell, stream_at(layer), np.arange(len(cell.tokens)))


def stream_at(layer: int) -> str:
    """What a residual stream is called in errors."""
    return f"the residual stream at layer {layer}"


def latents_at(layer: int) -> str:
    """What latents are called in errors."""
    return f"what the SAE of layer {layer} computes"
