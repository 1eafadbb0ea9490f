"""A bench that looks its effects up in a table, and cells that are active where another table says so."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cellcircuits.cells import Cell
from cellcircuits.graph_store import read_shard, shard_path
from cellcircuits.stats import EdgeRule
from cellcircuits.tracing import BlockEffects, block_shard, trace_block

N_CELLS, N_FEATURES, WIDTHS = 6, 40, {6: 3, 8: 5}
N_TARGETS = sum(WIDTHS.values())
RNG = np.random.default_rng(0)
TABLE = RNG.normal(RNG.normal(size=(N_FEATURES, 1, N_TARGETS)), 1.0, (N_FEATURES, N_CELLS, N_TARGETS))
N_ACTIVE = RNG.integers(0, 4, (N_FEATURES, N_CELLS))  # positions where a feature is active
N_ACTIVE[:, 0] = np.arange(N_FEATURES) % 4
N_ACTIVE[7] = 0
RULE = EdgeRule()
FINGERPRINT = "of this run"


class TableBench:
    """What tracing asks of a `Bench`; it remembers what it was asked, and `before` may fail or act for others."""

    device = torch.device("cpu")
    source_layer, targets, n_targets = 5, tuple(WIDTHS), N_TARGETS
    columns = {6: slice(0, 3), 8: slice(3, 8)}  # noqa: RUF012
    tail = SimpleNamespace(precision="fp32")

    def __init__(self, before: Callable[[int, Sequence[int]], None] = lambda row, features: None):
        self.before, self.calls = before, []

    def rows(self, clean: Any, feature: int) -> np.ndarray:
        return clean.active_rows(feature)

    def effects(self, clean: Any, features: Sequence[int]) -> np.ndarray:
        self.before(clean.cell.row, features)
        self.calls.append((clean.cell.row, tuple(features)))
        return TABLE[list(features), clean.cell.row]

    def removed_norm(self, clean: Any, feature: int) -> float:
        return feature + len(self.rows(clean, feature)) / 8

    def batch_size(self, n_pos: int) -> int:
        return n_pos - 5


def clean_cell(row: int) -> Any:
    cell = Cell(f"cell{row}", row, np.arange(9 + row), np.arange(4))
    return SimpleNamespace(cell=cell, active_rows=lambda feature: np.arange(N_ACTIVE[feature, row]))


CELLS = [clean_cell(row) for row in range(N_CELLS)]


def defined(bench: Any, cell: Cell, feature: int) -> dict[int, np.ndarray]:
    """The definition that agrees with the table."""
    return {layer: TABLE[feature, cell.row, columns] for layer, columns in bench.columns.items()}


def block_of(*features: int) -> BlockEffects:
    return BlockEffects.empty(features, N_CELLS, N_TARGETS)


def traced(*features: int) -> BlockEffects:
    block = block_of(*features)
    trace_block(TableBench(), CELLS, block)
    return block


def expected_shard(out_dir: Path, block: int, features: Sequence[int]) -> bool:
    """Whether the shard of a block holds just these features, with the effects of the table."""
    shard = read_shard(shard_path(out_dir, block), FINGERPRINT)
    expected = block_shard(TableBench(), traced(*features), RULE, FINGERPRINT)
    return list(shard.facts) == list(features) and shard.edges.equals(expected.edges)
