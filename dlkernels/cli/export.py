"""``python -m dlkernels export``: writes a trained run as a file that runs without this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dlkernels.cli.command import SettingError, add_command
from dlkernels.cli.prepare import load_trained

FORMATS = ("pt2", "onnx")


def add_parser(subparsers: Any) -> None:
    """Add ``export`` to the command's subparsers."""
    parser = add_command(
        subparsers,
        "export",
        _export,
        help="write a trained run as a torch.export program or ONNX",
        description="Write a trained run as a file that runs where dlkernels is not installed, checked against it.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a finished run")
    add("--format", choices=FORMATS, required=True, help="a torch.export program, or ONNX")
    add("--out", type=Path, metavar="FILE", help="default: RUN/model.pt2 or RUN/model.onnx")
    add("--fixed-batch", type=int, metavar="N", help="for batches of N only (default: of any size)")


def _export(args: argparse.Namespace) -> int:
    import torch

    from dlkernels.serving.export import export_onnx, export_program

    if args.fixed_batch is not None and args.fixed_batch < 1:
        raise SettingError(f"expected --fixed-batch of at least 1; got {args.fixed_batch}")
    folder, model = load_trained(args.run)
    dtype = next(model.parameters()).dtype
    example = torch.rand(args.fixed_batch or 2, folder.dataset.features, dtype=dtype)
    out = args.out or folder.path / f"model.{args.format}"
    export = export_onnx if args.format == "onnx" else export_program
    print(export(model, example, out, dynamic_batch=not args.fixed_batch))
    return 0
