"""Names to choose from, and numbers that are taken unless told. The command line lists them without torch."""

from typing import Literal

Activation = Literal["none", "relu", "leaky_relu", "relu2", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"]
Progress = Literal["auto", "bar", "lines", "silent"]
Schedule = Literal["constant", "linear", "cosine", "step"]

LOWEST_RATE, HIGHEST_RATE, RATES = 1e-6, 1.0, 100  # that a search for a learning rate tries
PREDICTED_AT_ONCE = 1024  # samples
