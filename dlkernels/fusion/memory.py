"""Decisions that hold until something changes that they read. So a call need not decide anew.

:func:`remembered` writes down all that the decision for a chain read: the classes of its modules, their hooks, the
parameters, the flags of dropouts, the children of containers, the modes of torch. ``_C.Decided`` compares this list
with what is there now, in less than a microsecond, and runs the chain; it returns None if anything differs. What cannot
be written down (an activation whose body is read at each call, a rule of the user's) has no memory.

:func:`run_again` is called by rewritten methods, before they look anything up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils import _python_dispatch

from dlkernels import _C
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels.fusion import call, rules
from dlkernels.fusion.stages import Chain, Stage, changes_nothing, is_identity, slope_of

MISSING = object()
_MOST = 4096  # decisions that are kept

_HOOKS = (
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
)

_decided: dict[Any, tuple[_C.Decided, Any]] = {}  # with a mark of the place's own


def run_again(key: Any, owner: Any, x: Any) -> Tensor | None:
    """Return the chain's output if the decision under this key still holds, else None."""
    found = _decided.get(key)
    return None if found is None else found[0].run(owner, x)


def recall(key: Any, owner: Any, x: Any) -> tuple[Tensor, Any] | None:
    """The same, with the mark."""
    found = _decided.get(key)
    if found is None or (y := found[0].run(owner, x)) is None:
        return None
    return y, found[1]


def keep(key: Any, decided: _C.Decided | None, mark: Any = None) -> None:
    if decided is None:
        _decided.pop(key, None)
        return
    if len(_decided) >= _MOST:  # most of their modules are gone
        _decided.clear()
    _decided[key] = decided, mark


class Unknown(Exception):
    """A part of the decision cannot be written down."""


class Reads:
    """A list of all that a decision reads. The owner is the first module of the list."""

    def __init__(self, owner: nn.Module) -> None:
        self.modules: dict[int, tuple[nn.Module, bool, list[Any], list[Any] | None]] = {}
        self.globals: list[tuple[Any, ...]] = []
        self.class_attributes: list[tuple[Any, ...]] = []
        self.module(owner, calls_forward_alone=False)

    def module(self, module: nn.Module, calls_forward_alone: bool = True) -> list[Any]:
        """Note the class of a module, and that a call of it runs its forward alone; return its list of entries."""
        _, before, entries, children = self.modules.get(id(module), (module, False, [], None))
        self.modules[id(module)] = module, calls_forward_alone or before, entries, children
        return entries

    def attributes(self, module: nn.Module, names: Iterable[str], values: dict[str, Any]) -> None:
        self.module(module).extend((None, name, values.get(name, MISSING)) for name in names)

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

    def children(self, container: nn.Module, calls_forward_alone: bool) -> None:
        """Note the children of a container in their order."""
        entries = self.module(container, calls_forward_alone)
        _, alone, _, _ = self.modules[id(container)]
        self.modules[id(container)] = container, alone, entries, list(container._modules.values())

    def linear(self, linear: nn.Module) -> None:
        if type(linear) is not nn.Linear:
            raise Unknown
        parameters = linear._parameters
        entries = self.module(linear)
        for name in ("weight", "bias"):
            entries.append(("_parameters", name, parameters[name]))
            entries.append((None, name, MISSING))

    def stage(self, stage: Stage) -> None:
        """Note what decided for a stage that is no layer."""
        called = stage.called
        if type(called) is nn.Dropout or type(called) is nn.Identity:
            read: tuple[str, ...] | None = ("p", "training") if type(called) is nn.Dropout else ()
        else:
            read = () if called is F.dropout else rules.attributes_read(called)
        if read is None:
            raise Unknown
        if isinstance(called, nn.Module):
            self.attributes(called, read, called.__dict__)

    def selection(self, owner: Any, plan: Any) -> None:
        """Note the class of an owner, and the modules on the paths that it leaves out."""
        self.module(owner, calls_forward_alone=False)
        for path in plan.without:
            module = owner
            for name in path.split("."):
                self.module(module, calls_forward_alone=False).append(
                    ("_modules", name, module._modules.get(name, MISSING))
                )
                module = module._modules.get(name)
                if module is None:
                    break


def decided(reads: Reads, stages: Sequence[Stage], chain: Chain, owners: Iterable[Any]) -> _C.Decided | None:
    """Return the decision for a chain; None if what it read cannot be written down.

    ``reads`` holds already what led to the stages. ``owners`` are the modules whose plans selected them.
    """
    weight = chain.layers[0][0]
    if not (weight.is_cpu or (weight.is_cuda and len(chain.layers) > 1)) or call.watcher is not None:
        return None
    if torch.is_autocast_enabled(weight.device.type):
        return None
    try:
        for owner in owners:
            reads.selection(owner, type(owner)._fused_plan)
        for stage in stages[chain.first : chain.last + 1]:
            if rules.is_linear(stage.called):
                reads.linear(stage.called)
            else:
                reads.stage(stage)
        _end(reads, stages, chain)
    except Unknown:
        return None
    space = vars(torch_module)
    return _C.Decided(
        {
            "missing": MISSING,
            "empty": [space[name] for name in _HOOKS],
            "globals": [
                *((space, name, space[name]) for name in _HOOKS),
                (vars(F), "linear", call.STOCK_LINEAR[0]),
                (vars(_python_dispatch), "_is_in_non_infra_torch_dispatch_mode", False),
                (vars(forward_ad), "_current_level", -1),
                (vars(call), "watcher", None),
                (vars(rules), "version", rules.version),
                *reads.globals,
            ],
            "class_attributes": [(nn.Linear, "forward", call.STOCK_LINEAR[1]), *reads.class_attributes],
            "modules": list(reads.modules.values()),
            "plain": (Tensor, nn.Parameter),
            "layers": [(weight, bias, ACTIVATIONS[name].code) for weight, bias, name, _ in chain.layers],
            "slope": slope_of(chain.layers),
        }
    )


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
    elif isinstance(called, nn.Module) and not rules.is_linear(called) and not isinstance(called, nn.Linear):
        reads.module(called, calls_forward_alone=False)  # its class
    elif called is not F.dropout:
        raise Unknown
