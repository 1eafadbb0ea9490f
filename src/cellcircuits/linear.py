"""The linear maps of the engine: oneDNN's product with a packed weight on a CPU, PyTorch's own elsewhere.

PyTorch multiplies float32 matrices on an x86 CPU with MKL, which reaches less than half of oneDNN's rate on some
processors (two cores of an AMD EPYC: about 190 against 400 GFLOP/s). oneDNN wants the weight in a layout of its own,
made here once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LinearMap = Callable[[Tensor], Tensor]


def joined_linear(*linears: nn.Linear) -> LinearMap:
    """Several linear maps of one input as one product, as fast as the device allows.

    Returns:
        A map (..., n_in) -> (..., sum of n_out); it holds a copy of the weights, so they must not change afterwards.
    """
    weight = torch.cat([linear.weight for linear in linears])  # (n_out, n_in)
    bias = torch.cat([linear.bias for linear in linears])
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x, weight, bias)
    # what torch.compile makes of a linear layer on a CPU; there is no public name for it
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
