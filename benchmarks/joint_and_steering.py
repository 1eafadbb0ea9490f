"""Time one triplet and one steered feature in one cell: the tree and the shared clean pass against full passes.

    python benchmarks/joint_and_steering.py                  # the demo's model, SAEs and a cell: seconds
    python benchmarks/joint_and_steering.py --shape paper    # Geneformer V2-316M's shape, random weights: minutes

Both sides run in one go on the same features and cell, and must give the same numbers. The full passes are the
study's way: the whole model with its language-model head for every condition and every alpha, dense encodes and
decodes of all gene positions. Prints seconds, passes (encoder blocks run / blocks of the model) and ratios.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import load_study, peak_host_bytes, timed  # noqa: E402
from published import dense_scaling, full_pass, with_attention  # noqa: E402
from transformers import BertForMaskedLM  # noqa: E402

from cellcircuits.cells import Cell  # noqa: E402
from cellcircuits.combination_stats import conditions  # noqa: E402
from cellcircuits.joint import JointBench  # noqa: E402
from cellcircuits.steering import SteeringBench, SteeringRun  # noqa: E402
from sae_model import TopKSAE  # noqa: E402

LAYERS, TARGET, ALPHAS = (0, 5, 11), 17, (2.0, 5.0)
N_ACTIVE = 14  # positions where a feature of the published SAEs is active in a cell, on average


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("demo", "paper"), default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="sdpa", help="of the full passes")
    parser.add_argument("--repeats", type=int, default=None, help="rounds (default: 5 for demo, 1 for paper)")
    return parser


def main() -> int:
    """Run both sides and print the table."""
    args = build_parser().parse_args()
    inputs = load_study(args.shape, (*LAYERS, TARGET), 1, args.device)
    model, saes, cell = with_attention(inputs.model, args.attention), inputs.saes, inputs.cells[0]
    repeats = args.repeats or (5 if args.shape == "demo" else 1)
    print(
        f"{args.shape}: {model.config.num_hidden_layers} blocks, d_model {model.config.hidden_size}, "
        f"{len(cell.tokens)} tokens, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"full passes with {args.attention} attention"
    )
    with torch.inference_mode():
        triplet(model, saes, cell, repeats)
        for layer in (*LAYERS, TARGET):
            steering(model, saes, cell, layer, repeats)
    print(f"peak memory {peak_host_bytes() / 2**30:.1f} GiB")
    return 0


def typical_feature(active: np.ndarray) -> int:
    """The feature whose number of active positions, counted from (n_gene, k) indices, is nearest the usual one."""
    features, counts = np.unique(active, return_counts=True)
    return int(features[np.argmin(np.abs(counts - N_ACTIVE))])


def in_turn(sides: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, tuple[float, Any]]:
    """Best seconds and result of each side, run in alternation."""
    found: dict[str, tuple[float, Any]] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds, result = timed(side, device)
            found[name] = (min(seconds, found.get(name, (seconds,))[0]), result)
    return found


def triplet(model: BertForMaskedLM, saes: dict[int, TopKSAE], cell: Cell, repeats: int) -> None:
    """One triplet in one cell, its clean pass included on both sides."""
    bench = JointBench(model, saes, LAYERS, TARGET)
    path = bench.clean(cell)
    features = [(layer, typical_feature(path.latents[layer].features)) for layer in LAYERS]
    tokens = torch.from_numpy(cell.tokens).to(model.device)[None]
    positions = torch.from_numpy(cell.gene_positions).to(model.device)

    def ours() -> tuple[np.ndarray, int]:
        clean = bench.clean(cell)
        effects = bench.effects(clean, features)
        return effects.published, effects.n_block_runs + TARGET + 1

    def study() -> tuple[np.ndarray, int]:
        streams, _ = full_pass(model, tokens, {}, (*LAYERS, TARGET))
        active = [(saes[layer].top_k(streams[layer][0, positions])[1] == index).any(-1) for layer, index in features]
        before = saes[TARGET].encode(streams[TARGET][0, positions])
        effects = []
        for members in conditions(len(features)):
            edits = {
                features[i][0]: dense_scaling(saes[features[i][0]], positions, [features[i][1]], 0.0) for i in members
            }
            streams, _ = full_pass(model, tokens, edits, (TARGET,))
            rows = torch.stack([active[i] for i in members]).any(0)
            change = (saes[TARGET].encode(streams[TARGET][0, positions]) - before)[rows]
            effects.append(change.cpu().numpy().mean(axis=0, dtype=np.float64))
        return np.stack(effects), (len(effects) + 1) * model.config.num_hidden_layers

    found = in_turn({"ours": ours, "full passes": study}, repeats, model.device)
    show("one triplet, one cell (7 conditions and the clean pass)", found, model.config.num_hidden_layers)


def steering(model: BertForMaskedLM, saes: dict[int, TopKSAE], cell: Cell, layer: int, repeats: int) -> None:
    """One feature at every alpha in one cell; the clean pass, shared by all features, is timed apart."""
    bench = SteeringBench(model, {layer: saes[layer]})
    clean = bench.clean(cell)
    feature = typical_feature(bench.latents(clean, layer).features)
    tokens = torch.from_numpy(cell.tokens).to(model.device)[None]
    positions = torch.from_numpy(cell.gene_positions).to(model.device)
    weight = bench.head.weight.detach().cpu().numpy().astype(np.float64)

    def ours() -> tuple[np.ndarray, int]:
        latents = bench.latents(clean, layer)
        changes = bench.mean_changes(clean, layer, latents, [SteeringRun(feature, alpha) for alpha in ALPHAS])
        return changes @ weight.T, len(ALPHAS) * (bench.last - layer)

    def study() -> tuple[np.ndarray, int]:
        _, before = full_pass(model, tokens, {}, ())
        changes = []
        for alpha in ALPHAS:
            edits = {layer: dense_scaling(saes[layer], positions, [feature], alpha)}
            _, after = full_pass(model, tokens, edits, ())
            changes.append((after - before)[0, positions].cpu().numpy().mean(axis=0, dtype=np.float64))
        return np.stack(changes), (len(ALPHAS) + 1) * model.config.num_hidden_layers

    found = in_turn({"ours": ours, "full passes": study}, repeats, model.device)
    show(f"one feature of layer {layer}, one cell, alphas {ALPHAS}", found, model.config.num_hidden_layers)


def show(what: str, found: dict[str, tuple[float, Any]], n_layers: int) -> None:
    """Print both sides, the ratio, and how far the numbers agree."""
    (ours, (mine, my_blocks)), (study, (theirs, their_blocks)) = found["ours"], found["full passes"]
    worst = max(
        np.abs(one - other).max() / max(np.abs(other).max(), 1e-30) for one, other in zip(mine, theirs, strict=True)
    )
    print(
        f"{what}\n  ours {ours:.4g} s, {my_blocks / n_layers:.2f} passes; full passes {study:.4g} s, "
        f"{their_blocks / n_layers:.0f} passes; ratio {study / ours:.1f}; largest difference {worst:.1e} of the "
        "largest effect"
    )


if __name__ == "__main__":
    sys.exit(main())
