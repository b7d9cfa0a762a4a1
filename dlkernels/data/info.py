"""What is known of a data set before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetInfo:
    """A set of grey images, a sample being the rows of one after the other.

    ``white`` is the raw pixel value that becomes 1.0 (0 stays 0.0); there is no other normalisation.
    """

    height: int
    width: int
    classes: int
    white: int
    batch_size: int  # a good one to begin with

    @property
    def features(self) -> int:
        return self.height * self.width


INFO = {
    "mnist": DatasetInfo(height=28, width=28, classes=10, white=255, batch_size=256),
    "digits": DatasetInfo(height=8, width=8, classes=10, white=16, batch_size=64),
}
