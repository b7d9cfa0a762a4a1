"""``python -m dlkernels compare``: compares runs, as text and as a page with their curves."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import Any

from dlkernels.cli.command import SettingError, add_command


def add_parser(subparsers: Any) -> None:
    """Add ``compare`` to the command's subparsers."""
    parser = add_command(
        subparsers,
        "compare",
        _compare,
        help="compare runs: settings, results, curves",
        description="Print the settings that differ and the results, side by side; draw the curves with --out.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of two or more runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write an HTML page with the curves of all")
    parser.add_argument("--open", action="store_true", help="show the page in a browser")


def _compare(args: argparse.Namespace) -> int:
    from dlkernels.runs.comparison import RunComparison

    if args.open and not args.out:
        raise SettingError("expected --out FILE with --open: the page that is shown has to be somewhere")
    comparison = RunComparison(args.runs)
    print(comparison.text())
    if args.out:
        comparison.write_page(args.out)
        print(f"\n{args.out}")
        if args.open:
            webbrowser.open(args.out.resolve().as_uri())
    return 0
