"""For test_huge_pages.py, which runs it in fresh interpreters: every op on CPU that allocates, then what Linux
says of the memory of its outputs. Argument: "large" or "small" outputs.

Prints JSON: the outputs, their hash, the peak of resident memory, the bytes for which huge pages are asked at the end,
and the number of threads.
"""

import hashlib
import json
import resource
import sys
from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

import dlkernels

OPS = torch.ops.dlkernels
RELU, GELU = 1, 4  # of Act in csrc/kernels/params.h
PAGE = 2 << 20


def mappings() -> Iterator[tuple[int, int, bool, int]]:
    """First and last address, whether huge pages were asked for, and the KiB of them, of every mapping."""
    first = last = kib = 0
    with open("/proc/self/smaps") as lines:
        for line in lines:
            name, *values = line.split()
            if "-" in name and not name.endswith(":"):
                first, last = (int(address, 16) for address in name.split("-"))
            elif name == "AnonHugePages:":
                kib = int(values[0])
            elif name == "VmFlags:":
                yield first, last, "hg" in values, kib


def told(name: str, t: Tensor) -> dict[str, object]:
    """Bytes of whole huge pages inside t, those that huge pages were asked for, and whether its mappings have any."""
    at, size = t.data_ptr(), t.nbytes
    first, last = -(-at // PAGE) * PAGE, (at + size) // PAGE * PAGE
    inside = [(max(a, first), min(b, last), asked, kib) for a, b, asked, kib in mappings() if a < last and b > first]
    return {
        "name": name,
        "bytes": size,
        "inside": max(0, last - first),
        "asked": sum(b - a for a, b, asked, _ in inside if asked),
        "huge": any(kib for *_, kib in inside),
    }


def results(large: bool) -> Iterator[tuple[str, list[Tensor]]]:
    seeds = count()

    def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=torch.Generator().manual_seed(next(seeds))).to(dtype)

    rows, wide = (2048, 1040) if large else (16, 40)
    for dtype in (torch.float32, torch.bfloat16):
        x, w, b = (normal(*sizes, dtype=dtype) for sizes in ((2 * rows, wide), (2 * wide, wide), (2 * wide,)))
        y = OPS._linear_act_forward(x, w, b, RELU, 0.0)
        yield f"forward {dtype}", [y]
        yield f"forward z {dtype}", list(OPS._linear_act_forward_z(x, w, b, GELU, 0.0))
        yield f"backward {dtype}", list(OPS._linear_act_backward(y, x, w, y, RELU, 0.0, True, True, True))
    x, w = normal(2 * rows, wide), normal(wide, wide)
    if dlkernels._C.cpu_autocast():
        y, z = OPS._linear_act_autocast_forward_z(x, w, None, GELU, 0.0)
        yield "autocast", [y, z, OPS._linear_act_autocast_forward(x, w, None, RELU, 0.0)]
        backward = OPS._linear_act_autocast_backward
        yield "autocast backward", list(backward(y, x, w, z, x.dtype, GELU, 0.0, True, True, False))

    for name, many, features in (("chain", 32768, 64), ("layers", 4096, 512)):
        h = normal(many if large else rows, features)
        weights, biases = [normal(features, features) / 8 for _ in range(3)], [None] * 3
        keep, acts = [1, 1, 0], [RELU] * 3
        y, *kept = OPS._mlp_forward(h, weights, biases, acts, 0.0, keep)
        yield f"mlp {name}", [y, *kept]
        needs = [1, 1, 1, 1, 0, 0, 0]
        gradients = OPS._mlp_backward(y, h, weights, y, kept, keep, acts, 0.0, needs, False)
        yield f"mlp {name} backward", gradients

    x, target = normal(rows, wide), normal(rows, wide)
    yield "mse_loss", [OPS._mse_loss_forward(x, target, 0, True)[1]]
    yield "gaussian_nll_loss", list(OPS._gaussian_nll_loss_forward(x, target, target.exp(), True, 1e-6, 0, True, True))
    yield "cross_entropy", list(OPS._cross_entropy_forward(x, target.softmax(1), None, 1, -100, 0.0, True, True))[1:]
    x, w = normal(rows, wide), normal(2 * wide, wide)
    classes = torch.arange(rows) % wide
    gradients = OPS._linear_cross_entropy_forward(x, w, None, classes, None, None, 1, -100, 0.0, True, True, False)
    yield "linear_cross_entropy", list(gradients)[1:3]


def main(size: str) -> None:
    digest, said = hashlib.sha256(), []
    for name, tensors in results(size == "large"):
        for i, t in enumerate(tensors):
            if t is not None and t.numel():
                said.append(told(f"{name}: output {i}", t))
                digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    threads = torch.get_num_threads()
    asked = sum(last - first for first, last, asked, _ in mappings() if asked)
    report = {"outputs": said, "hash": digest.hexdigest(), "peak_kib": peak, "left": asked, "threads": threads}
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
