"""The engine: run the blocks after the source layer on a batch of edited copies of one cell's stream.

Blocks up to the source layer never see an edit, so a run starts from the cached clean stream. Features of
one cell have the same length and share everything but the edit, so they batch without padding. Only a few
positions are measured: the last block computes queries, MLP and norms at those alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellcircuits.attention import attend
from cellcircuits.geneformer import BlockParts, block_parts
from cellcircuits.linear import LinearMap, joined_difference, joined_linear
from cellcircuits.precision import FP32, MIXED, PRECISIONS

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

CPU_PIECE_BYTES = 9 << 20  # of the widest intermediate: small enough to stay in the cache from one product to the next


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

    def __init__(
        self, model: "BertForMaskedLM", source_layer: int, targets: Sequence[int], precision: str = FP32
    ) -> None:
        """Bind the blocks.

        Args:
            model: the Geneformer; it must not change afterwards.
            source_layer: no run starts from an earlier block.
            targets: layers after `source_layer`.
            precision: one of `precision.PRECISIONS`; `mixed` runs that know the clean stream carry the difference
                from it in float16, others are `fp32`.

        Raises:
            ValueError: there is no such precision, or not for a model of this type.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        if precision != FP32 and model.dtype != torch.float32:
            raise ValueError(f"precision {precision!r} is for a model in float32, and this one is in {model.dtype}")
        self.source_layer = source_layer
        self.targets = frozenset(targets)
        self.last = max(targets)
        self.precision = precision
        every = {layer: block_parts(model, layer) for layer in range(source_layer + 1, self.last + 1)}
        plain = FP32 if precision == MIXED else precision
        self._blocks = {layer: _Block(parts, plain) for layer, parts in every.items()}
        self._difference_blocks = {
            layer: _DifferenceBlock(block) for layer, block in self._blocks.items() if precision == MIXED
        }
        config = model.config
        self._widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads)
        self._device_type = model.device.type

    def advance(self, streams: Tensor, start: int, stop: int) -> Tensor:
        """Outputs of block `stop` from outputs of block `start`, both (batch, n_pos, d_model)."""
        for layer in range(start + 1, stop + 1):
            streams = self._blocks[layer](streams)
        return streams

    def run(
        self, streams: Tensor, measured: MeasuredPositions, start: int | None = None, clean: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Run the tail and read the targets.

        Args:
            streams: (batch, n_pos, d_model) outputs of block `start`, edited.
            measured: the positions to read.
            start: the block that the streams come from, before the last target; None means the source layer.
            clean: (n_pos, d_model) the unedited output of block `start`; the mode `mixed` needs it.

        Yields:
            (target layer, its residual stream at the measured positions (n_rows, d_model)), ascending.
        """
        start = self.source_layer if start is None else start
        if self.precision == MIXED and clean is not None:
            yield from self._run_differences(clean[None], streams - clean, measured, start)
            return
        for layer in range(start + 1, self.last):
            streams = self._blocks[layer](streams)
            if layer in self.targets:
                yield layer, streams[measured.item, measured.position]
        yield self.last, self._blocks[self.last](streams, measured.padded)[measured.item, measured.slot]

    def _run_differences(
        self, clean: Tensor, differences: Tensor, measured: MeasuredPositions, start: int
    ) -> Iterator[tuple[int, Tensor]]:
        """As `run`, from (1, n_pos, d_model) and the (batch, n_pos, d_model) differences of the streams from it."""
        for layer in range(start + 1, self.last):
            clean, differences = self._difference_blocks[layer](clean, differences)
            if layer in self.targets:
                at_measured = clean[0, measured.position] + differences[measured.item, measured.position]
                yield layer, at_measured
        clean, differences = self._difference_blocks[self.last](clean, differences, measured.padded)
        yield self.last, (clean + differences)[measured.item, measured.slot]

    def bytes_per_stream(self, n_pos: int, itemsize: int) -> int:
        """Peak memory that one stream of a batch needs, in bytes."""
        d_model, d_feed_forward, n_heads = self._widths
        # MPS may build the attention scores that the fused kernels of CUDA and CPU never hold
        scores = n_heads * n_pos if self._device_type == "mps" else 0
        times = 2 if self.precision == MIXED else 1  # of an intermediate: the whole and its difference
        return times * n_pos * (8 * d_model + 2 * d_feed_forward + scores) * itemsize


class _Block:
    """One encoder block as a function of a batch of streams; the three attention inputs are one product."""

    def __init__(self, parts: BlockParts, precision: str = FP32) -> None:
        self.parts, self.precision = parts, precision
        self.attention_output = joined_linear(parts.attention_output, precision=precision)
        self.has_relu = isinstance(parts.activation, torch.nn.ReLU)
        self.intermediate = joined_linear(parts.intermediate, relu=self.has_relu, precision=precision)
        self.output = joined_linear(parts.output, precision=precision)
        self.rows_at_once = max(1, CPU_PIECE_BYTES // (4 * parts.intermediate.out_features))

    # Most blocks never run at some rows only, and the last one only so: each holds the weights that it needs.
    @cached_property
    def query_key_value(self) -> LinearMap:
        """All three attention inputs of a stream, side by side."""
        return joined_linear(self.parts.query, self.parts.key, self.parts.value, precision=self.precision)

    @cached_property
    def key_value(self) -> LinearMap:
        """Keys and values of a stream, side by side."""
        return joined_linear(self.parts.key, self.parts.value, precision=self.precision)

    @cached_property
    def query(self) -> LinearMap:
        """Queries of some rows."""
        return joined_linear(self.parts.query, precision=self.precision)

    def __call__(self, streams: Tensor, rows: Tensor | None = None) -> Tensor:
        """(batch, n_pos, d_model) -> the same, or (batch, n_max, d_model) at `rows` (batch, n_max) only."""
        parts = self.parts
        if rows is None:
            query, key, value = self.query_key_value(streams).chunk(3, dim=-1)
        else:
            key, value = self.key_value(streams).chunk(2, dim=-1)
            streams = _at_rows(streams, rows)  # (batch, n_max, d_model)
            query = self.query(streams)
        attended = attend(query, key, value, parts.n_heads, self.precision)  # (batch, n_rows, d_model)
        flat, flat_attended = streams.flatten(0, 1), attended.flatten(0, 1)
        n_at_once = self.rows_at_once if streams.device.type == "cpu" else len(flat)
        pieces = zip(flat.split(n_at_once), flat_attended.split(n_at_once), strict=True)
        return torch.cat([self._feed_forward(*piece) for piece in pieces]).view_as(streams)

    def _feed_forward(self, streams: Tensor, attended: Tensor) -> Tensor:
        """What follows attention, position by position: (n_rows, d_model) twice -> (n_rows, d_model)."""
        parts = self.parts
        streams = parts.attention_norm(streams + self.attention_output(attended))
        expanded = self.intermediate(streams)
        return parts.output_norm(streams + self.output(expanded if self.has_relu else parts.activation(expanded)))


class _DifferenceBlock:
    """One encoder block on a clean stream in float32 and on the differences of edited streams from it.

    A linear map of x + e is Wx + b + We. Wx + b is computed once per batch in float32 and We in float16, so that its
    rounding is relative to the small e and not to x. What is not linear acts on the whole stream in float32, and the
    difference is taken again.
    """

    def __init__(self, exact: _Block) -> None:
        """Share the float32 maps of `exact`."""
        self.exact, self.parts = exact, exact.parts
        parts = exact.parts
        self.of_difference = {
            "query_key_value": joined_difference(parts.query, parts.key, parts.value),
            "key_value": joined_difference(parts.key, parts.value),
            "query": joined_difference(parts.query),
            "attention_output": joined_difference(parts.attention_output),
            "intermediate": joined_difference(parts.intermediate),
            "output": joined_difference(parts.output),
        }
        self.intermediate = joined_linear(parts.intermediate)  # that of `exact` may have the activation in it

    def __call__(self, clean: Tensor, differences: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clean stream (1, n_pos, d_model) and differences (batch, n_pos, d_model) -> both after the block.

        With `rows` (batch, n_max) both come out at these alone: (batch, n_max, d_model).
        """
        parts = self.parts
        if rows is None:
            joined, moved = self._both("query_key_value", clean, differences)
            (query, key, value), edited = joined.chunk(3, dim=-1), moved.chunk(3, dim=-1)
        else:
            joined, moved = self._both("key_value", clean, differences)
            batch = len(differences)
            key, value = joined.expand(batch, -1, -1).chunk(2, dim=-1)
            clean, differences = _at_rows(clean.expand(batch, -1, -1), rows), _at_rows(differences, rows)
            query, edited_query = self._both("query", clean, differences)
            edited = (edited_query, *moved.chunk(2, dim=-1))
        attended = attend(query, key, value, parts.n_heads)
        moved_attended = attend(*edited, parts.n_heads) - attended
        attended, moved_attended = self._both("attention_output", attended, moved_attended)
        clean, differences = _normed(parts.attention_norm, clean + attended, clean + differences + moved_attended)
        expanded, moved = self._both("intermediate", clean, differences)
        expanded, moved = parts.activation(expanded), parts.activation(moved)
        out, moved_out = self._both("output", expanded, moved - expanded)
        return _normed(parts.output_norm, clean + out, clean + differences + moved_out)

    def _both(self, name: str, clean: Tensor, differences: Tensor) -> tuple[Tensor, Tensor]:
        """A linear map of the clean input, and of the whole edited one."""
        of_clean = (self.intermediate if name == "intermediate" else getattr(self.exact, name))(clean)
        return of_clean, of_clean + self.of_difference[name](differences)


def _normed(norm: LinearMap, clean: Tensor, edited: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of the clean sums, and how much that of the edited ones differs."""
    of_clean = norm(clean)
    return of_clean, norm(edited) - of_clean


def _at_rows(streams: Tensor, rows: Tensor) -> Tensor:
    """(batch, n_pos, d_model) at `rows` (batch, n_max) -> (batch, n_max, d_model)."""
    return streams.gather(1, rows[..., None].expand(-1, -1, streams.shape[-1]))
