"""Peak memory of a step: the bytes that torch's allocator holds at once, without the inputs, with the results.

Torch's profiler counts them, or on a GPU torch's allocator, in a separate run that is not timed. It counts every
tensor, and gives the same number in each run. It does not count memory outside torch's allocator: the packing buffers
of MKL, oneDNN and dlkernels, some of which have the size of the L2 cache per thread.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.harness import Inputs, Step


def extra_bytes(step: Step, inputs: Inputs) -> int:
    """Return the peak of the bytes that ``step`` has allocated and not freed yet."""
    with torch.set_grad_enabled(inputs.weight.requires_grad):
        step(inputs)  # memory that is allocated once and kept is no cost of a step
        if inputs.x.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(inputs)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            step(inputs)
    held = peak = 0
    for change in _changes(run):
        held += change
        peak = max(peak, held)
    return peak


def _changes(run: profile) -> list[int]:
    """Return the allocated (positive) and freed (negative) bytes, in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        run.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]"]
    return [e["args"]["Bytes"] for e in sorted(changes, key=lambda e: e["ts"])]
