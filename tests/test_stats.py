"""Effect statistics against an obvious loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import reference
from cellcircuits.stats import EdgeRule, cohens_d, effect_statistics, n_majority_sign

RULE = EdgeRule()
SHAPES = st.tuples(st.integers(2, 12), st.just(3))


def effects_like_real_ones(seed: int, n_cells: int, n_targets: int) -> np.ndarray:
    """Most targets exactly zero in most cells, as TopK latents are."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(rng.normal(size=n_targets), 1.0, (n_cells, n_targets))
    return effects * (rng.random((n_cells, n_targets)) < rng.random(n_targets))


@pytest.mark.parametrize("n_cells", [2, 3, 4, 7, 10, 20, 50])
def test_against_a_loop(n_cells: int) -> None:
    effects = effects_like_real_ones(n_cells, n_cells, 200)
    statistics = effect_statistics(effects, RULE)
    assert statistics.n_cells == n_cells
    for j, column in enumerate(effects.T):
        assert statistics.mean[j] == pytest.approx(sum(column) / n_cells, abs=1e-14)
        assert statistics.d[j] == pytest.approx(reference.cohens_d(column), rel=1e-10, abs=1e-14)
        assert statistics.consistency[j] == reference.consistency_of(column)
        assert statistics.is_edge[j] == reference.is_edge(column)
    assert statistics.is_edge.any()
    assert not statistics.is_edge.all()


@settings(max_examples=100, deadline=None)
@given(arrays(np.float64, SHAPES, elements=st.sampled_from([0.0, 0.5, -0.5, 1.0, -3.0])))
def test_ties_and_zeros_against_a_loop(effects: np.ndarray) -> None:
    statistics = effect_statistics(effects, RULE)
    for j, column in enumerate(effects.T):
        assert statistics.consistency[j] == reference.consistency_of(column)
        assert statistics.is_edge[j] == reference.is_edge(column)


@pytest.mark.parametrize("n_cells", [0, 1])
def test_fewer_than_two_cells(n_cells: int) -> None:
    effects = np.full((n_cells, 3), 2.0)
    statistics = effect_statistics(effects, RULE)
    assert statistics.n_cells == n_cells
    assert statistics.d.tolist() == statistics.consistency.tolist() == [0.0] * 3
    assert statistics.is_edge.tolist() == [False] * 3 and statistics.is_edge.dtype == bool
    assert statistics.mean.tolist() == [2.0 * n_cells] * 3
    assert cohens_d(effects).tolist() == [0.0] * 3


def test_sd_has_a_floor() -> None:
    effects = np.array([[1e-3, 0.0], [1e-3, 0.0]])
    assert cohens_d(effects).tolist() == [1e7, 0.0]


def test_d_uses_n_minus_1() -> None:
    assert cohens_d(np.array([[1.0], [3.0]]))[0] == pytest.approx(2 / np.sqrt(2))


def test_scale_does_not_matter() -> None:
    effects = effects_like_real_ones(1, 10, 100)
    base = effect_statistics(effects, RULE)
    for scale in (1e-3, 1e4):
        scaled = effect_statistics(scale * effects, RULE)
        np.testing.assert_allclose(scaled.d, base.d, rtol=1e-10)
        np.testing.assert_array_equal(scaled.is_edge, base.is_edge)


def test_zeros_are_not_positive() -> None:
    effects = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, -1.0, 1.0], [0.0, -1.0, 1.0], [0.0, -1.0, 1.0]])
    assert n_majority_sign(effects).tolist() == [5, 5, 3]
    assert effect_statistics(effects, RULE).consistency.tolist() == [1.0, 1.0, 0.6]


def test_negative_zero_is_zero() -> None:
    assert n_majority_sign(np.array([[-0.0], [1.0], [1.0]])).tolist() == [2]


@pytest.mark.parametrize("threshold", [0.7, 0.6, 0.55, 0.35, 0.1, 0.9, 1 / 3, 2 / 3, 0.123456789])
def test_consistency_on_the_threshold_is_no_edge(threshold: float) -> None:
    """n_majority / n equal to the threshold as printed is not more than it, whatever floats make of it."""
    rule = EdgeRule(min_consistency=threshold)
    for n in (10, 20, 100, 1000):
        exact = round(threshold * n)
        if abs(exact - threshold * n) > 1e-9:
            continue
        holds = rule.holds(np.full(3, 9.0), np.array([exact - 1, exact, exact + 1]), n)
        assert holds.tolist() == [False, False, True]


@pytest.mark.parametrize("threshold", [0.7123456789012345, 0.30000000000000004, 1e-20])
def test_thresholds_with_many_digits(threshold: float) -> None:
    """Exact fractions of such thresholds leave the range of int64."""
    n = 2000
    n_majority = np.array([1, 500, 1000, 1500, 2000])
    holds = EdgeRule(min_consistency=threshold).holds(np.full(5, 9.0), n_majority, n)
    assert holds.tolist() == [m / n > threshold for m in n_majority.tolist()]


def test_margin_of_d() -> None:
    d = np.array([0.5, -0.5, 0.5 + 5e-10, 0.5 + 2e-9, -0.5 - 2e-9, 0.5 - 1e-9])
    assert RULE.holds(d, np.full(6, 10), 10).tolist() == [False, False, False, True, True, False]


def test_nothing_is_an_edge_without_targets() -> None:
    statistics = effect_statistics(np.zeros((5, 0)), RULE)
    assert statistics.is_edge.shape == statistics.d.shape == (0,)


class TestEdgeRule:
    """Effects made by hand, then the rule and the reference."""

    @staticmethod
    def edges(effects: np.ndarray, rule: EdgeRule | None = None) -> list[bool]:
        return effect_statistics(effects, rule or EdgeRule()).is_edge.tolist()

    def test_one_in_four(self) -> None:
        """Non-zero in one of four cells gives |d| = 0.5 exactly, whatever the number: never an edge."""
        rng = np.random.default_rng(0)
        effects = np.zeros((4, 2000))
        effects[rng.integers(4, size=2000), np.arange(2000)] = rng.normal(size=2000) * 10.0 ** rng.uniform(-6, 6, 2000)
        statistics = effect_statistics(effects, EdgeRule())
        assert (abs(statistics.d) > 0.5).any(), "rounding must have had its chance to decide"
        np.testing.assert_allclose(abs(statistics.d), 0.5, atol=1e-12)
        assert not statistics.is_edge.any()
        assert not any(reference.is_edge(column) for column in effects.T[:100])

    def test_two_in_eight_is_no_edge_three_in_eight_is_none_either_but_by_its_sign(self) -> None:
        effects = np.zeros((8, 3))
        effects[:2, 0] = 1.0  # d = 0.54, 6 of 8 not positive
        effects[:3, 1] = 1.0  # d = 0.72, 5 of 8 not positive
        effects[:3, 2] = -1.0  # d = -0.72, 8 of 8 not positive
        assert self.edges(effects) == [True, False, True]
        assert [reference.is_edge(column) for column in effects.T] == [True, False, True]

    @pytest.mark.parametrize(
        ("n_majority", "n", "holds"), [(7, 10, False), (8, 10, True), (14, 20, False), (15, 20, True)]
    )
    def test_consistency_boundary(self, n_majority: int, n: int, holds: bool) -> None:
        column = np.full(n, -0.001)
        column[:n_majority] = np.linspace(5.0, 6.0, n_majority)
        assert abs(reference.cohens_d(column)) > 0.6
        assert self.edges(column[:, None]) == [holds]
        assert self.edges(-column[:, None]) == [holds]
        assert reference.is_edge(column) is holds

    def test_zeros_count_as_not_positive(self) -> None:
        effects = np.zeros((10, 2))
        effects[:7, 0] = np.linspace(5.0, 6.0, 7)  # 7 positive, 3 zeros: 0.7, no edge
        effects[:7, 1] = -np.linspace(5.0, 6.0, 7)  # 7 negative, 3 zeros: 1.0, an edge
        statistics = effect_statistics(effects, EdgeRule())
        assert statistics.consistency.tolist() == [0.7, 1.0]
        assert statistics.is_edge.tolist() == [False, True]

    def test_other_thresholds(self) -> None:
        column = np.array([1.0, 1.1, 0.9, 1.2, -0.2])[:, None]  # d = 1.42, 4 of 5
        assert self.edges(column, EdgeRule(1.4, 0.79)) == [True]
        assert self.edges(column, EdgeRule(1.5, 0.5)) == [False]
        assert self.edges(column, EdgeRule(0.5, 0.8)) == [False]
        assert self.edges(column, EdgeRule(0.0, 0.0)) == [True]
