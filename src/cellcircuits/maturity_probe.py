"""A logistic probe of maturity on the mean final residual stream, trained on cells that a run does not take.

scikit-learn's StandardScaler and LogisticRegression, early and late weighted alike; the AUC is that of held-out folds,
with an interval from resampling cells, or donors where these are known.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellcircuits.errors import UserError
from cellcircuits.jsonio import write_atomically
from cellcircuits.steering_state import read_arrays

log = logging.getLogger(__name__)
PROBE_FILE = "probe.npz"
PENALTY = 0.05  # the study's C, here on scaled columns
N_FOLDS = 5
N_RESAMPLES = 2000
MIN_CELLS_OF_A_KIND = 5


@dataclass(frozen=True)
class Probe:
    """log-odds(x) = ((x - mean) / scale) . weights + intercept, for the mean final stream x (d_model,) of a cell.

    `auc` None where it cannot be estimated, `reason` says why; `n_early`, `n_late` cells it was trained on.
    """

    weights: NDArray[np.float64]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    intercept: float
    n_early: int
    n_late: int
    auc: float | None
    auc_low: float | None
    auc_high: float | None
    reason: str | None

    @property
    def direction(self) -> NDArray[np.float64]:
        """What a change of the raw mean stream is multiplied with, (d_model,)."""
        return self.weights / self.scale

    def log_odds(self, stream: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-odds of late, of mean streams (..., d_model)."""
        return (stream - self.mean) @ self.direction + self.intercept

    def facts(self) -> dict[str, Any]:
        """What the summary says about it."""
        return {
            "auc": self.auc,
            "auc_low": self.auc_low,
            "auc_high": self.auc_high,
            "n_cells": self.n_early + self.n_late,
            "n_early": self.n_early,
            "n_late": self.n_late,
            "reason": self.reason,
        }


def require_both_kinds(is_late: NDArray[np.bool_], there: str = "") -> tuple[int, int]:
    """How many early and late cells there are.

    Args:
        is_late: (n_cells,) labels.
        there: what else the error says.

    Raises:
        UserError: fewer than five early or late cells.
    """
    n_late, n_early = int(is_late.sum()), int((~is_late).sum())
    if min(n_early, n_late) < MIN_CELLS_OF_A_KIND:
        raise UserError(
            f"the probe has {n_early} early and {n_late} late cells to learn from, and needs {MIN_CELLS_OF_A_KIND} of "
            f"each{there}; name more cells or others (--probe-data-path, --probe-cells, --probe-filter, "
            "--probe-labels), or take fewer for the run (--n-cells)."
        )
    return n_early, n_late


def fit_probe(
    streams: NDArray[np.float64], is_late: NDArray[np.bool_], donors: NDArray[Any] | None, seed: int
) -> Probe:
    """Fit the probe on all cells, and estimate its AUC on held-out folds.

    Args:
        streams: (n_cells, d_model) mean final streams.
        is_late: (n_cells,) labels.
        donors: (n_cells,) donors, which folds keep whole, or None.
        seed: of folds and resampling.

    Raises:
        UserError: fewer than five early or late cells.
    """
    n_early, n_late = require_both_kinds(is_late)
    whole = _pipeline().fit(streams, is_late)
    scaler, logistic = whole[0], whole[-1]
    scores, reason = _held_out_scores(streams, is_late, donors, seed)
    auc = None if scores is None else _auc(is_late, scores)
    low, high = (None, None) if scores is None else _interval(is_late, scores, donors, seed)
    return Probe(
        weights=logistic.coef_[0].astype(np.float64),
        mean=scaler.mean_.astype(np.float64),
        scale=scaler.scale_.astype(np.float64),
        intercept=float(logistic.intercept_[0]),
        n_early=n_early,
        n_late=n_late,
        auc=auc,
        auc_low=low,
        auc_high=high,
        reason=reason,
    )


def _pipeline() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    balanced = LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=3000)
    return make_pipeline(StandardScaler(), balanced)


def _held_out_scores(
    streams: NDArray[np.float64], is_late: NDArray[np.bool_], donors: NDArray[Any] | None, seed: int
) -> tuple[NDArray[np.float64] | None, str | None]:
    """Log-odds of every cell by a probe that did not see its fold, or None and why not."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict

    n_folds = min(N_FOLDS, int(is_late.sum()), int((~is_late).sum()))
    if donors is None:
        folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    else:
        n_donors = len(set(donors))
        if n_donors < 2:
            return None, "the probe's cells are of one donor, so none can be held out"
        folds = StratifiedGroupKFold(min(n_folds, n_donors), shuffle=True, random_state=seed)
    parts = list(folds.split(streams, is_late, donors))
    if any(len(set(is_late[train])) < 2 for train, _ in parts):
        return None, "without the donors of a fold no early or no late cell is left to learn from"
    return cross_val_predict(_pipeline(), streams, is_late, cv=parts, method="decision_function"), None


def _auc(is_late: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(is_late, scores))


def _interval(
    is_late: NDArray[np.bool_], scores: NDArray[np.float64], donors: NDArray[Any] | None, seed: int
) -> tuple[float | None, float | None]:
    """95% percentile interval of the AUC: cells resampled within early and late, or whole donors.

    Resamples without an early or a late cell say nothing and are left out.
    """
    rng, n_cells = np.random.default_rng(np.random.SeedSequence([seed, 2])), len(scores)
    weights = np.zeros((N_RESAMPLES, n_cells))  # how often a cell is in a resample
    if donors is None:
        for group in (np.flatnonzero(is_late), np.flatnonzero(~is_late)):
            weights[:, group] = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), N_RESAMPLES)
    else:
        number, n_donors = np.unique(donors, return_inverse=True)[1], len(set(donors))
        weights = rng.multinomial(n_donors, np.full(n_donors, 1 / n_donors), N_RESAMPLES)[:, number].astype(float)
    gap = scores[is_late] - scores[~is_late][:, None]  # (n_early, n_late)
    of_early, of_late = weights[:, ~is_late], weights[:, is_late]
    n_pairs = of_early.sum(axis=1) * of_late.sum(axis=1)
    wins = ((of_early @ (0.5 * (np.sign(gap) + 1))) * of_late).sum(axis=1)
    aucs = wins[n_pairs > 0] / n_pairs[n_pairs > 0]
    if not aucs.size:
        return None, None
    low, high = np.percentile(aucs, (2.5, 97.5))
    return float(low), float(high)


def write_probe(path: Path, probe: Probe, fingerprint: str, names: Sequence[str], is_late: NDArray[np.bool_]) -> None:
    """Write `probe.npz`, with the names and labels of the cells that it was trained on."""
    missing = {name: np.nan if getattr(probe, name) is None else getattr(probe, name) for name in AUCS}
    arrays = {
        "weights": probe.weights,
        "mean": probe.mean,
        "scale": probe.scale,
        "intercept": np.array(probe.intercept),
        "n_early": np.array(probe.n_early),
        "n_late": np.array(probe.n_late),
        "reason": np.array(probe.reason or ""),
        "cell_ids": np.array(names),
        "is_late": is_late,
        "fingerprint": np.array(fingerprint),
        **{name: np.array(value) for name, value in missing.items()},
    }
    write_atomically(path, lambda stream: np.savez(stream, **arrays))


AUCS = ("auc", "auc_low", "auc_high")


def kept_probe(path: Path, fingerprint: str) -> Probe | None:
    """The probe in a folder, if it is whole and of the run with this fingerprint."""
    kept = read_arrays(path)
    if kept is None:
        return None
    try:
        if kept["fingerprint"].item() == fingerprint:
            numbers = {name: kept[name].item() for name in ("intercept", "n_early", "n_late")}
            aucs = {name: None if np.isnan(kept[name]) else kept[name].item() for name in AUCS}
            arrays = {name: kept[name].astype(np.float64) for name in ("weights", "mean", "scale")}
            return Probe(**arrays, **numbers, **aucs, reason=kept["reason"].item() or None)
    except (KeyError, ValueError, TypeError):
        pass
    log.warning("%s is of another run: it is made again.", path)
    return None
