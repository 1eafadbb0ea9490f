"""What each feature of a trained SAE does, and how well the SAE stands in for the residual stream.

The catalog is counted over all used cells; quality is measured on held-out cells only. Everything streams:
one cell at a time, sums in float64 on the host.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertForMaskedLM

from cellcircuits.catalog import MIN_ACTIVATION_FREQ
from cellcircuits.cells import Cell
from cellcircuits.finite import require_finite
from cellcircuits.geneformer import Edit, edited, masked_logits
from cellcircuits.vocabulary import GeneVocabulary
from sae_model import TopKSAE

PlacedEdit = tuple[int, Callable[[Tensor], Edit]]
PCA_CHUNK_ROWS = 16_384
COUNT_BYTES = 12

CATALOG_DEFINITIONS = {
    "fires": "the feature is among the k of a gene position and its latent there is > 0",
    "activation_freq": "share of all gene positions of all used cells, training and held-out, where it fires",
    "mean_activation": "mean latent over all those positions, zeros included",
    "fire_count": "number of positions where it fires",
    "is_dead": "it fires nowhere",
    "n_unique_genes": "genes with at least one firing",
    "top_genes": "genes with at least min_firings firings, by descending score, ties by ascending gene_id",
    "top_genes.score": "mean latent over ALL positions of the gene, zeros included",
    "top_genes.mean_activation": "mean latent over the positions of the gene where the feature fires",
}


@dataclass
class GeneFeatureCounts:
    """Sums per gene and feature over the positions seen so far.

    `tokens` (n_genes,) ascending; `sums` (n_genes, n_features) float64 latents; `firings` of the same shape;
    `n_seen` (n_genes,) positions of each gene.
    """

    tokens: np.ndarray
    sums: np.ndarray
    firings: np.ndarray
    n_seen: np.ndarray

    @classmethod
    def empty(cls, tokens: np.ndarray, n_features: int) -> "GeneFeatureCounts":
        """Counts at zero for the given genes."""
        shape = (len(tokens), n_features)
        return cls(tokens, np.zeros(shape), np.zeros(shape, np.int32), np.zeros(len(tokens), np.int64))

    def add(self, tokens: np.ndarray, values: np.ndarray, indices: np.ndarray) -> None:
        """Count one cell's positions.

        Args:
            tokens: (n_gene,) the gene at each position; all among `self.tokens`.
            values: (n_gene, k) latents, >= 0.
            indices: (n_gene, k) the features they belong to.
        """
        genes = self.tokens.searchsorted(tokens)
        where = (genes[:, None] * self.sums.shape[1] + indices).reshape(-1)  # one flat index: add.at's fast path
        np.add.at(self.sums.reshape(-1), where, values.reshape(-1).astype(np.float64))
        np.add.at(self.firings.reshape(-1), where, (values > 0).reshape(-1).astype(np.int32))
        np.add.at(self.n_seen, genes, 1)

    def add_latents(self, cell: Cell, values: Tensor, indices: Tensor) -> None:
        """Count the gene positions of a cell from what `TopKSAE.top_k` gave there, both (n_gene, k).

        Raises:
            UserError: a latent is NaN or infinite.
        """
        require_finite(values, cell, "what an SAE computes", cell.gene_positions)
        self.add(cell.tokens[cell.gene_positions], values.cpu().numpy(), indices.cpu().numpy())


def gene_tokens(cells: Iterable[Cell]) -> tuple[np.ndarray, np.ndarray]:
    """Genes of the cells: ascending tokens (n_genes,), and the positions that hold each, (n_genes,)."""
    return np.unique(np.concatenate([cell.tokens[cell.gene_positions] for cell in cells]), return_counts=True)


def catalog_bytes(n_genes: int, n_features: int) -> int:
    """Memory that the counts of one layer take."""
    return n_genes * n_features * COUNT_BYTES


def build_catalog(
    counts: GeneFeatureCounts, vocabulary: GeneVocabulary, min_firings: int, n_top_genes: int
) -> dict[str, Any]:
    """Make `feature_catalog.json` of one layer, without what only the caller knows (layer, k).

    Args:
        counts: over all used cells.
        vocabulary: gives genes their names.
        min_firings: a gene is listed from this many firings on.
        n_top_genes: genes listed per feature.
    """
    names = _gene_names(counts.tokens, vocabulary)
    n_positions = int(counts.n_seen.sum())
    features = []
    for index in range(counts.sums.shape[1]):
        sums, firings = counts.sums[:, index], counts.firings[:, index]
        fire_count = int(firings.sum())
        features.append({
            "feature_idx": index,
            "activation_freq": fire_count / n_positions,
            "mean_activation": float(sums.sum()) / n_positions,
            "fire_count": fire_count,
            "is_dead": fire_count == 0,
            "n_unique_genes": int(np.count_nonzero(firings)),
            "top_genes": _top_genes(counts, index, names, (min_firings, n_top_genes)),
        })  # fmt: skip
    n_dead = sum(feature["is_dead"] for feature in features)
    summary = {
        "n_features": len(features),
        "n_alive": len(features) - n_dead,
        "n_dead": n_dead,
        "n_traceable": sum(feature["activation_freq"] >= MIN_ACTIVATION_FREQ for feature in features),
        "n_positions": n_positions,
        "n_genes": len(counts.tokens),
        "min_firings": min_firings,
        "n_top_genes": n_top_genes,
        "definitions": CATALOG_DEFINITIONS,
    }
    return {"summary": summary, "features": features}


def _top_genes(
    counts: GeneFeatureCounts, index: int, names: Mapping[int, tuple[str, str]], limits: tuple[int, int]
) -> list[dict[str, Any]]:
    min_firings, n_top_genes = limits
    candidates = np.flatnonzero(counts.firings[:, index] >= min_firings)
    sums, firings = counts.sums[candidates, index], counts.firings[candidates, index]
    scores = sums / counts.n_seen[candidates]
    best = np.argsort(-scores, kind="stable")[:n_top_genes]
    return [
        {
            "gene_id": (token := int(counts.tokens[candidates[place]])),
            "gene_name": names[token][0],
            "ensembl_id": names[token][1],
            "mean_activation": float(sums[place] / firings[place]),
            "score": float(scores[place]),
            "fire_count": int(firings[place]),
        }
        for place in best
    ]


def _gene_names(tokens: np.ndarray, vocabulary: GeneVocabulary) -> dict[int, tuple[str, str]]:
    symbols = vocabulary.symbol_of_token()
    ensembl = {token: gene for gene, token in vocabulary.token_of.items()}
    return {token: (symbols[token], ensembl[token]) for token in tokens.tolist()}


@dataclass(frozen=True)
class StreamBaseline:
    """Principal components of the training rows.

    `components` (d_model, k) float32, orthonormal; `participation_ratio` (sum of eigenvalues)^2 / sum of
    their squares, the effective number of dimensions, from 1 to d_model.
    """

    components: np.ndarray
    participation_ratio: float


def fit_baseline(rows: np.ndarray, mean: np.ndarray, k: int, device: torch.device) -> StreamBaseline:
    """Eigenvectors of the rows' covariance about `mean`; products on `device`, summed in float64 on the host.

    Args:
        rows: (n_rows, d_model) float32.
        mean: (d_model,) float32.
        k: components to keep, at most d_model.
        device: where the products are computed.
    """
    covariance = np.zeros((rows.shape[1], rows.shape[1]))
    centre = torch.from_numpy(mean).to(device)
    for start in range(0, len(rows), PCA_CHUNK_ROWS):
        chunk = torch.from_numpy(rows[start : start + PCA_CHUNK_ROWS]).to(device) - centre
        covariance += (chunk.T @ chunk).cpu().numpy()
    eigenvalues, vectors = np.linalg.eigh(covariance / len(rows))
    ratio = float(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum())
    return StreamBaseline(np.ascontiguousarray(vectors[:, ::-1][:, :k], dtype=np.float32), ratio)


@dataclass
class ReconstructionError:
    """Running sums over held-out positions: squared length and errors (of SAE and PCA), firings."""

    n_positions: int = 0
    total: float = 0.0
    sae: float = 0.0
    pca: float = 0.0
    n_firings: int = 0

    def add(self, residual: Tensor, sae: TopKSAE, baseline: StreamBaseline) -> None:
        """Add one cell's (n_gene, d_model) raw residual stream."""
        latents = sae.encode(residual)
        centred = residual - sae.input_mean
        components = torch.from_numpy(baseline.components).to(residual.device)
        outside = centred - (centred @ components) @ components.T
        self.n_positions += len(residual)
        self.total += _sum_of_squares(centred)
        self.sae += _sum_of_squares(centred - sae.decode(latents))
        self.pca += _sum_of_squares(outside)
        self.n_firings += int((latents > 0).sum())

    def report(self) -> dict[str, float | int | None]:
        """FVU = |x - x^|^2 / |x - mean|^2 of the SAE and of PCA with k components, and their ratio."""
        return {
            "n_held_out_positions": self.n_positions,
            "fvu": ratio_or_none(self.sae, self.total),
            "pca_fvu": ratio_or_none(self.pca, self.total),
            "fvu_over_pca": ratio_or_none(self.sae, self.pca),
            "l0": ratio_or_none(self.n_firings, self.n_positions),
        }


def _sum_of_squares(x: Tensor) -> float:
    return float(x.square().sum(dim=-1).cpu().double().sum())


def ratio_or_none(numerator: float, denominator: float) -> float | None:
    """A finite ratio, or None where the denominator is not positive."""
    return numerator / denominator if denominator > 0 and math.isfinite(numerator) else None


def mask_positions(cell: Cell, share: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a share of a cell's gene positions, at least one, ascending."""
    n_masked = max(1, round(share * len(cell.gene_positions)))
    return np.sort(rng.choice(cell.gene_positions, n_masked, replace=False))


def masked_gene_loss(
    model: BertForMaskedLM, cell: Cell, masked: np.ndarray, mask_token: int, placed: PlacedEdit | None = None
) -> float:
    """Cross-entropy in nats of a cell's masked genes, summed over them, under one edit.

    Args:
        model: the Geneformer.
        cell: a held-out cell.
        masked: (n_masked,) the positions that are masked.
        mask_token: what stands there.
        placed: a layer and what makes the edit from the cell's gene positions; None: the untouched model.

    Raises:
        UserError: a logit is NaN or infinite.
    """
    tokens = torch.tensor(cell.tokens, device=model.device)
    positions = torch.tensor(cell.gene_positions, device=model.device)
    hidden = torch.tensor(masked, device=model.device)
    truth = tokens[hidden]
    tokens[hidden] = mask_token
    edits = {} if placed is None else {placed[0]: placed[1](positions)}
    with torch.inference_mode(), edited(model, edits):
        logits = masked_logits(model, tokens[None])[0, hidden]  # (n_masked, n_vocab)
        require_finite(logits, cell, "the logits of a masked gene", masked)
        return float(cross_entropy(logits, truth, reduction="sum"))


def splice(sae: TopKSAE) -> dict[str, Callable[[Tensor], Edit]]:
    """The three edits, each made from gene positions: reconstruction, training mean, zero in their place."""

    def replaced_by(new: Edit) -> Callable[[Tensor], Edit]:
        def at(positions: Tensor) -> Edit:
            def edit(residual: Tensor) -> Tensor:  # (batch, n_pos, d_model)
                changed = residual.clone()
                changed[:, positions] = new(residual[:, positions])
                return changed

            return edit

        return at

    return {
        "spliced": replaced_by(sae.reconstruct),
        "mean_ablated": replaced_by(lambda residual: sae.input_mean.expand_as(residual)),
        "zero_ablated": replaced_by(torch.zeros_like),
    }


def loss_report(losses: Mapping[str, float]) -> dict[str, float | None]:
    """The four losses and what share of each ablation's damage the reconstruction undoes.

        loss_recovered = (ablated - spliced) / (ablated - original)

    None where the ablation does no damage.
    """
    report: dict[str, float | None] = {f"loss_{name}": losses[name] for name in losses}
    for ablation in ("mean_ablated", "zero_ablated"):
        undone, damage = losses[ablation] - losses["spliced"], losses[ablation] - losses["original"]
        report[f"loss_recovered_from_{ablation}"] = ratio_or_none(undone, damage)
    return report
