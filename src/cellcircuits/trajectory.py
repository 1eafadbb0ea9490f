"""A run's cells in the order of a trajectory: pseudotime, early and late cells, and what confounds them.

The pseudotime comes from a `cell_metadata.json` where that file is for the run's cells, and is computed
(`cellcircuits.pseudotime`) where it is not.
"""

import argparse
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellcircuits import cli
from cellcircuits.cells import Cell
from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json, write_json
from cellcircuits.pseudotime import SCANPY_SEED
from cellcircuits.trajectory_flags import root_flags_given
from cellcircuits.trajectory_root import compute_pseudotime, disconnected_cells

if TYPE_CHECKING:
    from cellcircuits.inputs import LayerSAE, ModelAndCells

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
METADATA = "cell_metadata.json"
EARLY_PERCENTILE, LATE_PERCENTILE = 33.3, 66.7
MIN_GROUP = 2
LARGEST_INTEGER = 1e300
MORE_CELLS = "take more cells (--n-cells), other ones (--cell-types, --tissues) or another root (--root-cell-type)"


@dataclass(frozen=True)
class Trajectory:
    """Where each of the run's cells stands.

    Attributes:
        pseudotime: (n_cells,) in the order of the run's cells; NaN is left out.
        cell_types: of each cell, as the file spells it; `tissues` alike, empty where the file has none.
        source: how the pseudotime came about.
        root: name of the cell where it starts, None where there is none or nobody recorded it.
        metadata_sha256: of the file that the pseudotime was read from, None where it was computed.
    """

    pseudotime: NDArray[np.float64]
    cell_types: tuple[str, ...]
    tissues: tuple[str, ...]
    source: str
    root: str | None = None
    metadata_sha256: str | None = None

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Which cells have a pseudotime, (n_cells,)."""
        return ~np.isnan(self.pseudotime)

    @property
    def seeds(self) -> dict[str, int]:
        """Seeds of what computed the pseudotime; none where it was read from a file."""
        return {"scanpy": SCANPY_SEED} if self.metadata_sha256 is None else {}

    @property
    def early(self) -> NDArray[np.int64]:
        """Cells up to the 33.3rd percentile of pseudotime, ascending."""
        return np.flatnonzero(self.pseudotime <= self._cut(EARLY_PERCENTILE))

    @property
    def late(self) -> NDArray[np.int64]:
        """Cells from the 66.7th percentile of pseudotime on, ascending."""
        return np.flatnonzero(self.pseudotime >= self._cut(LATE_PERCENTILE))

    def _cut(self, percentile: float) -> float:
        return float(np.percentile(self.pseudotime[self.measured], percentile))

    def check(self) -> None:
        """Refuse a trajectory whose two ends cannot be compared.

        Raises:
            UserError: no pseudotime, too few early or late cells, or cells that are both.
        """
        n_cells = int(self.measured.sum())
        if not n_cells:
            raise UserError(
                f"pseudotime from {self.source}: none of the {len(self.pseudotime)} cells has one; {MORE_CELLS}."
            )
        early, late = self.early, self.late
        if np.intersect1d(early, late).size:
            n_values, both = len(np.unique(self.pseudotime[self.measured])), self._cut(LATE_PERCENTILE)
            raise UserError(
                f"pseudotime from {self.source}: its 33.3rd and 66.7th percentile are both {both:g} ({n_cells} cells, "
                f"{n_values} distinct values), so early and late cells cannot be told apart; {MORE_CELLS}."
            )
        if min(len(early), len(late)) < MIN_GROUP:
            raise UserError(
                f"pseudotime from {self.source}: of {n_cells} cells {len(early)} are early and {len(late)} late, but "
                f"{MIN_GROUP} of each are needed; {MORE_CELLS}."
            )


def open_trajectory(args: argparse.Namespace, opened: "ModelAndCells") -> Trajectory:
    """Order the run's cells: from `--traj-dir` where its file is for them, else by computing.

    Args:
        args: flags of `trajectory_flags.add_trajectory_flags`.
        opened: the model and the run's cells.

    Raises:
        UserError: a damaged file, infinite pseudotime, no root, disconnected cells, too few early or late cells.
    """
    cell_types, tissues = _describe_cells(args, opened.cells.cells)
    trajectory = _from_metadata(args, opened.cells.cells, cell_types, tissues) if args.traj_dir else None
    if trajectory is None:
        computed = compute_pseudotime(args, opened, cell_types, tissues)
        trajectory = Trajectory(computed.pseudotime, cell_types, tissues, computed.source, computed.root)
    trajectory.check()
    n_left_out = int((~trajectory.measured).sum())
    log.info(
        "Pseudotime from %s, root %s: %d cells, %d early, %d late; %d left out",
        trajectory.source,
        trajectory.root or "unknown",
        len(trajectory.pseudotime) - n_left_out,
        len(trajectory.early),
        len(trajectory.late),
        n_left_out,
    )
    return trajectory


def _describe_cells(args: argparse.Namespace, cells: Sequence[Cell]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Type and tissue of every cell, empty text where the file has none."""
    from cellcircuits.h5ad import H5adFile

    with H5adFile(args.data_path) as file:
        obs = file.obs().iloc[[cell.row for cell in cells]]

    def texts(column: str) -> tuple[str, ...]:
        if column not in obs.columns:
            return ("",) * len(obs)
        values = obs[column]
        return tuple("" if missing else str(value) for value, missing in zip(values, values.isna(), strict=True))

    return texts(args.cell_type_column), texts(args.tissue_column)


def _from_metadata(
    args: argparse.Namespace, cells: Sequence[Cell], cell_types: tuple[str, ...], tissues: tuple[str, ...]
) -> Trajectory | None:
    """The trajectory of `cell_metadata.json`, None where that is not for these cells."""
    folder = cli.require_path(args.traj_dir, "--traj-dir", "SAE_TRAJ_DIR", folder=True)
    path = folder / METADATA
    if not path.is_file():
        log.warning("Note: %s holds no %s; computing the pseudotime.", folder, METADATA)
        return None
    content, n_listed = _read_metadata(path)
    order, reason = _match_cells(content, n_listed, cells, args.downsample_to)
    if order is not None and "cell_ids" not in content and not _same_types(content, cell_types):
        order, reason = None, "it has no cell ids, and its cell types are not those of the run's cells in their order"
    if order is None:
        log.warning("Note: %s is not for the run's cells: %s; computing the pseudotime.", path, reason)
        return None
    if "cell_ids" not in content:
        log.warning(
            "Note: %s has no cell ids; it is taken to be for the run's cells because both are %d.", path, n_listed
        )
    pseudotime = _numbers(path, content["pseudotime"])[order]
    pseudotime = _without_infinite(pseudotime, cell_types, args.disconnected, str(path))
    ignored = root_flags_given(args)
    if ignored:
        log.warning("Note: %s has a root of its own; %s: without effect.", path, " and ".join(ignored))
    root = content.get("root")
    how = "by ids" if "cell_ids" in content else "by number of cells"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    source = f"{METADATA} ({how})"
    return Trajectory(pseudotime, cell_types, tissues, source, root if isinstance(root, str) else None, sha256)


def _read_metadata(path: Path) -> tuple[Mapping[str, Any], int]:
    """The file's content, and how many cells each of its lists has."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("pseudotime"), list):
        raise UserError(f"{path}: has no list 'pseudotime'; give the file of a trajectory, or leave out --traj-dir.")
    names = [name for name in ("pseudotime", "cell_types", "tissues", "cell_ids") if name in content]
    for name in names:
        if not isinstance(content[name], list):
            raise UserError(f"{path}: {name!r} is no list; make the file again with trajectory_analysis.py.")
    lengths = {name: len(content[name]) for name in names}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{n} {name}" for name, n in lengths.items())
        raise UserError(f"{path}: its lists differ in length ({listed}); make it again with trajectory_analysis.py.")
    return content, lengths["pseudotime"]


def _match_cells(
    content: Mapping[str, Any], n_listed: int, cells: Sequence[Cell], downsample_to: int | None
) -> tuple[NDArray[np.int64] | None, str]:
    """Where each of the run's cells is listed, (n_cells,), or None and the reason why it is for other cells."""
    kept = content.get("downsample_to")
    if kept != downsample_to:
        there, here = ("all counts" if depth is None else f"{depth} counts per cell" for depth in (kept, downsample_to))
        return None, f"it was made from {there}, and this run takes {here} (--downsample-to)"
    names = [cell.name for cell in cells]
    if "cell_ids" not in content:
        if n_listed != len(cells):
            return None, f"it has no cell ids and {n_listed} cells, and the run has {len(cells)}"
        return np.arange(n_listed), ""
    listed = [str(name) for name in content["cell_ids"]]
    if listed == names:
        return np.arange(n_listed), ""
    n_shared = len(set(listed) & set(names))
    if sorted(listed) != sorted(names) or n_shared != len(names):
        return None, f"it lists {n_listed} cells, the run has {len(names)}, and {n_shared} are in both"
    place = {name: number for number, name in enumerate(listed)}
    return np.array([place[name] for name in names]), ""


def _same_types(content: Mapping[str, Any], cell_types: Sequence[str]) -> bool:
    listed = content.get("cell_types")
    return listed is None or [str(name).lower() for name in listed] == [name.lower() for name in cell_types]


def _numbers(path: Path, values: Sequence[Any]) -> NDArray[np.float64]:
    """The listed pseudotimes, null as NaN."""
    for number, value in enumerate(values):
        # an integer may be too large for a float
        if not (value is None or type(value) is float or (type(value) is int and abs(value) < LARGEST_INTEGER)):
            raise UserError(f"{path}: the pseudotime of cell {number} is {value!r:.60}, not a number or null.")
    return np.array([math.nan if value is None else float(value) for value in values])


def _without_infinite(
    pseudotime: NDArray[np.float64], cell_types: Sequence[str], disconnected: str, where: str
) -> NDArray[np.float64]:
    """NaN in place of infinities where that was asked for.

    Raises:
        UserError: there are some, and nobody asked to drop them.
    """
    infinite = np.isinf(pseudotime)
    if infinite.any() and disconnected != "drop":
        raise UserError(
            f"{where}: {disconnected_cells(infinite, cell_types)}; leave those out with --disconnected drop, or choose "
            "other cells (--cell-types, --tissues, --n-cells), or leave out --traj-dir to compute it anew."
        )
    return np.where(infinite, math.nan, pseudotime)


def provenance(opened: "ModelAndCells", trajectory: Trajectory, layers: Mapping[int, "LayerSAE"]) -> dict[str, Any]:
    """Where the numbers of a run along a trajectory come from, for the record."""
    of_inputs = opened.provenance()
    return {
        **of_inputs,
        "seeds": of_inputs["seeds"] | trajectory.seeds,
        "saes": {str(layer): str(opened_sae.files.checkpoint) for layer, opened_sae in layers.items()},
        "pseudotime": {
            "source": trajectory.source,
            "root": trajectory.root,
            "n_cells_without": int((~trajectory.measured).sum()),
            "sha256": hashlib.sha256(trajectory.pseudotime.astype("<f8").tobytes()).hexdigest(),
        },
    }


def write_metadata(
    path: Path, trajectory: Trajectory, cells: Sequence[Cell], downsample_to: int | None, settings: Mapping[str, Any]
) -> None:
    """Write `cell_metadata.json`: the published keys and what tells for which cells it is.

    Args:
        path: the file.
        trajectory: the cells' pseudotime, types and tissues.
        cells: the run's cells, in that order.
        downsample_to: counts per cell, None for all.
        settings: more for the record, such as the fingerprint of the run.
    """
    content = {
        "pseudotime": [None if math.isnan(time) else float(time) for time in trajectory.pseudotime],
        "cell_types": list(trajectory.cell_types),
        "tissues": list(trajectory.tissues),
        "cell_ids": [cell.name for cell in cells],
        "h5ad_row": [cell.row for cell in cells],
        "n_tokens": [len(cell.tokens) for cell in cells],
        "root": trajectory.root,
        "source": trajectory.source,
        "downsample_to": downsample_to,
        "schema_version": SCHEMA_VERSION,
    }
    write_json(path, content | dict(settings))


def confounds(
    pseudotime: NDArray[np.float64], n_genes_detected: NDArray[np.float64], depth: NDArray[np.float64]
) -> dict[str, dict[str, float | int | None]]:
    """Rank correlation of pseudotime with what the measurement alone can change.

    Args:
        pseudotime: (n_cells,); NaN is left out.
        n_genes_detected: (n_cells,) genes with a count.
        depth: (n_cells,) total counts.

    Returns:
        For each what `rank_correlation` gives.
    """
    measures = {"n_genes_detected": n_genes_detected, "depth": depth}
    return {name: rank_correlation(pseudotime, values) for name, values in measures.items()}


def rank_correlation(pseudotime: NDArray[np.float64], values: NDArray[np.float64]) -> dict[str, float | int | None]:
    """Spearman's `rho` over the `n` cells with a pseudotime; None where one of the two is constant."""
    from scipy.stats import spearmanr

    used = ~np.isnan(pseudotime)
    varies = all(len(np.unique(array[used])) > 1 for array in (pseudotime, values))
    rho = float(spearmanr(pseudotime[used], values[used]).statistic) if varies else None
    return {"rho": rho, "n": int(used.sum())}
