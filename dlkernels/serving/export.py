"""Files of a model for others to run: a ``torch.export`` program and ONNX, in standard operators only."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from dlkernels.atomic import atomic_write
from dlkernels.serving import onnx
from dlkernels.serving.check import Exported, ExportError, batch_size, check, has_batch_dim, resize_batch
from dlkernels.serving.decompose import decompose
from dlkernels.testing.agreement import arguments, outputs
from dlkernels.trainer.mode import eval_mode


def export_program(
    model: nn.Module, example: Any, path: str | os.PathLike[str], *, dynamic_batch: bool = True
) -> Exported:
    """Write ``model`` as a ``torch.export`` program (a ``.pt2`` file) that runs where this package is not installed.

    Args:
        model: exported in eval mode; afterwards as it was. Layers of ours, fused models and all others.
        example: a tensor, a tuple of arguments or a dict of keyword arguments. Its shapes and dtypes are the program's.
        path: of the file; written whole or not at all.
        dynamic_batch: the program takes any batch size: the first size of every tensor whose first size is that of
            the first tensor. Otherwise the example's.

    The file is read back, run on new inputs (with ``dynamic_batch`` of two other batch sizes) and compared with the
    model: its outputs may be at most twice as far from float64's as the model's are, or 32 rounding errors of the
    largest output (4 in 16-bit dtypes) where those are closer. Load it with ``torch.export.load(path).module()``.

    Raises:
        ExportError: ``torch.export`` cannot trace the model, or the comparison failed; no file is left then.
        OSError: the file cannot be written.
    """
    with eval_mode(model):
        program, sizes = _traced(model, example, dynamic_batch)
        with atomic_write(path) as file:
            torch.export.save(program, file)
            file.seek(0)
            module = torch.export.load(file).module()
            return check(
                lambda inputs: outputs(module, inputs), f"torch {torch.__version__}", model, example, sizes, path
            )


def export_onnx(
    model: nn.Module, example: Any, path: str | os.PathLike[str], *, dynamic_batch: bool = True
) -> Exported:
    """Write ``model`` as ONNX, with nodes of the standard domain only. Arguments as for :func:`export_program`.

    Needs onnx and onnxscript (the extra ``export`` has them, and onnxruntime). The file is compared with the model as
    there, run by onnxruntime, or by ONNX's reference evaluator where onnxruntime is not installed or lacks a kernel
    (it has few for bfloat16); ``Exported.runtime`` says by which. ONNX files hold at most 2 GiB.

    Raises:
        ExportError: a package is missing, the model cannot be traced or has no form in ONNX's operators, or the
            comparison failed; no file is left then.
        OSError: the file cannot be written.
    """
    onnx.require()
    with eval_mode(model):
        program, sizes = _traced(model, example, dynamic_batch)
        content = onnx.convert(program, _batch_dims(example, "batch") if dynamic_batch else None)
        with atomic_write(path) as file:
            file.write(content)
            file.seek(0)
            runtime, run = onnx.load(file.read())
            return check(run, runtime, model, example, sizes, path)


def _traced(model: nn.Module, example: Any, dynamic_batch: bool) -> tuple[ExportedProgram, list[int | None]]:
    """The program without operators of ours, and the batch sizes to check it on."""
    size = batch_size(example)
    if dynamic_batch and not size:
        raise ExportError("expected an example with a batch of at least one sample; or give dynamic_batch=False")
    if dynamic_batch and size == 1:  # torch.export takes a size of 1 for a constant
        example, size = resize_batch(example, 2), 2
    args, kwargs = arguments(example)
    shapes = _batch_dims(example, Dim("batch")) if dynamic_batch else None
    try:
        program = decompose(torch.export.export(model, args, kwargs, dynamic_shapes=shapes))
    except Exception as error:  # Dynamo, the symbolic shapes and the model itself have one for everything
        hint = ". If its code fixes the batch size, give dynamic_batch=False" if dynamic_batch else ""
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"torch.export cannot trace {type(model).__name__}: {first}{hint}") from error
    return program, [1, size + 1] if dynamic_batch and size else [size]


def _batch_dims(example: Any, dim: Any) -> Any:
    """``dynamic_shapes`` for ``torch.export``: ``dim`` for the first size of all that is a batch."""
    size = batch_size(example)
    args, kwargs = arguments(example)
    return tree_map(lambda t: {0: dim} if isinstance(t, Tensor) and has_batch_dim(t, size) else None, kwargs or args)
