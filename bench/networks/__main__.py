"""Times the rows of all rooms beside this one: ``python -m bench.networks``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

import bench.networks
from bench import floors, grid, harness, machine, peak, peers, table
from bench.clock import Graph, clock_of
from bench.harness import DTYPES
from bench.networks import blocks, chains, ensembles, gated, heads, residuals
from bench.networks.common import (
    COMPILED,
    COMPILED_STEP,
    FLOOR,
    FUSED,
    IN_PLACE,
    OURS,
    STOCK,
    Asked,
    Calls,
    Case,
    Reasons,
)
from dlkernels.atomic import write_json
from tools.lease import log

ROOMS = (chains, residuals, blocks, ensembles, gated, heads)
GRAPH = ", graph"
COMPILATIONS = 3  # calls: the optimizer's second one finds state that the first one made, and is compiled anew
STEPS = ("training step", residuals.STEP)  # a chain's floor is of its products, forward or forward + backward


def measure(dtypes: Sequence[str], budget: float, device: str, compiled: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows. On CPU each has the rate of the loop on registers right before it, "registers"."""
    probed = peak.probe(dtypes, device) if device == "cuda" else None
    for dtype, case in every_case(dtypes, device, compiled):
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


def every_case(dtypes: Sequence[str], device: str, compiled: bool) -> Iterator[tuple[str, Case]]:
    for dtype in dtypes:
        for room in ROOMS:
            for case in room.cases(Asked(DTYPES[dtype], device, compiled)):
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.networks", description=bench.networks.__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=("fp32", "bf16"), help="(default: both; fp32 on a CPU without AVX-512)")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for each row (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of stock too: takes minutes more")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--device", choices=tuple(grid.COLUMNS), default="cpu", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and (why := machine.no_gpu()):
        parser.exit(1, f"bench.networks: {why}\n")
    keys = ("network", "dtype", "timed")
    others = [STOCK, IN_PLACE, gated.PACKED, chains.OUR_LAYERS, heads.TORCH_REFERENCE, heads.TORCH_CHUNKED, FLOOR]
    others += [COMPILED, COMPILED_STEP] if args.compile else []
    others += [*peers.HEADS, *peers.BLOCKS] if args.device == "cuda" else []
    others.append(FUSED)
    graphs = [OURS + GRAPH, STOCK + GRAPH] if args.device == "cuda" else []
    one_call = [STOCK, IN_PLACE, *([COMPILED, COMPILED_STEP] if args.compile else []), OURS]
    rows, cells = [], []
    dtypes = args.dtypes or harness.usual_dtypes(("fp32", "bf16"), args.device)
    for row in measure(dtypes, args.budget, args.device, args.compile):
        rows.append(row)
        us = {name: round(t["median"] * 1e6, 2) for name, t in row["times"].items()}
        log.case(f"{row['network']} {row['dtype']} {row['timed']}", us=us)
        ours = row["times"][OURS]["median"]
        cells.append(
            {name: row[name] for name in keys}
            | {"ours ms": f"{ours * 1e3:.3g}"}
            | {f"{other} /\nours": ratio(row, other) for other in others + graphs}
            | ({"floor (b) /\nour graph": share(row)} if graphs else {})
            | {f"{other} /\n{chains.ONE_CALL}": ratio(row, other, chains.ONE_CALL) for other in one_call}
        )
    console = table.make_console()
    for each in table.fitting(console, cells, keys):
        console.print(each)
    for row in rows:
        for why, what in (("not timed", "not timed"), ("not captured", "not captured as a graph")):
            for name, reason in row.get(why, {}).items():
                print(f"{name}, {row['network']} {row['dtype']} {row['timed']}: {what}: {reason}")
    if args.out:
        write_json(args.out, {**machine.provenance(args.device), "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
