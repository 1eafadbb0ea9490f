"""What a trajectory analysis would do and how long it would take: the part of `--check` that is its own.

One clean pass per cell gives the activations; what is timed is that pass with everything the run makes of it, the
statistics over all cells, and how small the activations are when they are written.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cellcircuits.flops import ModelShape, block_flops
from cellcircuits.plan_report import Disk, Plan, Work, peak_host_bytes
from cellcircuits.probe import Probe, Rate, Seconds, by_length, is_long
from cellcircuits.switch_features import CellOrder, SwitchRule, cell_activations, layer_statistics

if TYPE_CHECKING:
    from cellcircuits.cells import Cell
    from cellcircuits.trajectory import Trajectory

PASS_SHARE = 0.8  # of the probe's seconds
CELLS_COMPRESSED = 50
OTHER_BYTES = 200  # of metadata, per cell
LATER_BYTES = 40 << 20  # what a run holds beyond its passes


def check_trajectory(plan: Plan, trajectory: "Trajectory", n_genes: NDArray[np.int64]) -> Plan:
    """Fill in what an analysis would do.

    Args:
        plan: with the inputs; what is measured, the work, memory and disk are filled in.
        trajectory: the cells' order.
        n_genes: (n_cells,) detected genes.

    Raises:
        UserError: a pass cannot be made.
    """
    cells, rule = plan.opened.cells.cells, SwitchRule()
    n_features = [opened_sae.sae.n_features for opened_sae in plan.layers.values()]
    n_left_out = int((~trajectory.measured).sum())
    plan.to_measure += [
        ("trajectory", f"{len(trajectory.early)} early and {len(trajectory.late)} late cells, {n_left_out} left out"),
        ("", f"pseudotime from {trajectory.source}, root {trajectory.root or 'unknown'}"),
        ("features", f"{sum(n_features)}, those of layers {', '.join(map(str, plan.layers))}, tested in every cell"),
    ]
    passes, activations = probe_passes(plan, cells)
    shape, n_blocks = ModelShape.of(plan.opened.loaded.model.config), max(plan.layers) + 1
    flops = sum(n_blocks * block_flops(shape, len(cell.tokens)) for cell in cells)
    plan.works.append(Work("clean passes", len(cells), flops, passes.seconds(flops)))
    order = CellOrder(trajectory.pseudotime, trajectory.early, trajectory.late, n_genes)
    seconds = time_statistics(activations, plan.layers, order, rule)
    plan.works.append(Work("layers to test", len(n_features), 0.0, seconds))
    seconds_of_writing, n_bytes = time_writing(activations, len(cells))
    plan.works.append(Work("file of activations to compress", 1, 0.0, seconds_of_writing))
    of_arrays = 3 * 4 * len(cells) * sum(n_features)
    plan.host_bytes = peak_host_bytes() + of_arrays + LATER_BYTES
    others = OTHER_BYTES * len(cells) + 1e5
    plan.disk = Disk(n_bytes / 4 + others / 4, n_bytes + others, of_arrays + 2 * others)
    return plan


def probe_passes(plan: Plan, cells: Sequence["Cell"]) -> tuple[Rate, dict[str, NDArray[np.float32]]]:
    """Time passes of cells of all lengths; returns the activations of those too."""
    model = plan.opened.loaded.model
    saes = {layer: opened_sae.sae for layer, opened_sae in plan.layers.items()}
    shape, n_blocks = ModelShape.of(model.config), max(saes) + 1
    order = by_length([len(cell.tokens) for cell in cells])
    probe, rate, found = Probe(model.device), Rate(), []
    for number, i in enumerate([order[0], *order]):
        seconds, of_cell = probe.timed(lambda i=i: cell_activations(model, saes, [cells[i]]))
        if not number and not is_long(seconds):  # the first call takes longer
            probe = Probe(model.device).share(PASS_SHARE)
            continue
        rate.add(n_blocks * block_flops(shape, len(cells[i].tokens)), seconds)
        found.append(of_cell)
        if not probe.left:
            break
    return rate, {name: np.concatenate([of_cell[name] for of_cell in found]) for name in found[0]}


def time_statistics(
    activations: Mapping[str, NDArray[np.float32]], layers: Mapping[int, object], order: CellOrder, rule: SwitchRule
) -> Seconds:
    """How long the tests of all layers take, on the measured cells drawn again and again."""
    n_cells, rng = len(order.pseudotime), np.random.default_rng(0)
    layer = next(iter(layers))
    values = activations[f"layer_{layer}"]
    drawn = values[rng.integers(0, len(values), n_cells)] * rng.uniform(0.5, 1.5, (n_cells, 1)).astype(np.float32)
    seconds, _ = Probe(torch.device("cpu")).timed(lambda: layer_statistics(drawn, order, rule.min_freq))
    return Rate([(1.0, seconds)]).seconds(len(layers))


def time_writing(activations: Mapping[str, NDArray[np.float32]], n_cells: int) -> tuple[Seconds, float]:
    """How long compressing the activations of all cells takes, and their bytes then."""
    some = {name: values[:CELLS_COMPRESSED] for name, values in activations.items()}
    n_some, stream = len(next(iter(some.values()))), BytesIO()
    seconds, _ = Probe(torch.device("cpu")).timed(lambda: np.savez_compressed(stream, **some))
    return Rate([(1.0, seconds)]).seconds(n_cells / n_some), stream.tell() * n_cells / n_some
