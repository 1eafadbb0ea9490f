"""What testing the edges of a trace costs, in percent of the tracing, both measured in one run.

    python benchmarks/calibration_cost.py                            # the demo's trained model and SAEs: a minute
    python benchmarks/calibration_cost.py --shape paper --features 3 # Geneformer V2-316M's shape, random weights

Processor time of this process (time.process_time), so that other work on the machine does not count; on an accelerator
seconds by the clock. Tracing: the ablated passes of a block of features in all cells, as the experiment makes them,
and apart from them the clean passes, which a layer shares. Calibration: `Calibrator.calibrate` of these features, and
`hedges_g` of their edges. Needs pyarrow and SciPy beside what the other benchmarks need.
`--keep FILE` keeps the effects, and `--from FILE` calibrates kept ones again without tracing.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import describe_machine, load_study, synchronize, typical_features  # noqa: E402

from cellcircuits.calibration import Calibrator, FeatureCalibration, hedges_g  # noqa: E402
from cellcircuits.edge_fdr import CalibrationSettings  # noqa: E402
from cellcircuits.effects import Bench  # noqa: E402
from cellcircuits.jsonio import write_json  # noqa: E402
from cellcircuits.stats import EdgeRule, effect_statistics  # noqa: E402
from cellcircuits.tracing import BlockEffects, block_shard, trace_block  # noqa: E402

SOURCE_LAYER, TARGETS = 5, (6, 11, 17)
FEATURES = {"demo": 16, "paper": 3}
LAYER_FEATURES = {"demo": 255, "paper": 4065}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("demo", "paper"), default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    parser.add_argument("--features", type=int, help="features to trace (default: by shape)")
    parser.add_argument("--cells", type=int, default=20, help="cells, at most 20 different ones (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="calibrations, the median counts (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="keep the effects in this file (npz)")
    parser.add_argument("--from", dest="kept", type=Path, help="calibrate the effects of this file, trace nothing")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = build_parser().parse_args(argv)
    device = torch.device(args.device)
    if args.kept:
        with np.load(args.kept, allow_pickle=False) as kept:
            effects, measured, features = kept["effects"], kept["measured"], kept["features"].tolist()
        figures: dict[str, Any] = {}
    else:
        block, figures = traced(args)
        effects, measured, features = block.effects, block.measured, list(block.features)
        if args.keep:
            np.savez_compressed(args.keep, effects=effects, measured=measured, features=np.array(features))
    figures |= calibrated(effects, measured, features, device, args.rounds)
    if not args.kept:
        tracing = figures["tracing_seconds"] / len(features)
        clean = figures["clean_seconds"] / LAYER_FEATURES[args.shape]
        figures["percent_of_tracing"] = 100 * figures["calibration_seconds_per_feature"] / (tracing + clean)
    figures = {"shape": args.shape, **describe_machine(device), "load_average": os.getloadavg(), **figures}
    for key, value in figures.items():
        print(f"{key:34} {value:.4g}" if isinstance(value, float) else f"{key:34} {value}")
    if args.json:
        write_json(args.json, figures)
    return 0


def traced(args: argparse.Namespace) -> tuple[BlockEffects, dict[str, Any]]:
    """Trace some typical features in all cells, and what that took."""
    study = load_study(args.shape, (SOURCE_LAYER, *TARGETS), args.cells, args.device)
    bench = Bench(study.model, study.saes, SOURCE_LAYER, TARGETS)
    clean_seconds, clean = spent(lambda: [bench.clean(cell) for cell in study.cells], bench.device)
    n_features = args.features or FEATURES[args.shape]
    features = sorted(typical_features(clean, bench.saes[SOURCE_LAYER], n_features))
    trace_block(bench, clean[:1], BlockEffects.empty(features[:1], 1, bench.n_targets))  # the first call packs weights
    block = BlockEffects.empty(features, len(clean), bench.n_targets)
    seconds, _ = spent(lambda: trace_block(bench, clean, block), bench.device)
    tables, _ = spent(lambda: block_shard(bench, block, EdgeRule(), "benchmark"), bench.device)
    return block, {
        "n_cells": len(clean),
        "n_tokens": len(clean[0].cell.tokens),
        "n_pairs": int(block.measured.sum()),
        "clean_seconds": clean_seconds,
        "tracing_seconds": seconds,
        "edges_and_tests_seconds": tables,
    }


def calibrated(
    effects: np.ndarray, measured: np.ndarray, features: Sequence[int], device: torch.device, n_rounds: int
) -> dict[str, Any]:
    """What calibrating the features takes, and what there was to test.

    Args:
        effects: (n_features, n_cells, n_targets).
        measured: (n_features, n_cells).
        features: their indices.
        device: where to compute.
        n_rounds: how often.
    """
    calibrator = Calibrator(EdgeRule(), CalibrationSettings(), measured.shape[1], SOURCE_LAYER, device)
    each = [(feature, effects[j][measured[j]], measured[j]) for j, feature in enumerate(features)]
    is_edge = [effect_statistics(one[1], EdgeRule()).is_edge for one in each]

    def tests() -> list[FeatureCalibration]:
        for one, edges in zip(each, is_edge, strict=True):
            hedges_g(one[1][:, edges])
        return [calibrator.calibrate(*one) for one in each]

    tests()  # the first call imports
    rounds = [spent(tests, device) for _ in range(n_rounds)]
    found = rounds[0][1]
    return {
        "n_features": len(features),
        "active_cells_per_feature": [len(one[1]) for one in each],
        "live_targets_per_feature": [one.counts["n_live_targets"] for one in found],
        "edges_per_feature": [int(edges.sum()) for edges in is_edge],
        "calibration_seconds_per_feature": float(np.median([seconds for seconds, _ in rounds])) / len(features),
    }


def spent(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of processor time of a call, or by the clock on an accelerator, and what it returns."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    started = clock()
    result = call()
    synchronize(device)
    return clock() - started, result


if __name__ == "__main__":
    sys.exit(main())
