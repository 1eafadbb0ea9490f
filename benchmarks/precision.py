"""What each precision does to edges: experiment 1 on the trained demo model, held against float64.

    python benchmarks/precision.py                      # 255 features x 20 cells in every mode: some minutes
    python benchmarks/precision.py --features 32        # fewer features, evenly spread

float64 is a second run of the engine on the model and SAEs in float64. The Jaccard overlap is that of the sets of
(feature, target layer, target); |delta d| is taken over targets that are an edge in either run. Tensor cores are
emulated where the device has none for a mode: tf32 by rounding the factors of the products.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import Study, describe_machine, load_study  # noqa: E402

from cellcircuits.effects import Bench  # noqa: E402
from cellcircuits.precision import PRECISIONS  # noqa: E402
from cellcircuits.stats import EdgeRule, EffectStatistics, effect_statistics  # noqa: E402

SOURCE_LAYER, TARGETS = 5, (6, 11, 17)
BLOCK_SIZE = 16


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="of the modes; float64: CPU")
    parser.add_argument("--features", type=int, default=None, help="features, evenly spread (default: all that fire)")
    parser.add_argument("--cells", type=int, default=20, help="cells, at most 20 (default: %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run every mode and print the table."""
    args = build_parser().parse_args(argv)
    exact_study = load_study("demo", (SOURCE_LAYER, *TARGETS), args.cells)
    study = load_study("demo", (SOURCE_LAYER, *TARGETS), args.cells, args.device)
    exact = Bench(exact_study.model.double(), {n: sae.double() for n, sae in exact_study.saes.items()}, SOURCE_LAYER)
    features = chosen_features(exact, exact_study, args.features)
    print(f"{len(features)} features, {args.cells} cells; {describe_machine(study.model.device)}", flush=True)
    seconds, reference = traced(exact, exact_study, features)
    n_edges = sum(int(of_one.is_edge.sum()) for of_one in reference)
    print(f"float64: {n_edges} edges, {seconds:.0f} s\n")
    layers = " / ".join(f"L{layer}" for layer in TARGETS)
    print(f"| precision | Jaccard overlap of edges | at {layers} | largest abs delta d | median | seconds |")
    print("|---|---|---|---|---|---|")
    for mode in args.modes:
        bench = Bench(study.model, study.saes, SOURCE_LAYER, precision=mode)
        seconds, found = traced(bench, study, features)
        print(f"| {mode} | {row(reference, found, bench)} | {seconds:.0f} |", flush=True)
    return 0


def chosen_features(bench: Bench, study: Study, n_wanted: int | None) -> list[int]:
    """Features that are active in at least one of the cells, all or some at even steps."""
    firing = np.unique(np.concatenate([np.unique(bench.clean(cell).source.features) for cell in study.cells]))
    if n_wanted is not None and n_wanted < len(firing):
        firing = firing[np.linspace(0, len(firing) - 1, n_wanted).round().astype(int)]
    return firing.tolist()


def traced(bench: Bench, study: Study, features: Sequence[int]) -> tuple[float, list[EffectStatistics]]:
    """Seconds, and the statistics of every feature over the cells where it is active."""
    started = time.perf_counter()
    effects: dict[int, list[np.ndarray]] = {feature: [] for feature in features}
    for cell in study.cells:
        clean = bench.clean(cell)
        active = [feature for feature in features if len(clean.active_rows(feature))]
        for start in range(0, len(active), BLOCK_SIZE):
            block = active[start : start + BLOCK_SIZE]
            for feature, of_feature in zip(block, bench.effects(clean, block), strict=True):
                effects[feature].append(of_feature)
    empty = np.zeros((0, bench.n_targets))
    found = [effect_statistics(np.stack(rows) if rows else empty, EdgeRule()) for rows in effects.values()]
    return time.perf_counter() - started, found


def row(reference: Sequence[EffectStatistics], found: Sequence[EffectStatistics], bench: Bench) -> str:
    """Overlap of edges in all and per layer, largest and median |delta d| on edges of either run."""
    there, here = (np.stack([of_one.is_edge for of_one in run]) for run in (reference, found))
    change = np.abs(np.stack([a.d - b.d for a, b in zip(reference, found, strict=True)]))[there | here]
    per_layer = " / ".join(f"{jaccard(there[:, c], here[:, c]):.4f}" for c in bench.columns.values())
    largest, median = (change.max(), np.median(change)) if len(change) else (0.0, 0.0)
    return f"{jaccard(there, here):.4f} | {per_layer} | {largest:.2g} | {median:.1g}"


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Size of the intersection over that of the union; 1 for two empty sets."""
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
