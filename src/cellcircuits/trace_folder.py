"""One folder of a trace: whose numbers it holds, tracing into it, and its tables and summary.

Exhaustive and selective tracing differ only in which features they ask for; their folders are of one kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellcircuits import graph_store, results
from cellcircuits.jsonio import write_json
from cellcircuits.stats import EdgeRule

if TYPE_CHECKING:
    from cellcircuits.inputs import LayerSAE, ModelAndCells

EXPERIMENT = "exhaustive_feature_tracing"


@dataclass(frozen=True)
class TraceFolder:
    """A folder for the features of one source layer.

    Attributes:
        out_dir: the folder.
        source_layer: the layer traced; it has a catalog.
        layers: the SAE of the source layer and of every target layer.
        opened: model and cells.
        rule: what makes an edge.
        tokenization: how the cells were ranked.
    """

    out_dir: Path
    source_layer: int
    layers: Mapping[int, "LayerSAE"]
    opened: "ModelAndCells"
    rule: EdgeRule
    tokenization: str

    def settings(self) -> dict[str, Any]:
        """Everything that determines the numbers; labels, and which features are asked for, do not."""
        from cellcircuits import sae_store

        saes = {str(layer): sae_store.fingerprint(layer_sae.files) for layer, layer_sae in self.layers.items()}
        return {
            "experiment": EXPERIMENT,
            "source_layer": self.source_layer,
            "downstream_layers": [layer for layer in self.layers if layer != self.source_layer],
            "model": self.opened.loaded.fingerprint,
            "saes": saes,
            "n_cells": len(self.opened.cells.cells),
            "cells": self.opened.cells.fingerprint(),
            "tokenization": self.tokenization,
            "min_abs_d": self.rule.min_abs_d,
            "min_consistency": self.rule.min_consistency,
            "block_size": graph_store.BLOCK_SIZE,
            "precision": str(self.opened.loaded.model.dtype).removeprefix("torch."),
        }

    def claim(self) -> str:
        """Make the folder this run's, or check that it is, and name its features; returns the fingerprint.

        Raises:
            UserError: see `results.claim_folder`.
        """
        saes = {n: str(x.files.checkpoint) for n, x in self.layers.items()}
        provenance = {**self.opened.provenance(), "saes": saes}
        fingerprint = results.claim_folder(self.out_dir, self.settings(), provenance)
        graph_store.write_features(self.out_dir, {n: x.features() for n, x in self.layers.items()})
        return fingerprint

    def trace(self, features: Sequence[int], fingerprint: str, batch_size: int | None) -> None:
        """Trace the features that the folder does not hold yet.

        Raises:
            UserError: see `Tracer.check_engine`.
        """
        from cellcircuits.effects import Bench
        from cellcircuits.trace_run import Tracer

        loaded, catalog = self.opened.loaded, self.layers[self.source_layer].catalog
        bench = Bench(loaded.model, {layer: x.sae for layer, x in self.layers.items()}, self.source_layer)
        tracer = Tracer(self.out_dir, bench, self.opened.cells.cells, catalog or {}, self.rule, fingerprint, batch_size)
        make_tables(self.out_dir)  # so that what earlier runs left can be looked up meanwhile
        tracer.trace(features)


def make_tables(out_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[int, int]]:
    """Make the tables and the summary from the shards of the folder.

    Returns:
        The summary, the facts of every traced feature, the number of edges per target layer.

    Raises:
        UserError: the folder holds no trace.
    """
    settings = results.open_folder(out_dir, EXPERIMENT)["settings"]
    unnamed, per_layer = graph_store.write_edges(out_dir, results.settings_fingerprint(settings))
    features = graph_store.fill_degrees(out_dir, settings["source_layer"], unnamed)
    summary = results.summarise(settings["source_layer"], features)
    write_json(out_dir / "exhaustive_summary.json", summary)
    return summary, features, per_layer
