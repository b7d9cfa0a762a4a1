"""Fused classes. A fused module is the same object: its attributes, children, parameters and hooks do not change.

Only its class changes, to a subclass of the same name with the rewritten methods.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import nn

from dlkernels.fusion import chain, functional, gated, gated_places, known, loops, pairs, steps, written
from dlkernels.fusion.patterns import blocks, patterns
from dlkernels.fusion.rewrite import HELPERS, rewritten
from dlkernels.fusion.rules import METHODS
from dlkernels.fusion.series import chosen as chosen_series
from dlkernels.fusion.source import NoSource, Source, check, rewrap, source_of, undecorated
from dlkernels.fusion.syntax import Position, helper_name


class Method(NamedTuple):
    """A method of a class: its name, and the number of methods that override it."""

    name: str
    depth: int = 0


@dataclass(frozen=True)
class Plan:
    """The fused places in a module's own methods.

    Attributes:
        places: the methods and positions of the calls.
        chains: the methods and positions of calls that are chains; no place is in one.
        apart: the paths, below the module, of layers that no chain takes in.
        activations: the selected activations.
        without: the paths of excluded layers below the module.
        linear_forward: True if the module is a linear layer without activation, whose forward is our kernel.
        gates: those of the places that are halves of gated layers, or whole ones.
    """

    places: frozenset[tuple[Method, Position]]
    activations: tuple[str, ...]
    without: tuple[str, ...] = ()
    linear_forward: bool = False
    gates: frozenset[tuple[Method, Position]] = frozenset()
    chains: frozenset[tuple[Method, tuple[Position, ...]]] = frozenset()
    apart: tuple[str, ...] = ()


class Fused(nn.Module):
    """A base of all classes from :func:`fused_class`. It is a module, so that the layout of instances agrees."""

    _fused_plan: Plan
    _fused_from: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Does nothing, in place of the original's: that may register subclasses, but must not register this one."""


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """``__reduce_ex__`` of a fused class: a pickle holds the original class and the plan."""
    fused: Any = next(cls for cls in type(self).__mro__ if "_fused_plan" in vars(cls))
    made, args, *rest = cast(tuple[Any, ...], super(fused, self).__reduce_ex__(protocol))
    args = tuple(fused._fused_from if a is fused else a for a in args)
    return (_again, (fused._fused_from, fused._fused_plan, made, args), *rest)


def _again(original: type[nn.Module], plan: Plan, made: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    module = made(*args)
    if type(module) is original:
        with contextlib.suppress(NoSource, TypeError):  # the class has changed since: the module stays stock
            swap(module, fused_class(original, plan))
    return module


def definitions(cls: type, name: str) -> list[tuple[type, Any]]:
    """Return the bases of ``cls`` that define ``name``, the first in effect, and what they define."""
    bases = (base for base in cls.__mro__ if base is not nn.Module and base is not object)
    return [(base, vars(base)[name]) for base in bases if name in vars(base)]


def method_source(cls: type, method: Method) -> Source:
    """Return the source of a method of ``cls``, or raise :class:`NoSource`."""
    found = definitions(cls, method.name)
    if len(found) <= method.depth:
        raise NoSource(f"{cls.__name__} has no method {method.name}")
    return source_of(undecorated(found[method.depth][1]))


def fused_class(cls: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """Return the fused class of ``cls``, one for each plan. Raise :class:`NoSource` if it cannot be created."""
    for made in type.__subclasses__(cls):
        if vars(made).get("_fused_plan") == plan:
            return made
    body: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_fused_plan": plan,
        "_fused_from": cls,
    }
    deepest: dict[str, int] = {}
    for (name, depth), _ in (*plan.places, *plan.chains):
        deepest[name] = max(depth, deepest.get(name, 0))
    overridden: list[tuple[Any, Any]] = []
    for name, most in sorted(deepest.items()):
        for method in (Method(name, depth) for depth in range(most + 1)):
            source = method_source(cls, method)
            check(source)
            chosen = [p for p in patterns(source.node) if (method, p.at) in plan.places]
            gates = {at for m, at in plan.gates if m == method}
            node = gated.with_gates(source.node, gated_places.gates(source.node, blocks), gates)
            where = sorted(positions for m, positions in plan.chains if m == method)
            joined = [part for positions in where if (part := chosen_series(source.node, positions)) is not None]
            unrolled = [loop for loop in loops.loops(source.node) if (method, loop.at) in plan.places]
            new = source.rebuilt(rewritten(node, chosen, joined, unrolled, method.depth < most), _helpers())
            old = definitions(cls, name)[method.depth][1]
            if method.depth:
                overridden.append((old, rewrap(old, source.function, new)))
            else:
                body[name] = rewrap(old, source.function, new)
    body["_fused_overridden"] = tuple(overridden)
    if plan.linear_forward:
        body["forward"] = pairs.linear_forward
    # The original class is the first base, so that it decides the layout of instances (its own first base may have
    # none: abc.ABC). Fused comes first only if it must hide an __init_subclass__ of the original.
    bases = (Fused, cls) if _hears_of_subclasses(cls) else (cls, Fused)
    try:
        return types.new_class(cls.__name__, bases, {}, lambda namespace: namespace.update(body))
    except Exception as error:  # from a metaclass
        raise NoSource(f"no class can be derived from {cls.__name__}: {error}") from error


@functools.lru_cache(maxsize=1)
def _helpers() -> dict[str, Any]:
    values = {"methods": METHODS}
    sources = {"chain": chain, "gated": gated, "packed": gated}
    sources |= {"functional": functional, "as_layer": functional}
    sources |= dict.fromkeys(("written", "written_there", "overwriting", "middle"), written)
    sources |= {"unrolled": loops, "are_known": known, "element": known, "attribute": known}
    values |= {name: getattr(sources.get(name, pairs), name) for name in HELPERS if name not in values}
    return {helper_name(name): value for name, value in values.items()}


def _hears_of_subclasses(cls: type) -> bool:
    library = ("builtins", "typing", "typing_extensions")
    return any("__init_subclass__" in vars(base) and base.__module__ not in library for base in cls.__mro__)


def swap(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module the fused class. Python raises TypeError if the layout of its instances differs."""
    object.__setattr__(module, "__class__", cls)
    steps.forget()


def plan_of(module: nn.Module) -> Plan | None:
    """Return the plan of a fused module, also if another tool (FSDP) has derived a class from its class."""
    return getattr(type(module), "_fused_plan", None) if issubclass(type(module), Fused) else None


def original_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    return cls._fused_from if issubclass(cls, Fused) else cls


def why_not_back(module: nn.Module) -> str:
    """Return why a fused module cannot get its class back; empty if it can."""
    if "_fused_plan" in vars(type(module)) or not issubclass(type(module), Fused):
        return ""
    name = type(module).__name__
    return f"{name} was made from a fused class by another tool (a parametrization, FSDP); undo that first"


def swap_back(module: nn.Module) -> None:
    if "_fused_plan" in vars(type(module)):
        object.__setattr__(module, "__class__", type(module)._fused_from)  # type: ignore[attr-defined]
        steps.forget()
