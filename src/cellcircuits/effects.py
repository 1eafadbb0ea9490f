"""The science: what removing a feature does downstream, in one cell.

Per cell and target layer the effect of a source feature is the change (ablated - clean) of every latent,
averaged in float64 over the gene positions where the source is active in the clean run.
`ablation_effect` says so in a dozen lines, with one full hooked forward pass per feature. `Bench.effects`
computes the same for many features at once and is what the experiments run; `Bench.push_effects` does so for any
edit along one direction.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellcircuits.cells import Cell
from cellcircuits.device import batch_memory, kept_on_host
from cellcircuits.finite import (
    MEND,
    finite_rows,
    latents_at,
    mend_at,
    require_finite,
    require_finite_stream,
    require_rows,
    stream_at,
)
from cellcircuits.geneformer import edited, residuals
from cellcircuits.interventions import remove_features
from cellcircuits.precision import FP32
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
        return cls.on_host(*sae.top_k(residual))

    @classmethod
    def of_cell(cls, sae: TopKSAE, residual: Tensor, cell: Cell, layer: int, mend: str = MEND) -> "TopKLatents":
        """As `of`, of the stream (n_gene, d_model) at the gene positions of a cell, which must be finite.

        Raises:
            UserError: the stream or what the SAE makes of it is NaN or infinite.
        """
        require_finite(residual, cell, stream_at(layer), cell.gene_positions, mend)
        latents = cls.of(sae, residual)
        require_finite(latents.values, cell, latents_at(layer), cell.gene_positions, mend)
        return latents

    @classmethod
    def on_host(cls, values: Tensor, features: Tensor) -> "TopKLatents":
        """Bring what `TopKSAE.top_k` gave to the host."""
        return cls(values.cpu().numpy(), features.to(torch.int32).cpu().numpy())

    def kept(self) -> "TopKLatents":
        """The same for a long stay; see `kept_on_host`."""
        return TopKLatents(*(kept_on_host(torch.from_numpy(x)).numpy() for x in (self.values, self.features)))

    def at(self, rows: NDArray[np.int64] | slice) -> "TopKLatents":
        """The same latents at some of the rows."""
        return TopKLatents(self.values[rows], self.features[rows])

    def totals(self, group: NDArray[np.int64], n_features: int) -> NDArray[np.float64]:
        """Sum over the rows of each group: `group` (n_rows,) from 0 up, ascending -> (n_groups, n_features) float64."""
        n_groups = int(group[-1]) + 1
        bins = (group[:, None] * n_features + self.features).ravel()
        return np.bincount(bins, self.values.ravel(), n_groups * n_features).reshape(n_groups, n_features)

    def total(self, n_features: int) -> NDArray[np.float64]:
        """Sum over all rows, (n_features,) float64."""
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


@dataclass(frozen=True)
class Push:
    """An edit of one copy of a cell's source stream along one direction: x -> x + size * direction.

    `rows` (n_rows,) are the positions, ascending and counted among the gene positions, with a size each: `sizes`
    (n_rows,). `direction` (d_model,) lies on the device.
    """

    rows: NDArray[np.int64]
    sizes: NDArray[np.floating]
    direction: Tensor


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
        layer: mean_change(
            TopKLatents.of(bench.saes[layer], clean[layer][0, positions[active]]),
            TopKLatents.of(bench.saes[layer], ablated[layer][0, positions[active]]),
            bench.saes[layer],
        )
        for layer in bench.targets
    }


def mean_change(clean: TopKLatents, ablated: TopKLatents, sae: TopKSAE) -> NDArray[np.float64]:
    """Change of every latent of a target layer, averaged over the rows: (n_features,) float64."""
    return (ablated.total(sae.n_features) - clean.total(sae.n_features)) / len(clean.values)


class Bench:
    """A model with its SAEs, set up to measure the features of one source layer."""

    def __init__(
        self,
        model: "BertForMaskedLM",
        saes: Mapping[int, TopKSAE],
        source_layer: int,
        targets: Sequence[int] | None = None,
        tail: Tail | None = None,
        precision: str = FP32,
    ) -> None:
        """Bind the model and the SAEs, all on one device; the model must not change afterwards.

        Args:
            model: the Geneformer.
            saes: SAE of the source layer and of every target layer; there may be more.
            source_layer: the layer to ablate in.
            targets: layers after it to read; None means every later layer that has an SAE.
            tail: one that several benches of this model share: it starts at or before the source layer and reads
                these targets, and none other after the source layer; None makes one.
            precision: of the tail that is made; one of `precision.PRECISIONS`.

        Raises:
            ValueError: a target is not after the source layer.
        """
        if targets is not None and min(targets) <= source_layer:
            raise ValueError(f"target {min(targets)} is not after the source layer {source_layer}")
        self.model, self.saes, self.source_layer = model, saes, source_layer
        self.targets = tuple(sorted(layer for layer in saes if layer > source_layer) if targets is None else targets)
        self.device = model.device
        self.tail = tail or Tail(model, source_layer, self.targets, precision)
        widths = np.cumsum([0, *(saes[layer].n_features for layer in self.targets)])
        self.columns = {layer: slice(int(widths[i]), int(widths[i + 1])) for i, layer in enumerate(self.targets)}
        self.n_targets = int(widths[-1])

    @torch.inference_mode()
    def clean(self, cell: Cell) -> CleanCell:
        """Run one cell unedited.

        The targets are read through the tail too, so that clean and ablated latents share their rounding.

        Raises:
            UserError: the model or an SAE gives NaN or infinite values.
        """
        tokens = torch.from_numpy(cell.tokens).to(self.device)[None]
        residual = residuals(self.model, tokens, [self.source_layer])[self.source_layer]  # (1, n_pos, d_model)
        require_finite_stream(residual[0], cell, self.source_layer)
        everywhere = MeasuredPositions.of([cell.gene_positions], self.device)
        at_genes = residual[0, everywhere.position]
        source = TopKLatents.of_cell(self.saes[self.source_layer], at_genes, cell, self.source_layer).kept()
        mend = mend_at(self.tail.precision)
        targets = {
            layer: TopKLatents.of_cell(self.saes[layer], stream, cell, layer, mend).kept()
            for layer, stream in self.tail.run(residual, everywhere, start=self.source_layer)
        }
        return CleanCell(cell, kept_on_host(residual[0]), source, targets)

    def effects(self, clean: CleanCell, features: Sequence[int]) -> NDArray[np.float64]:
        """Effects of removing each feature alone, as one batch of tail runs.

        Args:
            clean: the cell's clean run.
            features: source features that are active in this cell.

        Returns:
            (len(features), n_targets): the target layers side by side, as `columns` lays them out.

        Raises:
            UserError: see `push_effects`.
            ValueError: a feature is active nowhere in this cell, which is not an effect of zero.
        """
        return self.push_effects(clean, [self.removal(clean, feature) for feature in features])

    def removal(self, clean: CleanCell, feature: int) -> Push:
        """The push that removes a feature: -h_f * W_dec[:, f] where it is active."""
        rows = clean.active_rows(feature)
        direction = self.saes[self.source_layer].decoder_directions[feature]
        return Push(rows, -clean.source_latents(feature, rows), direction)

    def rows(self, clean: CleanCell, feature: int) -> NDArray[np.int64]:
        """Gene positions, counted among these, at which `effects` measures a feature in a cell; maybe none."""
        return clean.active_rows(feature)

    @torch.inference_mode()
    def push_effects(self, clean: CleanCell, pushes: Sequence[Push]) -> NDArray[np.float64]:
        """Effects of each push alone, at the positions it pushes, as one batch of tail runs.

        A push whose sizes are all 0, as of a feature whose latent is 0 wherever it is selected, changes nothing, and
        its effects are exactly 0: running it would leave rounding in their place, and the edge rule counts signs.

        Args:
            clean: the cell's clean run.
            pushes: one per copy of the cell, each at one position or more.

        Returns:
            (len(pushes), n_targets): the target layers side by side, as `columns` lays them out.

        Raises:
            UserError: the model or an SAE gives NaN or infinite values.
            ValueError: a push is at no position, which is not an effect of zero.
        """
        if not all(len(push.rows) for push in pushes):
            raise ValueError("a feature that is active nowhere in a cell has no effect there to measure")
        effects = np.zeros((len(pushes), self.n_targets))
        moved = [i for i, push in enumerate(pushes) if push.sizes.any()]
        if not moved:
            return effects
        moving = [pushes[i] for i in moved]
        # the device works through all layers before anything is brought to the host, which would wait for it
        streams = self._run(clean, moving)
        edited = {layer: (finite_rows(stream), self.saes[layer].top_k(stream)) for layer, stream in streams}
        n_rows = np.array([len(push.rows) for push in moving])
        copy, row = np.repeat(np.arange(len(moving)), n_rows), np.concatenate([push.rows for push in moving])
        positions, mend = clean.cell.gene_positions[row], mend_at(self.tail.precision)
        for layer, (are_finite, latents) in edited.items():
            require_rows(are_finite, clean.cell, f"{stream_at(layer)} after an ablation", positions, mend)
            n_features = self.saes[layer].n_features
            after, before = TopKLatents.on_host(*latents), clean.targets[layer].at(row)
            require_finite(after.values, clean.cell, latents_at(layer), positions, mend)
            change = after.totals(copy, n_features) - before.totals(copy, n_features)
            effects[moved, self.columns[layer]] = change / n_rows[:, None]
        return effects

    def _run(self, clean: CleanCell, pushes: Sequence[Push]) -> Iterator[tuple[int, Tensor]]:
        """Run one copy of the cell per push.

        Args:
            clean: the cell's clean run.
            pushes: none is empty.

        Yields:
            (target layer, its residual stream at the pushed positions (n_rows, d_model), copy by copy), ascending.
        """
        measured = MeasuredPositions.of([clean.cell.gene_positions[push.rows] for push in pushes], self.device)
        sizes = torch.from_numpy(np.concatenate([push.sizes for push in pushes])).to(self.device)
        directions = torch.stack([push.direction for push in pushes])[measured.item]  # (n_rows, d_model)
        residual = clean.residual.to(self.device)
        streams = residual.repeat(len(pushes), 1, 1)  # (batch, n_pos, d_model)
        streams[measured.item, measured.position] += sizes[:, None] * directions
        yield from self.tail.run(streams, measured, start=self.source_layer, clean=residual)

    def removed_norm(self, clean: CleanCell, feature: int) -> float:
        """How much removing a feature takes from the stream: |h_f| ||W_dec[:, f]||, averaged over its active positions.

        Effects are averages over the same positions, so this is the dose that they answer to.

        Args:
            clean: the cell's clean run.
            feature: source feature, active at one position at least.
        """
        latents = np.abs(self.removal(clean, feature).sizes, dtype=np.float64)
        return float(latents.mean() * self._decoder_norms[feature])

    @cached_property
    def _decoder_norms(self) -> NDArray[np.float64]:
        """Norm of every decoder direction of the source layer, (n_features,)."""
        directions = self.saes[self.source_layer].decoder_directions.cpu().numpy()
        return np.sqrt(np.square(directions, dtype=np.float64).sum(axis=1))

    def batch_size(self, n_pos: int) -> int:
        """How many features of a cell of `n_pos` tokens fit in memory as one batch."""
        itemsize = self.model.dtype.itemsize
        return max(1, batch_memory(self.device) // self.tail.bytes_per_stream(n_pos, itemsize))
