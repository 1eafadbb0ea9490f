"""Which features of a layer are best annotated, by the rule of the published selective tracing.

An honest test leaves few features with a significant term, so those without one follow, by their best term;
every chosen feature says which of the two it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellcircuits.catalog import PREFERRED_ONTOLOGIES, FeatureInfo, read_annotations
from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json
from cellcircuits.pathways import Pathway, pathway_of

MIN_TOP_GENES = 10
MIN_FREQUENCY = 0.01
MAX_ONTOLOGIES = 6
SMALLEST_P = 1e-30
N_FEATURES = 30


@dataclass(frozen=True)
class AnnotatedFeature:
    """One chosen feature.

    Attributes:
        layer: its layer.
        index: its index in the SAE.
        label: its label in the study's sense: `unannotated` without a significant term.
        best_term: the label's term or, without one, the term of smallest adjusted p.
        best_term_significant: whether `best_term` is a significant one.
        p_adjusted: smallest adjusted p of its significant terms, else that of `best_term`; None where not given.
        p_value: raw p of `best_term`; 1.0 where not given. Breaks ties of the score.
        score: what it was chosen by.
        pathway: the pathway that `best_term` is filed under.
        activation_freq: share of token positions where it fires.
    """

    layer: int
    index: int
    label: str
    best_term: str
    best_term_significant: bool
    p_adjusted: float | None
    p_value: float
    score: float
    pathway: str | None
    activation_freq: float


def best_annotated(
    layer: int,
    catalog: Mapping[int, FeatureInfo],
    annotations_path: Path,
    pathways: Sequence[Pathway],
    n_features: int = N_FEATURES,
) -> list[AnnotatedFeature]:
    """Choose the best annotated features of one layer.

        score = 10 n_ontologies + n_entries - log10(max(min p_adjusted, 1e-30))

    with at most 6 ontologies, over the significant entries; a feature without any has n_ontologies = n_entries
    = 0 and the p of its best term. Ties go to the smaller raw p of the best term, then to the lower index.

    Args:
        layer: the layer, for the record.
        catalog: its features; those with 10 top genes or more that fire at 1% of the positions or more count.
        annotations_path: its `feature_annotations.json`.
        pathways: the table that files terms.
        n_features: most features to choose.

    Returns:
        The chosen features, best first.

    Raises:
        UserError: no annotations, a damaged file, or no feature that counts.
    """
    if not annotations_path.is_file():
        raise UserError(
            f"{annotations_path}: no such file, so nothing says which features of layer {layer} are well annotated; "
            "make it with prepare_inputs.py --existing-saes --gmt ONTOLOGY=FILE."
        )
    entries, labels = read_annotations(annotations_path), _read_labels(annotations_path)
    candidates = []
    for info in catalog.values():
        where = f"{annotations_path}: feature {info.index}"
        significant, best = entries.get(str(info.index)), labels.get(str(info.index))
        if len(info.top_genes) < MIN_TOP_GENES or (info.activation_freq or 0.0) < MIN_FREQUENCY:
            continue
        if significant:
            candidates.append(_by_entries(layer, info, significant, pathways, where))
        elif best and best.get("best_term"):
            candidates.append(_by_best_term(layer, info, best, pathways, where))
    if not candidates:
        raise UserError(
            f"{annotations_path}: no feature of layer {layer} has a term, {MIN_TOP_GENES} top genes in the catalog and "
            f"activation_freq >= {MIN_FREQUENCY}; choose other --source-layers, or annotate with more gene sets."
        )
    return sorted(candidates, key=lambda feature: (-feature.score, feature.p_value, feature.index))[:n_features]


def best_terms(catalog: Mapping[int, FeatureInfo], annotations_path: Path) -> dict[int, tuple[str, bool]]:
    """The best term of every feature that has one, and whether it is significant: {index: (term, significant)}.

    Raises:
        UserError: the annotations are damaged.
    """
    if not annotations_path.is_file():
        return {}
    significant, labels = read_annotations(annotations_path), _read_labels(annotations_path)
    found = {}
    for index, info in catalog.items():
        term = labels.get(str(index), {}).get("best_term")
        if significant.get(str(index)):
            found[index] = (info.label, True)
        elif isinstance(term, str) and term.strip():
            found[index] = (" ".join(term.split()), False)
    return found


def annotation_score(n_ontologies: int, n_entries: int, p_adjusted: float) -> float:
    """10 per ontology (6 at most), 1 per entry, and the decades of the smallest adjusted p (30 at most)."""
    return 10 * min(n_ontologies, MAX_ONTOLOGIES) + n_entries - math.log10(max(p_adjusted, SMALLEST_P))


def _by_entries(
    layer: int, info: FeatureInfo, entries: Sequence[Mapping[str, Any]], pathways: Sequence[Pathway], where: str
) -> AnnotatedFeature:
    # the entry that names the feature: the rule of `catalog.label_of`
    naming = next((entry for entry in entries if entry.get("ontology") in PREFERRED_ONTOLOGIES), entries[0])
    adjusted = [p for p in (_probability(entry, "p_adjusted", where) for entry in entries) if p is not None]
    p_value = _probability(naming, "p_value", where)
    n_ontologies = len({str(entry.get("ontology")) for entry in entries})
    return AnnotatedFeature(
        layer=layer,
        index=info.index,
        label=info.label,
        best_term=info.label,
        best_term_significant=True,
        p_adjusted=min(adjusted, default=None),
        p_value=1.0 if p_value is None else p_value,
        score=annotation_score(n_ontologies, len(entries), min(adjusted, default=1.0)),
        pathway=pathway_of(info.label, pathways),
        activation_freq=info.activation_freq or 0.0,
    )


def _by_best_term(
    layer: int, info: FeatureInfo, best: Mapping[str, Any], pathways: Sequence[Pathway], where: str
) -> AnnotatedFeature:
    term = best["best_term"]
    if not isinstance(term, str):
        raise UserError(f"{where}: `best_term` is {term!r}, expected a text.")
    p_adjusted, p_value = (_probability(best, key, where) for key in ("p_adjusted", "p_value"))
    return AnnotatedFeature(
        layer=layer,
        index=info.index,
        label=info.label,
        best_term=" ".join(term.split()),
        best_term_significant=False,
        p_adjusted=p_adjusted,
        p_value=1.0 if p_value is None else p_value,
        score=annotation_score(0, 0, 1.0 if p_adjusted is None else p_adjusted),
        pathway=pathway_of(term, pathways),
        activation_freq=info.activation_freq or 0.0,
    )


def _probability(entry: Mapping[str, Any], key: str, where: str) -> float | None:
    """A p of an entry; None where it has none, as the edge types of published annotations."""
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise UserError(f"{where}: `{key}` is {value!r}, expected a number from 0 to 1.")
    return float(value)


def _read_labels(path: Path) -> dict[str, dict[str, Any]]:
    """The `labels` table; empty for published files, which have none."""
    labels = read_json(path).get("labels", {})
    if not isinstance(labels, dict) or not all(isinstance(label, dict) for label in labels.values()):
        raise UserError(f"{path}: `labels` is not a table with one table per feature; make it again with --relabel.")
    return labels
