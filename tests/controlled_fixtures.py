"""A random model with SAEs and cells, and a controlled steering run on them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cellcircuits.controlled_run import ControlledSteerer, Design, SteeredFeature
from cellcircuits.displacements import DisplacementBench
from cellcircuits.geneformer import head_parts
from cellcircuits.maturity_probe import Probe
from cellcircuits.state_shift import LogitMap, Signatures
from cellcircuits.steering_controls import Dose, LayerFacts
from cellcircuits.steering_readouts import MarkerTokens, StateReadouts
from conftest import random_model, random_sae
from steering_fixtures import SHAPES, random_cells

MASK = 1
DOSES = (Dose(norm=0.1), Dose(norm=0.7), Dose(alpha=3.0))


class Setup:
    """A random model with SAEs, cells, a probe, signatures, markers, and a panel of two features per layer."""

    def __init__(self, shape=SHAPES[0], seed: int = 0, dtype=torch.float64, n_cells: int = 5):
        n_layers, d_model, n_heads, layers, n_features, k = shape
        rng = np.random.default_rng(seed)
        self.model = random_model(seed, n_layers=n_layers, d_model=d_model, n_heads=n_heads).to(dtype)
        self.saes = {layer: random_sae(seed + layer, d_model, n_features, k).to(dtype) for layer in layers}
        n_vocab = self.model.config.vocab_size
        self.cells = random_cells(seed, n_cells, n_vocab)
        head = head_parts(self.model)
        logit_map = LogitMap(*(part.detach().numpy().astype(np.float64) for part in (head.weight, head.bias)))
        self.signatures = Signatures(*rng.standard_normal((2, n_vocab)))
        probe = Probe(*np.abs(rng.standard_normal((3, d_model))), 0.3, 5, 5, 0.8, 0.7, 0.9, None)
        self.facts = {
            layer: LayerFacts(
                mean_norm=float(rng.uniform(1, 5)),
                frequency=rng.uniform(0.01, 0.5, n_features),
                share_of_cells=np.where(np.arange(n_features) == 1, 0.0, 1.0),
                mean_latent=rng.uniform(0.1, 1, n_features),
            )
            for layer in layers
        }
        self.design = Design(
            panel=tuple(
                SteeredFeature(layer, i, kind, d, "label")
                for layer in layers
                for i, kind, d in ((0, "ON", 1.2), (5, "OFF", -0.7))
            ),
            facts=self.facts,
            doses=DOSES,
            n_draws=2,
            seed=11,
            readouts=StateReadouts(logit_map, self.signatures, probe),
            markers=MarkerTokens(tuple(range(4, 20)), tuple(range(20, 40)), ()),
            mask=MASK,
            switch_d={layer: np.where(np.arange(n_features) % 2, np.nan, 0.4) for layer in layers},
        )

    def asked(self) -> dict:
        """What the slow implementation needs to know."""
        probe, markers = self.design.readouts.probe, self.design.markers
        weights = probe.weights / probe.scale
        return {
            "early": self.signatures.early,
            "late": self.signatures.late,
            "weights": weights,
            "bias": probe.intercept - float(probe.mean @ weights),
            "early_markers": set(markers.early),
            "late_markers": set(markers.late),
            "mask": MASK,
        }

    def steerer(self, out_dir: Path, batch_size: int | None = None, **changes) -> ControlledSteerer:
        design = replace(self.design, **changes)
        return ControlledSteerer(
            out_dir, DisplacementBench(self.model, self.saes), self.cells, design, "run", batch_size
        )


def records_in(folder: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("controlled_*.json"))}


def bytes_in(folder: Path) -> dict[str, bytes]:
    """Every result file, byte for byte: nothing in them depends on the time."""
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}
