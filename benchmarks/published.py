"""The published way of experiment 1, without shortcuts: the whole model per (feature, cell), dense in everything.

Sections 5 and 6 of the definition, step by step: the edit is the difference of two dense decodes at all gene
positions, the model runs from its embeddings to its logits, all gene positions of every target are encoded.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BertForMaskedLM

from cellcircuits.cells import Cell
from cellcircuits.effects import Bench
from cellcircuits.geneformer import captured, edited, masked_logits
from cellcircuits.linear import joined_linear
from sae_model import TopKSAE

Edit = Callable[[Tensor], Tensor]
Module = TypeVar("Module", bound=nn.Module)


def dense_scaling(sae: TopKSAE, positions: Tensor, features: Sequence[int], coefficient: float) -> Edit:
    """The edit by two dense decodes: x + decode(h, with `features` times `coefficient`) - decode(h), h = encode(x)."""

    def edit(stream: Tensor) -> Tensor:
        latents = sae.encode(stream[:, positions])  # (batch, n_gene, n_features)
        changed = latents.clone()
        changed[..., list(features)] *= coefficient
        edited_stream = stream.clone()
        edited_stream[:, positions] += sae.decode(changed) - sae.decode(latents)
        return edited_stream

    return edit


def full_pass(
    model: BertForMaskedLM, tokens: Tensor, edits: Mapping[int, Edit], layers: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """Streams of `layers` and the logits (batch, n_pos, n_vocab) of one full pass with edits."""
    with edited(model, edits), captured(model, layers) as streams:
        logits = masked_logits(model, tokens)
    return streams, logits


@dataclass(frozen=True)
class DenseCell:
    """What the study caches of a cell's clean run.

    `tokens` (1, n_pos), `positions` (n_gene,), `selected` (n_gene, k) features of the source layer, and the latents of
    each target, (n_gene, n_features) with explicit zeros.
    """

    tokens: Tensor
    positions: Tensor
    selected: Tensor
    latents: Mapping[int, Tensor]


class PublishedWay:
    """Effects of one feature in one cell at a time."""

    def __init__(
        self, model: BertForMaskedLM, saes: Mapping[int, TopKSAE], source_layer: int, targets: Sequence[int]
    ) -> None:
        """Bind the model and the SAEs, all on one device."""
        self.model, self.saes, self.source_layer, self.targets = model, saes, source_layer, tuple(targets)

    @torch.inference_mode()
    def clean(self, cell: Cell) -> DenseCell:
        """Run one cell unedited."""
        tokens = torch.from_numpy(cell.tokens).to(self.model.device)[None]
        positions = torch.from_numpy(cell.gene_positions).to(self.model.device)
        streams, _ = full_pass(self.model, tokens, {}, (self.source_layer, *self.targets))
        selected = self.saes[self.source_layer].top_k(streams[self.source_layer][0, positions])[1]
        return DenseCell(tokens, positions, selected, self._encoded(streams, positions))

    @torch.inference_mode()
    def effect(self, clean: DenseCell, feature: int) -> NDArray[np.float64]:
        """Effect of removing one feature that is active in the cell, (n_targets,): the targets side by side."""
        edit = dense_scaling(self.saes[self.source_layer], clean.positions, [feature], 0.0)
        streams, _ = full_pass(self.model, clean.tokens, {self.source_layer: edit}, self.targets)
        ablated = self._encoded(streams, clean.positions)
        active = (clean.selected == feature).any(-1)  # (n_gene,)
        changes = [(ablated[layer] - clean.latents[layer])[active].cpu().numpy() for layer in self.targets]
        return np.concatenate([change.mean(axis=0, dtype=np.float64) for change in changes])

    def _encoded(self, streams: Mapping[int, Tensor], positions: Tensor) -> dict[int, Tensor]:
        return {layer: self.saes[layer].encode(streams[layer][0, positions]) for layer in self.targets}


def as_users_get_it(bench: Bench) -> PublishedWay:
    """The published way as the study's code has it: eager attention, PyTorch's own linear layers."""
    return PublishedWay(with_attention(bench.model, "eager"), bench.saes, bench.source_layer, bench.targets)


def on_our_products(bench: Bench) -> PublishedWay:
    """The same algorithm with fused attention and with every linear layer on the engine's matrix product.

    Holds a copy of all weights, as the engine does.
    """
    model = with_attention(bench.model, "sdpa")
    saes = {layer: sharing(sae, twin_of(sae)) for layer, sae in bench.saes.items()}
    for module in (model, *saes.values()):
        for part in module.modules():
            if isinstance(part, nn.Linear):
                part.forward = joined_linear(part)
    return PublishedWay(model, saes, bench.source_layer, bench.targets)


def with_attention(model: BertForMaskedLM, implementation: str) -> BertForMaskedLM:
    """The same model, weights shared, with `eager` or `sdpa` attention; transformers 4 cannot switch a model over."""
    with torch.device("meta"):
        twin = AutoModelForMaskedLM.from_config(deepcopy(model.config), attn_implementation=implementation)
    return sharing(model, twin.eval())


def twin_of(sae: TopKSAE) -> TopKSAE:
    """An SAE of the same size, without memory for its weights."""
    with torch.device("meta"):
        return TopKSAE(sae.d_model, sae.n_features, sae.k).eval()


def sharing(module: Module, twin: Module) -> Module:
    """`twin`, a module of the same structure, with the weights and buffers of `module`."""
    for name, part in module.named_modules():
        of_twin = twin.get_submodule(name)
        of_twin._parameters, of_twin._buffers = part._parameters, part._buffers
    return twin
