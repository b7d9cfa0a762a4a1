"""The layers that are measured, and the device that they are measured on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlkernels import _C, routing
from dlkernels._errors import ExpectedError
from dlkernels._ops.modes import has_bf16_library
from dlkernels.fusion.rules import linear_rule
from dlkernels.fusion.values import walk
from dlkernels.nn import LinearAct
from dlkernels.routing import LIBRARY
from dlkernels.testing.agreement import arguments


class TuneError(ExpectedError, RuntimeError):
    """Nothing can be measured here, or in this way; the message says why."""


class NoLayers(TuneError):
    """A model ran no linear layer that can be measured."""


@dataclass(frozen=True)
class Size:
    """The size of a layer, y [m, n] = act(x [m, k] · weight [n, k]ᵀ + bias [n]), its dtype, such as "float32", and the
    device, "cpu" or "cuda"."""

    m: int
    k: int
    n: int
    dtype: str
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.m}, {self.k}→{self.n} {self.dtype}"

    @classmethod
    def of(cls, x: Tensor, weight: Tensor) -> Size:
        (m, k), n = x.shape, weight.shape[0]
        return cls(m, k, n, str(x.dtype).removeprefix("torch."), x.device.type)


GRID = (
    (256, 784, 256),
    (256, 256, 10),
    (128, 9216, 4096),
    (128, 4096, 4096),
    (32, 3136, 512),
    (4096, 512, 2048),
    (1, 1024, 1024),
    (32, 1024, 1024),
    (4096, 768, 3072),
    (1024, 768, 3072),
    (65536, 64, 64),
    (65536, 128, 128),
    (8192, 256, 1024),
    (2048, 2048, 2048),
    (20000, 32, 1),
    (4096, 256, 16),
    (1576, 384, 1536),
    (333, 1000, 1000),
    (64, 512, 512),
    (4, 512, 512),
    (8, 768, 3072),
    (12345, 77, 131),
)
"""(m, k, n) of the layers that are measured if none are named: the grid of the benchmark."""

FORCED = {"cpu": "DLKERNELS_CPU_GEMM", "cuda": "DLKERNELS_CUDA_GEMM"}


def kind_of(model: nn.Module | None, device: str | torch.device | None) -> str:
    """Return "cpu" or "cuda"; see :func:`tune`, also for what it raises."""
    if device is None:
        first = next(model.parameters(), None) if model is not None else None
        device = first.device if first is not None else "cpu"
    kind = torch.device(device).type
    if kind not in LIBRARY:
        raise TuneError(f"tune measures on {' and '.join(LIBRARY)}, and the device is {device}")
    if kind == "cuda" and (why := no_gpu()):
        raise TuneError(f"tune: {why}")
    return kind


def no_gpu() -> str:
    """Return why nothing can be measured on a GPU here; empty if it can."""
    if _C.build_config()["cuda"] is None:
        return "this build has no CUDA kernels; build it where nvcc and a CUDA build of torch are"
    return "" if torch.cuda.is_available() else "torch sees no GPU here"


def usual_dtypes(device: str = "cpu") -> tuple[str, ...]:
    """Return the dtypes that are measured unless others are named: float32, and bfloat16 where torch is fast in it.

    On a CPU without AVX-512, torch has no library for bfloat16. Its backward runs plain loops: a step of 128, 9216→4096
    took 31 s on a Zen 3, and the whole grid more than an hour.
    """
    return ("float32", "bfloat16") if device == "cuda" or has_bf16_library() else ("float32",)


def sizes_named(shapes: Iterable[tuple[int, int, int]], dtypes: Sequence[str], device: str = "cpu") -> list[Size]:
    """Return the layers of these shapes in these dtypes; raises ValueError."""
    named = list(dict.fromkeys(shapes))
    for shape in named:
        if len(shape) != 3 or any(type(size) is not int or size < 1 for size in shape):
            raise ValueError(f"tune: expected (rows, in_features, out_features) of at least 1, got {shape}")
    return [Size(*shape, dtype, device) for dtype, shape in itertools.product(dtypes, named)]


def check_dtypes(dtypes: Sequence[str]) -> None:
    """Raise ValueError for a dtype that is not measured."""
    if unknown := [dtype for dtype in dtypes if dtype not in routing.DTYPES]:
        raise ValueError(f"tune: expected dtypes from {', '.join(routing.DTYPES)}; got {', '.join(unknown)}")


def sizes_of(model: nn.Module, example_inputs: Any, device: str = "cpu") -> list[Size]:
    """Return the linear layers that a copy of ``model`` runs in eval mode; see :func:`tune` for what it raises."""
    again = copy.deepcopy(model).eval()
    found: dict[Size, None] = {}

    def watch(module: nn.Module, given: tuple[Any, ...]) -> None:
        rule = linear_rule(type(module))
        parameters = rule(module) if rule is not None else (getattr(module, "weight", None), None)
        if not given or parameters is None or not isinstance(given[0], Tensor) or parameters[0] is None:
            return
        x, weight = given[0], parameters[0]
        if x.device.type != device:
            raise TuneError(f"tune measures on {device}, and a layer of the model is on {x.device}")
        name = str(x.dtype).removeprefix("torch.")
        if name in routing.DTYPES and weight.dtype == x.dtype and min(x.numel(), weight.numel()) > 0:
            n, k = weight.shape
            found[Size(x.numel() // k, k, n, name, device)] = None

    for _, module in walk(again):
        if is_linear(module):
            module.register_forward_pre_hook(watch)
    args, kwargs = arguments(example_inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        again(*args, **kwargs)
    if not found:
        raise NoLayers(_none_found(again))
    return list(found)


def _none_found(model: nn.Module) -> str:
    """Return what was looked for, and which layers there are instead."""
    linear, others = [], []
    for name, module in walk(model):
        if is_linear(module):
            linear.append(f"{name or 'the model'} ({type(module).__name__})")
        elif any(parameter is not None for parameter in module._parameters.values()):
            others.append(type(module).__name__)
    said = "tune: no linear layer with a floating dtype of its weight was called on rows of the example inputs. "
    said += "Looked for: modules that are an nn.Linear or a layer of dlkernels.nn, and chains of functional.mlp"
    if linear:
        said += f"; those of the model were not called so: {_listed(linear)}"
    if others:
        said += f"; layers of other kinds, which are not measured: {_listed(others)}"
    return f"{said}. shapes=[(rows, in_features, out_features)] measures layers by size"


def _listed(names: Iterable[str], most: int = 6) -> str:
    once = list(dict.fromkeys(names))
    return ", ".join(once[:most]) + (f" and {len(once) - most} more" if len(once) > most else "")


def is_linear(module: nn.Module) -> bool:
    """Return True for modules whose product is measured."""
    return isinstance(module, LinearAct) or linear_rule(type(module)) is not None
