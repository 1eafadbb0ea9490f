"""Which gene sets are a feature's top genes enriched in, and how often would random genes be?

One gene universe serves the terms and the background: the genes that could be listed at all and that some
term names. Every term kept by its size is in the family of tests, whether it shares a gene with the list
or not. Gene lists are tokens here; no torch, no files.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, hypergeom

from cellcircuits.catalog import UNANNOTATED
from cellcircuits.gene_sets import MAX_TERM_SIZE, MIN_TERM_SIZE, TermTable, indicator

DEFINITIONS = {
    "universe": "genes at enough gene positions of the used cells to be listed, and named by at least one term",
    "terms": "clipped to the universe, then kept by size",
    "p_value": "hypergeometric, at least n_overlap of n_genes listed genes in a term of term_size genes",
    "p_adjusted": "Benjamini-Hochberg within the feature over all kept terms of all ontologies, overlap or not",
    "q_layer": "Benjamini-Hochberg over all kept terms of all tested features of the layer",
    "significant": "p_adjusted <= alpha",
    "odds_ratio": "with 0.5 added to each cell of the table (Haldane), so always finite",
    "rate": "share of tested features with at least one significant term",
    "null_rate": "the same share for gene lists of the same sizes drawn at random from the universe",
}


@dataclass(frozen=True)
class AnnotationSettings:
    """What is tested and called: the shortest list in genes of the universe, `alpha` on the adjusted p."""

    min_list_genes: int = 3
    alpha: float = 0.05
    seed: int = 42
    n_null_lists: int = 1000


@dataclass(frozen=True)
class Enrichment:
    """One entry per (gene list, term) pair that shares a gene, by list then term; all arrays (n_pairs,).

    Pairs that share none are tests too: their p and q are 1.
    """

    row: np.ndarray
    term: np.ndarray
    n_overlap: np.ndarray
    p_value: np.ndarray
    p_adjusted: np.ndarray
    q_layer: np.ndarray


def overlap_p_values(n_overlap: np.ndarray, term_size: np.ndarray, n_genes: np.ndarray, n_universe: int) -> np.ndarray:
    """Chance of at least `n_overlap` shared genes, each distinct (overlap, size, list) computed once."""
    n_sizes, n_lengths = int(term_size.max(initial=0)) + 1, int(n_genes.max(initial=0)) + 1
    triple = (n_overlap.astype(np.int64) * n_sizes + term_size) * n_lengths + n_genes
    distinct, inverse = np.unique(triple, return_inverse=True)
    overlap, size, length = distinct // (n_sizes * n_lengths), distinct // n_lengths % n_sizes, distinct % n_lengths
    return np.clip(hypergeom.sf(overlap - 1, n_universe, size, length), 0.0, 1.0)[inverse]


def adjust(p_values: np.ndarray, n_tests: int) -> np.ndarray:
    """Benjamini-Hochberg over `n_tests` tests, of which those not in `p_values` have p = 1.

        q_(i) = min over j >= i of p_(j) * n_tests / j,   at most 1

    The tests with p = 1 rank last and cannot lower another q, so only their number matters.

    Args:
        p_values: (n,) those below 1 at least; n <= n_tests.
        n_tests: size of the whole family.
    """
    if len(p_values) == 0:
        return np.empty(0)
    return np.minimum(false_discovery_control(p_values) * (n_tests / len(p_values)), 1.0)


def enrich(lists: Sequence[Iterable[int]], table: TermTable) -> Enrichment:
    """Test every gene list against every term.

    Args:
        lists: tokens of each list; those outside the universe do not count.
        table: terms and universe.
    """
    listed = indicator(lists, table.universe)
    n_genes = np.diff(listed.indptr)
    overlap = csr_array(listed @ table.membership)  # (n_lists, n_terms)
    overlap.sort_indices()
    row = np.repeat(np.arange(len(lists)), np.diff(overlap.indptr))
    term = overlap.indices.astype(np.int64)
    p_value = overlap_p_values(overlap.data, table.sizes[term], n_genes[row], len(table.universe))
    p_adjusted = np.empty_like(p_value)
    for start, stop in zip(overlap.indptr[:-1], overlap.indptr[1:], strict=True):
        p_adjusted[start:stop] = adjust(p_value[start:stop], len(table.terms))
    q_layer = adjust(p_value, len(lists) * len(table.terms))
    return Enrichment(row, term, overlap.data, p_value, p_adjusted, q_layer)


def annotated_share(enrichment: Enrichment, n_lists: int, alpha: float) -> float:
    """Share of the lists with at least one term of adjusted p <= alpha; 0 for no list."""
    return len(np.unique(enrichment.row[enrichment.p_adjusted <= alpha])) / max(n_lists, 1)


def random_lists(sizes: Sequence[int], table: TermTable, settings: AnnotationSettings) -> list[list[int]]:
    """Draw gene lists of the given sizes from the universe, as many rounds as give enough lists."""
    rng = np.random.default_rng(settings.seed)
    n_rounds = math.ceil(settings.n_null_lists / len(sizes)) if len(sizes) else 0
    return [
        table.universe[rng.choice(len(table.universe), size, replace=False)].tolist()
        for _ in range(max(n_rounds, 1))
        for size in sizes
    ]


def annotate_catalog(catalog: Mapping[str, Any], table: TermTable, settings: AnnotationSettings) -> dict[str, Any]:
    """Make `feature_annotations.json`: summary, significant terms and one label per feature with top genes.

    Args:
        catalog: what `feature_stats` made; `top_genes` of each feature is its gene list.
        table: terms and universe.
        settings: thresholds and the seed of the null.
    """
    members = set(table.universe.tolist())
    listed = {
        feature["feature_idx"]: [gene["gene_id"] for gene in feature["top_genes"] if gene["gene_id"] in members]
        for feature in catalog["features"]
        if feature["top_genes"]
    }
    tested = [index for index, tokens in listed.items() if len(tokens) >= settings.min_list_genes]
    lists = [listed[index] for index in tested]
    symbols = {g["gene_id"]: g["gene_name"] for feature in catalog["features"] for g in feature["top_genes"]}
    enrichment = enrich(lists, table)
    entries = _significant_entries(enrichment, table, lists, symbols, settings.alpha)
    null_lists = random_lists([len(tokens) for tokens in lists], table, settings)
    labels = {str(index): _no_label() for index in listed}
    for row, label in _best_terms(enrichment, table, settings.alpha).items():
        labels[str(tested[row])] = label
    return {
        "summary": {
            "n_features": len(catalog["features"]),
            "n_tested": len(tested),
            "n_annotated": len(entries),
            "rate": annotated_share(enrichment, len(lists), settings.alpha),
            "null_rate": annotated_share(enrich(null_lists, table), len(null_lists), settings.alpha),
            "n_null_lists": len(null_lists),
            "n_annotated_layer_wide": len(np.unique(enrichment.row[enrichment.q_layer <= settings.alpha])),
            "n_terms": len(table.terms),
            "n_universe": len(table.universe),
            "ontologies": _count_by_ontology(table),
            "min_term_size": MIN_TERM_SIZE,
            "max_term_size": MAX_TERM_SIZE,
            "min_list_genes": settings.min_list_genes,
            "alpha": settings.alpha,
            "seed": settings.seed,
            "definitions": DEFINITIONS,
        },
        "feature_annotations": {str(tested[row]): found for row, found in entries.items()},
        "labels": labels,
    }


def _significant_entries(
    enrichment: Enrichment,
    table: TermTable,
    lists: Sequence[Sequence[int]],
    symbols: Mapping[int, str],
    alpha: float,
) -> dict[int, list[dict[str, Any]]]:
    """Significant terms per list, by q, then p, then term, so that the first of an ontology is its best."""
    entries: dict[int, list[dict[str, Any]]] = {}
    term_tokens = table.membership.tocsc()
    for pair in np.flatnonzero(enrichment.p_adjusted <= alpha):
        row, term = int(enrichment.row[pair]), int(enrichment.term[pair])
        tokens = table.universe[term_tokens.indices[term_tokens.indptr[term] : term_tokens.indptr[term + 1]]]
        shared = set(tokens.tolist())
        ontology, name = table.terms[term]
        size, n_genes, n_overlap = int(table.sizes[term]), len(lists[row]), int(enrichment.n_overlap[pair])
        entry = {
            "ontology": ontology,
            "term": name,
            "p_value": float(enrichment.p_value[pair]),
            "p_adjusted": float(enrichment.p_adjusted[pair]),
            "q_layer": float(enrichment.q_layer[pair]),
            "n_overlap": n_overlap,
            "term_size": size,
            "n_genes": n_genes,
            "odds_ratio": odds_ratio(n_overlap, size, n_genes, len(table.universe)),
            "overlap_genes": [symbols[token] for token in lists[row] if token in shared],
            "significant": True,
        }
        entries.setdefault(row, []).append(entry)
    for found in entries.values():
        found.sort(key=lambda entry: (entry["p_adjusted"], entry["p_value"], entry["term"], entry["ontology"]))
    return entries


def odds_ratio(n_overlap: int, term_size: int, n_genes: int, n_universe: int) -> float:
    """Haldane-corrected odds ratio of list membership and term membership; always finite."""
    neither = n_universe - term_size - n_genes + n_overlap
    return (n_overlap + 0.5) * (neither + 0.5) / ((n_genes - n_overlap + 0.5) * (term_size - n_overlap + 0.5))


def _best_terms(enrichment: Enrichment, table: TermTable, alpha: float) -> dict[int, dict[str, Any]]:
    """For each list that shares a gene with some term: its term of smallest q (then p, then name)."""
    by_name = sorted(range(len(table.terms)), key=lambda term: (table.terms[term][1], table.terms[term][0]))
    name_rank = np.empty(len(by_name), dtype=np.int64)
    name_rank[by_name] = np.arange(len(by_name))
    order = np.lexsort((name_rank[enrichment.term], enrichment.p_value, enrichment.p_adjusted, enrichment.row))
    rows, first = np.unique(enrichment.row[order], return_index=True)
    return {int(row): _label(enrichment, table, int(pair), alpha) for row, pair in zip(rows, order[first], strict=True)}


def _label(enrichment: Enrichment, table: TermTable, pair: int, alpha: float) -> dict[str, Any]:
    ontology, term = table.terms[int(enrichment.term[pair])]
    significant = bool(enrichment.p_adjusted[pair] <= alpha)
    return {
        "label": term if significant else UNANNOTATED,
        "ontology": ontology,
        "p_value": float(enrichment.p_value[pair]),
        "p_adjusted": float(enrichment.p_adjusted[pair]),
        "significant": significant,
        "best_term": term,
    }


def _no_label() -> dict[str, Any]:
    return {
        "label": UNANNOTATED,
        "ontology": None,
        "p_value": None,
        "p_adjusted": None,
        "significant": False,
        "best_term": None,
    }


def _count_by_ontology(table: TermTable) -> dict[str, int]:
    ontologies = [ontology for ontology, _ in table.terms]
    return {ontology: ontologies.count(ontology) for ontology in dict.fromkeys(ontologies)}
