"""One run of controlled steering: layers outside, cells inside, every edit of a layer innermost; nothing lost.

What a layer's edits give in its cells is kept on disk meanwhile; a record per feature is written at the layer's end.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cellcircuits import controlled_results
from cellcircuits.cells import Cell
from cellcircuits.controlled_results import record_name
from cellcircuits.device import is_out_of_memory
from cellcircuits.displacements import Displacement, DisplacementBench, MaskedGenes, displaced_final, positive_rows
from cellcircuits.effects import TopKLatents
from cellcircuits.errors import UserError
from cellcircuits.jsonio import write_json
from cellcircuits.kept_rows import KeptRows, remove_rows
from cellcircuits.steering import CleanStates, smaller_batch
from cellcircuits.steering_controls import Controls, Dose, Edit, LayerFacts, candidates, choose_controls, edits_of
from cellcircuits.steering_readouts import (
    LINEAR,
    MARKERS,
    N_MOVED,
    N_MOVED_MASKED,
    PROBABILITY,
    PROBE,
    SIGNATURE,
    VALUES,
    MarkerTokens,
    StateReadouts,
    marker_change,
    markers_in,
)
from cellcircuits.tracing import within_memory

log = logging.getLogger(__name__)
SELF_CHECK_TOLERANCE = 1e-3  # of the largest change, plus a hundredth of it of the largest value
COLUMN = {name: number for number, name in enumerate(VALUES)}


@dataclass(frozen=True)
class SteeredFeature:
    """A feature of the panel; `kind` ON or OFF, None where nobody said."""

    layer: int
    index: int
    kind: str | None
    switch_d: float | None
    label: str

    @property
    def name(self) -> str:
        """`F25_L0`, as result files are called."""
        return f"F{self.index}_L{self.layer}"


@dataclass(frozen=True)
class Design:
    """Which edits are made, in which cells, and what is read; everything was chosen without these cells.

    Attributes:
        panel: the features.
        facts: {layer: what the first half says}.
        doses: sizes of the edits.
        n_draws: controls of each kind per feature and dose.
        seed: of the draws.
        readouts: signature and probe.
        markers: tokens of the marker genes.
        mask: token of `<mask>`.
        switch_d: {layer: (n_features,) d of late against early cells of the first half}, NaN where untested.
    """

    panel: tuple[SteeredFeature, ...]
    facts: Mapping[int, LayerFacts]
    doses: tuple[Dose, ...]
    n_draws: int
    seed: int
    readouts: StateReadouts
    markers: MarkerTokens
    mask: int
    switch_d: Mapping[int, NDArray[np.float64]]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the panel, ascending."""
        return tuple(sorted({feature.layer for feature in self.panel}))

    def of_layer(self, layer: int) -> list[SteeredFeature]:
        """Features of one layer, ascending."""
        return sorted((f for f in self.panel if f.layer == layer), key=lambda f: f.index)


@dataclass(frozen=True)
class LayerEdits:
    """All edits of one layer.

    Attributes:
        edits: each distinct one once.
        of_feature: {feature: per dose {kind: numbers among `edits`}}.
        controls: the control features.
        directions: (n_edits, d_model) unit vectors.
    """

    edits: tuple[Edit, ...]
    of_feature: Mapping[int, tuple[dict[str, tuple[int, ...]], ...]]
    controls: Controls
    directions: NDArray[np.float64]


@dataclass
class ControlledSteerer:
    """Steers a design's features in some cells into one output folder that belongs to this run.

    `cells` are early cells of the second half, `fingerprint` that of the run's settings, `batch_size` passes per batch
    or None for what memory allows.
    """

    out_dir: Path
    bench: DisplacementBench
    cells: Sequence[Cell]
    design: Design
    fingerprint: str
    batch_size: int | None = None
    n_passes: int = 0
    n_done: int = 0
    engine_checked: bool = False

    @cached_property
    def masked_genes(self) -> list[tuple[MaskedGenes, NDArray[np.bool_]] | None]:
        """Of every cell the marker genes to mask and which are late; None where a side has none."""
        found = [markers_in(cell.tokens, cell.gene_positions, self.design.markers) for cell in self.cells]
        return [
            hit and (MaskedGenes(hit[0], cell.tokens[cell.gene_positions[hit[0]]]), hit[1])
            for cell, hit in zip(self.cells, found, strict=True)
        ]

    def steer(self) -> None:
        """Steer every feature whose record is not on disk yet.

        Raises:
            UserError: see `DisplacementBench`, or one pass alone does not fit in memory.
        """
        names = {record_name(r) for r in controlled_results.read_records(self.out_dir, self.fingerprint)}
        self.n_done = sum(feature.name in names for feature in self.design.panel)
        log.info("%d features to steer, %d already done", len(self.design.panel), self.n_done)
        for layer in self.design.layers:
            left = [feature for feature in self.design.of_layer(layer) if feature.name not in names]
            if not left:
                continue
            edits = self.layer_edits(layer)
            values = self.layer_values(layer, edits)
            for feature in left:
                self.write_record(feature, edits, values)
                self.n_done += 1
            remove_rows(self.out_dir / "partial")
        remove_rows(self.out_dir / "partial")  # of a run that was killed after its last record
        self.write_progress(None, 0)
        if self.n_passes:
            log.info("%d steered passes", self.n_passes)

    def write_progress(self, layer: int | None, n_cells_done: int) -> None:
        """Say in `progress.json` how far the run is; `n_cells_done` cells of the layer at work."""
        content = {"n_features": len(self.design.panel), "n_features_done": self.n_done, "layer": layer}
        counts = {"n_steered_cells": len(self.cells), "n_steered_cells_done": n_cells_done}
        write_json(self.out_dir / "progress.json", content | counts)

    def decoder(self, layer: int) -> NDArray[np.float64]:
        """Decoder directions of a layer on the host, (n_features, d_model) float64."""
        return self.bench.saes[layer].decoder_directions.detach().cpu().numpy().astype(np.float64)

    def layer_edits(self, layer: int) -> LayerEdits:
        """All edits of a layer's features and of their controls, each distinct one once."""
        design, facts, decoder = self.design, self.design.facts[layer], self.decoder(layer)
        panel, draws = [f.index for f in design.of_layer(layer)], (design.n_draws, design.seed)
        controls = choose_controls(layer, panel, candidates(facts, panel, decoder), facts, draws)
        numbers: dict[Edit, int] = {}
        of_feature: dict[int, tuple[dict[str, tuple[int, ...]], ...]] = {}
        for index in panel:
            length = float(np.linalg.norm(decoder[index]))
            norms = [dose.of_feature(facts, index, length) for dose in design.doses]
            of_feature[index] = tuple(
                {
                    kind: tuple(numbers.setdefault(edit, len(numbers)) for edit in edits)
                    for kind, edits in edits_of(layer, index, controls, norm, draws).items()
                }
                for norm in norms
            )
        directions = np.array([edit.direction(decoder) for edit in numbers])
        return LayerEdits(tuple(numbers), of_feature, controls, directions)

    def layer_values(self, layer: int, edits: LayerEdits) -> NDArray[np.float64]:
        """What every edit gives in every cell, (n_cells, n_edits, n_values), NaN where nothing was moved."""
        arrays = {"values": np.full((len(self.cells), len(edits.edits), len(VALUES)), np.nan)}
        kept = KeptRows(arrays, self.out_dir / "partial", f"layer {layer} {self.fingerprint}")
        with tqdm(
            total=len(self.cells), initial=kept.n_done, desc=f"steering layer {layer}", unit="cell", disable=None
        ) as bar:
            try:
                for number in range(kept.n_done, len(self.cells)):
                    self.write_progress(layer, number)
                    arrays["values"][number] = self.cell_values(number, layer, edits)
                    kept.finished(number + 1)
                    bar.update()
            except KeyboardInterrupt:
                kept.save()
                raise
        kept.save()
        return arrays["values"]

    def cell_values(self, number: int, layer: int, edits: LayerEdits) -> NDArray[np.float64]:
        """What every edit gives in one cell, (n_edits, n_values), from a plain and a masked clean pass."""
        values = np.full((len(edits.edits), len(VALUES)), np.nan)
        cell = self.cells[number]
        with within_memory(f"cell {cell.name}: its clean pass"):
            clean = self.bench.clean(cell)
        moves = self.moves(clean, layer, edits)
        self.check_engine(clean, layer, moves)
        self._read_states(clean, layer, moves, values)
        hit = self.masked_genes[number]
        if hit:
            genes, is_late = hit
            with within_memory(f"cell {cell.name}: its masked clean pass"):
                masked = self.bench.clean(genes.masked(cell, self.design.mask))
            self._read_markers(masked, layer, (genes, is_late), self.moves(masked, layer, edits), values)
        return values

    def moves(self, clean: CleanStates, layer: int, edits: LayerEdits) -> list[Displacement]:
        """The displacement of every edit in one cell; without rows where its feature is not active, or of no length.

        An edit has no length where its feature writes nothing, or where an alpha finds it active nowhere in the first
        half: what it would do is not measured, since a pass would leave rounding in the place of nothing.
        """
        latents: TopKLatents = self.bench.latents(clean, layer)
        rows = {at: positive_rows(latents, at) for at in {edit.at for edit in edits.edits}}
        unit = self.design.facts[layer].mean_norm
        nowhere = np.zeros(0, dtype=np.int64)
        return [
            Displacement(rows[edit.at] if edit.norm and direction.any() else nowhere, edit.norm * unit * direction)
            for edit, direction in zip(edits.edits, edits.directions, strict=True)
        ]

    def _read_states(
        self, clean: CleanStates, layer: int, moves: Sequence[Displacement], values: NDArray[np.float64]
    ) -> None:
        mean_stream = clean.final.cpu().numpy().mean(axis=0, dtype=np.float64)

        def read(some: Sequence[Displacement]) -> NDArray[np.float64]:
            read_out = self.design.readouts.of
            found = read_out(clean.mean_transformed, mean_stream, self.bench.displaced(clean, layer, some))
            direct = read_out(clean.mean_transformed, mean_stream, self.bench.predicted(clean, some))
            columns = [found[SIGNATURE], found[PROBE], found[PROBABILITY], direct[SIGNATURE], direct[PROBE]]
            return np.stack(columns, axis=1)

        names = (SIGNATURE, PROBE, PROBABILITY, LINEAR[SIGNATURE], LINEAR[PROBE])
        self._fill(clean, moves, read, (values, [COLUMN[name] for name in names], COLUMN[N_MOVED]))

    def _read_markers(
        self,
        clean: CleanStates,
        layer: int,
        asked: tuple[MaskedGenes, NDArray[np.bool_]],
        moves: Sequence[Displacement],
        values: NDArray[np.float64],
    ) -> None:
        genes, is_late = asked

        def read(some: Sequence[Displacement]) -> NDArray[np.float64]:
            found = self.bench.displaced_log_p(clean, layer, some, genes)
            direct = self.bench.predicted_log_p(clean, some, genes)
            return np.stack([marker_change(changes, is_late) for changes in (found, direct)], axis=1)

        columns = [COLUMN[MARKERS], COLUMN[LINEAR[MARKERS]]]
        self._fill(clean, moves, read, (values, columns, COLUMN[N_MOVED_MASKED]))

    def _fill(
        self,
        clean: CleanStates,
        moves: Sequence[Displacement],
        read: Callable[[Sequence[Displacement]], NDArray[np.float64]],
        into: tuple[NDArray[np.float64], list[int], int],
    ) -> None:
        """Read the displacements that move something, in batches, into columns of `values`; and count positions."""
        values, columns, n_moved = into
        made = [i for i, move in enumerate(moves) if len(move.rows)]
        size = self.batch_size or self.bench.batch_size(len(clean.cell.tokens))
        start = 0
        while start < len(made):
            some = made[start : start + size]
            try:
                values[np.ix_(some, columns)] = read([moves[i] for i in some])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                size = self.batch_size = smaller_batch(len(some), clean.cell)
                continue
            values[some, n_moved] = [len(moves[i].rows) for i in some]
            start += len(some)
            self.n_passes += len(some)

    def check_engine(self, clean: CleanStates, layer: int, moves: Sequence[Displacement]) -> None:
        """Compare a displaced pass with a full hooked one before trusting the engine.

        Raises:
            UserError: they disagree, which means that the model is not built as a Geneformer is.
        """
        move = next((move for move in moves if len(move.rows)), None)
        if self.engine_checked or move is None:
            return
        with within_memory(f"cell {clean.cell.name}: a full pass"):
            slow = (displaced_final(self.bench, clean.cell, layer, move) - clean.final).mean(dim=0)
        fast = torch.from_numpy(self.bench.displaced(clean, layer, [move]).stream[0])
        slow = slow.cpu().double()
        largest = float(slow.abs().max()) + 0.01 * float(clean.final.abs().max())
        wrong_by = float((fast - slow).abs().max())
        if wrong_by > SELF_CHECK_TOLERANCE * largest:
            raise UserError(
                f"--model: the engine and a full forward pass disagree by {wrong_by:.2g} on a final stream that "
                f"steering at layer {layer} changes by up to {float(slow.abs().max()):.2g}; this model is not built as "
                "a Geneformer is, or the device computes wrongly."
            )
        self.engine_checked = True

    def write_record(self, feature: SteeredFeature, edits: LayerEdits, values: NDArray[np.float64]) -> None:
        """Write the JSON file of one feature: every cell's values of the feature and of its controls."""
        design, facts = self.design, self.design.facts[feature.layer]
        length = float(np.linalg.norm(self.decoder(feature.layer)[feature.index]))
        doses = []
        for dose, numbers in zip(design.doses, edits.of_feature[feature.index], strict=True):
            norm = dose.of_feature(facts, feature.index, length)
            described = {"alpha": dose.alpha, "norm": norm, "length": norm * facts.mean_norm}
            read = {kind: [self._of_edit(edits, i, values) for i in of_kind] for kind, of_kind in numbers.items()}
            (own,) = read.pop("feature")
            controls = {
                kind: [{"draw": draw, **self._described(feature.layer, edits, numbers[kind][draw]), **of_draw}
                       for draw, of_draw in enumerate(of_kind)]
                for kind, of_kind in read.items()
            }  # fmt: skip
            doses.append({"dose": described, "feature": own, "controls": controls})
        content = {
            "feature_idx": feature.index,
            "layer": feature.layer,
            "label": feature.label,
            "kind": feature.kind,
            "switch_d": feature.switch_d,
            "analytic": feature.layer == self.bench.last,
            "n_blocks_after": self.bench.last - feature.layer,
            "frequency": float(facts.frequency[feature.index]),
            "share_of_cells": float(facts.share_of_cells[feature.index]),
            "mean_norm": facts.mean_norm,
            "alphas_in_norm": {
                f"{alpha:g}": Dose(alpha=alpha).of_feature(facts, feature.index, length) for alpha in (2.0, 5.0)
            },
            "steered_cells": [cell.name for cell in self.cells],
            "doses": doses,
        }
        controlled_results.write_record(self.out_dir, feature, content, self.fingerprint)

    def _described(self, layer: int, edits: LayerEdits, number: int) -> dict[str, Any]:
        """Of a control feature which one it is, how often it is active, and whether it switches itself."""
        other = edits.edits[number].feature
        if other is None:
            return {"feature_idx": None}
        d = float(self.design.switch_d[layer][other])
        frequency = float(self.design.facts[layer].frequency[other])
        return {"feature_idx": other, "frequency": frequency, "switch_d": None if np.isnan(d) else d}

    @staticmethod
    def _of_edit(edits: LayerEdits, number: int, values: NDArray[np.float64]) -> dict[str, list[float | None]]:
        of_edit = values[:, number]
        return {
            name: [None if np.isnan(value) else float(value) for value in of_edit[:, column]]
            for name, column in COLUMN.items()
        }
