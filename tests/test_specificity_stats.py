"""Statistics of specificity controls: against SciPy, against simulation, and by hand."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control, mannwhitneyu, rankdata

import reference
from cellcircuits.calibration import Calibrator, hedges_g
from cellcircuits.edge_fdr import CalibrationSettings
from cellcircuits.specificity_stats import HowTested, Outcome, expected_jaccard, likeness, outcome_of, specific_edges
from cellcircuits.specificity_summary import Resampled, calibrated_edges, stratified_p
from cellcircuits.stats import EdgeRule

CPU = torch.device("cpu")
RULE = EdgeRule()


def some_outcome(
    edges: list[int], live: list[int], n_targets: int = 30, seed: int = 0, p: list[int] | None = None
) -> Outcome:
    mean = np.zeros(n_targets)
    mean[live] = np.random.default_rng(seed).normal(size=len(live))
    numerators = np.array(p or [1] * len(live))
    return Outcome(10, mean, np.array(live), numerators, 512, np.array(edges, np.int64), np.ones(len(edges), bool))


def test_tests_are_those_of_the_trace_s_calibration():
    """p, edges and strength as `Calibrator` and the edge table have them."""
    rng = np.random.default_rng(0)
    effects = rng.normal(rng.normal(size=40), 1.0, (9, 40)) * (rng.random((9, 40)) < 0.7)
    effects[:, 3] = 0
    settings = CalibrationSettings(n_draws=300, n_resamples=5)
    expected = Calibrator(RULE, settings, 9, 5, CPU).calibrate(7, effects, np.ones(9, bool))
    found = outcome_of(effects, 7, HowTested(RULE, settings, 5, CPU))
    np.testing.assert_array_equal(found.numerators / found.denominator, expected.p)
    np.testing.assert_array_equal(found.live, expected.columns)
    edges = [j for j in range(40) if reference.is_edge(effects[:, j])]
    assert found.edges.tolist() == edges and found.n_cells == 9
    consistency = expected.consistency[np.searchsorted(expected.columns, edges)]
    np.testing.assert_array_equal(found.is_strong, (np.abs(hedges_g(effects[:, edges])[0]) > 0.5) & (consistency > 0.7))


@pytest.mark.parametrize("n_cells", [0, 1])
def test_too_few_cells_have_no_edge(n_cells: int):
    found = outcome_of(np.ones((n_cells, 4)), 7, HowTested(RULE, CalibrationSettings(n_draws=10), 5, CPU))
    assert not len(found.edges) and len(found.live) == 4 * n_cells and found.n_cells == n_cells


def test_likeness_by_hand():
    real, control = some_outcome([1, 2, 3, 9], [1, 2, 3, 4, 9]), some_outcome([3, 9, 11], [3, 9, 11, 12], seed=1)
    found = likeness(real, control)
    signs = np.sign(real.mean[[3, 9]]) == np.sign(control.mean[[3, 9]])
    assert (found["n_shared"], found["n_shared_same_sign"], found["n_live_either"]) == (2, signs.sum(), 7)
    assert found["jaccard"] == 2 / 5 and found["expected_share"] == 3 / 7 and found["reason"] is None
    cosine = real.mean @ control.mean / np.sqrt((real.mean**2).sum() * (control.mean**2).sum())
    assert found["effect_cosine"] == pytest.approx(cosine)
    assert real.counts()["effect_norm"] == pytest.approx(np.sqrt((real.mean**2).sum()))
    nothing = likeness(some_outcome([], []), some_outcome([], []))
    assert nothing["jaccard"] is nothing["jaccard_expected"] is nothing["effect_cosine"] is None and nothing["reason"]


@pytest.mark.parametrize(("n", "a", "b"), [(30, 5, 9), (12, 8, 7), (6, 6, 3), (9, 0, 4)])
def test_expected_overlap_is_that_of_random_sets(n: int, a: int, b: int):
    rng = np.random.default_rng(0)
    overlaps = []
    for _ in range(4000):
        one, other = set(rng.permutation(n)[:a]), set(rng.permutation(n)[:b])
        overlaps.append(len(one & other) / len(one | other))
    assert expected_jaccard(n, a, b) == pytest.approx(np.mean(overlaps), abs=0.008)


def test_specific_edges_by_hand():
    live = list(range(20))
    real = some_outcome([0, 1, 2, 3], live)
    controls = {
        "random": [some_outcome([0, 7], live), some_outcome([2, 8, 9], live)],
        "other": [some_outcome([], live)],
    }
    found = specific_edges(real, controls)
    assert (found["n_edges"], found["share"]) == (2, 0.5)
    assert found["share_expected"] == pytest.approx(0.9 * 0.85)


def test_calibrated_edges_are_scipy_s():
    rng = np.random.default_rng(0)
    entries, every = [], []
    for feature in range(6):
        live = np.sort(rng.choice(50, 20, replace=False))
        p = np.where(rng.random(20) < 0.4, rng.integers(1, 9, 20), rng.integers(1, 513, 20)).tolist()
        one = some_outcome(live[::3].tolist(), live.tolist(), 50, feature, p)
        one = replace(one, is_strong=rng.random(len(one.edges)) < 0.8)
        entries.append({**one.counts(), "n_cells": 10 if feature else 7, "tests": one.tests()})
        every.append(one)
    q = false_discovery_control(np.concatenate([one.numerators / 512 for one in every])).reshape(6, 20)
    found = calibrated_edges(entries, 8)
    for feature, (one, edges) in enumerate(zip(every, found, strict=True)):
        q_of_edges = q[feature][np.searchsorted(one.live, one.edges)]
        expected = one.edges[one.is_strong & (q_of_edges < 0.05)] if feature else []
        assert edges.tolist() == list(expected)
    assert sum(map(len, found)) > 5


def test_the_stratified_test_is_the_enumerated_one_and_equal_runs_have_none():
    """Every way to name one run of each of four features the ablation; ties and a feature without any difference."""
    rng = np.random.default_rng(0)
    runs = rng.integers(0, 5, (4, 4)).astype(float)
    runs[2] = 3.0
    ranks = rankdata(runs, axis=1) - 2.5
    sums = np.array([sum(ranks[i, j] for i, j in enumerate(named)) for named in product(range(4), repeat=4)])
    assert stratified_p(runs[:, 0], runs[:, 1:]) == pytest.approx(np.mean(np.abs(sums) >= abs(ranks[:, 0].sum())))
    one = np.array([[9.0, 1, 2, 5, 7]])
    assert stratified_p(one[:, 0], one[:, 1:]) == pytest.approx(mannwhitneyu(one[0, :1], one[0, 1:]).pvalue)
    assert stratified_p(runs[2:3, 0], runs[2:3, 1:]) is None
    assert stratified_p(np.zeros(0), np.zeros((0, 4))) is None


@pytest.mark.parametrize("n_features", [10, 50, 200])
def test_skewed_edge_counts_do_not_make_it_reject(n_features: int):
    """Ablations that are one draw more of their control; against its mean a signed-rank test rejects 26% of 50."""
    rng = np.random.default_rng(n_features)
    runs = np.rint(20 * rng.lognormal(0, 1, (400, n_features, 6)))
    p = np.array([stratified_p(of[:, 0], of[:, 1:]) for of in runs])
    for level in (0.05, 0.2):
        assert abs(np.mean(p <= level) - level) < 3 * np.sqrt(level * (1 - level) / 400) + 0.01
    shifted = [stratified_p(1.5 * of[:, 0], of[:, 1:]) for of in runs[:50]]
    assert n_features < 200 or np.mean(np.array(shifted) < 0.05) > 0.9


def test_intervals_are_percentiles_over_resampled_features():
    rng = np.random.default_rng(0)
    a, b = rng.gamma(2, 10, 60), rng.gamma(2, 5, 60)
    resampled = Resampled(60, 1)
    found = resampled.ratio("x", a, b)
    assert found["x"] == pytest.approx(a.sum() / b.sum())
    drawn = [a[i].sum() / b[i].sum() for i in rng.integers(0, 60, (4000, 60))]
    assert [found["x_low"], found["x_high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), rel=0.03)
    a[7] = np.nan
    assert resampled.mean("y", a)["y_mean"] == pytest.approx(np.nanmean(a))
    alone = Resampled(1, 1).ratio("x", a[:1], b[:1])
    assert alone["x"] is not None and alone["x_low"] is alone["x_high"] is None
    assert Resampled(3, 1).ratio("x", np.ones(3), np.zeros(3)) == {"x": None, "x_low": None, "x_high": None}
