"""What several features do together: ratios of effect sizes, and what exactly additive effects would give.

The study's ratio |d_AB| / (|d_A| + |d_B|) is NOT 1 where effects add: d is a mean over its spread, and the spread
of a sum is not the sum of the spreads. Two features that add exactly give about 0.71 when their effects vary
independently over cells and 0.5 when they vary together, three give 0.58 and 0.33. Every ratio here therefore
comes with the ratio that exactly additive effects of the same cells would give. NumPy only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellcircuits.combinations import LETTERS
from cellcircuits.stats import EdgeRule, cohens_d, effect_statistics

MIN_DENOMINATOR = 0.01
SUBADDITIVE_BELOW, SUPERADDITIVE_ABOVE = 0.8, 1.2
SYNERGY, REDUNDANCY = 1, 2  # how an interaction changes the size of the sum of the single effects

Condition = tuple[int, ...]  # which features of the combination are removed, by their number in it
ByCondition = Mapping[Condition, NDArray[np.float64]]


@dataclass(frozen=True)
class AdditivitySettings:
    """How additivity is tested; part of what determines the numbers of a run.

    Attributes:
        seed: of the sign vectors and of the resampled cells, with the combination's features and the condition.
        n_draws: sign vectors for combinations active in more than 12 cells; fewer cells have all.
        n_resamples: bootstrap samples of the cells.
        n_refined: further sign vectors for the targets that hardly any of the first ones reaches.
    """

    seed: int = 0
    n_draws: int = 10_000
    n_resamples: int = 2_000
    n_refined: int = 1_000_000

    def record(self) -> dict[str, int]:
        """For the settings of a run."""
        return asdict(self)


def conditions(order: int) -> list[Condition]:
    """Every non-empty set of `order` features, single ones first: for 3, A B C AB AC BC ABC as index tuples."""
    return [members for size in range(1, order + 1) for members in combinations(range(order), size)]


def condition_name(members: Sequence[int]) -> str:
    """`(0, 2)` is `AC`."""
    return "".join(LETTERS[i] for i in members)


@dataclass(frozen=True)
class CombinationEffects:
    """Effects of all conditions over all cells; arrays as in `joint.CellEffects` with cells first.

    Attributes:
        measured: (n_cells, n_conditions) bool.
        published: (n_cells, n_conditions, n_targets).
        union: the same shape.
        additive: the same shape.
    """

    measured: NDArray[np.bool_]
    published: NDArray[np.float64]
    union: NDArray[np.float64]
    additive: NDArray[np.float64]


def additivity_ratio(d_joint: NDArray[np.float64], d_singles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Size of a joint effect relative to the single ones.

        |d_joint| / sum_i |d_i|,   1 where the denominator is <= 0.01

    Args:
        d_joint: (n_targets,) Cohen's d of the joint ablation.
        d_singles: (n_singles, n_targets) those of its parts.

    Returns:
        (n_targets,) unitless, not negative.
    """
    denominator = np.abs(d_singles).sum(axis=0)
    is_large = denominator > MIN_DENOMINATOR
    return np.where(is_large, np.abs(d_joint) / np.where(is_large, denominator, 1.0), 1.0)


def interaction(values: ByCondition, members: Condition) -> NDArray[np.float64]:
    """Inclusion-exclusion remainder of a condition: what its own subsets do not explain.

    sum over non-empty s in members of (-1)^(|members| - |s|) values[s]
    """
    subsets = [subset for size in range(1, len(members) + 1) for subset in combinations(members, size)]
    return np.sum([(-1.0) ** (len(members) - len(subset)) * values[subset] for subset in subsets], axis=0)


def combination_statistics(effects: CombinationEffects, order: int, rule: EdgeRule) -> dict[str, Any]:
    """The numbers of one combination's record, without names and times.

    Args:
        effects: over all cells.
        order: features in the combination, 2 or 3.
        rule: what makes a target significant.

    Returns:
        JSON-able; the study's keys, and beside each ratio what exactly additive effects would give.
    """
    subsets = conditions(order)
    measured = {s: effects.published[effects.measured[:, c], c] for c, s in enumerate(subsets)}
    of = {s: effect_statistics(measured[s], rule) for s in subsets}
    targets = np.any([of[s].is_edge for s in subsets], axis=0)  # (n_targets,)
    d = {s: of[s].d[targets] for s in subsets}
    d_if_additive = {s: cohens_d(effects.additive[effects.measured[:, c], c])[targets] for c, s in enumerate(subsets)}
    names = {s: condition_name(s) for s in subsets}
    return {
        "n_active": {names[s]: of[s].n_cells for s in subsets},
        "n_significant": {names[s]: int(of[s].is_edge.sum()) for s in subsets} | {"any": int(targets.sum())},
        **(_pair_keys if order == 2 else _triplet_keys)(d, d_if_additive),
        "mean_abs_d": {names[s]: float(np.abs(of[s].d).mean()) for s in subsets},
        "additivity_of_means": _additivity_of_means(effects, subsets, targets),
    }


def _ratios(d: ByCondition, joint: ByCondition, members: Condition) -> NDArray[np.float64]:
    return additivity_ratio(joint[members], np.stack([d[(i,)] for i in members]))


def class_counts(ratios: NDArray[np.float64], suffix: str) -> dict[str, int]:
    """How many ratios are below 0.8, from 0.8 to 1.2, and above 1.2, as keys of a record."""
    n_below, n_above = int((ratios < SUBADDITIVE_BELOW).sum()), int((ratios > SUPERADDITIVE_ABOVE).sum())
    return {
        f"n_subadditive{suffix}": n_below,
        f"n_additive{suffix}": len(ratios) - n_below - n_above,
        f"n_superadditive{suffix}": n_above,
    }


def _median(values: NDArray[np.float64], if_empty: float) -> float:
    return float(np.median(values)) if len(values) else if_empty


def _abs(d: ByCondition) -> dict[Condition, NDArray[np.float64]]:
    return {s: np.abs(values) for s, values in d.items()}


def _pair_keys(d: ByCondition, d_if_additive: ByCondition) -> dict[str, Any]:
    both = (0, 1)
    ratios, if_additive = _ratios(d, d, both), _ratios(d, d_if_additive, both)
    return {
        "ratio_median": _median(ratios, 1.0),
        "ratio_median_if_additive": _median(if_additive, 1.0),
        **class_counts(ratios, ""),
        **class_counts(if_additive, "_if_additive"),
        "interaction_median": _median(interaction(_abs(d), both), 0.0),
        "interaction_median_if_additive": _median(interaction(_abs(d_if_additive), both), 0.0),
    }


def _triplet_keys(d: ByCondition, d_if_additive: ByCondition) -> dict[str, Any]:
    pairs, all_three = [(0, 1), (0, 2), (1, 2)], (0, 1, 2)
    ratios, if_additive = _ratios(d, d, all_three), _ratios(d, d_if_additive, all_three)
    return {
        "pairwise_ratios": {condition_name(s): _median(_ratios(d, d, s), 1.0) for s in pairs},
        "pairwise_ratios_if_additive": {condition_name(s): _median(_ratios(d, d_if_additive, s), 1.0) for s in pairs},
        "threeway_ratio": _median(ratios, 1.0),
        "threeway_ratio_if_additive": _median(if_additive, 1.0),
        **class_counts(ratios, "_3way"),
        **class_counts(if_additive, "_3way_if_additive"),
        **_size_differences(d, ""),
        **_size_differences(d_if_additive, "_if_additive"),
    }


def _size_differences(d: ByCondition, suffix: str) -> dict[str, float]:
    """The study's interaction of three features, and what C adds to AB, in units of |d|."""
    size, all_three = _abs(d), (0, 1, 2)
    return {
        f"higher_order_interaction_median{suffix}": _median(interaction(size, all_three), 0.0),
        f"marginal_C_given_AB_median{suffix}": _median(size[all_three] - size[(0, 1)], 0.0),
    }


def _additivity_of_means(
    effects: CombinationEffects, subsets: Sequence[Condition], targets: NDArray[np.bool_]
) -> dict[str, Any]:
    """Do mean effects add, on the same cells and positions for every condition?

    Per joint condition, as shares of the norm over the targets of the sum of the single mean effects:

    - `norm_ratio`, the norm of the joint mean effect: 1 where effects add, less for redundancy or mediation;
    - `relative_deviation`, the norm of joint - sum, which sees any departure, also of direction;
    - `relative_interaction`, the norm of what the condition's own subsets do not explain.

    None where the single effects are 0 or cancel. Unlike the ratios of |d| these see a joint effect that is the
    same share of the sum in every cell.
    """
    present = effects.measured[:, -1]  # the full combination is measured wherever any condition is
    if not present.any() or not targets.any():
        return {}
    mean = {s: effects.union[present, c][:, targets].mean(axis=0) for c, s in enumerate(subsets)}
    answer = {}
    for s in (s for s in subsets if len(s) > 1):
        summed = np.sum([mean[(i,)] for i in s], axis=0)
        norm = float(np.linalg.norm(summed))
        parts = {
            "norm_ratio": mean[s],
            "relative_deviation": mean[s] - summed,
            "relative_interaction": interaction(mean, s),
        }
        answer[condition_name(s)] = {
            name: float(np.linalg.norm(part)) / norm if norm else None for name, part in parts.items()
        }
    return answer
