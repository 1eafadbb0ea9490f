"""What is kept of one feature's effects beside its edges: tests of every live target, and the null of the edge rule.

A target is live where the feature's removal changes it in at least one cell; only those can be tested.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellcircuits.edge_fdr import SWEEP_CONSISTENCY, SWEEP_D, CalibrationSettings, packed
from cellcircuits.sign_flips import SignedSums, flips_of, random_signs
from cellcircuits.stats import EdgeRule, cohens_d

INTERVAL = 0.95
MAX_T = 1e4  # beyond, SciPy's inversion of the noncentral t may search for ever, or end at 1e6


@dataclass(frozen=True)
class FeatureCalibration:
    """Tests of one feature's live targets; arrays over them unless said.

    Attributes:
        columns: (n_live,) which targets, ascending.
        p: two-sided sign-flip p.
        n_nonzero: cells in which the target changes; `consistency` the share of these on the majority's side.
        counts: what the whole graph's error rates are made of, for JSON: `n_live_targets`; `p` as `packed` gives it;
            `null_edges`, the mean over the sign vectors, and `null_edges_sd`; `resampled_edges` and
            `resampled_null_edges` (n_resamples,); `sweep_edges` and `sweep_null_edges` (thresholds of d x consistency).
    """

    columns: NDArray[np.int64]
    p: NDArray[np.float64]
    n_nonzero: NDArray[np.int64]
    consistency: NDArray[np.float64]
    counts: Mapping[str, Any]


class Calibrator:
    """Calibrates the features of one source layer, one after the other, in any order and any number of processes."""

    def __init__(
        self, rule: EdgeRule, settings: CalibrationSettings, n_cells: int, source_layer: int, device: torch.device
    ) -> None:
        """Draw the bootstrap samples of the run's cells, which are the same for every feature."""
        self.rule, self.settings, self.source_layer, self.device = rule, settings, source_layer, device
        rng = np.random.default_rng(np.random.SeedSequence([settings.seed]))
        shares = np.full(n_cells, 1 / n_cells)
        self.weights = rng.multinomial(n_cells, shares, size=settings.n_resamples)  # (n_resamples, n_cells)

    def calibrate(self, feature: int, effects: NDArray[np.float64], measured: NDArray[np.bool_]) -> FeatureCalibration:
        """Test every live target of one feature.

        Args:
            feature: source feature.
            effects: (n_active, n_targets) in the cells where it is active.
            measured: (n_cells,) which of the run's cells these are.
        """
        settings = self.settings
        if not len(effects):  # one cell of zeros says the same: nothing is live
            effects, measured = np.zeros((1, effects.shape[1])), np.arange(len(measured)) == 0
        columns = np.flatnonzero((effects != 0).any(axis=0))
        live = effects[:, columns]
        rng = np.random.default_rng(np.random.SeedSequence([settings.seed, self.source_layer, feature]))
        flips = flips_of(len(live), settings.n_draws, rng)
        sums = SignedSums(live, self.device)
        n_as_large, null_edges = sums.test(flips, self.rule)
        numerator, denominator = flips.fractions(n_as_large)
        n_nonzero, n_positive = (live != 0).sum(axis=0), (live > 0).sum(axis=0)
        counts = {
            "n_live_targets": len(columns),
            "p": packed(numerator, denominator),
            "null_edges": float(null_edges.mean()),
            "null_edges_sd": float(null_edges.std()),
            **self._resampled(sums, measured, rng),
            **self._sweep(sums, flips.signs[: settings.n_sweep] if not flips.is_exact else flips.signs),
        }
        majority = np.maximum(n_positive, n_nonzero - n_positive)
        return FeatureCalibration(columns, numerator / denominator, n_nonzero, majority / n_nonzero, counts)

    def _resampled(
        self, sums: SignedSums, measured: NDArray[np.bool_], rng: np.random.Generator
    ) -> dict[str, list[float]]:
        """Edges in every bootstrap sample of the cells, and the mean of its null; repeats of a cell flip together."""
        weights = self.weights[:, measured]  # (n_resamples, n_active)
        shape = (len(weights), self.settings.n_flips_per_resample, weights.shape[1])
        as_they_are = np.ones((len(weights), 1, weights.shape[1]), dtype=np.int8)
        n_edges = sums.n_edges(weights, np.concatenate([as_they_are, random_signs(shape, rng)], axis=1), self.rule)
        return {
            "resampled_edges": n_edges[:, 0].tolist(),
            "resampled_null_edges": n_edges[:, 1:].mean(axis=1).tolist(),
        }

    def _sweep(self, sums: SignedSums, signs: NDArray[np.int8]) -> dict[str, list[list[float]]]:
        rules = [[EdgeRule(d, consistency) for consistency in SWEEP_CONSISTENCY] for d in SWEEP_D]
        observed = sums.sweep(np.ones((1, signs.shape[1]), dtype=np.int8), rules)
        return {"sweep_edges": observed.tolist(), "sweep_null_edges": (sums.sweep(signs, rules) / len(signs)).tolist()}


def hedges_g(effects: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Hedges' g per target, and the 95% interval of the effect size that it estimates, exact for normal effects.

    Args:
        effects: (n_cells, n_targets) with n_cells > 2.

    Returns:
        g, its lower and its upper end, (n_targets,) each; NaN ends where the effects do not vary or are too few.

    The interval inverts the noncentral t distribution of d, so g's correction for bias has no part in it. Where cells
    hardly differ, as copies of one cell do, d is so large that only the error of the spread counts, a chi distribution.

    Source: Hedges, J. Educ. Stat. 6, 107 (1981), for one sample; Steiger and Fouladi (1997) for the interval.
    """
    from scipy.special import chdtri, nctdtrinc

    n = len(effects)
    d = cohens_d(effects)
    undefined = np.full(len(d), np.nan)
    if n < 3:
        return undefined, undefined, undefined
    correction = 1 - 3 / (4 * n - 5)
    varies = np.ptp(effects, axis=0) > 0
    t = d * np.sqrt(n)
    is_usual = varies & (np.abs(t) <= MAX_T)
    tails = (0.5 + INTERVAL / 2, 0.5 - INTERVAL / 2)
    ends = [nctdtrinc(n - 1, tail, np.where(is_usual, t, 0.0)) / np.sqrt(n) for tail in tails]
    chi = [np.sqrt(chdtri(n - 1, tail) / (n - 1)) for tail in tails]
    limits = np.sort([d * of_tail for of_tail in chi], axis=0)
    ends = (np.where(varies, np.where(is_usual, x, limit), np.nan) for x, limit in zip(ends, limits, strict=True))
    return correction * d, *ends
