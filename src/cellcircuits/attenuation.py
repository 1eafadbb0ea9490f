"""Edges of a trace by the layer they reach, and how their number changes with distance."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from cellcircuits.errors import UserError
from cellcircuits.graph_store import read_edges, read_features
from cellcircuits.manifest import open_folder

N_RESAMPLES = 2000
PERCENTILES = (2.5, 97.5)


def edges_by_layer(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Edges per source feature to each target layer of one traced folder, with intervals.

    The interval resamples the traced source features, all target layers of a feature together.

    Args:
        folder: a trace of one source layer.
        seed: of the resampling.

    Returns:
        `source_layer`, `n_features`, `layers` [{target_layer, n_edges, n_calibrated, edges_mean, edges_mean_low,
        edges_mean_high, abs_d_median}], ascending, and `last_over_first` with its interval: mean edges to the last
        layer over those to the first, null with a `reason` where there is no such ratio.

    Raises:
        UserError: the folder holds no trace of one layer, or its tables disagree.
    """
    settings = open_folder(folder, "exhaustive_feature_tracing")["settings"]
    source_layer, targets = settings["source_layer"], settings["downstream_layers"]
    features = read_features(folder).filter(pc.field("is_traced"))["feature"].to_numpy()
    edges = read_edges(folder)
    columns = {name: edges[name].to_numpy(zero_copy_only=False) for name in ("source", "target_layer", "cohens_d")}
    if not np.isin(columns["source"], features).all() or not np.isin(columns["target_layer"], targets).all():
        raise UserError(f"{folder}: edges.parquet and features.parquet disagree; make them again with --analysis-only.")
    is_calibrated = np.array([value is True for value in edges["is_calibrated"].to_pylist()], dtype=bool)
    counts = edge_counts(columns["source"], columns["target_layer"], features, targets)
    rng = np.random.default_rng(np.random.SeedSequence([seed, source_layer]))
    means = resampled_means(counts, rng)
    layers = []
    for j, target in enumerate(targets):
        of_layer = columns["target_layer"] == target
        sizes = np.abs(columns["cohens_d"][of_layer])
        layers.append(
            {
                "target_layer": target,
                "n_edges": int(of_layer.sum()),
                "n_calibrated": int((of_layer & is_calibrated).sum()),
                **_with_interval("edges_mean", counts[:, j].mean() if len(counts) else None, means[:, j]),
                "abs_d_median": float(np.median(sizes)) if len(sizes) else None,
            }
        )
    return {
        "source_layer": source_layer,
        "n_features": len(features),
        "layers": layers,
        **_last_over_first(counts, means),
    }


def edge_counts(
    sources: NDArray[np.integer], target_layers: NDArray[np.integer], features: NDArray[np.integer], targets: list[int]
) -> NDArray[np.float64]:
    """Edges of every feature to every target layer, (n_features, n_targets).

    Args:
        sources: source feature of every edge, (n_edges,).
        target_layers: of every edge, (n_edges,).
        features: the source features to count for, those without an edge included.
        targets: the target layers.
    """
    order = np.argsort(features)
    counts = np.zeros((len(features), len(targets)))
    rows = order[np.searchsorted(features, sources, sorter=order)]
    np.add.at(counts, (rows, np.searchsorted(targets, target_layers)), 1)
    return counts


def resampled_means(counts: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Mean edges per layer in samples of the features with replacement, (N_RESAMPLES, n_targets)."""
    n = len(counts)
    if not n:
        return np.zeros((0, counts.shape[1]))
    weights = rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)  # (N_RESAMPLES, n_features)
    return weights @ counts / n


def _last_over_first(counts: NDArray[np.float64], means: NDArray[np.float64]) -> dict[str, Any]:
    name = "last_over_first"
    if counts.shape[1] < 2:
        return {**_with_interval(name, None, np.zeros(0)), "reason": "only one target layer was read"}
    if not len(counts) or not counts[:, 0].any():
        return {**_with_interval(name, None, np.zeros(0)), "reason": "there is no edge to the first target layer"}
    usable = means[means[:, 0] > 0]
    return _with_interval(name, counts[:, -1].mean() / counts[:, 0].mean(), usable[:, -1] / usable[:, 0])


def _with_interval(name: str, value: float | None, resampled: NDArray[np.float64]) -> dict[str, float | None]:
    low, high = np.percentile(resampled, PERCENTILES).tolist() if value is not None and len(resampled) else (None, None)
    return {name: None if value is None else float(value), f"{name}_low": low, f"{name}_high": high}
