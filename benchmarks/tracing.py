"""Time experiment 1: the published way against the engine, on the same features and cells, with the same edges.

    python benchmarks/tracing.py                                  # the demo's trained model and SAEs: under a minute
    python benchmarks/tracing.py --shape paper                    # Geneformer V2-316M's shape, random weights: ~10 min
    python benchmarks/tracing.py --shape paper --device cuda --json figures.json

The sides take turns: ours on a block of features in one cell, then the published way, as a user gets it (eager
attention, PyTorch's linears) and on our matrix products with fused attention, on some of the same pairs. In between
the engine's matrix products are timed, which gives the floor. Needs PyTorch, transformers and NumPy only.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import describe_machine, load_study, peak_host_bytes, timed, typical_features  # noqa: E402
from floor import GemmClock, floor_flops  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from published import PublishedWay, as_users_get_it, on_our_products  # noqa: E402

from cellcircuits.effects import Bench, CleanCell  # noqa: E402
from cellcircuits.jsonio import write_json  # noqa: E402
from cellcircuits.precision import FP32, PRECISIONS  # noqa: E402
from cellcircuits.stats import EdgeRule, effect_statistics  # noqa: E402

SOURCE_LAYER, TARGETS = 5, (6, 11, 17)
BLOCK_SIZE = 16  # features that the experiment traces together
LAYER_FEATURES, LAYER_CELLS = {"demo": 255, "paper": 4065}, 20
OURS, AS_USERS_GET_IT, ON_OUR_PRODUCTS = "ours", "published", "published, our products and fused attention"
D_ALLOWANCE = 2e-4  # float noise in d
LINE_EVERY_SECONDS = 10.0
# features, cells, features of the published sides
DEFAULTS = {("demo", "cpu"): (64, 20, 16), ("paper", "cpu"): (3, 4, 3)}
ACCELERATOR_DEFAULTS = (208, 20, 16)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("demo", "paper"), default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default=FP32, help="of our side")
    parser.add_argument("--features", type=int, help="features that our side traces (default: by shape and device)")
    parser.add_argument("--cells", type=int, help="cells, at most 20 (default: by shape and device)")
    parser.add_argument("--published-features", type=int, help="how many of them the published sides trace too")
    parser.add_argument("--no-published", action="store_true", help="our side alone")
    parser.add_argument("--seconds", type=float, default=480, help="start no new round after so long (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = build_parser().parse_args(argv)
    deadline = time.monotonic() + args.seconds
    load_before = os.getloadavg()
    wanted = DEFAULTS.get((args.shape, args.device), ACCELERATOR_DEFAULTS)
    n_features, n_cells, n_published = (
        default if given is None else given
        for given, default in zip((args.features, args.cells, args.published_features), wanted, strict=True)
    )
    study = load_study(args.shape, (SOURCE_LAYER, *TARGETS), n_cells, args.device)
    bench = Bench(study.model, study.saes, SOURCE_LAYER, TARGETS, precision=args.precision)
    clean_seconds, clean = zip(*(timed(lambda c=c: bench.clean(c), bench.device) for c in study.cells), strict=True)
    features = typical_features(clean, bench.saes[SOURCE_LAYER], n_features)
    rounds = Rounds(bench, clean, features[: 0 if args.no_published else n_published])
    rounds.warm_up(features[:BLOCK_SIZE])
    gemm = GemmClock(study.model, rounds.batch_size(features) * len(study.cells[0].tokens), args.precision)
    rounds.run(features, gemm, deadline)
    figures = report(args.shape, rounds, gemm, float(np.median(clean_seconds)))
    figures = {
        "shape": args.shape,
        "precision": args.precision,
        **describe_machine(bench.device),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        **figures,
    }
    show(figures)
    if args.json:
        write_json(args.json, figures)
    return 0


@dataclass
class Rounds:
    """All sides in turn, a block of features and a cell at a time.

    `seconds[side]` are seconds per (feature, cell), one value per timed call; `effects[side]` (n_compared, n_cells,
    n_targets) of the `compared` features; `is_measured` (n_compared, n_cells) those pairs that all sides have run.
    """

    bench: Bench
    clean: Sequence[CleanCell]
    compared: Sequence[int]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    effects: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    n_pairs: dict[str, int] = field(default_factory=dict)
    n_active: list[int] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Nothing is measured yet."""
        self.is_measured = np.zeros((len(self.compared), len(self.clean)), dtype=bool)
        self.said = time.monotonic()

    def batch_size(self, features: Sequence[int]) -> int:
        """Features that our side runs as one batch."""
        n_pos = len(self.clean[0].cell.tokens)
        return min(self.bench.batch_size(n_pos), BLOCK_SIZE, len(features))

    def warm_up(self, features: Sequence[int]) -> None:
        """Run our side once, untimed; the peak memory so far is that of our side alone."""
        self._ours(self.clean[0], features)
        self._note_peak("_ours")

    def run(self, features: Sequence[int], gemm: GemmClock, deadline: float) -> None:
        """Go through blocks and cells in the experiment's order until all is done or time is up."""
        ways = {AS_USERS_GET_IT: as_users_get_it, ON_OUR_PRODUCTS: on_our_products} if self.compared else {}
        published = {side: make(self.bench) for side, make in ways.items()}
        for i, block in self._order(features):
            gemm.measure()
            seconds, effects = timed(lambda i=i, block=block: self._ours(self.clean[i], block), self.bench.device)
            self._record(OURS, i, effects, seconds)
            self.n_active += [len(self.clean[i].active_rows(feature)) for feature in effects]
            shared = [feature for feature in self.compared if feature in effects]
            for side, way in published.items() if shared else ():
                self._published(side, way, i, shared)
                gemm.measure()
            self.is_measured[[self.compared.index(feature) for feature in shared], i] = True
            self._say_how_far()
            if time.monotonic() > deadline:
                break
        gemm.measure()
        self._note_peak("")

    def _published(self, side: str, way: PublishedWay, i: int, features: Sequence[int]) -> None:
        """Time the published way on features of one cell; its clean run, which it caches, is not timed."""
        cached = way.clean(self.clean[i].cell)
        for feature in features:
            seconds, effect = timed(lambda feature=feature: way.effect(cached, feature), self.bench.device)
            self._record(side, i, {feature: effect}, seconds)

    def _note_peak(self, whose: str) -> None:
        self.peaks[f"host_bytes{whose}"] = peak_host_bytes()
        if self.bench.device.type == "cuda":
            self.peaks[f"device_bytes{whose}"] = torch.cuda.max_memory_allocated()

    def _say_how_far(self) -> None:
        if time.monotonic() - self.said > LINE_EVERY_SECONDS:
            latest = ", ".join(f"{side} {seconds[-1]:.3g}" for side, seconds in self.seconds.items())
            print(f"{self.n_pairs[OURS]} pairs; seconds per pair: {latest}", file=sys.stderr)
            self.said = time.monotonic()

    def _order(self, features: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """(cell, features of one block that are active in it), block by block."""
        for start in range(0, len(features), BLOCK_SIZE):
            for i, clean in enumerate(self.clean):
                block = [f for f in features[start : start + BLOCK_SIZE] if len(clean.active_rows(f))]
                if block:
                    yield i, block

    def _ours(self, clean: CleanCell, features: Sequence[int]) -> dict[int, NDArray[np.float64]]:
        """Effects of the features that are active in one cell, in batches of like counts as the experiment has them."""
        active = sorted((len(clean.active_rows(feature)), feature) for feature in features)
        active = [feature for n_rows, feature in active if n_rows]
        size = self.batch_size(features)
        batches = [active[start : start + size] for start in range(0, len(active), size)]
        return {f: e for batch in batches for f, e in zip(batch, self.bench.effects(clean, batch), strict=True)}

    def _record(self, side: str, i: int, effects: Mapping[int, NDArray[np.float64]], seconds: float) -> None:
        self.seconds.setdefault(side, []).append(seconds / len(effects))
        self.n_pairs[side] = self.n_pairs.get(side, 0) + len(effects)
        kept = self.effects.setdefault(side, np.zeros((*self.is_measured.shape, self.bench.n_targets)))
        for feature, effect in effects.items():
            if feature in self.compared:
                kept[self.compared.index(feature), i] = effect


def report(shape: str, rounds: Rounds, gemm: GemmClock, clean_seconds: float) -> dict[str, Any]:
    """All figures."""
    config, clean = rounds.bench.model.config, rounds.clean
    n_pos, n_active = len(clean[0].cell.tokens), float(np.mean(rounds.n_active))
    floor = floor_flops(config, range(SOURCE_LAYER + 1, max(TARGETS) + 1), n_pos, n_active)
    per_pair = {side: {"median": float(np.median(s)), "best": min(s)} for side, s in rounds.seconds.items()}
    ours = per_pair[OURS]
    n_layer = LAYER_FEATURES[shape] * LAYER_CELLS
    return {
        "n_cells": len(clean),
        "n_tokens": n_pos,
        "mean_active_positions": n_active,
        "batch_size": gemm.n_rows // n_pos,
        "n_pairs": rounds.n_pairs,
        "share_of_layer_run_by_us": rounds.n_pairs[OURS] / n_layer,
        "seconds_per_pair": per_pair,
        "times_faster_than": {
            side: {which: of_side[which] / ours[which] for which in ours}
            for side, of_side in per_pair.items()
            if side != OURS
        },
        "floor_flops_per_pair": floor,
        "gemm_flops_per_second": {"all_shapes": gemm.rate(), **gemm.rates()},
        "share_of_floor": {which: floor / gemm.rate() / seconds for which, seconds in ours.items()},
        "peak_memory": rounds.peaks,
        "clean_run_seconds_per_cell": clean_seconds,
        "layer_hours": {
            side: (n_layer * of_side["median"] + LAYER_CELLS * clean_seconds) / 3600
            for side, of_side in per_pair.items()
        },
        "layer_pairs": n_layer,
        "edges": {side: compare_edges(rounds, side) for side in per_pair if side != OURS},
    }


def compare_edges(rounds: Rounds, side: str, rule: EdgeRule | None = None) -> dict[str, Any]:
    """Edges of our side and of another over the benchmark's cells, and how far they are one."""
    rule = rule or EdgeRule()
    counts = {"ours": 0, "theirs": 0, "differ": 0, "differ_beyond_noise_in_d": 0}
    largest_of_d = 0.0
    for mine, theirs, measured in zip(rounds.effects[OURS], rounds.effects[side], rounds.is_measured, strict=True):
        one, other = effect_statistics(mine[measured], rule), effect_statistics(theirs[measured], rule)
        differ, either = one.is_edge != other.is_edge, one.is_edge | other.is_edge
        near = np.abs(np.abs(np.stack([one.d, other.d])) - rule.min_abs_d).min(axis=0) < D_ALLOWANCE
        counts["ours"] += int(one.is_edge.sum())
        counts["theirs"] += int(other.is_edge.sum())
        counts["differ"] += int(differ.sum())
        counts["differ_beyond_noise_in_d"] += int((differ & ~near).sum())
        largest_of_d = max(largest_of_d, float(np.abs(one.d - other.d).max(where=either, initial=0.0)))
    mine, theirs = rounds.effects[OURS][rounds.is_measured], rounds.effects[side][rounds.is_measured]
    n_either = (counts["ours"] + counts["theirs"] + counts["differ"]) // 2
    return {
        **counts,
        "overlap": 1 - counts["differ"] / n_either if n_either else 1.0,
        "largest_difference_of_d": largest_of_d,
        "largest_difference_of_effects": float(np.abs(mine - theirs).max() / np.abs(theirs).max()) if mine.any() else 0,
    }


def show(figures: Mapping[str, Any]) -> None:
    """Print the figures."""
    before, after = (", ".join(f"{load:.1f}" for load in figures["load_average"][when]) for when in ("before", "after"))
    print(
        f"{figures['shape']} shape, {figures['precision']}, {figures['device']}, {figures['n_threads']} threads of "
        f"{figures['n_cores']} cores, torch {figures['torch']}, transformers {figures['transformers']}\n"
        f"load average {before} before, {after} after\n"
        f"{figures['n_cells']} cells of {figures['n_tokens']} tokens, features active at "
        f"{figures['mean_active_positions']:.1f} positions, our batches of {figures['batch_size']}; "
        f"{figures['share_of_layer_run_by_us']:.2%} of the layer's {figures['layer_pairs']} pairs\n"
    )
    print("seconds per (feature, cell)                        pairs     median       best   layer, hours")
    for side, seconds in figures["seconds_per_pair"].items():
        n_pairs, hours = figures["n_pairs"][side], figures["layer_hours"][side]
        print(f"  {side:46} {n_pairs:7} {seconds['median']:10.4g} {seconds['best']:10.4g} {hours:14.4g}")
    for side, ratio in figures["times_faster_than"].items():
        print(f"{ratio['median']:.1f} times as fast as {side} (best against best {ratio['best']:.1f})")
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in figures["gemm_flops_per_second"].items())
    share = figures["share_of_floor"]
    print(f"floor {figures['floor_flops_per_pair'] / 1e9:.4g} GFLOP per pair; GEMM rates in GFLOP/s: {rates}")
    print(f"{share['median']:.1%} of the floor (best {share['best']:.1%})")
    print(
        "peak memory: " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in figures["peak_memory"].items())
    )
    print(f"clean run of a cell: {figures['clean_run_seconds_per_cell']:.3g} s")
    for side, edges in figures["edges"].items():
        print(
            f"edges, ours against {side}: {edges['ours']} and {edges['theirs']}, {edges['differ']} differ, "
            f"{edges['differ_beyond_noise_in_d']} of them beyond float noise in d (overlap {edges['overlap']:.4f}); "
            f"largest difference of an edge's d {edges['largest_difference_of_d']:.1e}, of an effect "
            f"{edges['largest_difference_of_effects']:.1e} of the largest effect"
        )


if __name__ == "__main__":
    sys.exit(main())
