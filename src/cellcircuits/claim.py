"""What a claim is, and what a run says about it. Verdicts follow rules that stand beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellcircuits.kept_results import Results

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be said here"
N_RESAMPLES, N_AT_ONCE = 2000, 200
SEED = 0


class PublishedFacts(dict[str, float]):
    """The published figures by name, read when a template asks for one."""

    def __init__(self, results: Results) -> None:
        """Take where to read them."""
        super().__init__()
        self._results = results

    def __missing__(self, name: str) -> float:
        """The figure; raises UserError where there is none of that name."""
        return self._results.published(name)


@dataclass(frozen=True)
class Finding:
    """What the results of one run say about a claim.

    Attributes:
        ours: in words, with the numbers.
        verdict: HOLDS, FAILS or OPEN.
        estimate: the number that the verdict rests on, with its 95% interval; None where it is not measured.
        reason: why nothing can be said, or what the verdict rests on; empty where `ours` says it.
    """

    ours: str
    verdict: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Claim:
    """One claim of the published study.

    Attributes:
        name: for files and macros: letters only.
        short: in a few words, for a terminal and for pictures.
        claim: the sentence.
        published: what the study says, as a template of the names in the file of published figures.
        needs: what has to be run to judge it.
        null: what it is held against.
        rule: what the verdict depends on.
        find: reads the results.
    """

    name: str
    short: str
    claim: str
    published: str
    needs: str
    null: str
    rule: str
    find: Callable[[Results], Finding]

    def judged(self, results: Results) -> dict[str, Any]:
        """The claim's row, for JSON.

        Raises:
            UserError: a result is missing or malformed.
        """
        found = self.find(results)
        return {
            "name": self.name,
            "short": self.short,
            "claim": self.claim,
            "published": self.published.format_map(PublishedFacts(results)),
            "needs": self.needs,
            "null": self.null,
            "rule": self.rule,
            "ours": found.ours,
            "estimate": found.estimate,
            "estimate_low": found.low,
            "estimate_high": found.high,
            "verdict": found.verdict,
            "reason": found.reason or None,
        }


def not_measured(file: str, script: str) -> Finding:
    """The finding where an analysis was not run."""
    return Finding("not measured", OPEN, reason=f"{file} is absent; {script} makes it")


def against(low: float | None, high: float | None, threshold: float) -> str:
    """HOLDS where the interval lies above the threshold, FAILS where below, OPEN where it contains it or is missing."""
    if low is None or high is None or low <= threshold <= high:
        return OPEN
    return HOLDS if low > threshold else FAILS


def resampled(
    samples: Sequence[Sequence[float]], statistic: Callable[[Sequence[NDArray[np.float64]]], NDArray[np.float64]]
) -> tuple[float, float, float]:
    """A statistic of independent samples, with its 95% percentile interval over resamples of each.

    Args:
        samples: each of at least one number.
        statistic: of the samples, or of resamples of the same sizes: it is given arrays of shape (..., n) and reduces
            their last axis.
    """
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    rng = np.random.default_rng(np.random.SeedSequence([SEED, *map(len, arrays)]))
    drawn = [
        statistic([array[rng.integers(len(array), size=(N_AT_ONCE, len(array)))] for array in arrays])
        for _ in range(N_RESAMPLES // N_AT_ONCE)
    ]
    low, high = np.percentile(np.concatenate(drawn), (2.5, 97.5)).tolist()
    return float(statistic(arrays)), low, high


def proportion_interval(n_of: int, n: int) -> tuple[float, float]:
    """95% interval of a share by Wilson's score, which stays inside 0 to 1 for few observations."""
    from scipy.stats import binomtest

    found = binomtest(n_of, n).proportion_ci(0.95, "wilson")
    return float(found.low), float(found.high)
