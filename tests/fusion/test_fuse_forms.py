"""``fuse`` on difficult forwards: the sites that it finds, and the same numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse, report, unfuse
from tests.fusion.fusable import Net, X, fused_places, fused_runs, made, numbers
from tests.fusion.zoo import linear_outputs_into_activations


def form(**sites):
    """A forward for Net, and the sites in it, from layer to activation."""

    def take(forward):
        name = "".join(part.capitalize() for part in forward.__name__.split("_"))
        cls = type(name, (Net,), {"forward": forward})
        FOUND.append(pytest.param(cls, {k.replace("__", "."): v for k, v in sites.items()}, id=forward.__name__))
        return forward

    return take


FOUND: list = []


@form(fc1="relu")
def f_function(self, x):
    return F.relu(self.fc1(x))


@form(fc1="relu")
def torch_function(self, x):
    return torch.relu(self.fc1(x))


@form(fc1="relu")
def method(self, x):
    return self.fc1(x).relu()


@form(fc1="tanh")
def method_in_place(self, x):
    return self.fc1(x).tanh_()


@form(fc1="relu", fc2="relu")
def module_in_place_used_twice(self, x):
    return self.out(self.inplace(self.fc2(self.inplace(self.fc1(x)))))


@form(fc1="relu", fc2="gelu_tanh")
def keyword_arguments(self, x):
    return F.gelu(self.fc2(F.relu(self.fc1(x), inplace=True)), approximate="tanh")


@form(fc1="leaky_relu")
def slope_as_argument(self, x):
    return F.leaky_relu(self.fc1(x), 0.3)


@form(fc1="gelu")
def activation_module(self, x):
    return self.drop(self.act(self.fc1(x)))


@form(fc1="silu")
def function_in_attribute(self, x):
    return self.function(self.fc1(x))


@form(fc1="gelu", fc2="relu")
def same_name(self, x):
    x = self.fc1(x)
    x = self.act(x)
    x = self.fc2(x)
    return F.relu(x)


@form(fc1="gelu", layers__0="tanh")
def gate_and_value(self, x):
    """Two products at once, each with its activation later."""
    h = self.fc1(x)
    g: torch.Tensor = self.layers[0](x)
    h = self.act(h)
    return h * torch.tanh(g)


@form(fc1="relu", fc2="relu")
def branches(self, x, flag=None):
    if flag is None:
        h = self.fc1(x)
        h = F.relu(h)
    else:
        h = F.relu(self.fc2(flag))
    return h


@form(layers__0="relu", layers__1="relu")
def loop(self, x):
    for layer in self.layers:
        x = F.relu(layer(x))
    return x


@form(layers__0="relu", layers__1="tanh")
def zipped_loop(self, x):
    for layer, act in zip(self.layers, self.acts):  # noqa: B905
        x = act(layer(x))
    return x


@form(layers__0="relu")
def part_of_a_loop(self, x):
    for layer in self.layers[:-1]:
        x = F.relu(layer(x))
    return self.layers[-1](x)


@form(mixed__0="leaky_relu", mixed__2="sigmoid")
def chain(self, x):
    for layer in self.mixed:
        x = layer(x)
    return x


@form(table__up="relu")
def by_key(self, x):
    return self.table["relu"](self.table["up"](x))


@form(fc1="relu")
def local_name(self, x):
    layer = self.fc1
    return F.relu(layer(x))


@form(fc1="gelu")
def inner_function(self, x):
    def block(t):
        return self.act(self.fc1(t))

    return block(x)


@form(fc1="relu")
@torch.enable_grad()
def decorated(self, x):
    return F.relu(self.fc1(x))


@form(fc1="relu")
def one_of_two_calls(self, x):
    return F.relu(self.fc1(x)) + self.fc1(x)


def enclosed():
    """A class created in a function: its methods use everything that code can get from its surroundings."""
    factor = 2.0

    class Fancy(Net):
        __secret = 3.0

        def forward(self, x, *rest, scale=1.0, **more):
            """Kept."""
            if not isinstance(self, __class__) or super().extra_repr():  # no assert: pytest would change the code
                raise TypeError
            values = [self.act(self.fc1(t)) for t in (x,)]
            return F.relu(self.fc2(values[0])) * scale * factor * self.__secret if (y := 1) else y

    return Fancy


FOUND.append(pytest.param(enclosed(), {"fc1": "gelu", "fc2": "relu"}, id="enclosed"))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("cls", "sites"), FOUND)
def test_every_form_is_found_and_computes_the_same(cls, sites, training):
    model = made(cls).train(training)
    expected = numbers(model, X)
    table = report(fuse(model))
    assert dict(fused_places(table)) == sites, str(table)
    assert type(model) is not cls and isinstance(model, cls) and type(model).__name__ == cls.__name__
    with fused_runs() as runs:
        torch.testing.assert_close(numbers(model, X), expected, rtol=1e-12, atol=1e-12)
    assert runs.places == len(sites) - (cls.__name__ == "Branches"), "a site did not run"
    unfuse(model)
    assert type(model) is cls
    assert torch.equal(numbers(model, X)[0], expected[0])


def test_neighbours_in_sequential():
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
    ).double()
    expected = numbers(model, X)
    there = linear_outputs_into_activations(copy.deepcopy(model), lambda m: m(X))
    assert len(fused_places(report(fuse(model)))) == len(there) == 2
    torch.testing.assert_close(numbers(model, X), expected, rtol=1e-12, atol=1e-12)
    assert model[1](model[0](X)).shape == (5, 8), "its layers stay what they were"
    assert (model[0](X) < 0).any()
    torch.testing.assert_close(model[:2](X), F.relu(model[0](X)))
