"""The grid of the benchmark: shapes, dtypes, modes, columns.

This module does not import torch, so that the command line is parsed before torch loads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
"""Bytes per element by name."""

MODES = ("forward", "forward+backward", "first layer")
"""forward: without autograd. forward+backward: gradients of x, weight and bias. first layer: gradients of weight and
bias only, as in the first layer of a network."""

COLUMNS = {"cpu": ("hot", "cold"), "cuda": ("plain", "graph")}
"""By device.

hot: the same buffers in every call. cold: many buffers in turn, together larger than the last-level cache.
plain and graph: many buffers in turn too, launched call by call or replayed as a CUDA graph."""


@dataclass(frozen=True)
class Shape:
    """y [m, n] = act(x [m, k] · weight [n, k]ᵀ + bias [n])."""

    name: str
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.m}, {self.k}→{self.n}"

    def flops(self, mode: str) -> int:
        """Return the operations of the products: one in forward, two in backward, one in backward without dx."""
        products = {"forward": 1, "forward+backward": 3, "first layer": 2}[mode]
        return 2 * self.m * self.n * self.k * products

    def moved(self, mode: str, itemsize: int) -> int:
        """Return the bytes that move if forward and backward each read every operand and write every result once.

        The backward reads x, weight (for dx), the gradient of y, and y for the activation's derivative.
        """
        x, w, b, y = self.m * self.k, self.n * self.k, self.n, self.m * self.n
        forward = x + w + b + y
        backward = x + 2 * y + w + b  # reads x, g and y; writes dweight and dbias
        dx = w + x  # reads weight, writes dx
        total = {"forward": 0, "forward+backward": backward + dx, "first layer": backward}[mode]
        return itemsize * (forward + total)

    def operands(self, itemsize: int) -> int:
        """Return the bytes of one set of buffers: x, weight, bias and the gradient of y."""
        return itemsize * (self.m * self.k + self.n * self.k + self.n + self.m * self.n)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mnist-1", 256, 784, 256),
        Shape("mnist-2", 256, 256, 10),
        Shape("alexnet-fc6", 128, 9216, 4096),
        Shape("alexnet-fc7", 128, 4096, 4096),
        Shape("dqn-fc", 32, 3136, 512),
        Shape("transformer-ffn", 4096, 512, 2048),
        Shape("infer-1", 1, 1024, 1024),
        Shape("infer-32", 32, 1024, 1024),
        Shape("bert-ffn", 4096, 768, 3072),
        Shape("gpt2-ffn", 1024, 768, 3072),
        Shape("tall-64", 65536, 64, 64),
        Shape("tall-128", 65536, 128, 128),
        Shape("wide", 8192, 256, 1024),
        Shape("square", 2048, 2048, 2048),
        Shape("regression", 20000, 32, 1),
        Shape("few-classes", 4096, 256, 16),
        Shape("vit-s-ffn", 1576, 384, 1536),
        Shape("odd-batch", 333, 1000, 1000),
        Shape("small-batch", 64, 512, 512),
        Shape("batch-4", 4, 512, 512),
        Shape("batch-8", 8, 768, 3072),
        Shape("odd-sizes", 12345, 77, 131),
    )
}
"""The standard grid: layers of well-known models, then few columns, few rows and odd sizes."""

GPU_SHAPES = SHAPES | {
    shape.name: shape for shape in (Shape("llm-square", 8192, 4096, 4096), Shape("llm-up", 16384, 1024, 4096))
}
"""The grid of a GPU has two more layers: in one its products hide the memory traffic, in the other they do not."""


def shape_named(text: str) -> Shape:
    """Return a shape of the grid, or the shape "MxKxN"; raise ValueError for other text."""
    if text in GPU_SHAPES:
        return GPU_SHAPES[text]
    if sizes := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text):
        return Shape(text, *map(int, sizes.groups()))
    raise ValueError(f"expected a shape MxKxN, such as 256x784x256, or one of {', '.join(GPU_SHAPES)}; got {text!r}")
