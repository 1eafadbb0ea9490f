"""Panels: the features to steer, each with its layer, its switch size and its label. Standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellcircuits.catalog import UNANNOTATED
from cellcircuits.errors import UserError, printable
from cellcircuits.jsonio import read_json

FORM = '[{"layer": 0, "idx": 25, "d": 1.13, "label": "..."}]'
N_FEATURES_PUBLISHED = 4608
LARGEST_D = 1e300  # NaN, infinities and integers that no float can hold are not below it


@dataclass(frozen=True)
class PanelFeature:
    """A feature to steer.

    `switch_d` is Cohen's d of its activation, late against early cells, None where nobody measured it; `label` is
    None where the panel says nothing.
    """

    layer: int
    index: int
    switch_d: float | None = None
    label: str | None = None

    @property
    def name(self) -> str:
        """`F25_L0`, as result files are called."""
        return f"F{self.index}_L{self.layer}"


PUBLISHED_PANEL = (
    PanelFeature(0, 2061, 1.33, "Chromatin Organization"),
    PanelFeature(0, 25, 1.13, "Mitotic Spindle Microtubule Attachment"),
    PanelFeature(0, 3567, 1.07, UNANNOTATED),
    PanelFeature(0, 1483, 1.07, "L-amino Acid Transport"),
    PanelFeature(0, 1295, 1.01, "Neurodegeneration Pathways"),
    PanelFeature(5, 4349, 0.95, "Pre-mRNA Processing"),
    PanelFeature(5, 2016, 0.90, UNANNOTATED),
    PanelFeature(11, 854, 1.15, "RNA Catabolic Process"),
    PanelFeature(11, 4350, 1.09, UNANNOTATED),
    PanelFeature(11, 2174, 1.01, UNANNOTATED),
    PanelFeature(11, 3750, 1.00, UNANNOTATED),
    PanelFeature(17, 3730, 1.25, "Protein-RNA Complex Assembly"),
    PanelFeature(17, 1607, 1.09, UNANNOTATED),
    PanelFeature(17, 3567, 1.09, UNANNOTATED),
)


def read_panel(path: Path) -> tuple[PanelFeature, ...]:
    """Read `[{"layer", "idx", "d", "label"}]`; `d` and `label` may be left out, other keys are ignored.

    Raises:
        UserError: the file is missing, damaged, empty, or lists a feature twice.
    """
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: a panel is a list of at least one feature, such as {FORM}.")
    panel = tuple(_panel_feature(path, number, entry) for number, entry in enumerate(content, 1))
    seen: set[tuple[int, int]] = set()
    for feature in panel:
        if (feature.layer, feature.index) in seen:
            raise UserError(f"{path}: lists layer {feature.layer}, idx {feature.index} twice; leave one of them out.")
        seen.add((feature.layer, feature.index))
    return panel


def _panel_feature(path: Path, number: int, entry: Any) -> PanelFeature:
    where = f"{path}: entry {number}"
    if not isinstance(entry, dict):
        raise UserError(f"{where} is not an object; a panel looks like {FORM}.")
    for field in ("layer", "idx"):
        if type(entry.get(field)) is not int or entry[field] < 0:
            raise UserError(f"{where} needs `{field}`, an integer of at least 0, not {entry.get(field)!r:.40}.")
    switch_d, label = entry.get("d"), entry.get("label")
    if switch_d is not None and (type(switch_d) not in (int, float) or not abs(switch_d) < LARGEST_D):
        raise UserError(f"{where} has `d` = {switch_d!r:.40}, which is no finite number; mend it or leave it out.")
    if label is not None and not isinstance(label, str):
        raise UserError(f"{where} has a `label` that is no text ({label!r:.40}).")
    return PanelFeature(
        entry["layer"], entry["idx"], None if switch_d is None else float(switch_d), label and printable(label)
    )


def check_layers(panel: Sequence[PanelFeature], n_layers: int, panel_file: Path | None) -> None:
    """Check that every feature's layer is one of the model's.

    Raises:
        UserError: one is not.
    """
    for feature in panel:
        if feature.layer >= n_layers:
            raise UserError(
                f"{_source(panel_file)}: {feature.name} is of layer {feature.layer}, but this model has {n_layers} "
                f"blocks, 0 to {n_layers - 1}{_mend(panel_file)}."
            )


def check_indices(panel: Sequence[PanelFeature], n_features: Mapping[int, int], panel_file: Path | None) -> None:
    """Check that every feature is one of its layer's SAE.

    Args:
        panel: the features.
        n_features: {layer: latents of its SAE}.
        panel_file: where the panel was read, None for the published one.

    Raises:
        UserError: a feature is not, or the published panel meets SAEs of another size, whose features are others.
    """
    for feature in panel:
        there = n_features[feature.layer]
        if feature.index >= there or (panel_file is None and there != N_FEATURES_PUBLISHED):
            raise UserError(
                f"{_source(panel_file)}: {feature.name} is asked for, but the SAE of layer {feature.layer} has "
                f"features 0 to {there - 1}{_mend(panel_file)}."
            )


def _source(panel_file: Path | None) -> str:
    return "the default panel" if panel_file is None else f"--panel {panel_file}"


def _mend(panel_file: Path | None) -> str:
    if panel_file is not None:
        return "; take a panel made with this model and these SAEs"
    return (
        f"; the default panel belongs to Geneformer V2-316M and SAEs with {N_FEATURES_PUBLISHED:,} features: name your "
        "own with --panel, e.g. the switch_features.json that trajectory_analysis.py writes"
    )
