"""One call per training step: forward, loss, backward and update of a chain of layers, with little Python in between.

A step of a small network is mostly calls: of modules, of autograd, of the optimizer for each parameter. Here it is one.
This module decides if a step can be done so, from all that the calls would read. It describes the step to a
``_C.StepPlan`` (``csrc/python/training.cpp``), and tells it which dicts, lists, classes and tensors must stay as they
are. The plan runs the next steps for as long as they do: the op ``_mlp_loss`` (``csrc/ops/autograd/mlp_loss.cpp``)
computes the loss and the gradients, and ``csrc/ops/update.cpp`` updates the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from dlkernels import _C, losses
from dlkernels._ops.activations import Activation, activation_named
from dlkernels._ops.losses import DEVICES, REDUCTIONS
from dlkernels._ops.modes import are_plain, autocast_active, under_transform
from dlkernels.fusion.call import STOCK_LINEAR
from dlkernels.fusion.chain import calls_in_order
from dlkernels.fusion.reading import CALLED, activation_of
from dlkernels.fusion.rules import linear_rule
from dlkernels.nn import MLP, LinearAct, LinearReLU, MLPEnsemble, StackedLinear
from dlkernels.nn.untouched import does_nothing, untouched
from dlkernels.trainer.step import use_one_call

__all__ = ["TrainingStep", "training_step"]

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
_OUR_LOSS_MODULES = (losses.MSELoss, losses.CrossEntropyLoss)

# By class: what a call of it runs, as it was at import.
_RUN_BY = {
    kind: tuple(
        (holder, name, getattr(holder, name))
        for holder, name in ((kind, "forward"), *([_FUNCTION_OF[kind]] if kind in _FUNCTION_OF else []))
    )
    for kind in (*_READ_FROM_DICT, *_FUNCTION_OF, *_OUR_LOSS_MODULES)
}
_MLP_FORWARD = MLP.forward
_STEPS: dict[Any, Any] = {kind: kind.step for kind in (optim.Adam, optim.AdamW, optim.SGD)}
_ZERO_GRAD = optim.Optimizer.zero_grad
_WITH_HOOKS = optim.Optimizer.profile_hook_step(lambda: None).__code__  # what torch puts around step

_MSE, _CROSS_ENTROPY = 0, 1  # LossKind of csrc/ops/autograd/mlp_loss.h


class _Ordinary(Exception):
    """This step runs by separate calls; the message says why."""


@dataclass
class _Chain:
    weights: list[Tensor]
    biases: list[Tensor | None]
    acts: list[int]
    slope: float | None  # of leaky_relu; None: there is none


@dataclass(frozen=True)
class _Loss:
    kind: int
    class_weight: Tensor | None
    reduction: int
    ignore_index: int
    label_smoothing: float


def training_step(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: optim.Optimizer,
    *,
    keep_grads: bool = False,
    exact: bool = False,
) -> TrainingStep:
    """Return ``step``; ``step(x, target)`` trains ``model`` on one batch and returns the loss.

    It does what these calls do::

        optimizer.zero_grad()
        value = loss(model(x), target)
        value.backward()
        optimizer.step()

    It takes one call where the model is one chain of linear layers and activations, the loss is the mean or sum of
    squared errors or a cross entropy, and the optimizer is torch's Adam, AdamW or SGD. Everything else runs by the
    calls above, and ``step.why`` says why. The decision is kept while nothing that it was read from has changed, so
    hooks, schedules, ``load_state_dict`` and ``model.eval()`` have the effect that they have on the calls. Parameters
    and the optimizer's state are where torch keeps them: checkpoints are the same, and any step may be done by the
    calls instead.

    The calls also run where somebody has replaced ``forward`` of a class in the chain or of the loss, the function of
    torch that it calls (``F.relu``, ``F.mse_loss``), or ``step`` or ``zero_grad`` of the optimizer's class.

    It cannot see hooks that other code put on autograd's accumulation nodes, as DistributedDataParallel does, nor
    functions that were replaced inside torch's optimizers or in ``torch.nn.Module``.

    The update is the one of ``optimizer`` with ``fused=True``, to the bit; without it torch rounds in another order. In
    float32 and float64 on CPU a kernel of ours makes it. It is compared with torch's once per process; where the bits
    differ, and in 16-bit dtypes and on CUDA, torch's kernel makes it.

    Of an :class:`dlkernels.nn.MLPEnsemble` each member has its own loss, and a step returns the losses of the members.
    Their sum is what is differentiated, so each member's gradient and update have the bits of the member trained alone
    where ``step.why`` is empty. x is ``[rows, in_features]`` for all members or ``[members, rows, in_features]``; the
    target is one member's, for all of them, or has the members as one dimension more in front::

        value = torch.stack([loss(output, target) for output in model(x)])
        value.sum().backward()

        >>> step = dlkernels.training_step(model, torch.nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))
        >>> for x, target in batches:
        ...     value = step(x, target)

    Args:
        model: an :class:`dlkernels.nn.MLP` or :class:`dlkernels.nn.MLPEnsemble`, or an ``nn.Sequential`` (fused or
            not) of linear layers and activations that have kernels; ``nn.Identity``, ``nn.Flatten`` before the first
            layer and inactive dropout may be among them. It may be any module: see above.
        loss: a module or function of (output, target): ``nn.MSELoss`` and ``nn.CrossEntropyLoss`` of torch or
            dlkernels, or ``mse_loss`` and ``cross_entropy`` of ``torch.nn.functional`` or ``dlkernels.losses``. Or any
            callable.
        optimizer: of the parameters of ``model``.
        keep_grads: leave each parameter's gradient in ``.grad``, as the calls do. Otherwise ``.grad`` is None after a
            step, and the gradients take no memory between steps.
        exact: take a step only where all its results have the bits of the calls: for an ``MLP``, a loss of
            ``dlkernels.losses`` and an optimizer with ``fused=True``. torch's layers and losses round in another order.

    Returns:
        A :class:`TrainingStep`. Its call returns the loss, detached; of an ensemble ``[members]``.

    Raises:
        TypeError: ``model`` is no module, ``loss`` is not callable, or ``optimizer`` is no optimizer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"training_step: model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise TypeError(f"training_step: loss must be callable with (output, target), got {type(loss).__name__}")
    if not isinstance(optimizer, optim.Optimizer):
        raise TypeError(f"training_step: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return TrainingStep(model, loss, optimizer, keep_grads, exact)


class TrainingStep:
    """See :func:`training_step`, which makes it.

    ``why`` is the reason why the last step ran by separate calls; it is empty if it did not.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: optim.Optimizer,
        keep_grads: bool,
        exact: bool,
    ) -> None:
        self.model, self.loss, self.optimizer, self.keep_grads, self.exact = model, loss, optimizer, keep_grads, exact
        self.why = ""
        self._plan: _C.StepPlan | None = None  # of the last step; why is empty then

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """Train on one batch: x [..., in_features], and the target that the loss takes. Return the loss, detached.

        Raises:
            RuntimeError, ValueError, TypeError: what the model, the loss or the optimizer raise for these tensors. An
                error before the update leaves the parameters as they were.
        """
        values = self._attempt(x, target, False)
        return self._by_calls(x, target) if values is None else values[0]

    def attempt(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
        """Train on one batch only if it can be done in one call. Return the loss and the model's output, detached.

        If it cannot, nothing is done, ``why`` says why, and the result is None. On the CPU nothing is updated if the
        loss is NaN or infinite.
        """
        return self._attempt(x, target, True)

    def _attempt(self, x: Tensor, target: Tensor, only_finite: bool) -> tuple[Tensor, Tensor] | None:
        model, loss, optimizer = self.model, self.loss, self.optimizer
        why = _unusual_context(x)
        if self._plan is not None and not why:
            values = self._plan.run(model, loss, optimizer, x, target, self.keep_grads, only_finite)
            if values is not None:
                optimizer._opt_called = True  # type: ignore[attr-defined]  # a schedule asks if a step came before it
                return values
        self._plan, self.why = None, why
        if why:
            return None
        try:
            if self.exact:
                _check_exact(model, loss, optimizer)
            made = _plan(model, loss, optimizer, x, target)
            values = made.plan.run(model, loss, optimizer, x, target, self.keep_grads, only_finite)
            if values is None:
                raise _Ordinary("a setting of the optimizer is no number")
        except _Ordinary as reason:
            self.why = str(reason)
            return None
        optimizer._opt_called = True  # type: ignore[attr-defined]
        if made.expect_all():
            self._plan = made.plan
        return values

    def _by_calls(self, x: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        if isinstance(self.model, MLPEnsemble):
            value = _losses_of_members(self.loss, self.model(x), target)
            value.sum().backward()
        else:
            value = self.loss(self.model(x), target)
            value.backward()
        self.optimizer.step()
        if not self.keep_grads:
            self.optimizer.zero_grad()
        return value.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}


def _has_members(target: Tensor) -> bool:
    """Return True if a target has the members in front: [members, rows, ...], or of indices [members, rows]."""
    return target.dim() >= (3 if target.is_floating_point() else 2)


def _losses_of_members(loss: Any, outputs: Tensor, target: Tensor) -> Tensor:
    own = _has_members(target)
    if own and len(target) != len(outputs):
        raise ValueError(
            f"training_step: the ensemble has {len(outputs)} members; target must be [{len(outputs)}, rows, ...], or "
            f"one member's for all of them; got {tuple(target.shape)}"
        )
    return torch.stack([loss(y, target[i] if own else target) for i, y in enumerate(outputs)])


# ---- the plan --------------------------------------------------------------------------------------------------------


@dataclass
class _Made:
    """A plan, and the objects that were read for it."""

    plan: _C.StepPlan
    model: nn.Module
    loss: Any
    optimizer: optim.Optimizer
    states: list[dict[str, Any]]

    def expect_all(self) -> bool:
        """Tell the plan what must stay as it is. Return False if its expectations cannot cover all that was read."""
        modules = [self.model, *self.model._modules.values()]
        if not all(type(module) in _READ_FROM_DICT for module in modules[1:]):
            return False  # its rule may read anything
        plan, kind = self.plan, type(self.model)
        kind = kind.__dict__.get("_fused_from", kind)
        for name in ("forward", "__iter__", *CALLED):
            if hasattr(kind, name):
                plan.expect_attribute(kind, name, getattr(kind, name))
        for holder, name, value in _run_by(self.model, self.loss):
            plan.expect_attribute(holder, name, value)
        for name in ("step", "zero_grad"):
            plan.expect_attribute(type(self.optimizer), name, getattr(type(self.optimizer), name))
        for owner in (*modules, *([self.loss] if isinstance(self.loss, nn.Module) else ()), self.optimizer):
            plan.expect_class(owner)
            plan.expect_dict(owner.__dict__, ())
            for value in owner.__dict__.values():
                if isinstance(value, dict):
                    plan.expect_dict(value, ())
        for hooks in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks):
            plan.expect_dict(hooks, ())
        plan.expect_list(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            plan.expect_dict(group, _NUMBERS)
            plan.expect_list(group["params"])
        for state in self.states:
            plan.expect_dict(state, ())
        return True


def _check_exact(model: nn.Module, loss: Any, optimizer: optim.Optimizer) -> None:
    if type(model) is not MLP or model._chain() is None:
        raise _Ordinary("the model does not run as one chain of our layers")
    if type(loss) not in _OUR_LOSS_MODULES and loss not in _OUR_LOSSES:
        raise _Ordinary("the loss is none of ours")
    if not all(group.get("fused") is True for group in optimizer.param_groups):
        raise _Ordinary("the optimizer is not fused")


def _plan(model: nn.Module, loss: Any, optimizer: optim.Optimizer, x: Tensor, target: Tensor) -> _Made:
    _check_tensors(x, target)
    for holder, name, value in _run_by(model, loss):
        if getattr(holder, name) is not value:
            raise _Ordinary(f"{holder.__name__}.{name} was replaced")
    rows, chain = _chain_of(model, x)
    parameters = [t for t in (*chain.weights, *chain.biases) if t is not None]
    if rows.dtype != parameters[0].dtype or rows.device != parameters[0].device:
        raise _Ordinary("input and parameters differ in dtype or device")
    _check_parameters(parameters)
    of_members = isinstance(model, MLPEnsemble)
    if any(weight.dim() != 2 + of_members for weight in chain.weights):
        raise _Ordinary("a weight is no matrix")
    one_target = target
    if of_members:
        rows, one_target = _of_one_member(chain.weights[0].shape[0], x, target)
    settings = _loss_of(loss, rows, one_target, chain.weights[-1].shape[-2])
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
    states = _add_groups(plan, optimizer, [p for p in parameters if p.requires_grad])
    plan.clear_gradients_of([p for group in optimizer.param_groups for p in group["params"]])
    return _Made(plan, model, loss, optimizer, states)


def _run_by(model: nn.Module, loss: Any) -> list[tuple[Any, str, Any]]:
    """Return what the calls run, as it was at import: the holder, the name, and the value there."""
    kinds = {type(module) for module in (*model._modules.values(), loss)}
    return [entry for kind in kinds for entry in _RUN_BY.get(kind, ())]


# ---- the context -----------------------------------------------------------------------------------------------------


def _unusual_context(x: Any) -> str:
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
    if torch._C._autograd._top_saved_tensors_default_hooks(False):
        return "there are hooks for saved tensors"
    if isinstance(x, Tensor) and autocast_active(x):
        return "autocast is on"
    return ""


def _check_tensors(x: Any, target: Any) -> None:
    if not (isinstance(x, Tensor) and isinstance(target, Tensor) and are_plain(x, target)):
        raise _Ordinary("input and target are not plain tensors")
    if any(t.layout is not torch.strided or t.is_nested or t.is_inference() for t in (x, target)):
        raise _Ordinary("input or target is sparse, nested, or an inference tensor")
    if x.requires_grad or target.requires_grad:
        raise _Ordinary("input or target requires a gradient")
    if x.device.type not in DEVICES or x.device.type == "meta":
        raise _Ordinary(f"there are no kernels for {x.device.type}")


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    if len(set(parameters)) != len(parameters):
        raise _Ordinary("a parameter is used twice")
    if not are_plain(*parameters):
        raise _Ordinary("a parameter is not a plain tensor")
    for p in parameters:
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise _Ordinary("a parameter has a hook")
        if not p.is_leaf:
            raise _Ordinary("a weight is computed from other tensors")
        if not p.is_contiguous():  # the kernels of the update read memory in order
            raise _Ordinary("a parameter is not contiguous")
    if not any(p.requires_grad for p in parameters):
        raise _Ordinary("no parameter requires a gradient")


# ---- the model -------------------------------------------------------------------------------------------------------


def _of_one_member(members: int, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return an input and a target of one member of an ensemble."""
    if x.dim() not in (2, 3) or (x.dim() == 3 and len(x) != members):
        raise _Ordinary("the input is neither [rows, features] nor [members, rows, features]")
    own = _has_members(target)
    if own and len(target) != members:
        raise _Ordinary("the target has another number of members")
    return x if x.dim() == 2 else x[0], target[0] if own else target


def _chain_of(model: nn.Module, x: Tensor) -> tuple[Tensor, _Chain]:
    """Return the model's layers, and x as its first layer gets it."""
    kind = type(model)
    if kind is MLPEnsemble:
        if not all(untouched(module) for module in (model, *model._modules.values()) if module is not None):
            raise _Ordinary("the model has a hook, or its forward was replaced or compiled")
        chain = _Chain([], [], [], None)
        for layer in model._modules.values():
            if type(layer) is not StackedLinear:
                raise _Ordinary(f"the ensemble has a {type(layer).__name__} among its layers")
            _add(chain, layer.weight, layer.bias)
            _set_activation(chain, str(model.activation), 0.01)
        _set_activation(chain, "none", 0.01)
        return x, chain
    if not (isinstance(model, nn.Sequential) and (calls_in_order(kind) or calls_in_order(kind, _MLP_FORWARD))):
        raise _Ordinary(f"the model is a {kind.__name__}, not an nn.Sequential or MLP")
    if not untouched(model):
        raise _Ordinary("the model has a hook, or its forward was replaced or compiled")
    chain = _Chain([], [], [], None)
    ready = False  # the last layer of the chain can take an activation
    for module in model._modules.values():
        if module is None:
            raise _Ordinary("the model has a None among its modules")
        if not untouched(module):
            raise _Ordinary(f"a {type(module).__name__} has a hook, or its forward was replaced or compiled")
        kind = type(module)
        if does_nothing(module):
            continue
        if isinstance(module, nn.Flatten) and not chain.weights and _is_flatten_of_samples(module, x):
            x = x.flatten(1)
        elif isinstance(module, LinearAct) and kind in (LinearAct, LinearReLU):
            _add(chain, module.weight, module.bias)
            _set_activation(chain, module.activation, module.negative_slope)
            ready = module.activation == "none"
        elif (rule := linear_rule(kind)) is not None:
            parameters = rule(module)
            if parameters is None:
                raise _Ordinary(f"the parameters of a {kind.__name__} are computed from other tensors")
            _add(chain, *parameters)
            ready = True
        else:
            known = activation_of(module)
            if known is None or not ready:
                raise _Ordinary(f"the model has a {kind.__name__} that is in no chain of layers")
            _set_activation(chain, *known)
            ready = False
    if not chain.weights:
        raise _Ordinary("the model has no linear layer")
    return x, chain


def _is_flatten_of_samples(module: nn.Flatten, x: Tensor) -> bool:
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1) and x.dim() > 1


def _add(chain: _Chain, weight: Tensor, bias: Tensor | None) -> None:
    chain.weights.append(weight)
    chain.biases.append(bias)
    chain.acts.append(0)


def _set_activation(chain: _Chain, name: str, slope: float) -> None:
    act: Activation = activation_named(name)
    if name == "leaky_relu":
        if chain.slope not in (None, slope):
            raise _Ordinary("the slopes of leaky_relu differ")
        chain.slope = slope
    chain.acts[-1] = act.code


# ---- the loss --------------------------------------------------------------------------------------------------------

_MODULES = {
    nn.MSELoss: _MSE,
    losses.MSELoss: _MSE,
    nn.CrossEntropyLoss: _CROSS_ENTROPY,
    losses.CrossEntropyLoss: _CROSS_ENTROPY,
}
_OUR_LOSSES = (losses.mse_loss, losses.cross_entropy)
_FUNCTIONS: dict[Any, _Loss] = {
    **dict.fromkeys((F.mse_loss, losses.mse_loss), _Loss(_MSE, None, 1, -100, 0.0)),
    **dict.fromkeys((F.cross_entropy, losses.cross_entropy), _Loss(_CROSS_ENTROPY, None, 1, -100, 0.0)),
}


def _loss_of(loss: Any, x: Tensor, target: Tensor, out_features: int) -> _Loss:
    """Return the loss. Targets that torch would broadcast or convert are left to the calls."""
    found = _settings_of(loss)
    output = (*x.shape[:-1], out_features)
    is_like_output = target.shape == output and target.dtype == x.dtype
    if (target.is_floating_point() or found.kind == _MSE) and not is_like_output:
        raise _Ordinary("output and target differ in shape or dtype")
    if found.kind == _CROSS_ENTROPY and x.dim() < 2:
        raise _Ordinary("the output has no batch")
    weight = found.class_weight
    if weight is not None and (weight.requires_grad or not are_plain(weight) or weight.dtype != x.dtype):
        raise _Ordinary("the weight of the loss requires a gradient or has another dtype")
    return found


def _settings_of(loss: Any) -> _Loss:
    kind = _MODULES.get(type(loss))
    if kind is None:
        found = _FUNCTIONS.get(loss) if type(loss) is FunctionType else None
        if found is None:
            raise _Ordinary(f"the loss is {getattr(loss, '__name__', type(loss).__name__)}")
        return found
    if not untouched(loss):
        raise _Ordinary("the loss has a hook, or its forward was replaced or compiled")
    if loss.reduction not in ("mean", "sum"):
        raise _Ordinary(f"the loss has the reduction {loss.reduction!r}")
    reduction = REDUCTIONS.index(loss.reduction)
    if kind == _MSE:
        return _Loss(kind, None, reduction, -100, 0.0)
    return _Loss(kind, loss.weight, reduction, loss.ignore_index, loss.label_smoothing)


# ---- the update ------------------------------------------------------------------------------------------------------

_NUMBERS = ("lr", "weight_decay", "eps", "betas", "momentum", "dampening")  # schedules may set them at each step


def _add_groups(plan: _C.StepPlan, optimizer: optim.Optimizer, trained: list[Tensor]) -> list[dict[str, Any]]:
    """Add the optimizer's groups to the plan. Return the states of the parameters."""
    kind = type(optimizer)
    if kind not in _KINDS:
        raise _Ordinary(f"the optimizer is a {kind.__name__}")
    if (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    ):
        raise _Ordinary("the optimizer has a hook")
    hooked = getattr(kind.step, "__code__", None) is _WITH_HOOKS
    if _STEPS[kind] not in (kind.step, hooked and kind.step.__wrapped__) or kind.zero_grad is not _ZERO_GRAD:  # type: ignore[attr-defined]
        raise _Ordinary(f"step or zero_grad of {kind.__name__} was replaced")
    step = optimizer.__dict__.get("step")  # a schedule wraps it
    if "zero_grad" in optimizer.__dict__ or (step is not None and getattr(step, "__wrapped__", None) is not kind.step):
        raise _Ordinary("the optimizer's step or zero_grad was replaced")
    if hasattr(optimizer, "grad_scale") or hasattr(optimizer, "found_inf"):
        raise _Ordinary("the gradients are scaled")
    place = {p: i for i, p in enumerate(trained)}
    covered: list[Tensor] = []
    for group in optimizer.param_groups:
        mine = [p for p in group["params"] if p in place]
        covered += mine
        if mine:
            rule, *states = _KINDS[kind](optimizer, group, mine)
            plan.add_group(group, rule, [place[p] for p in mine], mine, *states)
    if len(covered) != len(trained) or set(covered) != set(trained):
        raise _Ordinary("the optimizer does not have all parameters of the model")
    return [state for p in trained if (state := optimizer.state.get(p)) is not None]


def _check_numbers(group: dict[str, Any], *names: str) -> None:
    for name in names:
        value = group[name]
        if isinstance(value, Tensor) and not (are_plain(value) and value.is_cpu and value.numel() == 1):
            raise _Ordinary(f"{name} of the optimizer is a tensor of another kind than one number on the CPU")


def _states(optimizer: optim.Optimizer, parameters: Sequence[Tensor], *names: str) -> list[list[Tensor]]:
    """Return a list of states per name. torch makes them in the first step."""
    states = [optimizer.state.get(p) for p in parameters]
    if not all(state and all(state.get(name) is not None for name in names) for state in states):
        raise _Ordinary("the optimizer makes its state in its first step")
    found = [[state[name] for state in states if state is not None] for name in names]
    for name, tensors in zip(names, found, strict=True):
        for t, p in zip(tensors, parameters, strict=True):
            if name == "step":
                if not (are_plain(t) and t.device == p.device and t.numel() == 1 and t.dtype in _STEP_DTYPES):
                    raise _Ordinary("on this device the optimizer needs fused=True")
            elif not (are_plain(t) and t.is_contiguous() and _is_like(t, p)):
                raise _Ordinary("a state of the optimizer is not like its parameter")
    return found


def _is_like(t: Tensor, p: Tensor) -> bool:
    return t.shape == p.shape and t.dtype == p.dtype and t.device == p.device


_STEP_DTYPES = (torch.float32, torch.float64)
_Update = tuple[int, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]  # rule, and the states in torch's order
_ADAM, _ADAMW, _SGD = range(3)  # UpdateRule of csrc/kernels/cpu/kernels.h


def _adam(optimizer: optim.Optimizer, group: dict[str, Any], parameters: list[Tensor]) -> _Update:
    _check_numbers(group, "lr", "weight_decay", "eps")
    if group.get("capturable") or group.get("differentiable") or isinstance(group["betas"][0], Tensor):
        raise _Ordinary("the optimizer is capturable or differentiable")
    means, squares, steps = _states(optimizer, parameters, "exp_avg", "exp_avg_sq", "step")
    maxima = _states(optimizer, parameters, "max_exp_avg_sq")[0] if group["amsgrad"] else []
    decoupled = group.get("decoupled_weight_decay", type(optimizer) is optim.AdamW)
    return _ADAMW if decoupled else _ADAM, means, squares, maxima, steps


def _sgd(optimizer: optim.Optimizer, group: dict[str, Any], parameters: list[Tensor]) -> _Update:
    _check_numbers(group, "lr", "momentum", "dampening", "weight_decay")
    if group.get("differentiable"):
        raise _Ordinary("the optimizer is capturable or differentiable")
    buffers = _states(optimizer, parameters, "momentum_buffer")[0] if group["momentum"] else []
    return _SGD, buffers, [], [], []


_KINDS = {optim.Adam: _adam, optim.AdamW: _adam, optim.SGD: _sgd}

use_one_call(lambda model, loss, optimizer: TrainingStep(model, loss, optimizer, keep_grads=True, exact=True))
