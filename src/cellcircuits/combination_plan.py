"""What a run of experiment 2 would do and how long it would take: the part of `--check` that is its own.

The work of a combination in a cell is its tree of runs: how many streams it has follows from which features are active
in the cell's clean run. The trees timed are the run's own, of combinations and cells spread over all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from zipfile import is_zipfile

import numpy as np
from numpy.typing import NDArray

from cellcircuits import combination_results
from cellcircuits.combination_run import ARRAYS, CLEAN_SHARE_OF_MEMORY, CombinationRun, Unfinished, effects_that_fit
from cellcircuits.combination_stats import conditions
from cellcircuits.combinations import Combination
from cellcircuits.device import host_memory
from cellcircuits.flops import ModelShape, block_flops
from cellcircuits.joint import CellEffects, CleanPath, LayerFeature
from cellcircuits.plan_report import Disk, Plan, Work, in_numbers, peak_host_bytes
from cellcircuits.probe import Probe, Rate, by_length, is_long, spread

CLEAN_SHARE = 0.3  # of the probe's seconds
CELLS_OF_STATISTICS = 100
RECORD_BYTES = 1200  # of a condition, as the demo's files show
LATER_BYTES = 100 << 20  # what a run holds beyond its passes


@dataclass
class Tree:
    """The runs of one combination in one cell: encoder blocks on one stream each, streams, operations."""

    n_block_runs: int
    n_streams: int
    flops: float


@dataclass
class Measured:
    """What the probe found."""

    paths: list[CleanPath] = field(default_factory=list)
    clean: Rate = field(default_factory=Rate)
    trees: Rate = field(default_factory=Rate)
    counted: list[Tree] = field(default_factory=list)  # of every combination in every cell of `paths`
    statistics_seconds: float = 0.0


def check_combinations(plan: Plan, run: CombinationRun, chosen: Sequence[Combination], *, goes_on: bool) -> Plan:
    """Fill in what measuring some combinations would do.

    Args:
        plan: with the inputs; what is measured, the work, memory and disk are filled in.
        run: the run, not started.
        chosen: the combinations.
        goes_on: whether the folder holds results of this run.

    Raises:
        UserError: a pass cannot be made.
    """
    chosen = list({combination.name: combination for combination in chosen}.values())
    left = [combination for combination in chosen if not (goes_on and is_there(run, combination))]
    kind = combination_results.KINDS[len(chosen[0].features)]
    text = f"{len(chosen)} at layer {run.bench.target}; {len(chosen) - len(left)} are there"
    plan.to_measure += [(f"{kind}s", text), ("", f"such as {chosen[0].name}")]
    plan.host_bytes = peak_host_bytes()
    if left:
        found = probe_run(run, left)
        n_cells, n_counted = len(run.cells), len(found.paths)
        n_active = sum(tree.n_streams > 0 for tree in found.counted) * n_cells / n_counted
        exactly = n_counted == n_cells
        how = f"counted in all {n_cells} cells" if exactly else f"from clean passes of {n_counted} of {n_cells} cells"
        n = f"{'' if exactly else 'about '}{in_numbers(n_active)}"
        text = f"{n} of {in_numbers(len(left) * n_cells)} ({kind}, cell), {how}"
        plan.to_measure.append(("active", text))
        plan.works += works(run, left, found, n_active)
        plan.host_bytes = host_bytes(run, len(chosen[0].features), found)
    plan.disk = disk(run, left)
    return plan


def is_there(run: CombinationRun, combination: Combination) -> bool:
    """Whether the folder holds the combination's record, and its effects where they are asked for."""
    path = combination_results.record_path(run.out_dir, combination)
    if combination_results.read_record(path, run.fingerprint) is None:
        return False
    return not run.save_effects or is_zipfile(run.effects_path(combination))


def layer_features(combination: Combination) -> list[LayerFeature]:
    """A combination as the bench takes it."""
    return [(feature.layer, feature.index) for feature in combination.features]


def probe_run(run: CombinationRun, left: Sequence[Combination]) -> Measured:
    """Count and time clean passes and trees, about ten seconds in all."""
    found = Measured()
    order = by_length([len(cell.tokens) for cell in run.cells])
    effects: list[CellEffects] = []
    warm_up = Measured()  # first calls compile, pack weights and take memory
    seconds, _ = Probe(run.bench.device).timed(lambda: effects.extend(time_unit(run, left, order[:1], warm_up)))
    if is_long(seconds):
        found, probe = warm_up, Probe(run.bench.device, 0.0)
    else:
        probe = Probe(run.bench.device)
        time_clean(run, left, order, found, probe.share(CLEAN_SHARE))
        effects += time_trees(run, left, found, probe)
    if effects:
        found.statistics_seconds = time_statistics(run, effects, layer_features(left[0]), probe)
    return found


def time_unit(
    run: CombinationRun, left: Sequence[Combination], order: Sequence[int], found: Measured
) -> list[CellEffects]:
    """One clean pass and one tree."""
    probe = Probe(run.bench.device, 0.0)
    time_clean(run, left, order, found, probe)
    return time_trees(run, left, found, probe)


def time_clean(
    run: CombinationRun, left: Sequence[Combination], order: Sequence[int], found: Measured, probe: Probe
) -> None:
    """Time clean passes until the time is over, and count the trees of their cells."""
    shape = ModelShape.of(run.bench.model.config)
    for i in order:
        cell = run.cells[i]
        seconds, path = probe.timed(lambda cell=cell: run.bench.clean(cell))
        found.clean.add((run.bench.target + 1) * block_flops(shape, len(cell.tokens)), seconds)
        found.paths.append(path)
        found.counted += trees(run, path, left)
        if not probe.left:
            break


def time_trees(run: CombinationRun, left: Sequence[Combination], found: Measured, probe: Probe) -> list[CellEffects]:
    """Time trees until the time is over, the first one in any case; returns their effects."""
    effects: list[CellEffects] = []
    n_paths, order = len(found.paths), spread(len(left))
    for unit in range(len(left) * n_paths):
        which = order[(unit + unit // n_paths) % len(left)]
        tree, path = found.counted[(unit % n_paths) * len(left) + which], found.paths[unit % n_paths]
        if tree.n_streams:
            features = layer_features(left[which])
            seconds, (of_cell, _) = probe.timed(
                lambda p=path, f=features: effects_that_fit(run.bench, p, f, run.batch_size)
            )
            found.trees.add(tree.flops, seconds)
            effects.append(of_cell)
        if not probe.left and effects:
            break
    return effects


def trees(run: CombinationRun, path: CleanPath, left: Sequence[Combination]) -> list[Tree]:
    """The tree of every combination in one cell."""
    shape, n_pos = ModelShape.of(run.bench.model.config), len(path.cell.tokens)
    wanted = {feature for combination in left for feature in layer_features(combination)}
    active = {feature: path.active(feature) for feature in wanted}
    found = []
    for combination in left:
        features = layer_features(combination)
        n_rows = int(np.any([active[feature] for feature in features], axis=0).sum())
        n_runs, n_streams = tree_size(features, [bool(active[x].any()) for x in features], run.bench.target)
        # the last block of every stream is computed at the measured positions only
        flops = (n_runs - n_streams) * block_flops(shape, n_pos) + n_streams * block_flops(shape, n_pos, n_rows)
        found.append(Tree(n_runs, n_streams, flops))
    return found


def tree_size(features: Sequence[LayerFeature], active: Sequence[bool], target: int) -> tuple[int, int]:
    """Encoder blocks run on one stream each, and streams at the end, of a combination with these active features."""
    layers = sorted({layer for layer, _ in features})
    n_streams, n_runs, at = 0, 0, layers[0]
    for layer in layers:
        n_runs += n_streams * (layer - at)
        at = layer
        n_here = sum(is_active for (of_feature, _), is_active in zip(features, active, strict=True) if of_feature == at)
        n_streams += (n_streams + 1) * (2**n_here - 1)
    return n_runs + n_streams * (target - at), n_streams


def time_statistics(
    run: CombinationRun, effects: Sequence[CellEffects], features: Sequence[LayerFeature], probe: Probe
) -> float:
    """Seconds that the statistics of one combination take, on the measured cells over and over again."""
    n = min(len(run.cells), CELLS_OF_STATISTICS)
    so_far = Unfinished.empty(n, len(features), run.bench.n_targets)
    for i in range(n):
        for name in ARRAYS:
            getattr(so_far, name)[i] = getattr(effects[i % len(effects)], name)
    noise: NDArray[np.float64] = np.random.default_rng(0).standard_normal((n, 1, 1))
    noisy = replace(so_far, published=so_far.published * noise, union=so_far.union * noise)
    return probe.timed(lambda: run.statistics(noisy, features))[0] * len(run.cells) / n


def works(run: CombinationRun, left: Sequence[Combination], found: Measured, n_active: float) -> list[Work]:
    """Clean passes, trees and statistics."""
    shape, lengths = ModelShape.of(run.bench.model.config), [len(cell.tokens) for cell in run.cells]
    n_beyond = max(0, len(lengths) - n_kept(found))
    n_clean = len(lengths) + n_beyond * (len(left) - 1)
    of_cells = [(run.bench.target + 1) * block_flops(shape, n_pos) for n_pos in lengths]
    clean_flops = sum(of_cells) * n_clean / len(lengths)
    made = [Work("clean passes", n_clean, clean_flops, found.clean.seconds(clean_flops))]
    if not found.trees.samples:
        return made
    of_counted = sum(block_flops(shape, len(path.cell.tokens)) for path in found.paths)
    scale = sum(block_flops(shape, n_pos) for n_pos in lengths) / of_counted
    flops = scale * sum(tree.flops for tree in found.counted)
    n_runs = scale * sum(tree.n_block_runs for tree in found.counted)
    seconds = found.trees.seconds(flops)
    trees = f"trees of ablated passes, {in_numbers(n_runs)} blocks on one stream in all"
    made.append(Work(trees, n_active, flops, seconds))
    statistics = Rate([(1.0, found.statistics_seconds)]).seconds(len(left))
    made.append(Work("statistics over cells", len(left), 0.0, statistics))
    check = 2 * (run.bench.target + 1) * block_flops(shape, lengths[0])
    return [*made, Work("full passes that check the engine", 2, check, found.clean.seconds(check))]


def n_kept(found: Measured) -> int:
    """How many clean runs find room on the host."""
    per_cell = sum(path.n_bytes for path in found.paths) / len(found.paths)
    return int(CLEAN_SHARE_OF_MEMORY * host_memory() / per_cell)


def host_bytes(run: CombinationRun, order: int, found: Measured) -> float:
    """Memory on the host: what this check took, and what the run keeps beyond that."""
    per_cell = sum(path.n_bytes for path in found.paths) / len(found.paths)
    kept = per_cell * max(0, min(len(run.cells), n_kept(found)) - len(found.paths))
    of_effects = 4 * 8 * len(conditions(order)) * run.bench.n_targets * max(0, len(run.cells) - CELLS_OF_STATISTICS)
    return peak_host_bytes() + kept + of_effects + LATER_BYTES


def disk(run: CombinationRun, left: Sequence[Combination]) -> Disk:
    """What records, and effects where they are kept, take."""
    if not left:
        return Disk(0, 0, 0)
    n_conditions = len(conditions(len(left[0].features)))
    of_cells = len(run.cells) * n_conditions * run.bench.n_targets
    # while one is at work its effects lie there in float64, three of each
    partial, of_rounding = 3 * 8 * of_cells, of_cells // n_conditions
    kept = 4 * (2 * of_cells + of_rounding) * len(left) if run.save_effects else 0
    records = len(left) * n_conditions * RECORD_BYTES
    return Disk(records / 4, records + kept, 2 * records + partial + kept)
