"""What each precision computes, held against float64."""

import numpy as np
import pytest
import torch
from torch import nn

import reference
from cellcircuits.effects import Bench
from cellcircuits.linear import joined_difference, joined_linear
from cellcircuits.precision import BF16, FP32, MIXED, TF32
from cellcircuits.tail import MeasuredPositions, Tail
from cellcircuits.tensor_cores import rounded_to_tf32
from conftest import random_model, random_sae
from test_engine import random_cells


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

    def test_both_factors_are_rounded(self):
        torch.manual_seed(0)
        part, x = nn.Linear(24, 10), torch.randn(7, 24)
        with torch.inference_mode():
            found = joined_linear(part, precision=TF32)(x)
            weight = rounded_to_tf32(part.weight).double()
            expected = rounded_to_tf32(x).double() @ weight.T + part.bias.double()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", [FP32, TF32, BF16])
def test_a_relu_that_is_part_of_the_product(precision: str):
    torch.manual_seed(1)
    part, x = nn.Linear(24, 10), torch.randn(7, 24)
    with torch.inference_mode():
        plain = joined_linear(part, precision=precision)(x)
        assert torch.equal(joined_linear(part, relu=True, precision=precision)(x), plain.relu())
        assert plain.dtype == torch.float32


class TestDifferences:
    @pytest.mark.parametrize("size", [1.0, 1e-12, 1e6])
    def test_the_error_is_relative_to_the_difference(self, size: float):
        torch.manual_seed(2)
        parts = [nn.Linear(200, 50), nn.Linear(200, 30)]
        e = size * torch.randn(3, 9, 200) * torch.logspace(0, -4, 9)[:, None]  # rows of very different sizes
        with torch.inference_mode():
            found = joined_difference(*parts)(e).double()
            expected = e.double() @ torch.cat([part.weight for part in parts]).double().T
        error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < 2.0**-10

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
    tail = Tail(model, 0, (2, 4), precision)
    measured = MeasuredPositions.of(positions, model.device)
    with torch.inference_mode():
        before = dict(tail.run(streams.repeat(3, 1, 1), measured, clean=streams[0]))
        after = dict(tail.run(edited, measured, clean=streams[0]))
    return {layer: (after[layer] - before[layer]).double().numpy() for layer in (2, 4)}


def test_mixed_keeps_what_low_precision_loses():
    """Rounding of the whole streams hides a small change; rounding of the change itself does not."""
    exact = changes(FP32, torch.float64)
    errors = {
        mode: max(np.abs(changes(mode)[layer] - exact[layer]).max() / np.abs(exact[layer]).max() for layer in exact)
        for mode in (FP32, TF32, BF16, MIXED)
    }
    assert errors[FP32] < 1e-4 and errors[MIXED] < 2e-3
    assert errors[MIXED] < errors[TF32] / 2 < errors[BF16] / 8


@pytest.mark.parametrize("n_heads, source, targets", [(3, 0, (1, 3)), (2, 1, (2,)), (4, 2, (3,))])
def test_mixed_effects_are_the_reference_s(n_heads: int, source: int, targets: tuple[int, ...]):
    """Far from ties of the k selected (all are selected), effects agree with full hooked passes in float64."""
    model = random_model(5, n_layers=4, d_model=24, n_heads=n_heads)
    saes = {layer: random_sae(layer, 24, 12, 12) for layer in (source, *targets)}
    bench = Bench(model, saes, source, precision=MIXED)
    (cell,) = random_cells(6, (20,))
    found = bench.effects(bench.clean(cell), [0, 3, 7])
    exact = {layer: sae.double() for layer, sae in saes.items()}
    for feature, effects in zip([0, 3, 7], found, strict=True):
        slow = reference.cell_effect(model.double(), exact, cell, [(source, feature)], targets)
        for layer in targets:
            np.testing.assert_allclose(effects[bench.columns[layer]], slow[layer], rtol=0, atol=2e-3)
