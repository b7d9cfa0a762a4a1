"""The speed that each network should have, in times the speed of the fastest other contender, on any CPU in float32.

A row that falls short of its aim says so on docs/internals/networks.md. A calls' aim counts for ``nn.MLP`` and for
stock's model after ``fuse``, the slower of the two. That of a training step counts for ``training_step``.
"""

from typing import NamedTuple


class Aim(NamedTuple):
    calls: float  # forward, and forward with gradients
    step: float | None  # a whole training step


AIMS = {
    "8-64-64-4, batch 1": Aim(1.0, 5.0),
    "8-64-64-4, batch 32": Aim(1.0, 4.0),
    "8-64-64-4, batch 256": Aim(1.0, 3.0),
    "50-128-64-1, batch 256": Aim(1.1, 2.5),
    "100-256-256-1, batch 1024": Aim(1.1, 1.6),
    "63-256x4-4, batch 4096": Aim(1.2, 1.3),
    "mnist": Aim(1.15, 1.5),
    "mnist-deep, batch 64": Aim(1.15, 1.4),
    "16 members of 8-64-64-4, batch 256": Aim(2.0, 5.0),
    "gated 512-1376-512, 1024 rows": Aim(1.25, None),
}
NEVER_SLOWER = Aim(1.0, 1.0)  # of all others
