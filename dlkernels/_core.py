"""The part of the package that ``import dlkernels`` loads at once: the operators, and the layers made of them.

It needs torch and the compiled module. The public names that are not here are loaded where they are first used.
"""

from dlkernels import _load, routing  # isort: skip  first: the rest needs the operators
from dlkernels import functional, losses, nn

routing.install()

__all__ = ["_load", "functional", "losses", "nn", "routing"]
