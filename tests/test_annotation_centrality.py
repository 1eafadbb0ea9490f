"""Annotation against degree: published figures, slow answers, and a planted confounder."""

import itertools

import numpy as np
import pytest
from scipy import stats

from cellcircuits.annotation_centrality import annotation_statistics, auc, fisher, matched_share, wilson
from cellcircuits.degree_table import DegreeTable
from cellcircuits.matching import match, within_caliper
from degree_fixtures import annotated_by_frequency

# annotated among the top 20 and in all, of n: the study's layers 5, 2, 8 and 14
PUBLISHED = {
    5: ((12, 2185, 4065), 1.292, 0.657, 0.657),
    2: ((9, 301, 500), 0.527, 0.168, 0.224),
    8: ((5, 250, 500), 0.320, 0.0374, 0.075),
    14: ((4, 259, 500), 0.221, 0.00496, 0.020),
}


def published_table(layer: int) -> list[list[int]]:
    top, total, n = PUBLISHED[layer][0]
    return [[top, 20 - top], [total - top, n - 20 - (total - top)]]


def test_the_published_fisher_tests() -> None:
    found = {layer: fisher(published_table(layer)) for layer in PUBLISHED}
    for layer, (_, odds, p, _) in PUBLISHED.items():
        (a, b), (c, d) = published_table(layer)
        assert a * d / (b * c) == pytest.approx(odds, abs=6e-4)
        assert found[layer]["odds_ratio"] == pytest.approx(odds, rel=0.02)  # conditional, not the sample's
        assert found[layer]["p"] == pytest.approx(p, rel=0.01)
        low, high = found[layer]["odds_ratio_interval"]
        assert low < odds < high
    q = stats.false_discovery_control([found[layer]["p"] for layer in PUBLISHED])
    assert q == pytest.approx([entry[3] for entry in PUBLISHED.values()], abs=6e-4)


def test_an_empty_cell_is_null_with_a_reason() -> None:
    found = fisher([[20, 0], [50, 50]])
    assert found["odds_ratio"] is None
    assert found["odds_ratio_interval"][1] is None
    assert found["reason"] == "a cell of the table is empty"


def test_a_confounder_deceives_fisher_but_not_the_matched_test() -> None:
    result = annotation_statistics(annotated_by_frequency(2500, 0), 0.1, 0)["result"]
    top = result["top"]["top_1_percent"]["result"]
    assert top["fisher"]["p"] < 0.01
    assert top["matched"]["n_matched"] >= 20
    assert top["matched"]["p"] > 0.05
    assert top["matched"]["expected_share"] == pytest.approx(top["matched"]["observed_share"], abs=0.1)
    model = result["logistic_model"]["result"]
    assert model["degree_given_frequency"]["p"] > 0.05
    assert model["frequency_given_degree"]["p"] < 1e-6
    assert result["auc_of_degree"]["interval"][1] < 0.5
    assert result["rank_correlations"]["degree_with_annotated"]["p"] < 1e-6
    assert abs(result["rank_correlations"]["given_frequency"]["rho"]) < 0.06
    for group in result["deciles"]:
        assert group["expected_share_by_frequency"] == pytest.approx(group["annotated_share"], abs=0.12)


def test_a_planted_effect_of_degree_is_found() -> None:
    result = annotation_statistics(annotated_by_frequency(2000, 0, degree_effect=4.0), 0.1, 0)["result"]
    assert result["top"]["top_20"]["result"]["matched"]["p"] < 0.05
    assert result["logistic_model"]["result"]["degree_given_frequency"]["p"] < 1e-6


def test_the_order_of_the_table_does_not_matter() -> None:
    table = annotated_by_frequency(400, 1)
    shuffle = np.random.default_rng(0).permutation(400)
    columns = (table.features, table.degrees, table.frequency, table.is_annotated)
    assert annotation_statistics(DegreeTable("s", *(c[shuffle] for c in columns)), 0.1, 0) == annotation_statistics(
        table, 0.1, 0
    )


def test_a_match_is_never_0_in_p_and_never_beyond_the_caliper() -> None:
    annotated = np.arange(200) < 20  # the top features and nobody else
    log_frequency = np.tile(np.linspace(-3, -1, 20), 10)
    found = matched_share(annotated, log_frequency, 20, 0.01, 0)
    assert found["p"] == pytest.approx(2 / 2001)
    assert found["observed_share"] == 1.0
    assert found["expected_share"] == 0.0
    assert found["mean_log10_frequency_above_matches"] == pytest.approx(0.0)
    alone = np.where(annotated, 0.0, -3.0)
    assert matched_share(annotated, alone, 20, 0.5, 0)["reason"] == "fewer than 5 top features have a match"


@pytest.mark.parametrize("seed", range(20))
def test_matching_serves_as_many_as_can_be_served(seed: int) -> None:
    rng = np.random.default_rng(seed)
    candidates = [np.flatnonzero(rng.random(5) < 0.35) for _ in range(5)]
    most = max(
        sum(row in of for row, of in zip(order, candidates, strict=True) if row is not None)
        for order in itertools.permutations(range(5))
    )
    for drawn in (None, rng):
        found = match(candidates, drawn)
        given = [row for row in found if row is not None]
        assert len(given) == len(set(given)) == most
        assert all(row is None or row in of for row, of in zip(found, candidates, strict=True))


def test_the_first_are_served_first() -> None:
    assert match([np.array([3]), np.array([3]), np.array([3, 4])]) == [3, None, 4]
    assert match([np.array([3, 4]), np.array([3])]) == [4, 3]


def test_candidates_are_those_within_the_caliper() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=60)
    of, among = np.arange(10), np.arange(10, 60)
    for row, found in zip(of, within_caliper(values, of, among, 0.3), strict=True):
        assert found.tolist() == [i for i in among.tolist() if abs(values[i] - values[row]) <= 0.3]


def test_auc_and_its_interval_against_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.poisson(5, 40).astype(float), rng.poisson(4, 30).astype(float)
    wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    error = np.sqrt(wins.mean(1).var(ddof=1) / 40 + wins.mean(0).var(ddof=1) / 30)
    found = auc(x, y)
    assert found["auc"] == pytest.approx(wins.mean())
    assert found["interval"] == pytest.approx([wins.mean() - 1.959964 * error, wins.mean() + 1.959964 * error])
    assert found["p"] == pytest.approx(2 * stats.norm.sf(abs(wins.mean() - 0.5) / error))
    assert auc(x + 100, y)["interval"] is None
    assert auc(x[:1], y)["auc"] is None


def test_wilson_by_hand() -> None:
    z, p, n = 1.959964, 0.3, 20
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(6, 20) == pytest.approx([(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)])


def test_what_cannot_be_said() -> None:
    table = annotated_by_frequency(300, 0)
    columns = (table.features, table.degrees, table.frequency)
    assert annotation_statistics(DegreeTable("t", *columns, np.zeros(300)), 0.1, 0)["reason"] == (
        "no feature is annotated"
    )
    assert annotation_statistics(DegreeTable("t", *columns, np.ones(300)), 0.1, 0)["reason"] == (
        "every feature is annotated"
    )
    unknown = annotation_statistics(DegreeTable("t", *columns, np.full(300, np.nan)), 0.1, 0)
    assert unknown["reason"].startswith("fewer than 40 features")
    flat = DegreeTable("t", table.features, np.full(300, 3), table.frequency, table.is_annotated)
    assert annotation_statistics(flat, 0.1, 0)["reason"] == "all degrees are equal"
    rare = annotation_statistics(DegreeTable("t", *columns, (table.features < 9).astype(float)), 0.1, 0)["result"]
    assert rare["logistic_model"]["reason"].startswith("fewer than 20 annotated")
    assert rare["deciles"][0]["expected_share_by_frequency"] is None
    assert rare["top"]["top_1_percent"]["result"] is None
    without = DegreeTable("t", table.features, table.degrees, np.full(300, np.nan), table.is_annotated)
    result = annotation_statistics(without, 0.1, 0)["result"]
    assert result["top"]["top_20"]["result"]["matched"]["p"] is None
    assert result["logistic_model"]["result"] is None
    assert result["rank_correlations"]["given_frequency"]["rho"] is None
