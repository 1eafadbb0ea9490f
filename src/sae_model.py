"""The TopK sparse autoencoder that all experiments share.

    encode(x): pre = (x - mean) W_enc^T + b_enc; keep the k largest per position, ReLU them, the rest is 0
    decode(h): h W_dec^T + b_dec

A feature is *active* at a position when it is among the k selected there, even where the ReLU made its
latent 0. Training lives elsewhere (`cellcircuits.sae_training`); loading in `cellcircuits.sae_store`.
"""

import torch
from torch import Tensor, nn

STATE_KEYS = ("W_enc.weight", "W_enc.bias", "W_dec.weight", "W_dec.bias")


class TopKSAE(nn.Module):
    """TopK sparse autoencoder of one layer's residual stream.

    The mean of the stream is a buffer of the SAE, so that callers pass the raw stream. It is not part of
    the checkpoint, which keeps it in `activation_mean.npy` beside it.

    Source: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", section 2.3.
    """

    input_mean: Tensor

    def __init__(self, d_model: int, n_features: int, k: int) -> None:
        """Make an SAE with PyTorch's default initialisation and a zero mean.

        Raises:
            ValueError: k is not between 1 and n_features.
        """
        super().__init__()
        if not 1 <= k <= n_features:
            raise ValueError(f"k must be between 1 and n_features = {n_features}, not {k}.")
        self.d_model, self.n_features, self.k = d_model, n_features, k
        self.W_enc = nn.Linear(d_model, n_features)
        self.W_dec = nn.Linear(n_features, d_model)
        self.register_buffer("input_mean", torch.zeros(d_model), persistent=False)

    @property
    def decoder_directions(self) -> Tensor:
        """What each feature writes into the residual stream, (n_features, d_model)."""
        return self.W_dec.weight.T

    def pre_activations(self, residual: Tensor) -> Tensor:
        """Encoder output before TopK: (..., d_model) -> (..., n_features)."""
        return self.W_enc(residual - self.input_mean)

    def top_k(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The k selected latents per position.

        Args:
            residual: (..., d_model) raw residual stream.

        Returns:
            Latents (..., k), >= 0 in activation units, and the features they belong to (..., k) int64.
        """
        values, indices = self.pre_activations(residual).topk(self.k, dim=-1)
        return values.relu(), indices

    def encode(self, residual: Tensor) -> Tensor:
        """Latents with explicit zeros: (..., d_model) -> (..., n_features)."""
        values, indices = self.top_k(residual)
        latents = values.new_zeros(*values.shape[:-1], self.n_features)
        return latents.scatter(-1, indices, values)

    def decode(self, latents: Tensor) -> Tensor:
        """Centred reconstruction: (..., n_features) -> (..., d_model), without `input_mean`."""
        return self.W_dec(latents)

    def reconstruct(self, residual: Tensor) -> Tensor:
        """Reconstruction in the residual stream's own space: (..., d_model) -> (..., d_model)."""
        return self.decode(self.encode(residual)) + self.input_mean
