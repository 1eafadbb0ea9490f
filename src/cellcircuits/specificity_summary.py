"""`specificity.json`: what the records of a folder say together, with the feature as the unit."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, rankdata

from cellcircuits.edge_fdr import MAX_Q, PCounts, unpacked
from cellcircuits.results import SCHEMA_VERSION
from cellcircuits.specificity_results import DEFINITIONS
from cellcircuits.specificity_stats import expected_jaccard

N_RESAMPLES = 2000
INTERVAL = (2.5, 97.5)
MEANS = (
    "edges_mean", "calibrated_mean", "effect_norm_mean", "jaccard_mean", "jaccard_expected", "jaccard_calibrated_mean",
    "effect_cosine_mean", "effect_abs_cosine_mean", "direction_abs_cosine_mean",
)  # fmt: skip
NO_EDGES = "no edge of the ablation or of the control"
Record = Mapping[str, Any]
Floats = NDArray[np.float64]


def summarise(records: Sequence[Record], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `specificity.json`.

    Args:
        records: of the folder's features, by ascending feature.
        settings: of the run: `source_layer`, `draws`, `controls`, `seed`, the edge rule and the calibration.
    """
    rows = feature_rows(records, settings)
    resampled = Resampled(len(rows), settings["seed"])
    controls = {name: _control(rows, name, resampled) for name in settings["controls"]}
    for key in ("wilcoxon_{}", "wilcoxon_{}_published"):
        _correct(controls, key.format("p"), key.format("q"))
    specific = [row["specific"] for row in rows]
    shares = _column(specific, itemgetter("share"))
    return {
        "schema_version": SCHEMA_VERSION,
        "source_layer": settings["source_layer"],
        "n_features": len(rows),
        "n_draws": settings["draws"],
        "rule": {key: settings[key] for key in ("min_abs_d", "min_consistency")}
        | {"max_q": MAX_Q, "min_active_cells": settings["calibration"]["min_cells"]},
        "definitions": DEFINITIONS,
        "real": _explained(
            {
                "edges_mean": _mean(_column(rows, itemgetter("n_edges"))),
                "calibrated_mean": _mean(_column(rows, itemgetter("n_edges_calibrated"))),
                "n_edges_not_as_traced": sum(record["n_edges_not_as_traced"] for record in records),
                "between_features": _between(records, resampled),
            },
            "no feature is measured",
        ),
        "controls": controls,
        "specific": _explained(
            {
                **resampled.mean("share", shares),
                "share_expected": _mean(_column(specific, itemgetter("share_expected"))),
                "n_features": int(np.isfinite(shares).sum()),
            },
            "too few features with an edge",
        ),
        "features": rows,
    }


def feature_rows(records: Sequence[Record], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry per feature: edges of its ablation, and of each control the means over its draws."""
    min_cells = settings["calibration"]["min_cells"]
    real = calibrated_edges([record["real"] for record in records], min_cells)
    of_controls = {
        name: [
            calibrated_edges([record["controls"][name][draw] for record in records], min_cells)
            for draw in range(settings["draws"])
        ]
        for name in settings["controls"]
    }
    return [
        {
            **{key: record[key] for key in ("feature_idx", "label", "activation_freq", "n_cells_active")},
            "n_edges": record["real"]["n_edges"],
            "n_edges_calibrated": len(real[i]),
            "effect_norm": record["real"]["effect_norm"],
            "specific": record["specific"],
            "controls": {
                name: _means(record["controls"][name], [draw[i] for draw in of_controls[name]], real[i])
                for name in settings["controls"]
            },
        }
        for i, record in enumerate(records)
    ]


def calibrated_edges(of_condition: Sequence[Mapping[str, Any]], min_cells: int) -> list[NDArray[np.int64]]:
    """The calibrated edges of every feature under one condition; its family are all their live targets.

    Args:
        of_condition: the entry of each feature's record.
        min_cells: cells in which a feature must be measured.
    """
    p = [unpacked(entry["tests"]["p"]) for entry in of_condition]
    counts = PCounts()
    for numerators, denominator in p:
        counts.add(denominator, numerators)
    q_values = counts.q_values()
    found = []
    for entry, (numerators, denominator) in zip(of_condition, p, strict=True):
        live, strong = (unpacked(entry["tests"][key])[0] for key in ("live", "strong_edges"))
        q = q_values.of(numerators[np.searchsorted(live, strong)] / denominator)[0]
        found.append(strong[(q < MAX_Q) & (entry["n_cells"] >= min_cells)])
    return found


def jaccard(a: NDArray[np.int64], b: NDArray[np.int64]) -> float | None:
    """Overlap of two sets of distinct targets; None where both are empty."""
    n_shared = len(np.intersect1d(a, b, assume_unique=True))
    n_either = len(a) + len(b) - n_shared
    return n_shared / n_either if n_either else None


def _means(
    draws: Sequence[Mapping[str, Any]], calibrated: Sequence[NDArray[np.int64]], real: NDArray[np.int64]
) -> dict[str, Any]:
    """What the draws of one control of one feature say: the edges of each, and averages."""
    cosines = _column(draws, itemgetter("effect_cosine"))
    means = (
        _mean(_column(draws, itemgetter("n_edges"))),
        _mean(_column(calibrated, len)),
        _mean(_column(draws, itemgetter("effect_norm"))),
        _mean(_column(draws, itemgetter("jaccard"))),
        _mean(_column(draws, itemgetter("jaccard_expected"))),
        _mean(_column(calibrated, lambda of_draw: jaccard(of_draw, real))),
        _mean(cosines),
        _mean(np.abs(cosines)),
        _mean(np.abs(_column(draws, itemgetter("direction_cosine")))),
    )
    counts = {"n_edges": [draw["n_edges"] for draw in draws], "n_edges_calibrated": list(map(len, calibrated))}
    return _explained({**counts, **dict(zip(MEANS, means, strict=True))}, NO_EDGES)


def _control(rows: Sequence[Mapping[str, Any]], name: str, resampled: "Resampled") -> dict[str, Any]:
    """What all features say about one control."""
    real, real_calibrated = (_column(rows, itemgetter(key)) for key in ("n_edges", "n_edges_calibrated"))
    of_control = [row["controls"][name] for row in rows]
    columns = {key: _column(of_control, itemgetter(key)) for key in MEANS}
    edges, calibrated = columns["edges_mean"], columns["calibrated_mean"]
    return _explained(
        {
            "n_features": len(rows),
            "edges_mean": _mean(edges),
            "calibrated_mean": _mean(calibrated),
            **resampled.ratio("edge_ratio", real, edges),
            "n_features_more_edges": int((real > edges).sum()),
            **resampled.ratio("calibrated_ratio", real_calibrated, calibrated),
            **resampled.ratio(
                "effect_norm_ratio", _column(rows, itemgetter("effect_norm")), columns["effect_norm_mean"]
            ),
            **resampled.mean("jaccard", columns["jaccard_mean"]),
            "jaccard_expected": _mean(columns["jaccard_expected"]),
            **resampled.mean("jaccard_calibrated", columns["jaccard_calibrated_mean"]),
            **{key: _mean(columns[key]) for key in MEANS[-3:]},
            "wilcoxon_p": stratified_p(real_calibrated, _draws(of_control, "n_edges_calibrated")),
            "wilcoxon_p_published": stratified_p(real, _draws(of_control, "n_edges")),
        },
        "no feature is measured" if not rows else "one feature only, no edges to compare, or no feature differs",
    )


def _draws(of_control: Sequence[Mapping[str, Any]], key: str) -> Floats:
    """A count of every feature and draw, (n_features, n_draws)."""
    return np.array([of_feature[key] for of_feature in of_control], dtype=np.float64, ndmin=2)


def _explained(content: dict[str, Any], why: str) -> dict[str, Any]:
    """`content` with the `reason` for what is None in it, itself None where nothing is."""
    missing = [key for key, value in content.items() if value is None]
    return content | {"reason": f"{', '.join(missing)}: {why}" if missing else None}


def stratified_p(real: Floats, draws: Floats) -> float | None:
    """Two-sided p of the rank-sum test with the feature as stratum; None where no feature's runs differ.

    Null hypothesis: an ablation is to its feature as one draw more of the control, so that its rank among them is
    equally likely any of their 1 + n_draws ranks. The sum of the ranks has its exact distribution, ties included. (A
    signed-rank test of the ablation against the mean of the draws would not do: the mean of several skewed counts
    lies above most single ones, which alone makes it reject.)

    Args:
        real: (n_features,) of the ablations.
        draws: (n_features, n_draws) of the control.

    Source: van Elteren, Bull. Inst. Int. Stat. 37, 351 (1960).
    """
    if not len(real):
        return None
    n_runs = 1 + draws.shape[1]
    ranks = rankdata(np.column_stack([real, draws]), axis=1)
    away = np.rint(2 * ranks).astype(np.int64) - (n_runs + 1)  # from the mean rank, in halves
    away = away[away.any(axis=1)]
    if not len(away):
        return None
    distribution = np.ones(1)  # of the sum, from -n to n times the number of features so far
    for of_feature in away:
        distribution = np.convolve(distribution, np.bincount(of_feature + n_runs, minlength=2 * n_runs + 1) / n_runs)
    sums = np.arange(len(distribution)) - len(away) * n_runs
    return min(1.0, float(distribution[np.abs(sums) >= abs(away[:, 0].sum())].sum()))


def _correct(controls: Mapping[str, dict[str, Any]], p: str, q: str) -> None:
    known = [name for name in controls if controls[name][p] is not None]
    corrected = false_discovery_control([controls[name][p] for name in known]) if known else []
    for name in controls:
        controls[name][q] = None
    for name, value in zip(known, corrected, strict=True):
        controls[name][q] = float(value)


def _between(records: Sequence[Record], resampled: "Resampled") -> dict[str, Any]:
    """Overlap between the ablations of different features: what any feature shares with any other.

    Each feature has the mean over the others; those pairs are not independent, so that the interval is a rough one.
    """
    edges, live = ([unpacked(record["real"]["tests"][key])[0] for record in records] for key in ("edges", "live"))
    observed, expected = (np.full((len(records), len(records)), np.nan) for _ in range(2))
    for i, j in combinations(range(len(records)), 2):
        n_live = len(np.union1d(live[i], live[j]))
        found = jaccard(edges[i], edges[j]), expected_jaccard(n_live, len(edges[i]), len(edges[j]))
        for table, value in zip((observed, expected), found, strict=True):
            table[i, j] = table[j, i] = np.nan if value is None else value
    means = [np.array([np.nan if (x := _mean(row)) is None else x for row in table]) for table in (observed, expected)]
    overlap = {**resampled.mean("jaccard", means[0]), "jaccard_expected": _mean(means[1])}
    return _explained(overlap, "too few features with an edge")


class Resampled:
    """Samples of the features, with replacement, that all intervals share."""

    def __init__(self, n: int, seed: int) -> None:
        """Draw the samples of `n` features."""
        rng = np.random.default_rng(np.random.SeedSequence([seed, n]))
        self.weights = rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) if n > 1 else np.zeros((0, n))

    def ratio(self, name: str, above: Floats, below: Floats) -> dict[str, float | None]:
        """Sum over sum as `name`, with its interval; None where the lower sum is 0."""
        value = float(above.sum() / below.sum()) if below.sum() else None
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = (self.weights @ above) / (self.weights @ below)
        return {name: value, **self._interval(name, value, drawn)}

    def mean(self, name: str, values: Floats) -> dict[str, float | None]:
        """Mean of the values that are known as `name`_mean, with its interval."""
        known, value = np.isfinite(values), _mean(values)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = (self.weights[:, known] @ values[known]) / self.weights[:, known].sum(axis=1)
        return {f"{name}_mean": value, **self._interval(name, value, drawn)}

    @staticmethod
    def _interval(name: str, value: float | None, drawn: Floats) -> dict[str, float | None]:
        low = high = None
        if value is not None and len(drawn) and np.isfinite(drawn).all():
            low, high = (float(end) for end in np.percentile(drawn, INTERVAL))
        return {f"{name}_low": low, f"{name}_high": high}


def _column(entries: Sequence[Any], of: Callable[[Any], float | None]) -> Floats:
    """A number of every entry, NaN for None."""
    return np.array([np.nan if (value := of(entry)) is None else value for entry in entries], dtype=np.float64)


def _mean(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
