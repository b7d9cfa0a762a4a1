"""Twists of containers in containers: see module ``twists``."""

import copy

import pytest
import torch
from torch import nn

from dlkernels import fuse, report, unfuse
from tests.fusion.fusable import X, fused_places, made, numbers, runs_fused
from tests.fusion.test_fuse_places import GELU


class Stack(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(6, 8),
            nn.Identity(),
            nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(8, 8))),
            nn.Sequential(nn.Identity(), nn.Tanh(), nn.Linear(8, 3)),
        )


class Half(nn.Sequential):
    def forward(self, x):
        return super().forward(x) / 2


class Shift(nn.Identity):
    def forward(self, x):
        return x + 1


class Nosy(nn.Module):
    """It changes the model that it is part of."""

    def __init__(self, model):
        super().__init__()
        self.model = [model]

    def forward(self, x):
        self.model[0][2][0] = nn.SiLU()
        return x


class Hooking(nn.Module):
    """It puts a hook on a module that the loop has not reached."""

    def __init__(self, module, change):
        super().__init__()
        self.module, self.change = [module], change

    def forward(self, x):
        if not self.module[0]._forward_hooks:
            self.module[0].register_forward_hook(lambda m, i, o: o * self.change)
        return x


CHANGES = {
    "hook on the Identity": (lambda m: m[1].register_forward_hook(lambda *a: a[2] * 2), 1),
    "hook on the inner container": (lambda m: m[2].register_forward_hook(lambda *a: a[2] * 2), 0),
    "hook before the inner container": (lambda m: m[3].register_forward_pre_hook(lambda m, i: i[0] * 2), 1),
    "hook on the innermost": (lambda m: m[2][1].register_forward_hook(lambda *a: a[2] * 2), 1),
    "another activation": (lambda m: m[2].__setitem__(0, nn.Sigmoid()), 2),
    "no activation": (lambda m: m[2].__setitem__(0, nn.Softplus()), 1),
    "a dropout between": (lambda m: m.__setitem__(1, nn.Dropout(0.5)), 1),
    "a subclass of Identity": (lambda m: m.__setitem__(1, Shift()), 1),
    "a subclass of Sequential": (lambda m: m.__setitem__(2, Half(*m[2])), 0),
    "a module that changes the model": (lambda m: m.__setitem__(1, Nosy(m)), 1),
    "one module more": (lambda m: m[2].insert(0, nn.Softplus()), 1),
    "a module that hooks the next": (lambda m: m.insert(0, Hooking(m[1], 2)), 1),
    "a module that hooks the inner container": (lambda m: m.insert(0, Hooking(m[2], 2)), 0),
    "an empty container": (lambda m: m[2].insert(0, nn.Sequential()), 2),
    "a container of one's own activation": (lambda m: m[2].__setitem__(0, nn.Sequential(GELU())), 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_containers_that_change(name):
    change, count = CHANGES[name]
    stock, fused = made(Stack), fuse(made(Stack))
    assert [path for path, _ in fused_places(report(fused))] == ["0", "2.1.0"]
    for model in (stock, fused):
        change(model)
        model.double()
    for _ in range(2):
        torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    assert runs_fused(fused) is (count > 0)
    unfuse(fused)
    assert torch.equal(numbers(fused, X)[0], numbers(stock, X)[0])


def test_layers_of_inner_containers_that_were_not_selected():
    for exclude, fused in (("0", ["2.1.0"]), ("2.1.0", ["0"]), (["0", "2.*"], [])):
        model = made(Stack)
        expected = numbers(model, X)
        assert [path for path, _ in fused_places(report(fuse(model, exclude=exclude)))] == fused
        assert runs_fused(model) is bool(fused)
        torch.testing.assert_close(numbers(model, X), expected, rtol=1e-12, atol=1e-12)


def test_a_global_hook_sees_the_inner_containers():
    model, seen = fuse(made(Stack)), []
    hook = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    model(X)
    hook.remove()
    assert model[1] in seen and model[2] in seen and model[2][1] in seen and runs_fused(model)


def test_inner_containers_under_tracing_and_the_compiler():
    model = fuse(made(Stack))
    expected = model(X)
    assert torch.equal(torch.fx.symbolic_trace(model)(X), unfuse(copy.deepcopy(model))(X))
    assert "dlkernels" not in str(torch.jit.trace(model, X).inlined_graph)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(X), expected)
