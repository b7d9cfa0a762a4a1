"""Executes the command line: a run with a progress bar, its tables and its files."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import contenders, figures, harness, machine, plot, table
from bench.names import OURS
from bench.run import GPU, QUICK, Settings, run
from dlkernels.extras import how_to_get

RESULTS = Path(__file__).resolve().parent / "results"


def settings(args: argparse.Namespace) -> Settings:
    """Return the settings of the command line, completed from QUICK or the defaults. Settings raises ValueError."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if args.contenders == ["all"]:
        given["contenders"] = contenders.names(args.device)
    defaults = QUICK if args.quick else {}
    if args.device == "cuda":
        tuned = [name for name in contenders.names("cuda") if "max-autotune" not in name]
        defaults = GPU | {"contenders": tuned} | ({"columns": ("graph",), "budget": 0.1} if args.quick else {})
    if "dtypes" not in given:
        given["dtypes"] = harness.usual_dtypes(defaults.get("dtypes", Settings.dtypes), args.device)
    chosen = defaults | given
    return Settings(**{name: value for name, value in chosen.items() if name in Settings.__dataclass_fields__})


def default_path(quick: bool, settings: Settings) -> Path:
    """Return a path named after the GPU, or after processor, instruction set and threads: others are not comparable.

    Processors hide their models behind one name, such as "AMD EPYC".
    """
    where = machine.facts(settings.device)
    if settings.device == "cuda":
        name = machine.slug(str(where["gpu"]))
    else:
        cpu, threads = machine.slug(str(where["cpu"])), settings.threads or where["threads"]
        name = f"{cpu}-{where['isa']}-{threads}t{'-capped' if settings.isa else ''}"
    return (RESULTS / "local" if quick else RESULTS) / f"{name}.json"


def execute(settings: Settings, out: Path) -> int:
    """Run the benchmark and return the exit status: 0, 1 if dlkernels was refused, 130 if the run was interrupted."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=1.0)
        result, saved = run(settings, out, lambda what, done: progress.update(task, description=what, completed=done))
    table.show(result)
    if figures.rows(result):
        picture = f"and {saved.with_suffix('.png').name}"
        try:
            plot.plot(result, saved.with_suffix(".png"))
        except ModuleNotFoundError as missing:
            picture = f"and no picture: {missing}; {how_to_get(str(missing.name).split('.')[0])}"
        print(f"\nwrote {saved} {picture}")
    if not result.complete:
        return 130
    return 1 if any(name.startswith(OURS) for _, name, _ in figures.refused(result)) else 0
