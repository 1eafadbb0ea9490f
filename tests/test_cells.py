"""Cells from .h5ad files: rows, matrices, gene ids, refusals and the report."""

import json
import math
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cell_fixtures import (
    DICTS,
    GENES,
    N_V1,
    N_V2,
    ensembl,
    load,
    random_counts,
    refusal,
    slow_tokens,
    tokens_of,
    vocabulary,
    write_cells,
)
from cellcircuits.cell_rows import draw_rows
from cellcircuits.cells import CellSelection
from cellcircuits.errors import UserError
from cellcircuits.genes import gene_id, match_genes
from cellcircuits.h5ad import H5adFile
from cellcircuits.vocabulary import load_vocabulary

SRC = Path(__file__).parents[1] / "src"
needs_dicts = pytest.mark.skipif(not DICTS.is_dir(), reason="the published dictionaries are not here")


# Storage


@pytest.mark.parametrize("tokenization", ["published", "geneformer"])
def test_five_genes_from_a_file(tmp_path, tokenization):
    counts = np.array([[1, 8, 0, 4, 7]], dtype=np.float32)
    cells = load(write_cells(tmp_path / "a.h5ad", counts, GENES[:5]), vocabulary(5), tokenization=tokenization).cells
    expected = {"published": [2, 10, 11, 14, 13, 3], "geneformer": [2, 11, 14, 10, 13, 3]}
    assert cells[0].tokens.tolist() == expected[tokenization]
    assert cells[0].gene_positions.tolist() == [1, 2, 3, 4]
    assert (cells[0].name, cells[0].row) == ("cell0", 0)


@pytest.mark.parametrize("tokenization", ["published", "geneformer"])
def test_every_storage_gives_the_cells_of_the_slow_version(tmp_path, monkeypatch, tokenization):
    monkeypatch.setattr("cellcircuits.h5ad.BLOCK_BYTES", 700)  # several blocks of rows and of columns
    counts = random_counts()
    genes = [*GENES[:9], GENES[2], "unknown", GENES[0]]
    expected = [[2, *slow_tokens(row, genes, vocabulary(), tokenization), 3] for row in counts]
    sets = []
    for name, stored in (
        ("dense", counts),
        ("csr", sparse.csr_matrix(counts)),
        ("csc", sparse.csc_matrix(counts)),
        ("integers", sparse.csr_matrix(counts.astype(np.int32))),
        ("doubles", counts.astype(np.float64)),
    ):
        path = write_cells(tmp_path / f"{name}.h5ad", stored, _unique(genes), var={"id": genes})
        sets.append(load(path, gene_column="id", tokenization=tokenization))
        assert tokens_of(sets[-1]) == expected, name
    assert len({cells.fingerprint() for cells in sets}) == 1


def _unique(genes):
    return [f"row{number}" for number in range(len(genes))]


def test_chunked_and_compressed_dense_matrix(tmp_path):
    counts = random_counts()
    path = write_cells(tmp_path / "a.h5ad", counts, GENES)
    plain = load(path, n_cells=7)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", data=counts, chunks=(4, 5), compression="gzip")
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    assert load(path, n_cells=7).fingerprint() == plain.fingerprint()


def test_only_wanted_rows_are_read(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", random_counts(1000), GENES)
    rows = np.array([3, 500, 998])
    with H5adFile(path) as file:
        blocks = list(file.blocks("X", rows, (1000, 12)))
    assert sum(block.shape[0] for block in blocks) == 3
    np.testing.assert_array_equal(np.vstack([block.toarray() for block in blocks]), random_counts(1000)[rows])


# Rows


def test_draw_is_the_legacy_one():
    rows = np.arange(5000)[::2]
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(42)  # noqa: NPY002
    expected = np.sort(np.random.choice(rows, 2000, replace=False))  # noqa: NPY002
    np.random.set_state(state)  # noqa: NPY002
    np.testing.assert_array_equal(draw_rows(rows, 2000, 2500, 42), expected)
    np.testing.assert_array_equal(draw_rows(rows, 2000, 50, 42), expected[:50])
    np.testing.assert_array_equal(draw_rows(rows[:2000], 2000, 50, 42), rows[:50])


def test_draw_from_a_file_and_fewer_cells_than_asked(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", random_counts(40), GENES)
    drawn = load(path, pool=10, n_cells=5)
    expected = np.sort(np.random.RandomState(42).choice(np.arange(40), 5, replace=False))
    assert [cell.row for cell in drawn.cells] == expected.tolist()  # over the whole file, not the start of a pool
    assert load(path, pool=10, n_cells=5, seed=7).fingerprint() != drawn.fingerprint()
    assert len(load(path, n_cells=500).cells) == 40


def obs_table(n_cells=30):
    return {
        "gene": pd.Categorical(np.resize(["non-targeting", "GATA1", "Non-targeting", "MYC", "non_targeting"], n_cells)),
        "cell_line": np.resize(["K562", "K562", "RPE1"], n_cells),
        "batch": np.resize([1, 2], n_cells),
        "good": np.resize([True, False], n_cells),
    }


def test_controls_and_filters(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", random_counts(), GENES, obs_table())
    assert [cell.row for cell in load(path, cells="controls", n_cells=6).cells] == [0, 2, 4, 5, 7, 9]
    one_line = load(path, cells="controls", obs_filters=(("cell_line", "RPE1"),))
    assert [cell.row for cell in one_line.cells] == [2, 5, 14, 17, 20, 29]
    numbers = load(path, obs_filters=(("batch", "2"), ("good", "False"), ("cell_line", "RPE1")))
    assert [cell.row for cell in numbers.cells] == [5, 11, 17, 23, 29]
    either = load(path, obs_filters=(("gene", "MYC"), ("gene", "GATA1")))
    assert [cell.row % 5 for cell in either.cells] == [1, 3] * 6


def test_report_names_a_mixture_of_cell_lines(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", random_counts(), GENES, obs_table())
    (note,) = load(path, cells="controls").report["notes"]
    assert "18 control cells mix 2 cell lines: K562 (12, 66.7%), RPE1 (6, 33.3%)" in note
    assert load(path, cells="controls", obs_filters=(("cell_line", "K562"),)).report["notes"] == []
    assert load(path).report["notes"] == []


def test_refusals_about_rows(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", random_counts(), GENES, obs_table())
    message = refusal(path, obs_filters=(("tissue", "Blood"),))
    assert "no column 'tissue'" in message and "gene, cell_line, batch, good" in message
    message = refusal(path, obs_filters=(("cell_line", "HepG2"),))
    assert "K562 (20, 66.7%), RPE1 (10, 33.3%)" in message
    message = refusal(path, obs_filters=(("cell_line", "RPE1"), ("batch", "3")))
    assert "among those that pass" in message and "1 (5" in message
    message = refusal(path, cells="controls", control_column="target")
    assert "no column 'target'" in message and "cell_line" in message and "--cells all" in message
    message = refusal(path, cells="controls", control_values=("ctrl",))
    assert "never ctrl" in message and "GATA1 (6, 20.0%)" in message and "--cells all" in message


def test_missing_values_of_a_filter_column(tmp_path):
    obs = {"cell_line": pd.Categorical(["K562", None, "K562", None])}
    path = write_cells(tmp_path / "a.h5ad", random_counts(4), GENES, obs)
    assert [cell.row for cell in load(path, obs_filters=(("cell_line", "K562"),)).cells] == [0, 2]
    assert "(missing) (2, 50.0%)" in refusal(path, obs_filters=(("cell_line", "nan"),))


# Gene ids


@pytest.mark.parametrize(
    "identifier, expected",
    [
        (ensembl(3), (ensembl(3), "ensembl")),
        (f"{ensembl(3)}.14", (ensembl(3), "ensembl")),
        (f"{ensembl(3)}.14_PAR_Y", (ensembl(3), "ensembl")),
        (f"{ensembl(3)}_PAR_Y", (ensembl(3), "ensembl")),
        ("ENSGR0000000003", (ensembl(3), "ensembl")),
        (f" {ensembl(3)} ", (ensembl(3), "ensembl")),
        ("GENE3", (ensembl(3), "symbol")),
        ("gene3", None),
        (ensembl(99), None),
        ("ENST00000000003", None),
        ("", None),
    ],
)
def test_gene_id(identifier, expected):
    assert gene_id(identifier, vocabulary()) == expected


def test_every_kind_of_id_gives_the_same_tokens(tmp_path):
    counts = random_counts()
    kinds = {
        "plain": GENES,
        "versioned": [f"{gene}.{number}" for number, gene in enumerate(GENES)],
        "symbols": [f"GENE{number}" for number in range(1, 13)],
        "mixed": [gene if number % 2 else f"GENE{number + 1}" for number, gene in enumerate(GENES)],
    }
    sets = {kind: load(write_cells(tmp_path / f"{kind}.h5ad", counts, ids)) for kind, ids in kinds.items()}
    assert len({cells.fingerprint() for cells in sets.values()}) == 1
    counted = {kind: cells.report["n_mapped_by_symbol"] for kind, cells in sets.items()}
    assert counted == {"plain": 0, "versioned": 0, "symbols": 12, "mixed": 6}


def test_best_column_is_chosen(tmp_path):
    counts = random_counts()
    symbols = [f"GENE{number}" for number in range(1, 13)]
    var = {
        "n_cells": np.arange(12),
        "some": [*GENES[:6], *["?"] * 6],
        "feature_name": pd.Categorical(symbols),
        "gene_ids": GENES,
    }
    path = write_cells(tmp_path / "a.h5ad", counts, _unique(GENES), var=var)
    cells = load(path)
    assert cells.report["gene_column"] == "feature_name"  # gene_ids is as good, but later
    assert load(path, gene_column="gene_ids").fingerprint() == cells.fingerprint()
    assert load(path, gene_column="some", min_mapped=0.1).report["n_genes_mapped"] == 6
    assert "0 of 12 genes" in refusal(path, gene_column="index")
    assert "0 of 12 genes" in refusal(path, gene_column="n_cells")
    message = refusal(path, gene_column="symbol")
    assert "no column 'symbol' (--gene-column)" in message and "index, n_cells, some, feature_name" in message


def test_share_of_counts_decides_not_number_of_genes():
    var = pd.DataFrame({"many": ["GENE1", "GENE2", "?"], "heavy": ["?", "?", "GENE3"]}, index=["a", "b", "c"])
    match = match_genes(var, "auto", np.array([1.0, 1.0, 8.0]), vocabulary(), "file: var")
    assert (match.column, match.n_mapped, match.share_mapped) == ("heavy", 1, 0.8)
    assert match.unmapped_examples == ("?", "?")


def test_columns_of_one_gene_are_summed_and_reported(tmp_path):
    ids = [GENES[4], GENES[3], "GENE5", f"{GENES[4]}.2", "other"]
    counts = np.array([[3, 7, 3, 3, 4], [1, 7, 0, 0, 4]], dtype=np.float32)
    cells = load(write_cells(tmp_path / "a.h5ad", counts, ids))
    # Medians 1.25 and 1: log1p(10,000 * 9 / 20) / 1.25 = 6.73 against log1p(10,000 * 7 / 20) = 8.16.
    assert tokens_of(cells) == [[2, 13, 14, 3], [2, 13, 14, 3]]
    assert cells.report["n_columns_summed_into_another"] == 2
    assert cells.report["n_genes_mapped"] == 4
    assert cells.report["share_of_counts_mapped"] == 24 / 32


def test_equal_values_keep_the_order_of_the_file(tmp_path):
    known = vocabulary()
    known = type(known)(**(vars(known) | {"median_of": {}}))
    ids = [GENES[8], GENES[1], GENES[5], GENES[1], GENES[8]]
    path = write_cells(tmp_path / "a.h5ad", np.array([[1, 2, 2, 0, 1]], "f4"), _unique(ids), var={"id": ids})
    assert tokens_of(load(path, known)) == [
        [2, known.token_of[GENES[8]], known.token_of[GENES[1]], known.token_of[GENES[5]], 3]
    ]


def test_foreign_ids_are_refused_with_counts(tmp_path):
    ids = [GENES[0], *[f"ENSMUSG{number:011d}" for number in range(1, 12)]]
    counts = np.ones((5, 12), dtype=np.float32)
    counts[:, 3] = 9
    message = refusal(write_cells(tmp_path / "a.h5ad", counts, ids))
    assert "1 of 12 genes, with 5.0% of the counts" in message
    assert "required are 50.0% of the counts (--min-mapped)" in message
    assert "for example, ENSMUSG00000000003, ENSMUSG00000000001" in message  # most counts first
    assert len(load(tmp_path / "a.h5ad", min_mapped=0.04).cells) == 5


def test_almost_empty_cells_are_refused(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", np.ones((5, 12), dtype=np.float32), GENES)
    message = refusal(path, min_median_tokens=13)
    assert "the median cell has 12 gene tokens; required are 13 gene tokens" in message
    assert "--min-median-tokens" in message
    assert len(load(path, min_median_tokens=12, max_tokens=5).cells) == 5  # a wanted cut is no lack of genes


# Tokens and report


def test_limit_and_report(tmp_path):
    counts = random_counts()
    counts[3] = 0
    counts[6, :11] = 0
    counts[6, 11] = 5
    path = write_cells(tmp_path / "a.h5ad", counts, [*GENES[:11], "unknown"])
    cells = load(path, max_tokens=7, positions=4096)
    assert max(len(cell.tokens) for cell in cells.cells) == 7
    report = cells.report
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert [(drop["name"], drop["row"]) for drop in report["dropped_cells"]] == [("cell3", 3), ("cell6", 6)]
    assert "no expressed gene" in report["dropped_cells"][0]["reason"]
    assert [cell.row for cell in cells.cells] == [row for row in range(30) if row not in (3, 6)]
    n_genes = (counts[:, :11] > 0).sum(axis=1)
    assert report["n_cells_truncated"] == (n_genes > 5).sum()
    kept = np.minimum(n_genes[n_genes > 0], 5)
    assert (report["min_gene_tokens"], report["max_gene_tokens_of_a_cell"]) == (kept.min(), kept.max())
    assert report["median_gene_tokens"] == np.median(kept)
    assert report["share_of_counts_mapped"] == pytest.approx(counts[:, :11].sum() / counts.sum())
    assert (report["file"], report["size_bytes"]) == ("a.h5ad", path.stat().st_size)
    assert (report["max_tokens"], report["max_gene_tokens"], report["matrix"]) == (7, 5, "X")
    assert (report["n_rows_in_file"], report["n_rows_matched"], report["n_cells"]) == (30, 30, 28)
    assert report["selection"]["tokenization"] == "published"
    assert load(path, positions=9).report["max_gene_tokens"] == 7  # the model's positions, less two


def test_without_special_tokens_every_position_is_a_gene(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", random_counts(), GENES)
    known = vocabulary(special=False)
    cells = load(path, known, positions=6).cells
    assert all(len(cell.tokens) == len(cell.gene_positions) <= 6 for cell in cells)
    wrapped = load(path, positions=8).cells
    assert [cell.tokens.tolist() for cell in cells] == [cell.tokens[1:-1].tolist() for cell in wrapped]


def test_no_cell_left(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", np.eye(2, dtype=np.float32), ["unknown", "other"])
    assert "none of the 2 selected cells" in refusal(path, min_mapped=0.0, min_median_tokens=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 2},
        {"n_cells": 0},
        {"pool": 0},
        {"seed": -1},
        {"cells": "some"},
        {"tokenization": "other"},
        {"min_mapped": 1.5},
        {"min_median_tokens": -1},
    ],
)
def test_settings_out_of_range(settings):
    (name,) = settings
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        CellSelection(**settings)


def test_fingerprint_sees_names_and_tokens(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", random_counts(), GENES)
    cells = load(path)
    assert cells.fingerprint() == load(path, counts="X").fingerprint()
    assert cells.fingerprint() != load(path, n_cells=29).fingerprint()
    assert cells.fingerprint() != load(path, tokenization="geneformer").fingerprint()
    with h5py.File(path, "r+") as file:
        file["obs/_index"][4] = "renamed"
    assert cells.fingerprint() != load(path).fingerprint()


# The published dictionaries


@needs_dicts
@pytest.mark.parametrize(
    "version, n_vocab, published, geneformer",
    [
        # A1BG 2.31 / 42.1, GATA1 1.36 / 14.7, GAPDH 0.388 / 119.7, CD74 0.216 / 5.4, ACTB 0.202 / 114.6
        ("V1", N_V1, [5150, 2632, 3906, 396, 1319], [3906, 1319, 5150, 2632, 396]),
        # A1BG 2.49 / 45.4, GATA1 1.64 / 17.7, GAPDH 0.600 / 184.9, CD74 0.326 / 8.2, ACTB 0.316 / 179.1
        ("V2", N_V2, [2, 5114, 2618, 3880, 395, 1312, 3], [2, 3880, 1312, 5114, 2618, 395, 3]),
    ],
)
def test_published_dictionaries_by_hand(tmp_path, version, n_vocab, published, geneformer):
    known = load_vocabulary([DICTS / version], n_vocab)
    counts = np.array([[120, 60, 3, 2, 1, 64]], dtype=np.float32)  # total 250
    genes = ["ACTB", "GAPDH", "CD74", "A1BG", "GATA1", "no such gene"]
    path = write_cells(tmp_path / "a.h5ad", counts, genes)
    assert tokens_of(load(path, known)) == [published]
    assert tokens_of(load(path, known, tokenization="geneformer")) == [geneformer]
    assert math.isclose(
        math.log1p(40) / known.median_of["ENSG00000102145"], {"V1": 1.36, "V2": 1.64}[version], abs_tol=5e-3
    )


@needs_dicts
@pytest.mark.parametrize("version, n_vocab", [("V1", N_V1), ("V2", N_V2)])
def test_ids_symbols_and_slow_version_agree_on_published_dictionaries(tmp_path, version, n_vocab):
    known = load_vocabulary([DICTS / version], n_vocab)
    symbols = {gene: symbol for symbol, gene in known.ensembl_of.items()}
    genes = [gene for gene in list(known.token_of)[::17] if gene in symbols]
    counts = np.random.default_rng(1).poisson(0.6, (4, len(genes))).astype(np.float32)
    expected = [slow_tokens(row, genes, known, "published") for row in counts]
    before, after = ([], []) if known.cls is None else ([known.cls], [known.eos])
    for kind, ids in (
        ("ids", genes),
        ("versions", [f"{gene}.3" for gene in genes]),
        ("symbols", [symbols[gene] for gene in genes]),
    ):
        path = write_cells(tmp_path / f"{kind}.h5ad", sparse.csr_matrix(counts), ids)
        cells = load(path, known, positions=4096, min_median_tokens=100)
        assert tokens_of(cells) == [[*before, *tokens, *after] for tokens in expected], kind


@needs_dicts
def test_old_ids_of_the_pseudoautosomal_copy():
    first = load_vocabulary([Path(DICTS / "V1")], N_V1)
    assert gene_id("ENSGR0000214717", first) == ("ENSGR0000214717", "ensembl")
    assert gene_id("ENSG00000214717.12_PAR_Y", first) == ("ENSG00000214717", "ensembl")
    second = load_vocabulary([Path(DICTS / "V2")], N_V2)
    assert gene_id("ENSGR0000214717", second) == ("ENSG00000214717", "ensembl")


def test_layer_alone_is_enough(tmp_path):
    path = write_cells(tmp_path / "a.h5ad", random_counts(), GENES, layers={"counts": random_counts()})
    expected = load(path).fingerprint()
    with h5py.File(path, "r+") as file:
        del file["X"]
    assert load(path).fingerprint() == expected
    assert "has no X (--counts); there are layer:counts." in refusal(path, counts="X")


def test_settings_need_no_heavy_import():
    code = "import sys, cellcircuits.cells; print(sorted({'anndata', 'h5py', 'pandas', 'scipy'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SRC)
    assert found.stdout.strip() == "[]"


def test_bad_value_is_named_in_any_block_of_filtered_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("cellcircuits.h5ad.BLOCK_BYTES", 200)  # two rows a block
    counts = random_counts()
    counts[26, 3] = -1
    path = write_cells(tmp_path / "a.h5ad", counts, GENES, obs_table())
    assert f"(cell cell26, gene {GENES[3]})" in refusal(path, obs_filters=(("cell_line", "RPE1"),))
