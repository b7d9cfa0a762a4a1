"""Measures on this machine which path is fastest for which layer, and writes the route table of :mod:`routing`.

For each layer every path that the kernels have for its products is judged by the float64 oracle. The right ones are
timed beside stock torch in one process, in turns. A path is taken only if it was right and not slower than stock by
more than noise; where none is left, the product goes to torch's GEMM, with our passes around it. So are the two ways of
a chain of narrow layers, forward and backward: by one kernel, or layer by layer.

On a GPU every contender is captured as a CUDA graph first, so that the host's time does not count. CUDA events around
its replays are the clock.
"""

from dlkernels.tuning.entry import tune
from dlkernels.tuning.layers import GRID, Size, TuneError
from dlkernels.tuning.measurement import Measured
from dlkernels.tuning.mlps import MLP_GRID, MlpSize

__all__ = ["GRID", "MLP_GRID", "Measured", "MlpSize", "Size", "TuneError", "tune"]

for _class in (Measured, MlpSize, Size, TuneError):
    _class.__module__ = __name__  # which pickles and tracebacks name
