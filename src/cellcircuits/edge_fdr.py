"""Error rates of a whole graph from the counts that each feature left: q values, and the null of the edge rule.

Family: every live (feature, target layer, target) triple of the folder.
"""

import base64
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

from cellcircuits.stats import EdgeRule

MAX_Q = 0.05
N_STRATA = 5
N_HUBS = 20
SWEEP_D = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0)
SWEEP_CONSISTENCY = (0.6, 0.7, 0.8, 0.9, 0.9999)  # the last stands for all cells
INTERVAL = (2.5, 97.5)
FEW_DRAWS = 20  # that reach a sum as large: such a p is off by a quarter from one seed to the next


@dataclass(frozen=True)
class CalibrationSettings:
    """How edges are tested; part of what determines the numbers of a run.

    Attributes:
        seed: of the sign vectors, with source layer and feature, and of the resampled cells.
        n_draws: sign vectors for features with more than 12 active cells; fewer cells have all.
        n_sweep: of these, how many the table of thresholds uses.
        n_resamples: bootstrap samples of the run's cells.
        n_flips_per_resample: sign vectors for each.
        min_cells: cells in which a feature must be active for its degree to count.
    """

    seed: int = 0
    n_draws: int = 10_000
    n_sweep: int = 512
    n_resamples: int = 200
    n_flips_per_resample: int = 10
    min_cells: int = 8

    def record(self) -> dict[str, int]:
        """For the settings of a run."""
        return asdict(self)


def packed(numerators: NDArray[np.int64], denominator: int) -> dict[str, Any]:
    """Fractions with one denominator as a small JSON value."""
    text = base64.b64encode(zlib.compress(numerators.astype("<i4").tobytes())).decode()
    return {"denominator": denominator, "numerators": text}


def unpacked(content: Mapping[str, Any]) -> tuple[NDArray[np.int64], int]:
    """What `packed` took."""
    raw = zlib.decompress(base64.b64decode(content["numerators"]))
    return np.frombuffer(raw, "<i4").astype(np.int64), content["denominator"]


class PCounts:
    """How many live triples have which sign-flip p; p are fractions with few denominators, so counts say it all."""

    def __init__(self) -> None:
        """None yet."""
        self._counts: dict[int, NDArray[np.int64]] = {}  # denominator -> counts of numerators 0 ... denominator

    def add(self, denominator: int, numerators: NDArray[np.int64]) -> None:
        """Count triples with p = numerators / denominator."""
        so_far = self._counts.setdefault(denominator, np.zeros(denominator + 1, dtype=np.int64))
        so_far += np.bincount(numerators, minlength=denominator + 1)

    def q_values(self) -> "QValues":
        """The q value of every p that occurs."""
        found = [(denominator, np.flatnonzero(counts)) for denominator, counts in self._counts.items()]
        p = np.concatenate([np.zeros(0), *(numerators / denominator for denominator, numerators in found)])
        counts = np.concatenate([np.zeros(0, np.int64), *(self._counts[d][numerators] for d, numerators in found)])
        order = np.argsort(p, kind="stable")
        p, counts = p[order], counts[order]
        n_tests, rank = int(counts.sum()), np.cumsum(counts)
        step_up = np.minimum.accumulate((p * n_tests / rank)[::-1])[::-1]
        strictness = digamma(n_tests + 1) + np.euler_gamma  # 1 + 1/2 + ... + 1/n_tests
        smallest = 1 / max(self._counts) if self._counts else None
        return QValues(p, counts, np.minimum(step_up, 1), np.minimum(step_up * strictness, 1), smallest)


@dataclass(frozen=True)
class QValues:
    """q of every p that occurs in the family, ascending: by Benjamini-Hochberg and by Benjamini-Yekutieli.

    `smallest_p` that any test could have had, whether one has it or not; None without tests.
    """

    p: NDArray[np.float64]
    counts: NDArray[np.int64]
    bh: NDArray[np.float64]
    by: NDArray[np.float64]
    smallest_p: float | None

    def of(self, p: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The two q values of tests of the family."""
        # equal fractions with other denominators may differ in the last bit: the nearest one is meant
        at = np.clip(np.searchsorted(self.p, p * (1 - 1e-12)), 0, max(0, len(self.p) - 1))
        return (self.bh[at], self.by[at]) if len(self.p) else (np.zeros(0), np.zeros(0))


def resolution(q_values: QValues) -> dict[str, float | int | None]:
    """How many tests must reach the smallest p that there is, for any of them to be called."""
    smallest, n_tests = q_values.smallest_p, int(q_values.counts.sum())
    needed = None if smallest is None else max(1, math.ceil(n_tests * smallest / MAX_Q))
    return {"smallest_p": smallest, "n_needed_at_smallest_p": needed}


def none_called(tested: Mapping[str, Any]) -> str:
    """Why no test of a family is called, from its `n_tests` and `resolution`."""
    needed, smallest = tested["n_needed_at_smallest_p"], tested["smallest_p"]
    if needed > tested["n_tests"]:
        return f"none could be called, since no p of so few cells is below {smallest:.2g}"
    return f"{needed} with the smallest p, {smallest:.2g}, would be needed"


@dataclass(frozen=True)
class Family:
    """What decides which edges of a graph are calibrated.

    `q_values` over the whole graph, `rule` the thresholds, which Hedges' g and the consistency over the cells where a
    target changes must pass too, `min_cells` cells in which the feature must be active.
    """

    q_values: QValues
    rule: EdgeRule
    min_cells: int

    def columns(
        self, p: NDArray, hedges_g: NDArray, consistency: NDArray, n_cells: NDArray
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Q by Benjamini-Hochberg, by Benjamini-Yekutieli, and which are calibrated, of edges: (n_edges,) each."""
        q_bh, q_by = self.q_values.of(p)
        passes = (np.abs(hedges_g) > self.rule.min_abs_d) & (consistency > self.rule.min_consistency)
        return q_bh, q_by, passes & (q_bh < MAX_Q) & (n_cells >= self.min_cells)


def false_discovery_rate(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Edges expected under the null over edges called, for some features, with a bootstrap interval over cells.

    A resample repeats cells, which makes chance edges more frequent in data and null alike; so the resamples give the
    spread of the rate on a log scale, and the rate itself its centre.

    Args:
        features: facts with `n_edges` and the counts of `FeatureCalibration`.
    """
    observed = sum(facts["n_edges"] for facts in features)
    null = float(sum(facts["calibration"]["null_edges"] for facts in features))
    rate = null / observed if observed else None
    edges, null_edges = (
        np.sum([facts["calibration"][key] for facts in features], axis=0) if features else np.zeros(0)
        for key in ("resampled_edges", "resampled_null_edges")
    )
    low = high = None
    usable = (edges > 0) & (null_edges > 0)
    if rate and usable.any():
        logs = np.log(null_edges[usable] / edges[usable])
        low, high = (float(rate * np.exp(end)) for end in np.percentile(logs - logs.mean(), INTERVAL))
    return {
        "n_features": len(features),
        "observed_edges": observed,
        "expected_null_edges": null,
        "fdr": rate,
        "fdr_low": low,
        "fdr_high": high,
        "n_resamples": int(usable.sum()),
    }


def by_degree(features: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`false_discovery_rate` in strata of features with similar degree, from few edges to many."""
    ordered = sorted((facts for facts in features if facts["n_edges"]), key=lambda facts: facts["n_edges"])
    strata: Iterable[NDArray] = np.array_split(np.arange(len(ordered)), min(N_STRATA, len(ordered))) if ordered else ()
    rows = []
    for stratum in strata:
        chosen = [ordered[i] for i in stratum]
        degrees = {"min_degree": chosen[0]["n_edges"], "max_degree": chosen[-1]["n_edges"]}
        rows.append(degrees | false_discovery_rate(chosen))
    return rows


def sweep_table(features: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Edges, edges expected under the null, and their ratio, for every pair of thresholds."""
    observed, null = (
        np.sum([facts["calibration"][key] for facts in features], axis=0) if features else np.zeros((0, 0))
        for key in ("sweep_edges", "sweep_null_edges")
    )
    return [
        {
            "min_abs_d": SWEEP_D[i],
            "min_consistency": SWEEP_CONSISTENCY[j],
            "edges": int(observed[i, j]),
            "expected_null_edges": float(null[i, j]),
            "fdr": float(null[i, j] / observed[i, j]) if observed[i, j] else None,
        }
        for i, j in np.ndindex(observed.shape)
    ]


DEFINITIONS = {
    "p_sign_flip": "two-sided: share of sign vectors over the cells whose |sum of effects| is at least the observed "
    "one; all vectors for up to 12 cells, else n_draws drawn ones with one added to both counts",
    "family": "every live (feature, target layer, target) triple of this folder; a target is live where the removal "
    "changes it in at least one cell",
    "expected_null_edges": "edges of the published rule, averaged over the sign vectors",
    "fdr": "expected_null_edges / observed_edges; the interval is 95%, by resampling the run's cells",
    "calibrated": "q_bh < 0.05, |Hedges' g| above the |d| threshold, consistency over the cells where the target "
    "changes above its threshold, and a feature active in at least min_cells cells",
}


def graph_calibration(
    features: Sequence[Mapping[str, Any]], q_values: QValues, settings: CalibrationSettings
) -> dict[str, Any]:
    """The content of `calibration.json`.

    Args:
        features: facts of every traced feature, with `n_edges`, `n_edges_bh`, `degree_calibrated`, `n_cells_active`.
        q_values: of the whole graph.
        settings: of the tests.
    """
    top, kept = (
        {facts["feature_idx"] for facts in sorted(features, key=lambda x: (-(x[key] or 0), x["feature_idx"]))[:N_HUBS]}
        & {facts["feature_idx"] for facts in features if facts[key]}  # without any edge it is no hub
        for key in ("n_edges", "degree_calibrated")
    )
    called = q_values.p[q_values.bh < MAX_Q]
    tests = [facts["calibration"] for facts in features]
    return {
        "settings": settings.record(),
        "definitions": DEFINITIONS,
        "n_tests": int(q_values.counts.sum()),
        "n_tests_drawn": sum(x["n_live_targets"] for x in tests if x["p"]["denominator"] == settings.n_draws + 1),
        "n_tests_bh": int(q_values.counts[q_values.bh < MAX_Q].sum()),
        "n_tests_by": int(q_values.counts[q_values.by < MAX_Q].sum()),
        "largest_p_bh": float(called[-1]) if len(called) else None,
        **resolution(q_values),
        "n_edges": sum(facts["n_edges"] for facts in features),
        "n_edges_bh": sum(facts["n_edges_bh"] for facts in features),
        "n_edges_calibrated": sum(facts["degree_calibrated"] or 0 for facts in features),
        "n_features": len(features),
        "n_features_under_min_cells": sum(facts["n_cells_active"] < settings.min_cells for facts in features),
        "n_hubs": len(top),
        "n_hubs_kept": len(top & kept),
        "published_rule": false_discovery_rate(features),
        "published_rule_by_degree": by_degree(features),
        "sweep": sweep_table(features),
    }


def calibration_lines(content: Mapping[str, Any]) -> Iterable[str]:
    """`calibration.json` in lines for the terminal."""
    rule, n_edges = content["published_rule"], content["n_edges"]
    if not n_edges:
        return
    share = 100 * content["n_edges_calibrated"] / n_edges
    interval = f" ({100 * rule['fdr_low']:.1f} to {100 * rule['fdr_high']:.1f}%)" if rule["fdr_low"] is not None else ""
    yield "  how far to trust these edges (calibration.json)"
    yield (
        f"    with the signs of the effects flipped at random the rule still calls {rule['expected_null_edges']:.0f} "
        f"edges, for {n_edges} here: {100 * rule['fdr']:.1f}%{interval} of them are expected by chance"
    )
    for stratum in (content["published_rule_by_degree"][0], content["published_rule_by_degree"][-1]):
        yield (
            f"    of features with {stratum['min_degree']} to {stratum['max_degree']} edges it calls "
            f"{100 * stratum['fdr']:.1f}% by chance"
        )
    yield (
        f"    {content['n_edges_bh']} edges pass a test at a false discovery rate of 5% over {content['n_tests']} "
        f"tests, {content['n_edges_calibrated']} ({share:.0f}%) also by the size and sign of their effect"
    )
    yield from _resolution_lines(content)
    if content["n_hubs"] < content["n_features"]:  # else any that keeps an edge stays
        yield f"    {content['n_hubs_kept']} of the {content['n_hubs']} features with most edges stay among them then"
    if content["n_features_under_min_cells"]:
        yield (
            f"    {content['n_features_under_min_cells']} features are active in fewer than "
            f"{content['settings']['min_cells']} cells: too few to say how many edges they have"
        )


def _resolution_lines(content: Mapping[str, Any]) -> Iterable[str]:
    """Where the p are too coarse for the number of tests that pass to mean much."""
    largest, step = content["largest_p_bh"], 1 / (content["settings"]["n_draws"] + 1)
    if largest is None:
        yield f"    none passes: {none_called(content)}"
    elif content["n_tests_drawn"] and largest < FEW_DRAWS * step:
        yield (
            f"    only p up to {largest:.2g} pass, and p of drawn signs come in steps of {step:.2g}: with another seed "
            "other tests pass, and another number; take more --sign-flips"
        )
