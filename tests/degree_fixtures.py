"""Degrees drawn from known forms and causes."""

import numpy as np
from scipy import special

from cellcircuits.degree_table import DegreeTable


def draw_power_law(alpha: float, first: int, n: int, seed: int) -> np.ndarray:
    """Discrete power law by inversion of P(X >= x) on a table."""
    x = np.arange(first, first + 400_000)
    survival = special.zeta(alpha, x) / special.zeta(alpha, first)
    return x[np.searchsorted(-survival, -np.random.default_rng(seed).random(n), side="right") - 1]


def driven_by_frequency(n: int, seed: int, norm_effect: float = 0.0) -> DegreeTable:
    """Degrees that depend on frequency, and on the norm as much as asked; the norm depends on frequency."""
    rng = np.random.default_rng(seed)
    log_frequency = rng.uniform(-3, -1, n)
    norm = np.exp(rng.normal(0, 0.5, n) + log_frequency)
    mean = 60 * 10 ** (0.7 * (log_frequency + 2)) * (norm / np.exp(log_frequency)) ** norm_effect
    degrees = rng.poisson(mean * rng.gamma(4, 1 / 4, n))
    return DegreeTable("planted", np.arange(n), degrees, 10**log_frequency, np.full(n, np.nan), {"ablated_norm": norm})


def annotated_by_frequency(n: int, seed: int, degree_effect: float = 0.0) -> DegreeTable:
    """Frequent features have more edges and are annotated less; degree itself matters as much as asked."""
    rng = np.random.default_rng(seed)
    log_frequency = rng.normal(-2.2, 0.4, n)
    degrees = rng.poisson(300 * 10 ** (0.7 * (log_frequency + 2.2)) * rng.gamma(3, 1 / 3, n))
    logit = -0.2 - 2.5 * (log_frequency + 2.2) + degree_effect * (np.log1p(degrees) - 5.5)
    annotated = rng.random(n) < 1 / (1 + np.exp(-logit))
    return DegreeTable("planted", np.arange(n), degrees, 10**log_frequency, annotated.astype(float))
