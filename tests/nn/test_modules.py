"""LinearReLU, LinearAct and MLP compared with the stock modules that they replace."""

import copy
import pickle
import pickletools
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels.nn import MLP, GatedMLP, LinearAct, LinearCrossEntropyLoss, LinearReLU, MLPEnsemble
from dlkernels.stock import ACTIVATIONS as STOCK_MODULES
from dlkernels.testing import STOCK


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [LinearReLU, LinearAct], ids=lambda m: m.__name__)
def test_initialisation_is_nn_linears_bit_for_bit(make, bias, dtype, device):
    torch.manual_seed(5)
    ours = make(7, 4, bias, device, dtype)
    after = torch.rand(1)
    torch.manual_seed(5)
    stock = nn.Linear(7, 4, bias, device, dtype)
    assert same_state(ours, stock)
    assert torch.equal(after, torch.rand(1)), "the generator is left where nn.Linear leaves it"
    torch.manual_seed(6)
    ours.reset_parameters()
    torch.manual_seed(6)
    stock.reset_parameters()
    assert same_state(ours, stock)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_are_exchanged_with_nn_linear(bias, device):
    ours, stock = LinearReLU(7, 4, bias, device), nn.Linear(7, 4, bias, device)
    assert not torch.equal(ours.weight, stock.weight)
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert same_state(ours, stock)
    other = nn.Linear(7, 4, bias, device)
    other.load_state_dict(ours.state_dict(), strict=True)
    assert same_state(ours, other)
    x = torch.randn(3, 7, device=device)
    torch.testing.assert_close(ours(x), F.relu(stock(x)))


def test_what_the_modules_look_like():
    assert repr(LinearReLU(7, 4)) == "LinearReLU(in_features=7, out_features=4, bias=True)"
    assert repr(LinearAct(7, 4, False, activation="gelu")) == (
        "LinearAct(in_features=7, out_features=4, bias=False, activation=gelu)"
    )
    assert "negative_slope=0.2" in repr(LinearAct(7, 4, activation="leaky_relu", negative_slope=0.2))
    assert LinearReLU(7, 4, bias=False).bias is None
    assert [name for name, _ in LinearReLU(7, 4).named_parameters()] == ["weight", "bias"]


def test_tools_that_look_for_nn_linear_do_not_find_ours():
    """Such tools would replace or wrap the layer, and the activation would be lost."""
    model = MLP([4, 3, 2])
    assert not any(isinstance(m, nn.Linear) for m in model.modules())


@pytest.mark.parametrize("activation", STOCK)
def test_layer_computes_its_activation(activation, device):
    layer = LinearAct(6, 5, activation=activation, device=device)
    x = torch.randn(2, 3, 6, device=device)
    torch.testing.assert_close(layer(x), STOCK[activation](F.linear(x, layer.weight, layer.bias)))


@pytest.mark.parametrize("slope", [0.0, 0.3, 2.0])
def test_negative_slope(slope, device):
    layer = LinearAct(6, 5, activation="leaky_relu", negative_slope=slope, device=device)
    x = torch.randn(3, 6, device=device, requires_grad=True)
    results = []
    for y in (layer(x), F.leaky_relu(F.linear(x, layer.weight, layer.bias), slope)):
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))))
    torch.testing.assert_close(*results)


def test_device_and_dtype(device):
    layer = LinearReLU(3, 2, device=device, dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert {p.device.type for p in MLP([3, 2, 1], device="meta").parameters()} == {"meta"}
    assert layer.to(torch.bfloat16)(torch.ones(1, 3, device=device, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {p.dtype for p in MLP([3, 4, 1], norm="layer", dtype=torch.float64).parameters()} == {torch.float64}


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_smallest_sizes(inputs, outputs, device):
    """As in nn.Linear it is allowed, with the same warning, the same bits and gradients."""
    layers, warned = [], []
    for make in (LinearReLU, nn.Linear):
        torch.manual_seed(1)
        with pytest.warns(UserWarning, match="zero-element") if 0 in (inputs, outputs) else no_warning() as seen:
            layers.append(make(inputs, outputs, device=device))
        warned.append([str(w.message) for w in seen])
    assert warned[0] == warned[1]
    assert same_state(*layers)
    ours, stock = layers
    x = torch.randn(2, inputs, device=device, requires_grad=True)
    for y in (ours(x), F.relu(stock(x))):
        assert y.shape == (2, outputs)
        y.sum().backward()
    assert torch.equal(ours.weight.grad, stock.weight.grad)
    assert torch.equal(ours.bias.grad, stock.bias.grad)


class no_warning:
    def __enter__(self):
        return []

    def __exit__(self, *args):
        return False


# ---- MLP -----------------------------------------------------------------------------------------------------------


def stock_mlp(sizes, activation, dropout, norm):
    """The network that MLP's documentation names."""
    layers = []
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, fan_out)]
        layers += {"batch": [nn.BatchNorm1d(fan_out)], "layer": [nn.LayerNorm(fan_out)], None: []}[norm]
        layers += [STOCK_MODULES[activation]()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def pair(device, activation="relu", dropout=0.0, norm=None, sizes=(6, 8, 7, 3)):
    torch.manual_seed(2)
    ours = MLP(sizes, activation, dropout, norm).to(device)
    torch.manual_seed(2)
    stock = stock_mlp(sizes, activation, dropout, norm).to(device)
    return ours, stock


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("activation", STOCK)
def test_mlp_is_the_stock_network(activation, dropout, norm, device):
    """Same parameters from the same seed under the same keys; same output, gradients, dropout and running statistics.

    The numbers are in float64, where rounding does not matter.
    """
    ours, stock = pair(device, activation, dropout, norm)
    assert same_state(ours, stock)
    ours, stock = ours.double(), stock.double()
    x = torch.randn(10, 6, device=device, dtype=torch.float64)
    for _ in range(2):
        results = []
        for model in (ours, stock):
            torch.manual_seed(4)
            y = model(x)
            model.zero_grad()
            y.square().sum().backward()
            results.append({"y": y, **{name: p.grad for name, p in model.named_parameters()}})
        torch.testing.assert_close(*results)
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))
    fresh = MLP((6, 8, 7, 3), activation, dropout, norm, device, torch.float64)
    fresh.load_state_dict(stock.state_dict(), strict=True)
    assert same_state(fresh, stock)
    stock.load_state_dict(ours.state_dict(), strict=True)


def test_mlp_keys_and_last_layer(device):
    model = MLP([4, 3, 2], device=device)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (model(torch.randn(50, 4, device=device)) < 0).any(), "the last layer has no activation"
    assert list(MLP([4, 2]).state_dict()) == ["0.weight", "0.bias"]
    assert MLP([4, 3, 2])(torch.randn(5, 6, 4)).shape == (5, 6, 2)


def test_mlp_fuses_its_hidden_layers():
    """Without a norm the activation is in the layer, and no activation module runs."""
    kinds = [
        (type(m).__name__, getattr(m, "activation", None)) for m in MLP([4, 3, 3, 2], "gelu") if list(m.parameters())
    ]
    assert kinds == [("LinearAct", "gelu"), ("LinearAct", "gelu"), ("LinearAct", "none")]
    assert "gelu" in repr(MLP([4, 3, 2], "gelu", norm="layer"))


def test_mlp_as_a_sequence_behaves_as_the_stock_one(device):
    """Indices, slices and append mean the same as in the nn.Sequential that it replaces."""
    ours, stock = pair(device)
    x = torch.randn(4, 6, device=device)
    assert len(ours) == len(stock)
    torch.testing.assert_close(ours[:2](x), stock[:2](x))
    assert torch.equal(ours[2].weight, stock[2].weight)
    assert torch.equal(ours[-1].weight, stock[-1].weight)
    for model in (ours, stock):
        model.append(nn.Softmax(dim=-1))
    torch.testing.assert_close(ours(x), stock(x))
    assert same_state(ours, stock)
    del ours[-1], stock[-1]
    assert same_state(ours, stock)


def test_modules_are_torch_modules_throughout(device):
    model = copy.deepcopy(MLP([4, 3, 2], dropout=0.5)).to(device)
    assert model.training
    assert not model.eval().training
    assert sum(p.numel() for p in model.parameters()) == 4 * 3 + 3 + 3 * 2 + 2
    assert model.half()(torch.ones(1, 4, device=device).half()).dtype == torch.float16
    assert re.search(r"LinearAct\(in_features=4, out_features=3", repr(model))


def test_pickles_name_the_public_module():
    """A file that another version wrote loads, and so do the classes that add_safe_globals was given for it."""
    modules = [LinearReLU(3, 2), LinearAct(3, 2), MLP([3, 4, 2], norm="layer"), MLPEnsemble(2, [3, 2])]
    pickled = pickle.dumps([*modules, GatedMLP(3, 4), LinearCrossEntropyLoss(3, 2)], protocol=2)
    named = [name for op, name, _ in pickletools.genops(pickled) if op.name == "GLOBAL"]
    ours = {"GatedMLP", "LinearAct", "LinearReLU", "LinearCrossEntropyLoss", "MLP", "MLPEnsemble", "StackedLinear"}
    assert {name for name in named if "dlkernels" in name} == {
        f"dlkernels.nn {name}" for name in (*ours, "_Activation")
    }
    assert list(map(repr, pickle.loads(pickled)[:4])) == list(map(repr, modules))
