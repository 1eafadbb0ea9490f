"""redundancy.py: products between different cells against loops over the cells of every sample, and what it refuses."""

import numpy as np
import pytest
from scipy.stats import t

from cellcircuits import redundancy as module
from cellcircuits.redundancy import Products, redundancy, widened_levels


def slow_ratios(joint: np.ndarray, summed: np.ndarray, sample: np.ndarray) -> tuple[float, float]:
    """Index and projection of a sample of cells with repeats, over all pairs that are not of one cell."""
    jj = ss = js = 0.0
    for a in sample:
        for b in sample:
            if a != b:
                jj += float(joint[a] @ joint[b])
                ss += float(summed[a] @ summed[b])
                js += float(joint[a] @ summed[b])
    return 1 - (max(jj, 0.0) / ss) ** 0.5, js / ss


@pytest.mark.parametrize("n_cells", [2, 3, 7, 12])
def test_every_sample_is_that_of_loops(n_cells: int) -> None:
    rng = np.random.default_rng(n_cells)
    summed = 1.0 + rng.normal(size=(n_cells, 9))
    joint = 0.6 * summed + 0.3 * rng.normal(size=summed.shape)
    products = Products.of(joint, summed)
    weights = rng.multinomial(n_cells, np.full(n_cells, 1 / n_cells), size=20).astype(float)
    index, projection, has_sum = module._ratios(products, weights)
    for row, weight in enumerate(weights.astype(int)):
        sample = np.repeat(np.arange(n_cells), weight)
        if len(set(sample)) == 1:
            assert not has_sum[row]
        elif has_sum[row]:
            np.testing.assert_allclose((index[row], projection[row]), slow_ratios(joint, summed, sample), rtol=1e-9)
    assert has_sum.any()


def test_the_answer_is_the_sample_of_all_cells_and_its_interval_that_of_the_samples() -> None:
    rng = np.random.default_rng(0)
    summed = rng.normal(1.0, 0.7, (15, 40))
    joint = 0.5 * summed + 0.1 * rng.normal(size=summed.shape)
    found = redundancy(joint, summed, 500, np.random.default_rng(3))
    index, projection = slow_ratios(joint, summed, np.arange(15))
    assert found["redundancy_index"] == pytest.approx(index) and found["projection"] == pytest.approx(projection)
    norms = [np.linalg.norm(x.mean(axis=0)) for x in (joint, summed)]
    assert found["redundancy_index_plug_in"] == pytest.approx(1 - norms[0] / norms[1])
    weights = np.random.default_rng(3).multinomial(15, np.full(15, 1 / 15), size=500)
    samples = sorted(slow_ratios(joint, summed, np.repeat(np.arange(15), weight))[0] for weight in weights)
    ends = widened_levels(15)
    ranks = [int(np.ceil(500 * end)) - 1 for end in ends]
    assert [found[f"redundancy_index_{end}"] for end in ("low", "high")] == pytest.approx([samples[r] for r in ranks])
    assert found["reason"] is None


@pytest.mark.parametrize(("share", "index"), [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (1.5, -0.5), (-1.0, 0.0)])
def test_the_same_share_in_every_cell_is_known_exactly(share: float, index: float) -> None:
    summed = np.random.default_rng(1).normal(2.0, 0.5, (9, 30))
    found = redundancy(share * summed, summed, 1000, np.random.default_rng(0))
    for end in ("", "_low", "_high"):
        assert found[f"redundancy_index{end}"] == pytest.approx(index, abs=1e-7)
        assert found[f"projection{end}"] == pytest.approx(share, abs=1e-7)


def test_it_depends_on_no_unit() -> None:
    rng = np.random.default_rng(2)
    joint, summed = rng.normal(1, 1, (2, 12, 20))
    one, other = (redundancy(f * joint, f * summed, 300, np.random.default_rng(0)) for f in (1.0, 1e-9))
    assert one == pytest.approx(other)


@pytest.mark.parametrize(
    ("joint", "reason"),
    [(np.zeros((0, 5)), module.NO_CELLS), (np.ones((1, 5)), module.NO_CELLS), (np.ones((4, 0)), module.NO_TARGETS),
     (np.zeros((6, 5)), module.NO_SUM), (np.eye(6), module.NO_SUM)],
)  # fmt: skip
def test_what_cannot_be_said_is_none_with_a_reason(joint: np.ndarray, reason: str) -> None:
    """One cell has no other; effects that are 0, or that no two cells share, have no size beyond their spread."""
    found = redundancy(joint, joint, 100, np.random.default_rng(0))
    assert found["reason"] == reason and found["redundancy_index"] is None and found["projection"] is None
    assert {end for end in found if end.endswith(("_low", "_high")) and found[end] is not None} == set()


def test_two_cells_have_an_index_and_no_interval() -> None:
    found = redundancy(np.ones((2, 3)), 2 * np.ones((2, 3)), 200, np.random.default_rng(0))
    assert found["redundancy_index"] == 0.5 and found["redundancy_index_low"] is None
    assert found["reason"] == module.NO_INTERVAL


def test_levels_are_widened_for_few_cells_only() -> None:
    low, high = widened_levels(8)
    assert low == pytest.approx(1 - high) and low < 0.01
    assert widened_levels(10_000) == pytest.approx([0.025, 0.975], abs=1e-4)
    assert t.ppf(0.975, 7) > 2.3  # what makes it so
