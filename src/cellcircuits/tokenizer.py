"""Counts of one cell -> rank tokens: arrays in, arrays out.

Genes are ordered by their normalized expression relative to the gene's median, highest first; the order is
the sentence the model reads. Nothing here knows files, gene names or the model.
"""

from dataclasses import dataclass

import numpy as np

from cellcircuits.errors import UserError

TARGET_SUM = np.float32(10_000)
PUBLISHED = "published"
GENEFORMER = "geneformer"
TOKENIZATIONS = (PUBLISHED, GENEFORMER)


@dataclass(frozen=True)
class GeneColumns:
    """Which columns of a matrix belong to which gene; columns of one gene are summed.

    Attributes:
        gene_of_column: (n_columns,) int64, number of the gene, -1 where the column is no known gene. Genes
            are numbered by their first column, which also settles the order of equal values.
        tokens: (n_genes,) int64.
        medians: (n_genes,) float32, 1.0 where a gene has none.
    """

    gene_of_column: np.ndarray
    tokens: np.ndarray
    medians: np.ndarray


def rank_tokens(columns: np.ndarray, counts: np.ndarray, genes: GeneColumns, tokenization: str) -> np.ndarray:
    """Tokens of the expressed genes of one cell, highest relative expression first.

        value_g = log1p(10,000 * count_g / total) / median_g        (`published`)
        value_g = 10,000 * count_g / total / median_g               (`geneformer`)

    The total runs over all columns, known genes or not. Every step is float32.

    Args:
        columns: (n_stored,) ascending column numbers of the counts that are not 0.
        counts: (n_stored,) those counts.
        genes: the genes of the columns.
        tokenization: `published` or `geneformer`.

    Returns:
        (n_expressed,) int64 tokens; equal values keep the order of the genes.

    Source: Theodoris et al. (2023), Methods "Rank value encoding"; the log1p is this study's own.
    """
    total = np.float32(counts.sum()) or np.float32(1)
    gene = genes.gene_of_column[columns]
    known = gene >= 0
    summed = np.bincount(gene[known], weights=counts[known], minlength=len(genes.tokens))  # (n_genes,)
    expressed = np.flatnonzero(summed)
    with np.errstate(all="ignore"):  # what overflows counts as not expressed
        values = summed[expressed].astype(np.float32) / total * TARGET_SUM
        if tokenization == PUBLISHED:
            values = np.log1p(values)
        values = values / genes.medians[expressed]
    values[~np.isfinite(values)] = 0
    order = np.argsort(-values, kind="stable")
    return genes.tokens[expressed[order[values[order] > 0]]]


def n_expressed(columns: np.ndarray, counts: np.ndarray, genes: GeneColumns) -> int:
    """Known genes of one cell that have a count, ranked or not; the arguments are those of `rank_tokens`."""
    gene = genes.gene_of_column[columns[counts > 0]]
    return len(np.unique(gene[gene >= 0]))


def n_gene_limit(max_tokens: int, model_positions: int, special: tuple[int | None, int | None]) -> int:
    """Gene tokens that fit beside `<cls>` and `<eos>`.

    Raises:
        UserError: no gene would fit.
    """
    limit = min(max_tokens, model_positions) - sum(token is not None for token in special)
    if limit < 1:
        raise UserError(
            f"{min(max_tokens, model_positions)} tokens leave no room for a gene; raise --max-tokens "
            f"(the model has {model_positions} positions)."
        )
    return limit


def wrap(gene_tokens: np.ndarray, limit: int, special: tuple[int | None, int | None]) -> tuple[np.ndarray, np.ndarray]:
    """Cut to the limit and put `<cls>` before and `<eos>` after, where the dictionary has them.

    Args:
        gene_tokens: (n_expressed,) int64, ranked.
        limit: most gene tokens to keep.
        special: tokens of `<cls>` and `<eos>`, None where there is none.

    Returns:
        tokens (n_pos,) int64 and gene_positions (n_gene,) int64.
    """
    before, after = ([] if token is None else [token] for token in special)
    kept = gene_tokens[:limit]
    tokens = np.concatenate([before, kept, after]).astype(np.int64)
    return tokens, np.arange(len(before), len(before) + len(kept), dtype=np.int64)
