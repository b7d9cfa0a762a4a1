"""``python -m dlkernels report`` and ``compare``: what runs have left in their folders, for people."""

from __future__ import annotations

import argparse
import webbrowser
from typing import Any

from dlkernels.cli.command import SettingError, add_command


def add_parser(subparsers: Any) -> None:
    """Add ``report`` and ``compare`` to the command's subparsers."""
    report = add_command(
        subparsers,
        "report",
        _report,
        help="write the HTML report of a run",
        description="Write report.html anew from what is in the folder of a run, finished or not.",
        errors=(OSError,),
    )
    report.add_argument("run", metavar="RUN", help="folder of a run, such as runs/mnist")
    report.add_argument("--open", action="store_true", help="show it in a browser")
    compare = add_command(
        subparsers,
        "compare",
        _compare,
        help="compare runs: settings, results, curves",
        description="Print the settings that differ and the results, side by side; draw the curves with --out.",
        errors=(OSError,),
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="folders of two or more runs")
    compare.add_argument("--out", metavar="FILE", help="write an HTML page with the curves of all")
    compare.add_argument("--open", action="store_true", help="show the page in a browser")


def _report(args: argparse.Namespace) -> int:
    from dlkernels.runs.folder import RunError, RunFolder
    from dlkernels.runs.report import write_report

    try:
        path = write_report(RunFolder(args.run))
    except RunError as error:
        raise SettingError(str(error)) from None
    print(path)
    if args.open:
        webbrowser.open(path.resolve().as_uri())
    return 0


def _compare(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dlkernels.runs.comparison import RunComparison
    from dlkernels.runs.folder import RunError

    if args.open and not args.out:
        raise SettingError("expected --out FILE with --open: the page that is shown has to be somewhere")
    try:
        comparison = RunComparison(args.runs)
    except RunError as error:
        raise SettingError(str(error)) from None
    print(comparison.text())
    if args.out:
        comparison.write_page(args.out)
        print(f"\n{args.out}")
        if args.open:
            webbrowser.open(Path(args.out).resolve().as_uri())
    return 0
