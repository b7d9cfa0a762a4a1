"""ONNX: converting a program to the bytes of a file, and running such a file."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dlkernels.extras import how_to_get
from dlkernels.serving.check import ExportError
from dlkernels.testing.agreement import arguments

STANDARD = ("", "ai.onnx")
Run = Callable[[Any], Sequence[Tensor]]


def require() -> None:
    """Raise :class:`ExportError` if a package that torch's exporter needs is missing."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX export needs {' and '.join(missing)}: {how_to_get(missing[0])}")


def convert(program: ExportedProgram, batch_dims: Any) -> bytes:
    """Convert a program to the content of an ONNX file; ``batch_dims`` names its dynamic dimensions.

    Raises:
        ExportError: torch's exporter cannot convert an operator, or the model is too large for one file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch and onnxscript warn about each other
            exported = torch.onnx.export(program, dynamo=True, verbose=False, dynamic_shapes=batch_dims)
        assert exported is not None  # None only with dynamo=False
        model = exported.model_proto
        content = model.SerializeToString()
        importlib.import_module("onnx").checker.check_model(content, full_check=True)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ExportError(f"the model has no form in ONNX: {lines[-1]}") from error
    foreign = {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in STANDARD}
    if foreign or model.functions:
        names = sorted(foreign | {function.name for function in model.functions})
        raise ExportError(f"expected ONNX in standard operators only; got {', '.join(names)}")
    return bytes(content)


def load(content: bytes) -> tuple[str, Run]:
    """Return the name of a runtime that can run a file of this content, and a function from inputs to outputs.

    Raises:
        ExportError: onnxruntime rejects the file.
    """
    onnx, onnx_ir = importlib.import_module("onnx"), importlib.import_module("onnx_ir")
    loaded = torch.onnx.ONNXProgram(onnx_ir.from_proto(onnx.load_model_from_string(content)), None)
    if find_spec("onnxruntime") is not None:
        runtime = importlib.import_module("onnxruntime")
        session = partial(runtime.InferenceSession, providers=["CPUExecutionProvider"])  # torch's own may be on a GPU
        try:
            loaded.initialize_inference_session(session)
        except Exception as error:  # onnxruntime's exception classes are in a private module
            if "NOT_IMPLEMENTED" not in str(error):
                raise ExportError(f"onnxruntime does not take the file: {error}") from error
        else:
            return f"onnxruntime {runtime.__version__}", _run(loaded)
    return f"ONNX's reference evaluator {onnx.__version__}", _run(loaded.call_reference)


def _run(call: Callable[..., Sequence[Tensor]]) -> Run:
    def run(inputs: Any) -> Sequence[Tensor]:
        args, kwargs = arguments(inputs)
        return call(*args, **kwargs)

    return run
