"""The science of experiment 3: what steering a feature does to the model's mean logits, in one cell.

Steering by alpha multiplies the feature's latent by alpha at the gene positions of one layer; what is read is the
mean of the logits over the gene positions. `steered_logit_change` says so with two full hooked forward passes.
`SteeringBench.mean_changes` computes the same for many features and alphas from one clean pass. There the logits of
single positions never exist: the last step of the head is linear, so the mean over positions goes before it,

    mean_t logits_t = W mean_t(transform(x_t)) + b,

and what a cell leaves behind has d_model numbers instead of n_vocab.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellcircuits.cells import Cell
from cellcircuits.device import batch_memory
from cellcircuits.effects import TopKLatents
from cellcircuits.errors import UserError
from cellcircuits.finite import SMALLER_ALPHAS, require_finite, require_finite_stream, stream_at
from cellcircuits.geneformer import edited, head_parts, masked_logits, residuals
from cellcircuits.interventions import scale_features
from cellcircuits.tail import MeasuredPositions, Tail
from sae_model import TopKSAE

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

log = logging.getLogger(__name__)
HEAD = "the transform of the language-model head"
STEERED = "the residual stream at the last layer after steering"


@dataclass(frozen=True)
class SteeringRun:
    """One steered pass: the latent of `feature` times `alpha`; 1 changes nothing, 0 is ablation."""

    feature: int
    alpha: float


@dataclass(frozen=True)
class CleanStates:
    """What the clean pass of one cell leaves on the device.

    `streams[layer]` (1, n_pos, d_model) are outputs of the panel's layers before the last block, `final`
    (n_gene, d_model) the last block's at the gene positions, `transformed` (n_gene, d_model) what the head's
    transform makes of it, `mean_transformed` (d_model,) float64 its mean, on the host.
    """

    cell: Cell
    streams: Mapping[int, Tensor]
    final: Tensor
    transformed: Tensor
    mean_transformed: NDArray[np.float64]


@torch.inference_mode()
def steered_logit_change(
    bench: "SteeringBench", cell: Cell, layer: int, feature: int, alpha: float
) -> NDArray[np.float64]:
    """Change of the cell's mean logits, by two full hooked passes with complete logits: the definition, slow.

    Args:
        bench: model and SAEs.
        cell: the cell.
        layer: layer to steer in.
        feature: feature to steer.
        alpha: steering coefficient.

    Returns:
        (n_vocab,) mean over the gene positions of steered - clean logits.
    """
    tokens = torch.from_numpy(cell.tokens).to(bench.device)[None]
    positions = torch.from_numpy(cell.gene_positions).to(bench.device)
    clean = masked_logits(bench.model, tokens)[0, positions]  # (n_gene, n_vocab)
    with edited(bench.model, {layer: scale_features(bench.saes[layer], positions, [feature], alpha)}):
        steered = masked_logits(bench.model, tokens)[0, positions]
    return (steered - clean).cpu().numpy().mean(axis=0, dtype=np.float64)


class SteeringBench:
    """A model with the SAEs of a panel's layers, set up to steer their features."""

    def __init__(self, model: "BertForMaskedLM", saes: Mapping[int, TopKSAE]) -> None:
        """Bind the model and the SAEs {layer: SAE}, all on one device; the model must not change afterwards."""
        self.model, self.saes = model, saes
        self.layers = tuple(sorted(saes))
        self.device = model.device
        self.last = model.config.num_hidden_layers - 1
        self.head = head_parts(model)
        first = self.layers[0]
        self.tail = Tail(model, first, [self.last]) if first < self.last else None

    @torch.inference_mode()
    def clean(self, cell: Cell) -> CleanStates:
        """Run one cell unedited.

        What lies after the first of the panel's layers runs through the tail too, so that clean and steered passes
        share their rounding.

        Raises:
            UserError: the model gives NaN or infinite values.
        """
        tokens = torch.from_numpy(cell.tokens).to(self.device)[None]
        layer = self.layers[0]
        stream = residuals(self.model, tokens, [layer])[layer]  # (1, n_pos, d_model)
        require_finite_stream(stream[0], cell, layer)
        streams = {}
        for steered in (of_panel for of_panel in self.layers if of_panel < self.last):
            stream = self.tail.advance(stream, layer, steered)
            require_finite_stream(stream[0], cell, steered)
            streams[steered] = stream
            layer = steered
        everywhere = MeasuredPositions.of([cell.gene_positions], self.device)
        final = stream[0, everywhere.position] if layer == self.last else self._to_the_end(stream, everywhere, layer)
        require_finite(final, cell, stream_at(self.last), cell.gene_positions)
        transformed = self.head.transform(final)
        require_finite(transformed, cell, HEAD, cell.gene_positions)
        mean_transformed = transformed.cpu().numpy().mean(axis=0, dtype=np.float64)
        return CleanStates(cell, streams, final, transformed, mean_transformed)

    @torch.inference_mode()
    def latents(self, clean: CleanStates, layer: int) -> TopKLatents:
        """Latents of a panel layer at the cell's gene positions, one row each.

        Raises:
            UserError: the SAE gives NaN or infinite values.
        """
        if layer == self.last:
            return TopKLatents.of_cell(self.saes[layer], clean.final, clean.cell, layer)
        positions = torch.from_numpy(clean.cell.gene_positions).to(self.device)
        return TopKLatents.of_cell(self.saes[layer], clean.streams[layer][0, positions], clean.cell, layer)

    @torch.inference_mode()
    def mean_changes(
        self, clean: CleanStates, layer: int, latents: TopKLatents, runs: Sequence[SteeringRun]
    ) -> NDArray[np.float64]:
        """Mean over the gene positions of transform(steered) - transform(clean), as one batch of tail runs.

        The difference is taken position by position before the mean, so that rounding stays small beside it. The head's
        `weight` turns it into the change of the mean logits. A run that moves no position is not made: its change
        is exactly 0.

        Args:
            clean: the cell's clean pass.
            layer: layer to steer in.
            latents: its latents, from `latents`.
            runs: features and alphas, each steered alone.

        Returns:
            (len(runs), d_model) float64.

        Raises:
            UserError: a steered pass gives NaN or infinite values.
        """
        changes = np.zeros((len(runs), clean.final.shape[-1]))
        moved = [i for i, run in enumerate(runs) if moves(latents, run)]
        if not moved:
            return changes
        rows, steps = zip(*(self._steps(layer, latents, runs[i]) for i in moved), strict=True)
        if layer == self.last:
            changes[moved] = self._at_the_end(clean, rows, steps).cpu().numpy()
        else:
            changes[moved] = self._through_the_tail(clean, layer, rows, steps).cpu().numpy()
        require_finite(changes, clean.cell, f"{HEAD} after steering", mend=SMALLER_ALPHAS)
        return changes

    def _steps(self, layer: int, latents: TopKLatents, run: SteeringRun) -> tuple[Tensor, Tensor]:
        """Gene positions (n_rows,), counted among the gene positions, where a run moves the stream, and by how much.

        The second is (n_rows, d_model): (alpha - 1) * h_f * W_dec[:, f].
        """
        at = (latents.features == run.feature) & (latents.values != 0)  # (n_gene, k)
        rows = np.flatnonzero(at.any(axis=1))
        h = torch.from_numpy(latents.values[at]).to(self.device)
        direction = self.saes[layer].decoder_directions[run.feature]
        return torch.from_numpy(rows).to(self.device), (run.alpha - 1) * h[:, None] * direction

    def _through_the_tail(
        self, clean: CleanStates, layer: int, rows: Sequence[Tensor], steps: Sequence[Tensor]
    ) -> Tensor:
        """Mean changes (n_runs, d_model) of runs that start from one edited copy of the stream each."""
        positions = torch.from_numpy(clean.cell.gene_positions).to(self.device)
        streams = clean.streams[layer].repeat(len(rows), 1, 1)  # (n_runs, n_pos, d_model)
        for stream, of_run, step in zip(streams, rows, steps, strict=True):
            stream[positions[of_run]] += step
        everywhere = MeasuredPositions.of([clean.cell.gene_positions] * len(rows), self.device)
        final = self._to_the_end(streams, everywhere, layer).unflatten(0, (len(rows), -1))  # (n_runs, n_gene, d_model)
        require_finite(final, clean.cell, STEERED, clean.cell.gene_positions, SMALLER_ALPHAS)
        return (self.head.transform(final) - clean.transformed).mean(dim=1)

    def _at_the_end(self, clean: CleanStates, rows: Sequence[Tensor], steps: Sequence[Tensor]) -> Tensor:
        """The same for the last layer, in closed form: no block follows, so only the moved positions change."""
        before = torch.cat([clean.final[of_run] for of_run in rows])
        steered = before + torch.cat(list(steps))
        at = clean.cell.gene_positions[torch.cat(list(rows)).cpu().numpy()]
        require_finite(steered, clean.cell, STEERED, at, SMALLER_ALPHAS)
        change = self.head.transform(steered) - self.head.transform(before)
        of_runs = change.split([len(of_run) for of_run in rows])
        return torch.stack([of_run.sum(dim=0) for of_run in of_runs]) / len(clean.final)

    def _to_the_end(self, streams: Tensor, measured: MeasuredPositions, layer: int) -> Tensor:
        """The last block's output (n_rows, d_model) at the measured positions, from outputs of block `layer`."""
        ((_, final),) = self.tail.run(streams, measured, start=layer)
        return final

    def batch_size(self, n_pos: int) -> int:
        """How many runs of a cell of `n_pos` tokens fit in memory as one batch."""
        itemsize = self.model.dtype.itemsize
        if self.tail is None:  # the closed form handles the moved positions only, at most all of them
            bytes_per_run = 8 * n_pos * self.model.config.hidden_size * itemsize
        else:
            bytes_per_run = self.tail.bytes_per_stream(n_pos, itemsize)
        return max(1, batch_memory(self.device) // bytes_per_run)


def is_active(latents: TopKLatents, feature: int) -> bool:
    """Whether the feature is among the k selected at any of the rows."""
    return bool((latents.features == feature).any())


def moves(latents: TopKLatents, run: SteeringRun) -> bool:
    """Whether a run changes the stream anywhere: not where alpha is 1 or the latent 0 wherever it is selected."""
    return run.alpha != 1 and bool(latents.values[latents.features == run.feature].any())


def smaller_batch(size: int, cell: Cell) -> int:
    """Half of a batch size that did not fit.

    Raises:
        UserError: it was 1.
    """
    if size == 1:
        raise UserError(
            f"cell {cell.name}: not even one steered pass fits in the device's memory; free some of it, lower "
            "--max-tokens or take --device cpu."
        ) from None
    log.warning("Out of memory: going on with batches of %d steered passes.", size // 2)
    return size // 2
