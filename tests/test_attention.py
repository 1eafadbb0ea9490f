"""The engine's attention is softmax(q k^T / sqrt(d_head)) v, whichever way it takes."""

import pytest
import torch
from torch import Tensor

from cellcircuits import attention
from cellcircuits.attention import attend
from cellcircuits.precision import BF16, FP32, TF32


def slow_attention(query: Tensor, key: Tensor, value: Tensor, n_heads: int) -> Tensor:
    """Query by query and head by head, in float64."""
    attended = torch.empty(query.shape, dtype=torch.float64)
    width = query.shape[-1] // n_heads
    for item in range(len(query)):
        for head in range(n_heads):
            of_head = slice(head * width, (head + 1) * width)
            for row in range(query.shape[1]):
                scores = key[item, :, of_head].double() @ query[item, row, of_head].double() / width**0.5
                weights = torch.exp(scores - scores.max())
                attended[item, row, of_head] = weights / weights.sum() @ value[item, :, of_head].double()
    return attended


@pytest.mark.parametrize(
    "n_batch, n_rows, n_pos, d_model, n_heads",
    [(1, 5, 9, 24, 3), (2, 600, 600, 64, 2), (1, 512, 513, 32, 1), (1, 3, 700, 96, 3), (2, 530, 520, 64, 8)],
)
def test_it_is_the_formula(n_batch: int, n_rows: int, n_pos: int, d_model: int, n_heads: int):
    torch.manual_seed(n_rows)
    joined = torch.randn(n_batch, n_pos, 3 * d_model)  # parts of one product, as in the engine
    key, value = joined[..., d_model : 2 * d_model], joined[..., 2 * d_model :]
    query = 3 * torch.randn(n_batch, n_rows, d_model)
    with torch.inference_mode():
        found = attend(query, key, value, n_heads)
    torch.testing.assert_close(found.double(), slow_attention(query, key, value, n_heads), rtol=0, atol=5e-6)


def test_both_ways_are_taken(monkeypatch: pytest.MonkeyPatch):
    """Long cells with wide heads go through oneDNN where it serves, all others through PyTorch's kernel."""
    taken = []
    plain = attention._in_packed_products
    monkeypatch.setattr(attention, "_in_packed_products", lambda *x: taken.append(len(x[0])) or plain(*x))
    for n_pos, d_model, dtype in ((512, 32, torch.float32), (511, 32, torch.float32), (512, 31, torch.float32)):
        attend(*torch.zeros(3, 1, n_pos, d_model, dtype=dtype), n_heads=1)
    attend(*torch.zeros(3, 1, 512, 32, dtype=torch.float64), n_heads=1)
    few, many = torch.zeros(1, 511, 32), torch.zeros(1, 512, 32)
    attend(few, many, many, n_heads=1)
    assert taken == ([1] if torch.backends.mkldnn.is_available() else [])


@pytest.mark.parametrize("large", [80.0, 3e4])
def test_large_scores_do_not_overflow(large: float):
    torch.manual_seed(0)
    query, key, value = large * torch.randn(1, 520, 32), torch.randn(1, 520, 32), torch.randn(1, 520, 32)
    found = attend(query, key, value, 1)
    torch.testing.assert_close(found.double(), slow_attention(query, key, value, 1), rtol=0, atol=5e-2)


@pytest.mark.parametrize("precision, tolerance", [(FP32, 2e-6), (TF32, 2e-3), (BF16, 2e-2)])
def test_lower_precision_is_near_and_comes_back_as_float32(precision: str, tolerance: float):
    torch.manual_seed(2)
    query, key, value = torch.randn(3, 1, 40, 32)
    found = attend(query, key, value, 2, precision)
    assert found.dtype == torch.float32
    error = (found.double() - slow_attention(query, key, value, 2)).abs().max()
    assert error < tolerance and (precision == FP32 or error > 1e-5)
