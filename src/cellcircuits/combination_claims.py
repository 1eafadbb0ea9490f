"""The claims about removing features together: redundancy, its order, synergy, pathways."""

import statistics

import numpy as np

from cellcircuits.claim import FAILS, HOLDS, OPEN, Claim, Finding, against, not_measured, resampled
from cellcircuits.collected import PAIRS, TRIPLETS
from cellcircuits.kept_results import Document, Results
from cellcircuits.wording import count, decimal, fixed, percent, with_interval

MIN_INDEX = 0.1
MIN_DEEPER = 0.05
MAX_SYNERGY = 0.001
MAX_Q = 0.05
FILE, SCRIPT = "additivity.json", "higher_order_ablation.py"
INDEX = "redundancy_index"
SAME = "same_pathway"
MIN_COMBINATIONS = 3


def _indices(document: Document, *kinds: str) -> list[float]:
    """Redundancy indices of the combinations of these kinds, all of them without one."""
    rows = [row for row in document.parts("combinations") if not kinds or row.get("kind") in kinds]
    return [value for row in rows if (value := row.maybe(INDEX)) is not None]


def _ratios(document: Document) -> str:
    """The published ratio, and what exactly additive effects would give, medians over the combinations."""
    keys = ("published_ratio", "published_ratio_if_additive")
    rows = [[row.maybe(key) for key in keys] for row in document.parts("combinations")]
    known = [row for row in rows if None not in row]
    if not known:
        return "no published ratio"
    ratio, additive = (decimal(statistics.median(column)) for column in zip(*known, strict=True))
    return f"published ratio {ratio}, exactly additive effects give {additive}"


def _pairs(results: Results) -> Finding:
    document = results.maybe(PAIRS, FILE)
    if document is None:
        return not_measured(f"{PAIRS}/{FILE}", SCRIPT)
    indices = _indices(document)
    if len(indices) < MIN_COMBINATIONS:
        return Finding(_ratios(document), OPEN, reason=f"only {len(indices)} pairs with a redundancy index")
    found = resampled([indices], lambda x: np.median(x[0], axis=-1))
    ours = f"{len(indices)} pairs: {_ratios(document)}; redundancy index {with_interval(*found, fixed)}, 0 is additive"
    verdict = against(found[1], found[2], MIN_INDEX)
    return Finding(ours, verdict, *found, "" if verdict != OPEN else f"the interval contains {MIN_INDEX}")


def _triplets(results: Results) -> Finding:
    document = results.maybe(TRIPLETS, FILE)
    if document is None:
        return not_measured(f"{TRIPLETS}/{FILE}", SCRIPT)
    deeper = []
    for row in document.parts("combinations"):
        inside = [row.maybe("conditions", pair, INDEX) for pair in ("AB", "AC", "BC")]
        if row.maybe(INDEX) is not None and None not in inside:
            deeper.append(row.number(INDEX) - statistics.fmean(inside))
    if len(deeper) < MIN_COMBINATIONS:
        return Finding(_ratios(document), OPEN, reason=f"only {len(deeper)} triplets with redundancy indices")
    found = resampled([deeper], lambda x: np.median(x[0], axis=-1))
    ours = f"{len(deeper)} triplets: {_ratios(document)}; redundancy index of triplets minus that of their pairs "
    verdict = against(found[1], found[2], MIN_DEEPER)
    reason = "" if verdict != OPEN else f"the interval contains {MIN_DEEPER}"
    return Finding(ours + with_interval(*found, fixed), verdict, *found, reason)


def _synergy(results: Results) -> Finding:
    from scipy.stats import binomtest

    documents = [found for folder in (PAIRS, TRIPLETS) if (found := results.maybe(folder, FILE)) is not None]
    if not documents:
        return not_measured(FILE, SCRIPT)
    n_tests, n_called, n_synergy = (
        int(sum(document.number("family", key) for document in documents))
        for key in ("n_tests", "n_interactions", "n_synergy")
    )
    if not 0 <= n_synergy <= n_called <= n_tests or not n_tests:
        return Finding("no interaction was tested", OPEN, reason="no live target")
    interval = binomtest(n_synergy, n_tests).proportion_ci(0.95, "exact")
    share, low, high = n_synergy / n_tests, float(interval.low), float(interval.high)
    ours = f"{count(n_synergy)} synergies of {count(n_tests)} tests ({count(n_called)} interactions); at most "
    ours += f"{percent(high)} with 95% confidence"
    if n_synergy > MAX_Q * n_called:
        return Finding(ours, FAILS, share, low, high)
    if not n_synergy and high < MAX_SYNERGY:
        return Finding(ours, HOLDS, share, low, high)
    return Finding(ours, OPEN, share, low, high, "no more than false discoveries, but the bound is too wide")


def _pathways(results: Results) -> Finding:
    document = results.maybe(PAIRS, FILE)
    if document is None:
        return not_measured(f"{PAIRS}/{FILE}", SCRIPT)
    same, others = _indices(document, SAME), _indices(document, "cross_pathway", "random")
    if min(len(same), len(others)) < MIN_COMBINATIONS:
        reason = f"{len(same)} pairs of one pathway, {len(others)} others"
        return Finding("no comparison", OPEN, reason=reason)
    found = resampled([same, others], lambda x: np.median(x[0], axis=-1) - np.median(x[1], axis=-1))
    ours = f"redundancy index of {len(same)} pairs of one pathway minus that of {len(others)} others: "
    p = document.maybe("class_effect", "p")
    tested = f"; permutation p {p:.2g} on disjoint pairs" if p is not None else ""
    verdict = HOLDS if found[1] > 0 else FAILS if found[2] < MIN_INDEX else OPEN
    reason = "" if verdict != OPEN else f"the interval contains 0 and {MIN_INDEX}"
    return Finding(ours + with_interval(*found, fixed) + tested, verdict, *found, reason)


CLAIMS = (
    Claim(
        "Pairs",
        "redundant pairs",
        "Two features removed together do much less than the sum: redundancy",
        "ratio {pair_ratio:.2f}; additive, independent, equal effects give {additive_pair_ratio:.2f}",
        "experiment 2, pairs",
        "exactly additive effects of the same cells; the interval resamples the pairs",
        f"holds where the joint effect is smaller by at least {MIN_INDEX} of the sum, whole interval; fails below",
        _pairs,
    ),
    Claim(
        "Triplets",
        "redundancy deepens",
        "Redundancy deepens with order",
        "ratio {pair_ratio:.2f} of pairs, {triplet_ratio:.2f} of triplets; additive, independent, equal effects give "
        "{additive_pair_ratio:.2f} and {additive_triplet_ratio:.2f}",
        "experiment 2, triplets",
        "the pairs inside the same triplets; the interval resamples the triplets",
        f"holds where the index of a triplet exceeds that of its pairs by {MIN_DEEPER}, whole interval; fails below",
        _triplets,
    ),
    Claim(
        "Synergy",
        "no synergy",
        "There is no synergy at any order",
        "{n_superadditive_claimed} in the text, {n_superadditive} superadditive targets in its own file; the revision "
        "finds {revision_n_superadditive} of {revision_n_triplet_targets:,}",
        "experiment 2, pairs and triplets",
        "interactions of zero: signs flipped cell by cell, corrected over all tests",
        f"fails where more are called than false discoveries at q {MAX_Q}; holds where none is and the bound is below "
        f"{percent(MAX_SYNERGY)}",
        _synergy,
    ),
    Claim(
        "Pathways",
        "pathways store copies",
        "Pathways store copies: redundancy is higher within one",
        "ratio {triplet_ratio:.2f} within, {triplet_ratio_cross:.2f} across; the revision finds "
        "{revision_triplet_ratio:.2f} for random triplets as well",
        "experiment 2, pairs of one pathway, of two, and random ones",
        "pairs across pathways and random ones; the interval resamples the pairs",
        f"holds where pairs of one pathway have the higher index, interval above 0; fails where below {MIN_INDEX}",
        _pathways,
    ),
)
