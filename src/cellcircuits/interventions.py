"""The edit of the residual stream that every experiment makes: features scaled along their decoder directions.

    x  ->  x + (coefficient - 1) * sum_f h_f * W_dec[:, f]        at the gene positions

Coefficient 0 is ablation, 1 the identity. The SAE's error term and all other features stay as they are.
Tensors in, tensors out. This is the definition; `Bench.effects` makes the same ablation from latents it has already.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sae_model import TopKSAE


def scale_features(
    sae: TopKSAE, gene_positions: Tensor, features: Sequence[int], coefficient: float
) -> Callable[[Tensor], Tensor]:
    """The edit that multiplies the latents of `features` by `coefficient`.

    The stream is encoded as it arrives, so that edits of several layers compose in one forward pass.

    Args:
        sae: the SAE of the layer to edit.
        gene_positions: (n_gene,) int64.
        features: feature indices, edited together from one encoding.
        coefficient: 0 ablates, 1 changes nothing.

    Returns:
        An edit (batch, n_pos, d_model) -> (batch, n_pos, d_model).
    """
    chosen = torch.as_tensor(list(features), dtype=torch.int64, device=gene_positions.device)

    def edit(residual: Tensor) -> Tensor:
        latents = sae.encode(residual[:, gene_positions])[..., chosen]  # (batch, n_gene, n_chosen)
        change = (coefficient - 1) * latents @ sae.decoder_directions[chosen]  # (batch, n_gene, d_model)
        return residual.index_add(1, gene_positions, change)

    return edit


def remove_features(sae: TopKSAE, gene_positions: Tensor, features: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The edit that sets the latents of `features` to 0 (zero ablation); see `scale_features`."""
    return scale_features(sae, gene_positions, features, 0.0)
