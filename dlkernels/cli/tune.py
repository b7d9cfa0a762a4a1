"""``python -m dlkernels tune``: measures on this machine which path is fastest, and writes its route table."""

from __future__ import annotations

import argparse
import re
from typing import Any

from dlkernels.cli.command import SettingError, add_command

DTYPES = ("float32", "bfloat16", "float64", "float16")


def add_parser(subparsers: Any) -> None:
    """Add ``tune`` to the command's subparsers."""
    parser = add_command(
        subparsers,
        "tune",
        _tune,
        help="measure which path is fastest on this machine, and keep it",
        description="Measure layers and chains of layers on this CPU or GPU, with every path that the kernels have. "
        "The results of each path are compared with float64, and it is timed beside stock torch in turns; a wrong or "
        "slower path is not used. The route table goes to your cache folder, and later processes on this machine use "
        "it. Run nothing else meanwhile.",
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shapes",
        nargs="+",
        metavar="MxKxN",
        help="layers by rows, in_features and out_features, such as 256x784x10 (default: the grid of the benchmark)",
    )
    add(
        "--mlps",
        nargs="+",
        metavar="MxK-N-...-N",
        help="chains of layers by rows and features, such as 256x8-64-64-4 (default: a small grid of them)",
    )
    which.add_argument(
        "--model",
        metavar="SPEC",
        help="the layers and chains that a model runs; SPEC as in `python -m dlkernels fuse`",
    )
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the model or its configuration")
    add("--batch-size", type=int, default=8, metavar="N", help="of the model (default: 8)")
    add("--size", type=int, metavar="N", help="pixels or tokens of the model")
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        help="default: float32, and bfloat16 unless stock torch would take half a minute for a step of it on this CPU",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--threads", type=int, metavar="N", help="CPU threads; the rows are for this number (default: torch's)")
    add(
        "--seconds", type=float, default=0.3, metavar="S", help="for one direction of one layer or chain (default: 0.3)"
    )
    add(
        "--out",
        metavar="FILE",
        help="the table to write, or to add to (default: in your cache folder); DLKERNELS_ROUTES=FILE uses it",
    )
    add("--any-threads", action="store_true", help="the table is for any number of threads, as shipped ones are")


def _tune(args: argparse.Namespace) -> int:
    import torch

    from dlkernels import routing
    from dlkernels.cli.fuse import make, read_settings
    from dlkernels.tuning import tune
    from dlkernels.tuning.layers import kind_of, usual_dtypes

    for name in ("batch_size", "size", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise SettingError(f"expected --{name.replace('_', '-')} of at least 1; got {value}")
    if not args.seconds > 0:
        raise SettingError(f"expected --seconds above 0; got {args.seconds}")
    shapes = [_shape(text) for text in args.shapes or ()]
    mlps = [_mlp(text) for text in args.mlps or ()]
    if args.model is not None and mlps:
        raise SettingError("expected --model or --mlps, not both: the chains of the model are measured")
    kind_of(None, args.device)  # a model cannot be moved to a GPU that is not there
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    options: dict[str, Any] = {"seconds": args.seconds, "out": args.out, "any_threads": args.any_threads}
    options["device"] = args.device
    options["told"] = lambda measured: print(measured, flush=True)
    dtypes = args.dtypes or usual_dtypes(args.device)
    if not args.dtypes and "bfloat16" not in dtypes:
        print("bfloat16 is left out: stock torch has no library for it on this CPU; --dtypes bfloat16 measures it")
    if args.model is None:
        table = tune(shapes=shapes, mlps=mlps, dtypes=dtypes, **options)
    else:
        torch.manual_seed(0)
        for dtype in dtypes:
            model, inputs = make(args.model, read_settings(args.set), args.batch_size, args.size)
            table = tune(*_cast(model, inputs, getattr(torch, dtype), args.device), **options)
    where = args.out or routing.cache_folder() / routing.tuned_name(args.any_threads, args.device)
    print(f"{where}: {len(table.rows)} rows, hash {table.hash}")
    return 0


def _shape(text: str) -> tuple[int, int, int]:
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if sizes is None:
        raise SettingError(f"expected --shapes MxKxN, such as 256x784x10; got {text!r}")
    m, k, n = map(int, sizes.groups())
    return m, k, n


def _mlp(text: str) -> tuple[int, ...]:
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*(-[1-9]\d*){2,}", text) is None:
        raise SettingError(f"expected --mlps MxK-N-...-N of two layers or more, such as 256x8-64-64-4; got {text!r}")
    return tuple(map(int, re.split("[x-]", text)))


def _cast(model: Any, inputs: Any, dtype: Any, device: str) -> tuple[Any, Any]:
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    def cast(t: Any) -> Any:
        return t.to(device, dtype) if t.is_floating_point() else t.to(device)

    return model.to(device, dtype), tree_map_only(Tensor, cast, inputs)
