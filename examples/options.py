"""The options that every example takes."""

import argparse
import pathlib
from typing import Any

import torch


def options(doc: str, **defaults: Any) -> argparse.Namespace:
    """Parse the command line; ``doc`` is the example's docstring, ``defaults`` replace the defaults by name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the setting of the tests: seconds on one core")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/examples"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args
