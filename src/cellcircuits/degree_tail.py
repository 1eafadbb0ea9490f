"""Is the degree distribution a power law: its tail, what else describes the tail, and the whole of it.

A power law chooses where its tail begins, and then speaks of that tail only; so the whole distribution is
compared as well. The fit of the tail is igraph's (plfit), the alternatives are those of `count_models`.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, erfc, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from cellcircuits import count_models
from cellcircuits.count_models import CountFit, CountModel

MIN_FEATURES = 50
MIN_DISTINCT = 10
FEW_IN_TAIL = 50
REJECTED_BELOW = 0.1
FAVOURED_BELOW = 0.1
LEAST_PRECISE = 0.5  # igraph computes a p-value whenever it fits; this asks for a single draw
ROUND_PRECISION, DRAWS_PER_ROUND = 0.1, 25  # a signal waits until igraph returns, so it is asked for rounds
N_CURVE_POINTS = 48
FORMS = {
    "power_law": "a power law",
    "lognormal": "a lognormal",
    "exponential": "an exponential",
    "stretched_exponential": "a stretched exponential",
    "power_law_with_cutoff": "a power law with a cut-off",
    "negative_binomial": "a negative binomial",
}


@dataclass(frozen=True)
class Tallied:
    """Degrees from `first` on: distinct `values` and their `counts`, both (n_values,)."""

    first: int
    values: NDArray[np.float64]
    counts: NDArray[np.float64]

    @classmethod
    def of(cls, degrees: NDArray[np.int64], first: int) -> "Tallied":
        """Tally the degrees that are at least `first`."""
        values, counts = np.unique(degrees[degrees >= first], return_counts=True)
        return cls(first, values.astype(np.float64), counts.astype(np.float64))

    @property
    def n(self) -> int:
        """Number of features."""
        return int(self.counts.sum())

    def mean(self, values: NDArray[np.float64]) -> float:
        """Mean over features of a quantity given per distinct degree."""
        return float(np.dot(self.counts, values) / self.counts.sum())

    def models(self) -> list[CountModel]:
        """The families to fit, started where these degrees lie."""
        mean, mean_log = self.mean(self.values), self.mean(np.log(self.values))
        return [
            count_models.power_law(self.first),
            count_models.lognormal(self.first, mean_log),
            count_models.exponential(self.first, mean),
            count_models.stretched_exponential(self.first, mean_log),
            count_models.power_law_with_cutoff(self.first, mean),
        ]


def tail_statistics(degrees: NDArray[np.int64], p_precision: float, n_bootstrap: int, seed: int) -> dict[str, Any]:
    """Fit a power law to the tail of the degrees above 0 and compare what else could describe that tail.

    Args:
        degrees: (n_features,).
        p_precision: of the goodness-of-fit p, at most 0.1; 0.25 / p_precision^2 data sets are drawn and fitted.
        n_bootstrap: resamples of the features for the interval of alpha and x_min.
        seed: of both.

    Source: Clauset, Shalizi and Newman (2009), SIAM Review 51; Vuong (1989), Econometrica 57.
    """
    positive = np.sort(degrees[degrees > 0])
    reason = too_plain(positive)
    if reason:
        return {"n": len(positive), "result": None, "reason": reason}
    fitted, hits, draws = _fit_with_draws(positive, p_precision, seed)
    tail = Tallied.of(positive, int(fitted.xmin))
    if len(tail.values) < 2:
        return {"n": len(positive), "result": None, "reason": "the best tail holds one degree only"}
    reference, *others = [count_models.fit(model, tail.values, tail.counts) for model in tail.models()]
    power_law = {
        "alpha": float(fitted.alpha),
        "x_min": tail.first,
        "n_tail": tail.n,
        "share_of_features": tail.n / len(degrees),
        "ks_distance": float(fitted.D),
        "p": (1 + hits) / (1 + draws),
        "p_draws": draws,
        "log_likelihood": float(fitted.L),
        "aic": 2.0 - 2.0 * float(fitted.L),
        **_bootstrap(positive, n_bootstrap, seed),
    }
    alternatives = [_compared(tail, reference, other) for other in others]
    result = {
        "power_law": power_law,
        "alternatives": alternatives,
        "curves": _curves(tail, [reference, *others]),
        "verdict": _tail_verdict(power_law, alternatives, len(degrees)),
    }
    return {"n": len(positive), "result": result}


def whole_distribution(degrees: NDArray[np.int64]) -> dict[str, Any]:
    """Every family fitted to all degrees of at least 1; zeros are a share of their own, the same for all.

    Args:
        degrees: (n_features,).

    Returns:
        The fits by ascending AIC, and a sentence.
    """
    reason = too_plain(degrees[degrees > 0])
    counted = {"n": int((degrees > 0).sum()), "n_zero": int((degrees == 0).sum())}
    if reason:
        return {**counted, "result": None, "reason": reason}
    whole = Tallied.of(degrees, 1)
    models = [*whole.models(), count_models.negative_binomial(1, whole.mean(whole.values))]
    fits = sorted((count_models.fit(model, whole.values, whole.counts) for model in models), key=lambda fit: fit.aic)
    best = next((fit for fit in fits if fit.converged), None)
    table = [
        {
            **_described(fit),
            "n_parameters": len(fit.theta),
            "aic_above_best": fit.aic - best.aic if best and fit.converged else None,
            "ks_distance": _ks_distance(whole, fit),
        }
        for fit in fits
    ]
    result = {"models": table, "curves": _curves(whole, fits), "verdict": _whole_verdict(table, counted["n"])}
    return {**counted, "result": result}


def too_plain(positive: NDArray[np.int64]) -> str | None:
    """Why no distribution can be fitted to these degrees above 0; None where it can."""
    if len(positive) < MIN_FEATURES:
        return f"fewer than {MIN_FEATURES} features with an edge"
    if len(np.unique(positive)) < MIN_DISTINCT:
        return f"fewer than {MIN_DISTINCT} distinct degrees above 0"
    return None


@contextmanager
def _seeded_igraph(seed: int) -> Iterator[None]:
    """Inside the `with`, igraph draws from a generator of this seed; afterwards from Python's own again.

    On one thread only: several would share the generator, in an order that no run repeats.
    """
    import igraph  # before its threads are limited

    igraph.set_random_number_generator(random.Random(seed))
    try:
        with threadpool_limits(1, user_api="openmp"):
            yield
    finally:
        igraph.set_random_number_generator(random)


def _fit_with_draws(positive: NDArray[np.int64], p_precision: float, seed: int) -> tuple[Any, int, int]:
    """The fit, how many drawn data sets lie as far from their own fit as these from theirs, and of how many."""
    n_rounds = ceil(round(0.25 / p_precision**2, 6) / DRAWS_PER_ROUND)
    hits = 0
    with _seeded_igraph(seed):
        for _ in tqdm(range(n_rounds), desc="draws for the tail", disable=None, leave=False):
            fitted = _igraph_fit(positive, ROUND_PRECISION)
            hits += round(fitted.p * DRAWS_PER_ROUND)
    return fitted, hits, n_rounds * DRAWS_PER_ROUND


def _igraph_fit(positive: NDArray[np.int64], p_precision: float) -> Any:
    import igraph

    return igraph.power_law_fit(positive.tolist(), method="discrete", p_precision=p_precision)


def _bootstrap(positive: NDArray[np.int64], n_bootstrap: int, seed: int) -> dict[str, Any]:
    """95% percentile intervals with the start of the tail chosen anew in every resample of the features."""
    rng = np.random.default_rng([seed, 1])
    alphas, starts = [], []
    with _seeded_igraph(seed):
        for _ in range(n_bootstrap):
            resample = rng.choice(positive, len(positive))
            if too_plain(resample) is None:
                fitted = _igraph_fit(resample, LEAST_PRECISE)
                alphas.append(fitted.alpha)
                starts.append(fitted.xmin)
    if len(alphas) < max(20, n_bootstrap // 2):
        return {"alpha_interval": None, "x_min_interval": None, "interval_reason": "too few resamples could be fitted"}
    return {
        "alpha_interval": np.percentile(alphas, (2.5, 97.5)).tolist(),
        "x_min_interval": np.percentile(starts, (2.5, 97.5)).tolist(),
        "n_resamples_fitted": len(alphas),
    }


def _described(fit: CountFit) -> dict[str, Any]:
    return {
        "name": fit.model.name,
        "parameters": fit.model.parameters(fit.theta),
        "log_likelihood": fit.log_likelihood,
        "aic": fit.aic,
        "converged": fit.converged,
        "limit": fit.limit,
    }


def _compared(tail: Tallied, reference: CountFit, other: CountFit) -> dict[str, Any]:
    """One alternative beside the power law on the same tail."""
    nested = other.model.name == "power_law_with_cutoff"
    compared = {**_described(other), "test": "likelihood_ratio" if nested else "vuong"}
    if not other.converged or not reference.converged:
        return {**compared, "statistic": None, "p": None, "favoured": None, "reason": "a fit did not converge"}
    if nested:
        ratio = max(0.0, 2.0 * (other.log_likelihood - reference.log_likelihood))
        p = 0.5 * float(stats.chi2.sf(ratio, 1)) if ratio > 0 else 1.0
        return {**compared, "statistic": ratio, "p": p, "favoured": other.model.name if p < FAVOURED_BELOW else None}
    difference = reference.log_likelihoods - other.log_likelihoods
    spread = sqrt(tail.mean((difference - tail.mean(difference)) ** 2))
    if spread < 1e-9:
        reason = "the two assign the same probabilities"
        return {**compared, "statistic": None, "p": None, "favoured": None, "reason": reason}
    z = float(sqrt(tail.n) * tail.mean(difference) / spread)
    p = erfc(abs(z) / sqrt(2.0))
    favoured = None if p >= FAVOURED_BELOW else "power_law" if z > 0 else other.model.name
    return {**compared, "statistic": z, "p": p, "favoured": favoured}


def _ks_distance(tallied: Tallied, fit: CountFit) -> float:
    """Largest difference between the fitted and the observed P(X >= x), over the observed degrees."""
    observed = np.cumsum(tallied.counts[::-1])[::-1] / tallied.n
    return float(np.abs(np.exp(fit.model.log_sf(tallied.values, fit.theta)) - observed).max())


def _curves(tallied: Tallied, fits: Iterable[CountFit]) -> dict[str, list[float]]:
    """P(X >= x) of every fit at log-spaced degrees, for the figure: among the degrees from `first` on."""
    degrees = np.unique(np.geomspace(tallied.first, tallied.values[-1], N_CURVE_POINTS).round())
    curves = {fit.model.name: np.exp(fit.model.log_sf(degrees, fit.theta)).tolist() for fit in fits}
    return {"degree": degrees.tolist(), **curves}


def _tail_verdict(power_law: Mapping[str, Any], others: Sequence[Mapping[str, Any]], n_features: int) -> str:
    n_tail, start, p = power_law["n_tail"], power_law["x_min"], power_law["p"]
    p_words = f"p {p:.2g}"
    tail = f"the {n_tail:,} features of degree {start:,} and above"
    elsewhere = 1.0 - power_law["share_of_features"]
    rest = f"it says nothing of the other {_percent(elsewhere)}" if elsewhere > 0 else "they are all of them"
    if p < REJECTED_BELOW:
        return f"No power law: even the tail that fits one best, {tail}, departs from it ({p_words})."
    if n_tail < FEW_IN_TAIL:
        return f"{tail[0].upper()}{tail[1:]} are too few to tell a power law ({p_words}) from anything else; {rest}."
    better = [FORMS[other["name"]] for other in others if other["favoured"] == other["name"]]
    same = [FORMS[other["name"]] for other in others if other["favoured"] is None and other["p"] is not None]
    verdict = f"A power law is compatible with {tail} ({p_words})"
    if better:
        return (
            f"{verdict}, but {_listed(better)} {'describes' if len(better) == 1 else 'describe'} them better; {rest}."
        )
    also = f", and so {'is' if len(same) == 1 else 'are'} {_listed(same)}" if same else ""
    return f"{verdict}{also}; {rest}."


def _whole_verdict(table: Sequence[Mapping[str, Any]], n: int) -> str:
    ranked = [entry for entry in table if entry["converged"]]
    if len(ranked) < 2:
        return "Too few of the fits converged for a comparison."
    verdict = f"Of the {len(ranked)} forms compared over all {n:,} degrees of at least 1, "
    verdict += f"{FORMS[ranked[0]['name']]} describes them best"
    law = next((entry for entry in ranked if entry["name"] == "power_law"), None)
    if law is not None and law is not ranked[0]:
        verdict += f" (its AIC is {law['aic_above_best']:,.1f} below that of a power law over the whole range)"
    return f"{verdict}; that says which is nearest, not that it is true."


def _listed(forms: Sequence[str]) -> str:
    return forms[0] if len(forms) == 1 else f"{', '.join(forms[:-1])} and {forms[-1]}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if 0.01 <= share <= 0.99 else f"{100 * share:.1f}%"
