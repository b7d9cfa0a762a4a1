"""Use of a trained model: predictions, and files that run without this package.

``predict`` (classes and probabilities), ``readers`` and ``images`` (reading input files), ``export`` and ``onnx``
(a ``torch.export`` program, ONNX), ``decompose`` (replaces dlkernels operators by torch's), ``check`` (compares an
exported file with the model).
"""

from dlkernels.serving.decompose import decompose
from dlkernels.serving.export import export_onnx, export_program
from dlkernels.serving.predict import Predictions, predict

__all__ = ["Predictions", "decompose", "export_onnx", "export_program", "predict"]
