"""What is done with a trained model: predictions, and files that run without this package.

``predict`` (classes and probabilities), ``readers`` and ``images`` (the files it takes), ``export`` and ``onnx``
(a ``torch.export`` program, ONNX), ``decompose`` (our operators as torch's own), ``check`` (what is written is first
compared with the model).
"""

from dlkernels.serving.decompose import decompose
from dlkernels.serving.export import export_onnx, export_program
from dlkernels.serving.predict import Predictions, predict

__all__ = ["Predictions", "decompose", "export_onnx", "export_program", "predict"]
