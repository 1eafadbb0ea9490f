"""The trace that specificity controls are held against: what it was made with, its features, its edges."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellcircuits import manifest
from cellcircuits.degree_table import RAW, read_trace
from cellcircuits.edge_fdr import CalibrationSettings
from cellcircuits.errors import UserError
from cellcircuits.graph_store import read_features
from cellcircuits.precision import FP32, PRECISIONS
from cellcircuits.results import SAME_POSITION
from cellcircuits.specificity import CONTROLS, Draws, sample_by_degree
from cellcircuits.specificity_results import EXPERIMENT
from cellcircuits.stats import EdgeRule
from cellcircuits.trace_folder import EXPERIMENT as TRACE
from cellcircuits.trace_folder import TraceFolder, edge_rules
from cellcircuits.trace_layers import holds_layers

if TYPE_CHECKING:
    from cellcircuits.inputs import LayerSAE

NOT_NUMBERS = ("experiment", "block_size")  # settings of a trace that say nothing about its effects


@dataclass(frozen=True)
class TracedRun:
    """How the trace in a folder was made; the controls are measured in the same way."""

    folder: Path
    settings: Mapping[str, Any]
    source_layer: int
    targets: tuple[int, ...]
    rule: EdgeRule
    calibration: CalibrationSettings
    precision: str

    @property
    def layers(self) -> tuple[int, ...]:
        """The source layer and those read."""
        return (self.source_layer, *self.targets)


@dataclass(frozen=True)
class Controls:
    """The trace's folder as this run opened it, how controls are drawn, and how often the source features fire."""

    folder: TraceFolder
    draws: Draws
    frequencies: Mapping[int, float]


def open_traced(folder: Path) -> TracedRun:
    """Read the manifest of a trace.

    Raises:
        UserError: the folder holds no trace of total effects of one layer, or its manifest is damaged.
    """
    if holds_layers(folder):
        raise UserError(f"{folder}: holds a trace of several layers; name the folder of one of them (--trace-dir).")
    settings = manifest.open_folder(folder, TRACE, "--trace-dir")["settings"]
    if settings.get("quantity") == SAME_POSITION:
        raise UserError(
            f"--trace-dir {folder}: holds same-position effects, and controls are of total effects; name a trace made "
            "without --same-position."
        )
    rule, calibration = edge_rules(folder, settings)
    targets = settings.get("downstream_layers")
    if not (isinstance(targets, list) and targets and all(type(layer) is int for layer in targets)):
        raise UserError(f"{folder / manifest.MANIFEST}: does not say which layers were read; restore the file.")
    precision = settings.get("precision")
    precision = precision if precision in PRECISIONS else FP32
    return TracedRun(folder, settings, settings["source_layer"], tuple(targets), rule, calibration, precision)


def require_same(traced: TracedRun, settings: Mapping[str, Any]) -> None:
    """Check that a trace was made with this run's model, SAEs, cells and rules.

    Args:
        traced: the trace.
        settings: what a trace with this run's inputs would have, by `TraceFolder.settings`.

    Raises:
        UserError: it was not; names each difference.
    """
    settings = {key: value for key, value in settings.items() if key not in NOT_NUMBERS}
    kept = {key: traced.settings.get(key) for key in settings}
    differences = list(manifest.setting_differences(kept, settings))
    if differences:
        raise UserError(
            f"--trace-dir {traced.folder}: was made with other settings ({'; '.join(differences)}); give the flags of "
            "that run, or trace again with these."
        )


def control_settings(settings: Mapping[str, Any], draws: Draws, frequencies: Mapping[int, float]) -> dict[str, Any]:
    """Everything that determines the numbers: what does so in a trace, and how controls are drawn.

    Which features are asked for does not.
    """
    of_trace = {key: value for key, value in settings.items() if key not in NOT_NUMBERS}
    matched = hashlib.sha256(json.dumps(sorted(frequencies.items())).encode()).hexdigest()
    of_controls = {"controls": list(CONTROLS), "draws": draws.n, "seed": draws.seed, "frequencies": matched}
    return {"experiment": EXPERIMENT, **of_trace, **of_controls}


def frequencies_of(source: "LayerSAE", draws: Draws) -> dict[int, float]:
    """{feature: how often it fires} of those that may stand in for another: it fires, and writes something.

    Raises:
        UserError: there is no catalog, or it lists too few such features for `draws`.
    """
    if source.catalog is None:
        raise UserError(f"{source.files.catalog}: no such file; the trace was made with it, so restore it.")
    norms = np.linalg.norm(source.sae.decoder_directions.detach().cpu().numpy(), axis=1)
    found = {i: info.activation_freq for i, info in source.catalog.items() if info.activation_freq and norms[i] > 0}
    if len(found) <= draws.n:
        raise UserError(
            f"--draws {draws.n}: {source.files.catalog} lists {len(found)} features that fire, and each draw takes "
            "another one; ask for fewer draws."
        )
    return found


def choose_features(
    traced: TracedRun,
    n: int,
    named: list[int] | None,
    min_cells: int | None,
    frequencies: Mapping[int, float],
    seed: int,
) -> list[int]:
    """The features to measure: those named, or a sample from all degrees.

    Args:
        traced: the trace.
        n: how many to draw.
        named: these instead.
        min_cells: cells in which each must be active; None takes the trace's own minimum.
        frequencies: of the features that can be matched.
        seed: of the draw.

    Returns:
        Ascending.

    Raises:
        UserError: one of the named features does not qualify, or none does.
    """
    at_least = traced.calibration.min_cells if min_cells is None else min_cells
    table = read_trace(traced.folder, RAW, max(1, at_least))
    qualifies = np.isin(table.features, list(frequencies))
    features, degrees = table.features[qualifies], table.degrees[qualifies]
    missing = sorted(set(named or ()) - set(features.tolist()))
    if missing:
        raise UserError(
            f"--features: {traced.folder} has no trace of feature {missing[0]} in at least {at_least} cells with a "
            "known activation frequency; leave it out, trace it, or lower --min-active-cells."
        )
    if not len(features):
        raise UserError(
            f"--trace-dir {traced.folder}: no traced feature is active in {at_least} cells and has a known activation "
            "frequency; lower --min-active-cells."
        )
    return named or sample_by_degree(features, degrees, n, seed)


def described_features(folder: TraceFolder) -> dict[int, dict[str, Any]]:
    """{feature: what its record says beside numbers} of the source layer."""
    rows = read_features(folder.out_dir).select(["layer", "feature", "label", "activation_freq"]).to_pylist()
    return {
        row["feature"]: {"label": row["label"], "activation_freq": row["activation_freq"]}
        for row in rows
        if row["layer"] == folder.source_layer
    }
