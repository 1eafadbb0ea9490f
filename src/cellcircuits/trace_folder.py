"""One folder of a trace: whose numbers it holds, tracing into it, and its tables and summary.

Exhaustive and selective tracing differ only in which features they ask for; their folders are of one kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellcircuits import graph_store, manifest, results
from cellcircuits.edge_fdr import CalibrationSettings, Family, graph_calibration
from cellcircuits.errors import UserError
from cellcircuits.input_counts import inputs_entry
from cellcircuits.jsonio import write_json
from cellcircuits.precision import FP32
from cellcircuits.stats import EdgeRule

if TYPE_CHECKING:
    from cellcircuits.effects import Bench, CleanCell
    from cellcircuits.inputs import LayerSAE, ModelAndCells

EXPERIMENT = "exhaustive_feature_tracing"
CALIBRATION = "calibration.json"


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
        precision: how the blocks after the source layer are computed.
        same_position: whether the numbers are same-position effects instead of total effects.
        n_checked: same-position effects of how many features to compare with their total effects, once all are there.
        mix_versions: whether to go on in a folder that other software has worked in.
        calibration: how edges are tested.
        save_effects: whether to keep the effects too; they do not change with it, so it is no setting.
    """

    out_dir: Path
    source_layer: int
    layers: Mapping[int, "LayerSAE"]
    opened: "ModelAndCells"
    rule: EdgeRule
    tokenization: str
    precision: str = FP32
    same_position: bool = False
    n_checked: int = 0
    mix_versions: bool = False
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    save_effects: bool = False

    @property
    def targets(self) -> tuple[int, ...]:
        """The target layers, ascending."""
        return tuple(sorted(layer for layer in self.layers if layer > self.source_layer))

    def settings(self) -> dict[str, Any]:
        """Everything that determines the numbers; labels, and which features are asked for, do not."""
        dtype = str(self.opened.loaded.model.dtype).removeprefix("torch.")
        settings = {
            "experiment": EXPERIMENT,
            "source_layer": self.source_layer,
            "downstream_layers": list(self.targets),
            "model": self.opened.loaded.fingerprint,
            "saes": {str(layer): layer_sae.fingerprint for layer, layer_sae in self.layers.items()},
            "n_cells": len(self.opened.cells.cells),
            "cells": self.opened.cells.fingerprint(),
            "tokenization": self.tokenization,
            "min_abs_d": self.rule.min_abs_d,
            "min_consistency": self.rule.min_consistency,
            "calibration": self.calibration.record(),
            "block_size": graph_store.BLOCK_SIZE,
            "precision": dtype if self.precision == FP32 else self.precision,
        }
        return settings | ({"quantity": results.SAME_POSITION} if self.same_position else {})

    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from, for the record."""
        return {**self.opened.provenance(), "saes": {n: str(x.files.checkpoint) for n, x in self.layers.items()}}

    def claim(self) -> str:
        """Make the folder this run's, or check that it is, and name its features; returns the fingerprint.

        Raises:
            UserError: see `manifest.claim_folder`.
        """
        fingerprint = manifest.claim_folder(
            self.out_dir, self.settings(), self.provenance(), mix_versions=self.mix_versions
        )
        graph_store.write_features(self.out_dir, {n: x.features() for n, x in self.layers.items()})
        return fingerprint

    def trace(
        self,
        features: Sequence[int],
        fingerprint: str,
        bench: "Bench",
        clean: "Sequence[CleanCell]",
        batch_size: int | None,
    ) -> bool:
        """Trace the features that the folder does not hold yet.

        Args:
            features: source features, ascending.
            fingerprint: what `claim` returned.
            bench: of this source layer and these targets; it measures what the folder holds.
            clean: clean runs of the cells, made when asked for.
            batch_size: features per batch; None lets memory decide.

        Returns:
            Whether all of them are finished, here or by other processes.

        Raises:
            UserError: see `Tracer.trace`.
        """
        from cellcircuits.effects import ablation_effect
        from cellcircuits.same_position import same_position_effect
        from cellcircuits.trace_run import Tracer

        definition = same_position_effect if self.same_position else ablation_effect
        catalog = self.layers[self.source_layer].catalog or {}
        names = [cell.name for cell in self.opened.cells.cells] if self.save_effects else None
        how = (self.rule, fingerprint, batch_size, definition, self.calibration, names)
        tracer = Tracer(self.out_dir, bench, clean, catalog, *how)
        make_tables(self.out_dir)  # so that what earlier runs left can be looked up meanwhile
        return tracer.trace(features)


def make_tables(out_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[int, int]]:
    """Make the tables and the summary from the shards of the folder.

    Returns:
        The summary, the facts of every traced feature, the number of edges per target layer.

    Raises:
        UserError: the folder holds no trace, or one whose edges were not tested.
    """
    content = manifest.open_folder(out_dir, EXPERIMENT)
    settings = content["settings"]
    # of two processes that end at the same time, the one that writes last has then seen all shards
    with results.one_at_a_time(out_dir):
        rule, calibration = edge_rules(out_dir, settings)
        fingerprint = manifest.settings_fingerprint(settings)
        q_values = graph_store.count_p(out_dir, fingerprint).q_values()
        family = Family(q_values, rule, calibration.min_cells)
        unnamed, per_layer = graph_store.write_edges(out_dir, fingerprint, family)
        features = graph_store.fill_degrees(out_dir, settings["source_layer"], unnamed)
        write_json(out_dir / CALIBRATION, graph_calibration(features, q_values, calibration))
        summary = results.summarise(settings["source_layer"], features)
        if "quantity" in settings:
            summary["quantity"] = settings["quantity"]
        summary |= inputs_entry(content.get("provenance"))
        write_json(out_dir / "exhaustive_summary.json", summary)
    return summary, features, per_layer


def edge_rules(out_dir: Path, settings: Mapping[str, Any]) -> tuple[EdgeRule, CalibrationSettings]:
    """What a folder's edges are called and tested by."""
    try:
        rule = EdgeRule(float(settings["min_abs_d"]), float(settings["min_consistency"]))
        return rule, CalibrationSettings(**{key: int(value) for key, value in settings["calibration"].items()})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{out_dir / manifest.MANIFEST}: does not say how edges are called and tested, as a folder of an earlier "
            "version; trace again into another --out-dir, or restore the file."
        ) from None
