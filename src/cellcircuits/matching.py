"""Matching features by how often they fire: within a caliper, without replacement. NumPy only."""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def within_caliper(values: NDArray[np.float64], of: Rows, among: Rows, caliper: float) -> list[Rows]:
    """For every row of `of`, the rows of `among` whose value differs by at most `caliper`, ascending."""
    order = among[np.argsort(values[among], kind="stable")]
    ascending = values[order]
    low = np.searchsorted(ascending, values[of] - caliper, side="left")
    high = np.searchsorted(ascending, values[of] + caliper, side="right")
    return [np.sort(order[i:j]) for i, j in zip(low, high, strict=True)]


def match(candidates: Sequence[Rows], rng: np.random.Generator | None = None) -> list[int | None]:
    """Give as many as possible one candidate each, no candidate twice.

    Those who come first are served first: adding a later one never takes the match away from an earlier one,
    though it may change whom that one is matched with.

    Args:
        candidates: (n,) rows that each may be matched with.
        rng: draws the order of trial; None goes by the order given and keeps everything fixed.

    Returns:
        (n,) the row that each is matched with, None for one without.
    """
    partner: dict[int, int] = {}  # by place in `candidates`
    taken_by: dict[int, int] = {}  # by row
    order = range(len(candidates)) if rng is None else rng.permutation(len(candidates)).tolist()
    tried = [rows.tolist() if rng is None else rng.permutation(rows).tolist() for rows in candidates]
    for start in order:
        _serve(start, tried, partner, taken_by)
    return [partner.get(who) for who in range(len(candidates))]


def _serve(start: int, candidates: Sequence[Sequence[int]], partner: dict[int, int], taken_by: dict[int, int]) -> None:
    """Find a free candidate for `start`, moving others to other candidates of theirs where need be."""
    reached_from: dict[int, int] = {}  # row: who would take it
    waiting = deque([start])
    while waiting:
        who = waiting.popleft()
        for row in candidates[who]:
            if row in reached_from:
                continue
            reached_from[row] = who
            if row not in taken_by:
                _move_along(row, reached_from, partner, taken_by)
                return
            waiting.append(taken_by[row])


def _move_along(free: int, reached_from: dict[int, int], partner: dict[int, int], taken_by: dict[int, int]) -> None:
    """Let whoever reached the free row have it, and so on back to the one who had none."""
    row: int | None = free
    while row is not None:
        who = reached_from[row]
        taken_by[row] = who
        row, partner[who] = partner.get(who), row
