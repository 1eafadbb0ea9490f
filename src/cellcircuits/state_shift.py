"""From mean logits to state shifts and gene lists: float64 arrays in, plain numbers out, NumPy only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

N_TOP_GENES = 20
CELLS_AT_ONCE = 128  # the logits of a few cells at a time: (n_cells, n_vocab) may not fit


@dataclass(frozen=True)
class LogitMap:
    """The last, linear step of the language-model head: `weight` (n_vocab, d_model), `bias` (n_vocab,), float64."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    def logits(self, mean_transformed: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean logits (..., n_vocab) of cells, from their (..., d_model) means of the head's transform."""
        return mean_transformed @ self.weight.T + self.bias

    def changes(self, mean_changes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Changes of the mean logits (..., n_vocab), from those of the transform's mean (..., d_model)."""
        return mean_changes @ self.weight.T


@dataclass(frozen=True)
class Signatures:
    """The mean over a group's cells of their mean logits, each (n_vocab,) float64."""

    early: NDArray[np.float64]
    late: NDArray[np.float64]

    @property
    def direction(self) -> NDArray[np.float64]:
        """Late minus early at length 1 each: z / |z| times it is cos(z, late) - cos(z, early)."""
        return _unit(self.late) - _unit(self.early)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vectors (..., n) at length 1; a vector of zeros stays."""
    lengths = np.sqrt((vectors * vectors).sum(axis=-1, keepdims=True))
    return vectors / np.where(lengths > 0, lengths, 1.0)


def state_shifts(
    mean_transformed: NDArray[np.float64],
    mean_changes: NDArray[np.float64],
    logit_map: LogitMap,
    signatures: Signatures,
) -> NDArray[np.float64]:
    """How far steering moves each cell from the early towards the late signature.

        shift = [cos(z', late) - cos(z', early)] - [cos(z, late) - cos(z, early)]

    with z and z' the cell's clean and steered mean logits. A cell whose change is 0 has a shift of exactly 0.

    Args:
        mean_transformed: (n_cells, d_model) clean.
        mean_changes: (n_cells, d_model) steered - clean.
        logit_map: from there to logits.
        signatures: of the early and the late cells.

    Returns:
        (n_cells,) float64, unitless, between -4 and 4.

    Source: the study's "State shift".
    """
    direction = signatures.direction
    shifts = np.zeros(len(mean_changes))
    for start in range(0, len(shifts), CELLS_AT_ONCE):
        some = slice(start, start + CELLS_AT_ONCE)
        clean = logit_map.logits(mean_transformed[some])  # (n_some, n_vocab)
        steered = clean + logit_map.changes(mean_changes[some])
        shifts[some] = (_unit(steered) * direction).sum(axis=-1) - (_unit(clean) * direction).sum(axis=-1)
    return shifts


def alpha_result(
    shifts: NDArray[np.float64], logit_delta: NDArray[np.float64], gene_of: Mapping[int, str]
) -> dict[str, Any]:
    """The published numbers of one feature and one alpha; all 0 and empty where no cell was steered.

    Args:
        shifts: (n_steered,) state shifts.
        logit_delta: (n_vocab,) mean over the steered cells of steered - clean mean logits.
        gene_of: {token: symbol}.
    """
    n_steered = len(shifts)
    return {
        "n_cells_steered": n_steered,
        "n_cells_active": n_steered,
        "mean_state_shift": float(shifts.mean()) if n_steered else 0.0,
        "median_state_shift": float(np.median(shifts)) if n_steered else 0.0,
        "std_state_shift": float(shifts.std()) if n_steered else 0.0,
        "frac_positive_shift": float((shifts > 0).mean()) if n_steered else 0.0,
        "top_upregulated": _top_genes(logit_delta, -logit_delta, gene_of) if n_steered else [],
        "top_downregulated": _top_genes(logit_delta, logit_delta, gene_of) if n_steered else [],
        "mean_abs_logit_delta": float(np.abs(logit_delta).mean()) if n_steered else 0.0,
        "max_logit_delta": float(logit_delta.max()) if n_steered else 0.0,
        "min_logit_delta": float(logit_delta.min()) if n_steered else 0.0,
        "state_shifts": shifts.tolist(),
    }


def _top_genes(
    logit_delta: NDArray[np.float64], order: NDArray[np.float64], gene_of: Mapping[int, str]
) -> list[dict[str, Any]]:
    """The tokens with the smallest `order`, ties by ascending token."""
    tokens = np.argsort(order, kind="stable")[:N_TOP_GENES]
    return [{"gene": gene_of.get(int(t), f"token_{t}"), "delta": float(logit_delta[t])} for t in tokens]
