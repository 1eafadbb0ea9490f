"""What the graph's statistics are made from: every traced feature's degree and, where known, its other facts.

The facts come from the tables of a traced folder or from bare JSON tables `{"feature": value}`. Features are
kept in ascending order, so that no result depends on the order of a table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cellcircuits import manifest
from cellcircuits.catalog import UNANNOTATED
from cellcircuits.errors import UserError
from cellcircuits.graph_store import read_edges, read_features
from cellcircuits.jsonio import read_json
from cellcircuits.results import quantity_note
from cellcircuits.trace_layers import holds_layers

MAX_VALUE = 10**9  # of an index or a degree; what is larger is no feature of an SAE
RAW, CALIBRATED = "raw", "calibrated"
DEGREE_COLUMNS = {RAW: "n_edges", CALIBRATED: "degree_calibrated"}
PREDICTOR_COLUMNS = ("n_live_targets", "ablated_norm")


@dataclass(frozen=True)
class DegreeTable:
    """Features with their degrees; every array is (n_features,) in ascending order of the feature.

    Attributes:
        title: what the degrees are of, for headings.
        features: their indices.
        degrees: edges per feature.
        frequency: share of positions at which each fires, above 0 to 1; NaN where unknown.
        is_annotated: 1 or 0; NaN where unknown.
        predictors: further facts that may drive degree (live targets, ablated norm), positive; NaN where unknown.
        notes: what was counted and left out while reading.
    """

    title: str
    features: NDArray[np.int64]
    degrees: NDArray[np.int64]
    frequency: NDArray[np.float64]
    is_annotated: NDArray[np.float64]
    predictors: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def by_degree(self) -> NDArray[np.int64]:
        """Rows from the highest degree down, ties by ascending feature."""
        return np.lexsort((self.features, -self.degrees))


def read_tables(degrees: Path, frequency: Path | None = None, annotated: Path | None = None) -> DegreeTable:
    """Read bare tables; a feature that another table lacks stays, with that fact unknown.

    Args:
        degrees: JSON `{"feature": edges}`, edges an integer of at least 0.
        frequency: JSON `{"feature": share}`, above 0 to 1.
        annotated: JSON `{"feature": true or false}`; 1 and 0 are admitted.

    Raises:
        UserError: a file is missing, is no such table, or the table of degrees is empty.
    """
    degree = _read_table(degrees, _is_degree, "an integer of at least 0")
    if not degree:
        raise UserError(f"{degrees}: holds no feature; give at least one degree.")
    features = sorted(degree)
    known = {
        "frequency": _read_table(frequency, _is_frequency, "a share above 0 and at most 1") if frequency else {},
        "annotated": _read_table(annotated, _is_flag, "true, false, 1 or 0") if annotated else {},
    }
    columns = {name: np.array([float(of.get(i, np.nan)) for i in features]) for name, of in known.items()}
    notes: dict[str, Any] = {}
    for name, path in (("frequency", frequency), ("annotated", annotated)):
        notes[f"n_without_{name}"] = int(np.isnan(columns[name]).sum())
        if path is not None:
            notes[f"n_{name}_without_degree"] = len(known[name].keys() - degree.keys())
    return DegreeTable(
        degrees.name,
        np.array(features, dtype=np.int64),
        np.array([degree[i] for i in features], dtype=np.int64),
        columns["frequency"],
        columns["annotated"],
        notes=notes,
    )


def read_trace(folder: Path, kind: str = RAW, min_active_cells: int = 0) -> DegreeTable:
    """Read the traced features of a folder.

    Args:
        folder: of exhaustive or selective tracing, of one source layer.
        kind: `raw` degrees, by the published edge rule, or `calibrated` ones where the folder holds them.
        min_active_cells: features that fire in fewer cells are counted and left out.

    Raises:
        UserError: the folder holds no trace of one layer, no feature with such a degree, or tables that disagree.
    """
    if holds_layers(folder):
        raise UserError(f"{folder}: holds a trace of several layers; name the folder of one of them (--trace-dir).")
    settings = manifest.open_folder(folder, "exhaustive_feature_tracing")["settings"]
    traced = read_features(folder).filter(pc.field("is_traced")).sort_by("feature")
    _require_agreement(folder, traced)
    is_kept = _floats(traced, "n_cells_active") >= min_active_cells
    degree = _floats(traced, DEGREE_COLUMNS[kind])
    has_degree = ~np.isnan(degree)
    notes = {
        "n_traced": traced.num_rows,
        "min_active_cells": min_active_cells,
        "n_in_fewer_cells": int((~is_kept).sum()),
        "n_without_degree": int((is_kept & ~has_degree).sum()),
        "n_active_in_no_cell": int((_floats(traced, "n_cells_active") == 0).sum()),
    }
    rows = np.flatnonzero(is_kept & has_degree)
    if kind == CALIBRATED and is_kept.any() and not len(rows):
        raise UserError(
            f"{folder}: no traced feature has a calibrated degree, since none is active in enough cells; trace more "
            "cells or with a lower --min-active-cells, or take --degree raw."
        )
    if not len(rows):
        raise UserError(f"{folder}: has no traced feature with a degree; trace first, or lower --min-active-cells.")
    facts = {name: _positive(traced, name)[rows] for name in PREDICTOR_COLUMNS if name in traced.column_names}
    frequency = _positive(traced, "activation_freq")[rows]
    labels = np.array(traced["label"].to_pylist(), dtype=object)[rows]
    return DegreeTable(
        f"Layer {settings['source_layer']}{quantity_note(settings)}",
        traced["feature"].to_numpy()[rows].astype(np.int64),
        degree[rows].astype(np.int64),
        frequency,
        (labels != UNANNOTATED).astype(np.float64),
        facts,
        {**notes, "n_without_frequency": int(np.isnan(frequency).sum()), "n_without_annotated": 0},
    )


def _require_agreement(folder: Path, traced: pa.Table) -> None:
    """`features.parquet` counts the edges that `edges.parquet` holds, unless a run is between writing the two."""
    counted = {entry["values"]: entry["counts"] for entry in pc.value_counts(read_edges(folder)["source"]).to_pylist()}
    said = dict(zip(traced["feature"].to_pylist(), traced["n_edges"].to_pylist(), strict=True))
    if any(counted.get(feature, 0) != n_edges for feature, n_edges in said.items()):
        raise UserError(
            f"{folder}: features.parquet and edges.parquet disagree; make them again with "
            "exhaustive_feature_tracing.py --analysis-only."
        )


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    return table[name].cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)


def _positive(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column with NaN for what is unknown or has no logarithm."""
    values = _floats(table, name)
    return np.where(values > 0, values, np.nan)


def _read_table(path: Path, admits: Callable[[Any], bool], what: str) -> dict[int, float]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f'{path}: is not a table; it must be of the form {{"feature index": value}}.')
    table = {}
    for name, value in content.items():
        if not (name.isascii() and name.isdecimal() and len(name) <= 10 and name == str(int(name))):
            raise UserError(f"{path}: {name[:40]!r} is not a feature index such as 898; name features by their index.")
        if int(name) > MAX_VALUE or not admits(value):
            raise UserError(f"{path}: feature {name} must have {what}, and an index of at most {MAX_VALUE:,}.")
        table[int(name)] = value
    return table


def _is_degree(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_VALUE


def _is_frequency(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _is_flag(value: Any) -> bool:
    return type(value) in (bool, int) and value in (0, 1)
