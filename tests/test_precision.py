"""What each precision computes, held against float64."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

import reference
from cellcircuits import tail
from cellcircuits.effects import Bench
from cellcircuits.geneformer import BlockParts, block_parts
from cellcircuits.linear import joined_difference, joined_linear
from cellcircuits.precision import BF16, FP32, MIXED, PRECISIONS, TF32
from cellcircuits.tail import MeasuredPositions, Tail
from cellcircuits.tensor_cores import has_tf32, rounded_to_tf32, tf32_products
from conftest import random_model, random_sae
from test_engine import random_cells, with_activation


class TestTf32:
    def test_ten_bits_ties_to_even(self):
        unit = 2.0**-10
        rounded = {0.49: 0, 0.5: 0, 0.51: 1, 1.5: 2, 0: 0, 1023.7: 1024}
        given = torch.tensor([1 + units * unit for units in rounded])
        assert rounded_to_tf32(given).tolist() == [1 + units * unit for units in rounded.values()]
        assert rounded_to_tf32(torch.tensor([0.0, -1 - 1.5 * unit])).tolist() == [0.0, -1 - 2 * unit]

    def test_the_nearest_of_all_values(self):
        x = torch.randn(10_000) * 10.0 ** torch.randint(-20, 20, (10_000,))
        rounded = rounded_to_tf32(x)
        assert ((rounded.view(torch.int32) & 0x1FFF) == 0).all()
        assert ((rounded.double() - x.double()).abs() <= 2.0**-11 * x.double().abs()).all()

    def test_what_is_no_number_stays_so(self):
        """CUDA's NaN has all bits of the mantissa set, where adding half a unit runs over."""
        bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, 0x7F800000], dtype=torch.int32)
        rounded = rounded_to_tf32(bits.view(torch.float32))
        assert rounded[:4].isnan().all() and rounded[4] == torch.inf

    def test_the_argument_is_left_alone_and_may_be_a_view(self):
        whole = torch.randn(4, 6, 10)
        before, view = whole.clone(), whole.transpose(0, 2)[::3]
        assert torch.equal(rounded_to_tf32(view), rounded_to_tf32(view.contiguous()))
        assert torch.equal(whole, before)

    def test_only_inside_the_with_are_products_rounded_on_a_gpu(self):
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        with pytest.raises(ArithmeticError), tf32_products():
            assert matmul.fp32_precision == "tf32"
            raise ArithmeticError
        assert matmul.fp32_precision == before != "tf32"

    @pytest.mark.parametrize("generation, has", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
    def test_gpus_have_it_since_ampere(self, monkeypatch: pytest.MonkeyPatch, generation: tuple[int, int], has: bool):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
        assert has_tf32(torch.device("cuda")) == has
        assert not has_tf32(torch.device("mps")) and not has_tf32(torch.device("cpu"))

    def test_both_factors_are_rounded(self):
        torch.manual_seed(0)
        part, x = nn.Linear(24, 10), torch.randn(7, 24)
        with torch.inference_mode():
            found = joined_linear(part, precision=TF32)(x)
            weight = rounded_to_tf32(part.weight).double()
            expected = rounded_to_tf32(x).double() @ weight.T + part.bias.double()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_bfloat16_products_and_float32_offsets():
    torch.manual_seed(1)
    part, x = nn.Linear(24, 10), torch.randn(7, 24)
    part.bias.data += 300.0  # where bfloat16 has steps of 2
    with torch.inference_mode():
        found = joined_linear(part, precision=BF16)(x)
        expected = x.bfloat16().double() @ part.weight.bfloat16().double().T + part.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("precision", [FP32, TF32, BF16])
def test_a_relu_that_is_part_of_the_product(precision: str):
    torch.manual_seed(1)
    part, x = nn.Linear(24, 10), torch.randn(7, 24)
    with torch.inference_mode():
        plain = joined_linear(part, precision=precision)(x)
        assert torch.equal(joined_linear(part, relu=True, precision=precision)(x), plain.relu())
        assert plain.dtype == torch.float32


def slow_block(parts: BlockParts, streams: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """A block in float64, (n_pos, d_model), with the factors of every product but the attention weights rounded."""

    def product(part: nn.Linear, x: Tensor) -> Tensor:
        return rounded(x.float()).double() @ rounded(part.weight).double().T + part.bias.double()

    def norm(part: nn.LayerNorm, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, part.normalized_shape, part.weight.double(), part.bias.double(), part.eps)

    query, key, value = (
        rounded(product(part, streams).float()).double().unflatten(1, (parts.n_heads, -1)).transpose(0, 1)
        for part in (parts.query, parts.key, parts.value)
    )  # each (n_heads, n_pos, d_head)
    weights = torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1)
    attended = (weights @ value).transpose(0, 1).flatten(1)
    streams = norm(parts.attention_norm, streams + product(parts.attention_output, attended))
    expanded = parts.activation(product(parts.intermediate, streams))
    return norm(parts.output_norm, streams + product(parts.output, expanded))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("precision, noise", [(FP32, 1e-6), (TF32, 2e-5)])
def test_every_product_of_a_block_is_in_the_precision_asked_for(precision: str, noise: float, activation: str):
    """The average error is far below the 5e-5 and more of one factor rounded too much or too little."""
    roundings = {FP32: lambda x: x, TF32: rounded_to_tf32}
    model = random_model(6, n_layers=1, d_model=48, n_heads=3)
    parts = replace(block_parts(model, 0), activation=ACT2FN[activation])
    streams = torch.randn(2, 40, 48)
    rows = torch.tensor([[3, 17, 17], [0, 5, 39]])
    with torch.inference_mode():
        block = tail._Block(parts, precision)
        whole, at_rows = block(streams), block(streams, rows)
        for item, chosen in enumerate(rows):
            expected = slow_block(parts, streams[item].double(), roundings[precision])
            assert (whole[item].double() - expected).abs().mean() < noise
            assert (at_rows[item].double() - expected[chosen]).abs().mean() < noise


class TestDifferences:
    @pytest.mark.parametrize("size", [1.0, 1e-12, 1e6])
    def test_the_error_is_relative_to_the_difference(self, size: float):
        torch.manual_seed(2)
        parts = [nn.Linear(200, 50), nn.Linear(200, 30)]
        e = size * torch.randn(3, 9, 200) * torch.logspace(0, -8, 9)[:, None]  # rows of very different sizes
        with torch.inference_mode():
            found = joined_difference(*parts)(e).double()
            expected = e.double() @ torch.cat([part.weight for part in parts]).double().T
        error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < 2.0**-10

    def test_both_factors_are_float16_of_a_row_s_largest_entry(self):
        torch.manual_seed(3)
        part, e = nn.Linear(40, 30), torch.randn(5, 40)
        with torch.inference_mode():
            scale = e.abs().amax(dim=1, keepdim=True)
            expected = (e / scale).half().double() @ part.weight.half().double().T * scale
            torch.testing.assert_close(joined_difference(part)(e).double(), expected, rtol=0, atol=2e-6)

    def test_no_difference_makes_none(self):
        with torch.inference_mode():
            assert not joined_difference(nn.Linear(24, 10))(torch.zeros(2, 5, 24)).any()


def changes(precision: str, dtype: torch.dtype = torch.float32) -> dict[int, np.ndarray]:
    """How an edit moves the stream of a small model's later layers, {layer: (n_rows, d_model)}."""
    model = random_model(3, n_layers=5, d_model=48, n_heads=3).to(dtype)
    torch.manual_seed(4)
    streams = torch.randn(1, 40, 48).to(dtype)
    edited = streams.repeat(3, 1, 1)
    positions = [np.array([4]), np.array([2, 9, 30]), np.array([5, 6])]
    for item, rows in enumerate(positions):
        edited[item, rows] += 0.05 * torch.randn(len(rows), 48).to(dtype)
    blocks = Tail(model, 0, (2, 4), precision)
    measured = MeasuredPositions.of(positions, model.device)
    with torch.inference_mode():
        before = dict(blocks.run(streams.repeat(3, 1, 1), measured, clean=streams[0]))
        after = dict(blocks.run(edited, measured, clean=streams[0]))
    return {layer: (after[layer] - before[layer]).double().numpy() for layer in (2, 4)}


def test_mixed_keeps_what_low_precision_loses():
    """Rounding of the whole streams hides a small change; rounding of the change itself does not."""
    exact = changes(FP32, torch.float64)
    errors = {
        mode: max(np.abs(changes(mode)[layer] - exact[layer]).max() / np.abs(exact[layer]).max() for layer in exact)
        for mode in (FP32, TF32, BF16, MIXED)
    }
    assert errors[FP32] < 1e-4 and 3 * errors[FP32] < errors[MIXED] < 2e-3  # it does round
    assert errors[MIXED] < errors[TF32] / 2 < errors[BF16] / 8


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("n_heads, source, targets", [(3, 0, (1, 3)), (2, 1, (2,)), (4, 2, (3,))])
def test_mixed_effects_are_the_reference_s(n_heads: int, source: int, targets: tuple[int, ...], activation: str):
    """Far from ties of the k selected (all are selected), effects agree with full hooked passes in float64."""
    model = with_activation(random_model(5, n_layers=4, d_model=24, n_heads=n_heads), activation)
    saes = {layer: random_sae(layer, 24, 12, 12) for layer in (source, *targets)}
    bench = Bench(model, saes, source, precision=MIXED)
    (cell,) = random_cells(6, (20,))
    found = bench.effects(bench.clean(cell), [0, 3, 7])
    exact = {layer: sae.double() for layer, sae in saes.items()}
    for feature, effects in zip([0, 3, 7], found, strict=True):
        slow = reference.cell_effect(model.double(), exact, cell, [(source, feature)], targets)
        for layer in targets:
            np.testing.assert_allclose(effects[bench.columns[layer]], slow[layer], rtol=0, atol=2e-3)


def test_a_bench_computes_in_the_precision_asked_for():
    model, saes = random_model(5, n_layers=4), {layer: random_sae(layer, 24, 24, 24) for layer in (0, 1, 3)}
    (cell,) = random_cells(6, (20,))
    found = {}
    for precision in PRECISIONS:
        bench = Bench(model, saes, 0, precision=precision)
        found[precision] = bench.effects(bench.clean(cell), [0, 3, 7])
    errors = {precision: np.abs(effects - found[FP32]).max() for precision, effects in found.items()}
    assert 1e-6 < errors[MIXED] < errors[TF32] < errors[BF16] < np.abs(found[FP32]).max()


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="one of fp32, tf32, bf16, mixed, not 'float16'"):
        Tail(random_model(), 0, (2,), "float16")
