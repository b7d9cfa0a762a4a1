"""The functions that a rewritten method calls in place of ``act(linear(x))``.

Each call decides as module ``call`` does, or finds that an earlier decision still holds (``memory``).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dlkernels._ops.modes import are_plain
from dlkernels.fusion import call as calls
from dlkernels.fusion import memory
from dlkernels.fusion.functional import as_layer, key_of, parameters_given
from dlkernels.fusion.rules import identity, works_in_place
from dlkernels.fusion.stages import Chain, Stage

_NO_KEYWORDS: dict[str, Any] = {}


def _run_again(self: Any, act: Any, linear: Any, x: Any, given: memory.Given = ()) -> Tensor | None:
    """Return ``act(linear(x))`` if it was decided before to fuse the two, and the decision holds; else None."""
    if given is None or torch.compiler.is_dynamo_compiling():
        return None
    key = id(self), id(act), key_of(linear), *given
    if isinstance(linear, nn.Module):
        return memory.run_again(key, self, x)
    return memory.run_again(key, self, x, *parameters_given(linear))


def _decide(
    self: Any, act: Any, linear: Any, x: Any, args: Any, kwargs: Any, given: memory.Given = ()
) -> str | calls.Ready:  # fmt: skip
    """Decide, and remember the decision to fuse; with ``given`` None nothing is remembered."""
    decision = calls.decide(self, act, linear, x, args, kwargs)
    if given is not None and not isinstance(decision, str):
        _remember(self, Stage(act, args, kwargs), linear, x, decision, given)
    return decision


def _remember(self: Any, act: Stage, linear: Any, x: Any, ready: calls.Ready, given: tuple[Any, ...]) -> None:
    if torch.compiler.is_dynamo_compiling() or calls.watcher is not None:
        return
    key = id(self), id(act.called), key_of(linear), *given
    if memory.is_unknown(key) or not memory.may_be_kept(x):
        return
    if given and memory.has_too_many_variants(key, key[:3]):
        return
    chain = Chain((ready,), (1,), 0, 1)
    decided = memory.decided(memory.Reads(self), (Stage(linear), act), chain, (self,))
    memory.keep_or_give_up(key, decided)


def call(self: Any, act: Any, linear: Any, x: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``act(linear(x), *args, **kwargs)``, where the further arguments are constants."""
    given = memory.given_of(args, kwargs)
    if (y := _run_again(self, act, linear, x, given)) is not None:
        return y
    linear = as_layer(linear)
    decision = _decide(self, act, linear, x, args, kwargs, given)
    if calls.watcher is not None:
        calls.watcher(self, linear, act, x, decision, args, kwargs)
    return act(linear(x), *args, **kwargs) if isinstance(decision, str) else calls._run(x, decision)


def call_with_deferred_arguments(
    self: Any, act: Any, linear: Any, x: Any, arguments: Callable[[], tuple[Any, Any]], /
) -> Any:
    """The same, where the layer's call may change the further arguments: ``arguments()`` returns their values now."""
    args, kwargs = arguments()
    given = memory.given_of(args, kwargs)
    if (y := _run_again(self, act, linear, x, given)) is not None:
        return y
    linear = as_layer(linear)
    decision = _decide(self, act, linear, x, args, kwargs, given)
    if calls.watcher is not None:
        calls.watcher(self, linear, act, x, decision, args, kwargs)
    if not isinstance(decision, str):
        return calls._run(x, decision)
    z = linear(x)
    args, kwargs = arguments()
    return act(z, *args, **kwargs)


def linear_or_fused(
    self: Any, linear: Any, x: Any, act: Any, /, args: Any = (), kwargs: Any = _NO_KEYWORDS, between: Any = ()
) -> tuple[Any, bool]:
    """Return ``(act(linear(x)), True)``, fused, or ``(linear(x), False)``.

    The value goes to ``act`` some statements later and nowhere else. There the flag says that act was already applied.
    """
    given = memory.given_of(args, kwargs) if len(between) == 0 else None  # Dynamo cannot negate a tuple of objects
    if (y := _run_again(self, act, linear, x, given)) is not None:
        return y, True
    linear = as_layer(linear)
    decision = _decide(self, act, linear, x, args, kwargs, given)
    if not isinstance(decision, str) and not all(_is_harmless(*part) for part in between):
        decision = "a call between it and the activation may have a side effect"
    if calls.watcher is not None:
        calls.watcher(self, linear, act, x, decision, args, kwargs)
    return (linear(x), False) if isinstance(decision, str) else (calls._run(x, decision), True)


def in_place(act: Any, keywords: dict[str, Any], /) -> Any:
    """Return the activation of a statement ``F.relu_(h)``; None, which nothing fuses, if it does not overwrite h."""
    return act if works_in_place(act, keywords) else None


def linear_or_fused_if(self: Any, linear: Any, x: Any, early: Callable[[], Any], /) -> tuple[Any, bool]:
    """The same, where ``early()`` returns what comes after x, or something false if act will not be called.

    It looks names up and compares numbers. An error of it is raised where the source does the same.
    """
    try:
        meant = early()
    except (NameError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError):
        meant = None
    return linear_or_fused(self, linear, x, *meant) if type(meant) is tuple else (as_layer(linear)(x), False)


def _is_harmless(called: Any, index: Any, x: Any) -> bool:
    """Return True if ``called(x)``, or ``called[index](x)``, calls a layer or an activation without hooks.

    ``x`` is None if it is the result of another such call.
    """
    if index is not None:
        if type(called) not in _CONTAINERS:
            return False
        called = called[index]
    called = as_layer(called)
    if x is not None and (not are_plain(x) or x.device.type not in calls.DEVICES):  # see module reading
        return False
    return not (calls.why_not_linear(called) and calls.why_not_activation(called))


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, list, tuple)


def linear_forward(self: Any, input: Any) -> Any:
    """The forward of a linear layer without an activation."""
    if (y := _run_again(self, identity, self, input)) is not None:
        return y
    decision = _decide(self, identity, self, input, (), {})
    if calls.watcher is not None:
        ways = calls.as_in_stock(self), lambda t: linear_forward(self, t), (self,)
        calls.watcher(self, self, identity, input, decision, (), {}, ways=ways)
    return nn.Linear.forward(self, input) if isinstance(decision, str) else calls._run(input, decision)


def overridden(self: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``method(*args, **kwargs)``, where ``method`` is ``super().name``: its rewritten form, if it has one."""
    for old, new in getattr(type(self), "_fused_overridden", ()):
        if type(method) is MethodType and method.__func__ is old and method.__self__ is self:
            return new(self, *args, **kwargs)
    return method(*args, **kwargs)
