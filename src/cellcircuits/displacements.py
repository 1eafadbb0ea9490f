"""What moving the residual stream along a fixed direction does, in one cell: the engine of controlled steering.

A displacement adds the same vector at some gene positions of one layer. Read are the mean over the gene positions of
the final stream and of the head's transform (logits are linear in the second), and, in a pass with masked genes, the
log probability of the true genes. `displaced_final` says so with a full hooked forward pass.
`predicted` ones follow the direct path alone: the displacement added to the clean FINAL stream, no block in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from cellcircuits.cells import Cell
from cellcircuits.effects import TopKLatents
from cellcircuits.finite import require_finite
from cellcircuits.geneformer import edited, residuals
from cellcircuits.steering import HEAD, STEERED, CleanStates, SteeringBench
from cellcircuits.tail import MeasuredPositions

SMALLER_DOSES = "take smaller --doses or --alphas, check the weights of the model, or compute on another --device."


@dataclass(frozen=True)
class Displacement:
    """`step` (d_model,) float64, added at the gene positions `rows` (n_rows,), counted among the gene positions."""

    rows: NDArray[np.int64]
    step: NDArray[np.float64]


@dataclass(frozen=True)
class MeanChanges:
    """Mean over the gene positions of steered - clean, of the head's transform and of the final stream.

    Each (n_moves, d_model) float64; exactly 0 where a displacement has no position.
    """

    transformed: NDArray[np.float64]
    stream: NDArray[np.float64]


@dataclass(frozen=True)
class MaskedGenes:
    """Gene positions (n_masked,), counted among the gene positions, and the true `tokens` there."""

    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]

    def masked(self, cell: Cell, mask: int) -> Cell:
        """The cell with the token `mask` at these positions."""
        tokens = cell.tokens.copy()
        tokens[cell.gene_positions[self.rows]] = mask
        return replace(cell, tokens=tokens)


def positive_rows(latents: TopKLatents, feature: int) -> NDArray[np.int64]:
    """Gene positions, counted among the gene positions, where the latent of a feature is above 0."""
    return np.flatnonzero(((latents.features == feature) & (latents.values > 0)).any(axis=1))


@torch.inference_mode()
def displaced_final(bench: "DisplacementBench", cell: Cell, layer: int, move: Displacement) -> Tensor:
    """The final stream (n_gene, d_model) of a displaced cell, by a full hooked pass: the definition, slow."""
    tokens = torch.from_numpy(cell.tokens).to(bench.device)[None]
    positions = torch.from_numpy(cell.gene_positions).to(bench.device)
    step = bench.on_device(move.step)

    def edit(residual: Tensor) -> Tensor:
        moved = residual.clone()
        moved[0, positions[torch.from_numpy(move.rows).to(bench.device)]] += step
        return moved

    with edited(bench.model, {layer: edit}):
        return residuals(bench.model, tokens, [bench.last])[bench.last][0, positions]


class DisplacementBench(SteeringBench):
    """A steering bench that moves the stream by given vectors instead of scaling latents."""

    def on_device(self, vector: NDArray[np.float64]) -> Tensor:
        """A vector in the model's precision, on its device."""
        return torch.from_numpy(vector).to(self.model.dtype).to(self.device)

    @torch.inference_mode()
    def displaced(self, clean: CleanStates, layer: int, moves: Sequence[Displacement]) -> MeanChanges:
        """Mean changes of displacements at one layer, as one batch of tail runs.

        Args:
            clean: the cell's clean pass.
            layer: where the stream is moved; at the last layer the answer is that of `predicted`.
            moves: displacements, each made alone.

        Raises:
            UserError: a displaced pass gives NaN or infinite values.
        """
        made = [i for i, move in enumerate(moves) if len(move.rows)]
        if layer == self.last or not made:
            return self.predicted(clean, moves)
        changes = _no_changes(clean, len(moves))
        everywhere = MeasuredPositions.of([clean.cell.gene_positions] * len(made), self.device)
        final = self._run(clean, layer, [moves[i] for i in made], everywhere)  # (n_made, n_gene, d_model)
        transformed = (self.head.transform(final) - clean.transformed).mean(dim=1)
        changes.transformed[made] = transformed.cpu().numpy()
        changes.stream[made] = (final - clean.final).mean(dim=1).cpu().numpy()
        require_finite(changes.transformed, clean.cell, f"{HEAD} after steering", mend=SMALLER_DOSES)
        return changes

    @torch.inference_mode()
    def predicted(self, clean: CleanStates, moves: Sequence[Displacement]) -> MeanChanges:
        """Mean changes by the direct path alone; of the stream it is exactly n_rows / n_gene times the step.

        Raises:
            UserError: the transform gives NaN or infinite values.
        """
        changes, n_gene = _no_changes(clean, len(moves)), len(clean.final)
        for i, move in ((i, move) for i, move in enumerate(moves) if len(move.rows)):
            before = clean.final[torch.from_numpy(move.rows).to(self.device)]
            change = self.head.transform(before + self.on_device(move.step)) - self.head.transform(before)
            changes.transformed[i] = change.cpu().numpy().sum(axis=0, dtype=np.float64) / n_gene
            changes.stream[i] = move.step * (len(move.rows) / n_gene)
        require_finite(changes.transformed, clean.cell, f"{HEAD} after steering", mend=SMALLER_DOSES)
        return changes

    @torch.inference_mode()
    def displaced_log_p(
        self, clean: CleanStates, layer: int, moves: Sequence[Displacement], genes: MaskedGenes
    ) -> NDArray[np.float64]:
        """Changes (n_moves, n_masked) of the log probability of the true genes, as one batch of tail runs.

        Args:
            clean: clean pass of the cell with these genes masked.
            layer: where the stream is moved.
            moves: displacements, each made alone.
            genes: the masked genes.

        Raises:
            UserError: a displaced pass gives NaN or infinite values.
        """
        made = [i for i, move in enumerate(moves) if len(move.rows)]
        if layer == self.last or not made:
            return self.predicted_log_p(clean, moves, genes)
        measured = MeasuredPositions.of([clean.cell.gene_positions[genes.rows]] * len(made), self.device)
        final = self._run(clean, layer, [moves[i] for i in made], measured)  # (n_made, n_masked, d_model)
        changes = np.zeros((len(moves), len(genes.rows)))
        changes[made] = self._log_p(final, genes) - self._clean_log_p(clean, genes)
        require_finite(changes, clean.cell, "log probabilities after steering", mend=SMALLER_DOSES)
        return changes

    @torch.inference_mode()
    def predicted_log_p(
        self, clean: CleanStates, moves: Sequence[Displacement], genes: MaskedGenes
    ) -> NDArray[np.float64]:
        """As `displaced_log_p`, by the direct path alone: only masked positions that are moved themselves change."""
        changes = np.zeros((len(moves), len(genes.rows)))
        final = clean.final[torch.from_numpy(genes.rows).to(self.device)]  # (n_masked, d_model)
        before = self._log_p(final[None], genes)[0]
        for i, move in enumerate(moves):
            moved = np.isin(genes.rows, move.rows)
            if moved.any():
                at = torch.from_numpy(np.flatnonzero(moved)).to(self.device)
                of_moved = MaskedGenes(genes.rows[moved], genes.tokens[moved])
                after = self._log_p((final[at] + self.on_device(move.step))[None], of_moved)[0]
                changes[i, moved] = after - before[moved]
        require_finite(changes, clean.cell, "log probabilities after steering", mend=SMALLER_DOSES)
        return changes

    def _run(
        self, clean: CleanStates, layer: int, moves: Sequence[Displacement], measured: MeasuredPositions
    ) -> Tensor:
        """The final stream (n_moves, n_measured, d_model) of one displaced copy each."""
        positions = torch.from_numpy(clean.cell.gene_positions).to(self.device)
        streams = clean.streams[layer].repeat(len(moves), 1, 1)  # (n_moves, n_pos, d_model)
        for stream, move in zip(streams, moves, strict=True):
            stream[positions[torch.from_numpy(move.rows).to(self.device)]] += self.on_device(move.step)
        final = self._to_the_end(streams, measured, layer)
        require_finite(final, clean.cell, STEERED, mend=SMALLER_DOSES)
        return final.unflatten(0, (len(moves), -1))

    def _clean_log_p(self, clean: CleanStates, genes: MaskedGenes) -> NDArray[np.float64]:
        rows = torch.from_numpy(genes.rows).to(self.device)
        return self._log_p(clean.final[rows][None], genes)  # (1, n_masked)

    def _log_p(self, final: Tensor, genes: MaskedGenes) -> NDArray[np.float64]:
        """Log probability (n_streams, n_masked) of the true genes, from the final stream at the masked positions."""
        tokens = torch.from_numpy(genes.tokens).to(self.device)[:, None]
        found = []
        for of_one in final:  # the logits of all streams at once may not fit
            logits = linear(self.head.transform(of_one), self.head.weight, self.head.bias)  # (n_masked, n_vocab)
            found.append((logits.gather(1, tokens)[:, 0] - logits.logsumexp(dim=1)).cpu().numpy())
        return np.stack(found).astype(np.float64)


def _no_changes(clean: CleanStates, n_moves: int) -> MeanChanges:
    shape = (n_moves, clean.final.shape[-1])
    return MeanChanges(np.zeros(shape), np.zeros(shape))
