"""Rank correlations, splines and the model of degree: against slow answers, and on planted causes."""

import numpy as np
import pytest
from scipy import stats

from cellcircuits.degree_model import drivers
from cellcircuits.degree_table import DegreeTable
from cellcircuits.spline_models import Spline, partial_rank_correlation
from degree_fixtures import driven_by_frequency


def test_without_others_it_is_spearman() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=80).round(1)  # with ties
    y = x + rng.normal(size=80)
    found = partial_rank_correlation(x, y)
    slow = stats.spearmanr(x, y)
    assert (found["rho"], found["p"]) == pytest.approx((slow.statistic, slow.pvalue))
    assert found["df"] == 78


def test_the_partial_correlation_is_that_of_the_inverse_matrix_of_ranks() -> None:
    rng = np.random.default_rng(1)
    z, w = rng.normal(size=(2, 120))
    x, y = z + rng.normal(size=120), z - w + rng.normal(size=120)
    found = partial_rank_correlation(x, y, [z, w])
    inverse = np.linalg.inv(np.corrcoef([stats.rankdata(v) for v in (x, y, z, w)]))
    rho = -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])
    assert found["rho"] == pytest.approx(rho)
    assert found["df"] == 116
    assert found["p"] == pytest.approx(2 * stats.t.sf(abs(rho) * np.sqrt(116 / (1 - rho**2)), 116))
    assert found["interval"] == pytest.approx(np.tanh(np.arctanh(rho) + np.array([-1, 1]) * 1.95996398 / np.sqrt(115)))


def test_correlations_that_are_not_defined_say_so() -> None:
    x = np.arange(20.0)
    assert partial_rank_correlation(x, np.ones(20))["rho"] is None
    assert partial_rank_correlation(x, -(x**3), [x])["rho"] is None
    exact = partial_rank_correlation(x, x**3)
    assert exact["rho"] == 1.0
    assert exact["p"] > 0
    assert partial_rank_correlation(x[:4], x[:4])["rho"] is None


def test_a_spline_is_natural() -> None:
    x = np.random.default_rng(0).normal(size=200)
    spline = Spline.through(x)
    assert spline.basis(x).shape == (200, 3)
    assert np.linalg.matrix_rank(np.column_stack([np.ones(200), spline.basis(x)])) == 4
    for outside in (np.linspace(-30, x.min(), 5), np.linspace(x.max(), 30, 5)):
        np.testing.assert_allclose(np.diff(spline.basis(outside), 2, axis=0), 0, atol=1e-8)
    inside = spline.basis(np.linspace(x.min(), x.max(), 2001))
    second = np.diff(inside, 2, axis=0)
    assert np.abs(np.diff(second, axis=0)).max() < np.abs(second).max() / 50  # no jump in the curvature
    assert Spline.through(np.full(9, 2.0)).basis(np.arange(3.0)).shape == (3, 0)


def test_what_only_follows_frequency_adds_nothing() -> None:
    found = drivers(driven_by_frequency(600, 0))["result"]
    norm = found["model"]["terms"]["ablated_norm"]
    assert norm["deviance_explained_alone"] > 0.1  # the norm follows frequency
    assert norm["alone"]["p"] < 1e-6
    assert norm["added_last"]["p"] > 0.05
    assert norm["deviance_explained_added_last"] < 0.01
    assert found["rank_correlations"]["ablated_norm"]["spearman"]["p"] < 1e-6
    assert found["rank_correlations"]["ablated_norm"]["given_the_others"]["p"] > 0.05
    assert found["model"]["terms"]["activation_freq"]["added_last"]["p"] < 1e-6


def test_a_planted_effect_of_the_norm_is_found() -> None:
    norm = drivers(driven_by_frequency(600, 0, norm_effect=0.6))["result"]["model"]["terms"]["ablated_norm"]
    assert norm["added_last"]["p"] < 1e-6
    assert norm["deviance_explained_added_last"] > 0.05


def test_no_effect_is_called_at_its_nominal_rate() -> None:
    p = [
        drivers(driven_by_frequency(150, 100 + seed))["result"]["model"]["terms"]["ablated_norm"]["added_last"]["p"]
        for seed in range(12)
    ]
    assert sum(value < 0.05 for value in p) <= 3  # of 12, more than 3 has a chance of 0.2%


def test_deviance_is_the_negative_binomial_one() -> None:
    table = driven_by_frequency(120, 3)
    model = drivers(table)["result"]["model"]
    a, y = model["dispersion"], table.degrees.astype(float)
    mean = y.mean()  # of the constant model, whatever the dispersion

    def deviance(mu: np.ndarray) -> float:
        first = np.where(y > 0, y * np.log(np.maximum(y, 1) / mu), 0.0)
        return float(2 * np.sum(first - (y + 1 / a) * np.log((1 + a * y) / (1 + a * mu))))

    term = model["terms"]["activation_freq"]
    at = np.log10(table.frequency)
    curve = model["frequency_curve"]
    fitted = np.exp(np.interp(at, np.log10(curve["activation_freq"]), np.log(curve["mean"])))
    slow = 1 - deviance(fitted) / deviance(np.full(len(y), mean))
    assert term["deviance_explained_alone"] == pytest.approx(slow, abs=2e-3)


def test_what_cannot_be_said() -> None:
    table = driven_by_frequency(200, 0)
    nothing = np.full(200, np.nan)
    bare = DegreeTable("bare", table.features, table.degrees, nothing, nothing)
    assert drivers(bare)["reason"] == "no frequency, live targets or ablated norm is known"
    flat = DegreeTable("flat", table.features, np.full(200, 4), table.frequency, nothing)
    assert drivers(flat)["reason"] == "all degrees are equal"
    few = DegreeTable("few", table.features, table.degrees, np.where(table.features < 30, 0.1, np.nan), nothing)
    assert drivers(few)["reason"].startswith("fewer than 50 features")
    constant = DegreeTable("c", table.features, table.degrees, np.full(200, 0.1), nothing)
    terms = drivers(constant)["result"]["model"]["terms"]
    assert terms["activation_freq"]["alone"]["reason"] == "the predictor does not vary"
