"""Is the demo's map more than noise? Observed edges against edges of sign-flipped effects.

For every traced feature the cells' effect vectors are multiplied by random signs and the edge rule is
applied again. What survives is what the rule finds when no effect has a consistent direction.
"""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cellcircuits.catalog import MIN_ACTIVATION_FREQ
from cellcircuits.cells import CellSelection, load_cells
from cellcircuits.effects import Bench
from cellcircuits.geneformer import load_model, n_positions
from cellcircuits.graph_store import BLOCK_SIZE
from cellcircuits.inputs import open_saes
from cellcircuits.stats import EdgeRule, effect_statistics
from cellcircuits.tracing import BlockEffects, trace_block
from cellcircuits.vocabulary import load_vocabulary

SOURCE_LAYER, TARGETS = 5, (6, 11, 17)
N_CELLS, N_FLIPS, SEED = 20, 20, 0


def measure_map(demo: Path) -> dict[str, Any]:
    """Trace all active layer-5 features of the demo in memory and compare with their sign-flip null.

    Args:
        demo: folder with model/, sae_models/ and cells.h5ad.

    Returns:
        Counts per target layer: observed edges, mean edges over `N_FLIPS` flips per feature, their ratio.
    """
    loaded = load_model(str(demo / "model"))
    vocabulary = load_vocabulary([demo / "model"], loaded.model.config.vocab_size)
    selection = CellSelection(cells="all", obs_filters=(("split", "held_out"),), n_cells=N_CELLS)
    cells = load_cells(demo / "cells.h5ad", vocabulary, selection, n_positions(loaded.model)).cells
    layers = open_saes(demo, [SOURCE_LAYER, *TARGETS], None, loaded)
    bench = Bench(loaded.model, {layer: opened.sae for layer, opened in layers.items()}, SOURCE_LAYER)
    catalog = layers[SOURCE_LAYER].catalog or {}
    features = [index for index, info in catalog.items() if (info.activation_freq or 0.0) >= MIN_ACTIVATION_FREQ]
    clean = [bench.clean(cell) for cell in cells]
    rng = np.random.default_rng(SEED)
    observed, null = np.zeros(bench.n_targets), np.zeros(bench.n_targets)
    for start in tqdm(range(0, len(features), BLOCK_SIZE), "map", unit="block", disable=None):
        block = BlockEffects.empty(features[start : start + BLOCK_SIZE], len(clean), bench.n_targets)
        trace_block(bench, clean, block)
        for effects, measured in zip(block.effects, block.measured, strict=True):
            observed += effect_statistics(effects[measured], EdgeRule()).is_edge
            for _ in range(N_FLIPS):
                signs = rng.choice((-1.0, 1.0), size=(int(measured.sum()), 1))
                null += effect_statistics(effects[measured] * signs, EdgeRule()).is_edge / N_FLIPS
    per_layer = {}
    for layer, columns in bench.columns.items():
        edges, chance = int(observed[columns].sum()), float(null[columns].sum())
        per_layer[str(layer)] = {"edges": edges, "sign_flipped_edges": chance, "ratio": edges / chance}
    return {
        "n_features": len(features),
        "n_cells": len(cells),
        "min_tokens": min(len(cell.tokens) for cell in cells),
        "layers": per_layer,
    }
