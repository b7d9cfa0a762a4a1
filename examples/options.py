"""The options that every example takes."""

import argparse
import pathlib
import sys
from types import TracebackType
from typing import Any

import torch

from dlkernels.data import DataError
from dlkernels.extras import how_to_get


def say_what_is_missing(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """For ``sys.excepthook``: print a sentence for a library or data that are not there, else the traceback."""
    name = pathlib.Path(sys.argv[0]).name
    if isinstance(error, DataError):
        print(f"{name}: {error}", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError):
        cause: BaseException | None = error  # transformers raises one that names no module from another one
        while cause and not getattr(cause, "name", None):
            cause = cause.__cause__ or cause.__context__
        module = getattr(cause, "name", "").split(".")[0]
        print(f"{name}: this example needs {module} ({error}): {how_to_get(module)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if "examples" in pathlib.Path(sys.argv[0]).resolve().parts:  # run as a program, not by a test
    sys.excepthook = say_what_is_missing


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
