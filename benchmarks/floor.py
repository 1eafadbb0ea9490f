"""The least work that the ablated passes need, and how fast the engine's matrix products can be on this machine."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import synchronize
from torch import Tensor
from transformers import BertForMaskedLM, PretrainedConfig

from cellcircuits.flops import ModelShape, tail_flops
from cellcircuits.geneformer import block_parts
from cellcircuits.linear import joined_linear
from cellcircuits.precision import BF16, MIXED

MIN_SECONDS = 0.02  # of one timed stretch: a shorter one would measure the clock
MIN_SECONDS_BETWEEN = 2.0  # two measurements: short rounds would spend most of their time on them


def floor_flops(config: PretrainedConfig, blocks: range, n_pos: int, n_active: float) -> float:
    """Operations that one (feature, cell) needs, a multiplication and an addition counted as two.

    All blocks but the last at every position, the last one at the active positions, but for its keys and values;
    linear maps and the two products of attention, nothing else.

    Args:
        config: the model's.
        blocks: those after the source layer, the last target being the last.
        n_pos: tokens of the cell.
        n_active: positions where the feature is active.
    """
    shape = ModelShape(config.hidden_size, config.intermediate_size, n_vocab=0)  # the head takes no part
    return tail_flops(shape, len(blocks), n_pos, n_active)


class GemmClock:
    """The fastest times of the engine's own matrix products at the model's four shapes."""

    def __init__(self, model: BertForMaskedLM, n_rows: int, precision: str) -> None:
        """Make one product per shape, from `n_rows` = positions x batch rows, in a mode of the engine."""
        parts = block_parts(model, 0)
        groups = {
            "query, key and value": (parts.query, parts.key, parts.value),
            "attention output": (parts.attention_output,),
            "intermediate": (parts.intermediate,),
            "output": (parts.output,),
        }
        self.device, self.n_rows = model.device, n_rows
        self._measured = float("-inf")
        self.flops, self.fastest, self._calls = {}, {}, {}
        for name, linears in groups.items():
            n_in, n_out = linears[0].in_features, sum(linear.out_features for linear in linears)
            self.flops[name] = 2 * n_rows * n_in * n_out
            self._calls[name] = product(linears, torch.randn(n_rows, n_in, device=model.device), precision)

    @torch.inference_mode()
    def measure(self) -> None:
        """Time every shape once more and keep the fastest; nothing where that was done a moment ago."""
        if time.monotonic() - self._measured < MIN_SECONDS_BETWEEN:
            return
        for name, call in self._calls.items():
            self.fastest[name] = min(best_seconds(call, self.device), self.fastest.get(name, float("inf")))
        self._measured = time.monotonic()

    def rate(self) -> float:
        """FLOP/s of all four shapes together, each at its fastest."""
        return sum(self.flops.values()) / sum(self.fastest.values())

    def rates(self) -> dict[str, float]:
        """FLOP/s of each shape at its fastest."""
        return {name: self.flops[name] / seconds for name, seconds in self.fastest.items()}


def product(linears: tuple[torch.nn.Linear, ...], x: Tensor, precision: str) -> Callable[[], Tensor]:
    """One matrix product as the engine makes it; the modes with bfloat16 parts are held to bfloat16's rate."""
    if precision not in (BF16, MIXED):
        linear_map = joined_linear(*linears, precision=precision)
        return lambda: linear_map(x)
    weight = torch.cat([linear.weight for linear in linears]).bfloat16()
    bias, x = torch.cat([linear.bias for linear in linears]).bfloat16(), x.bfloat16()
    return lambda: F.linear(x, weight, bias)


def best_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds per call, the better of two stretches of calls that keep the device busy."""
    n_calls, best = 1, float("inf")
    for _ in range(2):
        while True:
            synchronize(device)
            started = time.perf_counter()
            for _ in range(n_calls):
                call()
            synchronize(device)
            seconds = time.perf_counter() - started
            if seconds >= MIN_SECONDS:
                break
            n_calls *= 4
        best = min(best, seconds / n_calls)
    return best
