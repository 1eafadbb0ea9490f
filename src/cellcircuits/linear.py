"""The linear maps of the engine: oneDNN's product with a packed weight on a CPU, PyTorch's own elsewhere.

PyTorch multiplies float32 matrices on an x86 CPU with MKL, which reaches less than half of oneDNN's rate on some
processors (two cores of an AMD EPYC: about 190 against 400 GFLOP/s). oneDNN wants the weight in a layout of its own,
made here once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellcircuits.precision import BF16, FP32, TF32
from cellcircuits.tensor_cores import has_tf32, rounded_to_tf32, tf32_products

LinearMap = Callable[[Tensor], Tensor]


def joined_linear(*linears: nn.Linear, relu: bool = False, precision: str = FP32) -> LinearMap:
    """Several linear maps of one input as one product, as fast as the device allows.

    Args:
        linears: maps of the same input width.
        relu: whether a ReLU follows; it costs nothing inside oneDNN's product.
        precision: `fp32`, `tf32` or `bf16`, of the product's factors; sums, inputs and outputs are float32
            (with `bf16` the sums are rounded once more).

    Returns:
        A map (..., n_in) -> (..., sum of n_out); it holds a copy of the weights, so they must not change afterwards.
    """
    weight = torch.cat([linear.weight for linear in linears])  # (n_out, n_in)
    offset = torch.cat([linear.bias for linear in linears])
    return _product(weight, offset, relu, precision)


def joined_difference(*linears: nn.Linear) -> LinearMap:
    """What several linear maps of one input, as one product, make of a difference of inputs: W e, without the biases.

    The factors are float16, which multiplies as fast as bfloat16 on a GPU and is 8 times as exact. Its range is narrow,
    so every row is divided by its largest entry first. Without a GPU the rounded factors are multiplied in float32.

    Returns:
        A map (..., n_in) -> (..., sum of n_out), float32; it holds a copy of the weights.
    """
    weight = torch.cat([linear.weight for linear in linears]).to(torch.float16)  # (n_out, n_in)
    if weight.device.type == "cuda":
        return lambda e: _of_scaled_rows(e, lambda factor: F.linear(factor, weight).to(e.dtype))
    in_float32 = _product(weight.float(), None, relu=False, precision=FP32)
    return lambda e: _of_scaled_rows(e, lambda factor: in_float32(factor.to(e.dtype)))


def _of_scaled_rows(e: Tensor, product: LinearMap) -> Tensor:
    scale = e.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(e.dtype).tiny)
    return product((e / scale).to(torch.float16)).mul_(scale)


def _product(weight: Tensor, offset: Tensor | None, relu: bool, precision: str) -> LinearMap:
    if precision == TF32:
        return _tf32_product(weight, offset, relu)
    if precision == BF16:
        low = weight.to(torch.bfloat16)
        return lambda x: _finished(F.linear(x.to(torch.bfloat16), low).to(x.dtype), offset, relu)
    if onednn_serves(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return lambda x: _linear_pointwise(x, packed, offset, "relu" if relu else "none")
    return lambda x: _finished(F.linear(x, weight, offset), None, relu)


def _tf32_product(weight: Tensor, offset: Tensor | None, relu: bool) -> LinearMap:
    if not has_tf32(weight.device):
        exact = _product(rounded_to_tf32(weight), offset, relu, FP32)
        return lambda x: exact(rounded_to_tf32(x))

    def product(x: Tensor) -> Tensor:
        with tf32_products():
            return _finished(F.linear(x, weight, offset), None, relu)

    return product


def _finished(y: Tensor, offset: Tensor | None, relu: bool) -> Tensor:
    y = y if offset is None else y.add_(offset)
    return y.relu_() if relu else y


def onednn_serves(x: Tensor) -> bool:
    """Whether oneDNN multiplies tensors like `x`."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def packed_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x weight^T by oneDNN: (n_rows, n_in) and (n_out, n_in), both contiguous float32 -> (n_rows, n_out)."""
    return _linear_pointwise(x, weight, None, "none")


def _linear_pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    # what torch.compile makes of a linear layer on a CPU; there is no public name for it
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")
