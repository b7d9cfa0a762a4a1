"""The machine's peak rates, measured in the same run: the roofs for "share of roofline" and "share of peak".

The arithmetic roof is the *best GEMM rate seen*: the fastest of several large products, torch's and ours, and of all
steps of the grid. A share of 1 means "as good as the best GEMM on this machine".

The peak of a CPU is the rate of a loop in our kernels that multiplies on registers alone, on as many threads as torch
has, before and after the grid. No product can be faster, and the two figures show how steady the clock was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from bench import machine
from bench.clock import clock_of
from bench.harness import DTYPES
from bench.record import Peak
from dlkernels import _C, functional

_SIZES = {"cpu": (768, 1536, 2560), "cuda": (4096, 8192)}
_SECONDS = 0.25  # for one probe
_LOOP = 5e-3  # seconds of one call of the loop on registers, far longer than to start a thread
_MOST = 2 << 30  # bytes in one copy at most; it limits the copy on machines with very large caches
_COPY = 8 << 30  # bytes in one copy on a GPU with at least four times as much free memory


def probe(dtypes: Iterable[str], device: str = "cpu") -> Peak:
    dtypes = tuple(dtypes)
    stream = _stream() if device == "cpu" else _device_copy()
    peak = Peak({dtype: _gemm(dtype, device) for dtype in dtypes}, stream)
    if device == "cpu":
        peak.registers.update({dtype: [registers(dtype)] for dtype in dtypes})
    return peak


def probe_again(peak: Peak) -> None:
    """Add the rates of the loop on registers at the end of a run."""
    for dtype, rates in peak.registers.items():
        rates.append(registers(dtype))


def registers(dtype: str) -> float:
    """Return the operations per second of the loop on registers, all threads together.

    It is the median of many calls: the fastest one would have a clock that does not last.
    """
    name, threads = str(DTYPES[dtype]).removeprefix("torch."), torch.get_num_threads()
    seconds, steps = 0.0, 1000
    while seconds < _LOOP:  # also a warm-up: a processor takes its time to the clock of wide registers
        steps *= 2
        start = time.perf_counter()
        _C.peak_loop(name, steps)
        seconds = time.perf_counter() - start
    rates: list[float] = []
    end = time.perf_counter() + _SECONDS
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < end or not rates:
            start = time.perf_counter()
            operations = sum(pool.map(lambda _: _C.peak_loop(name, steps), range(threads)))
            rates.append(operations / (time.perf_counter() - start))
    return statistics.median(rates)


def _gemm(dtype: str, device: str) -> float:
    rates = []
    for size in _SIZES[device]:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
        products: tuple[Callable[[], object], ...] = (
            lambda a=a, b=b: torch.mm(a, b.t()),  # type: ignore[misc]
            lambda a=a, b=b: functional.linear_act(a, b, None, "none"),  # type: ignore[misc]
        )
        rates += [2 * size**3 / _best(product, device) for product in products]
    return max(rates)


def _stream() -> list[tuple[int, float]]:
    """Return the better rate of copying (half of the bytes read, half written) and summing (all bytes read).

    The sizes are half of each cache from L2 on, and four times the last one.
    """
    levels = machine.caches() or {3: machine.last_level_cache()}
    sizes = [size // 2 for level, size in sorted(levels.items()) if level >= 2]
    sizes.append(min(_MOST, 4 * machine.last_level_cache()))
    return [(size, max(_copying(size), _summing(size))) for size in sizes]


def _device_copy() -> list[tuple[int, float]]:
    """Return the rate of a large copy within the GPU's memory."""
    size = min(_COPY, torch.cuda.mem_get_info()[0] // 4)
    return [(size, _copying(size, "cuda"))]


def _copying(size: int, device: str = "cpu") -> float:
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return size / _best(lambda: target.copy_(source), device)


def _summing(size: int) -> float:
    source = torch.ones(size // 4)
    return size / _best(lambda: source.sum(), "cpu")


def _best(run: Callable[[], object], device: str) -> float:
    """Return the seconds of the fastest call."""
    run()
    clock, best, end = clock_of(device), float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end or best == float("inf"):
        best = min(best, *clock.sample(lambda _: run(), lambda: None, 1))
    return best
