"""The engine's linear maps are PyTorch's."""

import pytest
import torch
from torch import nn

from cellcircuits.linear import joined_linear


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
