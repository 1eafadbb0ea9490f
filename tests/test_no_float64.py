"""Tracing keeps float64 off the accelerator: Apple's MPS has none."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cellcircuits.effects import ablation_effect
from cellcircuits.geneformer import edited
from test_engine import SETUPS, trace


class NoFloat64(TorchDispatchMode):
    """Stand-in for an accelerator without float64: any operation that takes or makes such a tensor is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, output)):
            if isinstance(value, torch.Tensor) and value.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func} touches a {value.dtype} tensor")
        return output


class TestNoFloat64OnTheAccelerator:
    def test_tracing_has_none(self) -> None:
        setup = SETUPS["right_after_and_far"]
        model, saes, cells = setup.model(), setup.saes(), setup.cells()[:3]
        with NoFloat64():
            traced = trace(model, saes, setup.source, cells, range(6))
            ablation_effect(traced.bench, cells[0], int(traced.bench.clean(cells[0]).source.features[0, 0]))
        assert traced.block.effects.any()

    def test_a_planted_one_is_caught(self) -> None:
        setup = SETUPS["right_after_and_far"]
        model, saes, cells = setup.model(), setup.saes(), setup.cells()[:1]

        def widen(residual: torch.Tensor) -> torch.Tensor:
            return residual.double().float()

        with NoFloat64(), pytest.raises(TypeError, match="float64"), edited(model, {setup.source: widen}):
            trace(model, saes, setup.source, cells, range(6))
        with NoFloat64(), pytest.raises(TypeError, match="float64"):
            torch.from_numpy(np.ones(3)) + 1
