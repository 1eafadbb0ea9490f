"""One run of experiment 1: which blocks are left, and the way from a block's features to its files.

Several processes may run the same command into one folder: each goes through the blocks in order and traces those that
it gets the claim on (claims.py).
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cellcircuits import graph_store, results, trace_effects
from cellcircuits.catalog import FeatureInfo
from cellcircuits.cells import Cell
from cellcircuits.claims import Claim, claimed, is_claimed
from cellcircuits.edge_fdr import CalibrationSettings
from cellcircuits.effects import Bench, CleanCell, ablation_effect
from cellcircuits.errors import UserError
from cellcircuits.finite import EFFECT, require_finite
from cellcircuits.jsonio import discard, write_json
from cellcircuits.precision import FP32
from cellcircuits.stats import EdgeRule
from cellcircuits.tracing import BlockEffects, block_shard, trace_and_save, within_memory

Definition = Callable[[Bench, Cell, int], dict[int, NDArray[np.float64]] | None]

log = logging.getLogger(__name__)
LINE_EVERY_SECONDS = 300.0  # in a log file, where no bar is drawn
SELF_CHECK_TOLERANCE = 1e-3
# In float32 a near tie for the last place among the k may fall either way, which moves a latent or two.
SELF_CHECK_TIES = 4
SELF_CHECK_TIED_SHARE = 0.02


class Progress:
    """How far a run is: a bar, `progress.json` and, where no bar can be drawn, a line now and then."""

    def __init__(self, path: Path, n_features: int, n_left: int, n_cells: int) -> None:
        """Begin with `n_left` of `n_features` features left, each to be measured on `n_cells` cells."""
        self.path, self.n_features, self.n_left, self.n_cells = path, n_features, n_left, n_cells
        self.bar = tqdm(total=n_left * n_cells, desc="tracing", unit="pair", disable=None if n_left else True)
        self.last_line = time.monotonic()
        self.write()

    def write(self) -> None:
        """Bring `progress.json` up to date."""
        write_json(self.path, {"n_features": self.n_features, "n_features_done": self.n_features - self.n_left})

    def finished(self, n_features: int, *, here: bool) -> None:
        """Count features that this process (`here`) or another one has finished."""
        self.n_left -= n_features
        if not here:
            self.bar.total -= n_features * self.n_cells
            self.bar.refresh()
        self.write()
        if self.bar.disable and time.monotonic() - self.last_line > LINE_EVERY_SECONDS:
            log.info("%d of %d features done", self.n_features - self.n_left, self.n_features)
            self.last_line = time.monotonic()


@dataclass
class Tracer:
    """Traces features into one output folder, which several processes may do at once.

    `clean` are the clean runs of the cells, `catalog` the source layer's, `fingerprint` that of the run's settings,
    `batch_size` features per batch or None for what memory allows, `definition` what the bench measures, written out,
    `calibration` how its edges are tested, `effects_of` the names of the cells where the effects are to be kept too
    (trace_effects.py), else None.
    """

    out_dir: Path
    bench: Bench
    clean: Sequence[CleanCell]
    catalog: Mapping[int, FeatureInfo]
    rule: EdgeRule
    fingerprint: str
    batch_size: int | None = None
    definition: Definition = ablation_effect
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    effects_of: Sequence[str] | None = None

    def trace(self, features: Sequence[int]) -> bool:
        """Trace every feature whose result is not on disk yet and that no other process is at work on.

        Returns:
            Whether all of them are finished, here or by others.
        """
        blocks: dict[int, list[int]] = {}
        for feature in features:
            blocks.setdefault(graph_store.block_of(feature), []).append(feature)
        left = {block: self.unfinished(block, wanted) for block, wanted in blocks.items()}
        for block in (block for block, wanted in left.items() if not wanted):
            self.tidy(block)
        left = {block: wanted for block, wanted in left.items() if wanted}
        n_left = sum(map(len, left.values()))
        log.info("%d features to trace, %d of them already done", len(features), len(features) - n_left)
        progress = Progress(self.out_dir / "progress.json", len(features), n_left, len(self.clean))
        with progress.bar:
            if left:
                self.check_engine(features)
            while self.trace_free_blocks(left, progress):
                pass
        if progress.n_left:
            log.info(
                "%d features are left to other processes that work in this folder; the last one to end completes the "
                "tables. If one was killed on another machine, what it held is free ten minutes later.",
                progress.n_left,
            )
        return progress.n_left == 0

    def trace_free_blocks(self, left: dict[int, list[int]], progress: Progress) -> bool:
        """Go once through the blocks that are left and trace those that no other process holds.

        Args:
            left: features left per block; what is finished meanwhile, here or elsewhere, is taken out.
            progress: told of it.

        Returns:
            Whether there was any, so that another look may find more.
        """
        any_free = False
        for block in sorted(left):
            with claimed(graph_store.shard_path(self.out_dir, block)) as claim:
                self.strike_finished(block, left, progress)
                if claim is None or block not in left:
                    continue
                any_free = True
                if self.trace_one(block, left[block], claim, progress.bar):
                    progress.finished(len(left.pop(block)), here=True)
            for held_elsewhere in [earlier for earlier in left if earlier < block]:
                self.strike_finished(held_elsewhere, left, progress)
        return any_free

    def strike_finished(self, block: int, left: dict[int, list[int]], progress: Progress) -> None:
        """Take out of `left` the features of a block that another process has finished."""
        unfinished = self.unfinished(block, left[block])
        if len(unfinished) < len(left[block]):
            progress.finished(len(left[block]) - len(unfinished), here=False)
            left[block] = unfinished
        if not unfinished:
            del left[block]

    def unfinished(self, block: int, wanted: Sequence[int]) -> list[int]:
        """Those features of a block that its shard does not hold; JSON files of the others are mended from it.

        Where effects are to be kept, a feature without them is not finished either.
        """
        shard = graph_store.read_shard(graph_store.shard_path(self.out_dir, block), self.fingerprint)
        if shard is None:
            return list(wanted)
        self.write_records(shard)
        finished = shard.facts.keys()
        if self.effects_of is not None:
            finished &= trace_effects.held_features(trace_effects.effects_path(self.out_dir, block), self.fingerprint)
        return [feature for feature in wanted if feature not in finished]

    def tidy(self, block: int) -> None:
        """Remove what a process left that was killed between writing a shard and giving back its claim."""
        path = graph_store.shard_path(self.out_dir, block)
        if self.partial_path(block).exists() or is_claimed(path):
            with claimed(path) as claim:
                if claim:  # else someone is at work on other features of this block
                    discard(self.partial_path(block))

    def trace_one(self, block: int, features: Sequence[int], claim: Claim, bar: tqdm) -> bool:
        """Trace some features of a block that this process holds the claim on; returns what `write_block` does."""
        partial = self.partial_path(block)
        traced_before = self.traced_without_effects(block) if self.effects_of is not None else ()
        effects = BlockEffects.empty(features, len(self.clean), self.bench.n_targets)
        effects.restore(partial, self.fingerprint)
        bar.update(len(features) * effects.n_cells_done)

        def save() -> None:
            if claim.is_held():  # else the partial is that of who took over while this process was suspended
                effects.save(partial, self.fingerprint)

        trace_and_save(self.bench, self.clean, effects, save, batch_size=self.batch_size, on_cell=bar.update)
        shard = self.shard(effects)
        if self.effects_of is not None:
            if not claim.is_held():  # who took over while this process was suspended writes both
                return False
            path = trace_effects.effects_path(self.out_dir, block)
            trace_effects.add_effects(path, effects, self.effects_of, self.bench.columns, self.fingerprint)
            shard = shard.only([feature for feature in features if feature not in traced_before])
        is_written = not shard.facts or self.write_block(block, shard)
        discard(partial)
        return is_written

    def traced_without_effects(self, block: int) -> Collection[int]:
        """Features of a block whose edges are there, when some of them are to be traced again for their effects."""
        shard = graph_store.read_shard(graph_store.shard_path(self.out_dir, block), self.fingerprint)
        return shard.facts.keys() if shard else ()

    def shard(self, effects: BlockEffects) -> graph_store.Shard:
        """Edges, facts and tests of a finished block."""
        return block_shard(self.bench, effects, self.rule, self.fingerprint, self.calibration)

    def write_block(self, block: int, shard: graph_store.Shard) -> bool:
        """Add newly traced features to the shard of their block, and write their JSON files.

        Returns:
            False where nothing is written, because some of the features are there: this process was suspended for so
            long that another one took over and has finished.
        """
        path = graph_store.shard_path(self.out_dir, block)
        kept = graph_store.read_shard(path, self.fingerprint)
        if kept and not kept.facts.keys().isdisjoint(shard.facts):
            return False
        graph_store.write_shard(path, kept.merged(shard) if kept else shard)
        self.write_records(shard)
        return True

    def partial_path(self, block: int) -> Path:
        """Where the effects of an unfinished block lie."""
        return graph_store.shard_path(self.out_dir, block).with_suffix(".partial.npz")

    def write_records(self, shard: graph_store.Shard) -> None:
        """Write the JSON file of every feature of a shard that does not have it yet."""
        for feature, record in shard.records(self.catalog):
            path = results.feature_path(self.out_dir, feature)
            if results.repair_record(path, record):
                log.warning("%s was damaged or of another run; it is made again.", path)

    def check_engine(self, features: Sequence[int]) -> None:
        """Compare the batched engine with one full hooked forward pass on this model, before trusting it.

        Raises:
            UserError: they disagree, which means that the model is not built as a Geneformer is, or a full pass does
                not fit in the device's memory.
        """
        found = next(((c, f) for c in self.clean for f in features if len(c.active_rows(f))), None)
        if found is None:
            return
        cell, feature = found
        with within_memory(f"cell {cell.cell.name}: a full forward pass"):
            bench, cell = self.in_float32(cell)
            if not len(cell.active_rows(feature)):  # near ties: in this run, and in the passes of the definition
                return
            fast = bench.effects(cell, [feature])[0]
            slow = self.definition(bench, cell.cell, feature)
        if slow is None:
            return
        expected = np.concatenate([slow[layer] for layer in bench.targets])
        for effects in (fast, expected):  # NaN would pass for agreement
            require_finite(effects, cell.cell, EFFECT)
        differs = np.abs(fast - expected) > SELF_CHECK_TOLERANCE * (1 + np.abs(expected).max())
        n_moved = np.count_nonzero((fast != 0) | (expected != 0))
        n_differ = np.count_nonzero(differs)
        if n_differ > max(SELF_CHECK_TIES, SELF_CHECK_TIED_SHARE * n_moved):
            raise UserError(
                f"--model: the engine and a full forward pass disagree on {n_differ} of {n_moved} effects of "
                f"feature {feature}; this model is not built as a Geneformer is, or the device computes wrongly."
            )

    def in_float32(self, cell: CleanCell) -> tuple[Bench, CleanCell]:
        """A bench that computes in float32, for `check_engine`, and a cell's clean run by it.

        The check is there to find a model that is not built as a Geneformer is, which no precision changes. Effects
        are small differences: rounding to fewer bits can be larger than an effect, and moves which latents are
        selected, so no tolerance would let a low precision pass and still find such a model.
        """
        if self.bench.tail.precision == FP32:
            return self.bench, cell
        bench = Bench(self.bench.model, self.bench.saes, self.bench.source_layer, self.bench.targets)
        return bench, bench.clean(cell.cell)
