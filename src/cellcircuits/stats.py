"""Effect sizes and the edge rule: arrays in, arrays out, NumPy only."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

SD_FLOOR = 1e-10
D_MARGIN = 1e-9


@dataclass(frozen=True)
class EdgeRule:
    """Which effects count as an edge: |d| > min_abs_d and sign consistency > min_consistency.

    Rounding must not decide, since a target that is non-zero in one of four cells has |d| = 0.5 exactly:
    d is compared with a margin of 1e-9, consistency as a ratio of integers.

    Source: the study's "Edge calling"; the defaults are its thresholds.
    """

    min_abs_d: float = 0.5
    min_consistency: float = 0.7

    def holds(self, d: NDArray[np.float64], n_majority: NDArray[np.int64], n_cells: int) -> NDArray[np.bool_]:
        """Whether each target is an edge.

        Args:
            d: (n_targets,) Cohen's d.
            n_majority: (n_targets,) cells on the side of the majority sign.
            n_cells: measured cells.
        """
        threshold = Fraction(str(self.min_consistency))
        too_few = threshold.numerator * n_cells // threshold.denominator
        return (np.abs(d) > self.min_abs_d + D_MARGIN) & (n_majority > too_few)


@dataclass(frozen=True)
class EffectStatistics:
    """What n measured cells say about every target; arrays of shape (n_targets,)."""

    n_cells: int
    mean: NDArray[np.float64]
    d: NDArray[np.float64]
    consistency: NDArray[np.float64]
    is_edge: NDArray[np.bool_]


def cohens_d(effects: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standardized mean effect per target (Cohen's d for one sample).

        d_j = mean_i(effect_ij) / max(sd_i(effect_ij), 1e-10),   sd with ddof = 1

    Args:
        effects: (n_cells, n_targets), latent activation units.

    Returns:
        (n_targets,) unitless; 0 everywhere for fewer than two cells.

    Source: Cohen (1988), chapter 2.
    """
    if len(effects) < 2:
        return np.zeros(effects.shape[1])
    mean = effects.mean(axis=0, keepdims=True)
    return mean[0] / np.maximum(effects.std(axis=0, ddof=1, mean=mean), SD_FLOOR)


def n_majority_sign(effects: NDArray[np.float64]) -> NDArray[np.int64]:
    """Cells on the side of the majority sign, (n_cells, n_targets) -> (n_targets,).

    An effect of exactly zero counts as not positive, as the study has it.
    """
    n_positive = (effects > 0).sum(axis=0)
    return np.maximum(n_positive, len(effects) - n_positive)


def effect_statistics(effects: NDArray[np.float64], rule: EdgeRule) -> EffectStatistics:
    """Mean, Cohen's d, sign consistency and edges of one source feature.

    Args:
        effects: (n_cells, n_targets) over the measured cells only.
        rule: the thresholds.

    Returns:
        The statistics; with fewer than two cells d and consistency are 0 and nothing is an edge.
    """
    n_cells, n_targets = effects.shape
    d = cohens_d(effects)
    if n_cells < 2:
        zeros = np.zeros(n_targets)
        mean = effects.mean(axis=0) if n_cells else zeros
        return EffectStatistics(n_cells, mean, d, zeros, np.zeros(n_targets, dtype=bool))
    n_majority = n_majority_sign(effects)
    return EffectStatistics(n_cells, effects.mean(axis=0), d, n_majority / n_cells, rule.holds(d, n_majority, n_cells))
