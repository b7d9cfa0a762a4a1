"""The options that every example takes.

Every example imports this module first. So its command line is read before torch is imported, which takes seconds, and
a library that is missing is reported in one sentence.
"""

import argparse
import pathlib
import sys
from types import TracebackType


def say_what_is_missing(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """For ``sys.excepthook``: print a sentence for a library or data that are not there, else the traceback."""
    name = pathlib.Path(sys.argv[0]).name
    if isinstance(error, ModuleNotFoundError):
        from dlkernels.extras import how_to_get

        cause: BaseException | None = error  # transformers raises one that names no module from another one
        while cause and not getattr(cause, "name", None):
            cause = cause.__cause__ or cause.__context__
        module = getattr(cause, "name", "").split(".")[0]
        print(f"{name}: this example needs {module} ({error}): {how_to_get(module)}", file=sys.stderr)
    elif "dlkernels.data" in sys.modules and isinstance(error, sys.modules["dlkernels.data"].DataError):
        print(f"{name}: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the setting of the tests: seconds on one core")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/examples"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


def options(doc: str | None) -> argparse.Namespace:
    """Parse the command line, and set the number of threads; ``doc`` is the example's docstring."""
    import torch

    args = parser(doc).parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


if pathlib.Path(sys.argv[0]).resolve().parent == pathlib.Path(__file__).resolve().parent:  # a program, not a test
    sys.excepthook = say_what_is_missing
    parser(sys.modules["__main__"].__doc__).parse_args()  # --help or a mistake ends the program here
