"""How fast a GPU could run one ReLU layer at best: bytes and operations counted, at rates measured in the same run.

A product takes the larger of its arithmetic over the GEMM rate and its bytes over the bandwidth, every operand read
once and every result written once. The mask of ReLU is one bit per element of y: forward writes it in the product's
epilogue where a gradient is needed, backward reads it.

* backward (a): one pass reads g and the mask and writes dz (and dbias), then the products dgrad and wgrad read dz. The
  least that separate products leave to a single layer. A narrow one that makes dx and dweight from one read of g
  (the path "fused_mlp") moves less than (a) and (b) count, and may show more than 100 % of either.
* backward (b): g arrives as dz already, because the dgrad of the layer above has applied the mask in its epilogue; this
  layer's dgrad reads the mask of the layer below in the same way. Only a chain of layers can do that.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.grid import Shape


@dataclass(frozen=True)
class Rates:
    """gemm: operations per second; bandwidth: bytes per second."""

    gemm: float
    bandwidth: float

    def product(self, flops: float, moved: float) -> float:
        return max(flops / self.gemm, moved / self.bandwidth)


def forward(shape: Shape, itemsize: int, rates: Rates, keeps_mask: bool) -> float:
    """Seconds."""
    x, w, y, mask = _bytes(shape, itemsize)
    return rates.product(_flops(shape), x + w + shape.n * itemsize + y + mask * keeps_mask)


def backward_a(shape: Shape, itemsize: int, rates: Rates, need_dx: bool = True) -> float:
    """Seconds, with the gradient of x unless it is the first layer of a network."""
    x, w, y, mask = _bytes(shape, itemsize)
    products = rates.product(_flops(shape), y + x + w)  # wgrad
    if need_dx:
        products += rates.product(_flops(shape), y + w + x)
    return (y + mask + y + shape.n * itemsize) / rates.bandwidth + products


def backward_b(shape: Shape, itemsize: int, rates: Rates, need_dx: bool = True) -> float:
    """Seconds; the layer below is taken to have a mask as large as this one's."""
    x, w, y, mask = _bytes(shape, itemsize)
    products = rates.product(_flops(shape), y + x + w)
    if need_dx:
        products += rates.product(_flops(shape), y + w + x + mask)
    return products


def step(shape: Shape, mode: str, itemsize: int, rates: Rates, chained: bool) -> float:
    """Seconds of forward and, in the modes that have it, backward (a), or (b) with ``chained``."""
    if mode == "forward":
        return forward(shape, itemsize, rates, keeps_mask=False)
    backward = backward_b if chained else backward_a
    need_dx = mode == "forward+backward"
    return forward(shape, itemsize, rates, keeps_mask=True) + backward(shape, itemsize, rates, need_dx)


def _bytes(shape: Shape, itemsize: int) -> tuple[int, int, int, float]:
    """x, weight, y, and the mask of y."""
    y = shape.m * shape.n
    return shape.m * shape.k * itemsize, shape.n * shape.k * itemsize, y * itemsize, y / 8


def _flops(shape: Shape) -> int:
    return shape.flops("forward")
