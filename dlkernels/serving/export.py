"""Export of a model as a ``torch.export`` program or as ONNX, in standard operators only."""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from dlkernels._errors import first_line
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
        model: any module: dlkernels layers, fused models and others. It is exported in eval mode; its modes are
            restored afterwards.
        example: a tensor, a tuple of arguments or a dict of keyword arguments. It fixes shapes and dtypes.
        path: the file, written atomically.
        dynamic_batch: the program takes any batch size. The batch dimension is the first dimension of every tensor
            whose size there equals the first tensor's. If False, the batch size of the example is fixed.

    The file is read back, run on new inputs (with ``dynamic_batch`` on two other batch sizes) and compared with the
    model. Its error against float64 may be at most twice the model's; an error of up to 32 rounding errors of the
    largest output (4 in 16-bit dtypes) is always allowed. Load it with ``torch.export.load(path).module()``.

    Raises:
        ExportError: ``torch.export`` cannot trace the model, or the comparison failed; no file is left then.
        OSError: the file cannot be written.
    """
    with eval_mode(model):
        program, sizes = _traced(model, example, dynamic_batch)
        archive = io.BytesIO()  # torch ends the process if it writes to a file and the disk is full
        torch.export.save(program, archive)
        with atomic_write(path) as file:
            file.write(archive.getbuffer())
            file.seek(0)
            module = torch.export.load(file).module()
            return check(
                lambda inputs: outputs(module, inputs), f"torch {torch.__version__}", model, example, sizes, path
            )


def export_onnx(
    model: nn.Module, example: Any, path: str | os.PathLike[str], *, dynamic_batch: bool = True
) -> Exported:
    """Write ``model`` as ONNX, with nodes of the standard domain only. Arguments as for :func:`export_program`.

    It needs onnx and onnxscript (the extra ``export`` has them, and onnxruntime). The file is compared with the model
    as in :func:`export_program`. It is run by onnxruntime, or by ONNX's reference evaluator if onnxruntime is not
    installed or lacks a kernel (it has few for bfloat16); ``Exported.runtime`` says which. ONNX files hold at most
    2 GiB.

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
    """Trace the model; return the program without dlkernels operators, and the batch sizes of the check."""
    size = batch_size(example)
    if dynamic_batch and not size:
        raise ExportError("expected an example with a batch of at least one sample; or give dynamic_batch=False")
    if dynamic_batch and size == 1:  # torch.export treats a size of 1 as a constant
        example, size = resize_batch(example, 2), 2
    args, kwargs = arguments(example)
    shapes = _batch_dims(example, Dim("batch")) if dynamic_batch else None
    try:
        program = decompose(torch.export.export(model, args, kwargs, dynamic_shapes=shapes))
    except Exception as error:  # Dynamo, symbolic shapes and the model itself may raise anything
        hint = ". If its code fixes the batch size, give dynamic_batch=False" if dynamic_batch else ""
        raise ExportError(f"torch.export cannot trace {type(model).__name__}: {first_line(error)}{hint}") from error
    return program, [1, size + 1] if dynamic_batch and size else [size]


def _batch_dims(example: Any, dim: Any) -> Any:
    """``dynamic_shapes`` for ``torch.export``: ``dim`` for the batch dimension of every tensor that has one."""
    size = batch_size(example)
    args, kwargs = arguments(example)
    return tree_map(lambda t: {0: dim} if isinstance(t, Tensor) and has_batch_dim(t, size) else None, kwargs or args)
