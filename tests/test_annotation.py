"""Gene sets and enrichment against one-pair-at-a-time references."""

import numpy as np
import pytest
from scipy.stats import fisher_exact
from statsmodels.stats.multitest import multipletests

from cellcircuits.annotation import (
    AnnotationSettings,
    adjust,
    annotate_catalog,
    enrich,
    odds_ratio,
    overlap_p_values,
    random_lists,
)
from cellcircuits.catalog import label_of
from cellcircuits.errors import UserError
from cellcircuits.gene_sets import GeneSet, build_term_table, read_gmt, resolve, tokens_by_name


def gene_sets(n_terms=40, n_genes=200, seed=0, ontology="GO_BP"):
    rng = np.random.default_rng(seed)
    return [
        GeneSet(ontology, f"term {number}", frozenset(rng.choice(n_genes, rng.integers(3, 40), replace=False).tolist()))
        for number in range(n_terms)
    ]


@pytest.fixture
def table():
    return build_term_table(gene_sets(), range(10, 190))


@pytest.fixture
def lists():
    rng = np.random.default_rng(1)
    return [rng.choice(200, size, replace=False).tolist() for size in (20, 3, 11, 20, 7)]


def catalog_of(lists):
    features = [
        {"feature_idx": index, "top_genes": [{"gene_id": token, "gene_name": f"G{token}"} for token in tokens]}
        for index, tokens in enumerate(lists)
    ]
    return {"features": features}


def test_terms_are_clipped_to_the_universe_before_the_size_filter():
    sets = [
        GeneSet("KEGG", "clipped too small", frozenset(range(100, 110))),
        GeneSet("KEGG", "kept", frozenset(range(0, 9))),
        GeneSet("KEGG", "large before, fits after", frozenset([*range(0, 20), *range(1000, 1600)])),
        GeneSet("KEGG", "too large", frozenset(range(0, 600))),
    ]
    table = build_term_table(sets, [*range(0, 104), *range(5000, 5600)])
    assert table.universe.tolist() == list(range(104))  # 5000 and up: in no term
    assert [term for _, term in table.terms] == ["kept", "large before, fits after", "too large"]
    assert table.sizes.tolist() == [9, 20, 104]
    assert np.asarray(table.membership.sum(axis=0)).ravel().tolist() == table.sizes.tolist()


def test_no_term_left_and_a_name_twice_are_user_errors():
    with pytest.raises(UserError, match="5 to 500 genes"):
        build_term_table(gene_sets(), range(4))
    with pytest.raises(UserError, match=r"'term 0' of GO_BP is in two"):
        build_term_table(gene_sets() + gene_sets(seed=3), range(200))


def test_p_values_equal_fishers_exact_test_of_every_pair(table, lists):
    enrichment = enrich(lists, table)
    found = {
        (int(row), int(term)): p
        for row, term, p in zip(enrichment.row, enrichment.term, enrichment.p_value, strict=True)
    }
    universe = set(table.universe.tolist())
    members = [
        set(table.universe[table.membership.toarray()[:, term] > 0].tolist()) for term in range(len(table.terms))
    ]
    for row, tokens in enumerate(lists):
        listed = set(tokens) & universe
        for term, genes in enumerate(members):
            a = len(listed & genes)
            square = [[a, len(listed) - a], [len(genes) - a, len(universe) - len(listed) - len(genes) + a]]
            expected = fisher_exact(square, alternative="greater").pvalue
            assert found.get((row, term), 1.0) == pytest.approx(expected, rel=1e-9)


def test_adjustment_counts_every_kept_term(table, lists):
    enrichment = enrich(lists, table)
    dense = np.ones((len(lists), len(table.terms)))
    dense[enrichment.row, enrichment.term] = enrichment.p_value
    per_list = np.stack([multipletests(row, method="fdr_bh")[1] for row in dense])
    layer = multipletests(dense.ravel(), method="fdr_bh")[1].reshape(dense.shape)
    np.testing.assert_allclose(enrichment.p_adjusted, per_list[enrichment.row, enrichment.term], rtol=1e-12)
    np.testing.assert_allclose(enrichment.q_layer, layer[enrichment.row, enrichment.term], rtol=1e-12)
    untested = np.ones_like(dense, dtype=bool)
    untested[enrichment.row, enrichment.term] = False
    assert (per_list[untested] == 1).all() and (layer[untested] == 1).all()


@pytest.mark.parametrize("p_values", [[], [1.0], [0.0, 0.0], [0.04, 0.01, 0.04, 1.0, 0.3]])
def test_adjust_with_ones_left_out(p_values):
    padded = multipletests([*p_values, 1.0, 1.0, 1.0], method="fdr_bh")[1]
    np.testing.assert_allclose(adjust(np.array(p_values), len(p_values) + 3), padded[: len(p_values)])


def test_p_values_stay_in_range_at_the_edges():
    p_values = overlap_p_values(np.array([0, 5, 20]), np.array([5, 5, 500]), np.array([20, 20, 20]), 500)
    assert p_values[0] == 1 and 0 < p_values[1] < 1e-6 and p_values[2] == 1


def test_odds_ratio_is_finite_when_the_list_is_inside_the_term():
    assert odds_ratio(3, 3, 3, 100) == pytest.approx(3.5 * 97.5 / (0.5 * 0.5))


def test_random_lists_are_rarely_annotated_and_planted_ones_are():
    table = build_term_table(gene_sets(n_terms=400, n_genes=2000), range(2000))
    settings = AnnotationSettings()
    planted = [table.universe[table.membership.toarray()[:, term] > 0][:10].tolist() for term in range(30)]
    annotations = annotate_catalog(catalog_of([tokens for tokens in planted if len(tokens) >= 5]), table, settings)
    summary = annotations["summary"]
    assert summary["rate"] == 1.0
    assert summary["null_rate"] < 0.05 and summary["n_null_lists"] >= settings.n_null_lists
    sizes = [len(tokens) for tokens in random_lists([4, 9], table, settings)]
    assert sizes == [4, 9] * 500


def test_annotations_of_a_catalog():
    table = build_term_table(gene_sets(n_terms=60, n_genes=500) + gene_sets(20, 500, 5, "KEGG"), range(500))
    genes = table.universe[table.membership.toarray()[:, 7] > 0][:8].tolist()
    lists = [genes, [], genes[:2], [5000, 5001, 5002], table.universe[[0, 50, 100, 150]].tolist()]
    annotations = annotate_catalog(catalog_of(lists), table, AnnotationSettings())
    assert set(annotations["labels"]) == {"0", "2", "3", "4"}
    entries = annotations["feature_annotations"]["0"]
    assert entries == sorted(entries, key=lambda e: (e["p_adjusted"], e["p_value"], e["term"], e["ontology"]))
    assert all(entry["significant"] and entry["p_adjusted"] <= 0.05 for entry in entries)
    first = entries[0]
    assert (first["ontology"], first["term"]) == table.terms[7]
    assert first["n_overlap"] == first["n_genes"] == 8 and first["term_size"] == table.sizes[7]
    assert first["overlap_genes"] == [f"G{token}" for token in genes]
    label = annotations["labels"]["0"]
    assert label["label"] == label["best_term"] == label_of(entries) == first["term"]
    assert (label["p_value"], label["p_adjusted"]) == (first["p_value"], first["p_adjusted"])
    unlabelled = annotations["labels"]["4"]
    assert unlabelled["label"] == "unannotated" and not unlabelled["significant"]
    assert unlabelled["best_term"] is not None and unlabelled["p_adjusted"] > 0.05
    assert annotations["labels"]["2"]["best_term"] is None  # too short a list to test
    assert annotations["summary"]["n_tested"] == 2 and annotations["summary"]["n_annotated"] == 1


def test_a_catalog_without_any_list(table):
    annotations = annotate_catalog(catalog_of([[], []]), table, AnnotationSettings())
    assert annotations["labels"] == {} and annotations["summary"]["null_rate"] == 0


def test_gmt_takes_symbols_of_any_case_ensembl_ids_and_weights(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text(
        "\ufeffFirst term\tabout it\ttp53\tENSG00000000002.7\tUnknown\t\r\n\nSecond\t\tBRCA1,1.0\n", "utf-8"
    )
    token_of_name = tokens_by_name(
        {"ENSG00000000001": 4, "ENSG00000000002": 5, "ENSG00000000003": 6},
        {"TP53": "ENSG00000000001", "Brca1": "ENSG00000000003", "BRCA1": "ENSG00000000002", "OUT": "ENSG9"},
    )
    first, second = resolve(read_gmt(path, "KEGG"), token_of_name)
    assert first == GeneSet("KEGG", "First term", frozenset({4, 5}))
    assert second == GeneSet("KEGG", "Second", frozenset({5}))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ok\td\tG1\nno genes\tdescription\n", "line 2"),
        ("no tabs at all", "line 1"),
        ("\td\tG1\n", "line 1"),
        ("a\td\tG1\na\td\tG2\n", "line 2.*twice"),
        ("\n", "no gene set"),
    ],
)
def test_malformed_gmt_names_file_and_line(tmp_path, text, named):
    path = tmp_path / "bad.gmt"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"bad\.gmt.*{named}"):
        read_gmt(path, "GO_BP")


def test_unreadable_or_foreign_gmt(tmp_path):
    with pytest.raises(UserError, match=r"none\.gmt"):
        read_gmt(tmp_path / "none.gmt", "GO_BP")
    binary = tmp_path / "binary.gmt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_gmt(binary, "GO_BP")
    mouse = tmp_path / "mouse.gmt"
    mouse.write_text("term\td\tNope1\n")
    with pytest.raises(UserError, match="none of its genes"):
        resolve(read_gmt(mouse, "GO_BP"), {"TP53": 4})
