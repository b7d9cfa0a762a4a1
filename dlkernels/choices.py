"""Names to choose from, and default numbers. The command line lists them without importing torch."""

from typing import Literal

Activation = Literal["none", "relu", "leaky_relu", "relu2", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"]
Progress = Literal["auto", "bar", "lines", "silent"]
Schedule = Literal["constant", "linear", "cosine", "step"]

LOWEST_RATE, HIGHEST_RATE, RATES = 1e-6, 1.0, 100  # the learning rates that a search tries
PREDICTED_AT_ONCE = 1024  # samples
