"""Decides for ``act(linear(x))`` at each call: by our kernel, or by stock.

The decision reads the state at the moment of the call. So no later change of the model can make it wrong: a hook, a
parametrization, a wrapped or replaced layer, another activation, a tensor that the kernels do not take. Every refusal
runs the two calls of the source. Dynamo traces these functions and guards what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext

from dlkernels import _C
from dlkernels._ops import linear_act as _linear_act
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels._ops.modes import are_plain, tracing
from dlkernels.fusion.functional import FunctionalLinear, places_in, tensor_at
from dlkernels.fusion.reading import activation_of, may_be_activation
from dlkernels.fusion.rules import linear_rule
from dlkernels.nn.untouched import untouched

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "meta") if _C.build_config()["cuda"] is None else ("cpu", "meta", "cuda")

STOCK_LINEAR = F.linear, nn.Linear.forward  # some tools replace these

Ready = tuple[Tensor, Tensor | None, str, float]  # weight, bias, activation, slope

# The decision for F.linear is remembered where its parameters are in the module or not far below. Elsewhere it takes
# 20 µs at each call, which is 3 % of a layer with this many multiplications.
LEAST_UNKEPT = 1 << 24
TOO_SMALL = (
    "the parameters of F.linear are not this module's, so each call would decide anew: that takes longer than fusing "
    "so small a layer saves"
)

NOT_SELECTED = "not selected"  # the reason of places that fuse was told to leave

# It is set while example inputs run (module observe). It gets every call and its decision; of a chain, its stages too.
watcher: Callable[..., None] | None = None


def is_too_small(self: Any, linear: Any, x: Any, weight: Tensor) -> bool:
    """Return True for a layer of ``F.linear`` whose product takes less time than the decision at each call.

    A compiler decides once.
    """
    if type(linear) is not FunctionalLinear or torch.compiler.is_dynamo_compiling():
        return False
    return isinstance(x, Tensor) and x.numel() * weight.size(0) < LEAST_UNKEPT and places_in(self, linear) is None


def why_not_linear(linear: Any) -> str:
    """Return why this module's call is no plain linear map, or has no kernel; empty if it can be fused."""
    found = _linear(linear)
    return found if isinstance(found, str) else ""


def as_in_stock(called: Any) -> Any:
    """Return a call of the stock model: of a layer whose forward is our kernel, the forward that it had."""
    plan = getattr(type(called), "_fused_plan", None)
    return called if plan is None or not plan.linear_forward else partial(nn.Linear.forward, called)


def _linear(linear: Any) -> str | tuple[Tensor, Tensor | None]:
    rule = linear_rule(type(linear))
    if rule is None:
        if isinstance(linear, nn.Linear):
            if type(linear).forward is nn.Linear.forward:
                return "its weight or bias is no plain attribute: it is parametrized"
            return f"{type(linear).__name__} is a subclass of Linear with its own forward"
        return f"{describe(linear)} is no linear layer that fuse knows"
    if isinstance(linear, nn.Module) and not untouched(linear):
        return "it has a hook, or its forward was replaced or compiled"
    parameters = rule(linear)
    if parameters is None:
        return "its weight or bias is no parameter: it is parametrized"
    weight, bias = parameters
    if not are_plain(weight) or (bias is not None and not are_plain(bias)):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in DTYPES:
        return f"there are no kernels for {weight.dtype}"
    if not (weight.is_cpu or weight.device.type in DEVICES):  # the cheap test first
        return f"there are no kernels for {weight.device.type}"
    if weight.layout is not torch.strided:
        return f"its weight has the layout {weight.layout}"
    return why_not_shapes(weight, bias) or parameters


def why_not_shapes(weight: Tensor, bias: Tensor | None) -> str:
    """Return why these are no matrix and a bias with one value per row; empty if they are. Stock may broadcast them."""
    if weight.dim() != 2:
        return f"its weight has the shape {tuple(weight.shape)}"
    if bias is not None and (bias.dim() != 1 or bias.size(0) != weight.size(0)):
        return f"its bias has the shape {tuple(bias.shape)}, not {tuple(weight.shape[:1])}"
    return ""


def why_not_activation(act: Any, args: Any = (), kwargs: Any = None) -> str:
    """Return why no kernel has this activation; empty if one has."""
    found = _activation(act, args, kwargs)
    return found if isinstance(found, str) else ""


def _activation(act: Any, args: Any, kwargs: Any) -> str | tuple[str, float]:
    known = activation_of(act, args, kwargs)
    if known is None:
        return _why_unknown(act)
    if isinstance(act, nn.Module) and not untouched(act):
        return "the activation has a hook, or its forward was replaced or compiled"
    return known


def _why_unknown(act: Any) -> str:
    if may_be_activation(act):
        return f"no kernel has the activation {describe(act)} with these arguments"
    if type(act) is BuiltinFunctionType or _module(act).partition(".")[0] == "torch":
        return f"no kernel has the activation {describe(act)}"
    return f"fuse has no rule for {describe(act)} of {_module(act)} (register_fusion adds one)"


def _module(called: Any) -> str:
    named = called if type(called) in (*_NAMED, type) else type(called)
    return str(named.__module__)


_NAMED = (FunctionType, BuiltinFunctionType, MethodType)


def describe(called: Any) -> str:
    """Return a name for the report, without running code of the object."""
    if type(called) is MethodType:
        return f"{type(called.__self__).__name__}.{called.__func__.__name__}"
    return str(called.__name__ if type(called) in (*_NAMED, type) else type(called).__name__)


def decide(self: Any, act: Any, linear: Any, x: Any, args: Any, kwargs: Any) -> str | Ready:
    """Return the kernel's arguments, or the reason why this call is not fused.

    ``self`` is the module whose forward is running. Its class holds the selected activations and layers.
    """
    if _has_any_global_hook():
        return "there is a global module hook"
    if tracing():
        return "torch.jit.trace records stock operators only"
    if F.linear is not STOCK_LINEAR[0] or nn.Linear.forward is not STOCK_LINEAR[1]:
        return "F.linear or nn.Linear.forward was replaced"
    if (modes := torch._C._len_torch_function_stack()) and not _only_device_modes(modes):
        return "a TorchFunctionMode sees stock functions only"
    if _python_dispatch._is_in_non_infra_torch_dispatch_mode:
        return "a TorchDispatchMode sees stock operators only"
    found = _linear(linear)
    if isinstance(found, str):
        return found
    known = _activation(act, args, kwargs)
    if isinstance(known, str):
        return known
    plan = getattr(type(self), "_fused_plan", None)
    if plan is None:  # the caller has stored a fused method, and the module was unfused since
        return "unfuse gave the module its class back"
    weight, bias = found
    if is_too_small(self, linear, x, weight):
        return TOO_SMALL
    name, slope = known
    if name not in plan.activations:
        return NOT_SELECTED
    if plan.without and any(is_at(self, path, linear) for path in plan.without):
        return NOT_SELECTED
    if not are_plain(x) or x.is_nested or x.layout is not torch.strided:
        return f"the kernels do not take its input, a {type(x).__name__}"
    # A wrong call goes to stock, which raises its own error. Under autocast the dtypes may differ.
    on_cpu = x.is_cpu and weight.is_cpu  # to compare devices takes longer
    if not x.dim() or x.size(-1) != weight.size(1) or not (on_cpu or x.device == weight.device):
        return "input and weight do not fit together"
    dtype = weight.dtype
    alike = x.dtype == dtype and (bias is None or bias.dtype == dtype)
    if not alike and not torch.is_autocast_enabled(x.device.type):
        return "input, weight and bias do not fit together"
    return weight, bias, name, slope


def _only_device_modes(count: int) -> bool:
    """Return True if all modes are of ``with torch.device(...)`` or ``set_default_device``: they change no layer."""
    return all(type(torch._C._get_function_stack_at(i)) is DeviceContext for i in range(count))


def is_at(module: Any, path: str, linear: Any) -> bool:
    """Return True if a layer is at this path below a module. The path of ``F.linear`` is that of its weight."""
    *around, last = path.split(".")
    for name in around:
        module = module._modules.get(name)
        if module is None:
            return False
    if isinstance(linear, nn.Module):
        return module._modules.get(last) is linear
    weight = tensor_at(module, last)
    return weight is not None and weight is linear.weight


def _run(x: Tensor, ready: Ready) -> Tensor:
    weight, bias, name, slope = ready
    return _linear_act.linear_act(x, weight, bias, ACTIVATIONS[name], slope)  # functional.linear_act, checked above
