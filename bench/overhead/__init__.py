"""Host overhead: the time of calls at 1x8→8, where the arithmetic takes almost none.

``python -m bench.overhead`` prints medians over many calls on one thread, and ours over stock's, which should be at
most 1. Each row is forward without gradients, forward with the gradients of input and parameters, or a training step
(zero_grad, forward, mean squared error, backward, SGD). The rows of a loss have the loss alone, and a step of
``nn.Linear`` that ends in it.
"""
