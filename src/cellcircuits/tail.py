"""The engine: run the blocks after the source layer on a batch of edited copies of one cell's stream.

Blocks up to the source layer never see an edit, so a run starts from the cached clean stream. Features of
one cell have the same length and share everything but the edit, so they batch without padding. Only a few
positions are measured: the last block computes queries, MLP and norms at those alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cellcircuits.geneformer import BlockParts, block_parts
from cellcircuits.linear import joined_linear

if TYPE_CHECKING:
    from transformers import BertForMaskedLM


@dataclass(frozen=True)
class MeasuredPositions:
    """Which positions of each stream of a batch are measured.

    `padded` (batch, n_max) repeats a position where a stream has fewer than n_max; `item` and `slot`, each
    (n_rows,), pick the real ones, stream by stream in ascending position.
    """

    padded: Tensor
    item: Tensor
    slot: Tensor

    @classmethod
    def of(cls, positions: Sequence[NDArray[np.int64]], device: torch.device) -> "MeasuredPositions":
        """Lay out one ascending, non-empty position array per stream."""
        counts = [len(of_one) for of_one in positions]
        padded = np.stack([np.pad(of_one, (0, max(counts) - len(of_one)), mode="edge") for of_one in positions])
        item = np.repeat(np.arange(len(counts)), counts)
        slot = np.concatenate([np.arange(count) for count in counts])
        return cls(*(torch.from_numpy(array).to(device) for array in (padded, item, slot)))

    @property
    def position(self) -> Tensor:
        """The measured position of each row, (n_rows,)."""
        return self.padded[self.item, self.slot]


class Tail:
    """Blocks source_layer + 1 to the last target of one Geneformer."""

    def __init__(self, model: "BertForMaskedLM", source_layer: int, targets: Sequence[int]) -> None:
        """Bind the blocks; `targets` are ascending layers after `source_layer`."""
        self.source_layer = source_layer
        self.targets = frozenset(targets)
        self.last = max(targets)
        self._blocks = {layer: _Block(block_parts(model, layer)) for layer in range(source_layer + 1, self.last + 1)}
        config = model.config
        self._widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads)
        self._device_type = model.device.type

    def advance(self, streams: Tensor, start: int, stop: int) -> Tensor:
        """Outputs of block `stop` from outputs of block `start`, both (batch, n_pos, d_model)."""
        for layer in range(start + 1, stop + 1):
            streams = self._blocks[layer](streams)
        return streams

    def run(
        self, streams: Tensor, measured: MeasuredPositions, start: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Run the tail and read the targets.

        Args:
            streams: (batch, n_pos, d_model) outputs of block `start`, edited.
            measured: the positions to read.
            start: the block that the streams come from, before the last target; None means the source layer.

        Yields:
            (target layer, its residual stream at the measured positions (n_rows, d_model)), ascending.
        """
        for layer in range((self.source_layer if start is None else start) + 1, self.last):
            streams = self._blocks[layer](streams)
            if layer in self.targets:
                yield layer, streams[measured.item, measured.position]
        yield self.last, self._blocks[self.last](streams, measured.padded)[measured.item, measured.slot]

    def bytes_per_stream(self, n_pos: int, itemsize: int) -> int:
        """Peak memory that one stream of a batch needs, in bytes."""
        d_model, d_feed_forward, n_heads = self._widths
        # MPS may build the attention scores that the fused kernels of CUDA and CPU never hold
        scores = n_heads * n_pos if self._device_type == "mps" else 0
        return n_pos * (8 * d_model + 2 * d_feed_forward + scores) * itemsize


class _Block:
    """One encoder block as a function of a batch of streams; the three attention inputs are one product."""

    def __init__(self, parts: BlockParts) -> None:
        self.parts = parts
        self.query_key_value = joined_linear(parts.query, parts.key, parts.value)
        self.key_value, self.query = joined_linear(parts.key, parts.value), joined_linear(parts.query)
        self.attention_output = joined_linear(parts.attention_output)
        self.intermediate, self.output = joined_linear(parts.intermediate), joined_linear(parts.output)

    def __call__(self, streams: Tensor, rows: Tensor | None = None) -> Tensor:
        """(batch, n_pos, d_model) -> the same, or (batch, n_max, d_model) at `rows` (batch, n_max) only."""
        parts, d_model = self.parts, streams.shape[-1]
        if rows is None:
            query, key, value = self.query_key_value(streams).chunk(3, dim=-1)
        else:
            key, value = self.key_value(streams).chunk(2, dim=-1)
            streams = streams.gather(1, rows[..., None].expand(-1, -1, d_model))  # (batch, n_max, d_model)
            query = self.query(streams)
        attended = F.scaled_dot_product_attention(self._heads(query), self._heads(key), self._heads(value))
        attended = attended.transpose(1, 2).flatten(2)  # (batch, n_rows, d_model)
        streams = parts.attention_norm(streams + self.attention_output(attended))
        return parts.output_norm(streams + self.output(parts.activation(self.intermediate(streams))))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.parts.n_heads, -1)).transpose(1, 2)  # (batch, n_heads, n_rows, d_head)
