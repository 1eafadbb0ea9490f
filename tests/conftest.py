"""Small random inputs in the real formats: a Geneformer, SAEs with catalogs, gene dictionaries, cells."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse
from transformers import BertConfig, BertForMaskedLM

from cellcircuits.sae_store import run_folder, save_sae
from sae_model import TopKSAE


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are tiny: threads would only wait for each other."""
    torch.set_num_threads(1)


def random_model(
    seed: int = 0, *, n_layers: int = 6, d_model: int = 24, n_heads: int = 3, n_vocab: int = 64, n_positions: int = 48
) -> BertForMaskedLM:
    """A random BertForMaskedLM of Geneformer's form, with weights large enough for effects to be visible."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=n_vocab, hidden_size=d_model, num_hidden_layers=n_layers, num_attention_heads=n_heads,
        intermediate_size=4 * d_model, hidden_act="relu", max_position_embeddings=n_positions,
        hidden_dropout_prob=0.02, attention_probs_dropout_prob=0.02, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def random_sae(seed: int, d_model: int, n_features: int, k: int) -> TopKSAE:
    """A random SAE with a non-zero mean and biases."""
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSAE(d_model, n_features, k).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    sae.input_mean.copy_(0.3 * torch.randn(d_model, generator=generator))
    return sae.eval()


@dataclass(frozen=True)
class Study:
    """Paths of a complete set of small inputs, as a user has them."""

    root: Path
    model: Path
    data_root: Path
    cells: Path

    def flags(self, out_dir: Path) -> list[str]:
        """Command-line flags that trace this study."""
        return [
            "--model", str(self.model), "--data-root", str(self.data_root), "--data-path", str(self.cells),
            "--cells", "all", "--n-cells", "12", "--min-median-tokens", "5", "--source-layer", "1",
            "--downstream-layers", "2,4,5", "--out-dir", str(out_dir), "--device", "cpu",
        ]  # fmt: skip


def write_study(root: Path, *, n_genes: int = 60, n_cells: int = 14, n_features: int = 40, k: int = 4) -> Study:
    """Write model, dictionaries, SAEs, catalogs and cells below `root`."""
    study = Study(root, root / "model", root, root / "cells.h5ad")
    model = random_model()
    model.save_pretrained(study.model)
    genes = [f"ENSG{i:011d}" for i in range(n_genes)]
    tokens = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3} | {gene: i + 4 for i, gene in enumerate(genes)}
    rng = np.random.default_rng(0)
    dictionaries = {
        "token_dictionary_test": tokens,
        "gene_median_dictionary_test": {
            gene: float(x) for gene, x in zip(genes, rng.uniform(0.5, 2, n_genes), strict=True)
        },
        "gene_name_id_dict_test": {f"GENE{i}": gene for i, gene in enumerate(genes)},
    }
    (study.model / "geneformer").mkdir()
    for name, content in dictionaries.items():
        (study.model / "geneformer" / f"{name}.pkl").write_bytes(pickle.dumps(content))
    for layer in (1, 2, 4, 5):
        write_sae(study.data_root, layer, random_sae(layer, model.config.hidden_size, n_features, k))
    counts = rng.poisson(rng.gamma(0.5, 3.0, (n_cells, n_genes))).astype(np.float32)
    adata = anndata.AnnData(sparse.csr_matrix(counts))
    adata.var_names = genes
    adata.obs_names = [f"cell{i}" for i in range(n_cells)]
    adata.obs["gene"] = ["non-targeting" if i % 2 else "TP53" for i in range(n_cells)]
    adata.write_h5ad(study.cells)
    return study


def write_sae(data_root: Path, layer: int, sae: TopKSAE) -> Path:
    """Write one SAE with a catalog and labels; returns its folder."""
    folder = run_folder(data_root, layer, sae.n_features // sae.d_model, sae.k)
    save_sae(sae, folder)
    features = [
        {"feature_idx": i, "activation_freq": 0.0 if i == 3 else 0.1, "top_genes": [{"gene_name": f"GENE{i}"}]}
        for i in range(sae.n_features)
    ]
    (folder / "feature_catalog.json").write_text(json.dumps({"features": features}))
    labels = {"0": [{"ontology": "KEGG", "term": "Cell cycle"}]}
    (folder / "feature_annotations.json").write_text(json.dumps({"feature_annotations": labels}))
    return folder


@pytest.fixture(scope="session")
def study_template(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """One set of inputs that no test may change."""
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A set of inputs of this test's own."""
    return write_study(tmp_path / "study")
