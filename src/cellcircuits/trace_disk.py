"""What a trace writes: the part of `--check` that counts bytes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cellcircuits import graph_store
from cellcircuits.plan_report import Disk
from cellcircuits.trace_effects import BYTES_PER_EFFECT, LEAST_BYTES_PER_EFFECT

if TYPE_CHECKING:
    from cellcircuits.trace_folder import TraceFolder

EDGE_BYTES, TOP_EDGE_BYTES, RECORD_BYTES, SHARD_BYTES, ROW_BYTES = 46, 110, 400, 9000, 85  # as the demo's files show
SHARE_OF_EDGES = 0.08  # of all targets, as in the demo; a twentieth is chance


def blocks_of(features: Sequence[int]) -> list[list[int]]:
    """Features, ascending, by block."""
    blocks: dict[int, list[int]] = {}
    for feature in features:
        blocks.setdefault(graph_store.block_of(feature), []).append(feature)
    return list(blocks.values())


def disk(
    folders: Sequence["TraceFolder"],
    left: Mapping[int, Sequence[int]],
    n_effects: Mapping[int, tuple[float, float]],
) -> Disk:
    """What shards, records, tables and effects of the features left take.

    Args:
        folders: of the source layers.
        left: {source layer: features to trace}.
        n_effects: {source layer: about how many effects are kept, and at most}, where they are.
    """
    at_least = about = at_most = 0.0
    for folder in folders:
        features = left[folder.source_layer]
        n_rows = sum(opened_sae.sae.n_features for opened_sae in folder.layers.values())
        fixed = len(features) * RECORD_BYTES + len(blocks_of(features)) * SHARD_BYTES + n_rows * ROW_BYTES
        n_targets = [folder.layers[target].sae.n_features for target in folder.targets]
        expected, most = n_effects.get(folder.source_layer, (0.0, 0.0))
        at_least += fixed + LEAST_BYTES_PER_EFFECT * expected / 2  # the share that is not 0 is that of a few passes
        about += fixed + len(features) * sum(_edge_bytes(SHARE_OF_EDGES * n) for n in n_targets)
        about += BYTES_PER_EFFECT * expected
        at_most += fixed + len(features) * sum(_edge_bytes(n) for n in n_targets) + BYTES_PER_EFFECT * most
    return Disk(at_least, about, at_most)


def _edge_bytes(n_edges: float) -> float:
    """Bytes of one feature's edges to one layer: in its shard, in the table, the strongest in its record."""
    return EDGE_BYTES * n_edges + TOP_EDGE_BYTES * min(50.0, n_edges)
