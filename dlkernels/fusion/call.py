"""What stands in a rewritten forward in place of ``act(linear(x))``: decides, each time, between kernel and stock.

The decision reads what is there at the moment of the call, so nothing that happens to the model after ``fuse`` can make
it wrong: a hook, a parametrization, a wrapped or replaced layer, another activation, a tensor the kernels do not take.
Every refusal runs the two calls that the source has. Dynamo traces all of this and leaves guards behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dlkernels import _C, functional
from dlkernels.fusion.rules import activation_of, identity, linear_rule
from dlkernels.nn import untouched

_PLAIN = (Tensor, nn.Parameter)  # no subclass that wants to see the operators: DTensor, quantised, fake, traced
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "meta") if _C.build_config()["cuda"] is None else ("cpu", "meta", "cuda")

Ready = tuple[Tensor, Tensor | None, str, float]  # weight, bias, activation, slope

# Set while example inputs run (module observe): is told of every call and what was decided.
watcher: Callable[..., None] | None = None


def why_not_linear(linear: Any) -> str:
    """Why this module's call is more than a product and a sum, or has no kernel; empty if neither."""
    found = _linear(linear)
    return found if isinstance(found, str) else ""


def _linear(linear: Any) -> str | tuple[Tensor, Tensor | None]:
    rule = linear_rule(type(linear))
    if rule is None:
        if isinstance(linear, nn.Linear):
            return f"{type(linear).__name__} is a subclass of Linear with a forward of its own"
        return f"{describe(linear)} is no linear layer that fuse knows"
    if not untouched(linear):
        return "it has a hook, or its forward was replaced"
    parameters = rule(linear)
    if parameters is None:
        return "its weight or bias is no parameter: it is parametrised"
    weight, bias = parameters
    if type(weight) not in _PLAIN or (bias is not None and type(bias) not in _PLAIN):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in DTYPES:
        return f"there are no kernels for {weight.dtype}"
    if weight.device.type not in DEVICES:
        return f"there are no kernels for {weight.device.type}"
    return parameters


def why_not_activation(act: Any, args: Any = (), kwargs: Any = None) -> str:
    """Why there is no kernel that ends in this activation; empty if there is."""
    found = _activation(act, args, kwargs)
    return found if isinstance(found, str) else ""


def _activation(act: Any, args: Any, kwargs: Any) -> str | tuple[str, float]:
    known = activation_of(act, args, kwargs)
    if known is None:
        return f"no kernel ends in {describe(act)}"
    if isinstance(act, nn.Module) and not untouched(act):
        return "the activation has a hook, or its forward was replaced"
    return known


def describe(called: Any) -> str:
    return type(called).__name__ if isinstance(called, nn.Module) else getattr(called, "__name__", repr(called))


def decide(self: Any, act: Any, linear: Any, x: Any, args: Any, kwargs: Any) -> str | Ready:
    """What the kernel needs, or why it is not for this call.

    ``self`` is the module whose forward is running; its class says which activations and layers were asked for.
    """
    found = _linear(linear)
    if isinstance(found, str):
        return found
    known = _activation(act, args, kwargs)
    if isinstance(known, str):
        return known
    weight, bias = found
    name, slope = known
    plan = type(self)._fused_plan
    if name not in plan.activations:
        return "not asked for"
    if plan.without and any(self.get_submodule(path) is linear for path in plan.without):
        return "not asked for"
    if _has_any_global_hook():
        return "there is a global module hook"
    if torch.jit.is_tracing():
        return "torch.jit.trace records stock operators only"
    if type(x) not in _PLAIN or x.is_nested or x.layout is not torch.strided:
        return f"the kernels do not take its input, a {type(x).__name__}"
    # Stock shall say what is wrong with a call that is; under autocast dtypes may differ.
    shape = x.shape
    if not shape or shape[-1] != weight.shape[1] or x.device != weight.device:
        return "input and weight do not fit together"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return "input and weight do not fit together"
    return weight, bias, name, slope


def _run(x: Tensor, ready: Ready) -> Tensor:
    weight, bias, name, slope = ready
    return functional.linear_act(x, weight, bias, name, negative_slope=slope)


def call(self: Any, act: Any, linear: Any, x: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``act(linear(x), *args, **kwargs)``"""
    decision = decide(self, act, linear, x, args, kwargs)
    if watcher is not None:
        watcher(linear, act, x, decision, args, kwargs)
    return act(linear(x), *args, **kwargs) if isinstance(decision, str) else _run(x, decision)


def head(self: Any, act: Any, linear: Any, x: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
    """``linear(x)``, whose value goes to ``act`` some statements later and nowhere else; or, and True, act's value."""
    decision = decide(self, act, linear, x, args, kwargs)
    if watcher is not None:
        watcher(linear, act, x, decision, args, kwargs)
    return (linear(x), False) if isinstance(decision, str) else (_run(x, decision), True)


def tail(self: Any, act: Any, done: bool, h: Any, /, *args: Any, **kwargs: Any) -> Any:
    return h if done else act(h, *args, **kwargs)


def alone(self: Any, input: Any) -> Any:
    """The forward of a linear layer that no activation follows."""
    decision = decide(self, identity, self, input, (), {})
    return type(self)._fused_from.forward(self, input) if isinstance(decision, str) else _run(input, decision)


def chain(self: Any, modules: Iterable[Any], x: Any, /) -> Any:
    """``for module in modules: x = module(x)``"""
    layers = list(modules)
    i = 0
    while i < len(layers):
        layer = layers[i]
        i += 1
        if i < len(layers) and linear_rule(type(layer)) is not None:
            decision = decide(self, layers[i], layer, x, (), {})
            if watcher is not None:
                watcher(layer, layers[i], x, decision, (), {})
            if not isinstance(decision, str):
                x = _run(x, decision)
                i += 1
                continue
        x = layer(x)
    return x
