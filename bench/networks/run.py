"""Times the rows of all rooms beside this one, and prints them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from bench import floors, grid, harness, machine, peak, peers, table
from bench.clock import Graph, clock_of
from bench.harness import DTYPES
from bench.names import (
    COMPILED,
    COMPILED_STEP,
    FLOOR,
    FUSED,
    IN_PLACE,
    ONE_CALL,
    OUR_LAYERS,
    OURS,
    PACKED,
    STOCK,
    TORCH_CHUNKED,
    TORCH_REFERENCE,
)
from bench.networks import blocks, chains, ensembles, gated, heads, residuals
from bench.networks.common import Asked, Calls, Case, Reasons
from dlkernels.atomic import write_json
from tools.lease import log

ROOMS = (chains, residuals, blocks, ensembles, gated, heads)
GRAPH = ", graph"
COMPILATIONS = 3  # calls: the optimizer's second one finds state that the first one made, and is compiled anew
STEPS = ("training step", residuals.STEP)  # a chain's floor is of its products, forward or forward + backward


def measure(
    dtypes: Sequence[str], budget: float, device: str, compiled: bool = False, networks: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the networks that have one of ``networks`` in their names, or of all.

    On CPU each has the rate of the loop on registers right before it, "registers".
    """
    probed = peak.probe(dtypes, device) if device == "cuda" else None
    for dtype, case in every_case(dtypes, device, compiled, networks):
        calls = case.calls
        row: dict[str, Any] = {"network": case.network, "dtype": dtype, "timed": case.timed}
        row["flops"] = flops(calls[STOCK])
        if case.refused:
            row["not timed"] = case.refused
        for name in {COMPILED, COMPILED_STEP} & set(calls):
            for _ in range(COMPILATIONS):
                calls[name]()
        if not probed:
            row["registers"] = peak.registers(dtype)
        else:
            calls, row["not captured"] = with_graphs(calls)
            if case.network in chains.chains(device) and case.timed not in STEPS:
                rates = floors.Rates(probed.gemm[dtype], probed.bandwidth(0, cold=True))
                of = chains.chains(device)[case.network]
                row["floor"] = chains.floor_b(*of, grid.DTYPES[dtype], case.timed == "forward+backward", rates)
        steps = {k: lambda _, f=f: f() for k, f in calls.items()}
        times = harness.take_turns(steps, lambda: None, budget, refill=device == "cpu", clock=clock_of(device))
        yield {**row, "times": {k: asdict(t) for k, t in times.items()}}


def every_case(
    dtypes: Sequence[str], device: str, compiled: bool, networks: Sequence[str]
) -> Iterator[tuple[str, Case]]:
    for dtype in dtypes:
        for room in ROOMS:
            for case in room.cases(Asked(DTYPES[dtype], device, compiled, tuple(networks))):
                yield dtype, case


def flops(call: Callable[[], Any]) -> int:
    """Return the operations of torch's matrix products in the call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def with_graphs(calls: Calls) -> tuple[Calls, Reasons]:
    """Return these calls, each also as a CUDA graph, and by name the reasons of failed captures."""
    graphs: Calls = {}
    refused: Reasons = {}
    for name, call in calls.items():
        try:
            graphs[name + GRAPH] = Graph([call]).replay
        except Exception as failure:  # the failure of a contender must not stop the others
            refused[name] = harness.reason(failure)
    return calls | graphs, refused


def ratio(row: Mapping[str, Any], of: str, to: str = OURS) -> str:
    times = row["times"]
    return f"{times[of]['median'] / times[to]['median']:.2f}x" if of in times and to in times else ""


def share(row: Mapping[str, Any]) -> str:
    """Return the share of floor (b) that our graph reaches."""
    times = row["times"]
    return f"{row['floor'] / times[OURS + GRAPH]['median']:.0%}" if "floor" in row and OURS + GRAPH in times else ""


def execute(
    dtypes: Sequence[str] | None,
    budget: float,
    compiled: bool,
    out: Path | None,
    device: str,
    networks: Sequence[str],
) -> int:
    """Print the rows, write them to the file ``out`` if there is one, and return the exit status."""
    if device == "cuda" and (why := machine.no_gpu()):
        print(f"bench.networks: {why}", file=sys.stderr)
        return 1
    keys = ("network", "dtype", "timed")
    others = [STOCK, IN_PLACE, PACKED, OUR_LAYERS, TORCH_REFERENCE, TORCH_CHUNKED, FLOOR]
    others += [COMPILED, COMPILED_STEP] if compiled else []
    others += [*peers.HEADS, *peers.BLOCKS] if device == "cuda" else []
    others.append(FUSED)
    graphs = [OURS + GRAPH, STOCK + GRAPH] if device == "cuda" else []
    steps = [STOCK, IN_PLACE, *([COMPILED, COMPILED_STEP] if compiled else []), OURS]
    rows, cells = [], []
    dtypes = dtypes or harness.usual_dtypes(("fp32", "bf16"), device)
    for row in measure(dtypes, budget, device, compiled, networks):
        rows.append(row)
        us = {name: round(t["median"] * 1e6, 2) for name, t in row["times"].items()}
        log.case(f"{row['network']} {row['dtype']} {row['timed']}", us=us)
        ours = row["times"][OURS]["median"]
        cells.append(
            {name: row[name] for name in keys}
            | {"ours ms": f"{ours * 1e3:.3g}"}
            | {f"{other} /\nours": ratio(row, other) for other in others + graphs}
            | ({"floor (b) /\nour graph": share(row)} if graphs else {})
            | {f"{other} /\n{ONE_CALL}": ratio(row, other, ONE_CALL) for other in steps}
        )
    if not rows:
        print(f"bench.networks: expected parts of networks' names, got {', '.join(networks)}", file=sys.stderr)
        return 2
    console = table.make_console()
    for each in table.fitting(console, cells, keys):
        console.print(each)
    for row in rows:
        for why, what in (("not timed", "not timed"), ("not captured", "not captured as a graph")):
            for name, reason in row.get(why, {}).items():
                print(f"{name}, {row['network']} {row['dtype']} {row['timed']}: {what}: {reason}")
    if out:
        write_json(out, {**machine.provenance(device), "rows": rows})
    return 0
