"""What a run of controlled steering would do and how long it would take: the part of `--check` that is its own.

Which features are chosen is not known before the first half has been run, so the number of steered passes is that of a
full panel, with the share of edits that move something measured in a few cells. The passes timed are the run's own.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cellcircuits.cells import Cell
from cellcircuits.controlled_design import Study
from cellcircuits.controlled_results import DECLARATION_FILE, read_records
from cellcircuits.displacements import Displacement, DisplacementBench, MaskedGenes
from cellcircuits.errors import UserError
from cellcircuits.first_half import FIRST_HALF_FILE
from cellcircuits.flops import ModelShape, block_flops, tail_flops
from cellcircuits.jsonio import read_json
from cellcircuits.maturity_probe import PROBE_FILE
from cellcircuits.plan_report import Disk, Plan, Work, in_numbers, peak_host_bytes
from cellcircuits.probe import Probe, Rate, by_length, is_long
from cellcircuits.steering import CleanStates
from cellcircuits.steering_controls import CONTROLS
from cellcircuits.steering_readouts import VALUES, markers_in

VALUE_BYTES = 24  # of a number in a record, as the demo's files show
TIMED_BATCH = 8
LATER_BYTES = 60 << 20  # what a run holds beyond its passes


@dataclass
class Timed:
    """What the probe found, rates per operation; `shares` of a layer's features that are active in a cell."""

    clean: Rate = field(default_factory=Rate)
    steered: Rate = field(default_factory=Rate)
    shares: list[float] = field(default_factory=list)


def check_controlled(plan: Plan, study: Study, args: argparse.Namespace, fingerprint: str | None) -> Plan:
    """Fill in what a run would do.

    Args:
        plan: with the inputs; what is measured, the work, memory and disk are filled in.
        study: the inputs.
        args: the run's flags.
        fingerprint: of the run where the folder holds results of it, else None.

    Raises:
        UserError: a pass cannot be made.
    """
    halves, n_doses = study.halves, len(study.doses(args))
    model = study.opened.loaded.model
    steered = [study.opened.cells.cells[i] for i in halves.steered]
    masked = [hit for cell in steered if (hit := markers_in(cell.tokens, cell.gene_positions, study.markers))]
    per_layer = {layer: study.rule.n_on + study.rule.n_off for layer in study.layers}
    if study.panel is not None:
        per_layer = {layer: sum(f.layer == layer for f in study.panel) for layer in study.layers}
    there = {} if fingerprint is None else features_there(args.out_dir, fingerprint)
    n_there = sum(there.values())
    per_layer = {layer: n for layer, n in per_layer.items() if layer not in finished_layers(args.out_dir, there)}
    n_edits = n_doses * (1 + len(CONTROLS) * args.draws)
    layers = ", ".join(map(str, per_layer)) or "none"
    at_most = "" if study.panel is not None else "at most "
    plan.to_measure += [
        ("halves", f"{len(halves.first)} and {halves.n_second} cells, {halves.by}"),
        ("", f"steered: {len(steered)} of {halves.n_second_early} early cells of the second"),
        ("features", f"{at_most}{sum(per_layer.values())} to steer, of layers {layers}; {n_there} are there"),
        ("edits", f"{n_edits} per feature: {n_doses} doses, {args.draws} controls of each of {len(CONTROLS)} kinds"),
        ("markers", f"{len(masked)} of the {len(steered)} cells have early and late ones"),
        ("probe", f"{len(study.probe_cells.cells)} cells, {study.probe_cells.source}"),
    ]
    bench = DisplacementBench(model, {layer: opened.sae for layer, opened in study.layers.items()})
    found = time_run(bench, steered, study)
    shape, n_blocks = ModelShape.of(model.config), bench.last + 1
    first = [study.opened.cells.cells[i] for i in halves.first]
    works = [
        ("clean passes of the first half", first, not (there and (args.out_dir / FIRST_HALF_FILE).exists())),
        (
            "clean passes of the probe's cells",
            study.probe_cells.cells,
            not (there and (args.out_dir / PROBE_FILE).exists()),
        ),
        ("clean passes of steered cells, plain and masked", steered, len(per_layer) * (1 + len(masked) / len(steered))),
    ]
    for name, cells, times in works:
        flops = times * n_blocks * sum(block_flops(shape, len(cell.tokens)) for cell in cells)
        if times:
            plan.works.append(Work(name, times * len(cells), flops, found.clean.seconds(flops)))
    share, n_passes, flops = float(np.mean(found.shares)), 0.0, 0.0
    for layer, n_features in per_layer.items():
        if layer < bench.last:
            n = share * n_features * n_edits * (1 + len(masked) / len(steered))
            n_passes += n * len(steered)
            flops += n * sum(_pass_flops(shape, bench.last - layer, cell) for cell in steered)
    if flops:
        plan.works.append(Work("steered passes", n_passes, flops, found.steered.seconds(flops)))
    written = sum(per_layer.values()) * n_edits * len(steered) * len(VALUES) * VALUE_BYTES
    sizes = [opened.sae.n_features for opened in study.layers.values()]
    state = 8 * len(first) * (sum(sizes) + model.config.hidden_size)
    plan.disk = Disk(written / 10, written + state / 4, 2 * written + 2 * state)
    plan.host_bytes = peak_host_bytes() + 2 * state + LATER_BYTES
    plan.to_measure.append(("active", f"{in_numbers(100 * share)}% of the edits move something, as a few cells show"))
    return plan


def features_there(out_dir: Path, fingerprint: str) -> Counter[int]:
    """{layer: how many features have a record of the run}."""
    return Counter(record["layer"] for record in read_records(out_dir, fingerprint))


def finished_layers(out_dir: Path, there: Mapping[int, int]) -> set[int]:
    """Layers of which every feature that the run declared has a record; a layer with some left is run as a whole."""
    try:
        names = read_json(out_dir / DECLARATION_FILE)["panel"] if there else []
    except (UserError, KeyError, TypeError):
        return set()
    wanted = Counter(int(name.rpartition("_L")[2]) for name in names)
    return {layer for layer, n in wanted.items() if there.get(layer, 0) >= n}


def _pass_flops(shape: ModelShape, n_blocks: int, cell: Cell) -> float:
    n_gene = len(cell.gene_positions)
    return tail_flops(shape, n_blocks, len(cell.tokens), n_gene) + n_gene * shape.head()


def time_run(bench: DisplacementBench, cells: Sequence[Cell], study: Study) -> Timed:
    """Time clean and displaced passes, about ten seconds in all."""
    order = [cells[i] for i in by_length([len(cell.tokens) for cell in cells])]
    found, probe = Timed(), Probe(bench.device, 0.0)
    seconds, _ = probe.timed(lambda: _time_cell(bench, order[0], study, found, probe))  # first calls take longer
    if is_long(seconds):
        return found
    found, probe = Timed(), Probe(bench.device)
    for cell in order:
        _time_cell(bench, cell, study, found, probe)
        if not probe.left:
            break
    return found


def _time_cell(bench: DisplacementBench, cell: Cell, study: Study, found: Timed, probe: Probe) -> None:
    shape = ModelShape.of(bench.model.config)
    seconds, clean = probe.timed(lambda: bench.clean(cell))
    found.clean.add((bench.last + 1) * block_flops(shape, len(cell.tokens)), seconds)
    for layer in bench.layers:
        latents = bench.latents(clean, layer)
        n_active = len(np.unique(latents.features[latents.values > 0]))
        found.shares.append(n_active / bench.saes[layer].n_features)
        if layer < bench.last:
            seconds, _ = probe.timed(lambda at=layer, states=clean: _displace(bench, states, at, study))
            found.steered.add(TIMED_BATCH * _pass_flops(shape, bench.last - layer, cell), seconds)


def _displace(bench: DisplacementBench, clean: CleanStates, layer: int, study: Study) -> None:
    """One batch of displaced passes with their readout, as a run makes them."""
    step = np.full(bench.model.config.hidden_size, 1e-3)
    moves = [Displacement(np.arange(1 + i % len(clean.final)), step) for i in range(TIMED_BATCH)]
    hit = markers_in(clean.cell.tokens, clean.cell.gene_positions, study.markers)
    if hit is None:
        bench.displaced(clean, layer, moves)
        return
    half = len(moves) // 2
    genes = MaskedGenes(hit[0], clean.cell.tokens[clean.cell.gene_positions[hit[0]]])
    bench.displaced(clean, layer, moves[:half])
    bench.displaced_log_p(clean, layer, moves[half:], genes)
