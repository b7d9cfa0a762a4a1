"""The optimizer: its groups and states, or the reason why our update does not do what its ``step`` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from dlkernels import _C
from dlkernels._ops.modes import are_plain
from dlkernels.training.context import Ordinary

_STEPS: dict[Any, Any] = {kind: kind.step for kind in (optim.Adam, optim.AdamW, optim.SGD)}

_ZERO_GRAD = optim.Optimizer.zero_grad

_WITH_HOOKS = optim.Optimizer.profile_hook_step(lambda: None).__code__  # what torch puts around step

NUMBERS = ("lr", "weight_decay", "eps", "betas", "momentum", "dampening")  # schedules may set them at each step


def add_groups(plan: _C.StepPlan, optimizer: optim.Optimizer, trained: list[Tensor]) -> list[dict[str, Any]]:
    """Add the optimizer's groups to the plan. Return the states of the parameters."""
    kind = type(optimizer)
    if kind not in _KINDS:
        raise Ordinary(f"the optimizer is a {kind.__name__}")
    if (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    ):
        raise Ordinary("the optimizer has a hook")
    hooked = getattr(kind.step, "__code__", None) is _WITH_HOOKS
    if _STEPS[kind] not in (kind.step, hooked and kind.step.__wrapped__) or kind.zero_grad is not _ZERO_GRAD:  # type: ignore[attr-defined]
        raise Ordinary(f"step or zero_grad of {kind.__name__} was replaced")
    step = optimizer.__dict__.get("step")  # a schedule wraps it
    if "zero_grad" in optimizer.__dict__ or (step is not None and getattr(step, "__wrapped__", None) is not kind.step):
        raise Ordinary("the optimizer's step or zero_grad was replaced")
    if hasattr(optimizer, "grad_scale") or hasattr(optimizer, "found_inf"):
        raise Ordinary("the gradients are scaled")
    place = {p: i for i, p in enumerate(trained)}
    covered: list[Tensor] = []
    for group in optimizer.param_groups:
        mine = [p for p in group["params"] if p in place]
        covered += mine
        if mine:
            rule, *states = _KINDS[kind](optimizer, group, mine)
            plan.add_group(group, rule, [place[p] for p in mine], mine, *states)
    if len(covered) != len(trained) or set(covered) != set(trained):
        raise Ordinary("the optimizer does not have all parameters of the model")
    return [state for p in trained if (state := optimizer.state.get(p)) is not None]


def _check_numbers(group: dict[str, Any], parameters: Sequence[Tensor], *names: str) -> None:
    for name in names:
        value = group[name]
        if not isinstance(value, Tensor):
            continue
        one = are_plain(value) and value.numel() == 1
        rate_on_gpu = name == "lr" and value.dtype == torch.float32 and parameters[0].device == value.device
        if not one or not (value.is_cpu or rate_on_gpu):
            raise Ordinary(
                f"{name} of the optimizer is a tensor of another kind than one number on the CPU"
                + (", or in float32 beside the parameters" if name == "lr" else "")
            )


def _states(optimizer: optim.Optimizer, parameters: Sequence[Tensor], *names: str) -> list[list[Tensor]]:
    """Return a list of states per name. torch makes them in the first step."""
    states = [optimizer.state.get(p) for p in parameters]
    if not all(state and all(state.get(name) is not None for name in names) for state in states):
        raise Ordinary("the optimizer makes its state in its first step")
    found = [[state[name] for state in states if state is not None] for name in names]
    for name, tensors in zip(names, found, strict=True):
        for t, p in zip(tensors, parameters, strict=True):
            if name == "step":
                if not (are_plain(t) and t.device == p.device and t.numel() == 1 and t.dtype in _STEP_DTYPES):
                    raise Ordinary("on this device the optimizer needs fused=True or capturable=True")
            elif not (are_plain(t) and t.is_contiguous() and _is_like(t, p)):
                raise Ordinary("a state of the optimizer is not like its parameter")
    return found


def _is_like(t: Tensor, p: Tensor) -> bool:
    return t.shape == p.shape and t.dtype == p.dtype and t.device == p.device


_STEP_DTYPES = (torch.float32, torch.float64)

_Update = tuple[int, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]  # rule, and the states in torch's order

_ADAM, _ADAMW, _SGD = range(3)  # UpdateRule of csrc/kernels/cpu/kernels.h


def _adam(optimizer: optim.Optimizer, group: dict[str, Any], parameters: list[Tensor]) -> _Update:
    _check_numbers(group, parameters, "lr", "weight_decay", "eps")
    if group.get("differentiable") or isinstance(group["betas"][0], Tensor):
        raise Ordinary("the optimizer is differentiable")
    if group.get("capturable") and not parameters[0].is_cuda:
        raise Ordinary("the optimizer is capturable, which is for GPUs")
    means, squares, steps = _states(optimizer, parameters, "exp_avg", "exp_avg_sq", "step")
    maxima = _states(optimizer, parameters, "max_exp_avg_sq")[0] if group["amsgrad"] else []
    decoupled = group.get("decoupled_weight_decay", type(optimizer) is optim.AdamW)
    return _ADAMW if decoupled else _ADAM, means, squares, maxima, steps


def _sgd(optimizer: optim.Optimizer, group: dict[str, Any], parameters: list[Tensor]) -> _Update:
    _check_numbers(group, parameters, "lr", "momentum", "dampening", "weight_decay")
    if group.get("differentiable"):
        raise Ordinary("the optimizer is differentiable")
    buffers = _states(optimizer, parameters, "momentum_buffer")[0] if group["momentum"] else []
    return _SGD, buffers, [], [], []


_KINDS = {optim.Adam: _adam, optim.AdamW: _adam, optim.SGD: _sgd}
