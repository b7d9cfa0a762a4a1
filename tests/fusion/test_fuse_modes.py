"""Modes of torch, replaced functions, and layers and tensors that are not plain: a fused model does as stock."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dlkernels import fuse, report
from tests.fusion.fusable import THREE, X, made, numbers, runs_fused


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {})) * (2 if function is F.linear else 1)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@THREE
def test_modes_see_what_they_would_see(cls):
    model = made(cls)
    with Doubling():
        expected = model(X)
    fuse(model)
    with Doubling():
        assert torch.equal(model(X), expected)
    with Counting() as mode:
        model(X)
    assert "aten.addmm.default" in mode.names and not any("dlkernels" in name for name in mode.names)
    with FlopCounterMode(display=False) as flops:
        model(X)
    assert flops.get_total_flops() == 2 * 5 * 6 * 8
    assert runs_fused(model)
    with torch.device("cpu"):
        assert runs_fused(model), "a default device changes no layer"


@THREE
def test_a_function_in_the_place_of_linear(cls, monkeypatch):
    model, real = fuse(made(cls)), F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: real(x, w, b) * 2)
    assert torch.equal(model(X), F.relu(F.linear(X, model.fc.weight, model.fc.bias)))


@THREE
@pytest.mark.parametrize("shape", [(), (1,), (1, 8), (5, 8), (5, 1)], ids=str)
def test_a_bias_that_stock_broadcasts(cls, shape):
    model = made(cls)
    model.fc.bias = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    expected = numbers(model, X)
    fuse(model)
    assert "its bias has the shape" in str(report(model))
    torch.testing.assert_close(numbers(model, X), expected)
    later = fuse(made(cls))
    later.fc.bias = model.fc.bias
    torch.testing.assert_close(later(X), F.relu(F.linear(X, later.fc.weight, later.fc.bias)))


@THREE
def test_a_weight_that_is_a_vector(cls):
    model = fuse(made(cls))
    model.fc.weight, model.fc.bias = nn.Parameter(torch.ones(6, dtype=torch.float64)), None
    assert torch.equal(model(X), F.relu(X.sum(-1))) or torch.allclose(model(X), F.relu(X.sum(-1)))


class Scaled(nn.Linear):
    """A class that inherits forward and has its own weight."""

    @property
    def weight(self):
        return self._parameters["weight"] * 2


class Intercepted(nn.Linear):
    def _call_impl(self, *args, **kwargs):
        return super()._call_impl(*args, **kwargs) + 1


@THREE
@pytest.mark.parametrize("layer", [Scaled, Intercepted])
def test_subclasses_of_linear_that_compute_something_else(cls, layer):
    model = made(cls)
    model.fc.__class__ = layer
    expected = model(X)
    assert torch.equal(fuse(model)(X), expected) and not report(model).fused


@THREE
@pytest.mark.parametrize("which", ["fc", "act"])
def test_a_module_that_was_compiled_by_itself(cls, which):
    model = fuse(made(cls))
    assert runs_fused(model)
    getattr(model, which).compile(backend="eager")
    assert not runs_fused(model)
    torch._dynamo.reset()
