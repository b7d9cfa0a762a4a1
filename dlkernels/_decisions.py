"""Decisions that hold until something changes that they read. So a call need not decide anew.

A decision is that a module's call is one chain of layers, or one gated layer. :class:`Reads` writes down all that it
read: the classes of the modules, their hooks and attributes, the children of containers, the modes of torch.
``_C.Decided`` compares this list with what is there now, in less than a microsecond, and runs the layers; it returns
None if anything differs.
:func:`run_again` is called before anything is looked up; a gated layer looks its callees up before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils import _python_dispatch

from dlkernels import _C
from dlkernels._ops.modes import are_plain, autocast_active, under_transform

MISSING = object()
_MOST = 16384  # decisions that are kept, of 4 KiB: more than a model has places

_HOOKS = (
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
)


class Decision(Protocol):
    """``_C.Decided``, or what has its methods."""

    def run(self, owner: Any, x: Any, /, *given: Any) -> Any: ...
    def activations(self) -> tuple[int, ...]: ...


_decided: dict[Any, tuple[Decision, Any]] = {}  # with a mark of the place's own


def run_again(key: Any, owner: Any, x: Any, *given: Any) -> Tensor | None:
    """Return the layers' output if the decision under this key still holds, else None.

    ``given`` are the parameters of the layers that were noted as such (:class:`Reads`).
    """
    found = _decided.get(key)
    return None if found is None else found[0].run(owner, x, *given)


def mark_of(key: Any) -> Any:
    found = _decided.get(key)
    return None if found is None else found[1]


def is_kept(key: Any) -> bool:
    return key in _decided


def keep(key: Any, decided: Decision | None, mark: Any = None) -> None:
    """Remember a decision. None leaves an earlier one: it may hold again after autocast or another mode."""
    if decided is None:
        return
    if len(_decided) >= _MOST:  # most of their modules are gone
        _decided.clear()
    _decided[key] = decided, mark


def may_be_kept(x: Tensor, *parameters: Tensor) -> bool:
    """Return True if ``_C.Decided`` takes tensors of these kinds under the modes that torch has now."""
    return (
        (x.is_cpu or x.is_cuda)
        and are_plain(x, *parameters)
        and not under_transform()
        and not autocast_active(x)
        and not torch._C._len_torch_function_stack()
        and not _python_dispatch._is_in_non_infra_torch_dispatch_mode
    )


class Form(IntEnum):
    """How the layers of a decision belong together, as in ``csrc/python/decided.cpp``."""

    CHAIN = 0
    GATED = 1  # two with one input: the gate, then up
    HALVES = 2  # one, whose output is gate and up side by side
    HALVES_SWAP = 3  # likewise, up first


Place = tuple[nn.Module, str]  # a module, and the name of its parameter
# The places of weight and bias (None: no bias is given), and True if a call of the decision gives these parameters too:
# then they must be those at the places.
Layer = tuple[Place, Place | None, bool]


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

    def attributes(self, module: nn.Module, names: Iterable[str]) -> None:
        self.module(module).extend((None, name, module.__dict__.get(name, MISSING)) for name in names)

    def parameters(self, layer: nn.Module) -> Layer:
        """Note a layer, whose weight and bias ``_C.Decided`` reads at each call."""
        for name in ("weight", "bias"):
            if name in layer.__dict__ or name not in layer._parameters:
                raise Unknown
            self.module(layer).append((None, name, MISSING))
        return (layer, "weight"), (layer, "bias"), False

    def children(self, container: nn.Module, calls_forward_alone: bool) -> None:
        """Note the children of a container in their order."""
        entries = self.module(container, calls_forward_alone)
        _, alone, _, _ = self.modules[id(container)]
        self.modules[id(container)] = container, alone, entries, list(container._modules.values())

    def decided(
        self, layers: Sequence[Layer], codes: Sequence[int], slope: float, form: Form = Form.CHAIN
    ) -> _C.Decided:
        """Return the decision for layers with the codes of their activations. That of a gated layer is its gate's."""
        space = vars(torch_module)
        return _C.Decided(
            {
                "missing": MISSING,
                "empty": [space[name] for name in _HOOKS],
                "globals": [
                    *((space, name, space[name]) for name in _HOOKS),
                    (vars(_python_dispatch), "_is_in_non_infra_torch_dispatch_mode", False),
                    (vars(forward_ad), "_current_level", -1),
                    *self.globals,
                ],
                "class_attributes": self.class_attributes,
                "modules": list(self.modules.values()),
                "plain": (Tensor, nn.Parameter),
                "layers": [(*layer, code) for layer, code in zip(layers, codes, strict=True)],
                "slope": slope,
                "form": int(form),
            }
        )
