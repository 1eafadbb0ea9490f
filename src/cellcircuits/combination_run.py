"""One run of experiment 2: combinations one after the other, cells inside, one JSON file each, nothing lost."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cellcircuits import combination_results
from cellcircuits.additivity import combination_additivity
from cellcircuits.cells import Cell
from cellcircuits.clock import recorded_seconds
from cellcircuits.combination_stats import (
    AdditivitySettings,
    CombinationEffects,
    combination_statistics,
    condition_name,
    conditions,
)
from cellcircuits.combinations import LISTED, Combination
from cellcircuits.device import host_memory, is_out_of_memory
from cellcircuits.errors import UserError
from cellcircuits.finite import EFFECT, require_finite
from cellcircuits.joint import CellEffects, CleanPath, JointBench, LayerFeature, joint_ablation_effect
from cellcircuits.jsonio import discard, write_atomically, write_json
from cellcircuits.stats import EdgeRule
from cellcircuits.tracing import SAVE_EVERY_SECONDS, within_memory

log = logging.getLogger(__name__)
CLEAN_SHARE_OF_MEMORY = 0.25
SELF_CHECK_TOLERANCE = 1e-3
# In float32 a near tie for the last place among the k may fall either way, which moves a latent or two.
SELF_CHECK_TIES = 4
SELF_CHECK_TIED_SHARE = 0.02
ARRAYS = ("measured", "published", "union", "additive", "rounding")


@dataclass
class Unfinished:
    """Effects of one combination on the cells so far; arrays as in `joint.CellEffects`, with cells first."""

    measured: NDArray[np.bool_]
    published: NDArray[np.float64]
    union: NDArray[np.float64]
    additive: NDArray[np.float64]
    rounding: NDArray[np.float64]
    n_cells_done: int = 0
    n_block_runs: int = 0
    seconds: float = 0.0

    @classmethod
    def empty(cls, n_cells: int, order: int, n_targets: int) -> "Unfinished":
        """Nothing measured yet."""
        shape = (n_cells, len(conditions(order)), n_targets)
        effects = (np.zeros(shape) for _ in range(3))
        return cls(np.zeros(shape[:2], dtype=bool), *effects, rounding=np.zeros((n_cells, n_targets)))

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the finished cells to `path`, whole or not at all."""
        arrays = {name: getattr(self, name)[: self.n_cells_done] for name in ARRAYS}
        spent = np.array([self.n_block_runs, self.seconds])
        write_atomically(path, lambda f: np.savez(f, fingerprint=np.array(fingerprint), spent=spent, **arrays))

    def restore(self, path: Path, fingerprint: str) -> None:
        """Take up what `save` wrote in the same run; anything else is said and ignored."""
        if not path.exists():
            return
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as kept:
                if kept["fingerprint"].item() != fingerprint:
                    log.warning("%s is of another run: it is not used.", path)
                    return
                arrays = {name: kept[name] for name in ARRAYS}
                n_block_runs, seconds = kept["spent"].tolist()
            done = len(arrays["measured"])
            for name, array in arrays.items():
                getattr(self, name)[:done] = array
        except Exception as error:  # a damaged archive makes zipfile and NumPy raise almost anything
            log.warning("%s is damaged (%s): its cells are measured again.", path, type(error).__name__)
            return
        self.n_cells_done, self.n_block_runs, self.seconds = done, int(n_block_runs), seconds

    def effects(self) -> CombinationEffects:
        """All cells, once they are done."""
        return CombinationEffects(self.measured, self.published, self.union, self.additive)


class CleanPaths:
    """Clean runs of cells, made when first asked for and kept as long as they fit in `max_bytes` of host memory."""

    def __init__(self, bench: JointBench, cells: Sequence[Cell], max_bytes: float) -> None:
        """Bind the cells; nothing is run yet."""
        self._bench, self._cells, self._free = bench, cells, max_bytes
        self._kept: dict[int, CleanPath] = {}
        self.n_runs = 0

    def __len__(self) -> int:
        """Number of cells."""
        return len(self._cells)

    def __getitem__(self, i: int) -> CleanPath:
        """The clean run of cell `i`.

        Raises:
            UserError: it does not fit in the device's memory.
        """
        if i in self._kept:
            return self._kept[i]
        with within_memory(f"cell {self._cells[i].name}: its clean run"):
            clean = self._bench.clean(self._cells[i])
        self.n_runs += 1
        if clean.n_bytes <= self._free:
            self._kept[i] = clean
            self._free -= clean.n_bytes
        return clean


@dataclass
class CombinationRun:
    """Measures combinations into one output folder that belongs to this run.

    `fingerprint` is that of the run's settings, `batch_size` streams per batch or None for what memory allows;
    with `save_effects` the per-cell effects are kept too, `additivity` says how their sums are tested.
    """

    out_dir: Path
    bench: JointBench
    cells: Sequence[Cell]
    rule: EdgeRule
    fingerprint: str
    save_effects: bool = False
    batch_size: int | None = None
    additivity: AdditivitySettings = field(default_factory=AdditivitySettings)

    def measure(self, chosen: Sequence[Combination]) -> None:
        """Measure every combination whose record is not on disk yet, one chosen twice only once."""
        chosen = list({combination.name: combination for combination in chosen}.values())
        left = [combination for combination in chosen if not self.is_finished(combination)]
        self.write_progress(len(chosen), len(left))
        log.info("%d combinations to measure, %d of them already done", len(chosen), len(chosen) - len(left))
        if not left:
            return
        clean = CleanPaths(self.bench, self.cells, CLEAN_SHARE_OF_MEMORY * host_memory())
        self.check_engine(clean, left)
        with tqdm(total=len(left) * len(clean), desc="ablating", unit="cell", disable=None) as bar:
            for n_left, combination in zip(range(len(left), 0, -1), left, strict=True):

                def say(n_cells: int, n_left: int = n_left) -> None:
                    self.write_progress(len(chosen), n_left, n_cells)
                    if bar.disable:
                        log.info("%d of %d combinations and %d cells done", len(chosen) - n_left, len(chosen), n_cells)

                self.measure_one(combination, clean, bar, say)
                self.write_progress(len(chosen), n_left - 1)
        log.info("%d clean runs", clean.n_runs)

    def write_progress(self, n_combinations: int, n_left: int, n_cells_done: int = 0) -> None:
        """Say in `progress.json` how far the run is; `n_cells_done` of the combination at work."""
        done = {"n_combinations": n_combinations, "n_combinations_done": n_combinations - n_left}
        write_json(self.out_dir / "progress.json", done | {"n_cells": len(self.cells), "n_cells_done": n_cells_done})

    def is_finished(self, combination: Combination) -> bool:
        """Whether the record, and the effects where they are asked for, are there; mends names and labels."""
        path = combination_results.record_path(self.out_dir, combination)
        record = combination_results.read_record(path, self.fingerprint)
        if record is None:
            return False
        if self.save_effects and not is_zipfile(self.effects_path(combination)):
            return False
        described = record | combination_results.description(combination)
        knows_more = combination.kind == LISTED and record["pathway"] != LISTED  # a plain list names no pathway
        if described != record and not knows_more:
            write_json(path, described)
        discard(self.partial_path(combination))
        return True

    def measure_one(self, combination: Combination, clean: CleanPaths, bar: tqdm, say: Callable[[int], None]) -> None:
        """Measure one combination on all cells and write its files; `say` now and then how many cells are done."""
        features = [(feature.layer, feature.index) for feature in combination.features]
        partial = self.partial_path(combination)
        so_far = Unfinished.empty(len(clean), len(features), self.bench.n_targets)
        so_far.restore(partial, self.fingerprint)
        bar.update(so_far.n_cells_done)
        last_save = time.monotonic()

        def on_cell() -> None:
            nonlocal last_save
            bar.update()
            if time.monotonic() - last_save > SAVE_EVERY_SECONDS:
                so_far.save(partial, self.fingerprint)
                say(so_far.n_cells_done)
                last_save = time.monotonic()

        try:
            measure_cells(self.bench, clean, features, so_far, batch_size=self.batch_size, on_cell=on_cell)
        except KeyboardInterrupt:
            so_far.save(partial, self.fingerprint)
            raise
        if self.save_effects:
            self.write_effects(combination, so_far)
        spent = {"n_block_runs": so_far.n_block_runs, "elapsed_seconds": so_far.seconds}
        self.write_record(combination, self.statistics(so_far, features) | spent)
        discard(partial)

    def statistics(self, so_far: Unfinished, features: Sequence[LayerFeature]) -> dict[str, Any]:
        """The numbers of one combination's record, once all cells are done."""
        effects = so_far.effects()
        tested = combination_additivity(effects, so_far.rounding, features, self.additivity, self.bench.device)
        return combination_statistics(effects, len(features), self.rule) | {"additivity": tested}

    def write_record(self, combination: Combination, numbers: Mapping[str, Any]) -> None:
        """Write the JSON file of one combination."""
        record = combination_results.record(combination, self.bench.target, len(self.cells), numbers, self.fingerprint)
        write_json(combination_results.record_path(self.out_dir, combination), record)

    def write_effects(self, combination: Combination, so_far: Unfinished) -> None:
        """Keep the per-cell effects: for each condition `A`, ... its cells, and both averages over positions.

        `cells_A` (n_active,) numbers of the cells among those of the run; `A` (n_active, n_targets) float32 averaged
        over the condition's own positions; `union_A` (n_any, n_targets) over those of the whole combination, cells
        `cells_any`, the same for every condition; `rounding` (n_any, n_targets) the bound on what rounding moves a
        latent averaged so, which decides what counts as live and as an interaction.
        """
        arrays: dict[str, NDArray] = {"cell_names": np.array([cell.name for cell in self.cells])}
        present = so_far.measured[:, -1]
        arrays["cells_any"] = np.flatnonzero(present)
        arrays["rounding"] = so_far.rounding[present].astype(np.float32)
        for c, members in enumerate(conditions(len(combination.features))):
            name, measured = condition_name(members), so_far.measured[:, c]
            arrays[f"cells_{name}"] = np.flatnonzero(measured)
            arrays[name] = so_far.published[measured, c].astype(np.float32)
            arrays[f"union_{name}"] = so_far.union[present, c].astype(np.float32)
        write_atomically(self.effects_path(combination), lambda stream: np.savez_compressed(stream, **arrays))

    def partial_path(self, combination: Combination) -> Path:
        """Where the effects of an unfinished combination lie."""
        return self.out_dir / "partial" / f"{combination.name}.npz"

    def effects_path(self, combination: Combination) -> Path:
        """Where the per-cell effects of a combination lie, if they are kept."""
        return self.out_dir / "effects" / f"{combination.name}.npz"

    def check_engine(self, clean: CleanPaths, chosen: Sequence[Combination]) -> None:
        """Compare the tree of tail runs with full hooked forward passes on this model, before trusting it.

        Raises:
            UserError: they disagree, which means that the model is not built as a Geneformer is, or a full pass does
                not fit in the device's memory.
        """
        found = self._first_active(clean, chosen)
        if found is None:
            return
        path, features = found
        fast = effects_that_fit(self.bench, path, features, self.batch_size)[0].published[-1]
        with within_memory(f"cell {path.cell.name}: a full forward pass"):
            slow = joint_ablation_effect(self.bench, path.cell, features)
        if slow is None:  # a near tie at its only position fell the other way
            return
        require_finite(fast, path.cell, EFFECT)
        require_finite(slow, path.cell, EFFECT)
        n_moved = np.count_nonzero((fast != 0) | (slow != 0))
        n_differ = np.count_nonzero(np.abs(fast - slow) > SELF_CHECK_TOLERANCE * (1 + np.abs(slow).max()))
        if n_differ > max(SELF_CHECK_TIES, SELF_CHECK_TIED_SHARE * n_moved):
            raise UserError(
                f"--model: the engine and full forward passes disagree on {n_differ} of {n_moved} effects of removing "
                f"{features}; this model is not built as a Geneformer is, or the device computes wrongly."
            )

    def _first_active(
        self, clean: CleanPaths, chosen: Sequence[Combination]
    ) -> tuple[CleanPath, list[LayerFeature]] | None:
        """A cell and a combination with all features active in it, or any of them where there is none such."""
        for wanted in (all, any):
            for i in range(min(len(clean), 10)):
                path = clean[i]
                for combination in chosen:
                    features = [(feature.layer, feature.index) for feature in combination.features]
                    if wanted(path.active(feature).any() for feature in features):
                        return path, features
        return None


def effects_that_fit(
    bench: JointBench, path: CleanPath, features: Sequence[LayerFeature], batch_size: int | None
) -> tuple[CellEffects, int | None]:
    """One cell's effects, in smaller batches where memory runs out; and the batch size to go on with.

    Raises:
        UserError: one stream alone does not fit.
    """
    while True:
        try:
            return bench.effects(path, features, batch_size), batch_size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            n_streams = batch_size or min(bench.batch_size(len(path.cell.tokens)), len(conditions(len(features))))
            if n_streams == 1:
                raise UserError(
                    f"cell {path.cell.name}: not even one stream fits in the device's memory; free some of it, "
                    "lower --max-tokens or take --device cpu."
                ) from None
            batch_size = n_streams // 2
            log.warning("Out of memory: going on with batches of %d streams.", batch_size)


def measure_cells(
    bench: JointBench,
    clean: CleanPaths,
    features: Sequence[LayerFeature],
    so_far: Unfinished,
    *,
    batch_size: int | None = None,
    on_cell: Callable[[], None] = lambda: None,
) -> None:
    """Measure one combination on the cells that are not done yet, filling `so_far`.

    Raises:
        UserError: an effect is NaN or infinite, or one stream alone does not fit.
    """
    for i in range(so_far.n_cells_done, len(clean)):
        started = time.perf_counter()
        path = clean[i]
        effects, batch_size = effects_that_fit(bench, path, features, batch_size)
        require_finite(effects.union, path.cell, EFFECT)
        require_finite(effects.published, path.cell, EFFECT)
        for name in ARRAYS:
            getattr(so_far, name)[i] = getattr(effects, name)
        so_far.n_block_runs += effects.n_block_runs
        so_far.seconds += recorded_seconds(time.perf_counter() - started)
        so_far.n_cells_done = i + 1
        on_cell()
