"""Joint ablation: two or three features removed alone and together, in one cell.

Removing features of several layers is sequential: the earlier one is removed, the model runs on, the later
layer's stream is encoded AS IT ARRIVES, and the later feature is removed there. `joint_ablation_effect` says
so with full hooked forward passes. `JointBench.effects` computes all conditions of a combination as one tree
of tail runs: A is run once up to B's layer, AB branches off there, and the last segment is one batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellcircuits.cells import Cell
from cellcircuits.combination_stats import conditions
from cellcircuits.device import batch_memory, kept_on_host
from cellcircuits.effects import TopKLatents
from cellcircuits.finite import latents_at, require_finite, require_finite_stream, stream_at
from cellcircuits.geneformer import edited, residuals
from cellcircuits.interventions import remove_features
from cellcircuits.tail import MeasuredPositions, Tail
from sae_model import TopKSAE

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

LayerFeature = tuple[int, int]  # layer, feature index
# Largest error of a latent in machine epsilons of the largest latent at its position, with a margin. In float32 against
# float64 it was 8 (root mean square 1.4) over 5,000 positions of the demo, and 11 (2.5) over 1,500 of a random model of
# Geneformer V2-316M's shape.
ROUNDING = 16


@dataclass(frozen=True)
class CleanPath:
    """The clean run of one cell along the ablated layers and at the target.

    `residual[layer]` (n_pos, d_model) on the host, `latents[layer]` and `target` one row per gene position.
    """

    cell: Cell
    residual: Mapping[int, Tensor]
    latents: Mapping[int, TopKLatents]
    target: TopKLatents

    def active(self, feature: LayerFeature) -> NDArray[np.bool_]:
        """Gene positions where the feature is among the k selected, (n_gene,)."""
        layer, index = feature
        return (self.latents[layer].features == index).any(axis=1)

    @property
    def n_bytes(self) -> int:
        """Host memory of the kept streams, in bytes."""
        return sum(stream.numel() * stream.element_size() for stream in self.residual.values())


@dataclass(frozen=True)
class CellEffects:
    """One cell's effects of every condition of a combination, target latents in activation units.

    Conditions are in the order of `combination_stats.conditions`; each array but the first has shape
    (n_conditions, n_targets).

    Attributes:
        measured: (n_conditions,) bool, whether a feature of the condition is active anywhere.
        published: averaged over the positions where a feature of the condition itself is active.
        union: averaged over the positions where any feature of the combination is, the same for all conditions.
        additive: what `published` would be if effects added exactly: the sum of the single ablations' changes
            over the condition's positions.
        rounding: (n_targets,) bound on how far rounding moves one latent averaged as in `union`.
        n_block_runs: encoder blocks run on one stream each; a full forward pass is n_layers of them.
    """

    measured: NDArray[np.bool_]
    published: NDArray[np.float64]
    union: NDArray[np.float64]
    additive: NDArray[np.float64]
    rounding: NDArray[np.float64]
    n_block_runs: int


@torch.inference_mode()
def joint_ablation_effect(
    bench: "JointBench", cell: Cell, features: Sequence[LayerFeature]
) -> NDArray[np.float64] | None:
    """Effect of removing features together, by two full hooked forward passes: the definition, slow and readable.

    Returns:
        (n_targets,), averaged over the gene positions where any of them is active in the clean run; None where none is.
    """
    tokens = torch.from_numpy(cell.tokens).to(bench.device)[None]
    positions = torch.from_numpy(cell.gene_positions).to(bench.device)
    by_layer: dict[int, list[int]] = {}
    for layer, index in features:
        by_layer.setdefault(layer, []).append(index)
    clean = residuals(bench.model, tokens, [*by_layer, bench.target])
    active = torch.zeros(len(positions), dtype=torch.bool, device=bench.device)
    for layer, index in features:
        active |= (bench.saes[layer].top_k(clean[layer][0, positions])[1] == index).any(-1)
    if not active.any():
        return None
    edits = {layer: remove_features(bench.saes[layer], positions, indices) for layer, indices in by_layer.items()}
    with edited(bench.model, edits):
        ablated = residuals(bench.model, tokens, [bench.target])
    sae = bench.saes[bench.target]
    before = TopKLatents.of(sae, clean[bench.target][0, positions[active]])
    after = TopKLatents.of(sae, ablated[bench.target][0, positions[active]])
    return (after.total(sae.n_features) - before.total(sae.n_features)) / int(active.sum())


class JointBench:
    """A model with its SAEs, set up to measure combinations of features on one target layer."""

    def __init__(
        self, model: "BertForMaskedLM", saes: Mapping[int, TopKSAE], layers: Iterable[int], target: int
    ) -> None:
        """Bind the model and the SAEs of the ablated `layers`, all before `target`, and of the target itself."""
        self.model, self.saes, self.target = model, saes, target
        self.layers = tuple(sorted(set(layers)))
        self.device = model.device
        self.tail = Tail(model, self.layers[0], [target])
        self.n_targets = saes[target].n_features

    @torch.inference_mode()
    def clean(self, cell: Cell) -> CleanPath:
        """Run one cell unedited; later layers are read through the tail, so that rounding is shared with edits.

        Raises:
            UserError: the model or an SAE gives NaN or infinite values.
        """
        tokens = torch.from_numpy(cell.tokens).to(self.device)[None]
        everywhere = MeasuredPositions.of([cell.gene_positions], self.device)
        before = self.layers[0]
        stream = residuals(self.model, tokens, [before])[before]  # (1, n_pos, d_model)
        residual, latents = {}, {}
        for layer in self.layers:
            stream = self.tail.advance(stream, before, layer)
            require_finite_stream(stream[0], cell, layer)
            residual[layer] = kept_on_host(stream[0])
            latents[layer] = TopKLatents.of_cell(self.saes[layer], stream[0, everywhere.position], cell, layer)
            before = layer
        ((_, at_target),) = self.tail.run(stream, everywhere, start=before)
        target = TopKLatents.of_cell(self.saes[self.target], at_target, cell, self.target)
        return CleanPath(cell, residual, latents, target)

    @torch.inference_mode()
    def effects(self, clean: CleanPath, features: Sequence[LayerFeature], batch_size: int | None = None) -> CellEffects:
        """Effects of every condition, as one tree of tail runs.

        Args:
            clean: the cell's clean run.
            features: the combination, A first; layers in any order.
            batch_size: streams run at once; None means what memory allows.

        Raises:
            UserError: the model or an SAE gives NaN or infinite values.
        """
        active = np.stack([clean.active(feature) for feature in features])  # (order, n_gene)
        rows = np.flatnonzero(active.any(axis=0))
        tree = _Tree(self, clean, features, batch_size or self.batch_size(len(clean.cell.tokens)))
        changes = _Changes(clean.target.at(rows), tree.read(rows), self.n_targets)
        rounding = ROUNDING * torch.finfo(self.model.dtype).eps * changes.latent_size()
        subsets = conditions(len(features))
        shape = (len(subsets), self.n_targets)
        measured = np.zeros(len(subsets), dtype=bool)
        published, union, additive = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for c, members in enumerate(subsets):
            own = active[list(members)].any(axis=0)[rows]  # (n_rows,)
            measured[c] = own.any()
            if not len(rows):
                continue
            union[c] = changes.mean(tree.stream_of(members), slice(None))
            if measured[c]:
                published[c] = changes.mean(tree.stream_of(members), own)
                additive[c] = sum(changes.mean(tree.stream_of((i,)), own) for i in members)
        return CellEffects(measured, published, union, additive, rounding, tree.n_block_runs)

    def batch_size(self, n_pos: int) -> int:
        """How many streams of a cell of `n_pos` tokens fit in memory as one batch."""
        return max(1, batch_memory(self.device) // self.tail.bytes_per_stream(n_pos, self.model.dtype.itemsize))


@dataclass(frozen=True)
class _Changes:
    """Latents of the target layer at some positions: the clean ones, and those of every edited stream."""

    before: TopKLatents
    after: Sequence[TopKLatents]
    n_targets: int

    def latent_size(self) -> NDArray[np.float64]:
        """What rounding of each latent is relative to, averaged over all positions, (n_targets,).

        At a position where the latent is selected in any stream, the largest latent of any stream there: a sum of
        many products is rounded by their size, not by its own.
        """
        read = [self.before, *self.after]
        n_rows = len(self.before.values)
        if not n_rows:
            return np.zeros(self.n_targets)
        largest = np.max([latents.values.max(axis=1) for latents in read], axis=0)  # (n_rows,)
        keys = np.concatenate(
            [np.arange(n_rows)[:, None] * self.n_targets + latents.features for latents in read], axis=None
        )
        row, target = np.divmod(np.unique(keys), self.n_targets)
        return np.bincount(target, weights=largest[row], minlength=self.n_targets) / n_rows

    def mean(self, stream: int | None, rows: NDArray[np.bool_] | slice) -> NDArray[np.float64]:
        """Mean change (n_targets,) over `rows`; 0 for the clean stream, which is None."""
        if stream is None:
            return np.zeros(self.n_targets)
        after, before = self.after[stream].at(rows), self.before.at(rows)
        return (after.total(self.n_targets) - before.total(self.n_targets)) / len(before.values)


class _Tree:
    """All edited streams of one combination in one cell, advanced layer by layer.

    A state is the set of features removed so far. States whose streams are equal share one: a removal that
    changes nothing (active nowhere, or latent 0 wherever selected) branches nothing off, so that its effect is
    exactly that of its parent and no rounding is taken for an effect.
    """

    def __init__(self, bench: JointBench, clean: CleanPath, features: Sequence[LayerFeature], batch_size: int) -> None:
        self._bench, self._clean, self._batch_size = bench, clean, batch_size
        self._gene_positions = torch.from_numpy(clean.cell.gene_positions).to(bench.device)
        self._states: dict[frozenset[int], int | None] = {frozenset(): None}  # None is the clean stream
        self.n_block_runs = 0
        streams: list[Tensor] = []  # each (n_pos, d_model), outputs of block `self._at`
        self._at = min(layer for layer, _ in features)
        for layer in sorted({layer for layer, _ in features}):
            streams = self._advanced(streams, layer)
            self._branch(streams, layer, {i: index for i, (at, index) in enumerate(features) if at == layer})
        self._streams = streams

    def stream_of(self, members: Iterable[int]) -> int | None:
        """Which stream a condition reads; None for the clean one."""
        return self._states[frozenset(members)]

    def read(self, rows: NDArray[np.int64]) -> list[TopKLatents]:
        """Target latents of every stream at some gene positions (n_rows,): the last segment, one batch."""
        bench, cell, read = self._bench, self._clean.cell, []
        positions = cell.gene_positions[rows]
        for batch in self._batches(self._streams):
            measured = MeasuredPositions.of([positions] * len(batch), bench.device)
            ((_, at_target),) = bench.tail.run(torch.stack(batch), measured, start=self._at)
            # NaN of any earlier layer is here too: attention hands it to every position
            require_finite(at_target, cell, f"{stream_at(bench.target)} after an ablation", positions)
            latents = TopKLatents.of(bench.saes[bench.target], at_target)
            require_finite(latents.values, cell, latents_at(bench.target), positions)
            read += [latents.at(slice(i * len(rows), (i + 1) * len(rows))) for i in range(len(batch))]
        self.n_block_runs += len(self._streams) * (bench.target - self._at)
        return read

    def _batches(self, streams: Sequence[Tensor]) -> Iterable[Sequence[Tensor]]:
        return [streams[i : i + self._batch_size] for i in range(0, len(streams), self._batch_size)]

    def _advanced(self, streams: Sequence[Tensor], layer: int) -> list[Tensor]:
        advanced = [
            stream
            for batch in self._batches(streams)
            for stream in self._bench.tail.advance(torch.stack(batch), self._at, layer)
        ]
        self.n_block_runs += len(streams) * (layer - self._at)
        self._at = layer
        return advanced

    def _branch(self, streams: list[Tensor], layer: int, here: Mapping[int, int]) -> None:
        """Remove every set of the features `here` {number in the combination: index} from every state's stream."""
        sae = self._bench.saes[layer]
        sets = [chosen for size in range(1, len(here) + 1) for chosen in combinations(here, size)]
        made: dict[tuple[int | None, tuple[int, ...]], int | None] = {}  # (parent stream, features that move it)
        for state, number in list(self._states.items()):
            if number is None:
                stream = self._clean.residual[layer].to(self._bench.device)
                latents = self._clean.latents[layer]
                values = torch.from_numpy(latents.values).to(self._bench.device)
                selected = torch.from_numpy(latents.features).to(self._bench.device)
            else:
                stream = streams[number]
                values, selected = sae.top_k(stream[self._gene_positions])  # encoded as it arrives
            for chosen in sets:
                indices = torch.tensor([here[i] for i in chosen], device=self._bench.device)
                h = (values[..., None] * (selected[..., None] == indices)).sum(-2)  # (n_gene, n_chosen)
                moving = tuple(i for i, moves in zip(chosen, h.any(dim=0).tolist(), strict=True) if moves)
                if not moving:
                    made[number, moving] = number
                if (number, moving) not in made:
                    made[number, moving] = len(streams)
                    change = -h @ sae.decoder_directions[indices]  # (n_gene, d_model)
                    streams.append(stream.index_add(0, self._gene_positions, change))
                self._states[state.union(chosen)] = made[number, moving]
