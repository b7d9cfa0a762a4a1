"""Expressions that run no code of the model: numbers, conditions, and facts of tensors such as ``h.size(0)``.

An operator runs a method of its operands. So the types of the operands are checked at each call, before the expression
is relied on (``known.are_known``): :class:`Checks` lists what is to be checked.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass, field

from dlkernels.fusion.syntax import helper_name, is_stable, tuple_of

# An activation changes none of these facts of a tensor.
_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
_CALLS = ("size", "dim", "numel")
_FUNCTIONS = ("int", "float", "bool", "min", "max", "abs")


@dataclass
class Checks:
    """Parts of expressions, and the types that their values must have.

    Attributes:
        exact: numbers, strings, None, and torch's dtypes, devices and sizes, but no subclass of these.
        tensors: plain tensors.
        sized: plain tensors, lists, tuples, dicts and torch's containers of modules.
        functions: names of builtins, with the builtins' own values, and of functions that return a global.
        results: calls of the latter whose values must have types as of ``exact``.
        reads: all look-ups.
    """

    exact: list[ast.expr] = field(default_factory=list)
    tensors: list[ast.expr] = field(default_factory=list)
    sized: list[ast.expr] = field(default_factory=list)
    functions: list[ast.expr] = field(default_factory=list)
    results: list[ast.expr] = field(default_factory=list)
    reads: list[ast.expr] = field(default_factory=list)

    def all(self) -> list[ast.expr]:
        """Return all that is to be checked; nothing if there are no checks."""
        return [*self.exact, *self.tensors, *self.sized, *self.functions, *self.results]

    def are_known(self) -> ast.expr:
        """Return the condition that all checks hold: the calls in it run after their functions are known."""
        several = [[self.exact, self.tensors, self.sized, self.functions], [self.results, [], [], []]]
        known = ast.Name(helper_name("are_known"), ast.Load())
        calls: list[ast.expr] = [
            ast.Call(known, [tuple_of(nodes) for nodes in args], []) for args in several[: 2 if self.results else 1]
        ]
        return copy.deepcopy(ast.BoolOp(ast.And(), calls) if len(calls) > 1 else calls[0])


def fact_of(node: ast.AST) -> ast.Name | None:
    """Return ``h`` for ``h.shape``, ``h.size(0)`` and the like."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CALLS:
        constant = not node.keywords and all(isinstance(a, ast.Constant) or _is_negative(a) for a in node.args)
        held = node.func.value if constant else None
    else:
        held = node.value if isinstance(node, ast.Attribute) and node.attr in _ATTRIBUTES else None
    return held if isinstance(held, ast.Name) and isinstance(held.ctx, ast.Load) else None


def facts(node: ast.AST, name: str) -> int:
    """Return how often a node reads facts of the tensor with this name, and not its values."""
    return sum(1 for n in ast.walk(node) if (held := fact_of(n)) is not None and held.id == name)


class Harmless:
    """Finds if expressions run no code of the model, and collects the checks for that.

    Args:
        checks: gets the checks.
        tensor: the name of a tensor that is known to be plain; None if there is none.
        owner: the name of self.
        numbers: names that have values of exact types.
        later: names without their values at the time of the checks.
    """

    def __init__(
        self,
        checks: Checks,
        tensor: str | None,
        owner: str,
        numbers: frozenset[str] | set[str] = frozenset(),
        later: frozenset[str] | set[str] = frozenset(),
    ) -> None:
        self.checks, self.tensor, self.owner, self.numbers, self.later = checks, tensor, owner, numbers, later

    def value(self, node: ast.AST, operand: bool = False) -> bool:
        """Return True if evaluating ``node`` runs no code; with ``operand`` also if an operator then reads it."""
        if isinstance(node, ast.Constant):
            return True
        if self.is_fact(node):
            return True
        if isinstance(node, ast.expr) and is_stable(node):
            return self._looked_up(node, operand)
        if isinstance(node, ast.Tuple | ast.List) and isinstance(node.ctx, ast.Load):
            return all(self.value(e, operand) for e in node.elts)
        if isinstance(node, ast.UnaryOp):
            return self.value(node.operand, True)
        if isinstance(node, ast.BinOp):
            return self.value(node.left, True) and self.value(node.right, True)
        if isinstance(node, ast.BoolOp):
            return all(self.value(v, True) for v in node.values)
        if isinstance(node, ast.Compare):
            # Any object may be compared with None. Of two objects a decision could not note that they are the same.
            sides = (node.left, *node.comparators)
            identity = all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
            with_none = len(sides) == 2 and any(isinstance(s, ast.Constant) and s.value is None for s in sides)
            return all(self.value(s, not (identity and with_none)) for s in sides)
        if isinstance(node, ast.IfExp):
            return self.value(node.test, True) and self.value(node.body, operand) and self.value(node.orelse, operand)
        if isinstance(node, ast.JoinedStr):
            return all(self.value(v, True) for v in node.values)
        if isinstance(node, ast.FormattedValue):
            return self.value(node.value, True) and (node.format_spec is None or self.value(node.format_spec, True))
        return isinstance(node, ast.Call) and (self._returns_a_global(node, operand) or self._builtin(node))

    def is_fact(self, node: ast.AST) -> bool:
        """Return True for a fact of a tensor, or an element or slice of it."""
        if isinstance(node, ast.Subscript):
            parts = [node.slice.lower, node.slice.upper, node.slice.step] if isinstance(node.slice, ast.Slice) else None
            constant = all(p is None or isinstance(p, ast.Constant) or _is_negative(p) for p in parts or [node.slice])
            return constant and self.is_fact(node.value)
        held = fact_of(node)
        if held is None or held.id == self.owner or held.id in self.later:
            return False
        if held.id != self.tensor:
            self.checks.tensors.append(held)
        return True

    def _looked_up(self, node: ast.expr, operand: bool) -> bool:
        if self.tensor in (names := {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}):
            return False
        if isinstance(node, ast.Name) and node.id in self.numbers:
            return True
        if names & self.later:
            return False
        self.checks.reads.append(node)
        if operand:
            self.checks.exact.append(node)
        return True

    def _returns_a_global(self, node: ast.Call, operand: bool) -> bool:
        """Return True for ``is_npu_available()``, if it is a function that looks a global up and does nothing else."""
        if node.args or node.keywords or not is_stable(node.func) or not self._looked_up(node.func, False):
            return False
        self.checks.functions.append(node.func)
        self.checks.results += [node] if operand else []
        return True

    def _builtin(self, node: ast.Call) -> bool:
        if not isinstance(node.func, ast.Name) or node.keywords or any(isinstance(a, ast.Starred) for a in node.args):
            return False
        self.checks.functions.append(node.func)
        if node.func.id == "len" and len(node.args) == 1:
            held = node.args[0]
            if isinstance(held, ast.Name) and held.id == self.tensor:
                return True
            self.checks.sized.append(held)
            return is_stable(held) and not isinstance(held, ast.Constant) and self._looked_up(held, False)
        return node.func.id in _FUNCTIONS and all(self.value(a, True) for a in node.args)

    def printed(self, node: ast.AST) -> bool:
        """Return True for a call of ``print`` with values whose text runs no code of the model."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"):
            return False
        self.checks.functions.append(node.func)
        return not node.keywords and all(self.value(a, True) for a in node.args)


def _is_negative(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant)
