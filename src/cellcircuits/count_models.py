"""Distributions of counts from a first value on, fitted by maximum likelihood with exact normalization.

Each is a distribution of the integers `first`, `first` + 1, ...: what the data say below `first` plays no
part. NumPy and SciPy only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Floats = NDArray[np.float64]
N_EXACT_TERMS = 4096
N_NODES = 200
AGREEMENT = 1e-4  # log-likelihood units within which two starts must end
AT_BOUND = 1e-6


@dataclass(frozen=True)
class CountModel:
    """A family of distributions on the integers from `first` on.

    Attributes:
        name: what it is called in results.
        log_pmf: (values, theta) -> log P(X = value).
        log_sf: (values, theta) -> log P(X >= value).
        parameters: theta -> the parameters by their usual names.
        starts: where the search begins.
        bounds: of each entry of theta.
        limits: what it means when the search ends at the (entry of theta, 0 lower or 1 upper) bound.
    """

    name: str
    log_pmf: Callable[[Floats, Floats], Floats]
    log_sf: Callable[[Floats, Floats], Floats]
    parameters: Callable[[Floats], dict[str, float]]
    starts: Sequence[Sequence[float]]
    bounds: Sequence[tuple[float, float]]
    limits: dict[tuple[int, int], str]


@dataclass(frozen=True)
class CountFit:
    """A fitted CountModel.

    Attributes:
        model: the family.
        theta: its fitted entries.
        log_likelihoods: (n_values,) per distinct value, of one observation.
        log_likelihood: of all observations.
        converged: whether searches from different starts ended at the same height.
        limit: what bound of the family the fit ran to, if any.
    """

    model: CountModel
    theta: Floats
    log_likelihoods: Floats
    log_likelihood: float
    converged: bool
    limit: str | None

    @property
    def aic(self) -> float:
        """Akaike's information criterion, 2 parameters - 2 log-likelihood."""
        return 2.0 * len(self.theta) - 2.0 * self.log_likelihood


def fit(model: CountModel, values: Floats, counts: Floats) -> CountFit:
    """Maximize the likelihood from every start of the model.

    Args:
        model: the family.
        values: (n_values,) distinct integers from the model's first value on.
        counts: (n_values,) how often each occurs.
    """

    def cost(theta: Floats) -> float:
        total = float(np.dot(counts, model.log_pmf(values, theta)))
        return -total if np.isfinite(total) else np.inf

    # rounding makes the likelihood of a nearly flat curve uneven by about 1e-7
    options = {"xatol": 1e-6, "fatol": 1e-6, "maxiter": 2000, "maxfev": 2000}
    found = [
        optimize.minimize(cost, start, method="Nelder-Mead", bounds=model.bounds, options=options)
        for start in model.starts
    ]
    found.sort(key=lambda result: result.fun)
    best = found[0]
    at_bound = [
        text
        for (entry, side), text in model.limits.items()
        if abs(best.x[entry] - model.bounds[entry][side]) < AT_BOUND
    ]
    agree = np.isfinite(best.fun) and found[1].fun - best.fun < AGREEMENT
    each = model.log_pmf(values, best.x)
    return CountFit(model, best.x, each, -float(best.fun), bool(agree), "; ".join(at_bound) or None)


def power_law(first: int) -> CountModel:
    """P(X = x) = x^-alpha / zeta(alpha, first)."""
    # zeta(alpha, first) is about first^-alpha, which must not underflow
    steepest = min(60.0, 680.0 / np.log(first + 1.0)) - 1.0

    def log_sf(x: Floats, theta: Floats) -> Floats:
        alpha = 1.0 + np.exp(theta[0])
        with np.errstate(divide="ignore"):  # far in the tail it underflows to log 0
            return np.log(special.zeta(alpha, x)) - np.log(special.zeta(alpha, float(first)))

    return CountModel(
        "power_law",
        lambda x, theta: power_law_log_pmf(x, 1.0 + np.exp(theta[0]), first),
        log_sf,
        lambda theta: {"alpha": float(1.0 + np.exp(theta[0]))},
        [[np.log(0.5)], [np.log(min(5.0, steepest / 2))]],
        [(np.log(1e-3), np.log(steepest))],
        {(0, 0): "alpha at its lower limit of 1", (0, 1): "alpha at its upper limit"},
    )


def power_law_log_pmf(x: Floats, alpha: float, first: int) -> Floats:
    """Log probability of the discrete power law from `first` on, (n,) -> (n,)."""
    return -alpha * np.log(x) - np.log(special.zeta(alpha, float(first)))


def exponential(first: int, mean: float) -> CountModel:
    """P(X = x) proportional to exp(-rate x): geometric from `first` on; `mean` of the data is where to start."""
    guess = np.log(np.log1p(1.0 / max(mean - first, 1e-6)))
    return CountModel(
        "exponential",
        lambda x, theta: np.log(-np.expm1(-np.exp(theta[0]))) - np.exp(theta[0]) * (x - first),
        lambda x, theta: -np.exp(theta[0]) * (x - first),
        lambda theta: {"rate": float(np.exp(theta[0]))},
        [[guess], [guess + 1.0]],
        [(-30.0, 5.0)],
        {},
    )


def lognormal(first: int, mean_log: float) -> CountModel:
    """A lognormal rounded to integers: P(X = x) = P(x - 1/2 < Y < x + 1/2) given Y > first - 1/2.

    Searched as slope and curvature of the log density in log x about `mean_log`: a curvature near 0 is a
    power law, where mu and sigma run to infinity.
    """

    def z(x: Floats, theta: Floats) -> Floats:
        root = np.exp(theta[1] / 2)
        return root * (np.log(x) - mean_log) + theta[0] / root

    def log_pmf(x: Floats, theta: Floats) -> Floats:
        low, high = z(x - 0.5, theta), z(x + 0.5, theta)
        # in the upper half the two survival functions are subtracted, which keep their digits there
        low, high = np.where(low > 0, -high, low), np.where(low > 0, -low, high)
        upper = special.log_ndtr(high)
        with np.errstate(divide="ignore"):
            inside = upper + np.log(-np.expm1(special.log_ndtr(low) - upper))
        return inside - special.log_ndtr(-z(np.array(first - 0.5), theta))

    def parameters(theta: Floats) -> dict[str, float]:
        return {"mu": float(mean_log - theta[0] / np.exp(theta[1])), "sigma": float(np.exp(-theta[1] / 2))}

    return CountModel(
        "lognormal",
        log_pmf,
        lambda x, theta: special.log_ndtr(-z(x - 0.5, theta)) - special.log_ndtr(-z(np.array(first - 0.5), theta)),
        parameters,
        [[0.0, 0.5], [1.0, -1.0], [4.0, -2.0]],
        [(-50.0, 60.0), (np.log(1e-4), np.log(1e4))],
        {(1, 0): "no curvature in log x: at its power-law limit"},
    )


def stretched_exponential(first: int, mean_log: float) -> CountModel:
    """P(X >= x) = exp(-(rate / beta) ((x / scale)^beta - (first / scale)^beta)), scale the geometric mean.

    Source: Nakagawa and Osaki (1975), the discrete Weibull distribution.
    """
    scale = np.exp(mean_log)

    def log_sf(x: Floats, theta: Floats) -> Floats:
        rate, beta = np.exp(theta[0]), theta[1]
        return -(rate / beta) * (first / scale) ** beta * np.expm1(beta * np.log(x / first))

    def log_pmf(x: Floats, theta: Floats) -> Floats:
        rate, beta = np.exp(theta[0]), theta[1]
        step = (rate / beta) * (x / scale) ** beta * np.expm1(beta * np.log1p(1.0 / x))
        with np.errstate(divide="ignore"):
            return log_sf(x, theta) + np.log(-np.expm1(-step))

    return CountModel(
        "stretched_exponential",
        log_pmf,
        log_sf,
        lambda theta: {"rate": float(np.exp(theta[0])), "beta": float(theta[1]), "scale": float(scale)},
        [[0.0, 1.0], [1.0, 0.3], [0.5, 2.0]],
        [(-20.0, 20.0), (1e-3, 20.0)],
        {(1, 0): "beta at its lower limit: a power law"},
    )


def power_law_with_cutoff(first: int, mean: float) -> CountModel:
    """P(X = x) proportional to x^-alpha exp(-rate x), rate above 0; the power law is its limit at rate 0.

    Its log-likelihood is concave. With alpha at or below 0 no part of it is a power law.
    """

    def unpacked(theta: Floats) -> tuple[float, float]:
        return float(theta[0]), float(np.exp(theta[1]) / mean)

    nodes = special.roots_legendre(N_NODES)

    def log_pmf(x: Floats, theta: Floats) -> Floats:
        alpha, rate = unpacked(theta)
        return -alpha * np.log(x) - rate * x - log_sum(alpha, rate, first, nodes)

    def log_sf(x: Floats, theta: Floats) -> Floats:
        alpha, rate = unpacked(theta)
        whole = log_sum(alpha, rate, first, nodes)
        return np.array([log_sum(alpha, rate, int(value), nodes) for value in x]) - whole

    return CountModel(
        "power_law_with_cutoff",
        log_pmf,
        log_sf,
        lambda theta: dict(zip(("alpha", "rate"), unpacked(theta), strict=True)),
        [[1.5, -1.0], [0.0, 0.0], [3.0, -4.0]],
        [(-10.0, 60.0), (np.log(1e-6), np.log(1e3))],
        {(1, 0): "no cut-off: at its power-law limit"},
    )


def log_sum(alpha: float, rate: float, first: int, nodes: tuple[Floats, Floats]) -> float:
    """Log of the sum of x^-alpha exp(-rate x) over the integers from `first` on; rate above 0.

    The first 4,096 terms are added up, the rest is the integral from half before the next term by
    Gauss-Legendre quadrature in log x, with the midpoint rule's first correction.

    Args:
        alpha: the exponent.
        rate: per unit of x.
        first: where the sum begins.
        nodes: places and weights of the quadrature on -1 to 1.
    """
    x = first + np.arange(N_EXACT_TERMS, dtype=np.float64)
    start = first + N_EXACT_TERMS - 0.5
    places, weights = nodes
    length = np.log1p(200.0 / (rate * start))
    log_x = np.log(start) + length * (places + 1.0) / 2.0
    pieces = -alpha * log_x - rate * np.exp(log_x) + log_x + np.log(weights * length / 2.0)
    at_start = -alpha * np.log(start) - rate * start
    correction = -(alpha / start + rate) / 24.0
    logs = np.concatenate([-alpha * np.log(x) - rate * x, pieces, [at_start]])
    signs = np.concatenate([np.ones(len(logs) - 1), [correction]])
    return float(special.logsumexp(logs, b=signs))


def negative_binomial(first: int, mean: float) -> CountModel:
    """A negative binomial given X >= first, by the mean and the size of the whole distribution.

    Its variance is mean + mean^2 / size.
    """

    def arguments(theta: Floats) -> tuple[float, float]:
        size = np.exp(theta[1])
        return size, size / (size + np.exp(theta[0]))

    def log_sf(x: Floats, theta: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            return stats.nbinom.logsf(x - 1, *arguments(theta)) - stats.nbinom.logsf(first - 1, *arguments(theta))

    return CountModel(
        "negative_binomial",
        lambda x, theta: stats.nbinom.logpmf(x, *arguments(theta)) - stats.nbinom.logsf(first - 1, *arguments(theta)),
        log_sf,
        lambda theta: {"mean": float(np.exp(theta[0])), "size": float(np.exp(theta[1]))},
        [[np.log(mean), 0.5], [np.log(mean), -1.0]],
        [(-10.0, 30.0), (-8.0, 15.0)],
        {(1, 0): "size at its lower limit", (1, 1): "size at its upper limit: a Poisson distribution"},
    )
