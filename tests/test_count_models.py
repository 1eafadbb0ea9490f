"""Distributions of counts against sums of their defining terms, scipy's own, and what they were drawn from."""

import numpy as np
import pytest
from scipy import special, stats

from cellcircuits import count_models
from cellcircuits.count_models import CountModel, fit
from degree_fixtures import draw_power_law

MEAN, MEAN_LOG = 40.0, 3.3


def families(first: int) -> dict[str, CountModel]:
    models = [
        count_models.power_law(first),
        count_models.exponential(first, MEAN),
        count_models.lognormal(first, MEAN_LOG),
        count_models.stretched_exponential(first, MEAN_LOG),
        count_models.power_law_with_cutoff(first, MEAN),
        count_models.negative_binomial(first, MEAN),
    ]
    return {model.name: model for model in models}


# theta of each family, such that what lies above a million has no weight
THETAS = {
    "power_law": np.array([np.log(4.0)]),
    "exponential": np.array([np.log(0.03)]),
    "lognormal": np.array([0.5, 0.3]),
    "stretched_exponential": np.array([0.2, 0.7]),
    "power_law_with_cutoff": np.array([1.3, np.log(0.8)]),
    "negative_binomial": np.array([np.log(35.0), 0.4]),
}


@pytest.mark.parametrize("first", [1, 7, 300])
@pytest.mark.parametrize("name", THETAS)
def test_probabilities_add_up_and_survival_is_their_sum(name: str, first: int) -> None:
    model, theta = families(first)[name], THETAS[name]
    x = np.arange(first, first + 200_000, dtype=np.float64)
    probabilities = np.exp(model.log_pmf(x, theta))
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-8)
    some = x[[0, 1, 5, 60]]
    slow = [probabilities[x >= value].sum() for value in some]
    np.testing.assert_allclose(np.exp(model.log_sf(some, theta)), slow, rtol=1e-6, atol=1e-9)


def test_each_family_is_what_its_docstring_says() -> None:
    first, x = 7, np.arange(7, 120, dtype=np.float64)
    far = np.arange(7, 400_000, dtype=np.float64)
    models = families(first)

    def agrees(name: str, log_terms: np.ndarray, log_total: float) -> None:
        np.testing.assert_allclose(models[name].log_pmf(x, THETAS[name]), log_terms - log_total, rtol=1e-9, atol=1e-9)

    agrees("power_law", -5 * np.log(x), special.logsumexp(-5 * np.log(far)))
    agrees("exponential", -0.03 * x, special.logsumexp(-0.03 * far))
    cutoff = models["power_law_with_cutoff"].parameters(THETAS["power_law_with_cutoff"])
    assert cutoff == pytest.approx({"alpha": 1.3, "rate": 0.8 / MEAN})
    agrees("power_law_with_cutoff", -1.3 * np.log(x) - 0.02 * x, special.logsumexp(-1.3 * np.log(far) - 0.02 * far))
    size, p = np.exp(0.4), np.exp(0.4) / (np.exp(0.4) + 35.0)
    agrees("negative_binomial", stats.nbinom.logpmf(x, size, p), np.log(stats.nbinom.pmf(far, size, p).sum()))
    of = models["lognormal"].parameters(THETAS["lognormal"])
    frozen = stats.lognorm(of["sigma"], scale=np.exp(of["mu"]))
    agrees("lognormal", np.log(frozen.cdf(x + 0.5) - frozen.cdf(x - 0.5)), np.log(frozen.sf(first - 0.5)))
    of = models["stretched_exponential"].parameters(THETAS["stretched_exponential"])

    def survival(value: np.ndarray) -> np.ndarray:
        return np.exp(-(of["rate"] / of["beta"]) * (value / of["scale"]) ** of["beta"])

    agrees("stretched_exponential", np.log(survival(x) - survival(x + 1)), np.log(survival(np.array(7.0))))


@pytest.mark.parametrize(("alpha", "rate", "first"), [(2.5, 0.01, 1), (6.0, 1e-5, 860), (-3.0, 0.02, 1), (0.0, 0.5, 3)])
def test_log_sum_against_two_million_terms(alpha: float, rate: float, first: int) -> None:
    x = np.arange(first, first + 2_000_000, dtype=np.float64)
    slow = special.logsumexp(-alpha * np.log(x) - rate * x)
    nodes = special.roots_legendre(count_models.N_NODES)
    assert count_models.log_sum(alpha, rate, first, nodes) == pytest.approx(slow, abs=1e-10)


@pytest.mark.parametrize("first", [1, 860])
@pytest.mark.parametrize("alpha", [2.2, 3.5, 6.0])
def test_a_planted_exponent_is_recovered(alpha: float, first: int) -> None:
    n = 2000
    values, counts = np.unique(draw_power_law(alpha, first, n, 1), return_counts=True)
    fitted = fit(count_models.power_law(first), values.astype(float), counts.astype(float))
    found = fitted.model.parameters(fitted.theta)["alpha"]
    step = 1e-4  # the standard error from the curvature of log zeta
    curvature = sum(w * np.log(special.zeta(alpha + d, float(first))) for w, d in ((1, step), (-2, 0), (1, -step)))
    assert fitted.converged
    assert found == pytest.approx(alpha, abs=3 / np.sqrt(n * curvature / step**2))


def test_the_exponential_has_its_closed_form() -> None:
    x = stats.geom(0.02).rvs(3000, random_state=0) + 9
    values, counts = np.unique(x, return_counts=True)
    fitted = fit(count_models.exponential(10, x.mean()), values.astype(float), counts.astype(float))
    assert fitted.model.parameters(fitted.theta)["rate"] == pytest.approx(np.log1p(1 / (x.mean() - 10)), rel=1e-5)


def test_a_lognormal_fitted_to_a_power_law_is_reported_at_its_limit() -> None:
    values, counts = np.unique(draw_power_law(2.0, 50, 400, 3), return_counts=True)
    mean_log = float(np.dot(counts, np.log(values)) / counts.sum())
    law = fit(count_models.power_law(50), values.astype(float), counts.astype(float))
    fitted = fit(count_models.lognormal(50, mean_log), values.astype(float), counts.astype(float))
    assert fitted.converged
    assert fitted.log_likelihood == pytest.approx(law.log_likelihood, abs=1.0)
    assert fitted.limit == "no curvature in log x: at its power-law limit"


def test_parameters_of_a_rounded_lognormal_are_recovered() -> None:
    x = np.maximum(1, np.round(np.exp(np.random.default_rng(0).normal(5.6, 0.7, 4000))))
    values, counts = np.unique(x, return_counts=True)
    fitted = fit(count_models.lognormal(1, float(np.log(x).mean())), values, counts.astype(float))
    assert fitted.model.parameters(fitted.theta) == pytest.approx({"mu": 5.6, "sigma": 0.7}, abs=0.03)
