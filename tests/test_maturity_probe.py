"""The probe: its log-odds, its AUC and interval, its file."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from cellcircuits.errors import UserError
from cellcircuits.maturity_probe import _interval, fit_probe, kept_probe, write_probe


def cells(n: int = 60, shift: float = 1.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    is_late = np.arange(n) % 3 == 0
    streams = rng.standard_normal((n, 6)) * np.array([1, 5, 0.1, 2, 1, 1]) + 3.0
    streams[is_late, 2] += 0.1 * shift
    return streams, is_late


def test_log_odds_are_scikit_learn_s():
    streams, is_late = cells()
    probe = fit_probe(streams, is_late, None, 0)
    scaler = StandardScaler().fit(streams)
    model = LogisticRegression(C=0.05, class_weight="balanced", max_iter=3000).fit(scaler.transform(streams), is_late)
    assert probe.log_odds(streams) == pytest.approx(model.decision_function(scaler.transform(streams)))
    change = np.linspace(-1, 1, 6)
    assert probe.log_odds(streams[0] + change) - probe.log_odds(streams[0]) == pytest.approx(change @ probe.direction)
    assert (probe.n_early, probe.n_late) == (40, 20)


def test_the_auc_is_that_of_held_out_cells():
    streams, is_late = cells()
    probe = fit_probe(streams, is_late, None, 0)
    scores = np.zeros(len(streams))
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(streams, is_late):
        scaler = StandardScaler().fit(streams[train])
        model = LogisticRegression(C=0.05, class_weight="balanced", max_iter=3000)
        model.fit(scaler.transform(streams[train]), is_late[train])
        scores[test] = model.decision_function(scaler.transform(streams[test]))
    assert probe.auc == pytest.approx(roc_auc_score(is_late, scores))
    assert probe.auc_low < probe.auc < probe.auc_high


def test_the_interval_is_that_of_resampled_cells():
    streams, is_late = cells()
    scores = streams[:, 2].round(1)  # with ties
    low, high = _interval(is_late, scores, None, 0)
    rng, early, late = np.random.default_rng(1), np.flatnonzero(~is_late), np.flatnonzero(is_late)
    drawn = [np.concatenate([rng.choice(group, len(group)) for group in (early, late)]) for _ in range(400)]
    slow = np.percentile([roc_auc_score(is_late[of], scores[of]) for of in drawn], (2.5, 97.5))
    assert (low, high) == pytest.approx(tuple(slow), abs=0.04)


def test_cells_without_a_difference_have_an_interval_around_a_half():
    found = [fit_probe(*cells(shift=0.0, seed=seed), None, 0) for seed in range(10)]
    assert sum(probe.auc_low <= 0.5 <= probe.auc_high for probe in found) >= 7
    assert fit_probe(*cells(shift=4.0), None, 0).auc_low > 0.8


def test_donors_are_kept_whole():
    streams, is_late = cells(90)
    donors = np.array([f"d{i % 6}" for i in range(90)])
    # every donor has a mark of its own: with its cells in training they would be told apart
    probe = fit_probe(streams, is_late, donors, 0)
    assert probe.auc is not None and probe.auc_low <= probe.auc <= probe.auc_high
    one = fit_probe(streams, is_late, np.array(["d"] * 90), 0)
    assert one.auc is None and "one donor" in one.reason
    apart = fit_probe(streams, is_late, np.where(is_late, "x", "y"), 0)
    assert apart.auc is None and "no early or no late" in apart.reason
    assert one.weights == pytest.approx(probe.weights)


def test_too_few_cells_are_refused():
    streams, is_late = cells(12)
    with pytest.raises(UserError, match="8 early and 4 late cells"):
        fit_probe(streams, is_late, None, 0)


def test_a_probe_comes_back_from_its_file(tmp_path: Path):
    streams, is_late = cells()
    path, names = tmp_path / "probe.npz", [f"c{i}" for i in range(60)]
    for donors in (None, np.array(["d"] * 60)):
        probe = fit_probe(streams, is_late, donors, 0)
        write_probe(path, probe, "run", names, is_late)
        kept = kept_probe(path, "run")
        assert kept.facts() == probe.facts() and np.array_equal(kept.weights, probe.weights)
        assert kept.log_odds(streams) == pytest.approx(probe.log_odds(streams), rel=1e-15)
        assert kept_probe(path, "another") is None
    path.write_bytes(path.read_bytes()[:100])
    assert kept_probe(path, "run") is None
