"""What `prepare_inputs.py` would do and how long it would take: the part of `--check` that is its own.

Timed are passes of a few cells with what each phase makes of them, training steps on the rows of those cells, and the
catalog and labels of some features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cellcircuits.activations import CellSplit, collect_rows, layer_groups
from cellcircuits.annotation import annotate_catalog
from cellcircuits.cells import Cell
from cellcircuits.errors import UserError
from cellcircuits.feature_stats import (
    GeneFeatureCounts,
    StreamBaseline,
    build_catalog,
    catalog_bytes,
    fit_baseline,
    gene_tokens,
)
from cellcircuits.flops import ModelShape, block_flops, training_step_flops
from cellcircuits.inputs import LayerSAE
from cellcircuits.plan_report import Disk, Plan, Work, peak_host_bytes
from cellcircuits.preparation import bytes_per_layer, finished_before, rows_of
from cellcircuits.preparation_passes import LOSS_NAMES, count_group, losses_of_group
from cellcircuits.preparation_settings import Preparation
from cellcircuits.preparation_state import Unfinished
from cellcircuits.probe import Probe, Rate, Seconds, by_length, is_long
from cellcircuits.sae_training import train_sae
from sae_model import TopKSAE

SAMPLING_SHARE, TRAINING_SHARE, COUNTING_SHARE = 0.2, 0.4, 0.5  # each of what is left of the probe's seconds
BATCHES_OF_ROWS = 4  # training is timed on so many batches, over and over again
FEATURES_OF_CATALOG = 256
GENE_BYTES, FEATURE_BYTES = 190, 1100  # of catalog and labels, as the demo's files show
LATER_BYTES = 40 << 20  # what a run holds beyond its passes


class NotKept(Unfinished):
    """Unfinished work of which nothing is read from a disk or written to one."""

    def __init__(self) -> None:
        """Keep nothing."""
        super().__init__(Path(), {"fingerprint": ""}, kept=False, changed=False)

    def write(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Task:
    """What is left to do: layers to train, layers to count a catalog for, layers to label; {layer: SAE} that exist."""

    train: tuple[int, ...]
    count: tuple[int, ...]
    label: tuple[int, ...]
    saes: Mapping[int, LayerSAE] = field(default_factory=dict)


@dataclass
class Measured:
    """What the probe found; `catalog` and `labels` are seconds per layer."""

    sampling: Rate = field(default_factory=Rate)
    training: Rate = field(default_factory=Rate)
    counting: Rate = field(default_factory=Rate)
    losses: Rate = field(default_factory=Rate)
    baseline: Seconds = field(default_factory=Seconds)
    catalog: Seconds = field(default_factory=Seconds)
    labels: Seconds = field(default_factory=Seconds)


def task_of(work: Preparation) -> Task:
    """What is left of training SAEs.

    Raises:
        UserError: a folder holds something made with other settings, by other software or by someone else.
    """
    left = tuple(layer for layer in work.settings.layers if finished_before(work, layer) is None)
    for layer in left:
        work.unfinished(work.folder(layer).name, work.layer_record(layer))
    return Task(left, left, left if work.terms is not None else ())


def task_of_existing(work: Preparation, layers: Mapping[int, LayerSAE]) -> Task:
    """What is left of cataloguing and labelling SAEs {layer: SAE} that others made.

    Raises:
        UserError: labels lie there without their catalog.
    """
    missing = tuple(layer for layer, opened in layers.items() if not opened.files.catalog.exists())
    for layer in missing:
        if layers[layer].files.annotations.exists():
            raise UserError(f"{layers[layer].files.annotations}: are labels without their catalog; move them away.")
    unlabelled = [n for n, x in layers.items() if work.settings.relabel or not x.files.annotations.exists()]
    return Task((), missing, tuple(unlabelled) if work.terms is not None else (), layers)


def check_preparation(plan: Plan, work: Preparation, task: Task) -> Plan:
    """Fill in what a preparation would do.

    Args:
        plan: with the inputs; what is made, the work, memory and disk are filled in.
        work: the run, not started.
        task: what is left of it.

    Raises:
        UserError: not even one layer fits in memory, or a pass cannot be made.
    """
    cells, settings = work.inputs.cells.cells, work.settings
    n_available, n_rows = rows_of(work)
    plan.to_measure.append(("layers", f"{_listed(settings.layers)}; {_listed(task.train or task.count)} left to make"))
    if not task.saes:
        n_features = settings.training.expansion * work.inputs.loaded.model.config.hidden_size
        text = f"{n_features} features, k {settings.training.k}, {settings.training.epochs} epochs"
        rows = f"{n_rows:,} of {n_available:,} gene positions in {len(work.split.train)} cells"
        plan.to_measure += [
            ("SAEs to train", f"{text} over {rows}"),
            ("", f"{len(work.split.held_out)} cells held out"),
        ]
    n_terms = f"{len(work.terms.terms):,} gene sets" if work.terms is not None else "none (no --gmt)"
    plan.to_measure.append(("labels", f"from {n_terms}, for layers {_listed(task.label)}" if task.label else n_terms))
    plan.host_bytes = peak_host_bytes()
    if not (task.train or task.count or task.label):
        return plan
    needed = _bytes_per_layer(work, task)
    groups = layer_groups(task.count, needed, int(settings.max_memory_gb * 2**30)) if task.count else []
    found = probe_run(work, task, groups)
    plan.works += works(work, task, groups, found)
    largest = max(map(len, groups), default=0)
    plan.host_bytes = peak_host_bytes() + largest * needed + LATER_BYTES
    plan.disk = disk(work, task, (largest + 1) * needed if groups else 0)
    if len(cells) > 1:
        plan.smaller = lambda share: f"--n-cells {max(2, int(share * len(cells)))}, into another --data-root"
    return plan


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _bytes_per_layer(work: Preparation, task: Task) -> int:
    if not task.saes:
        return bytes_per_layer(work)
    n_genes = len(gene_tokens(work.inputs.cells.cells)[0])
    return max((catalog_bytes(n_genes, task.saes[layer].sae.n_features) for layer in task.count), default=1)


def probe_run(work: Preparation, task: Task, groups: Sequence[Sequence[int]]) -> Measured:
    """Time every phase of the first group, about ten seconds in all."""
    found, model = Measured(), work.inputs.loaded.model
    layers = tuple(groups[0]) if groups else ()
    order = by_length([len(cell.tokens) for cell in work.inputs.cells.cells])
    cells = [work.inputs.cells.cells[i] for i in order]
    probe = Probe(model.device)
    saes = {layer: opened.sae for layer, opened in task.saes.items() if layer in layers}
    baselines: dict[int, StreamBaseline] = {}
    if task.train:
        rows = time_sampling(work, cells, layers, found, probe)
        sae, baseline = time_training(work, rows, found, probe.share(TRAINING_SHARE))
        # the layers differ in their numbers only, which the time does not depend on
        saes, baselines = dict.fromkeys(layers, sae), dict.fromkeys(layers, baseline)
    if layers:
        time_counting(work, cells, saes, baselines, found, probe.share(COUNTING_SHARE))
    if task.train and work.settings.n_loss_cells and work.inputs.vocabulary.mask is not None:
        time_losses(work, saes, found, probe)
    time_catalog(work, task, cells, found)
    return found


def time_sampling(
    work: Preparation, cells: Sequence[Cell], layers: Sequence[int], found: Measured, probe: Probe
) -> np.ndarray:
    """Time the pass that samples training rows; returns the rows of the first layer."""
    model, of_passes = work.inputs.loaded.model, probe.share(SAMPLING_SHARE)
    wanted = BATCHES_OF_ROWS * work.settings.training.batch_size
    gathered: list[np.ndarray] = []
    for number, cell in enumerate([cells[0], *cells]):
        offsets = [np.arange(len(cell.gene_positions))]
        rows = {layer: np.empty((len(offsets[0]), model.config.hidden_size), np.float32) for layer in layers}
        seconds, _ = probe.timed(lambda c=cell, o=offsets, r=rows: list(collect_rows(model, [c], o, r)))
        if not number and not is_long(seconds):  # the first call takes longer
            continue
        found.sampling.add(_pass_flops(work, layers, [cell]), seconds)
        gathered.append(rows[layers[0]])
        if not of_passes.left and sum(map(len, gathered)) >= wanted:
            break
    return np.concatenate(gathered)[: max(wanted, 2)]


def time_training(work: Preparation, rows: np.ndarray, found: Measured, probe: Probe) -> tuple[TopKSAE, StreamBaseline]:
    """Time training steps and principal components; returns both, of too few rows to be good."""
    device, settings = work.inputs.loaded.model.device, work.settings.training
    n_features = settings.expansion * rows.shape[1]
    shape, batch_size = ModelShape.of(work.inputs.loaded.model.config), min(settings.batch_size, len(rows))
    flops = training_step_flops(shape, n_features, batch_size)
    once = replace(settings, epochs=1)
    probe.timed(lambda: train_sae(rows[: settings.batch_size], once, device))  # the first steps take longer
    n_steps, n_planned = 0, settings.epochs * (rows_of(work)[1] // settings.batch_size)
    while not found.training.samples or (probe.left and n_steps < n_planned):
        _, (sae, record) = probe.timed(lambda: train_sae(rows, once, device))
        found.training.add(record["n_steps"] * flops, record["elapsed_seconds"])
        n_steps += record["n_steps"]
    mean = sae.input_mean.cpu().numpy()
    seconds, baseline = probe.timed(lambda: fit_baseline(rows, mean, settings.k, device))
    found.baseline = Rate([(1.0, seconds)]).seconds(max(1.0, rows_of(work)[1] / len(rows)))
    return sae, baseline


def time_counting(
    work: Preparation,
    cells: Sequence[Cell],
    saes: Mapping[int, TopKSAE],
    baselines: Mapping[int, StreamBaseline],
    found: Measured,
    probe: Probe,
) -> None:
    """Time the pass that counts firings, over cells as they come: training and held-out ones."""
    model, held_out = work.inputs.loaded.model, frozenset(cell.row for cell in work.split.held_out)
    states = {layer: NotKept() for layer in saes}
    for number, cell in enumerate([cells[0], *cells]):
        seconds, _ = probe.timed(lambda c=cell: count_group(model, [c], saes, states, baselines, held_out))
        if number or is_long(seconds):
            found.counting.add(_pass_flops(work, tuple(saes), [cell]), seconds)
            if not probe.left:
                break


def time_losses(work: Preparation, saes: Mapping[int, TopKSAE], found: Measured, probe: Probe) -> None:
    """Time the masked-gene losses of held-out cells."""
    for cell in work.split.held_out[: work.settings.n_loss_cells]:
        one = replace(work, split=CellSplit((), (cell,)))
        seconds, _ = probe.timed(lambda w=one: losses_of_group(w, saes, {layer: NotKept() for layer in saes}))
        found.losses.add(_loss_flops(work, len(saes), [cell]), seconds)
        if not probe.left:
            break


def time_catalog(work: Preparation, task: Task, cells: Sequence[Cell], found: Measured) -> None:
    """Time the catalog and the labels of some features that fire for many genes."""
    tokens, d_model = gene_tokens(cells)[0], work.inputs.loaded.model.config.hidden_size
    sizes = [opened.sae.n_features for opened in task.saes.values()]
    n_features = max(sizes, default=work.settings.training.expansion * d_model)
    n_some = min(n_features, FEATURES_OF_CATALOG)
    counts = GeneFeatureCounts.empty(tokens, n_some)
    counts.firings[:] = np.random.default_rng(0).integers(0, 2 * work.settings.min_firings, counts.firings.shape)
    counts.sums[:], counts.n_seen[:] = counts.firings, 2 * work.settings.min_firings
    probe, settings = Probe(work.inputs.loaded.model.device), work.settings
    seconds, catalog = probe.timed(
        lambda: build_catalog(counts, work.inputs.vocabulary, settings.min_firings, settings.n_top_genes)
    )
    found.catalog = Rate([(1.0, seconds)]).seconds(n_features / n_some)
    if work.terms is not None:
        seconds, _ = probe.timed(lambda: annotate_catalog(catalog, work.terms, settings.annotation))
        found.labels = Rate([(1.0, seconds)]).seconds(n_features / n_some)


def _pass_flops(work: Preparation, layers: Sequence[int], cells: Sequence[Cell]) -> float:
    shape = ModelShape.of(work.inputs.loaded.model.config)
    return sum((max(layers) + 1) * block_flops(shape, len(cell.tokens)) for cell in cells)


def _loss_flops(work: Preparation, n_layers: int, cells: Sequence[Cell]) -> float:
    config = work.inputs.loaded.model.config
    shape, n_passes = ModelShape.of(config), 1 + (len(LOSS_NAMES) - 1) * n_layers
    of_head = shape.head() + shape.logits()
    return n_passes * sum(
        config.num_hidden_layers * block_flops(shape, len(cell.tokens)) + len(cell.tokens) * of_head for cell in cells
    )


def works(work: Preparation, task: Task, groups: Sequence[Sequence[int]], found: Measured) -> list[Work]:
    """Passes, training steps, catalogs and labels of all layers."""
    made, settings, cells = [], work.settings, work.inputs.cells.cells

    def add(name: str, n: float, flops: float, seconds: Seconds) -> None:
        made.append(Work(name, n, flops, seconds))

    if task.train:
        flops = sum(_pass_flops(work, group, work.split.train) for group in groups)
        n_passes = len(groups) * len(work.split.train)
        add("clean passes that sample rows", n_passes, flops, found.sampling.seconds(flops))
        n_rows = rows_of(work)[1]
        batch_size = min(settings.training.batch_size, n_rows)
        n_steps = len(task.train) * settings.training.epochs * (n_rows // batch_size)
        n_features = settings.training.expansion * work.inputs.loaded.model.config.hidden_size
        shape = ModelShape.of(work.inputs.loaded.model.config)
        flops = n_steps * training_step_flops(shape, n_features, batch_size)
        add("training steps", n_steps, flops, found.training.seconds(flops))
        add("layers to take principal components of", len(task.train), 0.0, found.baseline.times(len(task.train)))
    if task.count:
        flops = sum(_pass_flops(work, group, cells) for group in groups)
        add("clean passes that count firings", len(groups) * len(cells), flops, found.counting.seconds(flops))
    if found.losses.samples:
        held_out = work.split.held_out[: settings.n_loss_cells]
        flops = sum(_loss_flops(work, len(group), held_out) for group in groups)
        n_passes = sum(1 + (len(LOSS_NAMES) - 1) * len(group) for group in groups) * len(held_out)
        add("passes for masked-gene losses", n_passes, flops, found.losses.seconds(flops))
    add("catalogs to write", len(task.count), 0.0, found.catalog.times(len(task.count)))
    if task.label:
        add("layers to label", len(task.label), 0.0, found.labels.times(len(task.label)))
    return made


def disk(work: Preparation, task: Task, unfinished_bytes: float) -> Disk:
    """What SAEs, catalogs and labels take, and unfinished work beside them, without which the run does not start."""
    d_model = work.inputs.loaded.model.config.hidden_size
    n_features = work.settings.training.expansion * d_model
    catalog = n_features * (FEATURE_BYTES + GENE_BYTES * work.settings.n_top_genes)
    final = len(task.train) * 4 * (2 * d_model * n_features + n_features + 2 * d_model) + len(task.count) * catalog
    return Disk(unfinished_bytes, final, 2 * final + unfinished_bytes)
