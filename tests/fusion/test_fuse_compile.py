"""Fused models under torch.compile and torch.export, and the backend that fuses what Dynamo has traced."""

import copy
import re
from importlib import import_module

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from dlkernels import functional, fuse, report
from dlkernels.fusion import backend
from dlkernels.nn import MLP, LinearReLU
from tests.fusion.fusable import fused_places
from tests.fusion.zoo import MODELS
from tests.support.paths import ROOT

OURS = (
    functional.linear_act,
    functional.linear_glu,
    functional.linear_glu_packed,
    torch.ops.dlkernels._linear_act.default,
    torch.ops.dlkernels._linear_glu.default,
    torch.ops.dlkernels._linear_glu_packed.default,
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Count:
    """A backend that runs the graph uncompiled and counts the fused layers in it."""

    def __init__(self):
        self.fused = self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        self.fused += sum(n.target in OURS for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 8), nn.Linear(8, 8), nn.GELU()
        self.chain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))

    def forward(self, x):
        h = self.act(self.a(x))
        z = self.b(h)
        z = torch.tanh(z)
        return self.chain(z)


def results(model, run, *inputs):
    y = run(*inputs)
    y = y if isinstance(y, torch.Tensor) else y[0]
    return y.detach(), torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])


def build(name):
    if name == "net":
        return Net(), torch.randn(5, 6)
    try:
        model, inputs = MODELS[name]()
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    if isinstance(inputs, torch.Tensor):
        return model, inputs
    model.config.use_cache = False  # a dictionary of tensors besides
    return model, inputs["input_ids"]


@pytest.mark.parametrize("name", ["net", "torch:encoder", *(f"transformers:{n}" for n in ("gpt2", "bert", "llama"))])
def test_a_fused_model_compiles_in_one_graph(name):
    model, *inputs = build(name)
    model.eval()
    sites = len(fused_places(report(fuse(model))))  # the compiler takes the layers of a chain one by one
    unused = {id(p) for n, p in model.named_parameters() if n.startswith("pooler") or "wte" in n}
    for p in model.parameters():
        p.requires_grad_(id(p) not in unused)
    eager = results(model, model, *inputs)
    count = Count()
    compiled = results(model, torch.compile(model, fullgraph=True, backend=count), *inputs)
    torch.testing.assert_close(compiled, eager)
    assert (count.graphs, count.fused) == (1, sites)


def test_by_the_default_compiler():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(5, 6)
    stock = results(model, model, x)
    fuse(model)
    torch.testing.assert_close(results(model, torch.compile(model, fullgraph=True), x), stock)


def test_a_replaced_activation_is_compiled_anew():
    model, x = fuse(Net().eval()), torch.randn(5, 6)
    compiled = torch.compile(model, fullgraph=True, backend=Count())
    compiled(x)
    model.act = nn.SiLU()
    torch.testing.assert_close(compiled(x), model(x))
    model.act = nn.Softplus()
    torch.testing.assert_close(compiled(x), model(x))


def test_export():
    model, x = fuse(Net().eval()), torch.randn(5, 6)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


# ---- the backend -----------------------------------------------------------------------------------------------------


def counted(monkeypatch):
    counts = []
    real = backend.fuse_graph
    monkeypatch.setattr(backend, "fuse_graph", lambda graph: counts.append(real(graph)) or counts[-1])
    return counts


@pytest.mark.parametrize("then", ["eager", "aot_eager", "inductor"])
def test_backend_fuses_what_it_is_given(then, monkeypatch):
    counts = counted(monkeypatch)
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(5, 6)
    options = {"then": then} if then != "inductor" else None
    compiled = torch.compile(model, fullgraph=True, backend=backend.dlkernels, options=options)
    torch.testing.assert_close(results(model, compiled, x), results(model, model, x))
    assert counts == [3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16 and counts[-1] == 3
        torch.testing.assert_close(y, model(x), atol=0.02, rtol=0.02)


def test_backend_reaches_what_no_source_shows(monkeypatch):
    """Layers are looked up by name at run time, in a function outside any module."""
    counts = counted(monkeypatch)
    layers = {"first": nn.Linear(6, 8), "second": nn.Linear(8, 8)}

    def forward(x):
        for name in ("first", "second"):
            z = F.linear(x, layers[name].weight, bias=layers[name].bias)
            x = z.relu()
        return x

    x = torch.randn(5, 6)
    compiled = torch.compile(forward, fullgraph=True, backend=backend.dlkernels, options={"then": "eager"})
    torch.testing.assert_close(compiled(x), forward(x))
    assert counts == [2]


def used_twice(a, x):
    z = a(x)
    return F.relu(z) + z


def gradients_off_in_between(a, x):
    z = a(x)
    with torch.no_grad():
        y = F.relu(z)
    return y + x.sum()


def another_activation(a, x):
    return F.mish(a(x))


def slope_of_a_tensor(a, x):
    return torch.prelu(a(x), x.sum().reshape(1))


@pytest.mark.parametrize("f", [used_twice, gradients_off_in_between, another_activation, slope_of_a_tensor])
def test_backend_leaves_what_would_change(f, monkeypatch):
    counts = counted(monkeypatch)
    a, x = nn.Linear(6, 6), torch.randn(5, 6, requires_grad=True)
    compiled = torch.compile(f, backend=backend.dlkernels, options={"then": "eager"})
    y, expected = compiled(a, x), f(a, x)
    assert torch.equal(y, expected) and not any(counts)
    grads = [torch.autograd.grad(t.sum(), x)[0] for t in (y, expected)]
    assert torch.equal(*grads)


def test_backend_and_a_change_in_place_in_between(monkeypatch):
    """The product is computed at the place of the linear call, not of the activation."""
    counts = counted(monkeypatch)
    a = nn.Linear(6, 6)

    def f(x):
        x = x * 1
        z = a(x)
        changed = x.add_(1)
        return F.relu(z) * changed.sum()

    x = torch.randn(5, 6)
    compiled = torch.compile(f, backend=backend.dlkernels, options={"then": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), f(x))
    assert counts == [1]


# ---- chains in the backend -------------------------------------------------------------------------------------------


def graphs(monkeypatch):
    """The calls of ours in each graph after it was fused, with the number of layers of each chain."""
    found = []
    real = backend.fuse_graph

    def fuse_graph(graph):
        count = real(graph)
        nodes = [n for n in graph.graph.nodes if n.target in (*OURS, functional.mlp) or n.target in backend._LINEAR]
        found.append([len(n.args[1]) if n.target is functional.mlp else n.target.__name__ for n in nodes])
        return count

    monkeypatch.setattr(backend, "fuse_graph", fuse_graph)
    return found


@pytest.mark.parametrize("then", ["eager", "aot_eager", "inductor"])
def test_backend_makes_chains(then, monkeypatch):
    """Through a dropout that is not active; an active one ends a chain."""
    found = graphs(monkeypatch)
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(5, 6, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend=backend.dlkernels, options={"then": then})
    torch.testing.assert_close(results(model, compiled, x), results(model, model, x))
    assert found == [[4]]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    model.train()
    torch.manual_seed(1)
    compiled(x)
    assert found[-1] == [3, "linear"]


def test_a_chain_of_the_backend_is_one_op_for_aot():
    ops = []

    def note(graph, inputs):
        ops.append([n.target.name() for n in graph.graph.nodes if "dlkernels" in str(n.target)])
        return make_boxed_func(graph.forward)

    model, x = Net().eval(), torch.randn(5, 6)
    torch._dynamo.backends.registry.register_backend(aot_autograd(fw_compiler=note, bw_compiler=note), "noted")
    compiled = torch.compile(model, backend=backend.dlkernels, options={"then": "noted"})
    torch.testing.assert_close(results(model, compiled, x), results(model, model, x))
    assert ops == [["dlkernels::_mlp_forward"], ["dlkernels::_mlp_backward"]]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("make", ["fused", "of ours"])
def test_backend_makes_chains_of_layers_that_are_fused_already(make, grad, monkeypatch):
    found = graphs(monkeypatch)
    if make == "fused":
        model = fuse(Net().eval())
    else:
        model = nn.Sequential(LinearReLU(6, 8), nn.Dropout(0.5), MLP([8, 8, 7], "gelu"), nn.Flatten(0)).eval()
    x = torch.randn(5, 6, requires_grad=grad)
    compiled = torch.compile(model, fullgraph=True, backend=backend.dlkernels, options={"then": "aot_eager"})
    with torch.set_grad_enabled(grad):
        y, expected = compiled(x), model(x)
    assert found == [[4 if make == "fused" else 3]]
    torch.testing.assert_close(y, expected)
    if grad:
        torch.testing.assert_close(results(model, compiled, x), results(model, model, x))


class Broken(nn.Module):
    """Layers that would be a chain, but for ``how``."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b, self.c = how, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("scale", torch.ones(6, 6))

    def forward(self, x):
        h = F.relu(self.a(x))
        if self.how == "second use":
            return self.b(h) + h
        if self.how == "change in between":
            self.scale.mul_(2)
            return F.linear(h, self.scale)
        if self.how == "gradients off in between":
            with torch.no_grad():
                return F.relu(self.b(h)) + x
        if self.how == "computed weight":
            return F.linear(h, self.b.weight + self.c.weight)
        if self.how == "weight of the value":
            return F.linear(h, h[:, :6])
        h = F.leaky_relu(self.b(h), 0.1)
        return F.leaky_relu(self.c(h), 0.2)  # another slope


BROKEN = {
    "second use": ["linear_act", "linear"],
    "change in between": ["linear_act", "linear"],
    "gradients off in between": ["linear_act", "linear_act"],
    "computed weight": ["linear_act", "linear"],
    "weight of the value": ["linear_act", "linear"],
    "another slope": [2, "linear_act"],
}


@pytest.mark.parametrize("how", BROKEN)
def test_backend_ends_a_chain(how, monkeypatch):
    found = graphs(monkeypatch)
    model, x = Broken(how), torch.randn(6, 6)
    again = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend.dlkernels, options={"then": "eager"})
    for _ in range(2):
        y, expected = compiled(x), again(x)
        torch.testing.assert_close(y, expected)
    assert found == [BROKEN[how]]


def test_backend_makes_chains_under_autocast(monkeypatch):
    found = graphs(monkeypatch)
    model, x = Net().eval(), torch.randn(5, 6)
    compiled = torch.compile(model, backend=backend.dlkernels, options={"then": "aot_eager"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = compiled(x), model(x)
    assert found == [[4]] and y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, atol=0.02, rtol=0.02)


def test_backend_options():
    compiled = torch.compile(lambda x: x + 1, backend=backend.dlkernels, options={"mode": 1})
    with pytest.raises(Exception, match="expected the option 'then' only; got 'mode'"):
        compiled(torch.ones(1))


def test_backend_is_registered_by_its_name():
    """torch finds backends of other packages by this group of entry points."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    entry = re.search(r'\[project.entry-points.torch_dynamo_backends\]\ndlkernels = "([\w.]+):(\w+)"', pyproject)
    module, name = entry.groups()
    assert getattr(import_module(module), name) is backend.dlkernels
    if "dlkernels" not in torch._dynamo.list_backends(()):
        pytest.skip("the installed dlkernels is older than its entry point: install it again")
    model, x = Net().eval(), torch.randn(5, 6)
    compiled = torch.compile(model, backend="dlkernels", options={"then": "eager"})
    torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("shape", [(), (1,), (1, 6), (5, 6)], ids=str)
def test_backend_leaves_a_bias_that_stock_broadcasts(shape, monkeypatch):
    counts = counted(monkeypatch)
    x, weight, bias = torch.randn(5, 6), torch.randn(6, 6), torch.randn(shape)
    compiled = torch.compile(lambda: F.relu(F.linear(x, weight, bias)), backend=backend.dlkernels)
    torch.testing.assert_close(compiled(), F.relu(F.linear(x, weight, bias)))
    assert not any(counts)
