"""Small cell files and dictionaries for the tests of the cell-reading part."""

import pickle
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellcircuits.cells import CellSelection, load_cells
from cellcircuits.errors import UserError
from cellcircuits.vocabulary import GeneVocabulary

DICTS = Path(__file__).parents[2] / "shared" / "geneformer_dicts"
N_V1, N_V2 = 25_426, 20_275
EASY = {"cells": "all", "min_median_tokens": 1}


def ensembl(number: int) -> str:
    return f"ENSG{number:011d}"


GENES = [ensembl(number) for number in range(1, 13)]


def vocabulary(n_genes: int = 12, *, special: bool = True) -> GeneVocabulary:
    """Genes 1..n: token = number + 9, median = number / 4, symbol GENE<number>; the last has no median."""
    ids = [ensembl(number) for number in range(1, n_genes + 1)]
    return GeneVocabulary(
        token_of={gene: number + 9 for number, gene in enumerate(ids, 1)},
        median_of={gene: number / 4 for number, gene in enumerate(ids, 1) if number < n_genes},
        ensembl_of={f"GENE{number}": gene for number, gene in enumerate(ids, 1)},
        pad=0,
        mask=1,
        cls=2 if special else None,
        eos=3 if special else None,
        n_tokens=n_genes + 10,
        files=(),
    )


def write_cells(path: Path, counts: Any, genes: list[str], obs: dict[str, Any] | None = None, **parts: Any) -> Path:
    """Write an .h5ad file; `parts` are var columns (`var`), `layers`, `raw` = (matrix, genes)."""
    n_cells = counts.shape[0]
    names = [f"cell{row}" for row in range(n_cells)]
    data = ad.AnnData(
        counts,
        obs=pd.DataFrame(obs if obs is not None else {"gene": ["non-targeting"] * n_cells}, index=names),
        var=pd.DataFrame(parts.get("var", {}), index=genes),
        layers=parts.get("layers"),
    )
    if "raw" in parts:
        matrix, raw_genes = parts["raw"]
        data.raw = ad.AnnData(matrix, obs=data.obs, var=pd.DataFrame(index=raw_genes))
    data.write_h5ad(path)
    return path


def write_dictionaries(folder: Path, suffix: str, n_genes: int, **replaced: Any) -> Path:
    """Write the three dictionaries; `replaced` gives other content for tokens, medians or names."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = [ensembl(number) for number in range(1, n_genes + 1)]
    special = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
    content = {
        "tokens": special | {gene: token for token, gene in enumerate(ids, 4)},
        "medians": {gene: 1.5 for gene in ids},
        "names": {f"GENE{number}": gene for number, gene in enumerate(ids, 1)},
    } | replaced
    names = {"tokens": "token_dictionary", "medians": "gene_median_dictionary", "names": "gene_name_id_dict"}
    for part, name in names.items():
        (folder / f"{name}{suffix}.pkl").write_bytes(pickle.dumps(content[part]))
    return folder


def slow_tokens(counts: np.ndarray, genes: list[str], known: GeneVocabulary, tokenization: str) -> list[int]:
    """Ranked gene tokens of one cell, gene by gene in float32, as the definition reads."""
    total = np.float32(0)
    summed: dict[int, np.float32] = {}
    median: dict[int, np.float32] = {}
    for count, gene in zip(counts, genes, strict=True):
        total = np.float32(total + np.float32(count))
        if gene in known.token_of:
            token = known.token_of[gene]
            summed[token] = np.float32(summed.get(token, np.float32(0)) + np.float32(count))
            median[token] = np.float32(known.median_of.get(gene, 1.0))
    if total == 0:
        total = np.float32(1)
    values = {}
    for token, count in summed.items():
        value = np.float32(np.float32(count / total) * np.float32(10_000))
        if tokenization == "published":
            value = np.log1p(value)
        value = np.float32(value / median[token])
        if np.isfinite(value) and value > 0:
            values[token] = value
    return sorted(values, key=lambda token: -values[token])  # Python's sort is stable


def random_counts(n_cells=30, n_genes=12, seed=0):
    counts = np.random.default_rng(seed).poisson(1.5, (n_cells, n_genes)).astype(np.float32)
    counts[:, 0] += 1
    return counts


def load(path, known=None, positions=64, **settings):
    return load_cells(path, known or vocabulary(), CellSelection(**(EASY | settings)), positions)


def tokens_of(cell_set):
    return [cell.tokens.tolist() for cell in cell_set.cells]


def refusal(path, known=None, **settings):
    with pytest.raises(UserError) as caught:
        load(path, known, **settings)
    return str(caught.value)
