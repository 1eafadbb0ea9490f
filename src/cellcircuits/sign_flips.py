"""Sign-flip tests of one feature's effects, and how many edges a rule calls where there are none.

Null hypothesis: a cell's effects are as likely as their negatives. All targets of a cell are flipped together, which
keeps their dependence. No flip changes Q, the sum of squares, and for given Q |d| grows with |sum|:

    |d| > t   <=>   |sum| > n sqrt(t^2 Q / (n - 1 + n t^2))

so two matrix products, of sign vectors with the effects and with their signs, give p and the null's edges at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellcircuits.stats import D_MARGIN, EdgeRule

MAX_EXACT_CELLS = 12
# Sums that are equal but for float32 rounding count as equal, as a share of the sum of absolute effects.
TIE = 1e-5
ELEMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Flips:
    """Sign vectors over the cells of one feature.

    `signs` (n_vectors, n_cells) int8 of -1 and 1; `is_exact` where they are all there are, up to a common sign.
    """

    signs: NDArray[np.int8]
    is_exact: bool

    def fractions(self, n_as_large: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Two-sided p, as numerators and their denominator, from the number of vectors with a |sum| as large.

        The observed vector is one of the complete list; to drawn ones it is added.

        Source: Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9, 39 (2010).
        """
        added = 0 if self.is_exact else 1
        return n_as_large + added, len(self.signs) + added


def flips_of(n_cells: int, n_draws: int, rng: np.random.Generator) -> Flips:
    """All sign vectors for up to 12 cells, else `n_draws` drawn ones.

    A vector and its negative give the same |sum|, so in the complete list the first cell keeps its sign.
    """
    if n_cells <= MAX_EXACT_CELLS:
        codes = np.arange(1 << max(0, n_cells - 1))[:, None] >> np.arange(n_cells)[::-1]
        return Flips((1 - 2 * (codes & 1)).astype(np.int8), is_exact=True)
    return Flips(random_signs((n_draws, n_cells), rng), is_exact=False)


def random_signs(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.int8]:
    """-1 or 1 with equal chance."""
    return 2 * rng.integers(0, 2, shape, dtype=np.int8) - np.int8(1)


class SignedSums:
    """Effects of one feature, ready for products with many sign or weight vectors over the cells.

    A row r over the cells stands for the sample that holds cell i |r_i| times, with the sign of r_i.
    """

    def __init__(self, effects: NDArray[np.float64], device: torch.device) -> None:
        """Bring the effects to the device.

        Args:
            effects: (n_cells, n_targets), each target non-zero somewhere.
            device: where to compute, in float32: effects are scaled per target, which changes neither d nor a sign.
        """
        scaled = effects / np.abs(effects).max(axis=0, keepdims=True, initial=0.0)
        self.device = device
        self.values = torch.from_numpy(scaled.astype(np.float32)).to(device)
        self.signs = torch.from_numpy(np.sign(effects).astype(np.float32)).to(device)

    def test(self, flips: Flips, rule: EdgeRule) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sums of the flipped effects against the observed ones, and against the rule.

        Returns:
            For every target, how many vectors give a |sum| of at least the observed one, (n_targets,); for every
            vector, how many targets the rule calls an edge, (n_vectors,).
        """
        observed = self._observed()
        once = torch.ones(1, len(self.values), device=self.device)
        limit, bounds = self._limit(once, rule.min_abs_d), self._bounds(once, rule.min_consistency)
        n_as_large = torch.zeros(self.values.shape[1], dtype=torch.int64, device=self.device)
        n_edges = []
        for rows in self._pieces(flips.signs):
            sums = (rows @ self.values).abs_()
            n_as_large += (sums >= observed).sum(dim=0)
            n_edges.append(((sums > limit) & _is_outside(rows @ self.signs, bounds)).sum(dim=1))
        return n_as_large.cpu().numpy(), torch.cat(n_edges).cpu().numpy()

    def n_as_large(self, flips: Flips) -> NDArray[np.int64]:
        """The first part of `test`: how many vectors give a |sum| of at least the observed one, (n_targets,)."""
        observed = self._observed()
        n_as_large = torch.zeros(self.values.shape[1], dtype=torch.int64, device=self.device)
        for rows in self._pieces(flips.signs):
            n_as_large += ((rows @ self.values).abs_() >= observed).sum(dim=0)
        return n_as_large.cpu().numpy()

    def n_edges(self, rows: NDArray[np.integer], rule: EdgeRule) -> NDArray[np.int64]:
        """How many targets the rule calls an edge in each sample: (n_rows, n_cells) -> (n_rows,)."""
        found = [np.zeros(0, dtype=np.int64)]
        for piece in self._pieces(rows):
            weights, sums, signs = piece.abs(), (piece @ self.values).abs_(), piece @ self.signs
            is_large = sums > self._limit(weights, rule.min_abs_d)
            is_consistent = _is_outside(signs, self._bounds(weights, rule.min_consistency))
            found.append((is_large & is_consistent).sum(dim=1).cpu().numpy())
        return np.concatenate(found)

    def sweep(self, signs: NDArray[np.integer], rules: Sequence[Sequence[EdgeRule]]) -> NDArray[np.int64]:
        """Edges summed over sign vectors, for a table of rules with one |d| per row and one consistency per column."""
        once = torch.ones(1, len(self.values), device=self.device)
        limits = [self._limit(once, row[0].min_abs_d) for row in rules]
        bounds = [self._bounds(once, rule.min_consistency) for rule in rules[0]]
        counts = torch.zeros(len(limits), len(bounds), dtype=torch.int64, device=self.device)
        for piece in self._pieces(signs):
            sums, sums_of_signs = (piece @ self.values).abs_(), piece @ self.signs
            is_consistent = [_is_outside(sums_of_signs, of_one) for of_one in bounds]
            is_large = [sums > limit for limit in limits]
            counts += torch.stack([torch.stack([(a & b).sum() for b in is_consistent]) for a in is_large])
        return counts.cpu().numpy()

    def _observed(self) -> Tensor:
        """|sum| of the effects as they are, less what rounding may take from an equal one."""
        return self.values.sum(dim=0).abs() - TIE * self.values.abs().sum(dim=0)

    def _pieces(self, rows: NDArray[np.integer]) -> Iterator[Tensor]:
        step = max(1, ELEMENTS_AT_ONCE // max(1, self.values.shape[1]))
        for start in range(0, len(rows), step):
            yield torch.from_numpy(rows[start : start + step].astype(np.float32)).to(self.device)

    def _limit(self, weights: Tensor, min_abs_d: float) -> Tensor:
        """What |sum| must exceed for |d| to exceed the threshold, in samples that hold each cell `weights` times."""
        n = weights.sum(dim=1, keepdim=True)  # (n_rows, 1) cells of the sample, repeats counted
        t = min_abs_d + D_MARGIN
        spread = (n * n * t * t / (n - 1 + n * t * t)).clamp(min=0)
        limit = (spread * (weights @ self.values.square())).sqrt_() + TIE * (weights @ self.values.abs())
        return torch.where(n > 1, limit, torch.inf)  # one cell has no spread

    def _bounds(self, weights: Tensor, min_consistency: float) -> tuple[Tensor, Tensor]:
        """Sums of signs under the first and above the second of which a target is consistent.

        An effect of zero counts as not positive, flipped or not, and (non-zero + sum of signs) / 2 are positive.
        """
        n, n_nonzero = weights.sum(dim=1, keepdim=True), weights @ self.signs.abs()
        threshold = Fraction(str(min_consistency))
        too_few = n.long() * threshold.numerator // threshold.denominator
        return 2 * (n - too_few) - n_nonzero, 2 * too_few - n_nonzero


def _is_outside(values: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
    return (values < bounds[0]) | (values > bounds[1])
