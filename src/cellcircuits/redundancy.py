"""How much smaller a joint mean effect is than the sum of the single ones, with an interval over the cells.

    index = 1 - |E joint| / |E sum|        projection = <E joint, E sum> / |E sum|^2

Norms over targets of the expected effect per cell. The norm of a mean over few cells is too long: its square exceeds
that of the expectation by the spread over the number of cells, and resampling cells adds the same once more. So
squares and products are taken between DIFFERENT cells only, which leaves neither in:

    <E x, E y>  is estimated by  sum over i != j of w_i w_j <x_i, y_j>  /  sum over i != j of w_i w_j

with weights 1, or the number of times that a bootstrap sample holds each cell. All of it follows from cells x cells
tables of products, so a sample costs n^2 and not n x targets. NumPy and SciPy.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

LEVEL = 0.95
NO_CELLS, NO_TARGETS = "fewer than two cells", "no target changes"
NO_SUM = "the sum of the single effects is not larger than its spread over the cells"
NO_INTERVAL = "too few cells or too weak effects for an interval"


@dataclass(frozen=True)
class Products:
    """Products over targets between cells, (n_cells, n_cells) each, a cell with itself left out.

    `joint` and `summed` of the joint effect, or of the sum of the single ones, with itself; `both` of one with the
    other, symmetrized.
    """

    joint: NDArray[np.float64]
    summed: NDArray[np.float64]
    both: NDArray[np.float64]

    @classmethod
    def of(cls, joint: NDArray[np.float64], summed: NDArray[np.float64]) -> "Products":
        """From effects (n_cells, n_targets)."""
        crossed = joint @ summed.T
        tables = (joint @ joint.T, summed @ summed.T, (crossed + crossed.T) / 2)
        return cls(*(table - np.diag(np.diag(table)) for table in tables))

    def weighted(self, weights: NDArray[np.float64]) -> tuple[NDArray, NDArray, NDArray]:
        """Sums over pairs of different cells for each row of weights, (n_rows, n_cells) -> three times (n_rows,)."""
        return tuple(((weights @ table) * weights).sum(axis=1) for table in (self.joint, self.summed, self.both))


def redundancy(
    joint: NDArray[np.float64], summed: NDArray[np.float64], n_resamples: int, rng: np.random.Generator
) -> dict[str, float | str | None]:
    """Index and projection with their 95% intervals.

    Args:
        joint: (n_cells, n_targets) effects of the joint ablation.
        summed: the same shape, the sum of those of the single ones.
        n_resamples: bootstrap samples of the cells.
        rng: draws them.

    Returns:
        For JSON: `redundancy_index` (0: additive, 1: nothing left, negative: synergy), `projection` (1: additive), each
        with `_low` and `_high`; `redundancy_index_plug_in`, from the norms of the means themselves; `reason`. What
        cannot be said is None, and `reason` says why.

    Source: percentile interval, its level widened by sqrt(n / (n - 1)) t(n - 1) / z, without which it is too narrow for
        few cells: Hesterberg, Am. Stat. 69, 371 (2015), section 3.3.
    """
    names = [f"{name}{end}" for name in ("redundancy_index", "projection") for end in ("", "_low", "_high")]
    answer: dict[str, float | str | None] = dict.fromkeys([*names, "redundancy_index_plug_in", "reason"])
    n_cells, n_targets = joint.shape
    if n_cells < 2 or not n_targets:
        return answer | {"reason": NO_CELLS if n_cells < 2 else NO_TARGETS}
    length = np.linalg.norm(summed.mean(axis=0))
    plug_in = float(1 - np.linalg.norm(joint.mean(axis=0)) / length) if length else None
    answer["redundancy_index_plug_in"] = plug_in
    products = Products.of(joint, summed)
    index, projection, has_sum = _ratios(products, np.ones((1, n_cells)))
    if not has_sum[0]:
        return answer | {"reason": NO_SUM}
    answer |= {"redundancy_index": float(index[0]), "projection": float(projection[0])}
    weights = rng.multinomial(n_cells, np.full(n_cells, 1 / n_cells), size=n_resamples).astype(np.float64)
    index, projection, has_sum = _ratios(products, weights)
    ends = widened_levels(n_cells)
    for name, values, most in (("redundancy_index", index, 1.0), ("projection", projection, np.inf)):
        # a sample that says nothing may say anything
        low, high = (np.where(has_sum, values, unknown) for unknown in (-np.inf, most))
        interval = [float(np.quantile(x, end, method="inverted_cdf")) for x, end in zip((low, high), ends, strict=True)]
        if np.isfinite(interval).all():
            answer |= {f"{name}_low": interval[0], f"{name}_high": interval[1]}
        else:
            answer["reason"] = NO_INTERVAL
    return answer


def widened_levels(n_cells: int) -> NDArray[np.float64]:
    """At which shares of a bootstrap distribution over `n_cells` cells a 95% interval ends, (2,)."""
    tails = np.array([0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return norm.cdf(np.sqrt(n_cells / (n_cells - 1)) * t.ppf(tails, n_cells - 1))


def _ratios(products: Products, weights: NDArray[np.float64]) -> tuple[NDArray, NDArray, NDArray[np.bool_]]:
    """Index, projection, and whether there is a sum to compare with, for each row of weights."""
    joint, summed, both = products.weighted(weights)
    has_sum = summed > 0
    divisor = np.where(has_sum, summed, 1.0)
    return 1 - np.sqrt(np.maximum(joint, 0.0) / divisor), both / divisor, has_sum
