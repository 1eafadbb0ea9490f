"""Part cells into two halves, one to choose and one to test: seeded, whatever the order of the cells. NumPy only."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def first_half(
    names: Sequence[str], types: Sequence[str], donors: Sequence[str] | None, seed: int
) -> NDArray[np.bool_]:
    """Which cells are of the first half, (n_cells,).

    Without donors every type is halved, an odd cell going to a half drawn for it. With donors each goes as a whole: in
    a drawn order, those with most cells first, to the half with fewer cells so far.

    Args:
        names: distinct names of the cells.
        types: type of each cell.
        donors: donor or batch of each cell, or None.
        seed: of the draws.

    Raises:
        ValueError: there is one donor only.
    """
    if donors is None:
        chosen = {name for of_type in sorted(set(types)) for name in _half(names, types, of_type, seed)}
        return np.array([name in chosen for name in names], dtype=bool)
    sizes = {donor: list(donors).count(donor) for donor in sorted(set(donors))}
    if len(sizes) < 2:
        raise ValueError("one donor cannot be parted")
    drawn = [list(sizes)[i] for i in _generator(seed, "donors").permutation(len(sizes))]
    totals, half_of = [0, 0], {}
    for donor in sorted(drawn, key=lambda donor: -sizes[donor]):  # stable: equal sizes keep the drawn order
        half_of[donor] = int(totals[1] < totals[0])
        totals[half_of[donor]] += sizes[donor]
    return np.array([half_of[donor] == 0 for donor in donors], dtype=bool)


def drawn_cells(names: Sequence[str], n_cells: int, seed: int) -> NDArray[np.int64]:
    """Numbers of `n_cells` of the cells, ascending; all of them where there are fewer."""
    order = np.argsort(np.array(names, dtype=str), kind="stable")
    return np.sort(order[_generator(seed, "steered").permutation(len(order))[:n_cells]])


def _half(names: Sequence[str], types: Sequence[str], wanted: str, seed: int) -> list[str]:
    of_type = sorted(name for name, of_cell in zip(names, types, strict=True) if of_cell == wanted)
    rng = _generator(seed, f"type {wanted}")
    size = len(of_type) // 2 + (len(of_type) % 2) * int(rng.integers(2))
    return [of_type[i] for i in rng.permutation(len(of_type))[:size]]


def _generator(seed: int, what: str) -> np.random.Generator:
    """One of its own for every draw, so that none depends on another."""
    code = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "big")
    return np.random.default_rng(np.random.SeedSequence([seed, code]))
