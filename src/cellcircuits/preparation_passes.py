"""The passes over the cells that make one group of layers. Each goes on where an earlier run was stopped.

Training rows are sampled and an SAE is trained on those of each layer; firings are counted and errors summed over
all cells; losses are measured with genes masked. What a layer lacks is done for it alone: the others may be further.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import BertForMaskedLM

from cellcircuits.activations import collect_rows, draw_rows, row_stops, stream
from cellcircuits.cells import Cell
from cellcircuits.errors import UserError
from cellcircuits.feature_stats import (
    GeneFeatureCounts,
    ReconstructionError,
    StreamBaseline,
    fit_baseline,
    gene_tokens,
    loss_report,
    mask_positions,
    masked_gene_loss,
    splice,
)
from cellcircuits.preparation_settings import Preparation
from cellcircuits.preparation_state import SaveClock, Unfinished
from cellcircuits.sae_training import TRAINING, train_sae
from sae_model import TopKSAE

log = logging.getLogger(__name__)
MASKED_SHARE = 0.15
ROWS = "rows_*.npz"
TRAINED = "trained.npz"
COUNTS = "counts.npz"
LOSSES = "losses.npz"
LOSS_NAMES = ("original", "spliced", "mean_ablated", "zero_ablated")


@dataclass(frozen=True)
class TrainedSAE:
    """An SAE, the principal components of its training rows, and the record of its training."""

    sae: TopKSAE
    baseline: StreamBaseline
    record: Mapping[str, Any]


def train_group(work: Preparation, states: Mapping[int, Unfinished]) -> dict[int, TrainedSAE]:
    """Train the SAEs of a group of layers, or take those that are trained.

    Args:
        work: the run.
        states: of each layer, what is kept of it.

    Raises:
        UserError: see `collect_rows`, `train_sae` and `Unfinished.write`.
    """
    trained = {layer: _restore_trained(work, state) for layer, state in states.items()}
    pending = [layer for layer in states if trained[layer] is None]
    rows = _sample_rows(work, {layer: states[layer] for layer in pending}) if pending else {}
    for layer in pending:
        trained[layer] = _train(work, rows.pop(layer), layer, states[layer])
    return {layer: of_layer for layer, of_layer in trained.items() if of_layer is not None}


def _sample_rows(work: Preparation, states: Mapping[int, Unfinished]) -> dict[int, np.ndarray]:
    """The training rows of each layer, (n_rows, d_model) float32."""
    settings, model = work.settings, work.inputs.loaded.model
    train = _with_masks(work)
    drawn = draw_rows([len(cell.gene_positions) for cell in train], settings.train_rows, settings.training.seed)
    cells = [cell for cell, part in zip(train, drawn, strict=True) if len(part)]
    offsets = [part for part in drawn if len(part)]
    stops = row_stops(offsets)
    rows = {layer: np.empty((stops[-1], model.config.hidden_size), np.float32) for layer in states}
    n_kept = {layer: _restore_rows(state, rows[layer], stops) for layer, state in states.items()}
    clock = SaveClock()
    for n_cells in collect_rows(model, cells, offsets, rows, min(n_kept.values())):
        if clock.due(at_end=n_cells == len(cells)):
            for layer in (layer for layer in states if n_kept[layer] < n_cells):
                first, n_kept[layer] = n_kept[layer], n_cells
                part = {"n_cells": np.array(n_cells), "rows": rows[layer][stops[first] : stops[n_cells]]}
                states[layer].write(ROWS.replace("*", f"{first:07d}"), part)
            clock.saved()
    return rows


def _restore_rows(state: Unfinished, rows: np.ndarray, stops: np.ndarray) -> int:
    """Fill `rows` with what is kept of them; returns the number of cells that they come from."""
    n_cells = 0
    like = {"n_cells": np.array(0), "rows": None}
    while (kept := state.read(ROWS.replace("*", f"{n_cells:07d}"), like)) is not None:
        stop, part = int(kept["n_cells"]), kept["rows"]
        if not n_cells < stop < len(stops) or part.shape != rows[stops[n_cells] : stops[stop]].shape:
            break
        rows[stops[n_cells] : stops[stop]] = part
        n_cells = stop
    return n_cells


def _with_masks(work: Preparation) -> Sequence[Cell]:
    """The training cells, a share of whose genes shows the mask token.

    Raises:
        UserError: masks are asked for and the dictionary has no mask token.
    """
    share, mask_token = work.settings.mask_share, work.inputs.vocabulary.mask
    if not share:
        return work.split.train
    if mask_token is None:
        raise UserError(f"--mask-share {share}: the model's dictionary has no <mask>; leave the flag out.")
    rng = np.random.default_rng(work.settings.training.seed)
    masked_cells = []
    for cell in work.split.train:
        tokens = cell.tokens.copy()
        tokens[mask_positions(cell, share, rng)] = mask_token
        masked_cells.append(replace(cell, tokens=tokens))
    return masked_cells


def _train(work: Preparation, rows: np.ndarray, layer: int, state: Unfinished) -> TrainedSAE:
    """Train one SAE and keep it at once, in place of its rows."""
    settings, device = work.settings.training, work.inputs.loaded.model.device
    sae, record = train_sae(rows, settings, device, f"layer {layer}", state)
    trained = TrainedSAE(sae, fit_baseline(rows, sae.input_mean.cpu().numpy(), settings.k, device), record)
    state.write(TRAINED, _trained_arrays(trained))
    state.remove(ROWS, TRAINING)
    return trained


def _trained_arrays(trained: TrainedSAE) -> dict[str, np.ndarray]:
    sae, baseline = trained.sae, trained.baseline
    return {
        **{name: tensor.cpu().numpy() for name, tensor in sae.state_dict().items()},
        "input_mean": sae.input_mean.cpu().numpy(),
        "components": baseline.components,
        "participation_ratio": np.array(baseline.participation_ratio),
        "record": np.array(json.dumps(trained.record)),
    }


def _restore_trained(work: Preparation, state: Unfinished) -> TrainedSAE | None:
    d_model, settings = work.inputs.loaded.model.config.hidden_size, work.settings.training
    sae = TopKSAE(d_model, settings.expansion * d_model, settings.k)
    blank = TrainedSAE(sae, StreamBaseline(np.empty((d_model, settings.k), np.float32), 0.0), {})
    kept = state.read(TRAINED, _trained_arrays(blank))
    if kept is None:
        return None
    sae.load_state_dict({name: torch.from_numpy(kept[name]) for name in sae.state_dict()})
    sae.input_mean.copy_(torch.from_numpy(kept["input_mean"]))
    sae.to(work.inputs.loaded.model.device).eval().requires_grad_(False)
    baseline = StreamBaseline(kept["components"], float(kept["participation_ratio"]))
    return TrainedSAE(sae, baseline, json.loads(str(kept["record"])))


@dataclass
class Tally:
    """What is counted of one layer over the first `n_cells` cells."""

    counts: GeneFeatureCounts
    errors: ReconstructionError = field(default_factory=ReconstructionError)
    n_cells: int = 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, to keep it."""
        counts, errors = self.counts, np.array(astuple(self.errors), np.float64)
        sums = {"sums": counts.sums, "firings": counts.firings, "n_seen": counts.n_seen}
        return {**sums, "errors": errors, "n_cells": np.array(self.n_cells)}

    def restore(self, state: Unfinished) -> None:
        """Take up what is kept, if there is something."""
        kept = state.read(COUNTS, self.arrays())
        if kept is None:
            return
        self.counts = GeneFeatureCounts(self.counts.tokens, kept["sums"], kept["firings"], kept["n_seen"])
        n_positions, *sums, n_firings = kept["errors"].tolist()
        self.errors = ReconstructionError(int(n_positions), *sums, int(n_firings))
        self.n_cells = int(kept["n_cells"])


def count_group(
    model: BertForMaskedLM,
    cells: Sequence[Cell],
    saes: Mapping[int, TopKSAE],
    states: Mapping[int, Unfinished],
    baselines: Mapping[int, StreamBaseline],
    held_out: frozenset[int],
) -> dict[int, Tally]:
    """One pass over all cells: firings of every gene, and errors where the cell is held out.

    Args:
        model: the Geneformer.
        cells: all used cells.
        saes: {layer: SAE}.
        states: of each layer, what is kept of it.
        baselines: of each layer, what its errors are compared with.
        held_out: rows of the held-out cells.

    Raises:
        UserError: see `stream` and `Unfinished.write`.
    """
    tokens = gene_tokens(cells)[0]
    tallies = {layer: Tally(GeneFeatureCounts.empty(tokens, sae.n_features)) for layer, sae in saes.items()}
    for layer, tally in tallies.items():
        tally.restore(states[layer])
    first = min(tally.n_cells for tally in tallies.values())
    clock = SaveClock()
    for number, cell, streams in stream(model, cells, list(saes), "counting firings", first):
        for layer in (layer for layer, tally in tallies.items() if tally.n_cells <= number):
            tally, residual = tallies[layer], streams[layer]
            tally.counts.add_latents(cell, *saes[layer].top_k(residual))
            if cell.row in held_out:
                tally.errors.add(residual, saes[layer], baselines[layer])
            tally.n_cells = number + 1
        if clock.due(at_end=number == len(cells) - 1):
            for layer, tally in tallies.items():
                states[layer].write(COUNTS, tally.arrays())
            clock.saved()
    return tallies


def losses_of_group(
    work: Preparation, saes: Mapping[int, TopKSAE], states: Mapping[int, Unfinished]
) -> dict[int, dict[str, Any]]:
    """Masked-gene losses of every layer on the first held-out cells, or why there are none."""
    cells = work.split.held_out[: work.settings.n_loss_cells]
    mask_token = work.inputs.vocabulary.mask
    if mask_token is None or not cells:
        reason = "the dictionary has no <mask>" if mask_token is None else "--loss-cells 0"
        log.info("Masked-gene loss is not measured: %s", reason)
        return {layer: {"loss_skipped": reason} for layer in saes}
    rng = np.random.default_rng(work.settings.training.seed)
    masks = [mask_positions(cell, MASKED_SHARE, rng) for cell in cells]
    n_masked = sum(len(masked) for masked in masks)
    facts = {"n_loss_cells": len(cells), "n_masked": n_masked}
    sums = _loss_sums(work, (cells, masks), saes, states)
    reports = {}
    for layer, of_layer in sums.items():
        losses = (of_layer / n_masked).tolist()
        reports[layer] = loss_report(dict(zip(LOSS_NAMES, losses, strict=True))) | facts
    return reports


def _loss_sums(
    work: Preparation,
    masked_cells: tuple[Sequence[Cell], Sequence[np.ndarray]],
    saes: Mapping[int, TopKSAE],
    states: Mapping[int, Unfinished],
) -> dict[int, np.ndarray]:
    """Of each layer, the loss under each of `LOSS_NAMES`, summed over all masked positions; (4,) float64."""
    model, mask_token = work.inputs.loaded.model, work.inputs.vocabulary.mask
    blank = {"n_cells": np.array(0), "sums": np.zeros(len(LOSS_NAMES))}
    kept = {layer: state.read(LOSSES, blank) or blank for layer, state in states.items()}
    n_done = {layer: int(of_layer["n_cells"]) for layer, of_layer in kept.items()}
    sums = {layer: of_layer["sums"].copy() for layer, of_layer in kept.items()}
    clock = SaveClock()
    bar = tqdm(list(zip(*masked_cells, strict=True)), desc="masked-gene losses", unit="cell", disable=None)
    for number, (cell, masked) in enumerate(bar):
        pending = [layer for layer in saes if n_done[layer] <= number]
        untouched = masked_gene_loss(model, cell, masked, mask_token) if pending else 0.0
        for layer in pending:
            edits = splice(saes[layer])
            placed = [(layer, edits[name]) for name in LOSS_NAMES[1:]]
            sums[layer] += [untouched, *(masked_gene_loss(model, cell, masked, mask_token, one) for one in placed)]
            n_done[layer] = number + 1
            if clock.due(at_end=number == len(bar) - 1):
                for other, state in states.items():
                    state.write(LOSSES, {"n_cells": np.array(n_done[other]), "sums": sums[other]})
                clock.saved()
    return sums
