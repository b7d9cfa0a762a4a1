"""The memory of a list of calls: the modules of a container, or the calls of a statement.

Some of the calls are fused, others are not. ``_C.Steps`` holds the decision about each. A container that is one chain
has a single decision (``chain``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn import functional as F

from dlkernels import _C
from dlkernels.fusion import rules
from dlkernels.fusion.containers import are_seen_through, calls_in_order, has_inner, in_turn, may_be_flattened
from dlkernels.nn.untouched import untouched


class Turn(NamedTuple):
    """The steps of a statement's calls, or of a container's modules in the order of ``in_turn``."""

    steps: _C.Steps
    nested: bool
    version: int  # of the rules


_turns: dict[Any, Turn] = {}  # by the id of a module, and the id of a container or the slot of a statement
_MOST = 4096


def known_turn(key: Any, x: Any) -> Turn | None:
    """Return the steps for modules that one of a model's modules runs in turn, if an earlier call left them."""
    found = _turns.get(key)
    if found is None or found.version != rules.version or (found.nested and not are_seen_through(x)):
        return None
    return found


def new_turn(key: Any, owner: nn.Module, modules: Any, x: Any) -> Turn:
    """Return steps with nothing decided, and leave them for later calls if they hold in these."""
    nested = may_be_flattened(owner, modules, x)
    flat = [module for module, _ in in_turn(owner, modules, nested)]
    made = Turn(_C.Steps(owner, flat, [rules.is_linear(module) for module in flat]), nested, rules.version)
    if _are_untouched(modules) and (are_seen_through(x) or not has_inner(modules)):
        _keep(key, made)
    return made


def turn_of_calls(key: Any, owner: nn.Module, called: Sequence[Any]) -> Turn:
    """Return steps with nothing decided for the calls of a statement, and leave them for later calls."""
    made = Turn(_C.Steps(owner, called, [is_layer(one) for one in called]), False, rules.version)
    _keep(key, made)
    return made


def is_layer(called: Any) -> bool:
    return called is F.linear or rules.is_linear(called)


def forget() -> None:
    """Forget all turns, since places may be selected otherwise now."""
    _turns.clear()


def _keep(key: Any, turn: Turn) -> None:
    if len(_turns) >= _MOST:
        _turns.clear()
    _turns[key] = turn


def _are_untouched(modules: Any) -> bool:
    """Return True if no hook keeps a container from being flattened, or an Identity from being none."""
    for module in modules:
        inner = isinstance(module, nn.Sequential) and calls_in_order(type(module))
        if (inner or type(module) is nn.Identity) and not untouched(module):
            return False
        if inner and not _are_untouched(module):
            return False
    return True
