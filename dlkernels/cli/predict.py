"""``python -m dlkernels predict``: classifies images and arrays with a trained run."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlkernels.atomic import write_json
from dlkernels.choices import PREDICTED_AT_ONCE
from dlkernels.cli.command import SettingError, add_command
from dlkernels.cli.prepare import load_trained

if TYPE_CHECKING:
    from dlkernels.serving.predict import Predictions
    from dlkernels.serving.readers import Place


def add_parser(subparsers: Any) -> None:
    """Add ``predict`` to the command's subparsers."""
    parser = add_command(
        subparsers,
        "predict",
        _predict,
        help="classify images or arrays with a trained run",
        description="Classify images, folders of images and arrays (.npy, .npz, .pt, idx) with a trained run.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a finished run")
    add("inputs", nargs="+", metavar="INPUT", help="image, folder of images, or array: raw pixels, or floats in [0, 1]")
    add("--top", type=int, default=1, metavar="K", help="show the K most probable classes (default: 1)")
    add("--json", metavar="FILE", help="write the predictions as JSON; - is standard output, in place of the table")
    add("--batch-size", type=int, default=PREDICTED_AT_ONCE, metavar="N", help=f"default: {PREDICTED_AT_ONCE}")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add(
        "--invert",
        action=argparse.BooleanOptionalAction,
        help="images are dark on light (default: those with a light border are)",
    )
    add(
        "--crop",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="cut out what is drawn in an image, scale and centre it as the data set does (--no-crop: scale the whole)",
    )


def _predict(args: argparse.Namespace) -> int:
    from dlkernels.serving import predict
    from dlkernels.serving.readers import read

    if args.top < 1 or args.batch_size < 1:
        raise SettingError("expected --top and --batch-size of at least 1")
    folder, model = load_trained(args.run, args.device)
    places, samples = read(args.inputs, folder.dataset, args.invert, args.crop)
    found = predict(model, samples, args.batch_size)
    rows = _rows(places, found, args.top)
    if args.json is not None:
        if args.json == "-":
            print(json.dumps(rows, indent=2))
            return 0
        write_json(Path(args.json), rows)
    print(_table(places, rows))
    if args.invert is None and (count := sum(place.inverted for place in places)):
        are = "image has a light border and was" if count == 1 else "images have a light border and were"
        print(f"\n{count} {are} inverted (--no-invert keeps them)")
    return 0


def _rows(places: list[Place], found: Predictions, k: int) -> list[dict[str, Any]]:
    probabilities, classes = (t.tolist() for t in found.top(k))
    return [
        {
            "file": str(place.file),
            "row": place.row,
            "inverted": place.inverted,
            "class": best[0],
            "probability": shares[0],
            "top": [{"class": c, "probability": p} for c, p in zip(best, shares, strict=True)],
        }
        for place, best, shares in zip(places, classes, probabilities, strict=True)
    ]


def _table(places: list[Place], rows: list[dict[str, Any]]) -> str:
    from dlkernels.trainer.display import table

    pairs = [[(str(best["class"]), f"{best['probability']:.3f}") for best in row["top"]] for row in rows]
    side_by_side = len(pairs[0])
    if 20 * (1 + side_by_side) > shutil.get_terminal_size((10_000, 24)).columns:  # then one below the other
        pairs = [[("\n".join(c for c, _ in row), "\n".join(p for _, p in row))] for row in pairs]
        side_by_side = 1
    header = ["input", *(["class", "probability"] * side_by_side)]
    return table(header, [[str(place), *itertools.chain(*row)] for place, row in zip(places, pairs, strict=True)])
