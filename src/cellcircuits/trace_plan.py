"""What a trace would do and how long it would take: the part of `--check` that is experiment 1's.

Which features are active in which cells is counted in clean runs, of all cells where that takes seconds and of a
spread of them otherwise. The passes timed are the run's own: blocks of features in cells, by `trace_block`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellcircuits import graph_store, manifest, trace_effects
from cellcircuits.clean_runs import SHARE_OF_MEMORY, CleanRuns, n_bytes
from cellcircuits.device import host_memory
from cellcircuits.effects import Bench, CleanCell
from cellcircuits.flops import ModelShape, block_flops, same_position_flops, tail_flops
from cellcircuits.plan_report import Plan, Work, in_numbers, peak_host_bytes
from cellcircuits.probe import Probe, Rate, Seconds, by_length, is_long, spread
from cellcircuits.same_position import SamePositionBench
from cellcircuits.trace_disk import blocks_of, disk
from cellcircuits.trace_layers import in_order
from cellcircuits.tracing import BlockEffects, block_shard, trace_block

if TYPE_CHECKING:
    from cellcircuits.trace_folder import TraceFolder

CLEAN_SHARE = 0.3  # of the probe's seconds
LAYERS_APART = 3  # more source layers are described together
CELLS_OF_TABLES = 200  # edges are called on at most so many cells when that is timed
LATER_BYTES = 200 << 20  # what a run holds beyond its passes: tables, and holes that hours leave in the heap


@dataclass
class Pairs:
    """Active (feature, cell) pairs of a source layer, counted in some cells."""

    n_positions: list[int] = field(default_factory=list)  # tokens of the counted cells
    n_active: list[int] = field(default_factory=list)  # active features in each of them
    n_rows: list[float] = field(default_factory=list)  # active positions per active feature

    def add(self, n_pos: int, rows: NDArray[np.int64]) -> None:
        """Count a cell: the active positions of each feature asked for, (n_features,)."""
        self.n_positions.append(n_pos)
        self.n_active.append(int(np.count_nonzero(rows)))
        self.n_rows.append(float(rows.sum() / max(1, np.count_nonzero(rows))))

    def number(self, n_cells: int) -> float:
        """Pairs in so many cells like those."""
        return n_cells * sum(self.n_active) / len(self.n_active)


@dataclass
class LayerProbe:
    """What is known of one source layer after its probe."""

    folder: "TraceFolder"
    left: Sequence[int]
    pairs: Pairs = field(default_factory=Pairs)
    clean: Rate = field(default_factory=Rate)
    ablated: Rate = field(default_factory=Rate)
    total: Rate = field(default_factory=Rate)  # of total effects, where the run measures same-position effects
    effects: NDArray[np.float64] | None = None  # (n, n_targets) of the last timed passes
    table_seconds: float = 0.0  # edges and files of one block
    clean_bytes: list[int] = field(default_factory=list)

    @property
    def n_blocks(self) -> int:
        """Blocks of features with something left."""
        return len(blocks_of(self.left))


def held_features(folder: "TraceFolder") -> set[int]:
    """Features that the output folder holds already.

    Raises:
        UserError: it holds something else.
    """
    settings = folder.settings()
    if not manifest.check_folder(folder.out_dir, settings, folder.provenance(), mix_versions=folder.mix_versions):
        return set()
    fingerprint = manifest.settings_fingerprint(settings)
    shards = graph_store.all_shards(folder.out_dir, fingerprint)
    held = {graph_store.block_of(next(iter(shard.facts))): shard.facts.keys() for shard in shards if shard.facts}
    if folder.save_effects:
        for block in held:
            held[block] &= trace_effects.held_features(trace_effects.effects_path(folder.out_dir, block), fingerprint)
    return {feature for of_block in held.values() for feature in of_block}


def check_traces(
    out_dir: Path,
    folders: Sequence["TraceFolder"],
    features: Mapping[int, Sequence[int]],
    batch_size: int | None,
    opening_seconds: float,
) -> Plan:
    """What tracing into some folders would do.

    Args:
        out_dir: what `--out-dir` names.
        folders: of the source layers, ascending.
        features: {source layer: the features asked for}.
        batch_size: features per batch; None lets memory decide.
        opening_seconds: what opening the inputs took.

    Raises:
        UserError: a folder holds something else, or the passes cannot be made.
    """
    layers = {layer: opened_sae for folder in folders for layer, opened_sae in folder.layers.items()}
    opening = Seconds.exactly(opening_seconds)
    plan = Plan(folders[0].opened, layers, out_dir, folders[0].precision, opening)
    held = {folder.source_layer: held_features(folder) for folder in folders}
    left = {layer: [x for x in wanted if x not in held[layer]] for layer, wanted in features.items()}
    plan.to_measure += feature_lines(folders, features, left)
    probes = [LayerProbe(folder, left[folder.source_layer]) for folder in folders if left[folder.source_layer]]
    if probes:
        run_probes(probes, batch_size)
        plan.to_measure += pair_lines(probes, len(plan.opened.cells.cells))
        plan.works += works(probes)
        plan.host_bytes = host_bytes(probes)
    else:
        plan.host_bytes = peak_host_bytes()
    plan.disk = disk(folders, left, {x.folder.source_layer: n_effects(x) for x in probes if x.folder.save_effects})
    plan.smaller = lambda share: _smaller(left, share)
    return plan


def feature_lines(
    folders: Sequence["TraceFolder"], features: Mapping[int, Sequence[int]], left: Mapping[int, Sequence[int]]
) -> list[tuple[str, str]]:
    """Which features of which layers, and how many are there already: a line per layer, one for many layers."""
    quantity = ", same-position effects" if folders[0].same_position else ""
    if len(folders) > LAYERS_APART:
        n_asked, n_left = (sum(map(len, of_layers.values())) for of_layers in (features, left))
        layers = ", ".join(str(folder.source_layer) for folder in folders)
        return [("features", f"{n_asked} of layers {layers}, to later ones{quantity}; {n_asked - n_left} are there")]
    lines = []
    for folder in folders:
        layer, targets = folder.source_layer, ", ".join(map(str, folder.targets))
        n_there = len(features[layer]) - len(left[layer])
        lines.append(f"{len(features[layer])} of layer {layer}, to layers {targets}{quantity}; {n_there} are there")
    return [("" if number else "features", line) for number, line in enumerate(lines)]


def time_clean(layer: LayerProbe, total: Bench, clean: CleanRuns, order: Sequence[int], probe: Probe) -> None:
    """Time clean runs from the tokens on: one, and more while a tenth of the seconds lasts."""
    shape, last = ModelShape.of(total.model.config), max(layer.folder.targets)
    of_clean = probe.share(0.1)
    for i in order:
        if layer.clean.samples and not of_clean.left:
            break
        cell = clean[i].cell
        seconds, _ = probe.timed(lambda cell=cell: total.clean(cell))
        layer.clean.add((last + 1) * block_flops(shape, len(cell.tokens)), seconds)


def _smaller(left: Mapping[int, Sequence[int]], share: float) -> str:
    features = next(of_layer for of_layer in left.values() if of_layer)
    return f"--end-idx {features[min(len(features), max(1, int(share * len(features)))) - 1] + 1}"


def run_probes(probes: Sequence[LayerProbe], batch_size: int | None) -> None:
    """Time clean runs, ablated passes and tables of every layer, about ten seconds in all."""
    model = probes[0].folder.opened.loaded.model
    cells = probes[0].folder.opened.cells.cells
    order = by_length([len(cell.tokens) for cell in cells])
    probe, is_warm = Probe(model.device), False
    for number, (layer, (total, clean)) in enumerate(zip(probes, in_order([x.folder for x in probes]), strict=True)):
        if not is_warm:  # first calls compile, pack weights and take memory
            is_long_ = warm_up(layer, total, clean, order[0], batch_size)
            probe, is_warm = Probe(model.device, 0.0 if is_long_ else None), True
        of_layer = probe.share(1 / (len(probes) - number))
        if not number:
            time_clean(layer, total, clean, order, probe)
        counted = count_pairs(layer, clean, order, of_layer.share(CLEAN_SHARE))
        bench = bench_of(layer.folder, total)
        time_passes(layer, bench, counted, of_layer, batch_size)
        if layer.folder.same_position and layer.folder.n_checked:
            time_passes(layer, total, counted[:1], Probe(model.device, 0.0), batch_size)
        time_tables(layer, bench, len(cells), of_layer)


def bench_of(folder: "TraceFolder", total: Bench) -> Bench:
    """The bench that measures what the folder holds."""
    if not folder.same_position:
        return total
    return SamePositionBench(total.model, total.saes, total.source_layer, total.targets, total.tail)


def warm_up(layer: LayerProbe, total: Bench, clean: CleanRuns, first: int, batch_size: int | None) -> bool:
    """Make a clean run and a pass; returns whether they took so long that they are measurements themselves."""
    probe, shape = Probe(total.device, 0.0), ModelShape.of(total.model.config)
    seconds, run = probe.timed(lambda: clean[first])
    found = LayerProbe(layer.folder, layer.left)
    spent, _ = probe.timed(lambda: time_passes(found, bench_of(layer.folder, total), [run], probe, batch_size))
    if not is_long(seconds + spent):
        return False
    layer.clean.add((max(layer.folder.targets) + 1) * block_flops(shape, len(run.cell.tokens)), seconds)
    layer.ablated.samples += found.ablated.samples
    layer.effects = found.effects
    return True


def count_pairs(layer: LayerProbe, clean: CleanRuns, order: Sequence[int], probe: Probe) -> list[CleanCell]:
    """Count active features in cells, in the order given, until the time is over; returns the clean runs made."""
    wanted, counted = np.array(layer.left), []
    n_features = layer.folder.layers[layer.folder.source_layer].sae.n_features
    for i in order:
        run = clean[i]
        rows = np.bincount(run.source.features.ravel(), minlength=n_features)[wanted]
        layer.pairs.add(len(run.cell.tokens), rows)
        layer.clean_bytes.append(n_bytes(run))
        counted.append(run)
        if not probe.left:
            break
    return counted


def time_passes(
    layer: LayerProbe, bench: Bench, counted: Sequence[CleanCell], probe: Probe, batch_size: int | None
) -> None:
    """Time batches of features of one block in one cell each until the time is over."""
    blocks = blocks_of(layer.left)
    order = spread(len(blocks))
    is_total = not isinstance(bench, SamePositionBench)
    rate = layer.total if is_total and layer.folder.same_position else layer.ablated
    for unit in range(len(blocks) * len(counted)):
        if rate.samples and not probe.left:
            break
        clean = counted[unit % len(counted)]
        block = blocks[order[(unit + unit // len(counted)) % len(blocks)]]
        rows = {feature: len(clean.active_rows(feature)) for feature in block}
        active = sorted((feature for feature in block if rows[feature]), key=lambda feature: rows[feature])
        size = batch_size or bench.batch_size(len(clean.cell.tokens))
        start = max(0, (len(active) - size) // 2)
        batch = active[start : start + size]
        if not batch:
            continue
        of_block = BlockEffects.empty(batch, 1, bench.n_targets)
        seconds, _ = probe.timed(lambda c=clean, x=of_block: trace_block(bench, [c], x, batch_size=batch_size))
        n_rows = np.array([rows[feature] for feature in batch])
        rate.add(pass_flops(layer.folder, len(clean.cell.tokens), n_rows, is_total=is_total).sum(), seconds)
        layer.effects = of_block.effects[:, 0]


def pass_flops(
    folder: "TraceFolder", n_pos: int, n_rows: NDArray[np.float64] | float, *, is_total: bool
) -> NDArray[np.float64]:
    """Operations of one ablated pass in a cell of `n_pos` tokens, for each number of active positions."""
    shape = ModelShape.of(folder.opened.loaded.model.config)
    n_blocks = max(folder.targets) - folder.source_layer
    return np.asarray((tail_flops if is_total else same_position_flops)(shape, n_blocks, n_pos, n_rows))


def time_tables(layer: LayerProbe, bench: Bench, n_cells: int, probe: Probe) -> None:
    """Time what a finished block costs: its edges, on effects of random sign, as chance would give them."""
    effects = layer.effects
    if effects is None:
        return
    features, n = list(layer.left[: graph_store.BLOCK_SIZE]), min(n_cells, CELLS_OF_TABLES)
    block = BlockEffects.empty(features, n, bench.n_targets)
    signs = np.random.default_rng(0).standard_normal((len(features), n, 1))
    block.effects[:] = effects[np.arange(len(features)) % len(effects), None] * signs
    block.measured[:] = True

    def tables() -> None:
        shard = block_shard(bench, block, layer.folder.rule, "")
        for _ in shard.records(layer.folder.layers[layer.folder.source_layer].catalog or {}):
            pass

    layer.table_seconds = probe.timed(tables)[0] * n_cells / n


def pair_lines(probes: Sequence[LayerProbe], n_cells: int) -> list[tuple[str, str]]:
    """How many pairs are active, and from what that is known: a line per layer, one for many layers."""
    apart = [[layer] for layer in probes] if len(probes) <= LAYERS_APART else [probes]
    lines = []
    for group in apart:
        n_counted = min(len(layer.pairs.n_active) for layer in group)
        exactly = n_counted == n_cells
        how = f"counted in all {n_cells} cells" if exactly else f"from clean runs of {n_counted} of {n_cells} cells"
        name = f"layer {group[0].folder.source_layer}: " if len(group) < len(probes) else ""
        n = f"{'' if exactly else 'about '}{in_numbers(sum(layer.pairs.number(n_cells) for layer in group))}"
        n_all = in_numbers(sum(len(layer.left) for layer in group) * n_cells)
        lines.append(f"{name}{n} of {n_all} (feature, cell), {how}")
    return [("" if number else "active pairs", line) for number, line in enumerate(lines)]


def works(probes: Sequence[LayerProbe]) -> list[Work]:
    """Clean and ablated passes, checks and tables of all layers."""
    opened = probes[0].folder.opened
    shape, lengths = ModelShape.of(opened.loaded.model.config), [len(cell.tokens) for cell in opened.cells.cells]
    last = max(target for layer in probes for target in layer.folder.targets)
    clean_rate = Rate([sample for layer in probes[:1] for sample in layer.clean.samples])
    n_clean, clean_flops = 0, 0.0
    for number, layer in enumerate(probes):
        n_beyond = max(0, len(lengths) - n_kept(layer))
        # a later layer's runs go on from those kept of the layer before
        n_blocks = layer.folder.source_layer - probes[number - 1].folder.source_layer if number else last + 1
        clean_flops += sum(n_blocks * block_flops(shape, n_pos) for n_pos in lengths)
        again = n_beyond * (layer.n_blocks - 1)
        clean_flops += again * (last + 1) * block_flops(shape, float(np.mean(lengths)))
        n_clean += again + (0 if number else len(lengths))
    found = [Work("clean passes", n_clean, clean_flops, clean_rate.seconds(clean_flops))]
    checks = [layer for layer in probes if layer.ablated.samples]
    check_flops = 2 * len(checks) * (last + 1) * block_flops(shape, lengths[0])
    found.append(
        Work("full passes that check the engine", 2 * len(checks), check_flops, clean_rate.seconds(check_flops))
    )
    for layer in checks:
        found += ablation_works(layer, lengths, many=1 < len(probes) <= LAYERS_APART)
    return merged(found)


def merged(works_: Sequence[Work]) -> list[Work]:
    """Works of one name added up, in their order."""
    by_name: dict[str, Work] = {}
    for work in works_:
        so_far = by_name.get(work.name, Work(work.name, 0, 0.0, Seconds()))
        sums = so_far.n + work.n, so_far.flops + work.flops, so_far.seconds + work.seconds
        by_name[work.name] = Work(work.name, *sums)
    return list(by_name.values())


def n_kept(layer: LayerProbe) -> int:
    """How many clean runs find room on the host."""
    return int(SHARE_OF_MEMORY * host_memory() / max(1.0, float(np.mean(layer.clean_bytes))))


def ablation_works(layer: LayerProbe, lengths: Sequence[int], *, many: bool) -> list[Work]:
    """The ablated passes of one layer, its tables, and its sample of total effects."""
    pairs, folder = layer.pairs, layer.folder
    name = f" of layer {folder.source_layer}" if many else ""
    n_pairs, n_rows = pairs.number(len(lengths)), float(np.average(pairs.n_rows, weights=pairs.n_active))
    is_total = not folder.same_position
    if len(pairs.n_active) == len(lengths):
        per_cell = zip(pairs.n_positions, pairs.n_active, pairs.n_rows, strict=True)
    else:
        per_cell = ((n_pos, n_pairs / len(lengths), n_rows) for n_pos in lengths)
    per_cell = list(per_cell)
    flops = sum(n * float(pass_flops(folder, n_pos, rows, is_total=is_total)) for n_pos, n, rows in per_cell)
    seconds = layer.ablated.seconds(flops)
    found = [Work(f"ablated passes{name}", n_pairs, flops, seconds)]
    tables = Rate([(1.0, layer.table_seconds)]).seconds(layer.n_blocks) if layer.table_seconds else None
    if tables:
        found.append(Work(f"blocks of features to call edges in{name}", layer.n_blocks, 0.0, tables))
    if layer.total.samples:
        share = min(1.0, folder.n_checked / len(layer.left))
        flops = share * sum(n * float(pass_flops(folder, n_pos, rows, is_total=True)) for n_pos, n, rows in per_cell)
        found.append(Work(f"total effects to compare with{name}", share * n_pairs, flops, layer.total.seconds(flops)))
    return found


def host_bytes(probes: Sequence[LayerProbe]) -> float:
    """Memory on the host: what this check took, and what the run keeps beyond that."""
    opened = probes[0].folder.opened
    n_cells, peak = len(opened.cells.cells), peak_host_bytes()
    most = 0.0
    for layer in probes:
        per_cell = float(np.mean(layer.clean_bytes))
        kept = per_cell * max(0, min(n_cells, n_kept(layer)) - len(layer.clean_bytes))
        n_targets = sum(layer.folder.layers[target].sae.n_features for target in layer.folder.targets)
        block = graph_store.BLOCK_SIZE * n_targets * 8 * max(0, n_cells - CELLS_OF_TABLES)
        most = max(most, kept + block)
    return peak + most + LATER_BYTES


def n_effects(layer: LayerProbe) -> tuple[float, float]:
    """About how many effects other than 0 there are, and at most."""
    folder, n_cells = layer.folder, len(layer.folder.opened.cells.cells)
    n_targets = sum(folder.layers[target].sae.n_features for target in folder.targets)
    n_pairs = layer.pairs.number(n_cells)
    most = n_pairs if len(layer.pairs.n_active) == n_cells else len(layer.left) * n_cells
    share = 0.0 if layer.effects is None else float(np.mean(layer.effects != 0))
    return share * n_pairs * n_targets, most * n_targets
