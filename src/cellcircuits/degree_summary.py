"""Degrees as they are: counts, quartiles, spread and concentration. NumPy only."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellcircuits.results import DEGREE_BINS

N_RESAMPLES = 1000


def degree_summary(degrees: NDArray[np.int64], seed: int) -> dict[str, Any]:
    """Describe the degrees; 95% percentile intervals resample the features 1,000 times.

    Args:
        degrees: (n_features,).
        seed: of the resampling.
    """
    quantities: dict[str, Callable[[NDArray[np.float64]], float | None]] = {
        "mean": lambda x: float(x.mean()),
        "median": lambda x: float(np.median(x)),
        "gini": gini,
        "skewness": skewness,
    }
    summary: dict[str, Any] = {
        "n": len(degrees),
        "n_zero": int((degrees == 0).sum()),
        "total_edges": int(degrees.sum()),
        "max": int(degrees.max()),
        "quartiles": np.percentile(degrees, (25, 50, 75)).tolist(),
    }
    rng = np.random.default_rng([seed, 2])
    values = degrees.astype(np.float64)
    resamples = [rng.choice(values, len(values)) for _ in range(N_RESAMPLES)]
    for name, quantity in quantities.items():
        estimate = quantity(values)
        drawn = [draw for draw in map(quantity, resamples) if draw is not None]
        summary[name] = estimate
        enough = estimate is not None and len(drawn) > N_RESAMPLES // 2
        summary[f"{name}_interval"] = np.percentile(drawn, (2.5, 97.5)).tolist() if enough else None
        if estimate is None:
            summary[f"{name}_reason"] = "all degrees are equal" if degrees.any() else "no feature has an edge"
    summary["histogram"] = [
        {
            "from": low,
            "below": high,
            "n": int(((degrees >= low) & (degrees < (np.inf if high is None else high))).sum()),
        }
        for low, high in zip(DEGREE_BINS, [*DEGREE_BINS[1:], None], strict=True)
    ]
    return summary


def gini(values: NDArray[np.float64]) -> float | None:
    """Gini coefficient, 0 where all are equal to near 1 where one has everything; None where all are 0.

    sum_i (2 i - n - 1) x_(i) / (n sum_i x_i),   x ascending, i from 1
    """
    total = values.sum()
    if total == 0:
        return None
    ranks = np.arange(1, len(values) + 1)
    return float(np.dot(2 * ranks - len(values) - 1, np.sort(values)) / (len(values) * total))


def skewness(values: NDArray[np.float64]) -> float | None:
    """Third standardized moment (population form); None where all are equal."""
    if np.ptp(values) == 0:
        return None
    centred = values - values.mean()
    return float((centred**3).mean() / (centred**2).mean() ** 1.5)
