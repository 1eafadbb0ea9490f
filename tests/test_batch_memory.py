"""How many features run as one batch, and what a batch takes."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cellcircuits import device, effects, tail
from cellcircuits.device import batch_memory, host_memory
from cellcircuits.effects import Bench
from cellcircuits.precision import BF16, FP32, MIXED
from cellcircuits.tail import MeasuredPositions, Tail
from conftest import random_model
from test_engine import SETUPS


class LiveBytes(TorchDispatchMode):
    """Inside the `with`, `peak` follows the most bytes that tensors made there take at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(x) for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.made = [ref for ref in self.made if ref() is not None]
        storages = [x.untyped_storage() for x in (ref() for ref in self.made) if x is not None]
        self.peak = max(self.peak, sum({x.data_ptr(): x.nbytes() for x in storages}.values()))
        return result


@pytest.mark.parametrize("n_batch", [2, 8])
@pytest.mark.parametrize("precision", [FP32, BF16, MIXED])
def test_a_stream_needs_no_more_memory_than_it_is_said_to(
    monkeypatch: pytest.MonkeyPatch, precision: str, n_batch: int
):
    """With all positions at once, as on a GPU, and not much less either."""
    monkeypatch.setattr(tail, "CPU_PIECE_BYTES", 1 << 40)
    model = random_model(7, n_layers=4, d_model=96, n_heads=3, n_positions=128)
    blocks = Tail(model, 0, (1, 3), precision)
    measured = MeasuredPositions.of([np.arange(3, 20)] * n_batch, model.device)
    clean = torch.randn(128, 96)
    with torch.inference_mode():  # weights are packed in the first run
        list(blocks.run(clean[None], MeasuredPositions.of([np.arange(3, 20)], model.device), clean=clean))
    with torch.inference_mode(), LiveBytes() as live:
        streams = clean.repeat(n_batch, 1, 1)
        for _ in blocks.run(streams, measured, clean=clean):
            pass
    assert 0.5 < live.peak / n_batch / blocks.bytes_per_stream(128, 4) < 1


def test_as_many_as_fit(monkeypatch: pytest.MonkeyPatch):
    setup = SETUPS["right_after_and_far"]
    bench = Bench(setup.model(), setup.saes(), setup.source)
    size = bench.tail.bytes_per_stream(20, 4)
    for memory, n_fit in ((3 * size - 1, 2), (3 * size, 3), (size // 2, 1)):
        monkeypatch.setattr(effects, "batch_memory", lambda _device, memory=memory: memory)
        assert bench.batch_size(20) == n_fit
    assert bench.tail.bytes_per_stream(40, 4) == bench.tail.bytes_per_stream(20, 8) == 2 * size


def test_attention_scores_count_on_mps():
    bench_tail = Tail(random_model(), 1, (3,))
    size = bench_tail.bytes_per_stream(20, 4)
    bench_tail._device_type = "mps"
    assert bench_tail.bytes_per_stream(20, 4) == size + 4 * 3 * 20**2


def test_on_a_gpu_what_pytorch_keeps_for_later_counts_as_free(monkeypatch: pytest.MonkeyPatch):
    memory = {"mem_get_info": (1000, 5000), "memory_reserved": 700, "memory_allocated": 300}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    assert batch_memory(torch.device("cuda")) == 700


def test_host_memory_is_the_container_s_where_that_is_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device, "CONTAINER_LIMIT", limit)
    physical = host_memory()
    assert physical > 1 << 28
    for text, expected in (("max\n", physical), ("1000000\n", 1_000_000), (f"{1 << 62}\n", physical)):
        limit.write_text(text)
        assert host_memory() == expected
