"""From model, loss, optimizer and batch to a ``_C.StepPlan``, and to all that must stay as it is while that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from dlkernels import _C
from dlkernels.fusion.reading import CALLED
from dlkernels.nn import LinearAct, LinearReLU, MLPEnsemble, StackedLinear
from dlkernels.training.chain import Chain, chain_of, of_one_member
from dlkernels.training.context import Ordinary, check_parameters, check_tensors
from dlkernels.training.exact import check_exact
from dlkernels.training.loss import OUR_LOSS_MODULES, loss_of
from dlkernels.training.update import NUMBERS, add_groups

# Modules whose part in a chain follows from their ``__dict__`` and the dicts in it.
_READ_FROM_DICT = {
    *(nn.Linear, LinearAct, LinearReLU, StackedLinear, nn.Identity, nn.Dropout, nn.Flatten),
    *(nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid),
}

# The function of torch that the forward of a class calls, besides the linear map.
_FUNCTION_OF: dict[Any, tuple[Any, str]] = {
    nn.ReLU: (F, "relu"),
    nn.LeakyReLU: (F, "leaky_relu"),
    nn.GELU: (F, "gelu"),
    nn.SiLU: (F, "silu"),
    nn.Tanh: (torch, "tanh"),
    nn.Sigmoid: (torch, "sigmoid"),
    nn.Dropout: (F, "dropout"),
    nn.MSELoss: (F, "mse_loss"),
    nn.CrossEntropyLoss: (F, "cross_entropy"),
}

# By class: what a call of it runs, as it was at import.
_RUN_BY = {
    kind: tuple(
        (holder, name, getattr(holder, name))
        for holder, name in ((kind, "forward"), *([_FUNCTION_OF[kind]] if kind in _FUNCTION_OF else []))
    )
    for kind in (*_READ_FROM_DICT, *_FUNCTION_OF, *OUR_LOSS_MODULES)
}


@dataclass
class Made:
    """A plan, and the objects that were read for it."""

    plan: _C.StepPlan
    chain: Chain
    loss: Any
    optimizer: optim.Optimizer
    states: list[dict[str, Any]]

    def expect_all(self) -> bool:
        """Tell the plan what must stay as it is. Return False if its expectations cannot cover all that was read."""
        plan, chain = self.plan, self.chain
        if not all(type(module) in _READ_FROM_DICT for module in chain.modules):
            return False  # its rule may read anything
        for kind in {type(container) for container in chain.containers}:
            kind = kind.__dict__.get("_fused_from", kind)
            for name in ("forward", "__iter__", *CALLED):
                if hasattr(kind, name):
                    plan.expect_attribute(kind, name, getattr(kind, name))
        for holder, name, value in _run_by(chain, self.loss):
            plan.expect_attribute(holder, name, value)
        for name in ("step", "zero_grad"):
            plan.expect_attribute(type(self.optimizer), name, getattr(type(self.optimizer), name))
        loss = [self.loss] if isinstance(self.loss, nn.Module) else []
        for owner in (*chain.containers, *chain.modules, *loss, self.optimizer):
            plan.expect_class(owner)
            plan.expect_dict(owner.__dict__, ())
            for value in owner.__dict__.values():
                if isinstance(value, dict):
                    plan.expect_dict(value, ())
        for hooks in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks):
            plan.expect_dict(hooks, ())
        plan.expect_list(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            plan.expect_dict(group, NUMBERS)
            plan.expect_list(group["params"])
        for state in self.states:
            plan.expect_dict(state, ())
        return True


def make_plan(
    model: nn.Module, loss: Any, optimizer: optim.Optimizer, x: Tensor, target: Tensor, exact: bool = False
) -> Made:
    """Return the plan; raise ``Ordinary`` if there is none, or, with ``exact``, if it may have other bits."""
    check_tensors(x, target)
    rows, chain = chain_of(model, x)
    if exact:
        check_exact(model, chain, loss, optimizer, x)
    for holder, name, value in _run_by(chain, loss):
        if getattr(holder, name) is not value:
            raise Ordinary(f"{holder.__name__}.{name} was replaced")
    parameters = [t for t in (*chain.weights, *chain.biases) if t is not None]
    if rows.dtype != parameters[0].dtype or rows.device != parameters[0].device:
        raise Ordinary("input and parameters differ in dtype or device")
    check_parameters(parameters)
    of_members = isinstance(model, MLPEnsemble)
    if any(weight.dim() != 2 + of_members for weight in chain.weights):
        raise Ordinary("a weight is no matrix")
    one_target = target
    if of_members:
        rows, one_target = of_one_member(chain.weights[0].shape[0], x, target)
    settings = loss_of(loss, rows, one_target, chain.weights[-1].shape[-2])
    plan = _C.StepPlan(
        (model, loss, optimizer),
        x,
        target,
        rows is not x and not of_members,
        chain.weights,
        chain.biases,
        chain.acts,
        chain.slope or 0.0,
        settings.kind,
        settings.class_weight,
        settings.reduction,
        settings.ignore_index,
        settings.label_smoothing,
    )
    states = add_groups(plan, optimizer, [p for p in parameters if p.requires_grad])
    plan.clear_gradients_of([p for group in optimizer.param_groups for p in group["params"]])
    return Made(plan, chain, loss, optimizer, states)


def _run_by(chain: Chain, loss: Any) -> list[tuple[Any, str, Any]]:
    """Return what the calls run, as it was at import: the holder, the name, and the value there."""
    kinds = {type(module) for module in (*chain.modules, loss)}
    return [entry for kind in kinds for entry in _RUN_BY.get(kind, ())]
