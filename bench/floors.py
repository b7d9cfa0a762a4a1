"""Floors: the least time of one ReLU layer on a GPU, from its bytes and operations and the rates of the same run.

A product takes the larger of its operations over the GEMM rate and its bytes over the bandwidth. Every operand is read
once and every result is written once. The mask of ReLU is one bit per element of y: forward writes it in the product's
epilogue if a gradient is needed, and backward reads it.

* backward (a): one pass reads g and the mask and writes dz (and dbias). Then the products dgrad and wgrad read dz. This
  is the least for a single layer with separate products. A narrow layer that computes dx and dweight from one read of
  g (the path "fused_mlp") moves fewer bytes than (a) and (b) count, and may show more than 100 % of both.
* backward (b): g is dz already, because the epilogue of the dgrad of the layer above has applied the mask. In the same
  way this layer's dgrad reads the mask of the layer below. Only a chain of layers can do that.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.grid import Shape


@dataclass(frozen=True)
class Rates:
    """``gemm`` in operations per second, ``bandwidth`` in bytes per second."""

    gemm: float
    bandwidth: float

    def product(self, flops: float, moved: float) -> float:
        return max(flops / self.gemm, moved / self.bandwidth)


def forward(shape: Shape, itemsize: int, rates: Rates, keeps_mask: bool) -> float:
    """Return seconds."""
    x, w, y, mask = _bytes(shape, itemsize)
    return rates.product(_flops(shape), x + w + shape.n * itemsize + y + mask * keeps_mask)


def backward_a(shape: Shape, itemsize: int, rates: Rates, need_dx: bool = True) -> float:
    """Return seconds. A network's first layer needs no gradient of x."""
    x, w, y, mask = _bytes(shape, itemsize)
    products = rates.product(_flops(shape), y + x + w)  # wgrad
    if need_dx:
        products += rates.product(_flops(shape), y + w + x)
    return (y + mask + y + shape.n * itemsize) / rates.bandwidth + products


def backward_b(shape: Shape, itemsize: int, rates: Rates, need_dx: bool = True) -> float:
    """Return seconds, for a layer below whose mask is as large as this one's."""
    x, w, y, mask = _bytes(shape, itemsize)
    products = rates.product(_flops(shape), y + x + w)
    if need_dx:
        products += rates.product(_flops(shape), y + w + x + mask)
    return products


def step(shape: Shape, mode: str, itemsize: int, rates: Rates, chained: bool) -> float:
    """Return seconds of forward and, in the modes that have it, backward (a), or (b) if ``chained``."""
    if mode == "forward":
        return forward(shape, itemsize, rates, keeps_mask=False)
    backward = backward_b if chained else backward_a
    need_dx = mode == "forward+backward"
    return forward(shape, itemsize, rates, keeps_mask=True) + backward(shape, itemsize, rates, need_dx)


def _bytes(shape: Shape, itemsize: int) -> tuple[int, int, int, float]:
    """Return the bytes of x, weight, y, and the mask of y."""
    y = shape.m * shape.n
    return shape.m * shape.k * itemsize, shape.n * shape.k * itemsize, y * itemsize, y / 8


def _flops(shape: Shape) -> int:
    return shape.flops("forward")
