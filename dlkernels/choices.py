"""Names to choose from, data sets, and default numbers. The command line lists them without importing torch."""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["none", "relu", "leaky_relu", "relu2", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"]
Dataset = Literal["mnist", "digits"]
Progress = Literal["auto", "bar", "lines", "silent"]
Schedule = Literal["constant", "linear", "cosine", "step"]

LOWEST_RATE, HIGHEST_RATE, RATES = 1e-6, 1.0, 100  # the learning rates that a search tries
PREDICTED_AT_ONCE = 1024  # samples


@dataclass(frozen=True)
class DatasetInfo:
    """A data set of grey images. A sample is an image flattened row by row.

    ``white`` is the raw pixel value that becomes 1.0 (0 stays 0.0); there is no other normalisation. The longer side of
    a drawing has ``box`` pixels. The drawing is centred by its centre of mass (``by_mass``), else by its bounding box.
    """

    height: int
    width: int
    classes: int
    white: int
    batch_size: int  # the default for training
    box: int
    by_mass: bool

    @property
    def features(self) -> int:
        return self.height * self.width


INFO: dict[Dataset, DatasetInfo] = {
    "mnist": DatasetInfo(height=28, width=28, classes=10, white=255, batch_size=256, box=20, by_mass=True),
    "digits": DatasetInfo(height=8, width=8, classes=10, white=16, batch_size=64, box=8, by_mass=False),
}
