"""Fused layers in models that were written without them: ``fuse``, ``unfuse``, ``report``, ``register_fusion``.

Reading order: ``rules`` (what is a layer, what an activation) → ``source`` (from a method to its syntax tree and
back) → ``patterns`` (where the one meets the other) → ``values`` (which objects the names mean) → ``analysis`` (all of
it, for a model) → ``swap`` (the class with the rewritten methods) → ``call`` (what runs there) → ``apply``. Besides:
``observe`` (example inputs), ``sites`` (the report), ``backend`` (the same for ``torch.compile``).
"""

from dlkernels.fusion.apply import fuse, report, unfuse
from dlkernels.fusion.rules import register_fusion
from dlkernels.fusion.sites import Report, Site

__all__ = ["Report", "Site", "fuse", "register_fusion", "report", "unfuse"]
