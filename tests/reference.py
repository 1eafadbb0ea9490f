"""The slow and obvious implementation of section 6 of the specification, to test the engine against.

One cell and one feature set at a time, full forward passes, dense encodes of every position, two dense
decodes per ablation. Nothing here comes from the package but the weights of an SAE.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Measured:
    """Effects of one feature (set) on one target layer over the cells in which it is active."""

    effects: np.ndarray  # (n_cells_active, n_features) float64
    d: np.ndarray
    consistency: np.ndarray

    @property
    def edges(self):
        return np.array([is_edge(self.effects[:, j]) for j in range(self.effects.shape[1])], dtype=bool)


def stream_of(output):
    return output[0] if isinstance(output, tuple) else output


def dense_encode(sae, residual):
    """Latents (n_pos, n_features), and which of them are among the k chosen at their position."""
    pre = (residual - sae.input_mean) @ sae.W_enc.weight.T + sae.W_enc.bias
    chosen = torch.zeros(pre.shape, dtype=torch.bool)
    for position in range(pre.shape[0]):
        chosen[position, torch.topk(pre[position], sae.k).indices] = True
    return torch.where(chosen, torch.relu(pre), torch.zeros_like(pre)), chosen


def dense_decode(sae, latents):
    return latents @ sae.W_dec.weight.T + sae.W_dec.bias


def streams_of(model, tokens, edits=None):
    """Every block's output (n_pos, d_model) of one full forward pass, `edits` {layer: function} applied."""
    streams, handles = {}, []

    def hook_of(layer):
        def hook(_module, _arguments, output):
            stream = stream_of(output)
            if edits and layer in edits:
                stream = edits[layer](stream[0])[None]
            streams[layer] = stream[0].clone()
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        return hook

    try:
        for layer, block in enumerate(model.bert.encoder.layer):
            handles.append(block.register_forward_hook(hook_of(layer)))
        with torch.no_grad():
            model(input_ids=torch.as_tensor(tokens)[None])
    finally:
        for handle in handles:
            handle.remove()
    return streams


def scaling(sae, gene_positions, features, coefficient=0.0):
    """The edit of section 5, by two dense decodes."""

    def edit(residual):
        latents, _ = dense_encode(sae, residual)
        changed = latents.clone()
        changed[:, list(features)] *= coefficient
        difference = dense_decode(sae, changed) - dense_decode(sae, latents)
        edited = residual.clone()
        for position in gene_positions:
            edited[position] = residual[position] + difference[position]
        return edited

    return edit


def cell_effect(model, saes, cell, features, targets):
    """{target: (n_features,) float64} of one cell, or None where no feature of the set is active.

    `features` is a list of (layer, index); they are removed together, the earlier layer first.
    """
    clean = streams_of(model, cell.tokens)
    positions = [
        int(position)
        for position in cell.gene_positions
        if any(dense_encode(saes[layer], clean[layer])[1][position, index] for layer, index in features)
    ]
    if not positions:
        return None
    by_layer = {}
    for layer, index in features:
        by_layer.setdefault(layer, []).append(index)
    edits = {layer: scaling(saes[layer], cell.gene_positions, indices) for layer, indices in by_layer.items()}
    ablated = streams_of(model, cell.tokens, edits)
    effects = {}
    for target in targets:
        before, _ = dense_encode(saes[target], clean[target])
        after, _ = dense_encode(saes[target], ablated[target])
        difference = (after - before)[positions].to(torch.float64).numpy()
        effects[target] = difference.sum(axis=0) / len(positions)
    return effects


def trace(model, saes, cells, features, targets):
    """Number of active cells and {target: Measured} of one feature set over all cells."""
    per_cell = [cell_effect(model, saes, cell, features, targets) for cell in cells]
    per_cell = [effects for effects in per_cell if effects is not None]
    measured = {}
    for target in targets:
        rows = np.zeros((0, saes[target].n_features))
        if per_cell:
            rows = np.stack([effects[target] for effects in per_cell])
        d = np.array([cohens_d(column) for column in rows.T])
        consistency = np.array([consistency_of(column) for column in rows.T])
        measured[target] = Measured(rows, d, consistency)
    return len(per_cell), measured


def cohens_d(column):
    n = len(column)
    if n < 2:
        return 0.0
    mean = sum(column) / n
    variance = sum((x - mean) ** 2 for x in column) / (n - 1)
    return float(mean / max(variance**0.5, 1e-10))


def n_positive(column):
    return sum(1 for x in column if x > 0)


def consistency_of(column):
    n = len(column)
    if n < 2:
        return 0.0
    return max(n_positive(column), n - n_positive(column)) / n


def is_edge(column, min_d=0.5, tenths=7):
    """The edge rule as printed, the share compared in integers."""
    n = len(column)
    if n < 2:
        return False
    majority = max(n_positive(column), n - n_positive(column))
    return abs(cohens_d(column)) > min_d + 1e-9 and 10 * majority > tenths * n
