"""How time and memory of experiment 1 grow with features and cells, and what a whole layer at the paper's size needs.

    python benchmarks/memory.py                   # about eight minutes on two cores
    python benchmarks/memory.py --needs-only      # the computed part alone: seconds

Every point is a process of its own that traces random features in real cells, as the experiment does, and drops the
edges into a temporary folder. The widths are Geneformer V2-316M's and 2,048 tokens; the blocks are few, because what
stays in memory per cell and per block of features does not depend on their number.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402
from common import (  # noqa: E402
    PAPER_BLOCKS,
    describe_machine,
    paper_model,
    paper_sae,
    peak_host_bytes,
    set_means,
    stored_cells,
    typical_features,
)
from torch import nn  # noqa: E402
from transformers import BertForMaskedLM  # noqa: E402

from cellcircuits.clean_runs import CleanRuns  # noqa: E402
from cellcircuits.device import CPU_BATCH_BYTES  # noqa: E402
from cellcircuits.effects import Bench  # noqa: E402
from cellcircuits.geneformer import block_parts  # noqa: E402
from cellcircuits.graph_store import BLOCK_SIZE, shard_path, write_shard  # noqa: E402
from cellcircuits.jsonio import write_json  # noqa: E402
from cellcircuits.stats import EdgeRule  # noqa: E402
from cellcircuits.tail import Tail  # noqa: E402
from cellcircuits.tracing import BlockEffects, block_shard, trace_block  # noqa: E402
from sae_model import TopKSAE  # noqa: E402

STEPS = (1, 2, 4, 8)
SOURCE_LAYER, TARGETS, N_TOKENS = 5, (6, 11, 17), 2048
FLOAT32, FLOAT64, INT32 = 4, 8, 4


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=BLOCK_SIZE, help="at 1x (default: %(default)s)")
    parser.add_argument("--cells", type=int, default=2, help="at 1x (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="of the model; the first is ablated (%(default)s)")
    parser.add_argument("--layer-cells", type=int, default=200, help="cells of the computed layer (%(default)s)")
    parser.add_argument("--needs-only", action="store_true", help="compute, measure nothing")
    parser.add_argument("--point", action="store_true", help="measure one point here and print it as JSON")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every point in its own process, compute the needs of a layer, print both."""
    args = build_parser().parse_args(argv)
    if args.point:
        print(json.dumps(measure_point(args.features, args.cells, args.blocks)))
        return 0
    figures: dict[str, Any] = describe_machine(torch.device("cpu"))
    if not args.needs_only:
        for what in ("features", "cells"):
            figures[what] = [child_point(args, what, step) for step in STEPS]
            show_growth(what, figures[what])
    figures["needs"] = layer_needs(args.layer_cells)
    show_needs(figures["needs"], args.layer_cells)
    if args.json:
        write_json(args.json, figures)
    return 0


def child_point(args: argparse.Namespace, what: str, step: int) -> dict[str, Any]:
    """One point with `step` times the features or the cells, measured in a fresh process."""
    sizes = {"features": args.features, "cells": args.cells, "blocks": args.blocks}
    sizes[what] *= step
    flags = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    command = [sys.executable, __file__, "--point", *flags]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"a point failed:\n{answer.stderr}")
    return json.loads(answer.stdout)


def measure_point(n_features: int, n_cells: int, n_blocks: int) -> dict[str, Any]:
    """Trace features block by block in this process, as experiment 1 does, from the clean runs to the shards."""
    model = paper_model(n_blocks)
    saes = {layer: paper_sae() for layer in range(n_blocks)}
    cells = stored_cells("paper", n_cells)
    set_means(model, saes, cells[0])
    bench = Bench(model, saes, source_layer=0)
    features = typical_features([bench.clean(cells[0])], saes[0], n_features)
    before = peak_host_bytes()
    started = time.perf_counter()
    clean = CleanRuns(bench, cells)
    n_pairs = 0
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, n_features, BLOCK_SIZE):
            block = BlockEffects.empty(features[start : start + BLOCK_SIZE], n_cells, bench.n_targets)
            trace_block(bench, clean, block)
            write_shard(shard_path(Path(folder), start), block_shard(bench, block, EdgeRule(), "benchmark"))
            n_pairs += int(block.measured.sum())
    return {
        "n_features": n_features,
        "n_cells": n_cells,
        "n_pairs": n_pairs,
        "seconds": time.perf_counter() - started,
        "peak_bytes_before": before,
        "peak_bytes": peak_host_bytes(),
        "computed_bytes_per_cell": bytes_per_cell(len(cells[0].tokens), saes[0], len(bench.targets)),
    }


def bytes_per_cell(n_tokens: int, sae: TopKSAE, n_targets: int) -> int:
    """Host memory per cell: its clean run, and its row of a block's effects."""
    block_effects = BLOCK_SIZE * (n_targets * sae.n_features * FLOAT64 + 1)
    return clean_run_bytes(n_tokens, n_tokens - 2, sae, n_targets) + block_effects


def clean_run_bytes(n_tokens: int, n_gene: int, sae: TopKSAE, n_targets: int) -> int:
    """Host memory of one cell's clean run: the source stream, the k latents per gene position of source and targets."""
    latents = (1 + n_targets) * n_gene * sae.k * (FLOAT32 + INT32)
    return n_tokens * sae.d_model * FLOAT32 + latents


def engine_copy_bytes(model: BertForMaskedLM, blocks: Iterable[int]) -> int:
    """Memory of the engine's own copies of the weights of its blocks, at most."""
    total = 0
    for layer in blocks:
        parts = block_parts(model, layer)
        attention = (parts.query, parts.key, parts.value)
        copied = (*attention, *attention, parts.attention_output, parts.intermediate, parts.output)
        total += sum(parameter_bytes(linear) for linear in copied)
    return total


def parameter_bytes(module: nn.Module) -> int:
    """Memory of a module's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def layer_needs(n_cells: int) -> dict[str, int]:
    """What tracing layer 5 of Geneformer V2-316M holds in memory, in bytes; nothing of it grows with the features."""
    with torch.device("meta"):  # shapes without memory
        model, sae = paper_model(PAPER_BLOCKS), paper_sae()
        stream = Tail(model, SOURCE_LAYER, TARGETS).bytes_per_stream(N_TOKENS, FLOAT32)
    return {
        "model": parameter_bytes(model),
        "SAEs": (1 + len(TARGETS)) * parameter_bytes(sae),
        "engine's copies of weights": engine_copy_bytes(model, range(SOURCE_LAYER + 1, max(TARGETS) + 1)),
        "clean runs": n_cells * clean_run_bytes(N_TOKENS, N_TOKENS - 2, sae, len(TARGETS)),
        "effects of one block": n_cells * BLOCK_SIZE * (len(TARGETS) * sae.n_features * FLOAT64 + 1),
        "one batch on a CPU": max(CPU_BATCH_BYTES, stream),
        "one batch on a GPU": BLOCK_SIZE * stream,
    }


def show_growth(what: str, points: Sequence[dict[str, Any]]) -> None:
    """Print time and memory against the first point."""
    first = points[0]
    print(f"\n{what:>8} {'pairs':>6} {'seconds':>8} {'times':>6} {'per pair':>9} {'peak, GiB':>10} {'more, MiB':>10}")
    for point in points:
        more = (point["peak_bytes"] - first["peak_bytes"]) / 2**20
        print(
            f"{point[f'n_{what}']:8} {point['n_pairs']:6} {point['seconds']:8.1f} "
            f"{point['seconds'] / first['seconds']:6.2f} {point['seconds'] / point['n_pairs']:9.3f} "
            f"{point['peak_bytes'] / 2**30:10.2f} {more:10.0f}"
        )
    if what == "cells":
        print(f"computed: {first['computed_bytes_per_cell'] / 2**20:.1f} MiB more per cell")


def show_needs(needs: dict[str, int], n_cells: int) -> None:
    """Print what a whole layer holds on the host and on the device."""
    on_device = ("model", "SAEs", "engine's copies of weights", "one batch on a GPU")
    on_host = ("clean runs", "effects of one block")
    print(f"\ncomputed for layer {SOURCE_LAYER} of Geneformer V2-316M, {n_cells} cells, any number of features (GiB)")
    for name, size in needs.items():
        print(f"  {name:28} {size / 2**30:6.2f}")
    cpu = sum(size for name, size in needs.items() if name != "one batch on a GPU")
    print(f"  on a CPU, host               {cpu / 2**30:6.2f}")
    print(f"  with a GPU, device           {sum(needs[name] for name in on_device) / 2**30:6.2f}")
    print(f"  with a GPU, host             {sum(needs[name] for name in on_host) / 2**30:6.2f}")
    print("besides, the interpreter and its libraries, and with a GPU the model once on the host while it is loaded")


if __name__ == "__main__":
    sys.exit(main())
