"""Gene sets: GMT files in, terms over one universe of genes out. Genes are tokens of the model's vocabulary."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from cellcircuits.errors import UserError
from cellcircuits.files import read_bounded

MIN_TERM_SIZE, MAX_TERM_SIZE = 5, 500
MAX_GMT_BYTES = 1 << 27  # MSigDB's largest file has a quarter of that
MAX_GMT_NAMES = 1 << 23  # each takes sixty bytes or more once it is read, however short
_ENSEMBL = re.compile(r"(ENS[A-Z]*G\d+)(\.\d+)?")


@dataclass(frozen=True)
class GmtFile:
    """One GMT file as read: upper-cased gene names per term."""

    path: Path
    ontology: str
    genes_of: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class GeneSet:
    """One term of one ontology, its genes as tokens of the model's vocabulary."""

    ontology: str
    term: str
    tokens: frozenset[int]


@dataclass(frozen=True)
class TermTable:
    """The terms kept, over one universe.

    `universe` (n_universe,) ascending tokens; `membership` (n_universe, n_terms) of ones; `sizes`
    (n_terms,) genes of each term within the universe.
    """

    universe: np.ndarray
    terms: tuple[tuple[str, str], ...]
    membership: csr_array
    sizes: np.ndarray


def tokens_by_name(token_of: Mapping[str, int], ensembl_of: Mapping[str, str]) -> dict[str, int]:
    """Map upper-cased symbols and Ensembl ids to tokens; an exact upper-case symbol wins over a folded one."""
    by_symbol = {symbol: token_of[gene] for symbol, gene in ensembl_of.items() if gene in token_of}
    folded = {symbol.upper(): token for symbol, token in by_symbol.items()}
    exact = {symbol: token for symbol, token in by_symbol.items() if symbol == symbol.upper()}
    return {**folded, **exact, **{gene.upper(): token for gene, token in token_of.items()}}


def read_gmt(path: Path, ontology: str) -> GmtFile:
    """Read one GMT file: a term, a description and its genes per line, parted by tabs.

    Args:
        path: the file; genes are symbols of any case or Ensembl ids (a version suffix is dropped), with
            or without Enrichr's `,weight`.
        ontology: the name its terms get, such as GO_BP.

    Raises:
        UserError: the file cannot be read or is empty, a line is malformed, or a term comes twice.
    """
    genes_of: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        term, *rest = (part.strip() for part in line.split("\t"))
        names = tuple(name for name in map(_gene_name, rest[1:]) if name)
        if not term or not names:
            raise UserError(
                f"{path}, line {number}: a GMT line is a term, a description and at least one gene, "
                "parted by tabs; mend or remove the line."
            )
        if term in genes_of:
            raise UserError(f"{path}, line {number}: the term {term!r:.80} comes twice; keep one of them.")
        genes_of[term] = names
    if not genes_of:
        raise UserError(f"{path}: holds no gene set.")
    return GmtFile(path, ontology, genes_of)


def resolve(gmt: GmtFile, token_of_name: Mapping[str, int]) -> list[GeneSet]:
    """Turn gene names into tokens; genes that the vocabulary lacks are left out.

    Raises:
        UserError: no gene of the file is known.
    """
    gene_sets = [
        GeneSet(gmt.ontology, term, frozenset(token_of_name[name] for name in names if name in token_of_name))
        for term, names in gmt.genes_of.items()
    ]
    if not any(gene_set.tokens for gene_set in gene_sets):
        raise UserError(
            f"{gmt.path}: none of its genes is in the model's gene dictionary; "
            "human gene symbols or Ensembl ids are expected."
        )
    return gene_sets


def _lines(path: Path) -> list[str]:
    raw = read_bounded(path, MAX_GMT_BYTES, "a file of gene sets")
    if raw.count(b"\t") + raw.count(b"\n") > MAX_GMT_NAMES:
        raise UserError(f"{path}: holds more than {MAX_GMT_NAMES:,} genes; give the sets that are to be tested.")
    try:
        return raw.decode("utf-8-sig").split("\n")  # splitlines would also cut at form feeds
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; a GMT file is expected.") from None


def _gene_name(field: str) -> str:
    name = field.split(",")[0].strip().upper()
    ensembl = _ENSEMBL.fullmatch(name)
    return ensembl[1] if ensembl else name


def build_term_table(gene_sets: Sequence[GeneSet], listable: Iterable[int]) -> TermTable:
    """Clip terms to the universe, then keep those of an admitted size.

    Args:
        gene_sets: all terms of all ontologies.
        listable: tokens of the genes that a gene list can hold at all.

    Raises:
        UserError: two terms of one ontology share a name, or no term is left.
    """
    names = [(gene_set.ontology, gene_set.term) for gene_set in gene_sets]
    if len(set(names)) < len(names):
        twice, _ = Counter(names).most_common(1)[0]
        raise UserError(f"The term {twice[1]!r:.80} of {twice[0]} is in two GMT files; give each file its own name.")
    named = set().union(*(gene_set.tokens for gene_set in gene_sets))
    universe = np.array(sorted(named.intersection(listable)), dtype=np.int64)
    members = set(universe.tolist())
    clipped = [gene_set.tokens & members for gene_set in gene_sets]
    kept = [index for index, tokens in enumerate(clipped) if MIN_TERM_SIZE <= len(tokens) <= MAX_TERM_SIZE]
    if not kept:
        raise UserError(
            f"No term of the GMT files has {MIN_TERM_SIZE} to {MAX_TERM_SIZE} genes among the "
            f"{len(universe)} that these cells express often enough; give other gene sets or more cells."
        )
    membership = indicator([clipped[index] for index in kept], universe).T.tocsr()
    sizes = np.array([len(clipped[index]) for index in kept], dtype=np.int64)
    return TermTable(universe, tuple(names[index] for index in kept), membership, sizes)


def indicator(lists: Sequence[Iterable[int]], universe: np.ndarray) -> csr_array:
    """One row of ones per list, (n_lists, n_universe); tokens outside the universe are left out."""
    members = frozenset(universe.tolist())
    columns = [universe.searchsorted(sorted(members.intersection(tokens))) for tokens in lists]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in columns])]).astype(np.int64)
    flat = np.concatenate([*columns, np.empty(0, dtype=np.int64)]).astype(np.int64)
    return csr_array((np.ones(len(flat), np.int64), flat, starts), shape=(len(lists), len(universe)))
