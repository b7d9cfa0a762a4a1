"""From a function to its syntax tree, and from a changed tree to a function that is otherwise equal.

Before a tree is used, it is compiled unchanged and compared with the code that runs. This finds a file that was edited
after its import, an import hook that rewrites code, and a decorator that hides the function; each gives a reason.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import linecache
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_TYPE_PARAMS = "type_params" in ast.FunctionDef._fields  # since Python 3.12
_FUTURE = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)


class NoSource(Exception):
    """The function cannot be rewritten; the message says why."""


@dataclass(frozen=True, eq=False)
class Source:
    """A function, its syntax tree, and the nodes around that from the module inwards."""

    function: FunctionType
    node: FunctionNode
    around: tuple[ast.AST, ...]

    def rebuilt(self, node: FunctionNode, given: dict[str, Any]) -> FunctionType:
        """Return the function with the body of ``node``, and the same globals, closure, defaults, name and lines.

        ``given`` are the values of further free variables. The function does not read them from its class, so it also
        works after its class was replaced.
        """
        old = self.function
        code = _compiled(self, _enclosed(node, list(given), node.name in old.__code__.co_freevars))
        if hasattr(code, "co_qualname"):  # since Python 3.11
            code = code.replace(co_qualname=old.__code__.co_qualname)  # type: ignore[attr-defined,call-arg]
        cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
        cells |= {name: CellType(value) for name, value in given.items()}
        new = FunctionType(
            code, old.__globals__, old.__name__, old.__defaults__, tuple(cells[n] for n in code.co_freevars)
        )
        new.__kwdefaults__ = old.__kwdefaults__
        functools.update_wrapper(new, old)
        del new.__wrapped__  # type: ignore[attr-defined]
        return new


@functools.lru_cache(maxsize=1024)
def source_of(function: FunctionType) -> Source:
    """Return the source in the file that the function names, or raise :class:`NoSource`."""
    code = function.__code__
    linecache.checkcache(code.co_filename)  # the file may have been edited and reloaded
    tree = _parsed(code.co_filename, tuple(linecache.getlines(code.co_filename, function.__globals__)))
    if tree is None:
        raise NoSource(f"there is no source of {function.__qualname__}")
    if (code.co_name, code.co_firstlineno) not in _functions(tree):
        raise NoSource(f"the source of {function.__qualname__} is not the code that runs")
    around, node = _functions(tree)[code.co_name, code.co_firstlineno]
    return Source(function, node, around)


@functools.lru_cache(maxsize=1024)
def check(source: Source) -> None:
    """Raise :class:`NoSource` unless the source compiles to the code that runs."""
    if not _same(_compiled(source, source.node), source.function.__code__):
        raise NoSource(f"the source of {source.function.__qualname__} is not the code that runs")


def rewrap(wrapper: Any, old: FunctionType, new: FunctionType) -> FunctionType:
    """Return a copy of a decorated function that holds ``new`` instead of ``old`` in its cell."""
    if wrapper is old:
        return new
    inner = wrapper.__wrapped__
    replaced = rewrap(inner, old, new)
    cells = tuple(CellType(replaced) if _holds(cell, inner) else cell for cell in wrapper.__closure__)
    again = FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, cells)
    again.__kwdefaults__ = wrapper.__kwdefaults__
    functools.update_wrapper(again, wrapper)
    again.__wrapped__ = replaced  # type: ignore[attr-defined]
    return again


def undecorated(function: Any) -> FunctionType:
    """Return the function inside decorators of the ``functools.wraps`` kind, or raise :class:`NoSource`."""
    while True:
        if not isinstance(function, FunctionType):
            raise NoSource(f"its method is a {type(function).__name__}, which has no Python source")
        inner = function.__dict__.get("__wrapped__")
        if inner is None:
            return function
        if sum(_holds(cell, inner) for cell in function.__closure__ or ()) != 1:
            raise NoSource(f"{function.__qualname__} is decorated in a way that fuse cannot repeat")
        function = inner


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # empty
        return False


@functools.lru_cache(maxsize=64)
def _parsed(filename: str, lines: tuple[str, ...]) -> ast.Module | None:
    try:
        return ast.parse("".join(lines)) if lines else None
    except SyntaxError:
        return None


@functools.lru_cache(maxsize=64)
def _functions(tree: ast.Module) -> dict[tuple[str, int], tuple[tuple[ast.AST, ...], FunctionNode]]:
    """Return every function of a file by its name and first line, which is the line of its first decorator."""
    found: dict[tuple[str, int], tuple[tuple[ast.AST, ...], FunctionNode]] = {}
    waiting: list[tuple[tuple[ast.AST, ...], ast.AST]] = [((), tree)]
    while waiting:
        around, node = waiting.pop()
        if isinstance(node, FunctionNode):
            line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name, line] = around, node
        inside = (*around, node)
        waiting += [
            (inside, child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler)
        ]
    return found


@functools.lru_cache(maxsize=64)
def _imports(tree: ast.Module) -> list[ast.stmt]:
    """Return the import statements of the module's scope, also those inside other statements."""
    found: list[ast.stmt] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif not isinstance(node, FunctionNode | ast.ClassDef):
            waiting = [
                *(n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.excepthandler)),
                *waiting,
            ]
    return found


def _enclosed(node: FunctionNode, names: list[str], recursive: bool) -> FunctionNode:
    """Return a function around ``node`` whose arguments are ``names``: so they are free variables of ``node``.

    The name of ``node`` itself keeps its meaning in it: a method ``f`` may call a function ``f``.
    """
    arguments = ast.arguments(
        posonlyargs=[], args=[ast.arg(name) for name in names], kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    own = (ast.Nonlocal if recursive else ast.Global)([node.name])
    outer = ast.FunctionDef("__fused__", arguments, [own, node], [])
    if _TYPE_PARAMS:
        outer.type_params = []  # type: ignore[attr-defined]
    for made in (outer, own, *arguments.args):
        ast.copy_location(made, node)
    return outer


def _compiled(source: Source, node: FunctionNode) -> CodeType:
    """Return the code of ``node`` in the place of ``source.node``, compiled without the rest of the file.

    Functions around it keep their statements, because these define their variables. The file keeps its imports, because
    the compiler emits other code for calls of an imported module's attributes.
    """
    old: ast.AST = source.node
    new: ast.AST = node
    for outer in reversed(source.around):
        alone = isinstance(outer, ast.Module | ast.ClassDef)
        changed = copy.copy(outer)
        for name, value in ast.iter_fields(outer):
            if isinstance(value, list) and any(item is old for item in value):
                rest = _imports(outer) if isinstance(outer, ast.Module) else []
                setattr(changed, name, [*rest, new] if alone else [new if item is old else item for item in value])
        old, new = outer, changed
    code = source.function.__code__
    filename, flags = code.co_filename, code.co_flags & _FUTURE
    whole = compile(new, filename, "exec", flags=flags, dont_inherit=True)  # type: ignore[call-overload]
    waiting = [whole]
    while waiting:
        candidate = waiting.pop()
        if (candidate.co_name, candidate.co_firstlineno) == (code.co_name, code.co_firstlineno):
            return candidate
        waiting += [constant for constant in candidate.co_consts if isinstance(constant, CodeType)]
    raise NoSource(f"the source of {source.function.__qualname__} does not compile to a function")


_COMPARED = (
    "co_name", "co_flags", "co_argcount", "co_posonlyargcount", "co_kwonlyargcount",
    "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars",
)  # fmt: skip


def _same(a: CodeType, b: CodeType) -> bool:
    return (
        all(getattr(a, name) == getattr(b, name) for name in _COMPARED)
        and len(a.co_consts) == len(b.co_consts)
        and all(
            _same(x, y) if isinstance(x, CodeType) and isinstance(y, CodeType) else type(x) is type(y) and x == y
            for x, y in zip(a.co_consts, b.co_consts, strict=True)
        )
    )
