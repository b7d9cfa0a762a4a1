"""A fused module is the module it was, of a class made from its own: same attributes, children, parameters and hooks.

The class differs in the rewritten methods alone, and bears the same name.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from dlkernels.fusion import call
from dlkernels.fusion.patterns import Position, patterns, rewritten
from dlkernels.fusion.rules import METHODS
from dlkernels.fusion.source import NoSource, Source, check, rewrap, source_of, undecorated


@dataclass(frozen=True)
class Plan:
    """What is fused in a module's own methods: which places, for which activations, but for which layers below it."""

    places: frozenset[tuple[str, Position]]
    activations: tuple[str, ...]
    without: tuple[str, ...] = ()
    alone: bool = False  # the module is a linear layer with no activation, and its forward is the kernel's


class Fused(nn.Module):
    """Mixed into the classes that :func:`fused_class` makes; a module, so that the layout of instances agrees."""

    _fused_plan: Plan
    _fused_from: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the original's: it registers the classes its author wrote, and this is none of them."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        made, args, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        cls, original = type(self), type(self)._fused_from
        args = tuple(original if a is cls else a for a in args)
        return (_again, (original, cls._fused_plan, made, args), *rest)


def _again(original: type[nn.Module], plan: Plan, made: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    module = made(*args)
    if type(module) is original:
        with contextlib.suppress(NoSource):  # another version of its code: it is the stock module then
            swap(module, plan)
    return module


def method_source(cls: type, name: str) -> Source:
    """Where the method that ``cls`` has by that name comes from; raises :class:`NoSource`."""
    for base in cls.__mro__:
        if name in vars(base):
            return source_of(undecorated(vars(base)[name]))
    raise NoSource(f"{cls.__name__} has no method {name}")


def fused_class(cls: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The class of a fused ``cls``; one for each plan. Raises :class:`NoSource` and what making a class raises."""
    for known in cls.__subclasses__():
        if known.__dict__.get("_fused_plan") == plan:
            return known
    body: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_fused_plan": plan,
        "_fused_from": cls,
        "_fused_methods": METHODS,
        "_fused_call": call.call,
        "_fused_head": call.head,
        "_fused_tail": call.tail,
        "_fused_chain": call.chain,
    }
    for name in sorted({name for name, _ in plan.places}):
        source = method_source(cls, name)
        check(source)
        chosen = [p for p in patterns(source.node) if (name, p.at) in plan.places]
        new = source.rebuilt(rewritten(source.node, chosen))
        body[name] = rewrap(getattr(cls, name), source.function, new)
    if plan.alone:
        body["forward"] = call.alone
    return types.new_class(cls.__name__, (Fused, cls), {}, lambda namespace: namespace.update(body))


def swap(module: nn.Module, plan: Plan) -> None:
    object.__setattr__(module, "__class__", fused_class(type(module), plan))


def plan_of(module: nn.Module) -> Plan | None:
    """What is fused in this module's own methods; also where another tool (FSDP) made a class from the fused one."""
    return type(module)._fused_plan if isinstance(module, Fused) else None


def original_class(module: nn.Module) -> type[nn.Module]:
    return type(module)._fused_from if isinstance(module, Fused) else type(module)


def swap_back(module: nn.Module) -> None:
    if "_fused_plan" in type(module).__dict__:
        object.__setattr__(module, "__class__", type(module)._fused_from)  # type: ignore[attr-defined]
    elif isinstance(module, Fused):
        raise RuntimeError(
            f"unfuse: {type(module).__name__} was made from a fused class by another tool (a parametrization, FSDP); "
            "undo that first"
        )
