"""The reasons why a step is not one call that lie in the context, the batch or the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _python_dispatch

from dlkernels._ops.losses import DEVICES
from dlkernels._ops.modes import are_plain, autocast_active, under_transform
from dlkernels.fusion.call import STOCK_LINEAR


class Ordinary(Exception):
    """This step runs by separate calls; the message says why."""


def unusual_context(x: Any) -> str:
    """Return why no step can be taken now; it is empty if one can."""
    # After a graph break Dynamo runs these lines as they are, and compiles what they call.
    if torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
        return "it is compiled"
    if (F.linear, nn.Linear.forward) != STOCK_LINEAR:
        return "F.linear or nn.Linear.forward was replaced"
    if under_transform():
        return "it is transformed"
    if not torch.is_grad_enabled():
        return "gradients are disabled"
    if _has_any_global_hook() or torch._C._len_torch_function_stack() or torch.is_anomaly_enabled():
        return "there is a global module hook, a TorchFunctionMode, or anomaly detection"
    if _python_dispatch._is_in_non_infra_torch_dispatch_mode:
        return "a TorchDispatchMode sees the operators of the calls"
    if torch._C._autograd._top_saved_tensors_default_hooks(False):
        return "there are hooks for saved tensors"
    if isinstance(x, Tensor) and autocast_active(x):
        return "autocast is on"
    return ""


def check_tensors(x: Any, target: Any) -> None:
    if not (isinstance(x, Tensor) and isinstance(target, Tensor) and are_plain(x, target)):
        raise Ordinary("input and target are not plain tensors")
    if any(t.layout is not torch.strided or t.is_nested or t.is_inference() for t in (x, target)):
        raise Ordinary("input or target is sparse, nested, or an inference tensor")
    if x.requires_grad or target.requires_grad:
        raise Ordinary("input or target requires a gradient")
    if x.device.type not in DEVICES or x.device.type == "meta":
        raise Ordinary(f"there are no kernels for {x.device.type}")


def check_parameters(parameters: Sequence[Tensor]) -> None:
    if len(set(parameters)) != len(parameters):
        raise Ordinary("a parameter is used twice")
    if not are_plain(*parameters):
        raise Ordinary("a parameter is not a plain tensor")
    for p in parameters:
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise Ordinary("a parameter has a hook")
        if not p.is_leaf:
            raise Ordinary("a weight is computed from other tensors")
        if not p.is_contiguous():  # the kernels of the update read memory in order
            raise Ordinary("a parameter is not contiguous")
    if not any(p.requires_grad for p in parameters):
        raise Ordinary("no parameter requires a gradient")
