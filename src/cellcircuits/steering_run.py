"""One run of experiment 3: cells inside, features and alphas innermost, one JSON file per feature, nothing lost."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cellcircuits import steering_results
from cellcircuits.cells import Cell
from cellcircuits.device import is_out_of_memory
from cellcircuits.effects import TopKLatents
from cellcircuits.errors import UserError
from cellcircuits.jsonio import discard, write_atomically, write_json
from cellcircuits.panel import PanelFeature
from cellcircuits.state_shift import LogitMap, Signatures, alpha_result, state_shifts
from cellcircuits.steering import (
    CleanStates,
    SteeringBench,
    SteeringRun,
    is_active,
    moves,
    smaller_batch,
    steered_logit_change,
)
from cellcircuits.steering_state import Unfinished, marks_in, read_arrays
from cellcircuits.tracing import SAVE_EVERY_SECONDS, within_memory

log = logging.getLogger(__name__)
SIGNATURES_FILE = "state_signatures.npz"
MAX_CHANGES_BYTES = 1 << 30  # a larger panel is worked through in groups of features
SELF_CHECK_TOLERANCE = 1e-3  # of the largest change, plus a hundredth of it of the largest logit for float32 rounding
# In float32 a near tie for the last place among the k may fall either way and change what is steered.
SELF_CHECK_TRIES = 3


@dataclass
class Spent:
    """What this process did: passes, steered (feature, cell) pairs, and the seconds that those took."""

    n_clean_passes: int = 0
    n_steered_runs: int = 0
    n_pairs: int = 0
    seconds: float = 0.0


@dataclass
class Steerer:
    """Steers features into one output folder that belongs to this run.

    `early` and `late` are ascending indices into `cells`, `alphas` in the order of the records, `gene_of` {token:
    symbol}, `saes` {layer: checksums of its SAE}, `fingerprint` that of the run's settings, `batch_size` steered
    passes per batch or None for what memory allows.
    """

    out_dir: Path
    bench: SteeringBench
    cells: Sequence[Cell]
    early: NDArray[np.int64]
    late: NDArray[np.int64]
    alphas: tuple[float, ...]
    gene_of: Mapping[int, str]
    saes: Mapping[int, Mapping[str, str]]
    fingerprint: str
    batch_size: int | None = None
    spent: Spent = field(default_factory=Spent)
    engine_checked: bool = False
    last_save: float = field(default_factory=time.monotonic)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Early and late cells, ascending, each once."""
        return np.union1d(self.early, self.late)

    @cached_property
    def logit_map(self) -> LogitMap:
        """The linear end of the head, on the host."""
        head = self.bench.head
        return LogitMap(*(part.detach().cpu().numpy().astype(np.float64) for part in (head.weight, head.bias)))

    def steer(self, panel: Sequence[PanelFeature]) -> None:
        """Steer every feature whose record is not on disk yet."""
        records = steering_results.read_records(self.out_dir, self.fingerprint)
        steering_results.require_same_saes(records, self.saes, self.out_dir)
        finished = {steering_results.name_of(record): record for record in records}
        self.describe(finished, panel)
        left = [feature for feature in panel if feature.name not in finished]
        log.info("%d features to steer, %d of them already done", len(panel), len(panel) - len(left))
        n_left = len(left)
        self.write_progress(len(panel), n_left, 0 if left else len(self.early))
        for group in self.groups(left):
            so_far = self.steer_group(group, lambda done, left=n_left: self.write_progress(len(panel), left, done))
            signatures = self.signatures(so_far)
            for j, feature in enumerate(group):
                self.write_record(feature, j, so_far, signatures)
            n_left -= len(group)
        discard(self.partial_path)
        self.write_progress(len(panel), n_left, len(self.early))
        if left:
            per_pair = self.spent.seconds / max(1, self.spent.n_pairs)
            log.info(
                "%d clean passes, %d steered passes; %.3f s per steered feature and cell, all alphas",
                self.spent.n_clean_passes,
                self.spent.n_steered_runs,
                per_pair,
            )

    def describe(self, finished: Mapping[str, Mapping[str, Any]], panel: Sequence[PanelFeature]) -> None:
        """Bring labels and switch sizes of the records {feature name: record} up to those of the panel."""
        for feature in panel:
            record = finished.get(feature.name, {})
            described = {**record, **steering_results.description(feature)}
            if record and described != record:
                write_json(steering_results.record_path(self.out_dir, feature), described)

    def write_progress(self, n_features: int, n_left: int, n_cells_done: int) -> None:
        """Say in `progress.json` how far the run is; `n_cells_done` early cells for the features at work."""
        features = {"n_features": n_features, "n_features_done": n_features - n_left}
        cells = {"n_early_cells": len(self.early), "n_early_cells_done": n_cells_done}
        write_json(self.out_dir / "progress.json", features | cells)

    def groups(self, left: Sequence[PanelFeature]) -> Iterator[list[PanelFeature]]:
        """The features left, in groups that fit in memory: first those that an interrupted run had begun."""
        d_model = self.logit_map.weight.shape[1]
        size = max(1, MAX_CHANGES_BYTES // (8 * d_model * len(self.alphas) * max(1, len(self.early))))
        begun = marks_in(self.partial_path) if left else frozenset()
        first = [feature for feature in left if self.mark(feature) in begun]
        rest = [feature for feature in left if self.mark(feature) not in begun]
        for features in (first, rest):
            for start in range(0, len(features), size):
                yield features[start : start + size]
        if not left and self.kept_signatures() is None:
            yield []  # lost signatures are made again from clean passes alone

    def steer_group(self, group: Sequence[PanelFeature], on_save: Callable[[int], None]) -> Unfinished:
        """Run the cells that are not done yet for a group of features."""
        n_ends, d_model = len(self.ends), self.logit_map.weight.shape[1]
        marks = {feature: self.mark(feature) for feature in group}
        so_far = Unfinished.empty(marks, self.alphas, len(self.early), n_ends, d_model)
        so_far.restore(self.partial_path)
        is_early = np.isin(self.ends, self.early)
        needed = is_early if self.kept_signatures() else np.ones(n_ends, dtype=bool)

        def save(*, at_once: bool = False) -> None:
            due = at_once or time.monotonic() - self.last_save > SAVE_EVERY_SECONDS
            # results of an engine that was not compared with a full pass yet must not outlive an error
            if due and (self.engine_checked or at_once):
                so_far.save(self.partial_path)
                on_save(int((so_far.cell_done & is_early).sum()))
                self.last_save = time.monotonic()

        with tqdm(total=int(needed.sum()), desc="steering", unit="cell", disable=None) as bar:
            bar.update(int((needed & so_far.cell_done).sum()))
            try:
                for end in np.flatnonzero(needed & ~so_far.cell_done):
                    self.run_cell(so_far, end, save)
                    bar.update()
            except KeyboardInterrupt:
                save(at_once=self.engine_checked)
                raise
        save(at_once=True)
        return so_far

    def run_cell(self, so_far: Unfinished, end: int, save: Callable[[], None]) -> None:
        """The clean pass of one early or late cell and, in an early one, all steered passes.

        Raises:
            UserError: the clean pass does not fit in memory; see `steer_layer` for the steered ones.
        """
        cell = self.cells[self.ends[end]]
        with within_memory(f"cell {cell.name}: its clean pass"):
            clean = self.bench.clean(cell)
        self.spent.n_clean_passes += 1
        so_far.mean_transformed[end] = clean.mean_transformed
        row = int(np.searchsorted(self.early, self.ends[end]))
        if row < len(self.early) and self.early[row] == self.ends[end]:
            started = time.perf_counter()
            for layer in sorted({feature.layer for feature in so_far.features}):
                self.steer_layer(so_far, row, clean, layer, save)
            self.spent.n_pairs += int(so_far.active[row].sum())
            self.spent.seconds += time.perf_counter() - started
        so_far.cell_done[end] = True
        save()

    def steer_layer(
        self, so_far: Unfinished, row: int, clean: CleanStates, layer: int, save: Callable[[], None]
    ) -> None:
        """All steered passes of one layer's features in one early cell, in batches.

        Raises:
            UserError: a change is NaN or infinite, or one pass alone does not fit in memory.
        """
        latents = self.bench.latents(clean, layer)
        runs: list[tuple[int, int, SteeringRun]] = []
        for j, feature in enumerate(so_far.features):
            if feature.layer == layer and is_active(latents, feature.index):
                so_far.active[row, j] = True
                runs += [(j, a, SteeringRun(feature.index, alpha)) for a, alpha in enumerate(self.alphas)]
        self.check_engine(clean, layer, latents, [run for _, _, run in runs])
        size = self.batch_size or self.bench.batch_size(len(clean.cell.tokens))
        left = runs
        while left:
            features, alphas, batch = zip(*left[:size], strict=True)
            if not so_far.done[row, features, alphas].all():  # an interrupted run may have stopped inside a cell
                try:
                    changes = self.bench.mean_changes(clean, layer, latents, batch)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    size = self.batch_size = smaller_batch(len(batch), clean.cell)
                    continue
                so_far.mean_changes[row, features, alphas] = changes
                so_far.done[row, features, alphas] = True
                self.spent.n_steered_runs += sum(moves(latents, run) for run in batch)
                save()
            left = left[size:]

    def check_engine(self, clean: CleanStates, layer: int, latents: TopKLatents, runs: Sequence[SteeringRun]) -> None:
        """Compare a steered pass with a full hooked one with complete logits, before trusting the engine.

        Raises:
            UserError: they disagree, which means that the model is not built as a Geneformer is, or a full pass does
                not fit in the device's memory.
        """
        candidates = [run for run in runs if moves(latents, run)]
        if self.engine_checked or not candidates:
            return
        largest = np.abs(self.logit_map.logits(clean.mean_transformed)).max()
        for run in candidates[:SELF_CHECK_TRIES]:
            with within_memory(f"cell {clean.cell.name}: a steered pass with complete logits"):
                (change,) = self.bench.mean_changes(clean, layer, latents, [run])
                slow = steered_logit_change(self.bench, clean.cell, layer, run.feature, run.alpha)
            wrong_by = np.abs(self.logit_map.changes(change) - slow).max()
            if wrong_by <= SELF_CHECK_TOLERANCE * (np.abs(slow).max() + 0.01 * largest):
                self.engine_checked = True
                return
        raise UserError(
            f"--model: the engine and a full forward pass disagree by {wrong_by:.2g} on logits that steering "
            f"F{run.feature}_L{layer} changes by up to {np.abs(slow).max():.2g}; this model is not built as a "
            "Geneformer is, or the device computes wrongly."
        )

    def signatures(self, so_far: Unfinished) -> Signatures:
        """The state signatures: those in the folder, else made from the clean passes and written."""
        kept = self.kept_signatures()
        if kept is not None:
            return kept
        means = [so_far.mean_transformed[np.isin(self.ends, group)].mean(axis=0) for group in (self.early, self.late)]
        made = Signatures(*(self.logit_map.logits(mean) for mean in means))
        arrays = {"early": made.early, "late": made.late, "fingerprint": np.array(self.fingerprint)}
        write_atomically(self.out_dir / SIGNATURES_FILE, lambda stream: np.savez(stream, **arrays))
        return made

    def kept_signatures(self) -> Signatures | None:
        """The signatures in the folder, if they are whole and of this run."""
        path = self.out_dir / SIGNATURES_FILE
        kept = read_arrays(path)
        if kept is None:
            return None
        n_vocab = (len(self.logit_map.bias),)
        try:
            if kept["fingerprint"].item() == self.fingerprint and kept["early"].shape == kept["late"].shape == n_vocab:
                return Signatures(kept["early"], kept["late"])
        except (KeyError, ValueError):
            pass
        log.warning("%s is of another run: it is made again.", path)
        return None

    def write_record(self, feature: PanelFeature, j: int, so_far: Unfinished, signatures: Signatures) -> None:
        """Write the JSON file of one feature."""
        rows = np.flatnonzero(so_far.active[:, j])
        clean = so_far.mean_transformed[np.searchsorted(self.ends, self.early[rows])]
        alpha_results: dict[str, Any] = {}
        for a, alpha in enumerate(self.alphas):
            changes = so_far.mean_changes[rows, j, a]  # (n_steered, d_model)
            shifts = state_shifts(clean, changes, self.logit_map, signatures)
            mean_change = changes.mean(axis=0) if len(rows) else np.zeros(changes.shape[1])
            alpha_results[str(alpha)] = alpha_result(shifts, self.logit_map.changes(mean_change), self.gene_of)
        record = steering_results.record(
            feature,
            {
                "n_early_cells": len(self.early),
                "alpha_results": alpha_results,
                "steered_cells": [self.cells[i].name for i in self.early[rows]],
            },
            n_blocks_after=self.bench.last - feature.layer,
            run=self.fingerprint,
            sae=self.saes[feature.layer],
        )
        write_json(steering_results.record_path(self.out_dir, feature), record)

    @property
    def partial_path(self) -> Path:
        """Where the changes of an unfinished run lie."""
        return self.out_dir / "partial" / "unfinished.npz"

    def mark(self, feature: PanelFeature) -> str:
        """What says that numbers on disk are this feature's in this run."""
        fingerprint = steering_results.record_fingerprint(self.fingerprint, self.saes[feature.layer])
        return f"{feature.name} {fingerprint}"
