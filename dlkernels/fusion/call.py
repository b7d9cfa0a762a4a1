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
from dlkernels.fusion.rules import activation_of, is_linear, parameters_of
from dlkernels.nn import untouched

_PLAIN = (Tensor, nn.Parameter)  # no subclass that wants to see the operators: DTensor, quantised, fake, traced
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "meta") if _C.build_config()["cuda"] is None else ("cpu", "meta", "cuda")

# Set while example inputs run (module observe): is told of every call and what was decided.
watcher: Callable[..., None] | None = None


class Decision:
    """Why a call is not fused, or what the kernel needs."""

    __slots__ = ("activation", "bias", "slope", "weight", "why")

    def __init__(self, why: str, weight: Any = None, bias: Any = None, activation: str = "", slope: float = 0.0) -> None:
        self.why, self.weight, self.bias, self.activation, self.slope = why, weight, bias, activation, slope


def why_not_linear(linear: Any) -> str:
    """Why this module's call is more than a product and a sum; empty if it is not."""
    if not isinstance(linear, nn.Module):
        return "is no module"
    if not is_linear(linear):
        if isinstance(linear, nn.Linear):
            return f"{type(linear).__name__} is a subclass of Linear with a forward of its own"
        return f"{type(linear).__name__} is no linear layer that fuse knows"
    if not untouched(linear):
        return "it has a hook, or its forward was replaced"
    weight, bias = parameters_of(linear)
    if type(weight) not in _PLAIN or (bias is not None and type(bias) not in _PLAIN):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in _DTYPES:
        return f"there are no kernels for {weight.dtype}"
    if weight.device.type not in DEVICES:
        return f"there are no kernels for {weight.device.type}"
    return ""


def why_not_activation(act: Any, args: Any = (), kwargs: Any = None) -> str:
    """Why there is no kernel that ends in this activation; empty if there is."""
    if activation_of(act, args, kwargs) is None:
        return f"there is no kernel for {describe(act)}"
    if isinstance(act, nn.Module) and not untouched(act):
        return "the activation has a hook, or its forward was replaced"
    return ""


def describe(act: Any) -> str:
    return type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__name__", repr(act))


def decide(self: Any, act: Any, linear: Any, x: Any, args: Any, kwargs: Any) -> Decision:
    """``self`` is the module whose forward is running; its class says which activations and layers were asked for."""
    why = why_not_linear(linear) or why_not_activation(act, args, kwargs)
    if why:
        return Decision(why)
    name, slope = activation_of(act, args, kwargs)  # type: ignore[misc]
    plan = type(self)._fused_plan
    if name not in plan.activations:
        return Decision(f"{name} is not among the activations asked for")
    if any(self.get_submodule(path) is linear for path in plan.without):
        return Decision("excluded")
    if _has_any_global_hook():
        return Decision("there is a global module hook")
    if type(x) not in _PLAIN or x.is_nested or x.layout is not torch.strided:
        return Decision(f"its input is a {type(x).__name__} the kernels do not take")
    weight, bias = parameters_of(linear)
    # Stock shall say what is wrong with a call that is; under autocast dtypes may differ.
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        return Decision("input and weight do not fit together")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return Decision("input and weight do not fit together")
    if torch.jit.is_tracing():
        return Decision("torch.jit.trace records stock operators only")
    return Decision("", weight, bias, name, slope)


def _run(decision: Decision, x: Tensor) -> Tensor:
    return functional.linear_act(
        x, decision.weight, decision.bias, decision.activation, negative_slope=decision.slope
    )


def call(self: Any, act: Any, linear: Any, x: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``act(linear(x), *args, **kwargs)``"""
    decision = decide(self, act, linear, x, args, kwargs)
    if watcher is not None:
        watcher(linear, act, x, decision, args, kwargs)
    return act(linear(x), *args, **kwargs) if decision.why else _run(decision, x)


def head(self: Any, act: Any, linear: Any, x: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
    """``linear(x)``, whose value goes to ``act`` some statements later and nowhere else; or, and True, act's value."""
    decision = decide(self, act, linear, x, args, kwargs)
    if watcher is not None:
        watcher(linear, act, x, decision, args, kwargs)
    return (linear(x), False) if decision.why else (_run(decision, x), True)


def tail(self: Any, act: Any, done: bool, h: Any, /, *args: Any, **kwargs: Any) -> Any:
    return h if done else act(h, *args, **kwargs)


def chain(self: Any, modules: Iterable[Any], x: Any, /) -> Any:
    """``for module in modules: x = module(x)``"""
    layers = list(modules)
    i = 0
    while i < len(layers):
        layer = layers[i]
        i += 1
        if i < len(layers) and is_linear(layer):
            decision = decide(self, layers[i], layer, x, (), {})
            if watcher is not None:
                watcher(layer, layers[i], x, decision, (), {})
            if not decision.why:
                x = _run(decision, x)
                i += 1
                continue
        x = layer(x)
    return x
