"""``python -m dlkernels report``: writes the HTML report of a run from its folder."""

from __future__ import annotations

import argparse
import webbrowser
from typing import Any

from dlkernels.cli.command import add_command


def add_parser(subparsers: Any) -> None:
    """Add ``report`` to the command's subparsers."""
    parser = add_command(
        subparsers,
        "report",
        _report,
        help="write the HTML report of a run",
        description="Write report.html anew from what is in the folder of a run, finished or not.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as runs/mnist")
    parser.add_argument("--open", action="store_true", help="show it in a browser")


def _report(args: argparse.Namespace) -> int:
    from dlkernels.runs.folder import RunFolder
    from dlkernels.runs.report import write_report

    path = write_report(RunFolder(args.run))
    print(path)
    if args.open:
        webbrowser.open(path.resolve().as_uri())
    return 0
