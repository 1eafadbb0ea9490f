"""Trace features block by block: cells inside, shards out, nothing lost on the way.

A block's effects are kept for all its cells until the last one is done; every few minutes they go to disk,
so that a kill costs at most that much work however slow the machine is.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellcircuits.calibration import Calibrator, FeatureCalibration, hedges_g
from cellcircuits.clock import recorded_seconds
from cellcircuits.device import is_out_of_memory
from cellcircuits.edge_fdr import CalibrationSettings
from cellcircuits.effects import Bench, CleanCell
from cellcircuits.errors import UserError
from cellcircuits.finite import EFFECT, require_finite
from cellcircuits.graph_store import EDGE_SCHEMA, FAMILY_COLUMNS, Shard
from cellcircuits.jsonio import write_atomically
from cellcircuits.stats import EdgeRule, effect_statistics

log = logging.getLogger(__name__)
SAVE_EVERY_SECONDS = 180.0


class Measures(Protocol):
    """What effects come from: a `Bench`, or what measures something else than features, by their numbers, like one."""

    n_targets: int

    def rows(self, clean: CleanCell, feature: int, /) -> NDArray[np.int64]:
        """Gene positions of a cell at which it is measured; none where it cannot be."""
        ...

    def effects(self, clean: CleanCell, features: Sequence[int], /) -> NDArray[np.float64]:
        """Effects (len(features), n_targets) in a cell in which all of them can be measured."""
        ...

    def removed_norm(self, clean: CleanCell, feature: int, /) -> float:
        """How far the stream is moved at those positions, on average."""
        ...

    def batch_size(self, n_pos: int, /) -> int:
        """How many to ask for at once in a cell of `n_pos` tokens."""
        ...


@dataclass
class BlockEffects:
    """Effects of some features of a block on every cell so far.

    `effects` (n_block, n_cells, n_targets) float64 in latent activation units, `measured` (n_block, n_cells)
    bool, `seconds` (n_block,), `n_cells_done` cells finished; `n_positions` and `removed_norm` (n_block, n_cells), 0
    where not measured: at how many positions a feature is active, and what `Bench.removed_norm` says.
    """

    features: tuple[int, ...]
    effects: NDArray[np.float64]
    measured: NDArray[np.bool_]
    seconds: NDArray[np.float64]
    n_positions: NDArray[np.int64]
    removed_norm: NDArray[np.float64]
    n_cells_done: int = 0

    @classmethod
    def empty(cls, features: Sequence[int], n_cells: int, n_targets: int) -> "BlockEffects":
        """Nothing measured yet."""
        shape = (len(features), n_cells)
        return cls(
            tuple(features), np.zeros((*shape, n_targets)), np.zeros(shape, dtype=bool), np.zeros(len(features)),
            np.zeros(shape, dtype=np.int64), np.zeros(shape),
        )  # fmt: skip

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the finished cells to `path`, whole or not at all."""
        done = self.n_cells_done
        arrays = {
            "features": np.array(self.features),
            "effects": self.effects[:, :done][self.measured[:, :done]],  # (n_pairs, n_targets): the others are 0
            "measured": self.measured[:, :done],
            "seconds": self.seconds,
            "n_positions": self.n_positions[:, :done],
            "removed_norm": self.removed_norm[:, :done],
            "fingerprint": np.array(fingerprint),
        }
        write_atomically(path, lambda stream: np.savez(stream, **arrays))

    def restore(self, path: Path, fingerprint: str) -> None:
        """Take up what `save` wrote for the same features of the same run; anything else is said and ignored."""
        if not path.exists():
            return
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
                same = kept["fingerprint"].item() == fingerprint and tuple(kept["features"]) == self.features
                if not same:
                    log.warning("%s is of another run or of other features: it is not used.", path)
                    return
                measured = kept["measured"]  # (n_block, n_cells_done)
                done = measured.shape[1]
                self.measured[:, :done] = measured
                self.effects[:, :done][measured] = kept["effects"]
                self.n_positions[:, :done], self.removed_norm[:, :done] = kept["n_positions"], kept["removed_norm"]
                self.seconds[:] = kept["seconds"]
                self.n_cells_done = done
        except Exception as error:  # a damaged archive makes zipfile and NumPy raise almost anything
            log.warning("%s is damaged (%s): its block is traced from its first cell.", path, type(error).__name__)
            self.effects[:], self.measured[:], self.seconds[:] = 0.0, False, 0.0
            self.n_positions[:], self.removed_norm[:] = 0, 0.0
            self.n_cells_done = 0


@contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Turn running out of memory inside the `with` into one sentence, for what cannot be made smaller.

    Raises:
        UserError: `what` does not fit in the device's memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{what} does not fit in the device's memory; free some of it, lower --max-tokens or take --device cpu."
        ) from None


def trace_block(
    bench: Measures,
    cells: Sequence[CleanCell],
    block: BlockEffects,
    *,
    batch_size: int | None = None,
    on_cell: Callable[[int], None] = lambda n_features: None,
) -> None:
    """Measure the features of `block` on the cells that are not done yet.

    Args:
        bench: what measures; usually a `Bench`.
        cells: clean runs of all cells, in order.
        block: filled in place, cell by cell.
        batch_size: features per batch of tail runs; None lets memory decide.
        on_cell: called after each cell with the number of (feature, cell) pairs it finished.

    Raises:
        UserError: an effect is NaN or infinite, or one feature alone does not fit in memory.
    """
    for i in range(block.n_cells_done, len(cells)):
        clean = cells[i]
        rows = {j: bench.rows(clean, feature) for j, feature in enumerate(block.features)}
        active = sorted((j for j in rows if len(rows[j])), key=lambda j: (len(rows[j]), j))
        size = batch_size or bench.batch_size(len(clean.cell.tokens))
        left = active
        while left:
            batch = left[:size]
            started = time.perf_counter()
            try:
                block.effects[batch, i] = bench.effects(clean, [block.features[j] for j in batch])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise UserError(
                        f"cell {clean.cell.name}: not even one feature fits in the device's memory; free some of it, "
                        "lower --max-tokens or take --device cpu."
                    ) from None
                size = batch_size = len(batch) // 2
                log.warning("Out of memory: going on with batches of %d features.", size)
                continue
            block.seconds[batch] += recorded_seconds(time.perf_counter() - started) / len(batch)
            left = left[size:]
        require_finite(block.effects[active, i], clean.cell, EFFECT)
        block.measured[active, i] = True
        block.n_positions[active, i] = [len(rows[j]) for j in active]
        block.removed_norm[active, i] = [bench.removed_norm(clean, block.features[j]) for j in active]
        block.n_cells_done = i + 1
        on_cell(len(block.features))


def trace_and_save(
    bench: Measures,
    cells: Sequence[CleanCell],
    block: BlockEffects,
    save: Callable[[], None],
    *,
    batch_size: int | None = None,
    on_cell: Callable[[int], None] = lambda n_features: None,
) -> None:
    """`trace_block`, with `save` called every few minutes and when the run is told to stop.

    Raises:
        UserError: see `trace_block`.
    """
    last_save = time.monotonic()

    def on_cell_then_save(n_features: int) -> None:
        nonlocal last_save
        on_cell(n_features)
        if time.monotonic() - last_save > SAVE_EVERY_SECONDS:
            save()
            last_save = time.monotonic()

    try:
        trace_block(bench, cells, block, batch_size=batch_size, on_cell=on_cell_then_save)
    except KeyboardInterrupt:
        save()
        raise


def block_shard(
    bench: Bench,
    block: BlockEffects,
    rule: EdgeRule,
    fingerprint: str,
    calibration: CalibrationSettings = CalibrationSettings(),  # noqa: B008 (frozen)
) -> Shard:
    """Turn the effects of a finished block into edges and facts, with their tests."""
    facts: dict[int, dict[str, Any]] = {}
    tables = [EDGE_SCHEMA.empty_table()]
    calibrator = Calibrator(rule, calibration, block.measured.shape[1], bench.source_layer, bench.device)
    for j, feature in enumerate(block.features):
        measured = block.measured[j]
        effects = block.effects[j][measured]  # (n_measured, n_targets)
        tested = calibrator.calibrate(feature, effects, measured)
        tables.append(_edge_table(bench, feature, effects, rule, tested))
        facts[feature] = {
            "source_layer": bench.source_layer,
            "feature_idx": feature,
            "n_cells_active": len(effects),
            "n_cells_measured": len(measured),
            "n_positions": float(block.n_positions[j][measured].mean()) if len(effects) else None,
            "ablated_norm": float(block.removed_norm[j][measured].mean()) if len(effects) else None,
            "elapsed_seconds": float(block.seconds[j]),
            "calibration": tested.counts,
            "fingerprint": fingerprint,
        }
    return Shard(facts, pa.concat_tables(tables))


def _edge_table(
    bench: Bench, feature: int, effects: NDArray[np.float64], rule: EdgeRule, tested: FeatureCalibration
) -> pa.Table:
    """All edges of one source feature, by ascending target layer and target; what needs the whole graph is null."""
    measured = effect_statistics(effects, rule)
    columns = np.flatnonzero(measured.is_edge)
    starts = np.array([bench.columns[layer].start for layer in bench.targets])
    which = np.searchsorted(starts, columns, side="right") - 1
    n_edges = len(columns)
    live = np.searchsorted(tested.columns, columns)  # an edge is live: |d| is above 0
    g, g_low, g_high = hedges_g(effects[:, columns])
    values = {
        "source_layer": np.full(n_edges, bench.source_layer),
        "source": np.full(n_edges, feature),
        "target_layer": np.array(bench.targets)[which],
        "target": columns - starts[which],
        "mean_delta": measured.mean[columns],
        "cohens_d": measured.d[columns],
        "consistency": measured.consistency[columns],
        "n_cells": np.full(n_edges, measured.n_cells),
        "n_nonzero": tested.n_nonzero[live],
        "consistency_nonzero": tested.consistency[live],
        "hedges_g": g,
        "g_low": g_low,
        "g_high": g_high,
        "p_sign_flip": tested.p[live],
    }
    arrays = [
        pa.nulls(n_edges, field.type)
        if field.name in FAMILY_COLUMNS
        else pa.array(values[field.name], type=field.type, from_pandas=True)  # NaN becomes null
        for field in EDGE_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=EDGE_SCHEMA)
