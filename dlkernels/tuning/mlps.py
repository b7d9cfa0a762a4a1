"""The chains of layers that are measured, and the measurement of one: one kernel, or layer by layer."""

from __future__ import annotations

import copy
import datetime
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlkernels import _C, functional, routing
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels._ops.mlp import forward_op, outputs_of_layers, route
from dlkernels.fusion import fuse
from dlkernels.route_table import MLP_OPS, MLP_PATHS, STOCK, Row, Table, fallback
from dlkernels.testing import Mlp, MlpJudge
from dlkernels.testing.agreement import arguments
from dlkernels.tuning.clock import Unsteady, time_mlp_backward, time_mlp_forward
from dlkernels.tuning.layers import TuneError
from dlkernels.tuning.measurement import JUDGED, SECONDS, Measured, choose, where_of
from dlkernels.tuning.paths import using
from dlkernels.tuning.table import commit_of_sources

MLP_GRID = (
    (1, 8, 64, 64, 4),
    (32, 8, 64, 64, 4),
    (256, 8, 64, 64, 4),
    (256, 50, 128, 64, 1),
    (1024, 100, 256, 256, 1),
    (4096, 63, 256, 256, 256, 256, 4),
    (65536, 64, 64, 64, 64, 64, 64),
    (65536, 128, 128, 128, 128, 128, 128),
)
"""Rows and features of the chains that are measured if nothing is named."""


@dataclass(frozen=True)
class MlpSize:
    """The size of a chain of layers: m rows, the features of its input and of every layer's output; its dtype, such as
    "float32", and the device, "cpu" or "cuda"."""

    m: int
    features: tuple[int, ...]
    dtype: str
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.m}, {'→'.join(map(str, self.features))} {self.dtype}"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """[M, N, K] of each layer."""
        return [(self.m, n, k) for k, n in pairwise(self.features)]


def mlps_named(mlps: Iterable[Sequence[int]], dtypes: Sequence[str], device: str = "cpu") -> list[MlpSize]:
    """Return the chains of these rows and features in these dtypes; raises ValueError."""
    named = list(dict.fromkeys(map(tuple, mlps)))
    for one in named:
        if len(one) < 4 or any(type(size) is not int or size < 1 for size in one):
            expected = "a chain as (rows, in_features, hidden features, ..., out_features), all of at least 1"
            raise ValueError(f"tune: expected {expected}; got {one}")
    return [MlpSize(m, tuple(features), dtype, device) for dtype, (m, *features) in itertools.product(dtypes, named)]


def mlps_of(model: nn.Module, example_inputs: Any, device: str = "cpu") -> list[MlpSize]:
    """Return the chains that a fused copy of ``model`` runs in eval mode and that one kernel could take; see
    :func:`tune` for what it raises."""
    found: dict[MlpSize, None] = {}

    class Watch(TorchDispatchMode):
        @classmethod
        def is_infra_mode(cls) -> bool:
            return True  # under other modes fused places run as in stock

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is forward_op:
                x, weights = args[:2]
                if x.device.type != device:
                    raise TuneError(f"tune measures on {device}, and a chain of the model is on {x.device}")
                if weights[0].dim() == 2 and x.numel() > 0 and len(weights) > 1:
                    features = (weights[0].shape[1], *(weight.shape[0] for weight in weights))
                    name = str(x.dtype).removeprefix("torch.")
                    found[MlpSize(x.numel() // features[0], features, name, device)] = None
            return func(*args, **(kwargs or {}))

    again = fuse(copy.deepcopy(model).eval(), min_gain=0)
    args, kwargs = arguments(example_inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), Watch():
        again(*args, **kwargs)
    return [size for size in found if takes("fused_mlp", size)]


def takes(path: str, size: MlpSize) -> tuple[str, ...]:
    """Return the directions that take ``path`` if a table says so."""
    with using(table_of(path, size, ()), size.device == "cuda"):
        slices = {op: route(size.device == "cuda", op == "mlp_backward", size.shapes, size.dtype)[0] for op in MLP_OPS}
    return tuple(op for op in MLP_OPS if (slices[op] > 0) == (path == "fused_mlp"))


def table_of(path: str, size: MlpSize, beneath: Sequence[Table]) -> int:
    """Return a route table by which chains of ``size`` take a path in both directions, and layers the routes of the
    tables ``beneath``."""
    rows, _ = routing.handed(beneath, size.device)
    return _C.make_routes(
        rows, [(op, size.dtype, size.m, size.features, 0, path, "tried by tune", 0) for op in MLP_OPS]
    )


def measure_mlp(size: MlpSize, beneath: Sequence[Table], seconds: float = SECONDS) -> Measured:
    """Judge and time both paths of one chain with ReLU between its layers; nothing is written.

    Layer by layer each layer takes the routes of the tables ``beneath``.
    """
    able = {path: takes(path, size) for path in MLP_PATHS}
    refused = _objections(size, [path for path, ops in able.items() if ops], beneath)
    where, date, commit = where_of(size.device), datetime.date.today().isoformat(), commit_of_sources()
    k, *hidden, n = size.features
    mlp, timed, busy = draw(size), {}, False
    try:
        for op, clock in zip(MLP_OPS, (time_mlp_forward, time_mlp_backward), strict=True):
            right = [path for path in MLP_PATHS if op in able[path] and path not in refused]
            if right:
                timed[op] = clock(mlp, {path: table_of(path, size, beneath) for path in right}, seconds)
    except Unsteady:
        timed, busy = {}, True
    rows = []
    for op in MLP_OPS:
        wrong = tuple(path for path in MLP_PATHS if op in able[path] and path in refused)
        path, us = fallback(size.device, op), {}
        if op in timed:
            times, stock = timed[op]
            path, us = choose(times, stock, _usual(op, size), None), {STOCK: stock, **times}
        if us or wrong:  # the rules might take a wrong path where no row says otherwise
            rows.append(Row(op, size.dtype, size.m, n, k, where, path, us, date, commit, wrong, tuple(hidden)))
    return Measured(size, tuple(rows), refused, busy)


def _usual(op: str, size: MlpSize) -> str:
    """Return the path that the built-in rules take."""
    with using(-1, size.device == "cuda"):
        slices, *_ = route(size.device == "cuda", op == "mlp_backward", size.shapes, size.dtype)
    return "fused_mlp" if slices else "layers"


def _objections(size: MlpSize, paths: Sequence[str], beneath: Sequence[Table]) -> dict[str, str]:
    """Return those of the paths whose results break the tolerance rule, and how."""
    parameters = sum(n * k for _, n, k in size.shapes)
    judged = replace(size, m=min(size.m, max(1, JUDGED // parameters)))
    judge = MlpJudge(draw(judged))
    found = {}
    for path in paths:
        with using(table_of(path, judged, beneath), size.device == "cuda"):
            if (why := judge.objection(_outputs)) is not None:
                found[path] = why
    return found


def _outputs(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of all layers of a chain as it runs in training, the last one with its graph."""
    acts = [ACTIVATIONS["relu"]] * (len(weights) - 1) + [ACTIVATIONS["none"]]
    *hidden, _ = outputs_of_layers(x, weights, biases, acts)
    return [*hidden, functional.mlp(x, weights, biases)]


def draw(size: MlpSize) -> Mlp:
    """Draw a chain: x and the gradient of y are normal, weights and biases uniform in ±1/√k, as in ``nn.Linear``."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, size.dtype)

    def uniform(k: int, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-(k**-0.5), k**-0.5, generator=generator).to(dtype)

    weights = [uniform(k, n, k) for _, n, k in size.shapes]
    biases = [uniform(k, n) for _, n, k in size.shapes]
    x, g = (torch.randn(size.m, f, generator=generator).to(dtype) for f in (size.features[0], size.features[-1]))
    activations = ["relu"] * (len(weights) - 1) + ["none"]
    return Mlp(x, weights, biases, g, activations).to(size.device)
