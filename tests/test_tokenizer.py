"""Counts to rank tokens: by hand, against a slow gene-by-gene version, and at the edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cell_fixtures import ensembl, slow_tokens, vocabulary
from cellcircuits.errors import UserError
from cellcircuits.tokenizer import GeneColumns, n_gene_limit, rank_tokens, wrap

GENE_TOKENS = np.array([10, 11, 12, 13, 14])
MEDIANS = np.array([0.25, 0.5, 0.75, 1.0, 1.0], dtype=np.float32)


def rank(counts, gene_of_column, tokenization="published", medians=MEDIANS):
    counts = np.asarray(counts, dtype=np.float64)
    columns = np.flatnonzero(counts)
    genes = GeneColumns(np.asarray(gene_of_column), GENE_TOKENS, medians)
    return rank_tokens(columns, counts[columns], genes, tokenization).tolist()


def test_five_genes_by_hand():
    # Total 20; log1p(500) / 0.25 = 24.87, log1p(4000) / 0.5 = 16.59, log1p(2000) = 7.60, log1p(3500) = 8.16.
    assert rank([1, 8, 0, 4, 7], [0, 1, 2, 3, 4]) == [10, 11, 14, 13]
    # 500 / 0.25 = 2000, 4000 / 0.5 = 8000, 2000, 3500: the tie keeps the order of the genes.
    assert rank([1, 8, 0, 4, 7], [0, 1, 2, 3, 4], "geneformer") == [11, 14, 10, 13]


def test_total_runs_over_unknown_genes_too():
    # log1p(s) / 0.25 against log1p(50 s) / 0.5: the order turns where s = 10,000 / total falls under 48.
    assert rank([1, 50], [0, 1]) == [10, 11]
    assert rank([1, 50, 949], [0, 1, -1]) == [11, 10]


def test_columns_of_one_gene_are_summed():
    # Gene 3 has 3 + 3 against 5 of gene 4, at the same median.
    assert rank([3, 5, 3], [3, 4, 3]) == [13, 14]
    assert rank([3, 5, 0], [3, 4, 3]) == [14, 13]


def test_equal_values_keep_the_order_of_first_columns():
    assert rank([2, 4, 2], [3, 4, 3]) == [13, 14]
    n_genes = 500  # an unstable sort would show
    genes = GeneColumns(np.arange(n_genes), np.arange(n_genes)[::-1].copy(), np.ones(n_genes, dtype=np.float32))
    tokens = rank_tokens(np.arange(n_genes), np.ones(n_genes), genes, "published")
    assert tokens.tolist() == list(range(n_genes))[::-1]


def test_cell_without_known_gene_is_empty():
    assert rank([0, 0], [0, 1]) == []
    assert rank([7], [-1]) == []


def test_infinite_value_is_not_expressed():
    tiny = np.array([1e-45, 1, 1, 1, 1], dtype=np.float32)
    assert rank([5, 5], [0, 1], medians=tiny) == [11]


def test_tokens_are_int64():
    genes = GeneColumns(np.array([0]), np.array([10]), np.ones(1, dtype=np.float32))
    assert rank_tokens(np.array([0]), np.array([1.0]), genes, "published").dtype == np.int64


@pytest.mark.parametrize("tokenization", ["published", "geneformer"])
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([2, 6, 300, 50_000]))
def test_same_as_gene_by_gene_in_float32(tokenization, seed, spread):
    generator = np.random.default_rng(seed)
    known = vocabulary(12)
    ids = [ensembl(number) for number in generator.integers(1, 17, size=20)]  # repeats, and four unknown genes
    counts = generator.integers(0, spread, size=20).astype(np.float64)
    order = list(dict.fromkeys(gene for gene in ids if gene in known.token_of))
    genes = GeneColumns(
        np.array([order.index(gene) if gene in order else -1 for gene in ids]),
        np.array([known.token_of[gene] for gene in order], dtype=np.int64),
        np.array([known.median_of.get(gene, 1.0) for gene in order], dtype=np.float32),
    )
    columns = np.flatnonzero(counts)
    fast = rank_tokens(columns, counts[columns], genes, tokenization)
    assert fast.tolist() == slow_tokens(counts, ids, known, tokenization)


@pytest.mark.parametrize(
    "special, tokens, positions",
    [((2, 3), [2, 10, 11, 3], [1, 2]), ((None, None), [10, 11], [0, 1]), ((None, 3), [10, 11, 3], [0, 1])],
)
def test_wrap(special, tokens, positions):
    wrapped, gene_positions = wrap(np.array([10, 11, 12]), 2, special)
    assert wrapped.tolist() == tokens
    assert gene_positions.tolist() == positions
    assert wrapped.dtype == gene_positions.dtype == np.int64


def test_limit_leaves_room_for_special_tokens():
    assert n_gene_limit(2048, 4096, (2, 3)) == 2046
    assert n_gene_limit(2048, 512, (2, 3)) == 510
    assert n_gene_limit(2048, 2048, (None, None)) == 2048
    with pytest.raises(UserError, match=r"2 tokens leave no room for a gene; .*--max-tokens"):
        n_gene_limit(100, 2, (2, 3))
