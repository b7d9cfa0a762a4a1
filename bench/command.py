"""What the command line asks for: a run with a progress bar, its tables, its files."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import contenders, figures, machine, plot, table
from bench.run import QUICK, Settings, run

RESULTS = Path(__file__).resolve().parent / "results"


def settings(args: argparse.Namespace) -> Settings:
    """What the command line names, the rest from QUICK or the defaults; ValueError as Settings raises it."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if args.contenders == ["all"]:
        given["contenders"] = contenders.NAMES
    chosen = QUICK | given if args.quick else given
    return Settings(**{name: value for name, value in chosen.items() if name in Settings.__dataclass_fields__})


def default_path(quick: bool, settings: Settings) -> Path:
    """Named after processor, threads and cap: what makes two results incomparable."""
    where = machine.facts()
    cpu = re.sub(r"[^a-z0-9]+", "-", str(where["cpu"]).lower()).strip("-")
    name = "-".join(filter(None, (cpu, f"{settings.threads or where['threads']}t", settings.isa)))
    return (RESULTS / "local" if quick else RESULTS) / f"{name}.json"


def execute(settings: Settings, out: Path) -> int:
    """Exit status: 0, 1 where a contender was refused, 130 where the run was broken off."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=1.0)
        result, saved = run(settings, out, lambda what, done: progress.update(task, description=what, completed=done))
    table.show(result)
    if figures.rows(result):
        plot.plot(result, saved.with_suffix(".png"))
        print(f"\nwrote {saved} and {saved.with_suffix('.png').name}")
    if not result.complete:
        return 130
    return 1 if figures.refused(result) else 0
