"""Loops whose iterations are a chain: ``for i, layer in enumerate(self.layers): x = layer(x); if i < n: x = act(x)``.

From their place in a method to what the rewritten method calls. Each iteration is a list of calls, each of which takes
the value of the one before. They are looked up for all iterations before the first runs. Where they are one chain, it
runs in place of the loop. Otherwise the loop runs as it is written, with its pairs of layers and activations fused.
"""

from __future__ import annotations

import ast
import copy
import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlkernels.fusion import call, memory
from dlkernels.fusion.between import Guard
from dlkernels.fusion.conditions import Checks, Harmless
from dlkernels.fusion.containers import is_container
from dlkernels.fusion.functional import key_of, parameters_given
from dlkernels.fusion.known import is_sliced
from dlkernels.fusion.rules import linear_rule
from dlkernels.fusion.source import FunctionNode
from dlkernels.fusion.stages import (
    Stage,
    after_identities,
    changes_nothing,
    decide,
    may_change_nothing,
    stage_of,
)
from dlkernels.fusion.syntax import (
    Position,
    activation_call,
    ancestors,
    early,
    further,
    helper_name,
    in_scope,
    is_stable,
    loads,
    loops_over,
    placed,
    position,
    self_name,
    stored,
    target_of,
    thunk,
    tuple_of,
    variable_arguments,
)

# ---- where they are --------------------------------------------------------------------------------------------------

Step = tuple[tuple[Guard, ...], tuple[ast.Call, ...]]  # conditions, and the calls that run if they hold, in their order


@dataclass(frozen=True, eq=False)
class Loop:
    """A loop in the source of a method.

    Attributes:
        counts: the loop is over ``enumerate``.
        containers: those that it iterates over, side by side, each with the slice of it, or None. A ``range`` is one.
        names: the loop's variables, in their order.
        x: the name that every call gives its value to.
        bounds: the types on which the arguments of ``range`` rely.
        checks: the types on which the conditions rely.
        reads: all look-ups.
    """

    node: ast.For
    counts: bool
    containers: tuple[tuple[ast.expr, ast.Slice | None], ...]
    names: tuple[str, ...]
    x: str
    steps: tuple[Step, ...]
    bounds: Checks
    checks: Checks
    reads: tuple[ast.expr, ...]

    @property
    def at(self) -> Position:
        return position(self.node)


@functools.lru_cache(maxsize=1024)
def loops(function: FunctionNode) -> tuple[Loop, ...]:
    """Return every loop of this form, whatever the names mean."""
    around = ancestors(function)
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.For) and not any(_may_catch(outer) for outer in around[node]):
            loop = _loop(node, function)
            found += [] if loop is None else [loop]
    return tuple(found)


def _may_catch(node: ast.AST) -> bool:
    return type(node).__name__ in ("With", "AsyncWith", "Try", "TryStar")


def _loop(node: ast.For, function: FunctionNode) -> Loop | None:
    counts = _is_call_of(node.iter, "enumerate", 1)
    over: Any = node.iter.args[0] if counts else node.iter  # type: ignore[attr-defined]
    zipped = _is_call_of(over, "zip", 2)
    containers = tuple(map(_sliced, over.args if zipped else [over]))
    names = _names(node.target, counts, len(containers) if zipped else 0)
    x = target_of(_first(node.body))
    if node.orelse or names is None or x is None or {x, self_name(function)} & set(names):
        return None
    bounds, checks = Checks(), Checks()
    if is_range(over):
        harmless = Harmless(bounds, None, self_name(function), later={x})
        known = all(harmless.value(a, True) for a in over.args)
    else:
        known = all(is_stable(c) and not isinstance(c, ast.Constant) for c, _ in containers)
    if not known or loads(node.iter, x):
        return None
    steps = [step for statement in node.body for step in _steps(statement, x, ())]
    calls = [c for step in steps if step is not None for c in step[1]]
    if None in steps or not calls or _is_taken(calls, node, names):
        return None
    for name in names:
        if in_scope(function, name) or loads(function, name) != sum(loads(o, name) for o in loops_over(function, name)):
            return None
    if in_scope(function, x) or set(stored(node)) != {x, *names}:
        return None
    harmless = Harmless(checks, None, self_name(function), {names[0]} if counts or is_range(over) else set(), {x})
    if not all(harmless.value(test, True) for step in steps for test, _ in step[0]):  # type: ignore[index]
        return None
    reads = [*(c for c, _ in containers if not is_range(c)), *bounds.reads, *checks.reads]
    for c in calls:
        act = activation_call(c)[0]  # type: ignore[index]
        looked_up = None if isinstance(act, str) else early(act)
        if looked_up is None and not isinstance(act, str):
            return None
        reads += [*([] if looked_up is None else looked_up.reads), *variable_arguments(further(c, act))]
    if not all(map(is_stable, reads)) or any(loads(read, x) for read in reads):
        return None
    mine = [r for r in reads if not (isinstance(r, ast.Name) and r.id in names)]
    return Loop(node, counts, containers, names, x, tuple(steps), bounds, checks, tuple(mine))  # type: ignore[arg-type]


def _is_call_of(node: ast.expr, name: str, least: int) -> bool:
    """Return True for ``name(...)`` with as many arguments as ``least``, or for zip more."""
    if not (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name and not node.keywords
    ):
        return False
    fits = len(node.args) == least or (name == "zip" and len(node.args) > least)
    return fits and not any(isinstance(a, ast.Starred) for a in node.args)


def is_range(node: ast.expr) -> bool:
    return any(_is_call_of(node, "range", count) for count in (1, 2, 3))


def _sliced(node: ast.expr) -> tuple[ast.expr, ast.Slice | None]:
    """Return ``self.layers`` and ``:-1`` for ``self.layers[:-1]``."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Slice):
        return node, None
    parts = (node.slice.lower, node.slice.upper, node.slice.step)
    constant = all(p is None or (isinstance(p, ast.Constant | ast.UnaryOp) and is_stable(p)) for p in parts)
    return (node.value, node.slice) if constant else (node, None)


def _names(target: ast.expr, counts: bool, zipped: int) -> tuple[str, ...] | None:
    parts = [target]
    if counts:
        if not (isinstance(target, ast.Tuple) and len(target.elts) == 2):
            return None
        parts = list(target.elts)
    if zipped:
        last = parts.pop()
        if not (isinstance(last, ast.Tuple) and len(last.elts) == zipped):
            return None
        parts += last.elts
    names = tuple(p.id for p in parts if isinstance(p, ast.Name))
    return names if len(set(names)) == len(parts) else None


def _first(body: Sequence[ast.stmt]) -> ast.stmt:
    first = body[0]
    return _first(first.body) if isinstance(first, ast.If) else first


def _steps(statement: ast.stmt, x: str, guards: tuple[Guard, ...]) -> Iterator[Step | None]:
    """Yield the steps of a statement; None if it is none."""
    if isinstance(statement, ast.If):
        for branch, holds in ((statement.body, True), (statement.orelse, False)):
            for inner in branch:
                yield from _steps(inner, x, (*guards, (statement.test, holds)))
    elif isinstance(statement, ast.Pass):
        return
    elif target_of(statement) != x or not isinstance(statement, ast.Assign):
        yield None
    elif isinstance(statement.value, ast.IfExp):
        choice = statement.value
        for value, holds in ((choice.body, True), (choice.orelse, False)):
            calls = _nested(value, x)
            yield None if calls is None else ((*guards, (choice.test, holds)), calls)
    else:
        calls = _nested(statement.value, x)
        yield None if calls is None else (guards, calls)


def _nested(value: ast.expr, x: str) -> tuple[ast.Call, ...] | None:
    """Return the calls in ``f(g(x))``, the innermost first."""
    calls: list[ast.Call] = []
    while isinstance(value, ast.Call) and (parts := activation_call(value)) is not None:
        calls.insert(0, value)
        value = parts[1]
    return tuple(calls) if isinstance(value, ast.Name) and value.id == x else None


def _is_taken(calls: Sequence[ast.Call], node: ast.For, names: Sequence[str]) -> bool:
    """Return True for ``for layer in self.layers: x = layer(x)``, which is a chain of ``patterns``."""
    alone = len(calls) == 1 == len(node.body) == len(names) and not isinstance(node.body[0], ast.If)
    return alone and isinstance(calls[0].func, ast.Name) and calls[0].func.id == names[0]


# ---- the rewritten form ----------------------------------------------------------------------------------------------


def in_place_of(loop: Loop, as_written: ast.AST, number: int, slot: int, owner: str) -> Any:
    """Return the statements in place of a loop."""
    each = [
        ast.Starred(_if(guards, tuple_of([_described(c) for c in calls])), ast.Load()) for guards, calls in loop.steps
    ]
    calls: ast.expr = tuple_of(copy.deepcopy(each))
    if loop.checks.all():
        calls = ast.BoolOp(ast.And(), [loop.checks.are_known(), calls])
    known = loop.bounds.are_known() if loop.bounds.all() else None
    per_iteration = thunk(calls)
    per_iteration.args.args = [ast.arg(name) for name in loop.names]
    functions = [n.func for n in ast.walk(loop.node.iter) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    used = [f for f in functions if f.id in _ITERATORS]
    arguments = [
        *(ast.Name(owner, ast.Load()), ast.Constant(slot), tuple_of(used), ast.Constant(loop.counts)),
        *(tuple_of([_with_slice(*c, known) for c in loop.containers]), ast.Name(loop.x, ast.Load()), per_iteration),
    ]
    ran = f"__fused_loop_{number}__"
    run = ast.Call(ast.Name(helper_name("unrolled"), ast.Load()), copy.deepcopy(arguments), [])
    taken = ast.Assign([ast.Name(loop.x, ast.Store())], ast.Name(ran, ast.Load()))
    is_none = ast.Compare(ast.Name(ran, ast.Load()), [ast.Is()], [ast.Constant(None)])
    several = [ast.Assign([ast.Name(ran, ast.Store())], run), ast.If(is_none, [as_written], [taken])]  # type: ignore[list-item]
    return [placed(statement, loop.node) for statement in several]


def _with_slice(container: ast.expr, part: ast.Slice | None, known: ast.expr | None) -> ast.expr:
    """Return a container with its slice; something false in place of a range whose bounds are not ``known``."""
    if part is None:
        value = container if known is None else ast.BoolOp(ast.And(), [known, container])
        return tuple_of([value, ast.Constant(None)])
    return tuple_of([container, tuple_of([p or ast.Constant(None) for p in (part.lower, part.upper, part.step)])])


def _if(guards: Sequence[Guard], value: ast.expr) -> ast.expr:
    for test, holds in reversed(guards):
        nothing = tuple_of([])
        value = ast.IfExp(test, value, nothing) if holds else ast.IfExp(test, nothing, value)
    return value


def _described(node: ast.Call) -> ast.expr:
    """Return a callee, its arguments behind the tensor, and its keywords."""
    act = activation_call(node)[0]  # type: ignore[index]
    args, kwargs = further(node, act)
    if isinstance(act, str):
        act = ast.Subscript(ast.Name(helper_name("methods"), ast.Load()), ast.Constant(act), ast.Load())
    elif (found := early(act)) is not None:
        act = found.value
    return tuple_of([act, tuple_of(args), ast.Dict([ast.Constant(k) for k, _ in kwargs], [v for _, v in kwargs])])


# ---- what it calls ---------------------------------------------------------------------------------------------------

_ITERATORS = {"enumerate": enumerate, "zip": zip, "range": range}
_ERRORS = (NameError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError)


def unrolled(
    self: Any, slot: int, used: tuple[Any, ...], counts: bool, containers: tuple[Any, ...], x: Any, calls: Any, /
) -> Tensor | None:
    """Return the value of the loop if its calls are one chain, else None; ``calls`` gives those of an iteration.

    The containers come with the numbers of a slice, or None.
    """
    if torch.compiler.is_dynamo_compiling() or any(_ITERATORS.get(f.__name__) is not f for f in used):
        return None
    key = id(self), slot
    if _has_active_dropout(key):
        return None
    for c, part in containers:
        sliced = part is None or is_sliced(c)
        if not (sliced and (type(c) in (range, nn.ParameterList) or is_container(c))):
            return None
    elements = [c if part is None else list(c)[slice(*part)] for c, part in containers]
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    try:
        for i, item in enumerate(zip(*elements, strict=False)):
            several = calls(i, *item) if counts else calls(*item)
            if type(several) is not tuple:
                return None
            found += several
    except _ERRORS:  # it is raised where the source does the same
        return None
    stages = [stage_of(*one) for one in found]
    mark = [_mark_of(stage) for stage in stages]
    comparable = all(one is not None for one in mark)
    if comparable and memory.mark_of(key) == mark:
        given = parameters_given(*[stage.called for stage in stages])
        if (y := memory.run_again(key, self, x, *given)) is not None:
            return y
    if not stages or linear_rule(type(stages[0].called)) is None:
        return None
    active = next((stage for stage in stages if may_change_nothing(stage) and not changes_nothing(stage)), None)
    if active is not None:
        _note_active_dropout(key, self, active)
        return None
    chain = decide(stages, 0, x, lambda i, k: self)
    if isinstance(chain, str) or len(chain.layers) < 2 or not all(map(changes_nothing, stages[chain.last + 1 :])):
        return None
    if call.watcher is not None:
        k = after_identities(stages, 0)
        call.watcher(self, stages[0].called, stages[k].called, x, chain, *stages[k][1:], stages)
    if comparable:
        memory.keep(key, memory.decided(memory.Reads(self), stages, chain, (self,)), mark)
    return chain.run(x)


def _mark_of(stage: Stage) -> Any:
    """Return what a stage of another call is compared by; None if its arguments cannot be compared."""
    given = memory.given_of(stage.args, stage.kwargs)
    return None if given is None else (key_of(stage.called), given)


# By loop: the dropout that was active, or the module whose forward calls F.dropout. While it trains, the loop is no
# chain, and nothing is looked up to find that out.
_dropouts: dict[tuple[int, int], weakref.ref[nn.Module]] = {}
_MOST = 4096


def _has_active_dropout(key: tuple[int, int]) -> bool:
    found = _dropouts.get(key)
    module = None if found is None else found()
    return module is not None and module.training and (type(module) is not nn.Dropout or module.p > 0)


def _note_active_dropout(key: tuple[int, int], owner: nn.Module, stage: Stage) -> None:
    if len(_dropouts) >= _MOST:
        _dropouts.clear()
    _dropouts[key] = weakref.ref(stage.called if isinstance(stage.called, nn.Module) else owner)
