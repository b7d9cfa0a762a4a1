"""One call per training step: forward, loss, backward and update of a chain of layers, with little Python in between.

A step of a small network is mostly calls: of modules, of autograd, of the optimizer for each parameter. Here it is one.
This package decides if a step can be done so, from all that the calls would read. It describes the step to a
``_C.StepPlan`` (``csrc/python/training.cpp``), and tells it which dicts, lists, classes and tensors must stay as they
are. The plan runs the next steps for as long as they do: the op ``_mlp_loss`` (``csrc/ops/autograd/mlp_loss.cpp``)
computes the loss and the gradients, and ``csrc/ops/update.cpp`` updates the parameters.
"""

from dlkernels.training.step import TrainingStep, training_step

__all__ = ["TrainingStep", "training_step"]

TrainingStep.__module__ = __name__  # which pickles name
