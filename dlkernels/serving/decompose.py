"""Replaces the dlkernels operators of an exported program, so that it runs without this package."""

from __future__ import annotations

import warnings

import torch
from torch.export import ExportedProgram

from dlkernels._ops.decompositions import DECOMPOSITIONS


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Return the program with every dlkernels operator written in torch's operators; other operators stay.

    Raises:
        ValueError: a dlkernels operator without a decomposition is left (a gradient, for example).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
        decomposed = program.run_decompositions(dict(DECOMPOSITIONS))
    left = sorted(name for name in operators(decomposed) if name.startswith("dlkernels."))
    if left:
        raise ValueError(f"expected a program of forward operators; it calls {', '.join(left)}")
    return decomposed


def operators(program: ExportedProgram) -> set[str]:
    """The names of the operators ("aten.linear.default") in all graphs of a program."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
