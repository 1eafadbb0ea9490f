"""What the benchmarks share: the model, SAEs and cells of both shapes, clocks, memory and a word on the machine.

Needs PyTorch, transformers and NumPy only, so that it works on a bare GPU machine.
"""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM

from cellcircuits.cells import Cell
from cellcircuits.device import describe_device
from cellcircuits.effects import CleanCell
from cellcircuits.geneformer import captured, load_model
from cellcircuits.sae_store import find_sae, open_sae
from sae_model import TopKSAE

ROOT = Path(__file__).resolve().parents[1]
CELLS = ROOT / "benchmarks" / "cells.npz"
N_SPECIAL_TOKENS = 4  # <pad>, <mask>, <cls> and <eos> are tokens 0 to 3 in both vocabularies
PAPER_WIDTHS = {
    "vocab_size": 20_275, "hidden_size": 1152, "num_attention_heads": 18, "intermediate_size": 4608,
    "hidden_act": "relu", "max_position_embeddings": 4096, "pad_token_id": 0,
}  # fmt: skip
PAPER_BLOCKS, PAPER_SAE_FEATURES, PAPER_SAE_K = 18, 4608, 32


@dataclass(frozen=True)
class Study:
    """A model, SAEs by layer, and cells of one length."""

    model: BertForMaskedLM
    saes: dict[int, TopKSAE]
    cells: list[Cell]


def load_study(shape: str, layers: Sequence[int], n_cells: int, device: str = "cpu") -> Study:
    """The trained demo (`demo`), or random weights of Geneformer V2-316M's shape (`paper`), with real cells."""
    cells = stored_cells(shape, n_cells)
    if shape == "demo":
        model = load_model(str(ROOT / "demo" / "model")).model.to(device)
        saes = {layer: open_sae(find_sae(ROOT / "demo", layer)).to(device) for layer in layers}
        return Study(model, saes, cells)
    model = paper_model().to(device)
    saes = {layer: paper_sae().to(device) for layer in layers}
    set_means(model, saes, cells[0])
    return Study(model, saes, cells)


def stored_cells(shape: str, n_cells: int) -> list[Cell]:
    """The first cells of cells.npz at a shape's vocabulary; after the last one they repeat."""
    with np.load(CELLS, allow_pickle=False) as stored:
        rows = stored[shape].astype(np.int64)  # (n_stored, n_pos)
    chosen = [(i, rows[i % len(rows)]) for i in range(n_cells)]
    return [Cell(f"{shape}{i}", i, tokens, np.flatnonzero(tokens >= N_SPECIAL_TOKENS)) for i, tokens in chosen]


def paper_config(n_blocks: int = PAPER_BLOCKS) -> BertConfig:
    """Geneformer V2-316M's shape, or its widths with fewer blocks."""
    return BertConfig(**PAPER_WIDTHS, num_hidden_layers=n_blocks)


def paper_model(n_blocks: int = PAPER_BLOCKS) -> BertForMaskedLM:
    """A random model of that shape."""
    torch.manual_seed(0)
    return BertForMaskedLM(paper_config(n_blocks)).eval().requires_grad_(False)


def paper_sae() -> TopKSAE:
    """A random SAE of the study's size with decoder directions of norm 1."""
    sae = TopKSAE(PAPER_WIDTHS["hidden_size"], PAPER_SAE_FEATURES, PAPER_SAE_K).eval().requires_grad_(False)
    sae.W_dec.weight /= sae.W_dec.weight.norm(dim=0)
    return sae


@torch.inference_mode()
def set_means(model: BertForMaskedLM, saes: dict[int, TopKSAE], cell: Cell) -> None:
    """Centre each SAE on its layer's stream, as training would: else a few features would be active everywhere."""
    with captured(model, list(saes)) as streams:
        model.bert(input_ids=torch.from_numpy(cell.tokens).to(model.device)[None])
    for layer, sae in saes.items():
        sae.input_mean.copy_(streams[layer][0].mean(0))


def typical_features(clean: Sequence[CleanCell], sae: TopKSAE, n_wanted: int) -> list[int]:
    """Features of the source layer active at about as many positions as the average feature, with some spread.

    Of the features that are active in most cells the more typical half is taken at even steps, the most typical first.
    """
    counts = np.stack([np.bincount(c.source.features.ravel(), minlength=sae.n_features) for c in clean])
    often = np.flatnonzero((counts > 0).mean(axis=0) > 0.5)
    distance = np.abs(np.log(counts.mean(axis=0)[often] / counts.mean()))
    nearest = often[np.argsort(distance, kind="stable")][: max(n_wanted, len(often) // 2)]
    steps = np.linspace(0, len(nearest) - 1, min(n_wanted, len(nearest))).round().astype(int)
    return [int(feature) for feature in nearest[steps]]


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that a call takes, its work on the device included, and what it returns."""
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - started, result


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_host_bytes() -> int:
    """The most memory this process ever held on the host."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "device": describe_device(device),
        "processor": processor(),
        "n_threads": torch.get_num_threads(),
        "n_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
