"""ONNX: converting a program to the bytes of a file, and running such a file."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from dlkernels.extras import how_to_get
from dlkernels.serving.check import ExportError
from dlkernels.testing.agreement import arguments

STANDARD = ("", "ai.onnx")
Run = Callable[[Any], list[Tensor]]


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
    onnx = importlib.import_module("onnx")
    if find_spec("onnxruntime") is not None:
        runtime = importlib.import_module("onnxruntime")
        try:
            session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exception classes are in a private module
            if "NOT_IMPLEMENTED" not in str(error):
                raise ExportError(f"onnxruntime does not take the file: {error}") from error
        else:
            names = [put.name for put in session.get_inputs()]
            return f"onnxruntime {runtime.__version__}", _run(names, lambda feed: session.run(None, feed))
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(onnx.load_model_from_string(content))
    return f"ONNX's reference evaluator {onnx.__version__}", _run(
        evaluator.input_names, lambda feed: evaluator.run(None, feed)
    )


def _run(names: list[str], run: Callable[[dict[str, Any]], Any]) -> Run:
    def call(inputs: Any) -> list[Tensor]:
        tensors = [t for t in tree_leaves(arguments(inputs)) if isinstance(t, Tensor)]
        feed = {name: _to_numpy(t) for name, t in zip(names, tensors, strict=True)}
        return [_from_numpy(a) for a in run(feed)]

    return call


def _to_numpy(t: Tensor) -> Any:
    t = t.detach().cpu().contiguous()
    if t.dtype != torch.bfloat16:
        return t.numpy()
    return t.view(torch.int16).numpy().view(importlib.import_module("ml_dtypes").bfloat16)


def _from_numpy(a: Any) -> Tensor:
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view("int16").copy()).view(torch.bfloat16)
    return torch.as_tensor(a)
