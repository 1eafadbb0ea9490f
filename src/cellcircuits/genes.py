"""Which column of a cell file is which gene: ids are recognized, not assumed.

Ensembl ids (with or without a version) and symbols are tried, in the index and in every text column of the
gene table; the one that explains the largest share of the counts is taken.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cellcircuits.errors import UserError
from cellcircuits.tokenizer import GeneColumns
from cellcircuits.vocabulary import GeneVocabulary

INDEX = "index"
AUTO = "auto"
N_EXAMPLES = 5
# The copy of a gene on Y's pseudoautosomal region: GENCODE adds a suffix, old Ensembl has R for the first 0.
_ENSEMBL = re.compile(r"(ENS[A-Z]*\d{6,})(?:\.\d+)?(?:_PAR_Y)?")
_OLD_PAR_Y = re.compile(r"ENSGR(\d{10})")


@dataclass(frozen=True)
class GeneMatch:
    """How the columns of a matrix map to genes.

    Attributes:
        column: where the ids were found, `index` or a column of the gene table.
        columns: the mapping itself.
        n_ensembl: columns recognized by an Ensembl id; `n_symbol` by a symbol.
        n_summed: columns added to an earlier column of the same gene.
        share_mapped: share of the counts in mapped columns.
        unmapped_examples: some ids that are in no dictionary, those with most counts first.
    """

    column: str
    columns: GeneColumns
    n_ensembl: int
    n_symbol: int
    n_summed: int
    share_mapped: float
    unmapped_examples: tuple[str, ...]

    @property
    def n_mapped(self) -> int:
        """Columns that map to a gene."""
        return self.n_ensembl + self.n_symbol

    def report(self) -> dict[str, object]:
        """What was found, for the run's record."""
        return {
            "gene_column": self.column,
            "n_genes_in_file": len(self.columns.gene_of_column),
            "n_genes_mapped": self.n_mapped,
            "n_mapped_by_ensembl_id": self.n_ensembl,
            "n_mapped_by_symbol": self.n_symbol,
            "n_columns_summed_into_another": self.n_summed,
            "share_of_counts_mapped": self.share_mapped,
            "unmapped_examples": list(self.unmapped_examples),
        }


def gene_id(identifier: str, vocabulary: GeneVocabulary) -> tuple[str, str] | None:
    """Recognize one identifier.

    A version (`.14`) and the suffix `_PAR_Y` are dropped: that copy has the sequence, and so the token, of
    the gene on X. An old `ENSGR...` id of such a copy keeps its own token where the dictionary has one.

    Returns:
        Ensembl id and how it was recognized (`ensembl` or `symbol`); None where it has no token.
    """
    identifier = identifier.strip()
    ensembl = _ENSEMBL.fullmatch(identifier)
    if ensembl:
        base = ensembl[1]
        for candidate in (base, _OLD_PAR_Y.sub(r"ENSG0\1", base)):
            if candidate in vocabulary.token_of:
                return candidate, "ensembl"
    by_symbol = vocabulary.ensembl_of.get(identifier)
    return (by_symbol, "symbol") if by_symbol in vocabulary.token_of else None


def match_genes(
    var: pd.DataFrame, gene_column: str, counts_of_column: np.ndarray, vocabulary: GeneVocabulary, where: str
) -> GeneMatch:
    """Choose the column of ids that explains the largest share of the counts; ties go to the earlier one.

    Args:
        var: table of the matrix's columns, one row each.
        gene_column: `auto`, `index` or the name of a column.
        counts_of_column: (n_columns,) counts of the selected cells.
        vocabulary: the genes the model knows.
        where: file and table, for errors.

    Raises:
        UserError: there is no such column.
    """
    if gene_column not in (AUTO, INDEX) and gene_column not in var.columns:
        there_are = ", ".join([INDEX, *map(str, var.columns)])
        raise UserError(f"{where}: has no column {gene_column!r} (--gene-column); there are {there_are}.")
    matches = [_match(name, ids, counts_of_column, vocabulary) for name, ids in _candidates(var, gene_column)]
    return max(matches, key=lambda match: match.share_mapped)  # the first of equals


def _candidates(var: pd.DataFrame, gene_column: str) -> Iterator[tuple[str, list[str]]]:
    if gene_column in (AUTO, INDEX):
        yield INDEX, [str(value) for value in var.index]
    for position, name in enumerate(var.columns):
        values = var.iloc[:, position]
        wanted = _is_text(values) if gene_column == AUTO else name == gene_column
        if wanted:
            yield (
                str(name),
                ["" if missing else str(value) for value, missing in zip(values, values.isna(), strict=True)],
            )


def _is_text(values: pd.Series) -> bool:
    kinds = values.cat.categories if isinstance(values.dtype, pd.CategoricalDtype) else values
    return pd.api.types.is_string_dtype(kinds.dtype) or pd.api.types.is_object_dtype(kinds.dtype)


def _match(name: str, ids: list[str], counts_of_column: np.ndarray, vocabulary: GeneVocabulary) -> GeneMatch:
    found = [gene_id(identifier, vocabulary) for identifier in ids]
    number_of: dict[str, int] = {}
    for ensembl, _ in filter(None, found):
        number_of.setdefault(ensembl, len(number_of))
    gene_of_column = np.array([number_of[match[0]] if match else -1 for match in found], dtype=np.int64)
    mapped = gene_of_column >= 0
    total = float(counts_of_column.sum())
    unmapped = np.flatnonzero(~mapped)
    by_counts = unmapped[np.argsort(-counts_of_column[unmapped], kind="stable")]
    kinds = [match[1] for match in found if match]
    return GeneMatch(
        column=name,
        columns=GeneColumns(
            gene_of_column=gene_of_column,
            tokens=np.array([vocabulary.token_of[ensembl] for ensembl in number_of], dtype=np.int64),
            medians=np.array([vocabulary.median_of.get(ensembl, 1.0) for ensembl in number_of], dtype=np.float32),
        ),
        n_ensembl=kinds.count("ensembl"),
        n_symbol=kinds.count("symbol"),
        n_summed=len(kinds) - len(number_of),
        share_mapped=float(counts_of_column[mapped].sum()) / total if total else 0.0,
        unmapped_examples=tuple(ids[column] for column in by_counts[:N_EXAMPLES]),
    )
