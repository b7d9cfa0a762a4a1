"""The tables of linear layers and activations. Everything specific to a class is one entry here.

Classes of libraries that may not be installed are given by their dotted name: nothing is imported for them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlkernels._ops.activations import activation_named
from dlkernels.fusion.functional import FunctionalLinear, ParameterLayer, Parameters, own_parameters

Activation = tuple[str, float]  # a name of functional.linear_act, and leaky_relu's slope
Rule = Callable[..., Activation | None]  # None: there is no kernel for this form

# Methods of a tensor, as in `self.fc(x).relu()`.
METHODS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda t, *args, **kwargs: t.relu(*args, **kwargs),
    "relu_": lambda t, *args, **kwargs: t.relu_(*args, **kwargs),
    "tanh": lambda t, *args, **kwargs: t.tanh(*args, **kwargs),
    "tanh_": lambda t, *args, **kwargs: t.tanh_(*args, **kwargs),
    "sigmoid": lambda t, *args, **kwargs: t.sigmoid(*args, **kwargs),
    "sigmoid_": lambda t, *args, **kwargs: t.sigmoid_(*args, **kwargs),
}


def _plain(name: str) -> Rule:
    return lambda: (name, 0.0)


def _may_be_inplace(name: str) -> Rule:
    return lambda inplace=False: (name, 0.0)  # it would overwrite the product, which nothing else reads


def _gelu(*, approximate: Any = "none") -> Activation | None:
    if type(approximate) is not str:  # comparing another type could run code of the model
        return None
    return {"none": ("gelu", 0.0), "tanh": ("gelu_tanh", 0.0)}.get(approximate)


def _leaky_relu(negative_slope: Any = 0.01, inplace: bool = False) -> Activation | None:
    if type(negative_slope) not in (float, int):
        return None
    return ("leaky_relu", float(negative_slope)) if negative_slope >= 0 else None


def identity(z: Tensor) -> Tensor:
    return z


# Functions: a rule takes the arguments after the tensor.
_functions: dict[Any, Rule] = {
    identity: _plain("none"),
    F.relu: _may_be_inplace("relu"),
    F.relu_: _plain("relu"),
    torch.relu: _plain("relu"),
    torch.relu_: _plain("relu"),
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu,
    F.gelu: _gelu,
    F.silu: _may_be_inplace("silu"),
    F.tanh: _plain("tanh"),
    torch.tanh: _plain("tanh"),
    torch.tanh_: _plain("tanh"),
    F.sigmoid: _plain("sigmoid"),
    torch.sigmoid: _plain("sigmoid"),
    torch.sigmoid_: _plain("sigmoid"),
    **{function: _plain(name.rstrip("_")) for name, function in METHODS.items()},
}

# Functions that overwrite their argument, and those that do so with ``inplace=True``.
_IN_PLACE = (F.relu_, F.leaky_relu_, torch.relu_, torch.tanh_, torch.sigmoid_)
_MAY_BE_IN_PLACE = (F.relu, F.leaky_relu, F.silu)


def works_in_place(function: Any, keywords: dict[str, Any]) -> bool:
    """Return True if a call of this function with these keywords overwrites its tensor."""
    several = (*_IN_PLACE, *(_MAY_BE_IN_PLACE if keywords.get("inplace") is True else ()))
    return any(function is one for one in several)


# Modules, by exact class: a rule takes the module.
_modules: dict[Any, Rule] = {
    nn.ReLU: lambda m: ("relu", 0.0),
    nn.LeakyReLU: lambda m: _leaky_relu(m.__dict__.get("negative_slope")),
    nn.GELU: lambda m: _gelu(approximate=m.__dict__.get("approximate")),
    nn.SiLU: lambda m: ("silu", 0.0),
    nn.Tanh: lambda m: ("tanh", 0.0),
    nn.Sigmoid: lambda m: ("sigmoid", 0.0),
    "dlkernels.stock.SquaredReLU": lambda m: ("relu2", 0.0),
    # gelu_fast is not here: its constant has ten digits, so in float64 it is another function.
    "transformers.activations.GELUActivation": lambda m: ("gelu", 0.0),
    "transformers.activations.GELUTanh": lambda m: ("gelu_tanh", 0.0),
    "transformers.activations.NewGELUActivation": lambda m: ("gelu_tanh", 0.0),
    "transformers.activations.AccurateGELUActivation": lambda m: ("gelu_tanh", 0.0),
    "transformers.activations.SiLUActivation": lambda m: ("silu", 0.0),
    "transformers.activations.ReLUSquaredActivation": lambda m: ("relu2", 0.0),
}

# By rule: the attributes of the module that it reads. A rule of the user's may read anything: it is not here.
_read: dict[Rule, tuple[str, ...]] = dict.fromkeys((*_functions.values(), *_modules.values()), ()) | {
    _modules[nn.LeakyReLU]: ("negative_slope",),
    _modules[nn.GELU]: ("approximate",),
}
version = 0  # grows with each register_fusion

# Linear layers besides nn.Linear and its subclasses that inherit its forward.
_linears: dict[Any, Callable[[Any], Parameters | None]] = {
    "transformers.pytorch_utils.Conv1D": lambda m: (m.weight.t(), m.bias),
    FunctionalLinear: own_parameters,
    ParameterLayer: own_parameters,
}


def _found(table: dict[Any, Any], cls: type) -> Any:
    try:
        rule = table.get(cls)
    except TypeError:  # its metaclass has an __eq__ and no __hash__
        return None
    return table.get(f"{cls.__module__}.{cls.__qualname__}") if rule is None else rule


def register_fusion(
    what: Any,
    *,
    activation: str | Callable[..., Any] | None = None,
    linear: Callable[[Any], Parameters] | None = None,
) -> None:
    """Add an activation or a linear layer for :func:`dlkernels.fuse`. Give exactly one of the two keywords.

    Args:
        what: a module class or its dotted name (``"package.module.Class"``, which is not imported). For an activation
            it may also be a function.
        activation: a name of :func:`dlkernels.functional.linear_act`; or a function that returns a name, a pair
            (``"leaky_relu"``, slope), or None where there is no kernel. The function is called with the module, or, if
            ``what`` is a function, with the arguments after the tensor.
        linear: a function from the module to ``(weight, bias)``, weight ``[out_features, in_features]`` of any strides,
            bias ``[out_features]`` or None. The module's forward must be ``F.linear(x, weight, bias)``.

    If a rule is wrong, the results of the fused model are wrong. Give ``fuse`` ``example_inputs`` to compare them with
    stock's.

    Raises:
        TypeError: not exactly one keyword, or ``what`` is neither a class, a name nor a function.
        ValueError: an unknown name of an activation.
    """
    global version
    if (activation is None) == (linear is None):
        raise TypeError("register_fusion: give activation= or linear=, and not both")
    is_module = isinstance(what, str) or (isinstance(what, type) and issubclass(what, nn.Module))
    if linear is not None:
        if not is_module:
            raise TypeError(f"register_fusion: linear= is for module classes and their dotted names, got {what!r}")
        _linears[what] = linear
        version += 1
        return
    if not is_module and (isinstance(what, type) or not callable(what)):
        raise TypeError(f"register_fusion: expected a module class, its dotted name or a function, got {what!r}")
    if isinstance(activation, str):
        name = activation_named(activation).name
        rule: Rule = (lambda m: name) if is_module else (lambda: name)  # type: ignore[assignment,return-value]
    else:
        rule = activation  # type: ignore[assignment]
    (_modules if is_module else _functions)[what] = rule
    version += 1


def attributes_read(act: Any) -> tuple[str, ...] | None:
    """Return the attributes that an activation's rule reads; None if they are not known, or there is no rule."""
    rule = rule_of(act)
    return None if rule is None else _read.get(rule)


def rule_of(act: Any) -> Rule | None:
    """Return the rule of a module's class or of a function; None if there is none."""
    return _found(_modules, type(act)) if isinstance(act, nn.Module) else _function_rule(act)


def applied(rule: Rule, act: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Activation | None:
    """Return the activation that ``act(z, *args, **kwargs)`` computes by its rule; None if no kernel has it."""
    if isinstance(act, nn.Module):
        known = None if args or kwargs else rule(act)
    elif args or kwargs:
        try:
            known = rule(*args, **(kwargs or {}))
        except TypeError:  # the rule does not know these arguments: the function itself accepts or refuses them
            return None
    else:
        known = rule()
    return (known, 0.0) if isinstance(known, str) else known


# Types whose __hash__ and __eq__ are Python's own.
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, MethodDescriptorType)


def _function_rule(act: Any) -> Rule | None:
    if type(act) in _FUNCTIONS:
        return _functions.get(act)
    return next((rule for function, rule in _functions.items() if function is act), None)


def linear_rule(cls: type) -> Callable[[Any], Parameters | None] | None:
    """Return the rule from a module of this class to its parameters; None if the class is no plain linear map.

    The rule returns None for a module whose parameters are not plain.
    """
    if cls is nn.Linear:
        return _own_parameters
    if "_fused_from" in cls.__dict__:
        return linear_rule(cls._fused_from)  # type: ignore[attr-defined]
    if (rule := _found(_linears, cls)) is not None:
        return rule
    if not issubclass(cls, nn.Linear) or hasattr(cls, "weight") or hasattr(cls, "bias"):  # or has its own properties
        return None
    return _own_parameters if all(getattr(cls, name) is getattr(nn.Linear, name) for name in _CALLED) else None


# The methods that run when a linear layer is called.
_CALLED = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")


def _own_parameters(linear: nn.Linear) -> Parameters | None:
    own, instead = linear._parameters, linear.__dict__
    if "weight" in own and "bias" in own and "weight" not in instead and "bias" not in instead:
        return own["weight"], own["bias"]  # type: ignore[return-value]
    return None


def is_linear(module: Any) -> bool:
    return linear_rule(type(module)) is not None
