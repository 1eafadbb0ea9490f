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
# What is worked on at once stays in a core's cache; an accelerator wants much work per call.
ELEMENTS_AT_ONCE, COLUMNS_AT_ONCE = 1 << 17, 1 << 10
ELEMENTS_ON_ACCELERATOR = 1 << 22


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
        values, signs = scaled.astype(np.float32), np.sign(effects).astype(np.float32)
        on_cpu = device.type == "cpu"
        width = COLUMNS_AT_ONCE if on_cpu else max(1, effects.shape[1])
        self.device = device
        self._elements = ELEMENTS_AT_ONCE if on_cpu else ELEMENTS_ON_ACCELERATOR
        self._parts = [
            _Columns.of(values[:, start : start + width], signs[:, start : start + width], device)
            for start in range(0, effects.shape[1], width)
        ]

    def test(self, flips: Flips, rule: EdgeRule) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sums of the flipped effects against the observed ones, and against the rule.

        Returns:
            For every target, how many vectors give a |sum| of at least the observed one, (n_targets,); for every
            vector, how many targets the rule calls an edge, (n_vectors,).
        """
        rows = self._rows(flips.signs)
        n_edges = torch.zeros(len(rows), dtype=torch.int32, device=self.device)
        n_as_large = [np.zeros(0, dtype=np.int64)]
        for part in self._parts:
            observed = part.observed()
            once = torch.ones_like(rows[:1])
            limit, shift, least = part.limit(once, rule.min_abs_d), part.shift(once), _least(once, rule.min_consistency)
            of_part = torch.zeros(part.width, dtype=torch.int32, device=self.device)
            for at in self._pieces(len(rows), part.width):
                sums = (rows[at] @ part.values).abs_()
                of_part += (sums >= observed).sum(dim=0, dtype=torch.int32)
                is_edge = (sums > limit).logical_and_(torch.addmm(shift, rows[at], part.signs).abs_() > least)
                n_edges[at] += is_edge.sum(dim=1, dtype=torch.int32)
            n_as_large.append(of_part.cpu().numpy().astype(np.int64))
        return np.concatenate(n_as_large), n_edges.cpu().numpy().astype(np.int64)

    def n_as_large(self, flips: Flips) -> NDArray[np.int64]:
        """The first part of `test`: how many vectors give a |sum| of at least the observed one, (n_targets,)."""
        rows = self._rows(flips.signs)
        found = [np.zeros(0, dtype=np.int64)]
        for part in self._parts:
            observed = part.observed()
            of_part = torch.zeros(part.width, dtype=torch.int32, device=self.device)
            for at in self._pieces(len(rows), part.width):
                of_part += ((rows[at] @ part.values).abs_() >= observed).sum(dim=0, dtype=torch.int32)
            found.append(of_part.cpu().numpy().astype(np.int64))
        return np.concatenate(found)

    def n_edges(self, weights: NDArray[np.integer], signs: NDArray[np.int8], rule: EdgeRule) -> NDArray[np.int64]:
        """How many targets the rule calls an edge in samples of the cells, each of them flipped in several ways.

        Args:
            weights: (n_samples, n_cells) how often a sample holds each cell.
            signs: (n_samples, n_flips, n_cells) of -1 and 1; repeats of a cell flip together.
            rule: the thresholds.

        Returns:
            (n_samples, n_flips).
        """
        n_flips = signs.shape[1]
        once, flipped = self._rows(weights), self._rows(weights[:, None, :] * signs)
        least = _least(once, rule.min_consistency)[:, :, None]
        found = torch.zeros(signs.shape[:2], dtype=torch.int32, device=self.device)
        for part in self._parts:
            for at in self._pieces(len(once), n_flips * part.width):
                rows = flipped[at].flatten(0, 1)
                sums = (rows @ part.values).abs_().unflatten(0, (-1, n_flips))  # (n_samples, n_flips, n_targets)
                n_signs = (rows @ part.signs).unflatten(0, (-1, n_flips)).add_(part.shift(once[at])[:, None]).abs_()
                is_large = sums > part.limit(once[at], rule.min_abs_d)[:, None]
                found[at] += is_large.logical_and_(n_signs > least[at]).sum(dim=2, dtype=torch.int32)
        return found.cpu().numpy().astype(np.int64)

    def sweep(self, signs: NDArray[np.integer], rules: Sequence[Sequence[EdgeRule]]) -> NDArray[np.int64]:
        """Edges summed over sign vectors, for a table of rules.

        Args:
            signs: (n_vectors, n_cells) of -1 and 1.
            rules: one |d| per row and one consistency per column, both ascending.
        """
        rows = self._rows(signs)
        once = torch.ones_like(rows[:1])
        shape = (len(rules) + 1, len(rules[0]) + 1)
        leasts = [_least(once, rule.min_consistency) for rule in rules[0]]
        counts = np.zeros(shape, dtype=np.int64)  # by how many thresholds of |d| and of consistency are passed
        for part in self._parts:
            limits, shift = [part.limit(once, row[0].min_abs_d) for row in rules], part.shift(once)
            for at in self._pieces(len(rows), part.width):
                sums, n_signs = (rows[at] @ part.values).abs_(), torch.addmm(shift, rows[at], part.signs).abs_()
                passed = _n_passed(sums, limits).mul_(shape[1]).add_(_n_passed(n_signs, leasts))
                counts += torch.bincount(passed.flatten().long(), minlength=counts.size).cpu().numpy().reshape(shape)
        return counts[::-1, ::-1].cumsum(axis=0).cumsum(axis=1)[::-1, ::-1][1:, 1:]

    def _rows(self, rows: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(rows.astype(np.float32)).to(self.device)

    def _pieces(self, n_rows: int, width: int) -> Iterator[slice]:
        step = max(1, self._elements // max(1, width))
        return (slice(start, start + step) for start in range(0, n_rows, step))


@dataclass(frozen=True)
class _Columns:
    """Some of the targets: their scaled effects, the signs and the sizes of these, (n_cells, n_targets) each."""

    values: Tensor
    signs: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, values: NDArray[np.float32], signs: NDArray[np.float32], device: torch.device) -> "_Columns":
        """Bring them to the device."""
        on_device, of_signs = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (values, signs))
        return cls(on_device, of_signs, on_device.abs())

    def observed(self) -> Tensor:
        """|sum| of the effects as they are, less what rounding may take from an equal one, (1, n_targets).

        A product like those of the flipped ones, so that both round alike where a machine is set to compute in TF32.
        """
        return (torch.ones_like(self.values[:, :1]).T @ self.values).abs_() - TIE * self.sizes.sum(dim=0)

    @property
    def width(self) -> int:
        """How many they are."""
        return self.values.shape[1]

    def limit(self, weights: Tensor, min_abs_d: float) -> Tensor:
        """What |sum| must exceed for |d| to exceed the threshold, in samples that hold each cell `weights` times.

        (n_samples, n_cells) -> (n_samples, n_targets).
        """
        n = weights.sum(dim=1, keepdim=True)  # (n_samples, 1) cells of the sample, repeats counted
        t = min_abs_d + D_MARGIN
        spread = (n * n * t * t / (n - 1 + n * t * t)).clamp(min=0)
        limit = (spread * (weights @ self.values.square())).sqrt_() + TIE * (weights @ self.sizes)
        return torch.where(n > 1, limit, torch.inf)  # one cell has no spread

    def shift(self, weights: Tensor) -> Tensor:
        """What makes of the sum of signs the positive cells less the others, an effect of zero being no positive one.

        Of n cells with a sum of signs s, (non-zero + s) / 2 are positive: less the others that is s + non-zero - n.
        """
        return weights @ self.signs.abs() - weights.sum(dim=1, keepdim=True)


def _n_passed(values: Tensor, thresholds: Sequence[Tensor]) -> Tensor:
    """How many of the thresholds each value exceeds."""
    passed = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for threshold in thresholds:
        passed += values > threshold
    return passed


def _least(weights: Tensor, min_consistency: float) -> Tensor:
    """What the positive cells less the others must exceed, either way, for a target to be consistent: (n_samples, 1).

    Floors: a majority of exactly the threshold is too few, whatever rounding does to the product.
    """
    n = weights.sum(dim=1, keepdim=True)
    threshold = Fraction(str(min_consistency))
    return 2 * (n.long() * threshold.numerator // threshold.denominator) - n
