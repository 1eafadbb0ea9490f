"""A random model with SAEs and cells, and a steering run on them."""

import json
from pathlib import Path

import numpy as np
import torch

from cellcircuits.cells import Cell
from cellcircuits.panel import PanelFeature
from cellcircuits.steering import SteeringBench
from cellcircuits.steering_run import Steerer
from conftest import random_model, random_sae

SHAPES = [
    # n_layers, d_model, n_heads, panel layers, n_features, k
    (6, 24, 3, (1, 4), 40, 4),
    (4, 16, 2, (0, 3), 30, 6),
    (2, 8, 1, (1,), 12, 3),
    (5, 12, 4, (0, 2, 3, 4), 20, 2),
]


def random_cells(seed: int, n_cells: int, n_vocab: int) -> list[Cell]:
    """Cells of different lengths, the special tokens around their genes."""
    rng = np.random.default_rng(seed)
    cells = []
    for i in range(n_cells):
        genes = rng.permutation(np.arange(4, n_vocab))[: rng.integers(6, 30)]
        cells.append(Cell(f"cell{i}", 2 * i, np.array([2, *genes, 3]), np.arange(1, len(genes) + 1)))
    return cells


class Setup:
    """A random model with SAEs, cells, and early and late groups that overlap in one cell."""

    def __init__(self, shape=SHAPES[0], seed: int = 0, dtype=torch.float64, n_cells: int = 9):
        n_layers, d_model, n_heads, layers, n_features, k = shape
        self.model = random_model(seed, n_layers=n_layers, d_model=d_model, n_heads=n_heads).to(dtype)
        self.saes = {layer: random_sae(seed + layer, d_model, n_features, k).to(dtype) for layer in layers}
        self.cells = random_cells(seed, n_cells, self.model.config.vocab_size)
        self.early, self.late = np.array([0, 2, 3, 5]), np.array([1, 3, 8])
        self.gene_of = {token: f"GENE{token}" for token in range(4, 50)}
        self.panel = [PanelFeature(layer, i, 1.0, "label") for layer in layers for i in (0, 5, 7, 11)]

    def steerer(self, out_dir: Path, alphas=(2.0, 5.0, -1.0), **more) -> Steerer:
        bench = SteeringBench(self.model, self.saes)
        marks = {layer: {"checkpoint": f"sha of {layer}", "mean": "-"} for layer in self.saes}
        values = {"saes": marks, "fingerprint": "run", "cells": self.cells, "gene_of": self.gene_of, **more}
        return Steerer(out_dir=out_dir, bench=bench, early=self.early, late=self.late, alphas=alphas, **values)

    def steer(self, out_dir: Path, alphas=(2.0, 5.0, -1.0), **more) -> Steerer:
        steerer = self.steerer(out_dir, alphas, **more)
        steerer.steer(self.panel)
        return steerer


def record_of(out_dir: Path, feature: PanelFeature) -> dict:
    return json.loads((out_dir / f"steering_{feature.name}.json").read_text())


def files_in(folder: Path) -> dict[str, bytes]:
    """Every result file, byte for byte: nothing in them depends on the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix == ".json"}
