"""Time one triplet and one steered feature in one cell: the tree and the shared clean pass against full passes.

    python benchmarks/joint_and_steering.py                  # the demo's model, SAEs and a cell: seconds
    python benchmarks/joint_and_steering.py --shape paper    # Geneformer V2-316M's shape, random weights: minutes

Both sides run in one go on the same features and cell, and must give the same numbers. The full passes are the
study's way: the whole model with its language-model head for every condition and every alpha, dense encodes and
decodes of all gene positions. Prints seconds, passes (encoder blocks run / blocks of the model) and ratios.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import BertConfig, BertForMaskedLM  # noqa: E402

from cellcircuits.cells import Cell  # noqa: E402
from cellcircuits.combination_stats import conditions  # noqa: E402
from cellcircuits.geneformer import captured, edited, masked_logits  # noqa: E402
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
    model, saes, cell = demo_inputs() if args.shape == "demo" else paper_inputs()
    model.set_attn_implementation(args.attention)
    model.to(args.device)
    saes = {layer: sae.to(args.device) for layer, sae in saes.items()}
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
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")
    return 0


def demo_inputs() -> tuple[BertForMaskedLM, dict[int, TopKSAE], Cell]:
    """The demo's model and SAEs and its first held-out cell."""
    from cellcircuits.cells import CellSelection, load_cells
    from cellcircuits.geneformer import load_model, n_positions
    from cellcircuits.sae_store import find_sae, open_sae
    from cellcircuits.vocabulary import load_vocabulary

    demo = ROOT / "demo"
    model = load_model(str(demo / "model")).model
    vocabulary = load_vocabulary([demo / "model"], model.config.vocab_size)
    selection = CellSelection(cells="all", obs_filters=(("split", "held_out"),), n_cells=1)
    cell = load_cells(demo / "cells.h5ad", vocabulary, selection, n_positions(model)).cells[0]
    return model, {layer: open_sae(find_sae(demo, layer)) for layer in (*LAYERS, TARGET)}, cell


def paper_inputs() -> tuple[BertForMaskedLM, dict[int, TopKSAE], Cell]:
    """Random weights of Geneformer V2-316M's shape, random SAEs of the study's, a random cell of 2,048 tokens."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20_275, hidden_size=1152, num_hidden_layers=18, num_attention_heads=18, intermediate_size=4608,
        hidden_act="relu", max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval().requires_grad_(False)
    saes = {}
    for layer in (*LAYERS, TARGET):
        sae = TopKSAE(1152, 4608, 32).eval().requires_grad_(False)
        sae.W_dec.weight /= sae.W_dec.weight.norm(dim=0)
        saes[layer] = sae
    genes = np.random.default_rng(0).choice(np.arange(4, 20_275), 2046, replace=False)
    return model, saes, Cell("random", 0, np.concatenate([[2], genes, [3]]), np.arange(1, 2047))


def typical_feature(active: np.ndarray) -> int:
    """The feature whose number of active positions, counted from (n_gene, k) indices, is nearest the usual one."""
    features, counts = np.unique(active, return_counts=True)
    return int(features[np.argmin(np.abs(counts - N_ACTIVE))])


def timed(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, Any]]:
    """Best seconds and result of each side, run in alternation."""
    found: dict[str, tuple[float, Any]] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            result = side()
            seconds = time.perf_counter() - started
            found[name] = (min(seconds, found.get(name, (seconds,))[0]), result)
    return found


def dense_removal(sae: TopKSAE, positions: torch.Tensor, features: list[int], coefficient: float) -> Callable:
    """The study's edit: encode all gene positions, two dense decodes."""

    def edit(stream: torch.Tensor) -> torch.Tensor:
        latents = sae.encode(stream[:, positions])
        changed = latents.clone()
        changed[..., features] *= coefficient
        edited_stream = stream.clone()
        edited_stream[:, positions] += sae.decode(changed) - sae.decode(latents)
        return edited_stream

    return edit


def full_pass(model: BertForMaskedLM, tokens: torch.Tensor, edits: dict, layers: tuple[int, ...]) -> tuple[dict, Any]:
    """Streams of `layers` and complete logits of one full pass with edits."""
    with edited(model, edits), captured(model, layers) as streams:
        logits = masked_logits(model, tokens)
    return streams, logits


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
                features[i][0]: dense_removal(saes[features[i][0]], positions, [features[i][1]], 0.0) for i in members
            }
            streams, _ = full_pass(model, tokens, edits, (TARGET,))
            rows = torch.stack([active[i] for i in members]).any(0)
            change = (saes[TARGET].encode(streams[TARGET][0, positions]) - before)[rows]
            effects.append(change.cpu().numpy().mean(axis=0, dtype=np.float64))
        return np.stack(effects), (len(effects) + 1) * model.config.num_hidden_layers

    found = timed({"ours": ours, "full passes": study}, repeats)
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
            edits = {layer: dense_removal(saes[layer], positions, [feature], alpha)}
            _, after = full_pass(model, tokens, edits, ())
            changes.append((after - before)[0, positions].cpu().numpy().mean(axis=0, dtype=np.float64))
        return np.stack(changes), (len(ALPHAS) + 1) * model.config.num_hidden_layers

    found = timed({"ours": ours, "full passes": study}, repeats)
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
