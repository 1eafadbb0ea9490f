"""Softmax attention without the whole n_pos x n_pos matrix, as fast as the device allows.

PyTorch's fused attention is the way everywhere but for long float32 cells on a CPU: there its products run on MKL,
which reaches less than half of oneDNN's rate on some processors. The same three steps (scores, softmax, weighted sum)
made of oneDNN's products, some hundred queries at a time so that the scores stay in the cache, take two
thirds of the time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cellcircuits.linear import onednn_serves, packed_product
from cellcircuits.precision import BF16, FP32, TF32
from cellcircuits.tensor_cores import has_tf32, rounded_to_tf32

QUERIES_AT_ONCE = 512
# below these the many small products cost more than they save
MIN_POSITIONS, MIN_HEAD_WIDTH = 512, 32


def attend(query: Tensor, key: Tensor, value: Tensor, n_heads: int, precision: str = FP32) -> Tensor:
    """Scaled dot-product attention of every head, unmasked.

    Args:
        query: (batch, n_rows, d_model), heads side by side.
        key: (batch, n_pos, d_model).
        value: (batch, n_pos, d_model).
        n_heads: heads; d_model is a multiple of it.
        precision: `fp32`, `tf32` or `bf16`, of queries, keys and values. Where tf32 is the device's own, `tf32` is
            `fp32` here: the fused kernels have one way with float32 inputs.

    Returns:
        (batch, n_rows, d_model), in the precision of `query`.

    Source: Vaswani et al. (2017), "Attention is all you need", section 3.2.
    """
    d_head = query.shape[-1] // n_heads
    small = min(query.shape[1], key.shape[1]) < MIN_POSITIONS or d_head < MIN_HEAD_WIDTH
    dtype = query.dtype
    heads = (x.unflatten(-1, (n_heads, d_head)).transpose(1, 2) for x in (query, key, value))
    query, key, value = (_factor(x, precision) for x in heads)
    if small or not onednn_serves(query):
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).to(dtype)
    return _in_packed_products(query * d_head**-0.5, key, value)


def _factor(x: Tensor, precision: str) -> Tensor:
    if precision == TF32 and not has_tf32(x.device):
        return rounded_to_tf32(x)
    return x.to(torch.bfloat16) if precision == BF16 else x


def _in_packed_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(batch, n_heads, n_rows or n_pos, d_head), the queries scaled -> (batch, n_rows, d_model)."""
    query, key = query.contiguous(), key.contiguous()  # oneDNN is hundreds of times as slow on strided factors
    value = value.transpose(2, 3).contiguous()  # (batch, n_heads, d_head, n_pos)
    n_batch, n_heads, n_rows, d_head = query.shape
    attended = query.new_empty(n_batch, n_rows, n_heads, d_head)
    for item in range(n_batch):
        for head in range(n_heads):
            for start in range(0, n_rows, QUERIES_AT_ONCE):
                rows = slice(start, start + QUERIES_AT_ONCE)
                weights = packed_product(query[item, head, rows], key[item, head])  # (n_queries, n_pos)
                torch.softmax(weights, dim=-1, out=weights)
                attended[item, rows, head] = packed_product(weights, value[item, head])
    return attended.flatten(2)
