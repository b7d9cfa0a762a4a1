"""The plans of the GPU grid without a route table, as docs/guide/routes.md shows them.

``python -m tests.planning.gpu_plans`` prints the table in Markdown. It needs no GPU: a plan is a function of a problem
and of what a device answers, and Hopper's answers are made up here.
"""

import ctypes
import tempfile
from pathlib import Path

from bench.grid import GPU_SHAPES, Shape
from dlkernels._ops.activations import ACTIVATIONS
from tests.planning import library

HOPPER = 90
NARROW = 128  # the most features that fused_mlp_takes in 16 bits, both in and out
PASSES = {"activation_pass": "activation", "gradient_pass": "dz and dbias"}
SHOWN = {"bf16": "bfloat16", "fp32": "float32"}


def steps(planning: ctypes.CDLL, shape: Shape, dtype: str) -> dict[str, str]:
    """The path of every step of linear + ReLU, forward and backward, by the step's kind."""
    m, n, k = map(ctypes.c_int64, (shape.m, shape.n, shape.k))
    is_narrow = dtype != "float32" and max(shape.n, shape.k) <= NARROW
    code, relu = library.DTYPES.index(dtype), ACTIVATIONS["relu"].code
    forward = planning.cuda_forward(b"", HOPPER, is_narrow, m, n, k, code, relu, 0, 0)
    wants = library.DX | library.DWEIGHT | library.DBIAS
    backward = planning.cuda_backward(b"", HOPPER, is_narrow, m, n, k, code, relu, wants, 1)
    both = f"{forward.decode()}|{backward.decode()}".split("|")
    return dict(step.split()[:2] for step in both)


def table(planning: ctypes.CDLL) -> str:
    """A row per shape, in Markdown. Where the dtypes differ there is one for each."""
    lines = [
        "| layer | dtype | forward | dgrad | wgrad | our passes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape in GPU_SHAPES.values():
        cells = {name: _cells(steps(planning, shape, dtype)) for name, dtype in SHOWN.items()}
        if len(set(cells.values())) == 1:
            cells = {", ".join(cells): next(iter(cells.values()))}
        for dtype, row in cells.items():
            lines.append(f"| {shape.name}: {shape.m}, {shape.k}→{shape.n} | {dtype} | {row} |")
    return "\n".join(lines)


def _cells(path: dict[str, str]) -> str:
    whole = path.get("backward", "")  # one launch for both
    passes = [PASSES[kind] for kind in PASSES if kind in path]
    products = (path["forward"], path.get("dgrad", whole), path.get("wgrad", whole))
    return " | ".join([*(f"`{product}`" for product in products), ", ".join(passes) or "none"])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(table(library.compiled(Path(folder, "planning.so"))))


if __name__ == "__main__":
    main()
