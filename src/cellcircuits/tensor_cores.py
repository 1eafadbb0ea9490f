"""What a GPU's tensor cores do to the factors of a product, there and emulated where there are none."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TF32_DROPPED_BITS = 13  # of float32's 23 bits of mantissa


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Round float32 values to tf32's 10 bits of mantissa, ties to even: what a tensor core sees of them."""
    bits = x.view(torch.int32)
    rounded = (bits >> TF32_DROPPED_BITS).bitwise_and_(1).add_((1 << (TF32_DROPPED_BITS - 1)) - 1).add_(bits)
    rounded = rounded.bitwise_right_shift_(TF32_DROPPED_BITS).bitwise_left_shift_(TF32_DROPPED_BITS)
    # a NaN may have all bits set, and would come out as 0: a model that overflows must not go unnoticed
    return rounded.view(torch.float32).masked_fill_(x.isnan(), torch.nan)


@contextmanager
def tf32_products() -> Iterator[None]:
    """Inside the `with`, CUDA's float32 matrix products run on the tensor cores."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def has_tf32(device: torch.device) -> bool:
    """Whether the device multiplies in tf32; elsewhere the factors are rounded and multiplied in float32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
