"""Do the effects of one combination add? Tested in effect units, on the same cells and positions for every condition.

The interaction of a joint condition in a cell is what its own subsets do not explain, by inclusion and exclusion:

    i_AB = e_AB - e_A - e_B      i_ABC = e_ABC - e_AB - e_AC - e_BC + e_A + e_B + e_C

with effects averaged over the positions where any feature of the whole combination is active. Per target its mean is
tested against 0 by sign flips over the cells. Effects that add exactly still differ by rounding, whose sign may be
the same in every cell: an interaction within `JointBench`'s bound on rounding counts as exactly 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cellcircuits.combination_stats import (
    REDUNDANCY,
    SYNERGY,
    AdditivitySettings,
    CombinationEffects,
    Condition,
    condition_name,
    conditions,
    interaction,
)
from cellcircuits.edge_fdr import packed
from cellcircuits.redundancy import redundancy
from cellcircuits.sign_flips import SignedSums, flips_of

N_STRONGEST = 10
FEW, ROUND = 10, 10_000  # sign vectors that reach a target's sum; those drawn at once


def combination_additivity(
    effects: CombinationEffects,
    rounding: NDArray[np.float64],
    features: Sequence[tuple[int, int]],
    settings: AdditivitySettings,
    device: torch.device,
) -> dict[str, Any]:
    """What one combination's record says about additivity.

    Args:
        effects: over all cells; those count in which any feature is active.
        rounding: (n_cells, n_targets) bound on the rounding of one averaged latent.
        features: (layer, index) of each.
        settings: of the tests.
        device: where to compute the sign flips.

    Returns:
        JSON-able: `n_cells`; `n_live_targets` and `live_targets`, those that any condition changes in any cell, packed;
        and per joint condition the keys of `redundancy`, `p`, `p_refined` (see `_Fractions`) and `direction` of every
        live target, packed, `n_changed`, the live targets with an interaction above rounding in some cell, and the
        `strongest` of them.
    """
    order = len(features)
    present = effects.measured[:, -1]
    subsets = conditions(order)
    union = {s: effects.union[present, c] for c, s in enumerate(subsets)}
    bound = rounding[present]
    # an effect is the difference of two averaged latents
    live = np.flatnonzero(np.any([(np.abs(of_one) > 2 * bound).any(axis=0) for of_one in union.values()], axis=0))
    union, bound = {s: of_one[:, live] for s, of_one in union.items()}, bound[:, live]
    answer = {}
    for members in (s for s in subsets if len(s) > 1):
        seed = [settings.seed, *(number for feature in features for number in feature), sum(1 << i for i in members)]
        test_rng, resample_rng = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
        summed = np.sum([union[(i,)] for i in members], axis=0)
        between = above_rounding(union, members, bound)
        answer[condition_name(members)] = {
            **redundancy(union[members], summed, settings.n_resamples, resample_rng),
            **_tests(between, union[members], summed, _p_values(between, settings, test_rng, device)),
        }
        for strong in answer[condition_name(members)]["strongest"]:
            strong["target"] = int(live[strong["target"]])
    return {
        "n_cells": int(present.sum()),
        "n_live_targets": len(live),
        "live_targets": packed(live, effects.union.shape[-1]),
        "conditions": answer,
    }


def above_rounding(
    union: dict[Condition, NDArray[np.float64]], members: Condition, rounding: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Interaction of a condition per cell, exactly 0 where rounding alone may have made it; (n_cells, n_targets).

    Inclusion and exclusion adds up 2^m averaged latents, the clean one among them, each within `rounding` of the
    exact one.
    """
    found = interaction(union, members)
    return np.where(np.abs(found) > 2 ** len(members) * rounding, found, 0.0)


@dataclass(frozen=True)
class _Fractions:
    """P of every live target: `numerators` over `denominator`, or where one is 0 the next of `refined` over its own."""

    numerators: NDArray[np.int64]
    denominator: int
    refined: NDArray[np.int64]
    refined_denominator: int

    def values(self) -> NDArray[np.float64]:
        """As numbers, (n_live,)."""
        p = self.numerators / self.denominator
        p[self.numerators == 0] = self.refined / self.refined_denominator
        return p


def _p_values(
    between: NDArray[np.float64], settings: AdditivitySettings, rng: np.random.Generator, device: torch.device
) -> _Fractions:
    """Two-sided sign-flip p of the mean interaction of every live target.

    No p from `n_draws` vectors is below 1 / (n_draws + 1), too coarse for as many tests as a folder holds. So targets
    whose |sum| at most `FEW` of them reach are tested by all vectors together, these and `n_refined` more. The test
    stays valid at every level: for a p under (FEW + 1) / (n_draws + 1) all vectors together must say so, for a larger
    one the first ones alone.
    """
    changed = np.flatnonzero((between != 0).any(axis=0))
    flips = flips_of(len(between), settings.n_draws, rng)
    n_as_large = np.full(between.shape[1], len(flips.signs))  # without any interaction every vector is as large
    if len(changed):
        n_as_large[changed] = SignedSums(between[:, changed], device).n_as_large(flips)
    numerators, denominator = flips.fractions(n_as_large)
    few = changed[n_as_large[changed] <= FEW]
    if flips.is_exact or not len(few) or not settings.n_refined:
        return _Fractions(numerators, denominator, np.zeros(0, dtype=np.int64), 1)
    sums, refined = SignedSums(between[:, few], device), numerators[few]
    for start in range(0, settings.n_refined, ROUND):
        n_drawn = min(ROUND, settings.n_refined - start)
        refined = refined + sums.n_as_large(flips_of(len(between), n_drawn, rng))
    numerators[few] = 0
    return _Fractions(numerators, denominator, refined, denominator + settings.n_refined)


def _tests(
    between: NDArray[np.float64], joint: NDArray[np.float64], summed: NDArray[np.float64], fractions: _Fractions
) -> dict[str, Any]:
    """P and direction of every live target, and the strongest interactions by place among these."""
    changed, p = np.flatnonzero((between != 0).any(axis=0)), fractions.values()
    # of no cells no mean
    means = [x.mean(axis=0) if len(x) else np.zeros(x.shape[1]) for x in (between, joint, summed)]
    mean, mean_joint, mean_sum = means
    larger, smaller = np.abs(mean_sum + mean) > np.abs(mean_sum), np.abs(mean_sum + mean) < np.abs(mean_sum)
    order = changed[np.lexsort((changed, -np.abs(mean[changed]), p[changed]))][:N_STRONGEST]
    return {
        "n_changed": len(changed),
        "p": packed(fractions.numerators, fractions.denominator),
        "p_refined": packed(fractions.refined, fractions.refined_denominator),
        "direction": packed(SYNERGY * larger + REDUNDANCY * smaller, 2),
        "strongest": [
            {
                "target": int(j),
                "mean_interaction": float(mean[j]),
                "mean_joint": float(mean_joint[j]),
                "mean_sum": float(mean_sum[j]),
                "p": float(p[j]),
            }
            for j in order
        ],
    }
