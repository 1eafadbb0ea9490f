"""combination_stats.py at its thresholds; whole records are checked against the slow implementation elsewhere."""

import numpy as np

from cellcircuits.combination_stats import additivity_ratio, class_counts


def test_a_denominator_of_001_or_less_gives_1():
    singles = np.array([[0.004, -0.004, 0.005, 0.0], [-0.006, 0.0061, 0.005, 0.0]])
    assert np.abs(singles).sum(axis=0)[0] == 0.01
    ratios = additivity_ratio(np.full(4, -0.02), singles)
    np.testing.assert_allclose(ratios, [1.0, 0.02 / 0.0101, 1.0, 1.0])


def test_both_bounds_of_additive_belong_to_it():
    ratios = np.array([0.0, np.nextafter(0.8, 0), 0.8, 1.0, 1.2, np.nextafter(1.2, 2), 5.0])
    counts = {"n_subadditive_3way": 2, "n_additive_3way": 3, "n_superadditive_3way": 2}
    assert class_counts(ratios, "_3way") == counts
