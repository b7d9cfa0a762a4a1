"""Makes decisions for chains and gated layers that hold until something changes that they read (``_decisions``).

An activation whose body is read, or that has a rule of the user's, is read again at each call (:class:`Checked`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.nn import functional as F

from dlkernels import _C, _decisions
from dlkernels._decisions import MISSING, Form, Layer, Place, Unknown, is_kept, keep, mark_of, may_be_kept, run_again
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels.fusion import call, rules
from dlkernels.fusion.functional import FunctionalLinear, places_in
from dlkernels.fusion.reading import activation_of, may_be_activation
from dlkernels.fusion.stages import Chain, Stage, changes_nothing, is_identity, slope_of

__all__ = ["Reads", "Unknown", "decided", "is_kept", "keep", "mark_of", "may_be_kept", "run_again"]


# Keys whose decision cannot be written down. Another object may have such an id later: then it is decided at each call
# too.
_unknown: set[Any] = set()
_MOST = 16384


def is_unknown(key: Any) -> bool:
    return key in _unknown


def keep_or_give_up(key: Any, decided: _decisions.Decision | None, mark: Any = None) -> None:
    """Remember a decision. None means that it cannot be written down: it is not tried again."""
    if decided is None:
        if len(_unknown) >= _MOST:
            _unknown.clear()
        _unknown.add(key)
    keep(key, decided, mark)


# An activation's arguments after the tensor, if they can be compared with those of another call; None if not.
Given = tuple[Any, ...] | None


def given_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    if not args and not kwargs:
        return ()
    given = (*args, *kwargs, *kwargs.values())
    for value in given:
        if type(value) not in (int, float, bool, str):
            return None
    return len(args), *given, *map(type, given)  # True, 1 and 1.0 are equal, and a function may tell them apart


_variants: dict[Any, int] = {}  # by place, the number of its decisions with different arguments
_MOST_VARIANTS = 8


def has_too_many_variants(key: Any, place: Any) -> bool:
    """Count a new key of a place. Return True if its arguments change all the time, so that no decision is kept."""
    if is_kept(key):
        return False
    if len(_variants) >= _MOST:
        _variants.clear()
    _variants[place] = _variants.get(place, 0) + 1
    return _variants[place] > _MOST_VARIANTS


class Checked:
    """A decision that holds while ``_C.Decided`` finds nothing changed and all ``checks`` return True."""

    def __init__(self, decided: _C.Decided, checks: Sequence[Callable[[], bool]]) -> None:
        self.decided, self.checks, self.activations = decided, checks, decided.activations

    def run(self, owner: Any, x: Any, /, *given: Any) -> Any:
        return self.decided.run(owner, x, *given) if all(check() for check in self.checks) else None


def _is_still(act: weakref.ref[Any], args: Any, kwargs: Any, known: Any) -> bool:
    called = act()
    return called is not None and activation_of(called, args, kwargs) == known


def _is_present(module: weakref.ref[nn.Module], name: str) -> bool:
    owner = module()
    return owner is not None and owner.__dict__["_parameters"].get(name) is not None


class Reads(_decisions.Reads):
    """A list of all that a decision reads. The owner is the first module of the list."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self.owner = owner
        self.checks: list[Callable[[], bool]] = []
        self._functional: dict[int, Layer] = {}

    def attribute(self, module: nn.Module, name: str) -> Any:
        """Note what ``module.name`` looks up, which is no attribute of the class; return its value."""
        entries = self.module(module, calls_forward_alone=False)
        own = module.__dict__
        if any(name in vars(base) for base in type(module).__mro__):
            raise Unknown
        if name not in own and name in own["_modules"]:
            entries += [(None, name, MISSING), ("_parameters", name, MISSING), ("_buffers", name, MISSING)]
            entries.append(("_modules", name, own["_modules"][name]))
            return own["_modules"][name]
        if name not in own:
            raise Unknown
        entries.append((None, name, own[name]))
        return own[name]

    def presence(self, place: Place) -> None:
        """Note that a module has a parameter under a name.

        Which one does not matter, and nothing may refer to it: ``torch.utils.swap_tensors`` would refuse it.
        """
        module, name = place
        self.module(module, calls_forward_alone=False).append((None, name, MISSING))
        self.checks.append(partial(_is_present, weakref.ref(module), name))

    def functional(self, linear: FunctionalLinear, weight: Place, bias: Place | None, is_given: bool = False) -> Layer:
        """Note a layer of ``F.linear`` with the parameters at these places."""
        for place in (weight, bias):
            if place is not None:
                self.module(place[0], calls_forward_alone=False).append((None, place[1], MISSING))
        return self._functional.setdefault(id(linear), (weight, bias, is_given))

    def linear(self, linear: Any) -> Layer:
        cls = type(linear)
        if cls is FunctionalLinear:
            if id(linear) in self._functional:
                return self._functional[id(linear)]
            places = places_in(self.owner, linear)
            if places is None:
                raise Unknown
            return self.functional(linear, *places, is_given=True)  # the source may come to them by another way
        if cls is not nn.Linear:
            if cls.__dict__.get("_fused_from") is not nn.Linear:
                raise Unknown
            self.class_attributes.append((cls, "forward", cls.forward))  # of a layer that is fused by itself
        return self.parameters(linear)

    def stage(self, stage: Stage) -> None:
        """Note what decided for a stage that is no layer."""
        called = stage.called
        if type(called) is nn.Dropout or type(called) is nn.Identity:
            read: tuple[str, ...] | None = ("p", "training") if type(called) is nn.Dropout else ()
        else:
            read = () if called is F.dropout else rules.attributes_read(called)
        if read is None:
            if type(called) is MethodType:  # another object at each look-up
                raise Unknown
            known = activation_of(*stage)
            self.checks.append(partial(_is_still, weakref.ref(called), stage.args, stage.kwargs, known))
        if isinstance(called, nn.Module):
            self.attributes(called, read or ())

    def selection(self, owner: Any, plan: Any) -> None:
        """Note the class of an owner, and the modules on the paths that it leaves out, of all or of chains."""
        self.module(owner, calls_forward_alone=False)
        for path in (*plan.without, *plan.apart):
            module = owner
            for name in path.split("."):
                self.module(module, calls_forward_alone=False).append(
                    ("_modules", name, module._modules.get(name, MISSING))
                )
                module = module._modules.get(name)
                if module is None:
                    break


def decided(reads: Reads, stages: Sequence[Stage], chain: Chain, owners: Iterable[Any]) -> _C.Decided | Checked | None:
    """Return the decision for a chain; None if what it read cannot be written down.

    ``reads`` holds already what led to the stages. ``owners`` are the modules whose plans selected them.
    """
    weight = chain.layers[0][0]
    if call.watcher is not None or not may_be_kept(weight) or (weight.is_cuda and len(chain.layers) == 1):
        return None
    try:
        for owner in owners:
            reads.selection(owner, type(owner)._fused_plan)
        layers = []
        for stage in stages[chain.first : chain.last + 1]:
            if rules.is_linear(stage.called):
                layers.append(reads.linear(stage.called))
            else:
                reads.stage(stage)
        _end(reads, stages, chain)
    except Unknown:
        return None
    return _made(reads, layers, [name for _, _, name, _ in chain.layers], slope_of(chain.layers), Form.CHAIN)


def decided_gate(
    owner: nn.Module, linears: Sequence[Any], act: Stage | None, ready: call.Ready, form: Form
) -> _C.Decided | Checked | None:
    """Return the decision for a gated layer of one or two linear layers; None as :func:`decided`."""
    weight, _, name, slope = ready
    if call.watcher is not None or not may_be_kept(weight):
        return None
    reads = Reads(owner)
    try:
        reads.selection(owner, type(owner)._fused_plan)  # type: ignore[attr-defined]
        layers = [reads.linear(linear) for linear in linears]
        if act is not None:
            reads.stage(act)
    except Unknown:
        return None
    return _made(reads, layers, [name] * len(layers), slope, form)


def _made(
    reads: Reads, layers: Sequence[Layer], activations: Sequence[str], slope: float, form: Form
) -> _C.Decided | Checked:
    reads.globals += [
        (vars(F), "linear", call.STOCK_LINEAR[0]),
        (vars(call), "watcher", None),
        (vars(rules), "version", rules.version),
    ]
    reads.class_attributes.append((nn.Linear, "forward", call.STOCK_LINEAR[1]))
    made = reads.decided(layers, [ACTIVATIONS[name].code for name in activations], slope, form)
    return Checked(made, reads.checks) if reads.checks else made


def _is_end(chain: Chain, module: nn.Module) -> bool:
    """Return True if a module of this class ends the chain in any state: it is no activation, or no layer."""
    if chain.layers[-1][2] == "none":
        return not may_be_activation(module)
    return not (isinstance(module, nn.Linear) or rules.is_linear(module))


def _end(reads: Reads, stages: Sequence[Stage], chain: Chain) -> None:
    """Note why the chain ends where it ends: while that holds, it does not become longer."""
    last = chain.last + 1
    while last < len(stages) and (is_identity(stages[last].called) or changes_nothing(stages[last])):
        reads.stage(stages[last])
        last += 1
    if last == len(stages):
        return
    called = stages[last].called
    if type(called) is nn.Dropout:
        reads.stage(stages[last])
    elif isinstance(called, nn.Module) and _is_end(chain, called):
        reads.module(called, calls_forward_alone=False)
    elif called is not F.dropout:
        raise Unknown
