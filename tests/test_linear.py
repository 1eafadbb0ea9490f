"""The engine's linear maps are PyTorch's."""

import pytest
import torch
from torch import nn

from cellcircuits import tail
from cellcircuits.geneformer import block_parts
from cellcircuits.linear import joined_linear
from conftest import random_model


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 1, 4), (1, 300)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 0.0)])
def test_joined_maps_are_those_of_their_parts(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    parts = [nn.Linear(24, n_out).to(dtype) for n_out in (24, 96, 1)]
    x = torch.randn(*shape, 24, dtype=dtype)
    with torch.inference_mode():
        joined = joined_linear(*parts)(x)
        expected = torch.cat([part(x) for part in parts], dim=-1)
    torch.testing.assert_close(joined, expected, rtol=0, atol=tolerance or 1e-14)


def test_a_view_of_a_larger_product_is_a_good_input():
    """Attention gives its output transposed; oneDNN must not read it in the wrong order."""
    torch.manual_seed(1)
    part = nn.Linear(24, 10)
    x = torch.randn(2, 24, 9).transpose(1, 2)
    with torch.inference_mode():
        torch.testing.assert_close(joined_linear(part)(x), part(x), rtol=0, atol=2e-6)


def test_a_block_in_pieces_is_the_whole_block(monkeypatch: pytest.MonkeyPatch):
    """On a CPU the feed-forward part runs some positions at a time; positions do not see one another there."""
    parts = block_parts(random_model(3, d_model=24, n_heads=3), 1)
    streams, rows = torch.randn(2, 13, 24), torch.tensor([[1, 4, 4], [0, 2, 12]])
    with torch.inference_mode():
        whole, at_rows = tail._Block(parts)(streams), tail._Block(parts)(streams, rows)
        for n_at_once in (1, 5, 26):
            monkeypatch.setattr(tail, "CPU_PIECE_BYTES", n_at_once * 4 * parts.intermediate.out_features)
            torch.testing.assert_close(tail._Block(parts)(streams), whole, rtol=0, atol=2e-6)
            torch.testing.assert_close(tail._Block(parts)(streams, rows), at_rows, rtol=0, atol=2e-6)
