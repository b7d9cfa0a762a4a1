"""``python -m dlkernels``: runs a subcommand. Each module of a subcommand (``dlkernels.cli``) has
``add_parser(subparsers)``, which adds its parser and its action, a function from the parsed arguments to the exit
status. No module imports torch before an action runs."""

import argparse
import sys

from dlkernels._version import __version__
from dlkernels.cli import compare, cross_validate, export, find_lr, fuse, info, predict, report, train, tune
from dlkernels.cli.command import STATUSES, process_setup, program, reject_unknown, run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program(), description="Fused layers for PyTorch.", epilog=STATUSES, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"dlkernels {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (info, train, find_lr, cross_validate, report, compare, predict, export, fuse, tune):
        command.add_parser(subparsers)
    args, unknown = parser.parse_known_args(argv)
    reject_unknown(args.command, unknown)
    with process_setup():
        return run_command(args)


if __name__ == "__main__":
    sys.exit(main())
