"""Gated layers remember: a decision holds until something that it read changes, and then the new one counts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from dlkernels import fuse, unfuse
from tests.fusion.fusable import X, gated_runs, made, numbers
from tests.fusion.test_fuse_gated import Gated


class Two(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Halves(Gated):
    def forward(self, x):
        gate, up = self.packed(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class HalvesSwapped(Gated):
    def forward(self, x):
        up, gate = self.packed(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Glu(Gated):
    def forward(self, x):
        return self.down(F.glu(self.packed(x)))


FORMS = pytest.mark.parametrize("cls", [Two, Halves, HalvesSwapped, Glu])


def layers_of(model):
    return (model.gate, model.up) if type(model).__name__ == "Two" else (model.packed,)


def remembered(model, x=X):
    """The number of gated layers that a call runs without deciding."""
    with gated_runs() as ran:
        model(x)
    return sum(key is not None for key in ran)


def fused_twice(cls):
    """A model, fused, that has run, and its stock copy."""
    stock = made(cls)
    model = fuse(copy.deepcopy(stock))
    model(X)
    assert remembered(model) == 1
    return model, stock


def equal(model, stock, x=X):
    torch.testing.assert_close(numbers(model, x), numbers(stock, x), rtol=1e-12, atol=1e-12)


@FORMS
@pytest.mark.parametrize("bias", [True, False])
def test_a_second_call_decides_nothing(cls, bias):
    model, stock = fused_twice(cls)
    if not bias:
        for one in (model, stock):
            for layer in layers_of(one):
                layer.bias = None
        equal(model, stock)  # decided anew
        assert remembered(model) == 1
    for x in (X, X[0], X.expand(2, 3, *X.shape), X[:0]):
        equal(model, stock, x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), stock(x), rtol=1e-12, atol=1e-12)


def hooked(model):
    layers_of(model)[0].register_forward_hook(lambda module, args, y: y * 2)


def another_layer(model):
    torch.manual_seed(9)
    new = nn.Linear(6, 16 if hasattr(model, "packed") and len(layers_of(model)) == 1 else 8).double()
    setattr(model, "packed" if len(layers_of(model)) == 1 else "up", new)


def another_forward(model):
    layer = layers_of(model)[-1]
    layer.forward = lambda x: F.linear(x, layer.weight) * 3


def other_numbers(model):
    with torch.no_grad():
        layers_of(model)[0].weight.mul_(2)


def another_parameter(model):
    layer = layers_of(model)[0]
    layer.weight = nn.Parameter(layer.weight.detach() + 1)


def frozen(model):
    for layer in layers_of(model):
        layer.weight.requires_grad_(False)


def another_activation(model):
    model.act = nn.ReLU()


@FORMS
@pytest.mark.parametrize(
    "change", [hooked, another_layer, another_forward, other_numbers, another_parameter, frozen, another_activation]
)
def test_a_change_counts(cls, change):
    model, stock = fused_twice(cls)
    for one in (model, stock):
        change(one)
    equal(model, stock)
    equal(model, stock)


@FORMS
def test_other_inputs(cls):
    """A wrong size, another dtype, a derivative of a derivative, a transform and autocast are no ordinary calls."""
    model, stock = fused_twice(cls)
    for wrong in (X[:, :5], X.float()):
        for one in (model, stock):
            with pytest.raises(RuntimeError):
                one(wrong)
    assert remembered(model) == 1
    x = X.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(model, (x,))
    tangent = torch.ones_like(X)
    torch.testing.assert_close(torch.func.jvp(model, (X,), (tangent,)), torch.func.jvp(stock, (X,), (tangent,)))
    for one in (model, stock):
        one.float()
    torch.testing.assert_close(model(X.float()), stock(X.float()))
    assert remembered(model, X.float()) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X.float()).dtype == torch.bfloat16
        torch.testing.assert_close(model(X.float()), stock(X.float()), rtol=0.1, atol=0.1)
    assert remembered(model, X.float()) == 1


@FORMS
def test_unfused_and_fused_again(cls):
    model, stock = fused_twice(cls)
    unfuse(model)
    assert remembered(model) == 0
    equal(model, stock)
    fuse(model, exclude=["gate", "up", "packed"])
    model(X)
    assert remembered(model) == 0
    equal(model, stock)


class Approximate(Gated):
    """The activation has a further argument, which may change."""

    approximate = "tanh"

    def forward(self, x):
        return self.down(F.gelu(self.gate(x), approximate=self.approximate) * self.up(x))


class ApproximateHalves(Approximate):
    def forward(self, x):
        up, gate = self.packed(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate, approximate=self.approximate) * up)


@pytest.mark.parametrize("cls", [Approximate, ApproximateHalves])
def test_arguments_of_the_activation(cls):
    model, stock = fused_twice(cls)
    for approximate in ("none", "tanh", "none"):
        model.approximate = stock.approximate = approximate
        equal(model, stock)
        assert remembered(model) == 1


class Leaky(Gated):
    slope = 0.0

    def forward(self, x):
        return self.down(F.leaky_relu(self.gate(x), self.slope) * self.up(x))


def test_arguments_that_change_all_the_time():
    """After a few of them each call decides, and nothing grows."""
    model, stock = fused_twice(Leaky)
    for i in range(20):
        model.slope = stock.slope = i / 20
        equal(model, stock)
    assert remembered(model) == 0
    model.slope = stock.slope = 0.05
    equal(model, stock)
    assert remembered(model) == 1


class Cut(Gated):
    """Where it is cut is no constant."""

    dim = -1

    def forward(self, x):
        gate, up = self.packed(x).chunk(2, dim=self.dim)
        return F.silu(gate) * up


def test_another_dimension():
    model, stock = fused_twice(Cut)
    x = torch.randn(4, 16, 6, dtype=torch.float64)
    for dim in (-1, 2, 1, -1):
        model.dim = stock.dim = dim
        torch.testing.assert_close(model(x), stock(x))


@FORMS
def test_blocks_that_are_compiled_by_themselves_share_their_code(cls):
    """Nothing that Dynamo traces asks for the identity of a layer, which it would guard."""

    def compilations(blocks):
        torch.compiler.reset()
        counter = CompileCounter()
        for block in blocks:
            torch.compile(block, backend=counter)(X)
        return counter.frame_count

    stock = [made(cls) for _ in range(3)]
    assert compilations([fuse(copy.deepcopy(one)) for one in stock]) == compilations(stock)
