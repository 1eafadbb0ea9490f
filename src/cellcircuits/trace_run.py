"""One run of experiment 1: which blocks are left, and the way from a block's features to its files."""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cellcircuits import graph_store, results
from cellcircuits.catalog import FeatureInfo
from cellcircuits.cells import Cell
from cellcircuits.effects import Bench, CleanCell, ablation_effect
from cellcircuits.errors import UserError
from cellcircuits.jsonio import write_json
from cellcircuits.stats import EdgeRule
from cellcircuits.tracing import SAVE_EVERY_SECONDS, BlockEffects, CleanRuns, block_shard, require_finite, trace_block

log = logging.getLogger(__name__)
LINE_EVERY_SECONDS = 300.0  # in a log file, where no bar is drawn
SELF_CHECK_TOLERANCE = 1e-3
# In float32 a near tie for the last place among the k may fall either way, which moves a latent or two.
SELF_CHECK_TIES = 4
SELF_CHECK_TIED_SHARE = 0.02


@dataclass
class Tracer:
    """Traces features into one output folder that belongs to this run.

    `cells` are the tokenized cells, `catalog` the source layer's, `fingerprint` that of the run's settings,
    `batch_size` features per batch or None for what memory allows.
    """

    out_dir: Path
    bench: Bench
    cells: Sequence[Cell]
    catalog: Mapping[int, FeatureInfo]
    rule: EdgeRule
    fingerprint: str
    batch_size: int | None = None

    def trace(self, features: Sequence[int]) -> None:
        """Trace every feature whose result is not on disk yet."""
        blocks: dict[int, list[int]] = {}
        for feature in features:
            blocks.setdefault(graph_store.block_of(feature), []).append(feature)
        finished = {block: self.finished_features(block) for block in blocks}
        left = {block: [f for f in wanted if f not in finished[block]] for block, wanted in blocks.items()}
        for block in (block for block, wanted in left.items() if not wanted):
            self.partial_path(block).unlink(missing_ok=True)
        left = {block: wanted for block, wanted in left.items() if wanted}
        n_left = sum(map(len, left.values()))
        self.write_progress(len(features), n_left)
        log.info("%d features to trace, %d of them already done", len(features), len(features) - n_left)
        if not left:
            return
        clean = CleanRuns(self.bench, self.cells)
        self.check_engine(clean, features)
        last_line = time.monotonic()
        with tqdm(total=n_left * len(clean), desc="tracing", unit="pair", disable=None) as bar:
            for block, wanted in left.items():
                self.trace_one(block, wanted, clean, bar)
                n_left -= len(wanted)
                self.write_progress(len(features), n_left)
                if bar.disable and time.monotonic() - last_line > LINE_EVERY_SECONDS:
                    log.info("%d of %d features done", len(features) - n_left, len(features))
                    last_line = time.monotonic()

    def write_progress(self, n_features: int, n_left: int) -> None:
        """Say in `progress.json` how far the run is."""
        progress = {"n_features": n_features, "n_features_done": n_features - n_left}
        write_json(self.out_dir / "progress.json", progress)

    def finished_features(self, block: int) -> Collection[int]:
        """Features of a block whose shard is whole; their JSON files are mended from it where needed."""
        shard = graph_store.read_shard(graph_store.shard_path(self.out_dir, block), self.fingerprint)
        if shard is None:
            return ()
        self.write_records(shard)
        return shard.facts.keys()

    def trace_one(self, block: int, features: Sequence[int], clean: Sequence[CleanCell], bar: tqdm) -> None:
        """Trace some features of one block and write their files."""
        path = graph_store.shard_path(self.out_dir, block)
        partial = self.partial_path(block)
        effects = BlockEffects.empty(features, len(clean), self.bench.n_targets)
        effects.restore(partial, self.fingerprint)
        bar.update(len(features) * effects.n_cells_done)
        last_save = time.monotonic()

        def on_cell(n_pairs: int) -> None:
            nonlocal last_save
            bar.update(n_pairs)
            if time.monotonic() - last_save > SAVE_EVERY_SECONDS:
                effects.save(partial, self.fingerprint)
                last_save = time.monotonic()

        try:
            trace_block(self.bench, clean, effects, batch_size=self.batch_size, on_cell=on_cell)
        except KeyboardInterrupt:
            effects.save(partial, self.fingerprint)
            raise
        shard = block_shard(self.bench, effects, self.rule, self.fingerprint)
        kept = graph_store.read_shard(path, self.fingerprint)
        graph_store.write_shard(path, kept.merged(shard) if kept else shard)
        partial.unlink(missing_ok=True)
        self.write_records(shard)

    def partial_path(self, block: int) -> Path:
        """Where the effects of an unfinished block lie."""
        return graph_store.shard_path(self.out_dir, block).with_suffix(".partial.npz")

    def write_records(self, shard: graph_store.Shard) -> None:
        """Write the JSON file of every feature of a shard that does not have it yet."""
        for feature, record in shard.records(self.catalog):
            path = results.feature_path(self.out_dir, feature)
            if results.repair_record(path, record):
                log.warning("%s was damaged or of another run; it is made again.", path)

    def check_engine(self, clean: Sequence[CleanCell], features: Sequence[int]) -> None:
        """Compare the batched engine with one full hooked forward pass on this model, before trusting it.

        Raises:
            UserError: they disagree, which means that the model is not built as a Geneformer is.
        """
        found = next(((c, f) for c in clean for f in features if len(c.active_rows(f))), None)
        if found is None:
            return
        cell, feature = found
        fast = self.bench.effects(cell, [feature])[0]
        slow = ablation_effect(self.bench, cell.cell, feature)
        if slow is None:  # a near tie at its only position fell the other way
            return
        expected = np.concatenate([slow[layer] for layer in self.bench.targets])
        require_finite(fast, cell.cell)
        differs = np.abs(fast - expected) > SELF_CHECK_TOLERANCE * (1 + np.abs(expected).max())
        n_moved = np.count_nonzero((fast != 0) | (expected != 0))
        n_differ = np.count_nonzero(differs)
        if n_differ > max(SELF_CHECK_TIES, SELF_CHECK_TIED_SHARE * n_moved):
            raise UserError(
                f"--model: the engine and a full forward pass disagree on {n_differ} of {n_moved} effects of "
                f"feature {feature}; this model is not built as a Geneformer is, or the device computes wrongly."
            )
