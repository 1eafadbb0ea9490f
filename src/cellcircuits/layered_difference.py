"""Features of two kinds from several layers, compared within layers. NumPy only.

A layer in which everything moves the readout more would make the kind that it holds more of look stronger. So the
difference is taken layer by layer and averaged, which is the coefficient of the kind in a regression on kind and layer:

    sum_l w_l (mean ON_l - mean OFF_l) / sum_l w_l,   w_l = n_on,l n_off,l / (n_on,l + n_off,l)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TIE = 1e-12  # differences that differ by rounding count as equal, as a share of the largest value
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Layered:
    """Values of one kind of feature, and the layer of each; (n,) both."""

    values: Floats
    layers: NDArray[np.int64]

    def of_layers(self, layers: NDArray[np.int64]) -> "Layered":
        """The features of these layers."""
        kept = np.isin(self.layers, layers)
        return Layered(self.values[kept], self.layers[kept])


def comparable(on: Layered, off: Layered) -> tuple[Layered, Layered]:
    """The features of the layers that have both kinds."""
    both = np.intersect1d(on.layers, off.layers)
    return on.of_layers(both), off.of_layers(both)


def difference(on: Layered, off: Layered) -> float:
    """ON minus OFF within layers, of features from `comparable`, at least one of each kind."""
    return float(_differences(on, off, np.ones((1, len(on.values))), np.ones((1, len(off.values))))[0])


def difference_interval(on: Layered, off: Layered, n_resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """95% percentile interval of `difference` from resampling the features of either kind."""
    n_on, n_off = len(on.values), len(off.values)
    drawn = _differences(
        on,
        off,
        rng.multinomial(n_on, np.full(n_on, 1 / n_on), n_resamples),
        rng.multinomial(n_off, np.full(n_off, 1 / n_off), n_resamples),
    )
    low, high = np.percentile(drawn[np.isfinite(drawn)], (2.5, 97.5))
    return float(low), float(high)


def difference_p(on: Layered, off: Layered, n_permutations: int, rng: np.random.Generator) -> float:
    """Two-sided p of `difference` from permutations of the kinds within layers."""
    values, layers = np.concatenate([on.values, off.values]), np.concatenate([on.layers, off.layers])
    is_on = np.tile(np.arange(len(values)) < len(on.values), (n_permutations, 1))
    for layer in np.unique(layers):
        members = np.flatnonzero(layers == layer)
        is_on[:, members] = rng.permuted(is_on[:, members], axis=1)
    every = Layered(values, layers)
    observed = abs(difference(on, off)) - TIE * float(np.abs(values).max())
    return float((1 + (np.abs(_differences(every, every, is_on, ~is_on)) >= observed).sum()) / (1 + n_permutations))


def _differences(on: Layered, off: Layered, times_on: NDArray, times_off: NDArray) -> Floats:
    """`difference` of samples that hold a feature as often as `times` (n_samples, n) says; NaN where none compares."""
    total, weight = np.zeros(len(times_on)), np.zeros(len(times_on))
    for layer in np.union1d(on.layers, off.layers):
        (n_on, of_on), (n_off, of_off) = (
            (times[:, of.layers == layer].sum(axis=1), times[:, of.layers == layer] @ of.values[of.layers == layer])
            for of, times in ((on, times_on), (off, times_off))
        )
        # w_l (of_on / n_on - of_off / n_off), which is 0 where one of the two is missing
        n_both = np.maximum(1, n_on + n_off)
        total += (of_on * n_off - of_off * n_on) / n_both
        weight += n_on * n_off / n_both
    return np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)
