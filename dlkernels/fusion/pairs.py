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
from dlkernels.fusion.functional import FunctionalLinear, names_in
from dlkernels.fusion.rules import identity, works_in_place
from dlkernels.fusion.stages import Chain, Stage

_NO_KEYWORDS: dict[str, Any] = {}

# The activation's arguments after the tensor, if they can be compared with those of another call; None if not.
Given = tuple[Any, ...] | None


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    if not args and not kwargs:
        return ()
    given = (*args, *kwargs, *kwargs.values())
    return (len(args), *given) if all(type(value) in (int, float, bool, str) for value in given) else None


# By the ids of a place, the number of its decisions with different arguments. Arguments that change all the time are
# decided anew.
_variants: dict[tuple[Any, ...], int] = {}
_MOST_VARIANTS = 8
_MOST_PLACES = 16384


def _run_again(self: Any, act: Any, linear: Any, x: Any, given: Given = ()) -> Tensor | None:
    """Return ``act(linear(x))`` if it was decided before to fuse the two, and the decision holds; else None."""
    if given is None or torch.compiler.is_dynamo_compiling():
        return None
    if type(linear) is not FunctionalLinear:
        return memory.run_again((id(self), id(act), id(linear), *given), self, x)
    key = id(self), id(act), (id(linear.weight), id(linear.bias)), *given  # the layer is made at each call
    names = memory.mark_of(key)
    if names is None or linear.function is not calls.STOCK_LINEAR[0]:
        return None
    (weight, bias), own = names, self.__dict__["_parameters"]
    if own.get(weight) is not linear.weight or (None if bias is None else own.get(bias)) is not linear.bias:
        return None
    return memory.run_again(key, self, x)


def _decide(
    self: Any, act: Any, linear: Any, x: Any, args: Any, kwargs: Any, given: Given = ()
) -> str | calls.Ready:  # fmt: skip
    """Decide, and remember the decision to fuse; with ``given`` None nothing is remembered."""
    decision = calls.decide(self, act, linear, x, args, kwargs)
    if given is not None and not isinstance(decision, str):
        _remember(self, Stage(act, args, kwargs), linear, x, decision, given)
    return decision


def _remember(self: Any, act: Stage, linear: Any, x: Any, ready: calls.Ready, given: tuple[Any, ...]) -> None:
    if torch.compiler.is_dynamo_compiling() or calls.watcher is not None:
        return
    key: tuple[Any, ...] = id(self), id(act.called), id(linear), *given
    names = None
    if type(linear) is FunctionalLinear:
        key = id(self), id(act.called), (id(linear.weight), id(linear.bias)), *given
        if (names := names_in(self, linear)) is None:
            return
    if memory.is_unknown(key):
        return
    if given and not memory.is_kept(key):
        variants = _variants[key[:3]] = _variants.get(key[:3], 0) + 1
        if len(_variants) >= _MOST_PLACES:
            _variants.clear()
        if variants > _MOST_VARIANTS:
            return
    if memory.may_be_kept(x):
        chain = Chain((ready,), (1,), 0, 1)
        reads = memory.Reads(self)
        if names is not None:
            reads.functional(self, linear, *names)
        memory.keep_or_give_up(key, memory.decided(reads, (Stage(linear), act), chain, (self,)), names)


def call(self: Any, act: Any, linear: Any, x: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``act(linear(x), *args, **kwargs)``, where the further arguments are constants."""
    given = _given(args, kwargs)
    if (y := _run_again(self, act, linear, x, given)) is not None:
        return y
    decision = _decide(self, act, linear, x, args, kwargs, given)
    if calls.watcher is not None:
        calls.watcher(self, linear, act, x, decision, args, kwargs)
    return act(linear(x), *args, **kwargs) if isinstance(decision, str) else calls._run(x, decision)


def call_with_deferred_arguments(
    self: Any, act: Any, linear: Any, x: Any, arguments: Callable[[], tuple[Any, Any]], /
) -> Any:
    """The same, where the layer's call may change the further arguments: ``arguments()`` returns their values now."""
    args, kwargs = arguments()
    given = _given(args, kwargs)
    if (y := _run_again(self, act, linear, x, given)) is not None:
        return y
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
    given = _given(args, kwargs) if len(between) == 0 else None  # Dynamo cannot negate a tuple of objects
    if (y := _run_again(self, act, linear, x, given)) is not None:
        return y, True
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
    return linear_or_fused(self, linear, x, *meant) if type(meant) is tuple else (linear(x), False)


def _is_harmless(called: Any, index: Any, x: Any) -> bool:
    """Return True if ``called(x)``, or ``called[index](x)``, calls a layer or an activation without hooks.

    ``x`` is None if it is the result of another such call.
    """
    if index is not None:
        if type(called) not in _CONTAINERS:
            return False
        called = called[index]
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
