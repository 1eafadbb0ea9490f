"""The effects behind the edges, one file per block of features, for anyone who wants another test.

`effects/effects_00000.npz` is what `scipy.sparse.load_npz` reads: a CSR matrix (n_rows, n_targets) in float32, one row
per active (feature, cell) pair, the target layers side by side. Beside it lie

    features (n_features,)             source features of the block; one that is active nowhere has no row
    source, cell (n_rows,)             which feature and which of the cells a row is of, ascending
    cell_names (n_cells,)              of all cells of the run
    target_layer, target (n_targets,)  which latent a column is of
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellcircuits import graph_store, manifest
from cellcircuits.errors import UserError
from cellcircuits.jsonio import write_atomically

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from cellcircuits.tracing import BlockEffects

log = logging.getLogger(__name__)
# A float32 and the number of its column, compressed, as the demo's files show; the float32 alone hardly shrinks.
BYTES_PER_EFFECT, LEAST_BYTES_PER_EFFECT = 6, 4


@dataclass(frozen=True)
class FeatureEffects:
    """Effects of one feature in the cells where it is active.

    Attributes:
        feature: its index in the source layer.
        cells: (n_active,) names of these cells.
        effects: (n_active, n_targets) float32, in latent activation units.
        target_layer: (n_targets,) layer of each column.
        target: (n_targets,) index of its latent there.
    """

    feature: int
    cells: NDArray[np.str_]
    effects: "csr_array"
    target_layer: NDArray[np.int64]
    target: NDArray[np.int64]


def effects_path(out_dir: Path, block: int) -> Path:
    """Where the effects of the block that starts at feature `block` lie."""
    return out_dir / "effects" / f"effects_{block:05d}.npz"


def held_features(path: Path, fingerprint: str) -> set[int]:
    """Features whose effects a file holds, in this run; none where it is missing, damaged or of another run."""
    content = _read(path, fingerprint, ("features",))
    return {int(feature) for feature in content["features"]} if content else set()


def add_effects(
    path: Path, block: "BlockEffects", cell_names: Sequence[str], columns: Mapping[int, slice], fingerprint: str
) -> None:
    """Keep the effects of some features of a block beside those of others that the file holds.

    Args:
        path: the file.
        block: finished.
        cell_names: of all cells of the run.
        columns: where each target layer lies among the targets.
        fingerprint: of the run's settings.
    """
    from scipy.sparse import csr_array, vstack

    feature, cell = np.nonzero(block.measured)
    source = np.array(block.features, dtype=np.int64)[feature]
    # indices of 32 bits wherever they fit, which is always: a block has few rows
    matrix = csr_array(block.effects[feature, cell].astype(np.float32))
    features = np.array(block.features, dtype=np.int64)
    kept = _read(path, fingerprint)
    if kept:
        others = ~np.isin(kept["source"], features)
        matrix = vstack([matrix, _matrix(kept)[others]], format="csr")
        source, cell = np.append(source, kept["source"][others]), np.append(cell, kept["cell"][others])
        features = np.union1d(features, kept["features"])
    order = np.lexsort((cell, source))
    matrix = csr_array(matrix)[order]
    arrays = {
        "format": np.array("csr"), "shape": np.array(matrix.shape), "data": matrix.data,
        "indices": matrix.indices.astype(np.int32), "indptr": matrix.indptr.astype(np.int64),
        "features": features, "source": source[order], "cell": cell[order], "cell_names": np.array(list(cell_names)),
        "target_layer": np.repeat([*columns], [of_layer.stop - of_layer.start for of_layer in columns.values()]),
        "target": np.concatenate([np.arange(of_layer.stop - of_layer.start) for of_layer in columns.values()]),
        "fingerprint": np.array(fingerprint),
    }  # fmt: skip
    write_atomically(path, lambda stream: np.savez_compressed(stream, **arrays))


def read_effects(out_dir: Path) -> Iterator[FeatureEffects]:
    """The effects of every traced feature of a folder, ascending, a block of features in memory at a time.

    Args:
        out_dir: folder of a trace of one source layer.

    Raises:
        UserError: it holds no such trace, or lacks the effects of a feature that it says is traced.
    """
    settings = manifest.open_folder(out_dir, "exhaustive_feature_tracing")["settings"]
    fingerprint = manifest.settings_fingerprint(settings)
    for shard in graph_store.all_shards(out_dir, fingerprint):
        block = graph_store.block_of(next(iter(shard.facts)))
        content = _read(effects_path(out_dir, block), fingerprint)
        missing = shard.facts.keys() - (content["features"].tolist() if content else ())
        if missing:
            raise UserError(
                f"{out_dir}: lacks the effects of {len(missing)} traced features (such as {min(missing)}); run the "
                "tracing command again with --save-effects, which traces these once more."
            )
        matrix = _matrix(content)
        for feature in shard.facts:
            rows = np.flatnonzero(content["source"] == feature)
            cells = content["cell_names"][content["cell"][rows]]
            yield FeatureEffects(feature, cells, matrix[rows], content["target_layer"], content["target"])


def _read(path: Path, fingerprint: str, names: Sequence[str] = ()) -> dict[str, Any]:
    """Arrays of a file, all of them if none is named; empty where it is no file of this run, which is said."""
    if not path.exists():
        return {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
            if kept["fingerprint"].item() != fingerprint:
                log.warning("%s belongs to a run with other settings: its effects do not count.", path)
                return {}
            return {name: kept[name] for name in names or kept.files}
    except Exception as error:  # a damaged archive makes zipfile and NumPy raise almost anything
        log.warning("%s is damaged (%s): its effects do not count.", path, type(error).__name__)
        return {}


def _matrix(content: Mapping[str, Any]) -> "csr_array":
    from scipy.sparse import csr_array

    parts = (content["data"], content["indices"], content["indptr"])
    return csr_array(parts, shape=tuple(content["shape"].tolist()))
