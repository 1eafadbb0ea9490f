"""Are features of high degree annotated more or less often than others, and does frequency explain it."""

from collections.abc import Sequence
from math import erfc, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cellcircuits.degree_table import DegreeTable
from cellcircuits.matching import Rows, match, within_caliper
from cellcircuits.spline_models import (
    LEAST_P,
    Z95,
    FitError,
    likelihood_ratio_test,
    partial_rank_correlation,
    yes_no_model,
)

MIN_FEATURES = 40
MIN_PER_ANSWER = 20  # fewer do not carry a model with six coefficients
MIN_MATCHED = 5
N_GROUPS = 10
N_DRAWS = 2000

Floats = NDArray[np.float64]


def annotation_statistics(table: DegreeTable, caliper: float, seed: int) -> dict[str, Any]:
    """Annotated share by degree: of the top features, matched in frequency, in one model, and as an AUC.

    Args:
        table: features whose annotation is unknown are left out here.
        caliper: how far the log10 frequency of a match may lie.
        seed: of the matched draws.
    """
    known = ~np.isnan(table.is_annotated)
    rows = [row for row in table.by_degree().tolist() if known[row]]
    degrees, frequency = table.degrees[rows], table.frequency[rows]
    annotated = table.is_annotated[rows] == 1
    counted = {"n": len(rows), "n_annotated": int(annotated.sum()), "n_left_out": int((~known).sum())}
    reason = _too_plain(degrees, annotated)
    if reason:
        return {**counted, "result": None, "reason": reason}
    log_frequency = np.log10(frequency)
    result: dict[str, Any] = {
        "annotated_share": float(annotated.mean()),
        "annotated_share_interval": wilson(int(annotated.sum()), len(rows)),
        "deciles": _deciles(degrees, annotated, log_frequency),
        "top": {
            name: _top(degrees, annotated, log_frequency, k, (caliper, seed)) for name, k in _tops(len(rows)).items()
        },
        "rank_correlations": _rank_correlations(degrees, annotated, log_frequency),
        "logistic_model": _logistic(degrees, annotated, log_frequency),
        "auc_of_degree": auc(degrees[annotated].astype(np.float64), degrees[~annotated].astype(np.float64)),
    }
    return {**counted, "result": result}


def _too_plain(degrees: NDArray[np.int64], annotated: NDArray[np.bool_]) -> str | None:
    if len(degrees) < MIN_FEATURES:
        return f"fewer than {MIN_FEATURES} features whose annotation is known"
    if annotated.all() or not annotated.any():
        return f"{'every' if annotated.all() else 'no'} feature is annotated"
    return "all degrees are equal" if np.ptp(degrees) == 0 else None


def _tops(n: int) -> dict[str, int]:
    """How many features are at the top, by name; rows are in descending order of degree."""
    return {"top_20": 20, "top_1_percent": max(1, round(0.01 * n))}


def _top(
    degrees: NDArray[np.int64], annotated: NDArray[np.bool_], log_frequency: Floats, k: int, how: tuple[float, int]
) -> dict[str, Any]:
    """The `k` rows of highest degree, which come first, against all others and against matched ones."""
    if k < MIN_MATCHED or k > len(degrees) / 2:
        return {"k": k, "result": None, "reason": f"fewer than {MIN_MATCHED} features, or more than half of them"}
    hits, others = int(annotated[:k].sum()), int(annotated[k:].sum())
    tied = int((degrees == degrees[k - 1]).sum()) if degrees[k - 1] == degrees[k] else 0
    result = {
        "annotated_share": hits / k,
        "annotated_share_interval": wilson(hits, k),
        "others_annotated_share": others / (len(degrees) - k),
        "lowest_degree": int(degrees[k - 1]),
        "n_tied_at_the_cut": tied,  # which of them are in is then a matter of their index
        "fisher": fisher([[hits, k - hits], [others, len(degrees) - k - others]]),
        "matched": matched_share(annotated, log_frequency, k, *how),
    }
    return {"k": k, "result": result}


def fisher(table: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Fisher's exact test, two-sided, and the conditional odds ratio with its exact 95% interval.

    Args:
        table: ((annotated, not) of the top features, (annotated, not) of the others).
    """
    _, p = stats.fisher_exact(table)
    ratio = stats.contingency.odds_ratio(np.array(table))
    low, high = ratio.confidence_interval(0.95)
    odds, *interval = (float(x) if np.isfinite(x) else None for x in (ratio.statistic, low, high))
    tested = {"p": float(p), "odds_ratio": odds, "odds_ratio_interval": interval}
    return tested if None not in (odds, *interval) else {**tested, "reason": "a cell of the table is empty"}


def matched_share(
    annotated: NDArray[np.bool_], log_frequency: Floats, k: int, caliper: float, seed: int
) -> dict[str, Any]:
    """Annotated share of the first `k` features beside that of others that fire as often.

    A top feature is matched with one other within the caliper, no other serving twice; those without a match
    are left out. Expected is the mean over 2,000 random matchings. The p-value asks whether being at the
    top matters among features of the same frequency: every draw fills the place of each matched top feature
    with any feature within its caliper, top features included, and p is twice the smaller share of draws
    (each with + 1) that reach the observed number.

    Args:
        annotated: (n,), the top features first.
        log_frequency: (n,) log10; NaN where unknown.
        k: how many are at the top.
        caliper: in log10 units.
        seed: of the draws.
    """
    known = np.flatnonzero(~np.isnan(log_frequency))
    top, others = known[known < k], known[known >= k]
    found = match(within_caliper(log_frequency, top, others, caliper))
    pairs = [(who, row) for who, row in zip(top.tolist(), found, strict=True) if row is not None]
    counted = {"n_top": k, "n_matched": len(pairs), "caliper_log10": caliper}
    if len(pairs) < MIN_MATCHED:
        return {**counted, "p": None, "reason": f"fewer than {MIN_MATCHED} top features have a match"}
    matched = np.array([who for who, _ in pairs])
    rng = np.random.default_rng([seed, 3, k])
    controls, imbalance = _draws(annotated, log_frequency, (matched, others, caliper), rng)
    everyone = np.sort(np.concatenate([matched, others]))
    shuffled, _ = _draws(annotated, log_frequency, (matched, everyone, caliper), rng)
    observed = int(annotated[matched].sum())
    tails = [1 + int((shuffled >= observed).sum()), 1 + int((shuffled <= observed).sum())]
    return {
        **counted,
        "n_draws": N_DRAWS,
        "observed_share": observed / len(pairs),
        "expected_share": float(controls.mean() / len(pairs)),
        "expected_range": (np.percentile(controls, (2.5, 97.5)) / len(pairs)).tolist(),
        "mean_log10_frequency_above_matches": imbalance,
        "p": min(1.0, 2.0 * min(tails) / (N_DRAWS + 1)),
    }


def _draws(
    annotated: NDArray[np.bool_], log_frequency: Floats, what: tuple[Rows, Rows, float], rng: np.random.Generator
) -> tuple[NDArray[np.int64], float]:
    """Annotated features in each random matching, (N_DRAWS,), and how far the matches lie below in log10 frequency."""
    rows, among, caliper = what
    candidates = within_caliper(log_frequency, rows, among, caliper)
    counts, below = np.empty(N_DRAWS, dtype=np.int64), 0.0
    for i in range(N_DRAWS):
        drawn = np.array(match(candidates, rng), dtype=np.int64)  # everyone finds one, as in the fixed matching
        counts[i] = annotated[drawn].sum()
        below += float(np.mean(log_frequency[rows] - log_frequency[drawn]))
    return counts, below / N_DRAWS


def _deciles(degrees: NDArray[np.int64], annotated: NDArray[np.bool_], log_frequency: Floats) -> list[dict[str, Any]]:
    """Annotated share in ten groups from the highest degree down, and what frequency alone lets expect."""
    expected = _expected_from_frequency(annotated, log_frequency)
    groups = []
    for rows in np.array_split(np.arange(len(degrees)), N_GROUPS):
        hits = int(annotated[rows].sum())
        here = expected[rows]
        groups.append(
            {
                "ranks": [int(rows[0]) + 1, int(rows[-1]) + 1],
                "degrees": [int(degrees[rows].min()), int(degrees[rows].max())],
                "annotated_share": hits / len(rows),
                "interval": wilson(hits, len(rows)),
                "expected_share_by_frequency": None if np.isnan(here).any() else float(here.mean()),
            }
        )
    return groups


def _expected_from_frequency(annotated: NDArray[np.bool_], log_frequency: Floats) -> Floats:
    """Probability to be annotated given frequency alone, (n,); NaN where it is not to be had."""
    expected = np.full(len(annotated), np.nan)
    known = ~np.isnan(log_frequency)
    if _few_answers(annotated[known]) is None:
        try:
            model = yes_no_model(annotated[known].astype(np.float64), {"frequency": log_frequency[known]})
        except FitError:
            return expected
        expected[known] = model.fitted.fittedvalues
    return expected


def _rank_correlations(degrees: NDArray[np.int64], annotated: NDArray[np.bool_], log_frequency: Floats) -> Any:
    known = ~np.isnan(log_frequency)
    x, y = degrees.astype(np.float64), annotated.astype(np.float64)
    given = partial_rank_correlation(x[known], y[known], [log_frequency[known]])
    return {"degree_with_annotated": partial_rank_correlation(x, y), "given_frequency": given}


def _few_answers(annotated: NDArray[np.bool_]) -> str | None:
    if min(annotated.sum(), (~annotated).sum()) < MIN_PER_ANSWER:
        return f"fewer than {MIN_PER_ANSWER} annotated or unannotated features of known frequency"
    return None


def _logistic(degrees: NDArray[np.int64], annotated: NDArray[np.bool_], log_frequency: Floats) -> dict[str, Any]:
    """Annotated on splines of log frequency and log (1 + degree), and what each adds to the other."""
    known = ~np.isnan(log_frequency)
    reason = _few_answers(annotated[known])
    if reason:
        return {"n": int(known.sum()), "result": None, "reason": reason}
    answers = annotated[known].astype(np.float64)
    predictors = {"frequency": log_frequency[known], "degree": np.log1p(degrees[known])}
    try:
        full = yes_no_model(answers, predictors)
        alone = {name: yes_no_model(answers, {name: values}) for name, values in predictors.items()}
    except FitError as error:
        return {"n": int(known.sum()), "result": None, "reason": str(error)}
    result = {
        "frequency_given_degree": likelihood_ratio_test(full, alone["degree"]),
        "degree_given_frequency": likelihood_ratio_test(full, alone["frequency"]),
        "deviance_explained": 1.0 - float(full.fitted.deviance / full.fitted.null_deviance),
    }
    return {"n": int(known.sum()), "result": result}


def wilson(hits: int, n: int) -> list[float]:
    """Wilson's 95% interval of a share."""
    interval = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def auc(positive: Floats, negative: Floats) -> dict[str, Any]:
    """Chance that one drawn from `positive` is above one drawn from `negative`, ties counting half.

    Source: DeLong, DeLong and Clarke-Pearson (1988), Biometrics 44, for the interval and the test against 1/2.
    """
    n, m = len(positive), len(negative)
    if min(n, m) < 2:
        return {"n": [n, m], "auc": None, "p": None, "reason": "fewer than two features on one side"}
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    above = (ranks[:n] - stats.rankdata(positive)) / m  # share of `negative` below each of `positive`
    below = 1.0 - (ranks[n:] - stats.rankdata(negative)) / n
    area = float(above.mean())
    error = sqrt(float(above.var(ddof=1) / n + below.var(ddof=1) / m))
    if error < 1e-12:
        reason = "one side lies wholly above the other, or all are equal"
        return {"n": [n, m], "auc": area, "interval": None, "p": None, "reason": reason}
    interval = [max(0.0, area - Z95 * error), min(1.0, area + Z95 * error)]
    return {
        "n": [n, m],
        "auc": area,
        "interval": interval,
        "p": max(LEAST_P, erfc(abs(area - 0.5) / error / sqrt(2.0))),
    }
