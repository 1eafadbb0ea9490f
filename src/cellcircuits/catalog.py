"""Feature catalog and labels: which features exist, how often they fire, what they are called."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellcircuits.errors import UserError, printable
from cellcircuits.jsonio import read_json

UNANNOTATED = "unannotated"
MIN_ACTIVATION_FREQ = 0.001  # below it a feature is dead to the experiments
N_GENES_SHOWN = 4
PREFERRED_ONTOLOGIES = ("GO_BP", "KEGG", "Reactome")


@dataclass(frozen=True)
class FeatureInfo:
    """One feature.

    `activation_freq` is its share of token positions, 0 to 1, `mean_activation` its mean latent over all of them; None
    where there is no catalog, or none that says so.
    """

    index: int
    activation_freq: float | None
    label: str
    top_genes: tuple[str, ...]
    mean_activation: float | None = None


def load_catalog(path: Path, annotations_path: Path | None, n_features: int) -> dict[int, FeatureInfo]:
    """Read `feature_catalog.json` and, where there is one, `feature_annotations.json`.

    Args:
        path: the catalog.
        annotations_path: the labels; None leaves every feature `unannotated`.
        n_features: latents of the SAE that the catalog describes.

    Returns:
        {feature index: FeatureInfo} in ascending order.

    Raises:
        UserError: a file is damaged, lacks a key, or speaks of a feature that the SAE does not have.
    """
    content = read_json(path)
    annotations = read_annotations(annotations_path) if annotations_path else {}
    try:
        features = [_feature_info(entry, annotations) for entry in content["features"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: not a feature catalog ({type(error).__name__}: {error}).") from None
    for feature in features:
        if not 0 <= feature.index < n_features:
            raise UserError(f"{path}: names feature {feature.index}, but the SAE has features 0 to {n_features - 1}.")
    catalog = {feature.index: feature for feature in sorted(features, key=lambda feature: feature.index)}
    if len(catalog) != len(features):
        raise UserError(f"{path}: lists a feature_idx twice; make the catalog again with prepare_inputs.py.")
    return catalog


def read_annotations(path: Path) -> Mapping[str, list[dict[str, Any]]]:
    """Read `{"feature_annotations": {"<idx>": [{"ontology", "term", ...}]}}`.

    Raises:
        UserError: the file is damaged or of another form.
    """
    content = read_json(path)
    annotations = content.get("feature_annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, dict):
        raise UserError(f"{path}: has no `feature_annotations` table.")
    for index, entries in annotations.items():
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("term"), str) for entry in entries
        ):
            raise UserError(f"{path}: feature {index} needs a list of entries that each have a `term`.")
    return annotations


def label_of(entries: list[dict[str, Any]]) -> str:
    """The term of the first GO_BP, KEGG or Reactome entry, else of the first entry, else `unannotated`."""
    for entry in entries:
        if entry.get("ontology") in PREFERRED_ONTOLOGIES:
            return _printable(entry["term"])
    return _printable(entries[0]["term"]) if entries else UNANNOTATED


def display_name(label: str, top_genes: Sequence[str]) -> str:
    """The label or, without one, the first top genes in parentheses."""
    if label != UNANNOTATED or not top_genes:
        return label
    return f"({', '.join(top_genes[:N_GENES_SHOWN])})"


def _printable(text: str) -> str:
    """One line, whatever the file holds."""
    return printable(" ".join(text.split()))


def _feature_info(entry: Mapping[str, Any], annotations: Mapping[str, list[dict[str, Any]]]) -> FeatureInfo:
    index, frequency = entry["feature_idx"], float(entry["activation_freq"])
    if type(index) is not int:
        raise ValueError(f"feature_idx {index!r} is not an integer")
    if not 0.0 <= frequency <= 1.0:
        raise ValueError(f"feature {index} has activation_freq {frequency}, expected a share from 0 to 1")
    genes = tuple(_printable(str(gene.get("gene_name", gene.get("gene_id")))) for gene in entry.get("top_genes", ()))
    label, mean = label_of(annotations.get(str(index), [])), entry.get("mean_activation")
    # only matching by size needs it, so what is none is left out
    is_size = isinstance(mean, int | float) and not isinstance(mean, bool) and 0 <= mean < math.inf
    return FeatureInfo(index, frequency, label, genes, float(mean) if is_size else None)
