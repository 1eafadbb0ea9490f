"""What the effects of one feature's ablation and of its controls say, and how alike they are.

Arrays in, plain JSON values out: what a whole run adds (which edges are calibrated) is found from these later.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import hypergeom

from cellcircuits.calibration import hedges_g
from cellcircuits.edge_fdr import CalibrationSettings, packed
from cellcircuits.sign_flips import SignedSums, flips_of
from cellcircuits.stats import EdgeRule, effect_statistics

Floats = NDArray[np.float64]
NOTHING = "no edge, or no effect, of the ablation or of the control"


@dataclass(frozen=True)
class HowTested:
    """How effects are tested: by the rule and the sign flips of the trace."""

    rule: EdgeRule
    settings: CalibrationSettings
    source_layer: int
    device: torch.device


@dataclass(frozen=True)
class Outcome:
    """Effects of one feature under one condition, over the cells in which they were measured.

    Attributes:
        n_cells: these cells.
        mean: (n_targets,) mean effects.
        live: (n_live,) targets that change in at least one cell, ascending.
        numerators: (n_live,) of their two-sided sign-flip p, over `denominator`.
        edges: (n_edges,) targets that the published rule calls, ascending; all of them are live.
        is_strong: (n_edges,) whether also Hedges' g and the consistency over the cells where the target changes pass.
    """

    n_cells: int
    mean: Floats
    live: NDArray[np.int64]
    numerators: NDArray[np.int64]
    denominator: int
    edges: NDArray[np.int64]
    is_strong: NDArray[np.bool_]

    def counts(self) -> dict[str, Any]:
        """For JSON: numbers of cells, live targets and edges, and the norm of the mean effects."""
        return {
            "n_cells": self.n_cells,
            "n_live_targets": len(self.live),
            "n_edges": len(self.edges),
            "effect_norm": float(np.linalg.norm(self.mean)),
        }

    def tests(self) -> dict[str, Any]:
        """For JSON: p of every live target, which targets are edges, and which of those are strong."""
        return {
            "p": packed(self.numerators, self.denominator),
            "live": packed(self.live, len(self.mean)),
            "edges": packed(self.edges, len(self.mean)),
            "strong_edges": packed(self.edges[self.is_strong], len(self.mean)),
        }


def outcome_of(effects: Floats, feature: int, tests: HowTested) -> Outcome:
    """Test the effects of one condition.

    The sign vectors of a feature are those of its trace, for controls as well.

    Args:
        effects: (n_cells, n_targets) in the cells in which they were measured.
        feature: the source feature.
        tests: how.
    """
    n_cells = len(effects)
    measured = effect_statistics(effects, tests.rule)
    live = np.flatnonzero((effects != 0).any(axis=0))
    rng = np.random.default_rng(np.random.SeedSequence([tests.settings.seed, tests.source_layer, feature]))
    flips = flips_of(n_cells, tests.settings.n_draws, rng)
    numerators, denominator = flips.fractions(SignedSums(effects[:, live], tests.device).test(flips, tests.rule)[0])
    edges = np.flatnonzero(measured.is_edge)
    of_edges = effects[:, edges]
    n_nonzero, n_positive = (of_edges != 0).sum(axis=0), (of_edges > 0).sum(axis=0)
    consistency = np.maximum(n_positive, n_nonzero - n_positive) / np.maximum(1, n_nonzero)
    is_large = np.abs(hedges_g(of_edges)[0]) > tests.rule.min_abs_d
    is_strong = is_large & (consistency > tests.rule.min_consistency)
    return Outcome(n_cells, measured.mean, live, numerators, denominator, edges, is_strong)


def likeness(real: Outcome, control: Outcome) -> dict[str, Any]:
    """How alike the targets of a control are to those of the ablation; None where something is undefined.

    Returns:
        `n_shared` edges with `n_shared_same_sign` of their mean effects, `n_live_either` targets live in one or the
        other, `jaccard` (edges of both / of either), `jaccard_expected` of random sets of those sizes among the live
        targets of either, `expected_share` of the ablation's edges in such a set of the control's size, and
        `effect_cosine` of the mean effects.
    """
    shared = np.intersect1d(real.edges, control.edges, assume_unique=True)
    n_live = len(np.union1d(real.live, control.live))
    n_real, n_control = len(real.edges), len(control.edges)
    n_either = n_real + n_control - len(shared)
    norms = np.linalg.norm(real.mean) * np.linalg.norm(control.mean)
    return {
        "n_shared": len(shared),
        "n_shared_same_sign": int((np.sign(real.mean[shared]) == np.sign(control.mean[shared])).sum()),
        "n_live_either": n_live,
        "jaccard": len(shared) / n_either if n_either else None,
        "jaccard_expected": expected_jaccard(n_live, n_real, n_control),
        "expected_share": n_control / n_live if n_live else None,
        "effect_cosine": float(np.clip(real.mean @ control.mean / norms, -1, 1)) if norms else None,
        "reason": None if n_either and norms else NOTHING,
    }


def expected_jaccard(n: int, n_a: int, n_b: int) -> float | None:
    """Mean Jaccard index of two random sets of `n_a` and `n_b` among `n` things; None where both are empty.

    E[K / (n_a + n_b - K)],   K hypergeometric
    """
    if not n_a + n_b:
        return None
    k = np.arange(max(0, n_a + n_b - n), min(n_a, n_b) + 1)
    return float((hypergeom.pmf(k, n, n_a, n_b) * k / (n_a + n_b - k)).sum())


def specific_edges(real: Outcome, controls: Mapping[str, list[Outcome]]) -> dict[str, Any]:
    """How many edges of the ablation no draw of any control has, and how many if these had random edges.

    With enough draws random sets would cover everything, so the share means something beside `share_expected` only.
    """
    drawn = [draw for of_control in controls.values() for draw in of_control]
    covered = np.unique(np.concatenate([np.zeros(0, np.int64), *(draw.edges for draw in drawn)]))
    n_specific = len(np.setdiff1d(real.edges, covered, assume_unique=True))
    n_real = len(real.edges)
    shares = [len(draw.edges) / max(1, len(np.union1d(real.live, draw.live))) for draw in drawn]
    return {
        "n_edges": n_specific,
        "share": n_specific / n_real if n_real else None,
        "share_expected": float(np.prod([1 - share for share in shares])) if n_real else None,
        "reason": None if n_real else NOTHING,
    }
