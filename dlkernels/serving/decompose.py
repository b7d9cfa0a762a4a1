"""An exported program without our operators, so that it runs where this package is not installed."""

from __future__ import annotations

import warnings

import torch
from torch.export import ExportedProgram

from dlkernels._ops.decompositions import DECOMPOSITIONS


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The same program with every operator of ours written in torch's own; those of others stay as they are.

    Raises:
        ValueError: one of ours is left, for which torch has no form (a gradient, for example).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        decomposed = program.run_decompositions(dict(DECOMPOSITIONS))
    left = sorted(name for name in operators(decomposed) if name.startswith("dlkernels."))
    if left:
        raise ValueError(f"expected a program of forward operators; it calls {', '.join(left)}")
    return decomposed


def operators(program: ExportedProgram) -> set[str]:
    """Names of the operators a program calls ("aten.linear.default"), in all its graphs."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
