"""The science: what removing a feature does downstream, in one cell.

Per cell and target layer the effect of a source feature is the change (ablated - clean) of every latent,
averaged in float64 over the gene positions where the source is active in the clean run.
`ablation_effect` says so in a dozen lines, with one full hooked forward pass per feature. `Bench.effects`
computes the same for many features at once and is what the experiments run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellcircuits.cells import Cell
from cellcircuits.device import batch_memory
from cellcircuits.errors import UserError
from cellcircuits.geneformer import edited, residuals
from cellcircuits.interventions import remove_features
from cellcircuits.tail import MeasuredPositions, Tail
from sae_model import TopKSAE

if TYPE_CHECKING:
    from transformers import BertForMaskedLM


@dataclass(frozen=True)
class TopKLatents:
    """Selected latents on the host: `values` (n_rows, k) and the `features` they belong to (n_rows, k)."""

    values: NDArray[np.floating]
    features: NDArray[np.int32]

    @classmethod
    def of(cls, sae: TopKSAE, residual: Tensor) -> "TopKLatents":
        """Encode (n_rows, d_model) raw stream and bring the result to the host."""
        values, features = sae.top_k(residual)
        return cls(values.cpu().numpy(), features.to(torch.int32).cpu().numpy())

    def at(self, rows: NDArray[np.int64] | slice) -> "TopKLatents":
        """The same latents at some of the rows."""
        return TopKLatents(self.values[rows], self.features[rows])

    def total(self, n_features: int) -> NDArray[np.float64]:
        """Sum over the rows, (n_features,) float64."""
        return np.bincount(self.features.ravel(), weights=self.values.ravel(), minlength=n_features)


@dataclass(frozen=True)
class CleanCell:
    """What the clean run of one cell leaves: the source stream and the latents at its gene positions.

    `residual` (n_pos, d_model) is the output of the source block; `source` and `targets[layer]` have one row
    per gene position.
    """

    cell: Cell
    residual: Tensor
    source: TopKLatents
    targets: Mapping[int, TopKLatents]

    def active_rows(self, feature: int) -> NDArray[np.int64]:
        """Gene positions, counted among the gene positions, where `feature` is among the k selected."""
        return np.flatnonzero((self.source.features == feature).any(axis=1))

    def source_latents(self, feature: int, rows: NDArray[np.int64]) -> NDArray[np.floating]:
        """Latents (n_rows,) of `feature` at gene positions where it is active."""
        at_rows = self.source.at(rows)
        return at_rows.values[at_rows.features == feature]


@torch.inference_mode()
def ablation_effect(bench: "Bench", cell: Cell, feature: int) -> dict[int, NDArray[np.float64]] | None:
    """Effect of removing one feature, by two full hooked forward passes: the definition, slow and readable.

    Args:
        bench: model and SAEs.
        cell: the cell.
        feature: source feature.

    Returns:
        {target layer: (n_features,)}, or None where the feature is active nowhere: that is not an effect of 0.
    """
    tokens = torch.from_numpy(cell.tokens).to(bench.device)[None]
    positions = torch.from_numpy(cell.gene_positions).to(bench.device)
    source = bench.saes[bench.source_layer]
    clean = residuals(bench.model, tokens, [bench.source_layer, *bench.targets])
    active = (source.top_k(clean[bench.source_layer][0, positions])[1] == feature).any(-1)  # (n_gene,)
    if not active.any():
        return None
    with edited(bench.model, {bench.source_layer: remove_features(source, positions, [feature])}):
        ablated = residuals(bench.model, tokens, bench.targets)
    return {
        layer: _mean_change(
            TopKLatents.of(bench.saes[layer], clean[layer][0, positions[active]]),
            TopKLatents.of(bench.saes[layer], ablated[layer][0, positions[active]]),
            bench.saes[layer],
        )
        for layer in bench.targets
    }


def _mean_change(clean: TopKLatents, ablated: TopKLatents, sae: TopKSAE) -> NDArray[np.float64]:
    return (ablated.total(sae.n_features) - clean.total(sae.n_features)) / len(clean.values)


class Bench:
    """A model with its SAEs, set up to measure the features of one source layer."""

    def __init__(self, model: "BertForMaskedLM", saes: Mapping[int, TopKSAE], source_layer: int) -> None:
        """Bind the model and the SAEs of the source layer and of every target layer, all on one device.

        Every later layer that has an SAE is a target; the model must not change afterwards.
        """
        self.model, self.saes, self.source_layer = model, saes, source_layer
        self.targets = tuple(sorted(layer for layer in saes if layer > source_layer))
        self.device = model.device
        self.tail = Tail(model, source_layer, self.targets)
        widths = np.cumsum([0, *(saes[layer].n_features for layer in self.targets)])
        self.columns = {layer: slice(int(widths[i]), int(widths[i + 1])) for i, layer in enumerate(self.targets)}
        self.n_targets = int(widths[-1])

    @torch.inference_mode()
    def clean(self, cell: Cell) -> CleanCell:
        """Run one cell unedited.

        The targets are read through the tail too, so that clean and ablated latents share their rounding.

        Raises:
            UserError: the model gives NaN or infinite values.
        """
        tokens = torch.from_numpy(cell.tokens).to(self.device)[None]
        residual = residuals(self.model, tokens, [self.source_layer])[self.source_layer]  # (1, n_pos, d_model)
        if not torch.isfinite(residual).all():
            raise UserError(
                f"cell {cell.name}: the model's layer {self.source_layer} holds NaN or infinite values; check the "
                "model's weights, or compute on another --device."
            )
        everywhere = MeasuredPositions.of([cell.gene_positions], self.device)
        source = TopKLatents.of(self.saes[self.source_layer], residual[0, everywhere.position])
        targets = {
            layer: TopKLatents.of(self.saes[layer], stream) for layer, stream in self.tail.run(residual, everywhere)
        }
        return CleanCell(cell, residual[0].cpu(), source, targets)

    @torch.inference_mode()
    def effects(self, clean: CleanCell, features: Sequence[int]) -> NDArray[np.float64]:
        """Effects of removing each feature alone, as one batch of tail runs.

        A feature whose latent is 0 wherever it is selected changes nothing, and its effects are exactly 0:
        running it would leave rounding in their place, and the edge rule counts signs.

        Args:
            clean: the cell's clean run.
            features: source features that are active in this cell.

        Returns:
            (len(features), n_targets): the target layers side by side, as `columns` lays them out.

        Raises:
            ValueError: a feature is active nowhere in this cell, which is not an effect of zero.
        """
        active = [clean.active_rows(feature) for feature in features]
        if not all(len(rows) for rows in active):
            raise ValueError("a feature that is active nowhere in a cell has no effect there to measure")
        latents = [clean.source_latents(feature, rows) for feature, rows in zip(features, active, strict=True)]
        effects = np.zeros((len(features), self.n_targets))
        run = [i for i, of_feature in enumerate(latents) if of_feature.any()]
        if not run:
            return effects
        measured = MeasuredPositions.of([clean.cell.gene_positions[active[i]] for i in run], self.device)
        streams = self._ablated(clean, [features[i] for i in run], np.concatenate([latents[i] for i in run]), measured)
        stops = np.cumsum([len(active[i]) for i in run])
        for layer, stream in self.tail.run(streams, measured):
            ablated = TopKLatents.of(self.saes[layer], stream)
            for i, stop in zip(run, stops, strict=True):
                after = ablated.at(slice(stop - len(active[i]), stop))
                before = clean.targets[layer].at(active[i])
                effects[i, self.columns[layer]] = _mean_change(before, after, self.saes[layer])
        return effects

    def _ablated(
        self, clean: CleanCell, features: Sequence[int], latents: NDArray[np.floating], measured: MeasuredPositions
    ) -> Tensor:
        """One copy of the clean stream per feature, moved by -h_f * W_dec[:, f] where the feature is active.

        `latents` (n_rows,) are the h_f at the measured positions.
        """
        h = torch.from_numpy(latents).to(self.device)
        chosen = torch.as_tensor(list(features), device=self.device)[measured.item]
        directions = self.saes[self.source_layer].decoder_directions[chosen]  # (n_rows, d_model)
        streams = clean.residual.to(self.device).repeat(len(features), 1, 1)  # (batch, n_pos, d_model)
        streams[measured.item, measured.position] -= h[:, None] * directions
        return streams

    def batch_size(self, n_pos: int) -> int:
        """How many features of a cell of `n_pos` tokens fit in memory as one batch."""
        itemsize = self.model.dtype.itemsize
        return max(1, batch_memory(self.device) // self.tail.bytes_per_stream(n_pos, itemsize))
