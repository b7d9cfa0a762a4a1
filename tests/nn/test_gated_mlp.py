"""GatedMLP compared with the block of stock modules that it replaces."""

import copy
import io

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations

from dlkernels import _C, functional
from dlkernels.nn import GatedMLP
from dlkernels.stock import ACTIVATIONS as STOCK_MODULES
from dlkernels.testing import STOCK, assert_models_agree


class Stock(nn.Module):
    """Llama's MLP."""

    def __init__(self, features, hidden, outputs=None, activation="silu", bias=False, device=None, dtype=None):
        super().__init__()
        self.gate_proj = nn.Linear(features, hidden, bias, device, dtype)
        self.up_proj = nn.Linear(features, hidden, bias, device, dtype)
        self.down_proj = nn.Linear(hidden, outputs or features, bias, device, dtype)
        self.act_fn = STOCK_MODULES[activation]()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def fused_calls(call):
    """The number of gated layers that a call runs as one op."""
    names = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            names.append(op.name())
            return op(*args, **(kwargs or {}))

    with Record():
        call()
    return sum("_linear_glu" in name for name in names)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_three_linears(bias, dtype, device):
    models = []
    for make in (GatedMLP, Stock):
        torch.manual_seed(5)
        models.append(make(7, 12, 4, "silu", bias, device, dtype))
    ours, stock = models
    for again in range(2):
        mine, theirs = ours.state_dict(), stock.state_dict()
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)
        torch.manual_seed(6 + again)
        ours.reset_parameters()
        torch.manual_seed(6 + again)
        for child in (stock.gate_proj, stock.up_proj, stock.down_proj):
            child.reset_parameters()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", STOCK)
def test_it_agrees_with_stock(activation, bias, device):
    ours, stock = GatedMLP(20, 48, 10, activation, bias, device), Stock(20, 48, 10, activation, bias, device)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(3, 30, 20, device=device)
    assert fused_calls(lambda: ours(x)) == 1
    assert_models_agree(ours, stock, x)


def test_what_it_looks_like():
    assert repr(GatedMLP(7, 12)) == (
        "GatedMLP(\n"
        "  activation=silu\n"
        "  (gate_proj): Linear(in_features=7, out_features=12, bias=False)\n"
        "  (up_proj): Linear(in_features=7, out_features=12, bias=False)\n"
        "  (down_proj): Linear(in_features=12, out_features=7, bias=False)\n"
        ")"
    )
    assert "negative_slope=0.2" in repr(GatedMLP(7, 12, activation="leaky_relu", negative_slope=0.2))
    model = GatedMLP(7, 12, 3)
    assert (model.in_features, model.hidden_features, model.out_features) == (7, 12, 3)


@pytest.mark.parametrize(
    ("message", "error", "arguments"),
    [
        ("activation must be one of", ValueError, {"activation": "swish"}),
        ("hidden_features must be at least 0, got -1", ValueError, {"hidden_features": -1}),
        ("out_features must be an integer", TypeError, {"out_features": 2.5}),
        ("in_features must be an integer", TypeError, {"in_features": True}),
        ("negative_slope must be at least 0", ValueError, {"negative_slope": -0.1}),
        ("negative_slope must be a number", TypeError, {"negative_slope": "steep"}),
    ],
)
def test_mistakes(message, error, arguments):
    with pytest.raises(error, match=message):
        GatedMLP(**{"in_features": 3, "hidden_features": 4, **arguments})


class Lora(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def add_hook(model):
    model.gate_proj.register_forward_hook(lambda module, args, y: y + 1)


def replace_forward(model):
    model.up_proj.forward = lambda x: nn.functional.linear(x, model.up_proj.weight) + 1


def replace_layer(model):
    other = Lora(*model.up_proj.weight.shape[::-1], bias=False)
    other.load_state_dict(model.up_proj.state_dict())
    model.up_proj = other


CHANGES = {
    "hook": add_hook,
    "forward": replace_forward,
    "layer": replace_layer,
    "weight norm": lambda model: parametrizations.weight_norm(model.gate_proj),
    "identity": lambda model: setattr(model, "up_proj", nn.Sequential(model.up_proj, nn.Tanh())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_projections_are_called(change, device):
    ours, stock = GatedMLP(6, 8, device=device), Stock(6, 8, device=device)
    ours.load_state_dict(stock.state_dict())
    for model in (ours, stock):
        CHANGES[change](model)
        model.to(device)
    x = torch.randn(5, 6, device=device)
    assert fused_calls(lambda: ours(x)) == 0
    torch.testing.assert_close(ours(x), stock(x))


def test_a_global_hook_sees_the_projections(device):
    ours, seen = GatedMLP(6, 8, device=device), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        ours(torch.randn(5, 6, device=device))
    finally:
        handle.remove()
    assert ours.gate_proj in seen and ours.up_proj in seen


def test_compile_export_and_fx(device):
    model = GatedMLP(6, 8, activation="gelu", device=device)
    x = torch.randn(5, 6, device=device, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [(y := m(x), *torch.autograd.grad(y.sum(), [x, *model.parameters()])) for m in (model, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    program = torch.export.export(model, (x.detach(),))
    assert "_linear_glu" in str(program.graph)
    assert torch.equal(program.module()(x), model(x))
    traced = fx.symbolic_trace(model)
    assert functional.linear_glu in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(x), model(x))


def test_copies_and_saves(device):
    model = GatedMLP(6, 8, device=device)
    x = torch.randn(5, 6, device=device)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), model(x))


@pytest.mark.skipif(not _C.cpu_autocast(), reason="no products of bfloat16 on this CPU")
def test_autocast(device):
    ours, stock = GatedMLP(64, 96, device=device), Stock(64, 96, device=device)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(40, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        mine, theirs = ours(x), stock(x)
    assert mine.dtype == theirs.dtype == torch.bfloat16
    exact = copy.deepcopy(stock).double()(x.double())
    assert (mine.double() - exact).norm() <= 1.1 * (theirs.double() - exact).norm()


def test_training_moves_as_stock(device):
    ours, stock = GatedMLP(8, 16, device=device, dtype=torch.float64), Stock(8, 16, device=device, dtype=torch.float64)
    ours.load_state_dict(stock.state_dict())
    x, target = (torch.randn(32, 8, device=device, dtype=torch.float64) for _ in range(2))
    for model in (ours, stock):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b)
