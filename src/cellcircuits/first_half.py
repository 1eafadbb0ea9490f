"""What the first half of the cells is asked: how long the stream is, how often features are active, both signatures.

One clean pass per cell; nothing of the second half goes in.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cellcircuits.activations import stream
from cellcircuits.cells import Cell
from cellcircuits.effects import TopKLatents
from cellcircuits.finite import require_finite
from cellcircuits.geneformer import head_parts
from cellcircuits.jsonio import write_atomically
from cellcircuits.kept_rows import KeptRows, remove_rows
from cellcircuits.state_shift import LogitMap, Signatures
from cellcircuits.steering import HEAD
from cellcircuits.steering_controls import LayerFacts
from cellcircuits.steering_state import read_arrays

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

    from sae_model import TopKSAE

log = logging.getLogger(__name__)
FIRST_HALF_FILE = "first_half.npz"


@dataclass(frozen=True)
class CleanMeans:
    """Clean passes of some cells, one row each.

    Attributes:
        activations: {layer: (n_cells, n_features) float32 mean latent over gene positions}.
        n_active: {layer: (n_cells, n_features) int32 gene positions with a latent above 0}.
        norms: {layer: (n_cells,) float64 sum over gene positions of the stream's length}.
        transformed: (n_cells, d_model) float64 mean over gene positions of the head's transform.
        n_gene: (n_cells,) gene positions.
    """

    activations: Mapping[int, NDArray[np.float32]]
    n_active: Mapping[int, NDArray[np.int32]]
    norms: Mapping[int, NDArray[np.float64]]
    transformed: NDArray[np.float64]
    n_gene: NDArray[np.int64]

    def layer_facts(self, layer: int, early: NDArray[np.int64]) -> LayerFacts:
        """What these cells say about a layer; how often features are active, the early ones among the rows."""
        n_active, n_gene = self.n_active[layer], self.n_gene.sum()
        total = (self.activations[layer].astype(np.float64) * self.n_gene[:, None]).sum(axis=0)
        n_positions = n_active.sum(axis=0, dtype=np.int64)
        return LayerFacts(
            mean_norm=float(self.norms[layer].sum() / n_gene),
            frequency=n_active[early].sum(axis=0, dtype=np.int64) / self.n_gene[early].sum(),
            share_of_cells=(n_active[early] > 0).mean(axis=0),
            mean_latent=np.divide(total, n_positions, out=np.zeros_like(total), where=n_positions > 0),
        )

    def signatures(self, groups: tuple[NDArray[np.int64], NDArray[np.int64]], logit_map: LogitMap) -> Signatures:
        """Signatures of the early and the late cells, given their numbers among the rows."""
        return Signatures(*(logit_map.logits(self.transformed[group].mean(axis=0)) for group in groups))


def clean_means(
    model: "BertForMaskedLM", saes: Mapping[int, "TopKSAE"], cells: Sequence[Cell], out_dir: Path, fingerprint: str
) -> CleanMeans:
    """Run the cells unedited, or read what an earlier call left in `first_half.npz`.

    Args:
        model: the Geneformer.
        saes: {layer: SAE}, on the model's device.
        cells: the cells.
        out_dir: the run's folder, which keeps finished cells meanwhile.
        fingerprint: of the run.

    Raises:
        UserError: the model or an SAE gives NaN or infinite values.
    """
    n_cells, last = len(cells), model.config.num_hidden_layers - 1
    arrays: dict[str, NDArray] = {"transformed": np.zeros((n_cells, model.config.hidden_size))}
    for layer, sae in saes.items():
        arrays |= {
            f"activations_{layer}": np.zeros((n_cells, sae.n_features), dtype=np.float32),
            f"active_{layer}": np.zeros((n_cells, sae.n_features), dtype=np.int32),
            f"norms_{layer}": np.zeros(n_cells),
        }
    if not _restored(arrays, out_dir / FIRST_HALF_FILE, fingerprint):
        kept = KeptRows(arrays, out_dir / "partial", f"first half {fingerprint}")
        head = head_parts(model)
        try:
            for number, cell, streams in stream(model, cells, sorted({*saes, last}), "first half", kept.n_done):
                for layer, sae in saes.items():
                    _count(arrays, number, layer, streams[layer], sae, cell)
                with torch.inference_mode():
                    transformed = head.transform(streams[last])
                require_finite(transformed, cell, HEAD, cell.gene_positions)
                arrays["transformed"][number] = transformed.cpu().numpy().mean(axis=0, dtype=np.float64)
                kept.finished(number + 1)
        except KeyboardInterrupt:
            kept.save()
            raise
        content = {**arrays, "fingerprint": np.array(fingerprint)}
        write_atomically(out_dir / FIRST_HALF_FILE, lambda stream: np.savez_compressed(stream, **content))
        remove_rows(out_dir / "partial")
    return CleanMeans(
        *({layer: arrays[f"{kind}_{layer}"] for layer in saes} for kind in ("activations", "active", "norms")),
        arrays["transformed"],
        np.array([len(cell.gene_positions) for cell in cells]),
    )


def _count(
    arrays: Mapping[str, NDArray], number: int, layer: int, residual: torch.Tensor, sae: "TopKSAE", cell: Cell
) -> None:
    with torch.inference_mode():
        latents = TopKLatents.of_cell(sae, residual, cell, layer)
        norms = residual.norm(dim=-1).cpu().numpy()
    positive = latents.features[latents.values > 0]
    arrays[f"activations_{layer}"][number] = latents.total(sae.n_features) / len(residual)
    arrays[f"active_{layer}"][number] = np.bincount(positive, minlength=sae.n_features)
    arrays[f"norms_{layer}"][number] = norms.sum(dtype=np.float64)


def _restored(arrays: Mapping[str, NDArray], path: Path, fingerprint: str) -> bool:
    kept = read_arrays(path)
    if kept is None:
        return False
    fits = all(name in kept and kept[name].shape == array.shape for name, array in arrays.items())
    if not fits or str(kept.get("fingerprint")) != fingerprint:
        log.warning("%s is of another run: it is made again.", path)
        return False
    for name, array in arrays.items():
        array[:] = kept[name]
    return True
