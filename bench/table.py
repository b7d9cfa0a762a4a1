"""Prints a record as tables: ``python -m bench.table bench/results/NAME.json``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import figures, record
from bench.figures import CLEARLY, Row
from bench.names import STOCK
from bench.record import Record

NOTES = """\
ratio: stock's median over ours; above 1 we are faster. vs best: the fastest other contender's over ours.
of roof: the floor over our median; the floor is the larger of arithmetic over the best GEMM rate seen in this
run and bytes over the bandwidth of memory, or of the cache that hot buffers fit in. Above 100 % a step moves
less than every operand once in forward and once in backward.
of peak: the operations of the products per second, over those of a loop on registers alone (all threads, the same run).
MB: peak memory of a step beyond its inputs, as torch's allocator counts it."""

GPU_NOTES = """\
ratio: stock's median over ours; above 1 we are faster. vs best: the fastest other contender's over ours.
of (a), of (b): the floor over our median. (a): products at the best GEMM rate seen in this run or at the bandwidth of a
large copy, and in backward one pass for mask and dbias. (b): without that pass. Narrow layers, which compute dx and
dweight from one read of g, can be faster than both.
plain: steps launched one by one; graph: replayed as a CUDA graph. Both use many buffers in turn, of twice the L2 cache.
MB: peak memory of a step beyond its inputs, as torch's allocator counts it."""


def make_console() -> Console:
    # A pipe or a file has no width; tables folded at 80 columns would be unreadable.
    return Console(width=None if sys.stdout.isatty() else 250, highlight=False, soft_wrap=True)


def show(result: Record, console: Console | None = None) -> None:
    """Print tables by dtype, mode and column, then means, the layers where stock is faster, and the refusals."""
    console = console or make_console()
    rows = figures.rows(result)
    console.print(f"\n[bold]{escape(title(result))}[/]\n")
    for group in dict.fromkeys((row.dtype, row.mode, row.column) for row in rows):
        cells = [_cells(row) for row in rows if (row.dtype, row.mode, row.column) == group]
        console.print(f"[bold]{', '.join(group)}[/]")
        for table in fitting(console, cells, KEYS):
            console.print(table)
    gpu = figures.on_gpu(result)
    console.print(GPU_NOTES if gpu else NOTES)
    console.print(_roofs(result))
    console.print("\n[bold]Geometric means[/]")
    for mean in figures.geomeans(rows):
        console.print(
            f"  {mean['dtype']}, {mean['mode']}, {mean['column']}: {_ratio(mean['geomean'])} stock, "
            f"{mean['geomean_vs_best']:.2f}x the best other; "
            f"{mean['worst']:.2f}x to {mean['best']:.2f}x over {mean['layers']} layers"
        )
        if len(mean["others"]) > 1:
            console.print("    " + ", ".join(f"{_ratio(ratio)} {name}" for name, ratio in mean["others"].items()))
    lost = figures.losses(rows)
    console.print(f"\n[bold]Slower than stock: {len(lost)} of {len(rows)}[/]")
    for loss in lost:
        where = ", ".join((loss["layer"], loss["dtype"], loss["mode"], loss["column"]))
        console.print(f"  {_ratio(loss['ratio'])} {where}")
    if gpu:
        behind = figures.slower_than_best(rows)
        console.print(f"\n[bold]Slower than the best other contender: {len(behind)} of {len(rows)}[/]")
        for row in behind:
            console.print(f"  {_ratio(row.vs_best)} {row.where}: {row.best_other}")
    for layer, name, why in figures.refused(result):
        what = f"{name} on {layer.shape} {layer.dtype} {layer.activation}"
        console.print(f"[bold red]REFUSED[/] {what}, not timed: {escape(why)}")
    if not result.complete:
        console.print("[bold red]The run was interrupted: not every layer is here.[/]")


def title(result: Record) -> str:
    """Return machine (threads and instruction set, or driver), torch and commit in one line."""
    where, commit = result.machine, result.commit
    head = commit["hash"][:10] if commit["hash"] else "unknown"
    changes = " with changes" if commit["dirty"] else ""
    if figures.on_gpu(result):
        what = f"{where['gpu']}, driver {where['driver']}, CUDA {where['cuda']}"
    else:
        what = f"{where['cpu']}, {where['threads']} thread{'s' * (where['threads'] > 1)}, {where['isa']}"
    return f"{what}; torch {result.versions['torch']}; commit {head}{changes}; {result.created[:10]}"


def fitting(console: Console, rows: Sequence[Mapping[str, str]], keys: Sequence[str]) -> Iterator[Table]:
    """Tables of ``rows`` (cells by heading) that fit the console, each of the columns ``keys`` and some others.

    Columns without any text are left out.
    """

    def table(headings: Sequence[str]) -> Table:
        made = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for heading in (*keys, *headings):
            made.add_column(heading, justify="left" if heading in LEFT else "right", no_wrap=True)
        for row in rows:
            made.add_row(*(row[heading] for heading in (*keys, *headings)))
        return made

    unlimited = console.options.update(max_width=10_000)
    others = [heading for heading in (rows[0] if rows else ()) if heading not in keys and any(r[heading] for r in rows)]
    while others:
        count = len(others)
        while count > 1 and console.measure(table(others[:count]), options=unlimited).maximum > console.width:
            count -= 1
        yield table(others[:count])
        del others[:count]


KEYS = ("layer", "M, K→N")
LEFT = (*KEYS, "path", "network", "dtype", "timed")


def _cells(row: Row) -> dict[str, str]:
    ours = row.ours
    shares = {"of roof": row.share} if row.share_b is None else {"of (a)": row.share, "of (b)": row.share_b}
    if row.share_of_peak is not None:
        shares["of peak"] = row.share_of_peak
    return {
        "layer": f"[red]{row.label} ◀[/]" if row.loses else row.label,
        "M, K→N": str(row.shape),
        "path": row.paths,
        "stock ms": _ms(row.stock.median),
        "ours ms": _ms(ours.median),
        "20-80 %": f"{_ms(ours.q20)}-{_ms(ours.q80)}",
        "ratio": _ratio(row.ratio),
        "vs best": ("" if row.best_other == STOCK else f"{row.best_other} ") + f"{row.vs_best:.2f}x",
        "GFLOP/s": f"{row.rate / 1e9:.0f}",
        **{name: f"{share:.0%}" for name, share in shares.items()},
        "MB": _megabytes(row.our_bytes),
        "stock MB": _megabytes(row.stock_bytes),
    }


def _roofs(result: Record) -> str:
    rates = figures.best_gemm_rates(result)
    gemm = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items())
    streams = ", ".join(f"{rate / 1e9:.0f} GB/s at {size / 2**20:g} MiB" for size, rate in result.peak.stream)
    loops = ", ".join(
        f"{dtype} {' and '.join(f'{rate / 1e9:.0f}' for rate in measured)} GFLOP/s"
        for dtype, measured in result.peak.registers.items()
    )
    peak = f" Loop on registers, before and after: {loops}." if loops else ""
    return f"Best GEMM rate seen: {gemm}.{peak} Bandwidth: {streams}."


def _ratio(ratio: float) -> str:
    style = "bold red" if ratio < CLEARLY else "red" if ratio < 1 else "green"
    return f"[{style}]{ratio:.2f}x[/]"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description="Print the tables of records.")
    parser.add_argument("records", type=Path, nargs="+", metavar="FILE", help="a run's JSON")
    args = parser.parse_args(argv)
    try:
        for path in args.records:
            show(record.load(path))
    except (OSError, ValueError) as wrong:
        parser.error(str(wrong))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
