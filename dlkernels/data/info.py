"""What is known of a data set before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetInfo:
    """A set of grey images, a sample being the rows of one after the other.

    ``white`` is the raw pixel value that becomes 1.0 (0 stays 0.0); there is no other normalisation. What is drawn
    has a longer side of ``box`` pixels; its centre of mass (``by_mass``), else the middle of its sides, is the image's.
    """

    height: int
    width: int
    classes: int
    white: int
    batch_size: int  # a good one to begin with
    box: int
    by_mass: bool

    @property
    def features(self) -> int:
        return self.height * self.width


INFO = {
    "mnist": DatasetInfo(height=28, width=28, classes=10, white=255, batch_size=256, box=20, by_mass=True),
    "digits": DatasetInfo(height=8, width=8, classes=10, white=16, batch_size=64, box=8, by_mass=False),
}
