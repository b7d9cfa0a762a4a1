"""The public function and the step that it returns: one call where a plan can be made, else the separate calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim

from dlkernels import _C
from dlkernels.nn import MLPEnsemble
from dlkernels.training.chain import has_members
from dlkernels.training.context import Ordinary, unusual_context
from dlkernels.training.plan import make_plan


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

    On CUDA a call is a sequence of launches that a CUDA graph can capture, if the optimizer has its state
    (``capturable=True``, after a first step): nothing waits for the GPU. The graph reads a learning rate that is a
    float32 tensor there at each replay; a number is frozen.

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
            layer and inactive dropout may be among them, and all of them may lie in inner Sequentials and MLPs. It may
            be any module: see above.
        loss: a module or function of (output, target): ``nn.MSELoss`` and ``nn.CrossEntropyLoss`` of torch or
            dlkernels, or ``mse_loss`` and ``cross_entropy`` of ``torch.nn.functional`` or ``dlkernels.losses``. Or any
            callable.
        optimizer: of the parameters of ``model``.
        keep_grads: leave each parameter's gradient in ``.grad``, as the calls do. Otherwise ``.grad`` is None after a
            step, and the gradients take no memory between steps. Within a step they do: those of all layers, or, on the
            CPU in networks with more than 8 MiB of weights, those of one layer at a time.
        exact: take a step only where all its results have the bits of the calls: for an ``MLP`` or a Sequential that
            ``fuse`` made one chain, a loss of ``dlkernels.losses`` and an optimizer with ``fused=True``. torch's layers
            and losses, and its optimizers without ``fused=True``, round in another order.

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
                error before the update leaves the parameters as they were. In large networks on CPU that of the last
                layers comes before the backward of the first ones, so memory must not run out in between.
        """
        values = self._attempt(x, target, False)
        return self._by_calls(x, target) if values is None else values[0]

    def attempt(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
        """Train on one batch only if it can be done in one call. Return the loss and the model's output, detached.

        If it cannot, nothing is done, ``why`` says why, and the result is None. So it is with an ensemble, whose one
        call has a loss for each member, and not the loss of the separate calls. On the CPU nothing is updated if the
        loss is NaN or infinite.
        """
        if isinstance(self.model, MLPEnsemble):
            self.why = "the one call of an ensemble has a loss for each member"
            return None
        return self._attempt(x, target, True)

    def _attempt(self, x: Tensor, target: Tensor, only_finite: bool) -> tuple[Tensor, Tensor] | None:
        model, loss, optimizer = self.model, self.loss, self.optimizer
        why = unusual_context(x)
        if self._plan is not None and not why:
            values = self._plan.run(model, loss, optimizer, x, target, self.keep_grads, only_finite)
            if values is not None:
                optimizer._opt_called = True  # type: ignore[attr-defined]  # a schedule asks if a step came before it
                return values
        self._plan, self.why = None, why
        if why:
            return None
        try:
            made = make_plan(model, loss, optimizer, x, target, self.exact)
            values = made.plan.run(model, loss, optimizer, x, target, self.keep_grads, only_finite)
            if values is None:
                raise Ordinary("a setting of the optimizer is no number")
        except Ordinary as reason:
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


def _losses_of_members(loss: Any, outputs: Tensor, target: Tensor) -> Tensor:
    own = has_members(target)
    if own and len(target) != len(outputs):
        raise ValueError(
            f"training_step: the ensemble has {len(outputs)} members; target must be [{len(outputs)}, rows, ...], or "
            f"one member's for all of them; got {tuple(target.shape)}"
        )
    return torch.stack([loss(y, target[i] if own else target) for i, y in enumerate(outputs)])
