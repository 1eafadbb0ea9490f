"""What reading every later layer costs, and what same-position effects save: the engine against itself.

    python benchmarks/variants.py                       # the demo; its layers without an SAE get a random one
    python benchmarks/variants.py --shape paper         # Geneformer V2-316M's shape, random weights

All three take turns on the same features and cells: three target layers, every later layer (`--all-downstream`), and
same-position effects at three target layers (`--same-position`). The edge statistics are part of the time, clean runs
are not: they are made once per cell.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import describe_machine, load_study, synchronize, typical_features  # noqa: E402

from cellcircuits.effects import Bench, CleanCell  # noqa: E402
from cellcircuits.same_position import SamePositionBench  # noqa: E402
from cellcircuits.stats import EdgeRule, effect_statistics  # noqa: E402
from sae_model import TopKSAE  # noqa: E402

SOURCE_LAYER, TARGETS = 5, (6, 11, 17)
BLOCK_SIZE = 16
DEFAULTS = {"demo": (64, 4, 5), "paper": (16, 1, 1)}  # features, cells, rounds


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("demo", "paper"), default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    n_features, n_cells, n_rounds = DEFAULTS[args.shape]
    study = load_study(args.shape, (SOURCE_LAYER, *TARGETS), n_cells, args.device)
    every = range(SOURCE_LAYER + 1, study.model.config.num_hidden_layers)
    saes = {layer: study.saes.get(layer) or random_like(study.saes[TARGETS[0]]) for layer in (SOURCE_LAYER, *every)}
    benches = {
        "three target layers": Bench(study.model, saes, SOURCE_LAYER, TARGETS),
        f"all {len(every)} later layers": Bench(study.model, saes, SOURCE_LAYER),
        "same position, three target layers": SamePositionBench(study.model, saes, SOURCE_LAYER, TARGETS),
    }
    clean = {name: [bench.clean(cell) for cell in study.cells] for name, bench in benches.items()}
    features = typical_features(clean["three target layers"], saes[SOURCE_LAYER], n_features)
    sides = {name: side(bench, clean[name], features) for name, bench in benches.items()}
    sides["same position, three target layers"]()  # its clean keys and values are made once per cell
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(n_rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            n_pairs = run()
            synchronize(benches[name].device)
            seconds[name].append((time.perf_counter() - started) / n_pairs)
    print(f"{args.shape} shape; {describe_machine(study.model.device)}")
    base = np.median(seconds["three target layers"])
    for name, of_side in seconds.items():
        print(f"{name:<36} {np.median(of_side):.4g} s per (feature, cell), {np.median(of_side) / base:.3g} times")
    return 0


def random_like(sae: TopKSAE) -> TopKSAE:
    """An SAE of the same size with random weights."""
    return TopKSAE(sae.d_model, sae.n_features, sae.k).eval().requires_grad_(False).to(sae.input_mean.device)


def side(bench: Bench, clean: Sequence[CleanCell], features: Sequence[int]) -> Callable[[], int]:
    """Trace the features as the experiment does, and say how many (feature, cell) pairs that were."""

    def run() -> int:
        effects: dict[int, list[np.ndarray]] = {feature: [] for feature in features}
        for cell in clean:
            active = [feature for feature in features if len(cell.active_rows(feature))]
            size = min(BLOCK_SIZE, bench.batch_size(len(cell.cell.tokens)))
            for start in range(0, len(active), size):
                batch = active[start : start + size]
                for feature, of_feature in zip(batch, bench.effects(cell, batch), strict=True):
                    effects[feature].append(of_feature)
        for rows in (rows for rows in effects.values() if rows):
            effect_statistics(np.stack(rows), EdgeRule())
        return sum(map(len, effects.values()))

    return run


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
