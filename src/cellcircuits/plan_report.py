"""What a run would do, as `--check` prints it: inputs, work, memory, disk, time, and the command that starts it."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cellcircuits.errors import UserError
from cellcircuits.probe import Seconds

if TYPE_CHECKING:
    import torch

    from cellcircuits.inputs import LayerSAE, ModelAndCells

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
LABEL_WIDTH = 15
BUSY = 1.5  # processes that want to run, per core


@dataclass(frozen=True)
class Work:
    """Passes or steps of one kind that a run would make; `n` may be an estimate, `flops` are those of all of them."""

    name: str
    n: float
    flops: float
    seconds: Seconds


@dataclass(frozen=True)
class Disk:
    """Bytes that a run would write: what it surely needs, what it will about need, and the most it can."""

    at_least: float
    about: float
    at_most: float


@dataclass
class Plan:
    """What a run would do.

    Attributes:
        opened: model and cells.
        layers: the SAEs.
        out_dir: where results would go.
        precision: of the passes.
        opening: seconds that opening the inputs took.
        to_measure: lines (heading, text) on what is measured.
        works: what is computed.
        host_bytes: memory that the run takes on the host, at its peak.
        disk: what it writes.
        smaller: given the share of the work that fits into an hour, flags that make a first step of about that size.
    """

    opened: "ModelAndCells"
    layers: Mapping[int, "LayerSAE"]
    out_dir: Path
    precision: str
    opening: Seconds
    to_measure: list[tuple[str, str]] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    host_bytes: float = 0.0
    disk: Disk = field(default_factory=lambda: Disk(0, 0, 0))
    smaller: Callable[[float], str] | None = None

    @property
    def seconds(self) -> Seconds:
        """The whole run."""
        return sum((work.seconds for work in self.works), self.opening)

    @property
    def flops(self) -> float:
        """Operations of all passes."""
        return sum(work.flops for work in self.works)


def show(plan: Plan, command: str) -> int:
    """Print a plan; returns the exit status.

    Args:
        plan: the plan.
        command: what starts the run.

    Raises:
        UserError: what the run writes cannot fit on the disk.
    """
    print("\n".join(f"  {heading:<{LABEL_WIDTH}}{text}".rstrip() for heading, text in plan_lines(plan, command)))
    free, place = free_disk(plan.out_dir)
    if plan.disk.at_least > free:
        raise UserError(
            f"{place}: has {in_bytes(free)} free, and the results need at least {in_bytes(plan.disk.at_least)}; free "
            "some, or choose another folder."
        )
    return 0


def plan_lines(plan: Plan, command: str) -> Iterable[tuple[str, str]]:
    """A plan as lines (heading, text)."""
    yield from input_lines(plan.opened, plan.layers, plan.precision)
    yield from plan.to_measure
    for number, work in enumerate(plan.works):
        each = f", {work.seconds.best / work.n:.2g} s each" if work.n > 1 else ""
        flops = f"{in_flops(work.flops)}, " if work.flops else ""
        text = f"{in_numbers(work.n)} {work.name}: {flops}{in_time(work.seconds.best)}{each}"
        yield "" if number else "work", text
    yield "", f"opening the inputs: {in_time(plan.opening.best)}"
    yield from memory_lines(plan)
    yield "disk", disk_line(plan)
    seconds, flops = plan.seconds, f"; {in_flops(plan.flops)} in all" if plan.flops else ""
    yield "time", f"{in_time(seconds.best)} ({in_time(seconds.low)} to {in_time(seconds.high)}) on this device{flops}"
    load, n_cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY * n_cores:
        yield "", f"others are at work: a load of {load:.1f} on {n_cores} cores; it goes faster when they are done"
    yield "results in", str(plan.out_dir)
    yield "start with", command
    if plan.smaller and seconds.best > DAY:
        yield "a first step", f"of about an hour: the same with {plan.smaller(HOUR / seconds.best)}"
    yield "", "Nothing was run or written."


def input_lines(opened: "ModelAndCells", layers: Mapping[int, "LayerSAE"], precision: str) -> Iterable[tuple[str, str]]:
    """Model, device, SAEs and cells."""
    from cellcircuits.device import describe_device
    from cellcircuits.geneformer import n_positions

    loaded = opened.loaded
    config = loaded.model.config
    where = loaded.source + (f", {loaded.subfolder}" if loaded.subfolder else "")
    sizes = f"{config.num_hidden_layers} blocks, width {config.hidden_size}, {n_positions(loaded.model)} positions"
    yield "model", f"{where}: {sizes}"
    yield "device", f"{describe_device(opened.device)}, precision {precision}"
    yield from sae_lines(layers)
    yield from cell_lines(opened.cells.report, [len(cell.tokens) for cell in opened.cells.cells])


def sae_lines(layers: Mapping[int, "LayerSAE"]) -> Iterable[tuple[str, str]]:
    """One line per kind of SAE: layers, features, k, whether there is a catalog, and labels."""
    kinds: dict[str, list[int]] = {}
    for layer, opened_sae in sorted(layers.items()):
        catalog = "catalog" if opened_sae.catalog is not None else "no catalog"
        labels = "labels" if opened_sae.files.annotations.is_file() else "no labels"
        text = f"{opened_sae.sae.n_features} features, k {opened_sae.sae.k}, {catalog}, {labels}"
        kinds.setdefault(text, []).append(layer)
    for number, (text, of_kind) in enumerate(kinds.items()):
        layer = "layer" if len(of_kind) == 1 else "layers"
        yield "" if number else "SAEs", f"{layer} {', '.join(map(str, of_kind))}: {text}"


def cell_lines(report: Mapping[str, object], lengths: Sequence[int]) -> Iterable[tuple[str, str]]:
    """The cells: how many were asked for, match, are used and dropped, and how long they are."""
    selection = report["selection"]
    dropped = report["n_dropped_cells"]
    why = "; ".join(f"{n} dropped: {reason}" for reason, n in dropped.items()) or "none dropped"
    rows = f"{report['n_rows_matched']} of {report['n_rows_in_file']} rows match"
    yield "cells", f"{report['file']}: {selection['n_cells']} asked, {rows}, {len(lengths)} used, {why}"
    ascending = sorted(lengths)
    middle = (ascending[(len(ascending) - 1) // 2] + ascending[len(ascending) // 2]) / 2
    cut = f"{report['n_cells_truncated']} cells cut at {report['max_gene_tokens']} genes"
    yield "", f"{ascending[0]} to {ascending[-1]} tokens, median {middle:g}; {cut}"


def disk_line(plan: Plan) -> str:
    """What the run writes, beside what is free."""
    free, place = free_disk(plan.out_dir)
    enough = "" if plan.disk.at_most <= free else ", which may not be enough"
    needs = f"about {in_bytes(plan.disk.about)}, at most {in_bytes(plan.disk.at_most)}"
    return f"{needs}; {in_bytes(free)} free at {place}{enough}"


def memory_lines(plan: Plan) -> Iterable[tuple[str, str]]:
    """Memory on the host, and on the device where that has its own."""
    from cellcircuits.device import host_memory

    has = host_memory()
    enough = "" if plan.host_bytes <= has else ", which is too little"
    yield "memory", f"about {in_bytes(plan.host_bytes)} on the host, which has {in_bytes(has)}{enough}"
    line = device_memory(plan.opened.device)
    if line:
        yield "", line


def device_memory(device: "torch.device") -> str:
    """What this check took on the device, empty for a CPU: a run takes about the same."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_reserved(device)
        return f"{in_bytes(peak)} on the device, measured; it has {in_bytes(total)}, {in_bytes(free)} of it free now"
    if device.type == "mps":
        return f"{in_bytes(torch.mps.driver_allocated_memory())} on the device, measured"
    return ""


def peak_host_bytes() -> int:
    """The most memory that this process has held so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def free_disk(folder: Path) -> tuple[int, Path]:
    """Free bytes where a folder lies or would lie, and the nearest folder above it that is there.

    Raises:
        UserError: it cannot be made or written.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written" if there.is_dir() else "is no folder"
        raise UserError(f"{there}: {why}; choose another place for the results.")
    return shutil.disk_usage(there).free, there


def in_time(seconds: float) -> str:
    """A duration in words: `25 s`, `3 min`, `5.5 h`, `2.5 days`."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "under 0.1 s"
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:.1f} days"


def in_bytes(n: float) -> str:
    """A size with its unit: `12 MB`, `2.9 GB` (powers of 1024)."""
    for unit, size in (("TB", 2**40), ("GB", 2**30)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    if n >= 10 * 2**20:
        return f"{n / 2**20:.0f} MB"
    return f"{n / 2**20:.1f} MB" if n >= 2**18 else f"{n / 2**10:.0f} KB"


def in_flops(n: float) -> str:
    """Operations with their unit."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n / 1e6:.3g} MFLOP"


def in_numbers(n: float) -> str:
    """A count with commas, rounded where it is an estimate."""
    return f"{n:,.0f}"
