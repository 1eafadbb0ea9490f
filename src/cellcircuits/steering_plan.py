"""What a run of experiment 3's steering would do and how long it would take: the part of `--check` that is its own.

Which features are active in which early cells is counted in clean passes, of all early cells where that takes seconds
and of a spread of them otherwise. The steered passes timed are the run's own batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cellcircuits import steering_results
from cellcircuits.flops import ModelShape, block_flops, tail_flops
from cellcircuits.panel import PanelFeature
from cellcircuits.plan_report import Disk, Plan, Work, in_numbers, peak_host_bytes
from cellcircuits.probe import Probe, Rate, by_length, is_long, spread
from cellcircuits.state_shift import Signatures, alpha_result, state_shifts
from cellcircuits.steering import CleanStates, SteeringRun, is_active, moves
from cellcircuits.steering_run import Steerer

if TYPE_CHECKING:
    from cellcircuits.cells import Cell

CLEAN_SHARE = 0.3  # of the probe's seconds
STATES_KEPT = 4  # clean states lie on the device: steered passes are timed in so many cells
RECORD_BYTES, CELL_BYTES = 5500, 75  # of a feature and alpha, and of each cell in it, as the demo's files show
LATER_BYTES = 40 << 20  # what a run holds beyond its passes


@dataclass
class Measured:
    """What the probe found; the lists have one number per counted cell."""

    clean: Rate = field(default_factory=Rate)
    steered: Rate = field(default_factory=Rate)
    at_the_end: Rate = field(default_factory=Rate)  # the last layer's features, which no block follows
    lengths: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    end_passes: list[int] = field(default_factory=list)
    end_flops: list[float] = field(default_factory=list)
    record_seconds: float = 0.0


def check_steering(plan: Plan, steerer: Steerer, panel: Sequence[PanelFeature], *, goes_on: bool) -> Plan:
    """Fill in what steering a panel would do.

    Args:
        plan: with the inputs; what is measured, the work, memory and disk are filled in.
        steerer: the run, not started.
        panel: the features.
        goes_on: whether the folder holds results of this run.

    Raises:
        UserError: the folder's records are of other SAEs, or a pass cannot be made.
    """
    records = steering_results.read_records(steerer.out_dir, steerer.fingerprint) if goes_on else []
    steering_results.require_same_saes(records, steerer.saes, steerer.out_dir)
    there = {steering_results.name_of(record) for record in records}
    left = [feature for feature in panel if feature.name not in there]
    layers = ", ".join(str(layer) for layer in sorted({feature.layer for feature in panel}))
    alphas = ", ".join(f"{alpha:g}" for alpha in steerer.alphas)
    plan.to_measure += [
        ("trajectory", f"{len(steerer.early)} early and {len(steerer.late)} late cells of {len(steerer.cells)}"),
        ("features", f"{len(panel)} of layers {layers}, alphas {alphas}; {len(panel) - len(left)} are there"),
    ]
    plan.host_bytes = peak_host_bytes()
    if left:
        found = probe_run(steerer, left)
        n_early, n_counted = len(steerer.early), len(found.pairs)
        n_active = sum(found.pairs) * n_early / n_counted
        exactly = n_counted == n_early
        how = f"counted in all {n_early} early cells" if exactly else f"from {n_counted} of {n_early} early cells"
        n = f"{'' if exactly else 'about '}{in_numbers(n_active)}"
        text = f"{n} of {in_numbers(len(left) * n_early)} (feature, early cell), {how}"
        plan.to_measure.append(("active pairs", text))
        plan.works += works(steerer, left, found, goes_on=goes_on)
        d_model = steerer.logit_map.weight.shape[1]
        changes = 8 * d_model * n_early * len(left) * len(steerer.alphas)
        plan.host_bytes = peak_host_bytes() + 2 * changes + LATER_BYTES  # one more copy while it is saved
    of_feature = len(steerer.alphas) * (RECORD_BYTES + CELL_BYTES * len(steerer.early))
    n_vocab = len(steerer.logit_map.bias)
    about = len(left) * of_feature + (2 * 8 * n_vocab if left else 0)
    partial = 8 * len(left) * len(steerer.alphas) * len(steerer.early) * steerer.bench.model.config.hidden_size
    plan.disk = Disk(about / 4, about, 2 * about + 2 * partial)
    return plan


def probe_run(steerer: Steerer, left: Sequence[PanelFeature]) -> Measured:
    """Count and time clean and steered passes, about ten seconds in all."""
    cells = [steerer.cells[i] for i in steerer.early]
    order = by_length([len(cell.tokens) for cell in cells])
    found = Measured()  # first calls compile, pack weights and take memory
    probe = Probe(steerer.bench.device, 0.0)
    seconds, kept = probe.timed(lambda: time_cells(steerer, [cells[order[0]]], left, found, probe))
    if not is_long(seconds):
        found, probe = Measured(), Probe(steerer.bench.device)
        kept = time_cells(steerer, [cells[i] for i in order], left, found, probe)
    found.record_seconds = time_record(steerer, kept[0], probe)
    return found


def time_cells(
    steerer: Steerer, cells: Sequence["Cell"], left: Sequence[PanelFeature], found: Measured, probe: Probe
) -> list[CleanStates]:
    """Count and time cells until the time is over, the first one in any case; returns some of the clean states."""
    shape, bench, kept = ModelShape.of(steerer.bench.model.config), steerer.bench, []
    of_clean = probe.share(CLEAN_SHARE)
    for cell in cells:
        seconds, states = probe.timed(lambda cell=cell: bench.clean(cell))
        found.clean.add((bench.last + 1) * block_flops(shape, len(cell.tokens)), seconds)
        count(steerer, states, left, found)
        kept += [states] if len(kept) < STATES_KEPT else []
        if not of_clean.left:
            break
    for number, states in enumerate(kept):
        time_passes(steerer, states, left, found, probe.share(1 / (len(kept) - number)))
        if not probe.left:
            break
    return kept


def _batches(steerer: Steerer, states: CleanStates, left: Sequence[PanelFeature]) -> list[tuple]:
    """(layer, latents, runs) of every batch of one cell, as the run makes them."""
    batches = []
    size = steerer.batch_size or steerer.bench.batch_size(len(states.cell.tokens))
    for layer in sorted({feature.layer for feature in left}):
        latents = steerer.bench.latents(states, layer)
        runs = [
            SteeringRun(feature.index, alpha)
            for feature in left
            if feature.layer == layer and is_active(latents, feature.index)
            for alpha in steerer.alphas
        ]
        batches += [(layer, latents, runs[start : start + size]) for start in range(0, len(runs), size)]
    return batches


def _run_flops(steerer: Steerer, states: CleanStates, layer: int, n_active: int) -> float:
    """Operations of one steered pass; `n_active` positions where its feature is active."""
    shape, n_gene = ModelShape.of(steerer.bench.model.config), len(states.cell.gene_positions)
    if layer == steerer.bench.last:
        return 2 * n_active * shape.head()
    return tail_flops(shape, steerer.bench.last - layer, len(states.cell.tokens), n_gene) + n_gene * shape.head()


def count(steerer: Steerer, states: CleanStates, left: Sequence[PanelFeature], found: Measured) -> None:
    """Count the active features of one cell and the steered passes that they mean."""
    pairs, passes, flops = 0, {False: 0, True: 0}, {False: 0.0, True: 0.0}
    for layer in sorted({feature.layer for feature in left}):
        latents, is_last = steerer.bench.latents(states, layer), layer == steerer.bench.last
        for feature in (feature for feature in left if feature.layer == layer):
            n_active = int((latents.features == feature.index).any(axis=1).sum())
            n_moved = sum(moves(latents, SteeringRun(feature.index, alpha)) for alpha in steerer.alphas)
            pairs += n_active > 0
            passes[is_last] += n_moved
            flops[is_last] += n_moved * _run_flops(steerer, states, layer, n_active)
    found.lengths.append(len(states.cell.tokens))
    found.pairs.append(pairs)
    found.passes.append(passes[False])
    found.flops.append(flops[False])
    found.end_passes.append(passes[True])
    found.end_flops.append(flops[True])


def time_passes(
    steerer: Steerer, states: CleanStates, left: Sequence[PanelFeature], found: Measured, probe: Probe
) -> None:
    """Time batches of steered passes in one cell until the time is over, the first one in any case."""
    batches = _batches(steerer, states, left)
    at_the_end = [batch for batch in batches if batch[0] == steerer.bench.last]  # cheap: timed in any case
    others = batches[: len(batches) - len(at_the_end)]
    for layer, latents, runs in (*at_the_end, *(others[i] for i in spread(len(others)))):
        moved = [run for run in runs if moves(latents, run)]
        seconds, _ = probe.timed(lambda a=layer, x=latents, r=runs: steerer.bench.mean_changes(states, a, x, r))
        n_active = [int((latents.features == run.feature).any(axis=1).sum()) for run in moved]
        flops = sum(_run_flops(steerer, states, layer, n) for n in n_active)
        if flops:
            (found.at_the_end if layer == steerer.bench.last else found.steered).add(flops, seconds)
        if not probe.left and layer != steerer.bench.last:
            break


def time_record(steerer: Steerer, states: CleanStates, probe: Probe) -> float:
    """Seconds that the numbers of one feature and alpha take: state shifts of the early cells, and gene lists."""
    clean = np.tile(states.mean_transformed, (len(steerer.early), 1))
    changes = 0.01 * np.random.default_rng(0).standard_normal(clean.shape)
    logits = steerer.logit_map.logits(states.mean_transformed)
    ends = Signatures(logits, steerer.logit_map.logits(states.mean_transformed + changes[0]))

    def numbers() -> None:
        shifts = state_shifts(clean, changes, steerer.logit_map, ends)
        alpha_result(shifts, steerer.logit_map.changes(changes.mean(axis=0)), steerer.gene_of)

    return probe.timed(numbers)[0]


def works(steerer: Steerer, left: Sequence[PanelFeature], found: Measured, *, goes_on: bool) -> list[Work]:
    """Clean passes, steered passes, records."""
    shape, n_blocks = ModelShape.of(steerer.bench.model.config), steerer.bench.last + 1
    early = [len(steerer.cells[i].tokens) for i in steerer.early]
    first = early if goes_on and steerer.kept_signatures() else [len(steerer.cells[i].tokens) for i in steerer.ends]
    n_groups = sum(1 for _ in steerer.groups(left))
    of_early, of_first = (n_blocks * sum(block_flops(shape, n_pos) for n_pos in group) for group in (early, first))
    clean_flops = of_first + (n_groups - 1) * of_early
    n_clean = len(first) + (n_groups - 1) * len(early)
    made = [Work("clean passes", n_clean, clean_flops, found.clean.seconds(clean_flops))]
    check = 2 * n_blocks * block_flops(shape, early[0]) + 2 * early[0] * (shape.head() + shape.logits())
    made.append(Work("full passes that check the engine", 2, check, found.clean.seconds(check)))
    # cells that were not counted are taken to be like those that were, but for their length
    scale = sum(block_flops(shape, n_pos) for n_pos in early) / sum(
        block_flops(shape, n_pos) for n_pos in found.lengths
    )
    times = len(early) / len(found.lengths)
    for name, rate, counted, passes in (
        ("steered passes", found.steered, found.flops, found.passes),
        ("steered passes at the last layer", found.at_the_end, found.end_flops, found.end_passes),
    ):
        if rate.samples:
            flops, n_passes = scale * sum(counted), times * sum(passes)
            seconds = rate.seconds(flops)
            made.append(Work(name, n_passes, flops, seconds))
    records = Rate([(1.0, max(found.record_seconds, 1e-9))]).seconds(len(left) * len(steerer.alphas))
    return [*made, Work("features and alphas to sum up", len(left) * len(steerer.alphas), 0.0, records)]
