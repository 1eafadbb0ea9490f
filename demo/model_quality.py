"""How good the demo model is on cells it never saw: loss against baselines, use of context, use of depth.

Every figure uses the same fixed masks (15% of the gene positions of each held-out cell). Baselines are fitted on
the train cells; their smoothing is the one that is best ON THE HELD-OUT CELLS, which favours them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import BertForMaskedLM

from cellcircuits.cells import CellSet
from cellcircuits.geneformer import encoder_blocks, residuals
from train_model import gene_frequency

MASK_SEED = 7
MASKED_SHARE = 0.15
EVALUATION_BATCH = 16
PSEUDOCOUNTS = (0.03, 0.1, 0.3, 1.0, 3.0)
BIN_COUNTS = (2, 4, 8, 16)
BIN_WEIGHTS = (300.0, 1000.0, 3000.0, 10_000.0)
SHOWN_LAYERS = (0, 5, 6, 11, 17)


@dataclass(frozen=True)
class MaskedCells:
    """Held-out cells with their fixed masks; all cells have the same number of tokens.

    Attributes:
        tokens: (n_cells, n_pos) int64, the true tokens.
        masked: (n_cells, n_pos) bool.
        mask: token of `<mask>`.
    """

    tokens: Tensor
    masked: Tensor
    mask: int

    def seen(self, context: Tensor) -> Tensor:
        """`context` with these cells' masks, (n_cells, n_pos)."""
        return context.masked_fill(self.masked, self.mask)


def mask_cells(cells: CellSet, mask: int) -> MaskedCells:
    """Choose the fixed masks; cells shorter than the longest are left out."""
    longest = max(len(cell.tokens) for cell in cells.cells)
    full = [cell for cell in cells.cells if len(cell.tokens) == longest]
    rng = np.random.default_rng(MASK_SEED)
    masked = np.zeros((len(full), longest), dtype=bool)
    for row, cell in enumerate(full):
        n_masked = round(MASKED_SHARE * len(cell.gene_positions))
        masked[row, rng.choice(cell.gene_positions, n_masked, replace=False)] = True
    tokens = torch.from_numpy(np.stack([cell.tokens for cell in full]))
    return MaskedCells(tokens, torch.from_numpy(masked), mask)


def measure(model: BertForMaskedLM, train: CellSet, held_out: CellSet, mask: int) -> dict[str, object]:
    """All figures of the model, JSON-able.

    Args:
        model: in eval mode.
        train: cells the baselines are fitted on.
        held_out: cells everything is measured on.
        mask: token of `<mask>`.
    """
    cells = mask_cells(held_out, mask)
    own = position_losses(model, cells, cells.tokens)  # (n_masked,)
    donors = _donors(cells)
    swapped = position_losses(model, cells, cells.tokens[donors])
    reordered = position_losses(model, cells, _reorder(cells))
    fair = ~_shown_by_donor(cells, donors)
    baselines = baseline_losses(train, cells, model.config.vocab_size)
    best = min(baselines, key=lambda name: baselines[name])
    loss, loss_swapped = float(own.mean()), float(swapped.mean())
    return {
        "n_held_out_cells": len(cells.tokens),
        "n_masked_positions": len(own),
        "loss": loss,
        "baseline_losses": baselines,
        "best_baseline": best,
        "gain_over_best_baseline": baselines[best] - loss,
        "loss_with_another_cells_context": loss_swapped,
        "gain_from_own_context": loss_swapped - loss,
        "loss_with_own_genes_in_another_order": float(reordered.mean()),
        "gain_from_own_context_where_the_donor_lacks_the_gene": float((swapped - own)[fair].mean()),
        "loss_increase_without_blocks": _losses_without_blocks(model, cells, loss),
        "participation_ratio": participation_ratios(model, cells.tokens),
    }


@torch.inference_mode()
def position_losses(model: BertForMaskedLM, cells: MaskedCells, context: Tensor) -> Tensor:
    """Cross-entropy at every masked position, (n_masked,) nats, with `context` (n_cells, n_pos) around them."""
    seen, losses = cells.seen(context), []
    for rows in torch.arange(len(seen)).split(EVALUATION_BATCH):
        masked = cells.masked[rows]
        logits = model.cls(model.bert(seen[rows])[0][masked])
        losses.append(functional.cross_entropy(logits, cells.tokens[rows][masked], reduction="none"))
    return torch.cat(losses)


def _donors(cells: MaskedCells) -> Tensor:
    """For every cell another one, each used once: (n_cells,)."""
    order = np.random.default_rng(MASK_SEED).permutation(len(cells.tokens))
    donors = np.empty_like(order)
    donors[order] = np.roll(order, 1)
    return torch.from_numpy(donors)


def _reorder(cells: MaskedCells) -> Tensor:
    """The cells with their visible genes in random order, (n_cells, n_pos): which genes, but not how high.

    A rank says much about a gene's median, so a model can win by placing genes; this tells that part apart.
    """
    rng = np.random.default_rng(MASK_SEED)
    tokens = cells.tokens.clone()
    for row, masked in enumerate(cells.masked):
        visible = np.flatnonzero(~masked.numpy())[1:-1]
        tokens[row, visible] = tokens[row, rng.permutation(visible)]
    return tokens


def _shown_by_donor(cells: MaskedCells, donors: Tensor) -> Tensor:
    """Whether the wanted gene stands visibly in the donor's context, (n_masked,) bool.

    The model knows that no gene stands twice in a cell, so there a swapped context misleads it; positions
    without this tell how much the rest of the context matters.
    """
    shown = []
    for row, context in enumerate(cells.seen(cells.tokens[donors])):
        shown.append(torch.isin(cells.tokens[row][cells.masked[row]], context))
    return torch.cat(shown)


# ---------------------------------------------------------------- baselines


def baseline_losses(train: CellSet, cells: MaskedCells, n_vocab: int) -> dict[str, float]:
    """Mean loss at the masked positions of four predictors that read no order of genes, in nats."""
    unigrams = [gene_frequency(train, n_vocab, pseudocount) for pseudocount in PSEUDOCOUNTS]
    settings = [(n_bins, weight) for n_bins in BIN_COUNTS for weight in BIN_WEIGHTS]
    best_unigram = min(unigrams, key=lambda table: _loss(table[None], cells, False))
    by_bin = [_bin_tables(train, best_unigram, cells.tokens.shape[1], *setting) for setting in settings]
    return {
        "unigram": min(_loss(table[None], cells, False) for table in unigrams),
        "unigram_by_rank_bin": min(_loss(tables, cells, False) for tables in by_bin),
        "unigram_of_genes_not_visible": min(_loss(table[None], cells, True) for table in unigrams),
        "unigram_by_rank_bin_of_genes_not_visible": min(_loss(tables, cells, True) for tables in by_bin),
    }


def _bin_tables(train: CellSet, unigram: np.ndarray, n_pos: int, n_bins: int, weight: float) -> np.ndarray:
    """Gene frequencies by bin of positions, drawn towards the unigram: (n_bins, n_vocab)."""
    tables = np.tile(weight * unigram, (n_bins, 1))
    for cell in train.cells:
        np.add.at(tables, (cell.gene_positions * n_bins // n_pos, cell.tokens[cell.gene_positions]), 1)
    return tables / tables.sum(axis=1, keepdims=True)


def _loss(tables: np.ndarray, cells: MaskedCells, without_visible: bool) -> float:
    """Mean -log probability at the masked positions; optionally over the genes not visible in the cell."""
    n_bins, n_pos = len(tables), cells.tokens.shape[1]
    losses = []
    for tokens, masked in zip(cells.tokens.numpy(), cells.masked.numpy(), strict=True):
        positions = np.flatnonzero(masked)
        bins = positions * n_bins // n_pos
        left = 1 - tables[:, tokens[~masked]].sum(axis=1) if without_visible else np.ones(n_bins)
        losses.append(np.log(left[bins]) - np.log(tables[bins, tokens[positions]]))
    return float(np.concatenate(losses).mean())


# ---------------------------------------------------------------- depth


def _losses_without_blocks(model: BertForMaskedLM, cells: MaskedCells, loss: float) -> dict[str, float]:
    """How much the loss grows, in nats, when blocks pass their input on unchanged."""
    n_layers = len(encoder_blocks(model))
    removals = {f"L{layer}": [layer] for layer in SHOWN_LAYERS if layer < n_layers}
    removals |= {f"L{first}-L{n_layers - 1}": list(range(first, n_layers)) for first in (6, 12) if first < n_layers}
    return {
        name: float(_without(model, cells, layers).mean()) - loss
        for name, layers in tqdm(removals.items(), desc="leaving blocks out", unit="variant")
    }


def _without(model: BertForMaskedLM, cells: MaskedCells, layers: Sequence[int]) -> Tensor:
    encoder = model.bert.encoder
    blocks = encoder.layer
    try:
        encoder.layer = nn.ModuleList(block for i, block in enumerate(blocks) if i not in layers)
        return position_losses(model, cells, cells.tokens)
    finally:
        encoder.layer = blocks


@torch.inference_mode()
def participation_ratios(model: BertForMaskedLM, tokens: Tensor) -> dict[str, float]:
    """Effective number of dimensions of the stream over gene positions, per layer.

        PR = (sum_i e_i)^2 / sum_i e_i^2,   e = eigenvalues of the covariance

    Args:
        model: in eval mode.
        tokens: (n_cells, n_pos), unmasked, `<cls>` first and `<eos>` last.
    """
    layers = range(len(encoder_blocks(model)))
    parts = [residuals(model, rows, layers) for rows in tokens.split(EVALUATION_BATCH)]
    ratios = {}
    for layer in layers:
        stream = torch.cat([part[layer][:, 1:-1] for part in parts]).flatten(0, 1).double()
        covariance = torch.cov(stream.T)  # (d_model, d_model)
        ratios[f"L{layer}"] = float(covariance.trace() ** 2 / covariance.square().sum())
    return ratios


def report(quality: dict[str, object]) -> str:
    """The figures as text."""
    n_cells, n_masked = quality["n_held_out_cells"], quality["n_masked_positions"]
    lines = [f"{n_cells} held-out cells, {n_masked} masked positions; losses in nats:"]
    rows = {f"baseline {name}": loss for name, loss in quality["baseline_losses"].items()}
    rows |= {"MODEL": quality["loss"], "model, another cell's context": quality["loss_with_another_cells_context"]}
    rows["model, own genes in another order"] = quality["loss_with_own_genes_in_another_order"]
    rows |= {name.replace("_", " "): quality[name] for name in quality if name.startswith("gain_")}
    lines += [f"  {name:<58} {value:8.4f}" for name, value in rows.items()]
    for name in ("loss_increase_without_blocks", "participation_ratio"):
        values = "  ".join(f"{layer} {value:.2f}" for layer, value in quality[name].items())
        lines.append(f"  {name.replace('_', ' ')}: {values}")
    return "\n".join(lines)
