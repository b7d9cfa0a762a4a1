"""``python -m dlkernels fuse``: fuses a model, compares it with stock, times both, and prints the report."""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import difflib
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dlkernels._errors import first_line
from dlkernels.cli.command import SettingError, add_command
from dlkernels.cli.prepare import require_device
from dlkernels.extras import how_to_get

if TYPE_CHECKING:
    from torch import nn

    Made = tuple[nn.Module, Any]  # a model and its example inputs

SECONDS = 5.0  # total time of the timing of both models


def add_parser(subparsers: Any) -> None:
    """Add ``fuse`` to the command's subparsers."""
    parser = add_command(
        subparsers,
        "fuse",
        _fuse,
        help="fuse a model, check it against stock, time both",
        description="Fuse a model with random weights; compare its outputs with stock's, time both, and report "
        "each linear layer.",
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="SPEC",
        help="torchvision:NAME (alexnet), transformers:TYPE (bert), or package.module:FACTORY, where FACTORY() "
        "returns a model and its example inputs (a tensor, a tuple or a dict)",
    )
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the model or its configuration")
    add("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    add("--size", type=int, metavar="N", help="pixels or tokens (default: 224, or the configuration's; 128)")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="default: float32")
    add("--device", default="cpu", help="cpu (default), cuda, ...")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add(
        "--min-gain",
        type=float,
        metavar="G",
        help="a layer that gains less stays stock (default: one that is slower by more than noise; 0: none)",
    )
    add("--train", action="store_true", help="time forward and backward (default: forward only)")


def _fuse(args: argparse.Namespace) -> int:
    import torch
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    from dlkernels.fusion import fuse, report

    if any(value is not None and value < 1 for value in (args.batch_size, args.size, args.threads)):
        raise SettingError("expected --batch-size, --size and --threads of at least 1")
    require_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    stock, inputs = make(args.model, read_settings(args.set), args.batch_size, args.size)
    stock = stock.to(args.device, dtype).eval()
    inputs = tree_map_only(
        Tensor, lambda t: t.to(args.device, dtype) if t.is_floating_point() else t.to(args.device), inputs
    )
    fused = fuse(copy.deepcopy(stock), example_inputs=inputs, min_gain=args.min_gain)
    print(report(fused))
    times = time_both(stock, fused, inputs, args.train)
    what = "forward and backward" if args.train else "forward"
    print(f"{what}: stock {times[0] * 1e3:.3g} ms, fused {times[1] * 1e3:.3g} ms: {times[0] / times[1]:.2f}x as fast")
    return 0


def read_settings(pairs: list[str]) -> dict[str, Any]:
    """Read the values of ``--set``: Python literals, or texts; raises :class:`SettingError`."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise SettingError(f"expected --set KEY=VALUE; got {pair!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def make(spec: str, settings: dict[str, Any], batch_size: int, size: int | None) -> Made:
    """Make the model that ``spec`` names, with random weights, and inputs for it; raises :class:`SettingError`."""
    kind, colon, name = spec.partition(":")
    if not (kind and colon and name):
        raise SettingError(
            f"expected --model torchvision:NAME, transformers:TYPE or package.module:FACTORY; got {spec!r}"
        )
    makers: dict[str, Callable[..., Made]] = {"torchvision": _torchvision, "transformers": _transformers}
    make_it = makers.get(kind, partial(_factory, kind))
    try:
        return make_it(name, settings, batch_size, size)
    except SettingError:
        raise
    except ImportError as error:
        get_it = f": {how_to_get(kind)}" if kind in makers else ""
        raise SettingError(f"cannot import {kind} ({error}){get_it}") from error
    except Exception as error:
        if not settings:
            raise
        asked = " ".join(f"{key}={value}" for key, value in settings.items())
        raise SettingError(f"{spec} cannot be made with --set {asked}: {first_line(error)}") from error


def _torchvision(name: str, settings: dict[str, Any], batch_size: int, size: int | None) -> Made:
    import torch

    from dlkernels.data.vision import import_torchvision

    models = import_torchvision().models
    if name not in models.list_models():
        raise SettingError(f"torchvision has no model {name!r}; it has {', '.join(models.list_models())}")
    pixels = size or settings.get("image_size", 224)
    return models.get_model(name, weights=None, **settings), torch.randn(batch_size, 3, pixels, pixels)


def _transformers(name: str, settings: dict[str, Any], batch_size: int, size: int | None) -> Made:
    import torch

    from dlkernels.data.vision import import_torchvision

    with contextlib.suppress(ImportError):  # transformers imports torchvision if installed, and a failure would end it
        import_torchvision()
    transformers = importlib.import_module("transformers")
    try:
        known = transformers.AutoConfig.for_model(name).to_dict()
        config = transformers.AutoConfig.for_model(name, **settings)
        model = transformers.AutoModel.from_config(config)
    except ValueError as error:
        raise SettingError(f"transformers:{name}: {first_line(error)}") from error
    if foreign := [key for key in settings if key not in known]:  # transformers stores it, but ignores it
        near = difflib.get_close_matches(foreign[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SettingError(f"transformers:{name} has no setting {foreign[0]}{hint}")
    if model.main_input_name == "pixel_values":
        pixels = size or getattr(config, "image_size", 224)
        height, width = pixels if isinstance(pixels, list | tuple) else (pixels, pixels)
        return model, {"pixel_values": torch.randn(batch_size, getattr(config, "num_channels", 3), height, width)}
    if model.main_input_name != "input_ids":
        raise SettingError(
            f"transformers:{name} takes {model.main_input_name}, for which we have no example: write a factory"
        )
    tokens = torch.randint(config.vocab_size, (batch_size, size or 128))
    return model, {"input_ids": tokens} | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})


def _factory(module: str, name: str, settings: dict[str, Any], batch_size: int, size: int | None) -> Made:
    from torch import nn

    sys.path.insert(0, "")  # find modules in the working folder, as `python -m` does
    try:
        factory = getattr(importlib.import_module(module), name, None)
    finally:
        sys.path.remove("")
    if factory is None:
        raise SettingError(f"{module} has no {name}")
    made = factory(**settings)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise SettingError(
            f"expected {module}:{name}() to return a model and its example inputs; got {type(made).__name__}"
        )
    return made


def time_both(stock: nn.Module, fused: nn.Module, inputs: Any, train: bool) -> tuple[float, float]:
    """Return the median seconds per step of each, run in turns. With ``train``, a step includes a backward pass."""
    import torch
    from torch import Tensor
    from torch.utils._pytree import tree_leaves
    from torch.utils.benchmark import timer  # waits for the GPU if there is one

    from dlkernels.testing.agreement import arguments

    args, kwargs = arguments(inputs)
    seconds: tuple[list[float], list[float]] = ([], [])

    def step(model: nn.Module) -> float:
        begin = timer()
        with torch.set_grad_enabled(train):
            leaves = tree_leaves(model(*args, **kwargs))
        if train:
            outputs = [t.float().sum() for t in leaves if isinstance(t, Tensor) and t.requires_grad]
            model.zero_grad()
            torch.stack(outputs).sum().backward()
        return timer() - begin

    end = time.perf_counter() + SECONDS
    for turn in range(1000):
        for model, times in zip((stock, fused), seconds, strict=True):
            found = step(model)
            if turn:  # the first turn warms up
                times.append(found)
        if turn >= 3 and time.perf_counter() > end:
            break
    return statistics.median(seconds[0]), statistics.median(seconds[1])
