"""The tail of the degree distribution, and the whole of it: planted forms, the bare minimum, and the words."""

import random

import igraph
import numpy as np
import pytest
from scipy import special, stats
from threadpoolctl import threadpool_limits

from cellcircuits.degree_summary import degree_summary, gini, skewness
from cellcircuits.degree_tail import tail_statistics, whole_distribution
from degree_fixtures import draw_power_law


def test_a_planted_power_law_is_recovered() -> None:
    degrees = draw_power_law(2.5, 1, 3000, 0)
    tail = tail_statistics(degrees, 0.1, 20, 0)["result"]
    law = tail["power_law"]
    assert law["alpha"] == pytest.approx(2.5, abs=0.1)
    assert law["alpha_interval"][0] < 2.5 < law["alpha_interval"][1]
    assert law["p"] > 0.1
    assert tail["verdict"].startswith("A power law is compatible with")
    whole = whole_distribution(degrees)["result"]["models"]
    law = next(model for model in whole if model["name"] == "power_law")
    assert law["aic_above_best"] < 4
    assert law["parameters"]["alpha"] == pytest.approx(2.5, abs=0.1)


def test_a_lognormal_is_not_mistaken_for_a_power_law() -> None:
    degrees = np.round(np.exp(np.random.default_rng(0).normal(5.6, 0.7, 4000))).astype(np.int64)
    tail = tail_statistics(degrees, 0.1, 1, 0)["result"]  # 25 draws: enough to reject, and quick
    assert tail["power_law"]["share_of_features"] < 0.2
    assert tail["power_law"]["p"] < 0.1
    assert tail["verdict"].startswith("No power law")
    assert {other["name"] for other in tail["alternatives"] if other["favoured"] == other["name"]} >= {"lognormal"}
    whole = whole_distribution(degrees)["result"]
    assert whole["models"][0]["name"] == "lognormal"
    law = next(model for model in whole["models"] if model["name"] == "power_law")
    assert law["aic_above_best"] > 1000
    assert "a lognormal describes them best" in whole["verdict"]


def test_likelihoods_of_the_tail_are_those_of_the_plain_sums() -> None:
    degrees = draw_power_law(3.0, 20, 300, 4)
    tail = tail_statistics(degrees, 0.1, 20, 0)["result"]
    law, start = tail["power_law"], tail["power_law"]["x_min"]
    x = degrees[degrees >= start].astype(float)
    far = np.arange(start, start + 3_000_000, dtype=np.float64)
    slow = np.sum(-law["alpha"] * np.log(x)) - len(x) * special.logsumexp(-law["alpha"] * np.log(far))
    assert law["n_tail"] == len(x)
    assert law["log_likelihood"] == pytest.approx(slow, abs=1e-3)
    cutoff = next(other for other in tail["alternatives"] if other["name"] == "power_law_with_cutoff")
    alpha, rate = cutoff["parameters"]["alpha"], cutoff["parameters"]["rate"]
    slow = np.sum(-alpha * np.log(x) - rate * x) - len(x) * special.logsumexp(-alpha * np.log(far) - rate * far)
    assert cutoff["log_likelihood"] == pytest.approx(slow, abs=1e-3)
    gain = max(0.0, 2 * (cutoff["log_likelihood"] - law["log_likelihood"]))
    assert cutoff["test"] == "likelihood_ratio"
    assert cutoff["statistic"] == pytest.approx(gain, abs=1e-3)
    # at the limit of no cut-off half of the chi-squared weight lies at 0
    assert cutoff["p"] == pytest.approx(stats.chi2.sf(gain, 1) / 2 if gain else 1.0, abs=2e-3)


def test_the_seed_decides_and_the_order_does_not() -> None:
    degrees = draw_power_law(2.5, 3, 200, 5)
    shuffled = np.random.default_rng(0).permutation(degrees)
    first = tail_statistics(degrees, 0.1, 20, 7)
    assert tail_statistics(shuffled, 0.1, 20, 7) == first
    assert tail_statistics(degrees, 0.1, 20, 8) != first


def test_the_number_of_threads_does_not_decide() -> None:
    degrees = draw_power_law(2.5, 3, 200, 5)
    expected = tail_statistics(degrees, 0.05, 20, 7)
    with threadpool_limits(4, user_api="openmp"):
        assert all(tail_statistics(degrees, 0.05, 20, 7) == expected for _ in range(3))


def test_igraph_draws_as_before_afterwards() -> None:
    random.seed(3)
    expected = igraph.Graph.Erdos_Renyi(n=20, m=15).get_edgelist()
    tail_statistics(draw_power_law(2.5, 3, 100, 5), 0.1, 20, 7)
    random.seed(3)
    assert igraph.Graph.Erdos_Renyi(n=20, m=15).get_edgelist() == expected


@pytest.mark.parametrize(("p_precision", "n_draws"), [(0.1, 25), (0.05, 100), (0.04, 175)])
def test_p_comes_from_whole_rounds_of_draws_and_is_never_0(p_precision: float, n_draws: int) -> None:
    law = tail_statistics(np.arange(1, 101), p_precision, 1, 0)["result"]["power_law"]  # as flat as can be
    assert law["p_draws"] == n_draws
    hits = law["p"] * (1 + n_draws) - 1
    assert hits == pytest.approx(round(hits))
    assert law["p"] > 0


@pytest.mark.parametrize(
    ("degrees", "reason"),
    [
        (np.zeros(100, dtype=np.int64), "fewer than 50 features with an edge"),
        (np.full(100, 7), "fewer than 10 distinct degrees above 0"),
        (np.arange(1, 30), "fewer than 50 features with an edge"),
    ],
)
def test_too_little_is_said_to_be_too_little(degrees: np.ndarray, reason: str) -> None:
    assert tail_statistics(degrees, 0.1, 5, 0)["reason"] == reason
    assert whole_distribution(degrees)["reason"] == reason
    assert whole_distribution(degrees)["result"] is None


def test_zeros_are_counted_apart() -> None:
    degrees = draw_power_law(2.5, 3, 200, 5)
    with_zeros = np.concatenate([degrees, np.zeros(77, dtype=np.int64)])
    assert whole_distribution(with_zeros)["n_zero"] == 77
    shuffled = np.random.default_rng(0).permutation(with_zeros)
    assert whole_distribution(shuffled)["result"] == whole_distribution(degrees)["result"]
    law = tail_statistics(with_zeros, 0.1, 20, 0)["result"]["power_law"]
    assert law["share_of_features"] == pytest.approx(law["n_tail"] / 277)


def test_gini_is_the_mean_difference_of_pairs_and_skewness_the_third_moment() -> None:
    values = np.random.default_rng(0).poisson(3, 60).astype(float)
    slow = np.abs(values[:, None] - values).mean() / (2 * values.mean())
    assert gini(values) == pytest.approx(slow)
    assert gini(np.full(5, 3.0)) == pytest.approx(0.0)
    assert gini(np.zeros(5)) is None
    assert skewness(values) == pytest.approx(stats.skew(values))
    assert skewness(np.full(5, 3.0)) is None


def test_summary_of_degrees() -> None:
    degrees = np.array([0, 0, 3, 9, 10, 60, 12000])
    summary = degree_summary(degrees, 0)
    assert [entry["n"] for entry in summary["histogram"]] == [2, 2, 1, 1, 0, 0, 0, 0, 1]
    assert summary["n_zero"] == 2
    assert summary["median"] == 9
    assert summary["quartiles"] == [1.5, 9.0, 35.0]
    assert summary["mean_interval"][0] <= summary["mean"] <= summary["mean_interval"][1]
    flat = degree_summary(np.full(20, 4), 0)
    assert flat["skewness"] is None
    assert flat["skewness_reason"] == "all degrees are equal"
    assert degree_summary(np.zeros(20, dtype=np.int64), 0)["gini_reason"] == "no feature has an edge"
