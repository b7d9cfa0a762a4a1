"""The plans as values that print themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass


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
        return self._text(_DIRECTIONS)

    def _text(self, directions: Collection[str]) -> str:
        lines = _lines(self, str, directions)
        rows = [row for row in self if ("forward" if row.op == "forward" else "backward") in directions]
        if rows:
            lines.append("  why:")
            lines += [f"    {row.op} by {row.path}: {row.why}" for row in rows]
        return "\n".join(lines)


class MlpPlan(tuple[LayerPlan, ...]):
    """The plan of a chain of layers: a :class:`LayerPlan` for each.

    ``forward`` and ``backward`` are the steps that run all layers at once; None where they run one by one. ``why`` are
    the reasons for the two. Of an ensemble it is the plan of a member, ``members`` is their number, and ``at_once``
    says that they run at the same time, each on one thread.
    """

    forward: Step | None
    backward: Step | None
    why: tuple[str, str]
    members: int | None = None
    at_once = False

    def __new__(
        cls,
        layers: Iterable[LayerPlan],
        forward: Step | None = None,
        backward: Step | None = None,
        why: tuple[str, str] = ("", ""),
    ) -> MlpPlan:
        plan = super().__new__(cls, layers)
        plan.forward, plan.backward, plan.why = forward, backward, why
        return plan

    def __str__(self) -> str:
        return "\n".join([*self._of_members(), self._of_layers()])

    def _of_members(self) -> list[str]:
        if self.members is None:
            return []
        how = "at the same time, each on one thread" if self.at_once else "one after another"
        return [f"{self.members} members, {how}; each by this plan:"]

    def _of_layers(self) -> str:
        steps = {"forward": self.forward, "backward": self.backward}
        lines = [f"{len(self)} layers"]
        for (direction, step), why in zip(steps.items(), self.why, strict=True):
            lines.append(f"  {direction} {f'as one kernel: {step}' if step else 'layer by layer'}")
            lines.append(f"    why: {why}")
        by_layer = [direction for direction, step in steps.items() if step is None]
        for number, layer in enumerate(self):
            lines.append(f"layer {number}: {layer._text(by_layer)}")
        return "\n".join(lines)


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


def _largest_scratch(plan: LayerPlan | GluPlan) -> int:
    return max((step.scratch_bytes for step in (*plan.forward, *plan.backward)), default=0)


_DIRECTIONS = ("forward", "backward")


def _lines(
    plan: LayerPlan | GluPlan, line_of: Callable[[Step], str], directions: Collection[str] = _DIRECTIONS
) -> list[str]:
    """Return the title, and the steps of these directions, a line each."""
    lines = [plan.title]
    for name, steps in (("forward", plan.forward), ("backward", plan.backward)):
        if name not in directions:
            continue
        if name == "backward":
            lines.append(f"  keeps for backward: {', '.join(plan.keeps) or 'nothing'}")
        lines.append(f"  {name}:" + ("" if steps else " nothing to do"))
        lines += [f"    {number}. {line_of(step)}" for number, step in enumerate(steps, start=1)]
    return lines


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
