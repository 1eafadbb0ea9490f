"""Same-position effects twice, slowly: by putting streams back after every block, and by the definition's letter.

The definition: the active positions P run on; in each block their queries attend to keys and values that are those
of the edited streams at P and the clean ones elsewhere. `cell_effect` runs whole streams and puts every position
outside P back to its clean stream after each block. That is the same: what a block writes at a position of P depends
on the other positions through their keys and values in that block only, keys and values are functions of one
position's stream, and the streams a block reads are edited at P and clean elsewhere; what it writes elsewhere is
thrown away. `literal_streams` spells the definition out position by position, and the tests compare the two.
"""

import numpy as np
import torch

from reference import dense_encode, scaling, streams_of


def active_positions(saes, cell, source, feature, clean):
    chosen = dense_encode(saes[source], clean[source])[1]
    return [int(position) for position in cell.gene_positions if chosen[position, feature]]


def cell_effect(model, saes, cell, source, feature, targets):
    """{target: (n_features,) float64} of one cell, or None where the feature is active nowhere."""
    clean = streams_of(model, cell.tokens)
    positions = active_positions(saes, cell, source, feature, clean)
    if not positions:
        return None
    edited = edited_streams(model, saes, cell, source, feature)
    effects = {}
    for target in targets:
        before, _ = dense_encode(saes[target], clean[target])
        after, _ = dense_encode(saes[target], edited[target])
        effects[target] = (after - before)[positions].to(torch.float64).numpy().sum(axis=0) / len(positions)
    return effects


def edited_streams(model, saes, cell, source, feature):
    """{layer: (n_pos, d_model)} with the feature removed at `source` and all else put back after each block."""
    clean = streams_of(model, cell.tokens)
    positions = active_positions(saes, cell, source, feature, clean)

    def put_back(layer):
        def edit(residual):
            kept = clean[layer].clone()
            for position in positions:
                kept[position] = residual[position]
            return kept

        return edit

    edits = {layer: put_back(layer) for layer in range(source + 1, len(clean))}
    return streams_of(model, cell.tokens, {**edits, source: scaling(saes[source], cell.gene_positions, [feature])})


def literal_streams(model, saes, cell, source, feature):
    """{layer: {active position: (d_model,)}} in NumPy: one position, one head, one key at a time."""
    clean = {layer: stream.double().numpy() for layer, stream in streams_of(model, cell.tokens).items()}
    positions = active_positions(saes, cell, source, feature, streams_of(model, cell.tokens))
    removed = scaling(saes[source], cell.gene_positions, [feature])(torch.from_numpy(clean[source])).numpy()
    streams = {position: removed[position] for position in positions}
    every = {}
    for layer in range(source + 1, len(clean)):
        streams = literal_block(model, layer, clean[layer - 1], streams)
        every[layer] = streams
    return every


def literal_block(model, layer, clean, streams):
    weights = {
        name.removeprefix(f"bert.encoder.layer.{layer}."): tensor.double().numpy()
        for name, tensor in model.state_dict().items()
        if name.startswith(f"bert.encoder.layer.{layer}.")
    }
    n_heads, eps = model.config.num_attention_heads, model.config.layer_norm_eps

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def norm(name, x):
        return (x - x.mean()) / np.sqrt(x.var() + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    after = {}
    for position, stream in streams.items():
        query = linear("attention.self.query", stream).reshape(n_heads, -1)
        seen = [streams.get(other, clean[other]) for other in range(len(clean))]
        keys = [linear("attention.self.key", x).reshape(n_heads, -1) for x in seen]
        values = [linear("attention.self.value", x).reshape(n_heads, -1) for x in seen]
        mixed = []
        for head in range(n_heads):
            scores = np.array([query[head] @ key[head] for key in keys]) / np.sqrt(query.shape[1])
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            mixed.append(sum(share * value[head] for share, value in zip(shares, values, strict=True)))
        x = norm("attention.output.LayerNorm", stream + linear("attention.output.dense", np.concatenate(mixed)))
        hidden = np.maximum(linear("intermediate.dense", x), 0)
        after[position] = norm("output.LayerNorm", x + linear("output.dense", hidden))
    return after
