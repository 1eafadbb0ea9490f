"""A cheaper quantity than the total effect: what an ablation does through the ablated positions alone.

    total effect          everything after the source layer is run again: a change spreads to every position
    same-position effect  only the positions where the feature is active run again and see each other's changed keys
                          and values; every other position keeps its clean stream

Both are measured at the same positions in the same way. A feature is active at a handful of a cell's positions, so
that the same-position effect costs about a hundredth. It leaves out what comes back through other positions: nothing
at the layer after the source, where both are the same, and more with every layer; `same_position_check` says how much.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cellcircuits.cells import Cell
from cellcircuits.device import batch_memory, host_memory
from cellcircuits.effects import Bench, CleanCell, Push, TopKLatents, mean_change
from cellcircuits.geneformer import BlockParts, block_parts, edited, residuals
from cellcircuits.interventions import remove_features
from cellcircuits.linear import joined_linear
from cellcircuits.precision import FP32, MIXED
from cellcircuits.tail import Tail
from sae_model import TopKSAE

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

log = logging.getLogger(__name__)
# Enough rows for matrix products to run at full rate; each row is compared with all the others', wanted or not.
ROWS_PER_RUN = 512
CLEAN_SHARE_OF_HOST_MEMORY = 0.3


@torch.inference_mode()
def same_position_effect(bench: Bench, cell: Cell, feature: int) -> dict[int, NDArray[np.float64]] | None:
    """Same-position effect of one feature, by two full hooked forward passes: the definition, slow and readable.

    After every block the positions where the feature is not active are put back to their clean streams, so that the
    next block reads clean keys and values there.

    Args:
        bench: model and SAEs.
        cell: the cell.
        feature: source feature.

    Returns:
        {target layer: (n_features,)}, or None where the feature is active nowhere: that is not an effect of 0.
    """
    tokens = torch.from_numpy(cell.tokens).to(bench.device)[None]
    positions = torch.from_numpy(cell.gene_positions).to(bench.device)
    source = bench.saes[bench.source_layer]
    clean = residuals(bench.model, tokens, range(bench.source_layer, max(bench.targets) + 1))
    chosen = (source.top_k(clean[bench.source_layer][0, positions])[1] == feature).any(-1)  # (n_gene,)
    if not chosen.any():
        return None
    active = positions[chosen]

    def others_clean(layer: int) -> Callable[[Tensor], Tensor]:
        def edit(residual: Tensor) -> Tensor:
            kept = clean[layer].clone()
            kept[:, active] = residual[:, active]
            return kept

        return edit

    edits = {layer: others_clean(layer) for layer in clean}
    edits[bench.source_layer] = remove_features(source, positions, [feature])
    with edited(bench.model, edits):
        ablated = residuals(bench.model, tokens, bench.targets)
    effects = {}
    for layer in bench.targets:
        before, after = (TopKLatents.of(bench.saes[layer], run[layer][0, active]) for run in (clean, ablated))
        effects[layer] = mean_change(before, after, bench.saes[layer])
    return effects


class SamePositionBench(Bench):
    """A bench whose `effects` are same-position effects; clean runs and everything else are those of `Bench`.

    The clean keys and values of a cell take 2 n_pos d_model numbers per block (226 MB for 2,048 tokens and 12 blocks
    of d_model 1,152 in float32) and are needed for every block of features, so they are kept on the device that
    computes. Cells that find no room there are run again each time, one more clean pass per call of `effects`; the
    log says so once.
    """

    def __init__(
        self,
        model: "BertForMaskedLM",
        saes: Mapping[int, TopKSAE],
        source_layer: int,
        targets: Sequence[int] | None = None,
        tail: Tail | None = None,
    ) -> None:
        """Bind the model and the SAEs; the arguments are those of `Bench`, the precision is float32 as loaded.

        Raises:
            ValueError: the tail rounds, which clean keys and values must not be.
        """
        if tail is not None and tail.precision not in (FP32, MIXED):
            raise ValueError(f"same-position effects need a tail that computes in float32, not in {tail.precision}")
        super().__init__(model, saes, source_layer, targets, tail)
        layers = range(source_layer + 1, max(self.targets) + 1)
        self._blocks = {layer: _Block(block_parts(model, layer)) for layer in layers}
        on_host = self.device.type == "cpu"
        n_bytes = CLEAN_SHARE_OF_HOST_MEMORY * host_memory() if on_host else batch_memory(self.device)
        self._clean_key_values = _Kept(int(n_bytes))

    def batch_size(self, n_pos: int) -> int:
        """How many features of a cell of `n_pos` tokens to ask for at once: `effects` divides them as memory wants."""
        return ROWS_PER_RUN

    def _run(self, clean: CleanCell, pushes: Sequence[Push]) -> Iterator[tuple[int, Tensor]]:
        """Run the pushed positions only; see `Bench._run`."""
        streams = [
            dict(self._run_rows(clean, [pushes[i] for i in batch]))
            for batch in _batches([len(push.rows) for push in pushes])
        ]
        for layer in self.targets:
            yield layer, torch.cat([of_batch[layer] for of_batch in streams])

    def _run_rows(self, clean: CleanCell, pushes: Sequence[Push]) -> Iterator[tuple[int, Tensor]]:
        """Run the pushed positions of all copies, as rows one copy after the other.

        Yields:
            (target layer, the residual stream of every row (n_rows, d_model)), ascending.
        """
        item = np.repeat(np.arange(len(pushes)), [len(push.rows) for push in pushes])  # (n_rows,)
        position = clean.cell.gene_positions[np.concatenate([push.rows for push in pushes])]
        visible = torch.from_numpy(_visible(item, position, len(clean.cell.tokens)))  # (n_rows, n_pos + n_rows)
        mask = torch.zeros(visible.shape, dtype=self.model.dtype).masked_fill_(~visible, -torch.inf).to(self.device)
        sizes = torch.from_numpy(np.concatenate([push.sizes for push in pushes])).to(self.device)
        directions = torch.stack([push.direction for push in pushes])[torch.from_numpy(item).to(self.device)]
        streams = clean.residual[torch.from_numpy(position)].to(self.device) + sizes[:, None] * directions
        key_values = self._key_values(clean)
        for layer, block in self._blocks.items():
            streams = block(streams, key_values[layer], mask)
            if layer in self.columns:
                yield layer, streams

    def _key_values(self, clean: CleanCell) -> dict[int, Tensor]:
        """Clean keys and values of every block, side by side: {layer: (n_pos, 2 d_model)}."""
        name = clean.cell.tokens.tobytes()  # what they depend on, whoever asks
        if name not in self._clean_key_values:
            streams, key_values = clean.residual.to(self.device)[None], {}
            for layer, block in self._blocks.items():
                key_values[layer] = block.key_value(streams[0])
                if layer < max(self._blocks):
                    streams = self.tail.advance(streams, layer - 1, layer)
            self._clean_key_values.put(name, key_values)
        return self._clean_key_values[name]


def _batches(n_rows: Sequence[int]) -> Iterator[list[int]]:
    """Divide features with `n_rows` each into runs of at most ROWS_PER_RUN rows, or of one that has more."""
    batch: list[int] = []
    for i, of_feature in enumerate(n_rows):
        if batch and sum(n_rows[j] for j in batch) + of_feature > ROWS_PER_RUN:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _visible(item: NDArray[np.int64], position: NDArray[np.int64], n_pos: int) -> NDArray[np.bool_]:
    """Which keys each row attends to: the clean ones of all positions, then those of the rows themselves.

    A row sees the rows of its own feature in place of the clean streams at their positions.

    Args:
        item: (n_rows,) which feature a row belongs to.
        position: (n_rows,) its position in the cell.
        n_pos: tokens of the cell.

    Returns:
        (n_rows, n_pos + n_rows).
    """
    stays_clean = np.ones((item[-1] + 1, n_pos), dtype=bool)
    stays_clean[item, position] = False
    return np.hstack([stays_clean[item], item[:, None] == item])


class _Block:
    """One encoder block for rows that attend to clean keys and values and to one another's."""

    def __init__(self, parts: BlockParts) -> None:
        self.parts = parts
        self.query, self.key_value = joined_linear(parts.query), joined_linear(parts.key, parts.value)
        self.attention_output = joined_linear(parts.attention_output)
        self.intermediate, self.output = joined_linear(parts.intermediate), joined_linear(parts.output)

    def __call__(self, streams: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
        """Outputs of the block for some rows of its input, both (n_rows, d_model).

        The features of a run share one table of keys, and the mask tells them apart: nothing of the size of a cell
        exists once per feature.

        Args:
            streams: the rows.
            clean: (n_pos, 2 d_model) keys and values of the clean stream.
            mask: (n_rows, n_pos + n_rows), added to the attention scores: 0 or minus infinity.
        """
        parts = self.parts
        key, value = torch.cat([clean, self.key_value(streams)]).chunk(2, dim=-1)  # (n_pos + n_rows, d_model)
        attended = F.scaled_dot_product_attention(
            self._heads(self.query(streams)), self._heads(key), self._heads(value), attn_mask=mask
        )
        attended = attended[0].transpose(0, 1).flatten(1)  # (n_rows, d_model)
        streams = parts.attention_norm(streams + self.attention_output(attended))
        return parts.output_norm(streams + self.output(parts.activation(self.intermediate(streams))))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.parts.n_heads, -1)).transpose(0, 1)[None]  # (1, n_heads, n_rows, d_head)


class _Kept:
    """Clean keys and values of cells, the first ones for good while they fit, and the last one in any case.

    Cells are asked for in the same order again and again: whatever makes room for a newer one would be missed first.
    """

    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes
        self._for_good: dict[bytes, dict[int, Tensor]] = {}
        self._last: dict[bytes, dict[int, Tensor]] = {}
        self._has_said_full = False

    def __contains__(self, name: bytes) -> bool:
        return name in self._for_good or name in self._last

    def __getitem__(self, name: bytes) -> dict[int, Tensor]:
        return self._last[name] if name in self._last else self._for_good[name]

    def put(self, name: bytes, key_values: dict[int, Tensor]) -> None:
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in key_values.values())
        self._last = {name: key_values}
        if n_bytes <= self._left:
            self._for_good[name] = key_values
            self._left -= n_bytes
        elif not self._has_said_full:
            self._has_said_full = True
            log.warning(
                "Memory has room for the clean keys and values of %d of the cells; those of the others are computed "
                "again for every block of features.",
                len(self._for_good),
            )
