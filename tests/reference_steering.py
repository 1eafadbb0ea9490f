"""The slow and obvious implementation of section 9 of the specification, to test the steering against.

Every (cell, feature, alpha) is a full hooked forward pass with the logits of every position over the whole
vocabulary. Nothing here comes from the package but the weights of an SAE.
"""

import numpy as np
import torch

import reference


def mean_logits(model, cell, edits=None):
    """Mean over the gene positions of the logits of one full pass, (n_vocab,) float64, `edits` {layer: function}."""
    handles = []

    def hook_of(edit):
        def hook(_module, _arguments, output):
            stream = edit(reference.stream_of(output)[0])[None]
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        return hook

    try:
        for layer, edit in (edits or {}).items():
            handles.append(model.bert.encoder.layer[layer].register_forward_hook(hook_of(edit)))
        with torch.no_grad():
            logits = model(input_ids=torch.as_tensor(cell.tokens)[None]).logits[0]  # (n_pos, n_vocab)
    finally:
        for handle in handles:
            handle.remove()
    rows = [logits[int(position)].double().numpy() for position in cell.gene_positions]
    return sum(rows) / len(rows)


def steered_logits(model, sae, cell, layer, feature, alpha):
    """Mean logits with one feature's latent multiplied by `alpha` at every gene position."""
    return mean_logits(model, cell, {layer: reference.scaling(sae, cell.gene_positions, [feature], alpha)})


def is_active(model, sae, cell, layer, feature):
    """Whether the feature is among the k selected at any gene position of the clean pass."""
    chosen = reference.dense_encode(sae, reference.streams_of(model, cell.tokens)[layer])[1]
    return any(bool(chosen[int(position), feature]) for position in cell.gene_positions)


def groups_of(pseudotime):
    """Indices of the early and of the late cells; cells whose pseudotime is NaN are in neither."""
    known = [value for value in pseudotime if not np.isnan(value)]
    low, high = np.percentile(known, 33.3), np.percentile(known, 66.7)
    early = [i for i, value in enumerate(pseudotime) if value <= low]
    late = [i for i, value in enumerate(pseudotime) if value >= high]
    return early, late


def signature(model, cells):
    """Mean of the cells' mean logits, (n_vocab,) float64."""
    return sum(mean_logits(model, cell) for cell in cells) / len(cells)


def cosine(a, b):
    return float(np.dot(a, b) / (np.sqrt(np.dot(a, a)) * np.sqrt(np.dot(b, b))))


def state_shift(clean, steered, early, late):
    """[cos(z', late) - cos(z', early)] - [cos(z, late) - cos(z, early)]."""
    after = cosine(steered, late) - cosine(steered, early)
    return after - (cosine(clean, late) - cosine(clean, early))


def gene_list(delta, tokens, gene_of):
    return [{"gene": gene_of.get(token, f"token_{token}"), "delta": float(delta[token])} for token in tokens]


def alpha_result(shifts, changes, gene_of):
    """One entry of `alpha_results` from the steered cells' shifts (n,) and changes z' - z (n, n_vocab)."""
    n = len(shifts)
    result = {"n_cells_steered": n, "n_cells_active": n}
    if not n:
        zeros = ("mean_state_shift", "median_state_shift", "std_state_shift", "frac_positive_shift")
        zeros += ("mean_abs_logit_delta", "max_logit_delta", "min_logit_delta")
        return result | dict.fromkeys(zeros, 0.0) | {"top_upregulated": [], "top_downregulated": []}
    mean = sum(shifts) / n
    ordered = sorted(shifts)
    delta = sum(changes) / n
    ascending = sorted(range(len(delta)), key=lambda token: (delta[token], token))
    descending = sorted(range(len(delta)), key=lambda token: (-delta[token], token))
    return result | {
        "mean_state_shift": mean,
        "median_state_shift": (ordered[(n - 1) // 2] + ordered[n // 2]) / 2,
        "std_state_shift": (sum((shift - mean) ** 2 for shift in shifts) / n) ** 0.5,
        "frac_positive_shift": sum(1 for shift in shifts if shift > 0) / n,
        "top_upregulated": gene_list(delta, descending[:20], gene_of),
        "top_downregulated": gene_list(delta, ascending[:20], gene_of),
        "mean_abs_logit_delta": float(np.abs(delta).mean()),
        "max_logit_delta": float(delta.max()),
        "min_logit_delta": float(delta.min()),
    }


def steer(model, saes, cells, groups, feature, alphas):
    """Shifts and logit changes of one feature (layer, index) per alpha: {alpha: (shifts, changes)}.

    `groups` is the pair of index lists early and late.
    """
    layer, index = feature
    early, late = (signature(model, [cells[i] for i in group]) for group in groups)
    results = {alpha: ([], []) for alpha in alphas}
    for cell in [cells[i] for i in groups[0] if is_active(model, saes[layer], cells[i], layer, index)]:
        clean = mean_logits(model, cell)
        for alpha, (shifts, changes) in results.items():
            steered = steered_logits(model, saes[layer], cell, layer, index, alpha)
            shifts.append(state_shift(clean, steered, early, late))
            changes.append(steered - clean)
    return results


def steering_json(model, saes, cells, pseudotime, entry, alphas, gene_of):
    """The keys of a `steering_F<idx>_L<layer>.json`; `entry` is a dict with layer, idx, d and label."""
    groups = groups_of(pseudotime)
    steered = steer(model, saes, cells, groups, (entry["layer"], entry["idx"]), alphas)
    return {
        "feature_idx": entry["idx"],
        "layer": entry["layer"],
        "label": entry["label"],
        "switch_d": entry["d"],
        "n_early_cells": len(groups[0]),
        "alpha_results": {
            str(float(alpha)): alpha_result(shifts, changes, gene_of) | {"state_shifts": shifts}
            for alpha, (shifts, changes) in steered.items()
        },
    }
