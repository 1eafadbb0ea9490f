"""Which cells controlled steering uses for what: two halves of the run's, and others for the probe."""

import argparse
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellcircuits.cell_halves import drawn_cells, first_half
from cellcircuits.cells import Cell
from cellcircuits.errors import UserError
from cellcircuits.maturity_probe import require_both_kinds
from cellcircuits.steering_tests import MIN_CELLS
from cellcircuits.trajectory import EARLY_PERCENTILE, Trajectory, open_trajectory
from cellcircuits.trajectory_flags import trajectory_selection

if TYPE_CHECKING:
    from cellcircuits.inputs import ModelAndCells

log = logging.getLogger(__name__)
DONORS = "name the one with donors or batches (--donor-column)"
MIN_STEERED = 2
N_TYPES_SHOWN = 10


@dataclass(frozen=True)
class Halves:
    """The run's cells, parted.

    Attributes:
        first: numbers of the first half's cells, ascending; `early` and `late` number its groups among the run's cells.
        order: the trajectory of the first half alone, in the order of `first`.
        steered: early cells of the second half, ascending.
        n_second: cells of the second half; `n_second_early` of them are early.
        by: how they were parted, in words.
    """

    first: NDArray[np.int64]
    order: Trajectory
    steered: NDArray[np.int64]
    n_second: int
    n_second_early: int
    by: str

    def sides(self, n_cells: int) -> str:
        """SHA-256 of what every cell of the run is used for."""
        sides = np.zeros(n_cells, dtype=np.int8)
        sides[self.first] = 1
        sides[self.first[self.order.early]] = 2
        sides[self.first[self.order.late]] = 3
        sides[self.steered] = 4
        return hashlib.sha256(sides.tobytes()).hexdigest()

    def facts(self, features: str) -> dict[str, Any]:
        """What the record says about the halves; `features` says where the panel came from."""
        return {
            "parted": self.by,
            "n_first": len(self.first),
            "n_second": self.n_second,
            "n_first_early": len(self.order.early),
            "n_first_late": len(self.order.late),
            "n_second_early": self.n_second_early,
            "n_steered": len(self.steered),
            "features": features,
            "signatures": "of the early and late cells of the first half",
            "early_and_late": "outer thirds of pseudotime in the first half; the same cut says which cells of the "
            "second are early. Pseudotime is computed from expression, without the model, on both halves together",
            "steered": "early cells of the second half only",
        }


def open_halves(args: argparse.Namespace, opened: "ModelAndCells", trajectory: Trajectory) -> Halves:
    """Part the cells that have a pseudotime.

    Raises:
        UserError: no such donor column, cells without a donor, one donor only, or too few cells of a kind.
    """
    cells, measured = opened.cells.cells, np.flatnonzero(trajectory.measured)
    names = _distinct_names([cells[i] for i in measured])
    donors = None if args.donor_column is None else _donors(args, args.data_path, [cells[i] for i in measured])
    try:
        is_first = first_half(names, [trajectory.cell_types[i] for i in measured], donors, args.seed)
    except ValueError:
        raise UserError(
            f"--donor-column {args.donor_column}: all {len(measured)} cells are of one donor, so the donors cannot be "
            "parted; leave the flag out to part the cells within each type."
        ) from None
    first, second = measured[is_first], measured[~is_first]
    order = replace(
        trajectory,
        pseudotime=trajectory.pseudotime[first],
        cell_types=tuple(trajectory.cell_types[i] for i in first),
        tissues=tuple(trajectory.tissues[i] for i in first),
    )
    order.check()
    cut = np.percentile(order.pseudotime, EARLY_PERCENTILE)
    early = second[trajectory.pseudotime[second] <= cut]
    if len(early) < MIN_STEERED:
        raise UserError(
            f"the second half has {len(early)} early cells of {len(second)}, and {MIN_STEERED} are needed to steer in; "
            "take more cells (--n-cells) or other ones (--cell-types, --tissues)."
        )
    chosen = drawn_cells(_distinct_names([cells[i] for i in early]), args.n_steered, args.seed)
    if len(chosen) < MIN_CELLS:
        few = "Note: only %d cells are steered, and a feature counts in a contrast from %d on (--n-steered, --n-cells)."
        log.warning(few, len(chosen), MIN_CELLS)
    by = "halves within each cell type" if donors is None else f"whole donors of {args.donor_column}"
    return Halves(first, order, early[chosen], len(second), len(early), f"{by}, seed {args.seed}")


def _distinct_names(cells: Sequence[Cell]) -> list[str]:
    return [f"{cell.name}\0{cell.row:012d}" for cell in cells]


def _donors(args: argparse.Namespace, path: Path, cells: Sequence[Cell]) -> list[str]:
    """The donor of each cell.

    Raises:
        UserError: there is no such column, or a cell has none.
    """
    from cellcircuits.cell_rows import column_texts
    from cellcircuits.h5ad import H5adFile

    with H5adFile(path) as file:
        obs = file.obs().iloc[[cell.row for cell in cells]]
    donors = [str(donor) for donor in column_texts(obs, args.donor_column, str(path), DONORS)]
    n_without = donors.count("")
    if n_without:
        raise UserError(
            f"{path}: {n_without} of {len(cells)} cells have no obs {args.donor_column!r} (--donor-column); leave them "
            "out (--obs-filter) or name another column."
        )
    return donors


@dataclass(frozen=True)
class ProbeCells:
    """Cells for the probe: none of them is one of the run's.

    `is_late` (n_cells,), `donors` of each or None, `source` where they and their labels come from, in words.
    """

    cells: tuple[Cell, ...]
    is_late: NDArray[np.bool_]
    donors: NDArray[Any] | None
    source: str

    def fingerprint(self) -> str:
        """SHA-256 over tokens and labels, in order."""
        digest = hashlib.sha256(self.is_late.tobytes())
        for cell in self.cells:
            digest.update(f"{len(cell.tokens)} ".encode() + cell.tokens.astype("<i8").tobytes())
        return digest.hexdigest()


def open_probe_cells(args: argparse.Namespace, opened: "ModelAndCells") -> ProbeCells:
    """Draw and label the probe's cells: of another file, or those of the run's file that the run did not take.

    Args:
        args: the run's flags.
        opened: the run's model and cells.

    Raises:
        UserError: no cell is left, too few are early or late, or see `open_cells` and `open_trajectory`.
    """
    from cellcircuits.inputs import open_cells

    path = args.probe_data_path or args.data_path
    changed = {
        "data_path": path,
        "obs_filter": args.probe_filter or args.obs_filter,
        # as many as asked for are left when the run's own are taken out
        "n_cells": args.probe_cells + len(opened.cells.cells),
        "seed": (args.seed + 1) % 2**32,
        "traj_dir": None,
    }
    of_probe = argparse.Namespace(**{**vars(args), **changed})
    log.info("Cells for the probe:")
    try:
        drawn = open_cells(of_probe, opened.loaded, trajectory_selection(of_probe))
    except UserError as error:
        said = str(error).replace("--obs-filter", "--probe-filter") if args.probe_filter else error
        raise UserError(f"cells for the probe: {said}") from None
    cells = _others(drawn.cells.cells, opened.cells.cells, same_file=path.resolve() == args.data_path.resolve())
    n_left_out = len(drawn.cells.cells) - len(cells)
    if not cells:
        raise UserError(
            f"{path}: all {n_left_out} cells that match are cells of the run, by name or by content, so none is left "
            "for the probe; take fewer for the run (--n-cells), or name other ones (--probe-data-path, --probe-filter)."
        )
    log.info("%d of them left out: cells of the run, by name or by content", n_left_out)
    cells = tuple(cells[i] for i in drawn_cells(_distinct_names(cells), args.probe_cells, args.seed))
    others = replace(drawn, cells=replace(drawn.cells, cells=cells))
    labels, how, there = _labels(of_probe, others)
    used = np.flatnonzero(labels >= 0)
    require_both_kinds(labels[used] == 1, there)
    chosen = tuple(cells[i] for i in used)
    donors = None if args.donor_column is None else np.array(_donors(args, path, chosen))
    where = "other cells of the same file" if path.resolve() == args.data_path.resolve() else path.name
    return ProbeCells(chosen, labels[used] == 1, donors, f"{where} that the run did not take; {how}")


def _others(drawn: Sequence[Cell], taken: Sequence[Cell], *, same_file: bool) -> list[Cell]:
    """The drawn cells that are not among the taken ones: by row of the file, and whatever the file by tokens and name.

    Downsampling, or a file with other genes, changes the tokens of a cell; names that only count cells say nothing.
    """
    rows = {cell.row for cell in taken} if same_file else set()
    tokens = {cell.tokens.tobytes() for cell in taken}
    names = {cell.name for cell in taken if not cell.name.isdigit()}
    return [cell for cell in drawn if not (cell.row in rows or cell.name in names or cell.tokens.tobytes() in tokens)]


def _labels(args: argparse.Namespace, others: "ModelAndCells") -> tuple[NDArray[np.int8], str, str]:
    """1 late, 0 early, -1 neither, (n_cells,); how in words, and which types there are, for errors."""
    labels = np.full(len(others.cells.cells), -1, dtype=np.int8)
    if args.probe_labels is None:
        trajectory = open_trajectory(args, others)
        labels[trajectory.early], labels[trajectory.late] = 0, 1
        return labels, "early and late are the outer thirds of their own pseudotime", ""
    sides = [{name.lower() for name in names} for names in args.probe_labels]
    if sides[0] & sides[1]:
        raise UserError(f"--probe-labels: {sorted(sides[0] & sides[1])[0]!r} is named as early and as late.")
    types = _types(args, others.cells.cells)
    for side, names in enumerate(sides):
        labels[[i for i, name in enumerate(types) if name.lower() in names]] = side
    counts = Counter(types)
    there = ", ".join(f"{name} ({n})" for name, n in counts.most_common(N_TYPES_SHOWN))
    absent = sorted(sides[0].union(sides[1]) - {name.lower() for name in counts})
    if absent:
        log.warning("Note: --probe-labels: no probe cell is of type %s; there are %s.", ", ".join(absent), there)
    texts = ["; ".join(names) for names in args.probe_labels]
    how = f"early is {texts[0]}, late is {texts[1]} ({args.cell_type_column})"
    return labels, how, f" (their types: {there}; --cell-types chooses among all)"


def _types(args: argparse.Namespace, cells: Sequence[Cell]) -> list[str]:
    from cellcircuits.cell_rows import column_texts
    from cellcircuits.h5ad import H5adFile

    with H5adFile(args.data_path) as file:
        obs = file.obs().iloc[[cell.row for cell in cells]]
    mend = "name the one with cell types (--cell-type-column)"
    return [str(name) for name in column_texts(obs, args.cell_type_column, str(args.data_path), mend)]
