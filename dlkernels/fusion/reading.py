"""The activation behind a class, a method or a function whose body is one call: ``return F.gelu(x)``.

``return x * torch.sigmoid(x)`` is one too: silu.

The body is compiled again without its tensor argument, as a function that returns the callee and its further arguments
(:func:`_without_tensor`). Each call runs it, so it reads the attributes and globals of that moment, as the body would.
It only looks names up and compares numbers; a body that does more is not read.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dlkernels.fusion import rules
from dlkernels.fusion.conditions import Checks, Harmless
from dlkernels.fusion.known import are_known
from dlkernels.fusion.rules import METHODS, Activation
from dlkernels.fusion.source import FunctionNode, NoSource, check, source_of
from dlkernels.fusion.syntax import activation_call, further, helper_name, loads, one_argument, self_name, target_of
from dlkernels.fusion.values import Namespace, is_plain_attribute
from dlkernels.nn.untouched import untouched

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a callee, its arguments after the tensor, its keywords
Body = Callable[..., Call | None]

_MOST_CALLS = 8  # of functions that call functions
_MOST_BODIES = 4096

# By class, or by class and method, or by function: the function of its code, and its body. None: it cannot be read.
_bodies: dict[Any, tuple[FunctionType, Body] | None] = {}


def activation_of(act: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Activation | None:
    """Return the activation that ``act(z, *args, **kwargs)`` computes; None if there is no kernel for it."""
    for _ in range(_MOST_CALLS):
        rule = rules.rule_of(act)
        if rule is not None:
            return rules.applied(rule, act, args, kwargs)
        call = _call_of(act, args, kwargs or {})
        if call is None:
            return None
        act, args, kwargs = call
        if isinstance(act, nn.Module) and not untouched(act):
            return None
    return None


def may_be_activation(act: Any) -> bool:
    """Return True if there is a rule for this, with some arguments, or for what its body calls."""
    for _ in range(_MOST_CALLS):
        if rules.rule_of(act) is not None:
            return True
        if type(act) is functools.partial:
            act = act.func
            continue
        if _body(act) is None:
            return False
        call = _call_of(act, (), {})
        if call is None:  # it needs arguments
            return not isinstance(act, nn.Module)
        act = call[0]
    return False


def _call_of(act: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Return the call that ``act(z, *args, **kwargs)`` makes with z; None if it does anything else."""
    if type(act) is functools.partial:
        return None if act.args else (act.func, args, {**act.keywords, **kwargs})
    body = _body(act)
    if body is None:
        return None
    owner = (act,) if isinstance(act, nn.Module) else (act.__self__,) if type(act) is MethodType else ()
    try:
        return body(*owner, *args, **kwargs)
    except (NameError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError):
        return None  # the call itself raises this


def _body(act: Any) -> Body | None:
    if isinstance(act, nn.Module):
        key: Any = type(act)
        function = getattr(key, "forward", None)
    elif type(act) is MethodType:
        key, function = (type(act.__self__), act.__func__), act.__func__
    else:
        key = function = act
    if type(function) is not FunctionType:
        return None
    try:
        found = _bodies.get(key)
    except TypeError:  # its metaclass has an __eq__ and no __hash__
        return None
    if found is None and not torch.compiler.is_compiling() and key not in _bodies:
        if len(_bodies) >= _MOST_BODIES:
            _bodies.clear()
        owner = key if isinstance(act, nn.Module) else key[0] if type(act) is MethodType else None
        found = _bodies[key] = _read(function, owner)
    if found is None or found[0] is not function or not (torch.compiler.is_compiling() or _is_as_read(*found)):
        return None
    return found[1]


def _is_as_read(function: FunctionType, body: Any) -> bool:
    """Return False if somebody gave the function another code or other defaults. The compiler guards them itself."""
    return function.__code__ is body.code_read and function.__defaults__ is body.__defaults__


# The methods that run when a module is called, besides forward.
CALLED = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")


def _read(function: FunctionType, owner: type | None) -> tuple[FunctionType, Body] | None:
    if owner is not None and not (
        issubclass(owner, nn.Module) and all(getattr(owner, name) is getattr(nn.Module, name) for name in CALLED)
    ):
        return None
    try:
        source = source_of(function)
        check(source)
        parts = _without_tensor(source.node, owner is not None)
        if parts is None:
            return None
        node, reads = parts
        names = Namespace(source, None)
        name = self_name(source.node) if owner is not None else ""
        if not all(_is_plain(read, name, owner, names) for read in reads):
            return None
        values = {"methods": METHODS, "are_known": are_known, "times": _times}
        body = source.rebuilt(node, {helper_name(name): value for name, value in values.items()})
        body.code_read = function.__code__  # type: ignore[attr-defined]
        return function, body
    except NoSource:
        return None


def _is_plain(read: ast.expr, name: str, owner: type | None, names: Namespace) -> bool:
    """Return True if looking this up runs no code."""
    if isinstance(read, ast.Attribute) and isinstance(read.value, ast.Name) and read.value.id == name:
        return owner is not None and not read.attr.startswith("__") and is_plain_attribute(owner, read.attr)
    return names.is_plain(read)


def _without_tensor(function: FunctionNode, has_owner: bool) -> tuple[FunctionNode, list[ast.expr]] | None:
    """Return the function that gives the call which ``function`` makes, and what it looks up; None if it does more."""
    arguments = function.args
    positional = arguments.posonlyargs + arguments.args
    if isinstance(function, ast.AsyncFunctionDef) or arguments.vararg or arguments.kwarg:
        return None
    if len(positional) <= has_owner:
        return None
    tensor = positional[has_owner].arg
    if len(arguments.defaults) >= len(positional) - has_owner:  # the tensor has a default
        return None
    body = function.body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):  # the docstring
        body = body[1:]
    checks = Checks()
    value = _returned(body, tensor, checks)
    if value is None:
        return None
    if checks.all():
        value = ast.IfExp(checks.are_known(), value, ast.Constant(None))
    new = copy.deepcopy(function)
    new.args.posonlyargs = [a for a in new.args.posonlyargs if a.arg != tensor]
    new.args.args = [a for a in new.args.args if a.arg != tensor]
    result = ast.Return(copy.deepcopy(value))
    for node in ast.walk(result):
        ast.copy_location(node, body[0])
    new.body = [result]
    return new, checks.reads


def _returned(body: list[ast.stmt], tensor: str, checks: Checks) -> ast.expr | None:
    """Return an expression for the call whose value these statements return; None if they do anything else."""
    if not body:
        return None
    first, rest = body[0], body[1:]
    if isinstance(first, ast.Return) and first.value is not None:
        return _called(first.value, tensor, checks)
    if isinstance(first, ast.If) and _is_of_a_device_without_kernels(first.test, tensor):
        return _returned(first.orelse or rest, tensor, checks) if not first.orelse or not rest else None
    if isinstance(first, ast.If) and (not first.orelse or not rest):
        yes, no = _returned(first.body, tensor, checks), _returned(first.orelse or rest, tensor, checks)
        return _choice(first.test, yes, no, tensor, checks)
    if len(rest) == 1 and (name := target_of(first)) and isinstance(first, ast.Assign):
        last = rest[0]
        if isinstance(last, ast.Return) and isinstance(last.value, ast.Name) and last.value.id == name:
            return _called(first.value, tensor, checks)
    return None


_DEVICES = ("cpu", "cuda", "meta")  # with kernels, in any build


def _is_of_a_device_without_kernels(test: ast.expr, tensor: str) -> bool:
    """Return True for ``tensor.device.type == "mps"``, alone or before an ``and``.

    A kernel takes the activation's place on devices with kernels only; there it is False, and what comes behind ``and``
    does not run.
    """
    if isinstance(test, ast.BoolOp):
        return isinstance(test.op, ast.And) and _is_of_a_device_without_kernels(test.values[0], tensor)
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
        return False
    name = test.comparators[0]
    other = isinstance(name, ast.Constant) and type(name.value) is str and name.value not in _DEVICES
    return other and ast.unparse(test.left) == f"{tensor}.device.type"


def _called(value: ast.expr, tensor: str, checks: Checks) -> ast.expr | None:
    if (factor := _factor(value, tensor)) is not None:
        inner = _called(factor, tensor, checks) if isinstance(factor, ast.Call) else None
        return None if inner is None else ast.Call(ast.Name(helper_name("times"), ast.Load()), [inner], [])
    if isinstance(value, ast.IfExp):
        yes, no = _called(value.body, tensor, checks), _called(value.orelse, tensor, checks)
        return _choice(value.test, yes, no, tensor, checks)
    parts = activation_call(value) if isinstance(value, ast.Call) else None
    if parts is None or not isinstance(parts[1], ast.Name) or parts[1].id != tensor or loads(value, tensor) != 1:
        return None
    assert isinstance(value, ast.Call)
    act = parts[0]
    args, kwargs = further(value, act)
    harmless = Harmless(checks, None, "", later={tensor})
    looked_up = [*args, *(v for _, v in kwargs), *([] if isinstance(act, str) else [act])]
    if not all(map(harmless.value, looked_up)):
        return None
    if isinstance(act, str):
        act = ast.Subscript(ast.Name(helper_name("methods"), ast.Load()), ast.Constant(act), ast.Load())
    keywords = ast.Dict([ast.Constant(k) for k, _ in kwargs], [v for _, v in kwargs])
    return ast.Tuple([act, ast.Tuple(list(args), ast.Load()), keywords], ast.Load())


def _factor(value: ast.expr, tensor: str) -> ast.expr | None:
    """Return f(x) for ``x * f(x)``, ``f(x) * x``, ``x.mul(f(x))`` and ``x.mul_(f(x))``; None for other expressions."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult):
        several = [value.left, value.right]
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and one_argument(value):
        several = [value.func.value, value.args[0]] if value.func.attr in ("mul", "mul_") else []
    else:
        return None
    others = [part for part in several if not (isinstance(part, ast.Name) and part.id == tensor)]
    return others[0] if len(others) == 1 else None


def _times(call: Call | None) -> Call | None:
    """Return the call that computes x times this call: silu for the sigmoid. One that overwrites x is another."""
    if call is None or call[1] or call[2]:
        return None
    sigmoid = any(call[0] is function for function in (torch.sigmoid, F.sigmoid, METHODS["sigmoid"]))
    module = type(call[0]) is nn.Sigmoid and untouched(call[0])
    return (F.silu, (), {}) if sigmoid or module else None


def _choice(test: ast.expr, yes: ast.expr | None, no: ast.expr | None, tensor: str, checks: Checks) -> ast.expr | None:
    if yes is None or no is None or not Harmless(checks, None, "", later={tensor}).value(test, True):
        return None
    return ast.IfExp(test, yes, no)
