"""The slow and obvious implementation of controlled steering: full hooked passes, complete logits, plain loops.

Nothing here comes from the package but the weights of an SAE.
"""

import numpy as np
import torch

import reference
import reference_steering


def run(model, tokens, gene_positions, layer=None, rows=(), step=None):
    """Final stream (n_gene, d_model) and logits (n_gene, n_vocab) of one full pass, the stream moved where asked."""
    final = {}

    def keep(_module, _arguments, output):
        final["stream"] = reference.stream_of(output)[0]

    def move(_module, _arguments, output):
        stream = reference.stream_of(output).clone()
        for row in rows:
            stream[0, int(gene_positions[row])] += torch.as_tensor(step, dtype=stream.dtype)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    blocks, handles = model.bert.encoder.layer, []
    try:
        if layer is not None:
            handles.append(blocks[layer].register_forward_hook(move))
        handles.append(blocks[-1].register_forward_hook(keep))
        with torch.no_grad():
            logits = model(input_ids=torch.as_tensor(tokens)[None]).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    at = [int(position) for position in gene_positions]
    return final["stream"][at].double().numpy(), logits[at].double().numpy()


def active_rows(model, sae, tokens, gene_positions, layer, feature):
    """Rows among the gene positions where the latent of a feature is above 0 in the clean pass."""
    latents, _ = reference.dense_encode(sae, reference.streams_of(model, tokens)[layer])
    return [row for row, position in enumerate(gene_positions) if float(latents[int(position), feature]) > 0]


def head_of(model, final):
    """Logits (n, n_vocab) that the head makes of final streams (n, d_model)."""
    with torch.no_grad():
        dtype = next(model.parameters()).dtype
        return model.cls(torch.as_tensor(final, dtype=dtype)).double().numpy()


def log_p(logits, tokens):
    """Log probability of one token per row."""
    found = []
    for row, token in zip(logits, tokens, strict=True):
        shifted = row - row.max()
        found.append(shifted[token] - np.log(np.exp(shifted).sum()))
    return np.array(found)


def marker_score(logits, rows, tokens, is_late):
    """Mean log p of the late minus that of the early markers, at `rows` of (n_gene, n_vocab) logits."""
    values = log_p(logits[list(rows)], tokens)
    late = [value for value, side in zip(values, is_late, strict=True) if side]
    early = [value for value, side in zip(values, is_late, strict=True) if not side]
    return sum(late) / len(late) - sum(early) / len(early)


def readouts(model, sae, cell, layer, edit, asked):
    """All values of one edit in one cell.

    `edit` is (feature whose positions are moved, step); `asked` has `early`, `late` signatures, `weights`, `bias` of
    the probe, tokens `early_markers`, `late_markers`, and `mask`.
    """
    feature, step = edit
    rows = active_rows(model, sae, cell.tokens, cell.gene_positions, layer, feature)
    found = dict.fromkeys(
        ("signature", "markers", "probe", "probability", "signature_linear", "markers_linear", "probe_linear",
         "n_positions", "n_positions_masked")
    )  # fmt: skip
    if rows:
        found |= _of_states(model, cell, layer, rows, step, asked) | {"n_positions": len(rows)}
    genes = [int(cell.tokens[int(position)]) for position in cell.gene_positions]
    masked = [i for i, gene in enumerate(genes) if gene in asked["early_markers"] or gene in asked["late_markers"]]
    is_late = [genes[i] in asked["late_markers"] for i in masked]
    if any(is_late) and not all(is_late):
        tokens = np.array(cell.tokens)
        for i in masked:
            tokens[int(cell.gene_positions[i])] = asked["mask"]
        rows = active_rows(model, sae, tokens, cell.gene_positions, layer, feature)
        if rows:
            true = [genes[i] for i in masked]
            final, clean = run(model, tokens, cell.gene_positions)
            steered = run(model, tokens, cell.gene_positions, layer, rows, step)[1]
            direct = final.copy()
            direct[rows] += step
            before = marker_score(clean, masked, true, is_late)
            found["markers"] = marker_score(steered, masked, true, is_late) - before
            found["markers_linear"] = marker_score(head_of(model, direct), masked, true, is_late) - before
            found["n_positions_masked"] = len(rows)
    return found


def _of_states(model, cell, layer, rows, step, asked):
    final, clean = run(model, cell.tokens, cell.gene_positions)
    steered_final, steered = run(model, cell.tokens, cell.gene_positions, layer, rows, step)
    direct = final.copy()
    direct[rows] += step
    signatures = asked["early"], asked["late"]

    def shift(logits):
        return reference_steering.state_shift(clean.mean(axis=0), logits.mean(axis=0), *signatures)

    def odds(stream):
        return float(stream.mean(axis=0) @ asked["weights"] + asked["bias"])

    return {
        "signature": shift(steered),
        "signature_linear": shift(head_of(model, direct)),
        "probe": odds(steered_final) - odds(final),
        "probe_linear": odds(direct) - odds(final),
        "probability": 1 / (1 + np.exp(-odds(steered_final))) - 1 / (1 + np.exp(-odds(final))),
    }
