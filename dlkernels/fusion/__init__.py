"""Fused layers in models that were written without them: ``fuse``, ``unfuse``, ``report``, ``register_fusion``.

Reading order:

1. ``rules``: the tables of linear layers and activations; ``functional``: ``F.linear`` as a layer.
2. ``source``: from a method to its syntax tree and back; ``syntax``: questions about nodes of the tree.
3. ``patterns``: the places in a syntax tree where a call's output goes to another call. ``between`` judges what stands
   between the two, ``conditions`` the numbers and conditions there; ``unfollowed`` finds reasons for the report.
4. ``values``: the objects that the names at such a place may mean.
5. ``reading``: the activation behind a class or a function whose body is one call.
6. ``analysis``: all of this for a model.
7. ``gated``: gated layers, from their place in the syntax tree to the functions that the rewritten methods call;
   ``loops``: the same for loops that are chains; ``series``: calls that follow one another in a method; ``joined``:
   the chains among them, before a call.
8. ``rewrite``: the rewritten methods; ``swap``: the class that has them.
9. ``pairs``, ``chain``, ``written``, ``known``: the functions that the rewritten methods call; ``call`` decides for a
   layer and its activation, ``stages`` how many layers run as one op; ``memory`` remembers both, and ``steps`` does so
   for calls that follow one another. ``containers`` has the order in which Sequentials run their modules.
10. ``apply``: ``fuse``, ``unfuse``, ``report``.

Besides these, ``gated_graph`` finds gated layers for the backend, ``observe`` runs example inputs, ``speed`` says which
layers stay stock for their speed, ``sites`` holds the report, and ``backend`` fuses in ``torch.compile``.
"""

from dlkernels.fusion.apply import fuse, report, unfuse
from dlkernels.fusion.rules import register_fusion
from dlkernels.fusion.sites import Gain, Report, Site

__all__ = ["Gain", "Report", "Site", "fuse", "register_fusion", "report", "unfuse"]
