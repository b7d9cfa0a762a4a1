"""The plan that would run for a layer or a chain of layers: which kernel makes what, and why. Nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dlkernels import _C
from dlkernels._ops import autocast as _autocast
from dlkernels._ops import linear_act as _linear_act
from dlkernels._ops import linear_glu as _linear_glu
from dlkernels._ops import masks as _masks
from dlkernels._ops import mlp as _mlp
from dlkernels._ops.activations import Activation, activation_named
from dlkernels._ops.modes import autocast, autocast_active, autocast_operands
from dlkernels.choices import Activation as ActivationName


@dataclass(frozen=True)
class Explanation:
    """Which path one product of a layer takes, and why.

    ``op`` is "forward", "dgrad" (gradient of x) or "wgrad" (gradients of weight and bias). ``path`` is one of:

    * on CPU "packed" (our blocked GEMM), "few_rows" (our kernels for small batches), "few_columns" (our kernels for up
      to 16 out_features) or "aten" (torch's GEMM with our elementwise passes);
    * on CUDA "simt" (plain FMAs), "mma" (tensor cores), "hopper" (TMA and wgmma), "cublas" (with our passes) or
      "fused_mlp" (up to 128 features: the weight stays in shared memory, dgrad and wgrad are one kernel);
    * of several layers, on both, "fused_mlp": a block of rows goes through all of them, see :func:`functional.mlp`.

    ``why`` names the row of the route table that decides, if one does. ``kernel`` names dtype, tile and instruction
    set. ``splits`` is the number of slices that the sum is cut in. ``threads`` are the CPU's; 0 on CUDA.
    """

    op: str
    path: str
    kernel: str
    splits: int
    threads: int
    why: str


@dataclass(frozen=True)
class Step:
    """One step of a plan: a kernel or a product of torch's.

    ``kind`` is "forward", "dgrad" or "wgrad" (a product), "backward" (all gradients of a small layer from one read), or
    an elementwise "activation_pass" or "gradient_pass". ``makes`` names the tensors that it writes, ``fused`` the work
    that it does on the way. ``scratch_bytes`` are allocated for the step; buffers that threads keep between calls and
    torch's own workspaces are not counted.
    """

    kind: str
    path: str
    kernel: str
    makes: tuple[str, ...]
    fused: tuple[str, ...]
    splits: int
    scratch_bytes: int
    why: str

    def __str__(self) -> str:
        how = self.path if self.kernel == self.path else f"{self.path} ({self.kernel})"
        parts = [f"{self.kind} -> {', '.join(self.makes)}", how]
        if self.fused:
            parts.append("fused: " + ", ".join(self.fused))
        if self.splits > 1:
            parts.append(f"sum cut in {self.splits} slices")
        if self.scratch_bytes:
            parts.append(f"scratch {_bytes(self.scratch_bytes)}")
        return "; ".join(parts)


class LayerPlan(tuple[Explanation, ...]):
    """The plan of one layer. As a tuple it holds an :class:`Explanation` for forward, dgrad and wgrad; printed it shows
    the steps.

    ``forward`` and ``backward`` are the steps in the order in which they run, backward with all three gradients.
    ``keeps`` names the tensors that forward saves for that backward.
    """

    title: str
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    keeps: tuple[str, ...]

    def __new__(
        cls,
        rows: Iterable[Explanation],
        title: str = "",
        forward: Sequence[Step] = (),
        backward: Sequence[Step] = (),
        keeps: Sequence[str] = (),
    ) -> LayerPlan:
        plan = super().__new__(cls, rows)
        plan.title, plan.keeps = title, tuple(keeps)
        plan.forward, plan.backward = tuple(forward), tuple(backward)
        return plan

    @property
    def scratch_bytes(self) -> int:
        """The largest scratch of a step. dz, where it is in memory, counts for the step that makes it."""
        return _largest_scratch(self)

    def __str__(self) -> str:
        lines = _lines(self, str)
        lines.append("  why:")
        lines += [f"    {row.op} by {row.path}: {row.why}" for row in self]
        return "\n".join(lines)


class MlpPlan(tuple[LayerPlan, ...]):
    """The plan of a chain of layers: a :class:`LayerPlan` for each. ``fused`` is the step that runs all of them at
    once; None where they run one by one. Of an ensemble it is the plan of a member, ``members`` is their number, and
    ``at_once`` says that they run at the same time, each on one thread."""

    fused: Step | None
    members: int | None = None
    at_once = False

    def __new__(cls, layers: Iterable[LayerPlan], fused: Step | None = None) -> MlpPlan:
        plan = super().__new__(cls, layers)
        plan.fused = fused
        return plan

    def __str__(self) -> str:
        return "\n".join([*self._of_members(), self._of_layers()])

    def _of_members(self) -> list[str]:
        if self.members is None:
            return []
        how = "at the same time, each on one thread" if self.at_once else "one after another"
        return [f"{self.members} members, {how}; each by this plan:"]

    def _of_layers(self) -> str:
        if self.fused is None:
            return "\n".join(f"layer {number}: {layer}" for number, layer in enumerate(self))
        lines = [f"{len(self)} layers as one kernel, forward and backward", f"  backward: {self.fused}"]
        return "\n".join([*lines, *(f"  layer {number}: {layer.title}" for number, layer in enumerate(self))])


def explain(
    x: Tensor, weight: Tensor, activation: ActivationName = "relu", *, bias: bool = True, negative_slope: float = 0.01
) -> LayerPlan:
    """The plan that :func:`functional.linear_act` would run for these tensors, forward and backward.

    The answer comes from the same decision that the ops take. Under autocast it is the decision for the tensors as
    autocast casts them or, where kernels convert parameters themselves (bfloat16 on a CPU with such products), as they
    are.

        >>> print(explain(x, weight))

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.
        activation: see :func:`functional.linear_act`.
        bias: the layer has one.
        negative_slope: of ``leaky_relu``; the plan does not depend on it.

    Raises:
        ValueError: unknown activation.
        TypeError: no tensors, or a dtype or layout the kernels do not have.
        RuntimeError: shapes, dtypes or devices that do not fit together.
        NotImplementedError: a device other than CPU and CUDA.
    """
    del negative_slope
    native_casts = isinstance(x, Tensor) and isinstance(weight, Tensor) and _has_native_kernel(x, weight)
    return _explain(x, weight, activation_named(activation), bias, native_casts)


def explain_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    activation: ActivationName | Sequence[ActivationName] = "relu",
    last_activation: ActivationName = "none",
    *,
    bias: bool = True,
) -> MlpPlan:
    """The plan that :func:`functional.mlp` would run for these tensors, from the same decision that the op takes.

    Args:
        x: ``[..., in_features]`` of the first layer.
        weights: one ``[out_features, in_features]`` per layer; each layer takes the output of the one before. Of an
            ensemble one ``[members, out_features, in_features]``.
        activation, last_activation: see :func:`functional.mlp`.
        bias: the layers have one.

    Raises:
        ValueError: unknown activation, or not as many as layers.
        RuntimeError: no layers, or shapes, dtypes or devices that do not fit together.
    """
    _mlp.check_some(weights)
    names = (activation,) * (len(weights) - 1) if isinstance(activation, str) else tuple(activation)
    if len(names) != len(weights) - 1:
        raise ValueError(
            f"explain_mlp: for {len(weights)} weights expected {len(weights) - 1} activations besides last_activation; "
            f"got {len(names)}"
        )
    if weights[0].dim() == 3:
        return _explain_ensemble(x, weights, names, last_activation, bias)
    acts = [activation_named(name) for name in (*names, last_activation)]
    native_casts = autocast_active(x) and _mlp.has_native_kernel(x, weights, [None] * len(weights))
    dtype = torch.get_autocast_dtype(x.device.type) if autocast_active(x) and x.dtype != torch.float64 else x.dtype
    m = math.prod(x.shape[:-1])
    _checked(x, weights[0])
    for before, weight in pairwise(weights):
        _checked(x.new_empty((0, before.shape[0])), weight)
    shapes = [(m, *w.shape) for w in weights]
    with _on_device_of(x):
        slices, kernel, scratch = _C.explain_fused_mlp(x.is_cuda, shapes, _name(dtype))
    layers: list[LayerPlan] = []
    applied = summed = False  # by the layer above: the activation gradient of this layer, and its dbias
    for number in reversed(range(len(weights))):  # from the top, as backward runs
        below = number > 0 and acts[number - 1].name != "none" and not native_casts
        masks = number + 1 < len(weights) and not slices
        place = _Place(below, below and bias, applied, summed, masks)
        if number:
            before = torch.empty((m, weights[number - 1].shape[0]), device="meta")  # contiguous, as layers give it
            layer = _plan(before, 0, weights[number], dtype, acts[number], bias, native_casts, x.is_cuda, place=place)
        else:
            layer = _explain(x, weights[0], acts[0], bias, native_casts, place)
        applied = any(BELOW in step.fused for step in layer.backward)
        summed = any("dbias_below" in step.makes for step in layer.backward)
        layers.insert(0, layer)
    if not slices:
        return MlpPlan(layers)
    why = (
        "narrow layers: their weights fit in shared memory together"
        if x.is_cuda
        else "narrow layers and many rows: a block of rows goes through all of them while it is in cache"
    )
    fused = Step(
        "backward",
        "fused_mlp",
        kernel,
        ("dx", "dweight", *["dbias"] * bias),
        ("dz and the gradients of every layer",),
        slices,
        scratch,
        why,
    )
    threads = 0 if x.is_cuda else torch.get_num_threads()
    return MlpPlan(
        (
            LayerPlan(
                [
                    Explanation(row.op, "fused_mlp", kernel, slices if row.op == "wgrad" else 1, threads, why)
                    for row in layer
                ],
                layer.title,
                keeps=layer.keeps,
            )
            for layer in layers
        ),
        fused,
    )


def _explain_ensemble(
    x: Tensor, weights: Sequence[Tensor], hidden: Sequence[ActivationName], last: ActivationName, bias: bool
) -> MlpPlan:
    members = weights[0].shape[0]
    x = _mlp.as_members(x, weights)
    if members == 0:
        raise ValueError("explain_mlp: expected an ensemble with at least one member, got none")
    torch._check(
        x.shape[0] == members,
        lambda: f"explain_mlp: the weights are of {members} members, x {tuple(x.shape)} is not",
    )
    _mlp.check_ensemble(x, weights, [None] * len(weights))
    if autocast_active(x):
        x, *weights = autocast_operands(x, *weights)
    with torch.autocast(x.device.type, enabled=False):
        plan = explain_mlp(x[0], [w[0] for w in weights], hidden, last, bias=bias)
    plan.members = members
    if not x.is_cuda:
        shapes = [(math.prod(x.shape[1:-1]), *w.shape[1:]) for w in weights]
        in_bf16 = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
        plan.at_once = _C.explain_members(members, shapes, _name(x.dtype), torch.get_num_threads(), in_bf16)
    return plan


@dataclass(frozen=True)
class GluPlan:
    """The plan of a gated layer; printed it shows the steps.

    ``forward`` and ``backward`` are the steps in the order in which they run, backward with all gradients. ``keeps``
    names the tensors that forward saves for that backward. ``fused`` says that forward is one step.
    """

    title: str
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    keeps: tuple[str, ...]
    fused: bool

    @property
    def scratch_bytes(self) -> int:
        """The largest scratch of a step; the gradients of both preactivations count for the step that makes them."""
        return _largest_scratch(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self, lambda step: f"{step}" if step.path == "elementwise" else f"{step}; {step.why}"))


def explain_glu(
    x: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: ActivationName = "silu", *, bias: bool = False
) -> GluPlan:
    """The plan that :func:`functional.linear_glu` would run for these tensors, forward and backward.

    The answer comes from the same decision that the op takes. Under autocast it is the decision for the tensors as
    autocast casts them.

    Args:
        x: ``[..., in_features]``.
        weight_gate, weight_up: ``[out_features, in_features]`` each.
        activation: see :func:`functional.linear_act`.
        bias: the layer has both biases.

    Raises:
        ValueError: unknown activation.
        TypeError: no tensors, or a dtype or layout the kernels do not have.
        RuntimeError: shapes, dtypes or devices that do not fit together.
        NotImplementedError: a device other than CPU and CUDA.
    """
    act = activation_named(activation)
    cast_x, cast_gate = _checked(x, weight_gate, "weight_gate")
    _, cast_up = _checked(x, weight_up, "weight_up")
    _linear_glu.check_shapes(cast_x, cast_gate, cast_up)
    m, (n, k), dtype = math.prod(x.shape[:-1]), weight_gate.shape, cast_x.dtype
    rows = cast_x.reshape(m, x.shape[-1])

    cast = weight_gate.dtype != dtype  # autocast's copies are tensors of their own
    storages = [t.untyped_storage().data_ptr() for t in (weight_gate, weight_up)]

    def view(t: Tensor, cast_t: Tensor) -> tuple[int, ...]:
        return (0 if cast else t.data_ptr(), *cast_t.stride())

    with _on_device_of(x):
        plan = _C.explain_glu(
            cuda=x.is_cuda,
            m=m,
            n=n,
            k=k,
            dtype=_name(dtype),
            act=act.code,
            x=(x.data_ptr() if x.is_cuda and x.dtype == dtype else 0, *rows.stride()),
            weight_gate=view(weight_gate, cast_gate),
            weight_up=view(weight_up, cast_up),
            one_memory=not cast and storages[0] == storages[1],
            bias=bias,
            threads=torch.get_num_threads(),
            in_bf16=torch.backends.mkldnn.matmul.fp32_precision == "bf16",  # type: ignore[attr-defined]
        )
    device = "cuda" if x.is_cuda else f"cpu, {torch.get_num_threads()} threads"
    return GluPlan(
        f"x [{m}, {k}], two weights [{n}, {k}], {act.name}, {_name(dtype)} on {device}",
        tuple(_glu_step(row, act, bias, plan["fused"]) for row in plan["forward"]),
        tuple(_glu_step(row, act, bias, plan["fused"]) for row in plan["backward"]),
        ("x", "weight_gate", "weight_up", "gate", "up"),
        plan["fused"],
    )


def _largest_scratch(plan: LayerPlan | GluPlan) -> int:
    return max((step.scratch_bytes for step in (*plan.forward, *plan.backward)), default=0)


def _lines(plan: LayerPlan | GluPlan, line_of: Callable[[Step], str]) -> list[str]:
    """Return the title, and the steps of both directions, a line each."""
    lines = [plan.title]
    for name, steps in (("forward", plan.forward), ("backward", plan.backward)):
        if name == "backward":
            lines.append(f"  keeps for backward: {', '.join(plan.keeps) or 'nothing'}")
        lines.append(f"  {name}:" + ("" if steps else " nothing to do"))
        lines += [f"    {number}. {line_of(step)}" for number, step in enumerate(steps, start=1)]
    return lines


def _glu_step(row: dict[str, Any], act: Activation, bias: bool, fused: bool) -> Step:
    done = []
    if row["kind"] == "forward":
        done += ["biases" if fused else "bias"] * bias + ([act.name] if fused and act.name != "none" else [])
        done += ["the product of both halves"] * fused
    fields = ("kind", "path", "kernel", "splits", "scratch_bytes", "why")
    return Step(makes=tuple(row["makes"]), fused=tuple(done), **{field: row[field] for field in fields})


def _has_native_kernel(x: Tensor, weight: Tensor) -> bool:
    return autocast_active(x) and _autocast.has_native_kernel(x, weight, None)


BELOW = "activation gradient of the layer below"


@dataclass(frozen=True)
class _Place:
    """The place of a layer in a chain. The defaults are those of a layer by itself."""

    below: bool = False  # its dgrad may apply the activation gradient of the layer below
    dbias_below: bool = False  # and may sum that layer's dbias
    applied: bool = False  # the layer above has applied this layer's activation gradient
    summed: bool = False  # and has summed its dbias
    masks: bool = True  # forward may keep a mask


ALONE = _Place()


def _on_device_of(t: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _checked(x: Tensor, weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Raise as the op would. Return both, without memory, as autocast casts them."""
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        got = f"{type(x).__name__} and {type(weight).__name__}"
        raise TypeError(f"explain: x and {name} must be tensors; got {got}")
    for which, t in (("x", x), (name, weight)):
        if t.layout is not torch.strided or t.is_quantized:
            raise TypeError(f"explain: {which} must be a dense tensor, got layout {t.layout}, dtype {t.dtype}")
    if weight.device != x.device:
        raise RuntimeError(f"explain: {name} is on {weight.device}, but x is on {x.device}; move one of them")
    cast_x, cast_weight = _meta_like(x), _meta_like(weight)
    if autocast_active(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        cast_x, cast_weight = autocast(cast_x, dtype), autocast(cast_weight, dtype)
    _linear_act.check_shapes(cast_x, cast_weight)
    if x.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"explain() knows the paths on cpu and cuda, and x is on {x.device}")
    return cast_x, cast_weight


def _explain(
    x: Tensor, weight: Tensor, act: Activation, bias: bool, native_casts: bool, place: _Place = ALONE
) -> LayerPlan:
    cast_x, cast_weight = _checked(x, weight)
    # The op views x as rows; where no such view exists it copies.
    rows = (_meta_like(x) if native_casts else cast_x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    # torch allocates autocast's copies, which are aligned like address 0.
    address = x.data_ptr() if x.is_cuda and cast_x.dtype == x.dtype else 0
    casts = str(x.dtype).removeprefix("torch.") if native_casts else ""
    return _plan(rows, address, weight, cast_weight.dtype, act, bias, native_casts, x.is_cuda, casts, place)


def _plan(
    rows: Tensor,
    address: int,
    weight: Tensor,
    dtype: torch.dtype,
    act: Activation,
    bias: bool,
    native_casts: bool,
    cuda: bool,
    casts: str = "bfloat16",
    place: _Place = ALONE,
) -> LayerPlan:
    """``rows`` [M, K] lies on meta, at ``address`` on the device."""
    (n, k), m = weight.shape, rows.shape[0]
    beside = _made_beside_y(act, dtype, n, cuda and place.masks)
    strides = weight.stride() if native_casts or dtype == weight.dtype else _meta_like(weight).to(dtype).stride()
    with _on_device_of(weight):
        plan = _C.explain(
            cuda=cuda,
            m=m,
            n=n,
            k=k,
            dtype=_name(dtype),
            act=act.code,
            x=(address, *rows.stride()),
            weight=(weight.data_ptr() if cuda and dtype == weight.dtype else 0, *strides),
            beside=beside,
            saved=act.name != "none" and not place.applied,
            bias=bias and not place.summed,
            below=place.below,
            dbias_below=place.dbias_below,
            casts=casts if native_casts else "",
            threads=torch.get_num_threads(),
            in_bf16=torch.backends.mkldnn.matmul.fp32_precision == "bf16",  # type: ignore[attr-defined]
        )
    threads = 0 if cuda else torch.get_num_threads()
    device = "cuda" if cuda else f"cpu, {threads} threads"
    return LayerPlan(
        (Explanation(threads=threads, **row) for row in plan["routes"]),
        f"x [{m}, {k}], weight [{n}, {k}], {act.name}, {_name(dtype)} on {device}",
        [_step(row, act, bias) for row in plan["forward"]],
        [_step(row, act, bias) for row in plan["backward"]],
        ("x", "weight", *((beside or "y",) if act.name != "none" else ())),
    )


def _made_beside_y(act: Activation, dtype: torch.dtype, out_features: int, masks: bool) -> str:
    """The tensor beside y that forward makes for backward: "z", "mask", or "" for none."""
    if not act.saves_output:
        return "z"
    masked = act.needs_sign_only and dtype in (torch.bfloat16, torch.float16) and out_features % _masks.BITS == 0
    return "mask" if masks and masked else ""


def _step(row: dict[str, Any], act: Activation, bias: bool) -> Step:
    fused = []
    if row["kind"] == "forward":
        by_library = row["path"] in ("aten", "cublas")  # its activation is a pass of its own
        fused += ["bias"] * bias + [act.name] * (act.name != "none" and not by_library)
    if row["dz_in_load"] and "dz" not in row["makes"]:
        fused.append("dz made while grad_y is loaded")
    if "dbias" in row["makes"] and row["kind"] == "wgrad":
        fused.append("dbias summed while dz is loaded")
    if row["below"]:
        fused.append(BELOW)
    fields = ("kind", "path", "kernel", "splits", "scratch_bytes", "why")
    return Step(makes=tuple(row["makes"]), fused=tuple(fused), **{field: row[field] for field in fields})


def _meta_like(t: Tensor) -> Tensor:
    """A tensor without memory that lies as ``t`` does, so that a cast of it lies as a cast of ``t`` would."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
