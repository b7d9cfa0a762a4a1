"""``F.linear(x, self.weight, self.bias)`` as a layer: the calls of a method, and the parameters of a model.

In place of a module a rewritten method passes on the values of that call: the tuple of function, weight and bias.
:func:`as_layer` makes a :class:`FunctionalLinear` of it where the call is decided anew. Before a call, the analysis and
the report know the same layer as a :class:`ParameterLayer`, by the names of its parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from dlkernels._decisions import Place

Parameters = tuple[Tensor, Tensor | None]  # weight [out_features, in_features], bias [out_features]


class FunctionalLinear:
    """``function(·, weight, bias)`` with the arguments as the source gives them. It is called with x."""

    __slots__ = ("args", "bias", "function", "kwargs", "weight")

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.weight = args[0] if args else kwargs.get("weight")
        self.bias = args[1] if len(args) > 1 else kwargs.get("bias")

    def __call__(self, x: Any) -> Any:
        if "input" in self.kwargs:
            return self.function(**{**self.kwargs, "input": x})
        return self.function(x, *self.args, **self.kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters, as a module does."""
        return (p for p in (self.weight, self.bias) if isinstance(p, nn.Parameter))


def functional(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Return the layer that ``function(*args, **kwargs)`` calls, and its input."""
    if "input" in kwargs:
        return FunctionalLinear(function, (), kwargs), kwargs["input"]
    return FunctionalLinear(function, args[1:], kwargs) if kwargs else (function, *args[1:]), args[0]


def as_layer(called: Any) -> Any:
    """Return the layer of the values that a rewritten method gives, or ``called`` itself if it is no such tuple."""
    return FunctionalLinear(called[0], called[1:], {}) if type(called) is tuple else called


def key_of(called: Any) -> Any:
    """Return the id of what is called; of ``F.linear``, whose layer is new at each call, those of its parameters."""
    if type(called) is FunctionalLinear:
        called = called.function, *(parameters_given(called) if called.kwargs else called.args)
    return (*map(id, called),) if type(called) is tuple else id(called)


def parameters_given(*called: Any) -> list[Any]:
    """Return the parameters of the layers of ``F.linear`` among these, as the source gives them."""
    given: list[Any] = []
    for one in called:
        if type(one) is tuple:
            given += one[1:]
        elif type(one) is FunctionalLinear:
            given += one.weight, one.bias
    return given


def own_parameters(layer: FunctionalLinear | ParameterLayer) -> Parameters | None:
    """Return weight and bias of a layer; None if it does not call ``F.linear`` with parameters and buffers.

    A tensor that requires a gradient and is no parameter is computed: by a parametrization, for example.
    """
    weight, bias = layer.weight, layer.bias
    if layer.function is not F.linear or not isinstance(weight, Tensor):
        return None
    several = (weight,) if bias is None else (weight, bias)
    if not all(isinstance(t, nn.Parameter) or (isinstance(t, Tensor) and not t.requires_grad) for t in several):
        return None
    return weight, bias


_DEPTH = 2  # of the modules that are searched below the one whose method runs: children and their children


def place_in(module: Any, parameter: Any, depth: int = _DEPTH) -> Place | None:
    """Return where a parameter is: in a module, or in one of the modules not far below it; None if it is not there."""
    state = object.__getattribute__(module, "__dict__")
    for name, own in state["_parameters"].items():
        if own is parameter:
            return module, name
    below = state["_modules"].values() if depth else ()
    found = (place_in(child, parameter, depth - 1) for child in below if child is not None)
    return next((place for place in found if place is not None), None)


def places_in(module: Any, layer: FunctionalLinear) -> tuple[Place, Place | None] | None:
    """Return the places of a layer's weight and bias; None for a bias that it does not have.

    It is None if they are not in the module or not far below it, or if the function is not ``F.linear``.
    """
    takes = layer.function is F.linear and isinstance(layer.weight, nn.Parameter)
    weight = place_in(module, layer.weight) if takes else None
    bias = None if weight is None or layer.bias is None else place_in(module, layer.bias)
    return None if weight is None or (bias is None and layer.bias is not None) else (weight, bias)


class ParameterLayer:
    """The layer ``F.linear(·, module.weight, other.bias)``, by the modules and the names of its parameters."""

    def __init__(self, weight: Place, bias: Place | None) -> None:
        self.function = F.linear
        self._weight = weakref.ref(weight[0]), weight[1]
        self._bias = None if bias is None else (weakref.ref(bias[0]), bias[1])

    @property
    def module(self) -> Any:
        """The module that has the weight."""
        return self._weight[0]()

    @property
    def name(self) -> str:
        """The name of the weight in its module."""
        return self._weight[1]

    @property
    def weight(self) -> Any:
        return tensor_at(self.module, self.name)

    @property
    def bias(self) -> Any:
        return None if self._bias is None else tensor_at(self._bias[0](), self._bias[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.size(0))

    @property
    def in_features(self) -> int:
        return int(self.weight.size(1))


def tensor_at(module: Any, name: str) -> Any:
    """Return the parameter or buffer of this name; None if there is none."""
    return None if module is None else own_tensors(module).get(name)


def own_tensors(module: Any) -> dict[str, Any]:
    """Return the parameters and buffers of a module itself, without running code of its class."""
    state = object.__getattribute__(module, "__dict__")
    return {**state["_buffers"], **state["_parameters"]}


# By module: its layers by the name of the weight and the place of the bias.
_layers = WeakIdKeyDictionary()


def layer_at(weight: Place, bias: Place | None) -> ParameterLayer:
    """Return the layer with these parameters: always the same object."""
    known = _layers.setdefault(weight[0], {})
    key = weight[1], None if bias is None else (id(bias[0]), bias[1])
    if key not in known:
        known[key] = ParameterLayer(weight, bias)
    return known[key]


def layers_of(module: nn.Module) -> list[ParameterLayer]:
    """Return the layers whose weights are this module's, of those that were found so far."""
    return list(_layers.get(module, {}).values())
