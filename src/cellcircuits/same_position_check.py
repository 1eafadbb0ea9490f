"""How well the same-position effect stands for the total effect: both measured on a sample of features.

Spearman's rank correlation   of the mean effects, and of d, over (feature, target) pairs
Jaccard overlap               edges of both / edges of either
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellcircuits.effects import Bench, CleanCell
from cellcircuits.jsonio import discard
from cellcircuits.stats import EdgeRule, EffectStatistics, effect_statistics
from cellcircuits.tracing import BlockEffects, trace_and_save, trace_block

FEATURES_AT_ONCE = 16
STEM = "same_position_check"
# A target that is non-zero in one of n cells has |d| = 1 / sqrt(n) exactly; rounding must not rank such ties.
D_DECIMALS = 9


def sample_features(features: Sequence[int], n: int) -> list[int]:
    """Choose `n` of the features, or all if there are fewer, spread evenly over the ascending list."""
    ordered = sorted(features)
    n = min(n, len(ordered))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * n)] for i in range(n)]


@dataclass(frozen=True)
class Kept:
    """Where what is measured lies until all of it is there: a folder, and the fingerprint of the run's settings."""

    folder: Path
    fingerprint: str

    def path(self, quantity: str, first: int) -> Path:
        """The file of the block of the sample that begins with its feature number `first`."""
        return self.folder / f"{STEM}_{quantity}_{first:05d}.npz"

    def remove(self) -> None:
        """Remove all of it, and the folder where nothing else is in it."""
        for path in self.folder.glob(f"{STEM}_*.npz"):
            discard(path)
        with suppress(OSError):
            self.folder.rmdir()


def run_check(
    total: Bench,
    same: Bench,
    cells: Sequence[CleanCell],
    features: Sequence[int],
    rule: EdgeRule,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Measure total and same-position effects of the same features in the same cells and compare them.

    Args:
        total: a bench for total effects.
        same: one for same-position effects, of the same model, source layer and targets.
        cells: clean runs, of either bench.
        features: source features, a sample of those traced.
        rule: what makes an edge.
        kept: where to keep what is measured, so that a later call goes on from it; None keeps it in memory only.

    Returns:
        A record for JSON: the sample, the seconds per (feature, cell) of each, and what `compare` finds.

    Raises:
        ValueError: the benches measure different layers.
        UserError: an effect is NaN or infinite, or one feature alone does not fit in memory.
    """
    if (total.source_layer, total.columns) != (same.source_layer, same.columns):
        raise ValueError("the two benches have different source layers or targets")
    of_total, total_seconds = _measure(total, cells, features, rule, kept, "total")
    of_same, same_seconds = _measure(same, cells, features, rule, kept, "same")
    n_pairs = sum(statistics.n_cells for statistics in of_total)
    return {
        "source_layer": total.source_layer,
        "features": list(features),
        "n_features_active": sum(statistics.n_cells > 0 for statistics in of_total),
        "n_cells": len(cells),
        "n_feature_cell_pairs": n_pairs,
        "seconds_per_pair_total_effect": total_seconds / n_pairs if n_pairs else None,
        "seconds_per_pair_same_position": same_seconds / n_pairs if n_pairs else None,
        **compare(of_total, of_same, total.columns),
    }


def _measure(
    bench: Bench, cells: Sequence[CleanCell], features: Sequence[int], rule: EdgeRule, kept: Kept | None, quantity: str
) -> tuple[list[EffectStatistics], float]:
    """Statistics of every feature over the cells in which it is active, and the seconds that took."""
    statistics, seconds = [], 0.0
    for start in range(0, len(features), FEATURES_AT_ONCE):
        block = BlockEffects.empty(features[start : start + FEATURES_AT_ONCE], len(cells), bench.n_targets)
        if kept is None:
            trace_block(bench, cells, block)
        else:
            path = kept.path(quantity, start)
            block.restore(path, kept.fingerprint)
            save = partial(block.save, path, kept.fingerprint)
            trace_and_save(bench, cells, block, save)
            save()
        per_feature = zip(block.effects, block.measured, strict=True)
        statistics += [effect_statistics(effects[measured], rule) for effects, measured in per_feature]
        seconds += float(block.seconds.sum())
    return statistics, seconds


def compare(
    total: Sequence[EffectStatistics], same: Sequence[EffectStatistics], columns: Mapping[int, slice]
) -> dict[str, Any]:
    """Compare two measurements of the same features.

    Args:
        total: statistics of the total effects, one per feature, arrays of shape (n_targets,).
        same: those of the same-position effects, in the same order.
        columns: where each target layer lies among the targets.

    Returns:
        `overall` and `per_layer` {layer: ...}, each with `n_pairs` (feature, target) whose mean effect is non-zero in
        either, `spearman_mean` and `spearman_d` over those, `n_edges_total_effect`, `n_edges_same_position`,
        `n_edges_both`, `n_edges_both_opposite_sign` and `edge_jaccard`; None where a figure is undefined.
    """
    everything = slice(0, max(of_layer.stop for of_layer in columns.values()))
    return {
        "overall": _compared(total, same, everything),
        "per_layer": {str(layer): _compared(total, same, of_layer) for layer, of_layer in columns.items()},
    }


def _compared(
    total: Sequence[EffectStatistics], same: Sequence[EffectStatistics], chosen: slice
) -> dict[str, float | int | None]:
    mean, d, is_edge = (
        np.array([[getattr(statistics, name)[chosen] for statistics in of_one] for of_one in (total, same)])
        for name in ("mean", "d", "is_edge")
    )  # each (2, n_features, n_targets)
    moved = (mean != 0).any(axis=0)
    is_edge = is_edge.astype(bool)
    both, either = is_edge.all(axis=0), int(is_edge.any(axis=0).sum())
    n_edges, n_both = is_edge.reshape(2, -1).sum(axis=1), int(both.sum())
    return {
        "n_pairs": int(moved.sum()),
        "spearman_mean": _rank_correlation(mean[:, moved]),
        "spearman_d": _rank_correlation(d[:, moved].round(D_DECIMALS)),
        "n_edges_total_effect": int(n_edges[0]),
        "n_edges_same_position": int(n_edges[1]),
        "n_edges_both": n_both,
        "n_edges_both_opposite_sign": int((np.sign(d[0]) != np.sign(d[1]))[both].sum()),
        "edge_jaccard": n_both / either if either else None,
    }


def _rank_correlation(pairs: NDArray[np.float64]) -> float | None:
    """Spearman's correlation of the two rows of (2, n_pairs); None where one of them is constant."""
    from scipy.stats import spearmanr

    if pairs.shape[1] < 2 or (pairs == pairs[:, :1]).all(axis=1).any():
        return None
    found: Any = spearmanr(pairs[0], pairs[1])
    return float(found.statistic)
