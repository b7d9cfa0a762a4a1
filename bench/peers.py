"""Fused layers of other libraries, if they are installed. None is a dependency, and we have run none of them.

Each maker of a layer returns, for an activation, a function of (x, weight, bias), or None if the library has no such
form. Makers of heads return a function of (x, weight, target), the mean cross entropy of ``x @ weight.T``. Makers of
blocks return a function of (x, weights), ``gelu(x @ weights[0].T, approximate="tanh") @ weights[1].T``. Every maker
raises ImportError if the library is not installed. The results of each are checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels._errors import first_line

Op = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _apex(activation: str) -> Op | None:
    """apex.mlp: one GEMM with bias and activation, the gradients' epilogues fused."""
    from apex.mlp.mlp import mlp_function

    codes = {"none": 0, "relu": 1, "sigmoid": 2}
    if activation not in codes:
        return None
    code = codes[activation]
    return lambda x, weight, bias: mlp_function(int(bias is not None), code, x, weight, *_given(bias))


def _flash_attn(activation: str) -> Op | None:
    """flash_attn.ops.fused_dense: dweight and dbias in one GEMM; the activation is torch's."""
    from flash_attn.ops.fused_dense import fused_dense_func

    act = _ACT.get(activation)
    return None if act is None else lambda x, weight, bias: act(fused_dense_func(x, weight, bias))


def _quack(activation: str) -> Op | None:
    """quack's GEMM with an activation in its epilogue. Its backward needs a second layer, so it is forward only."""
    from quack.gemm_interface import gemm_act

    names = {"none": None, "relu": "relu", "relu2": "relu_sq", "gelu_tanh": "gelu_tanh_approx"}
    if activation not in names:
        return None
    name = names[activation]
    return lambda x, weight, bias: gemm_act(x, weight.t(), bias=bias, activation=name, store_preact=False)[1]


def _transformer_engine(activation: str) -> Op | None:
    """TransformerEngine's Linear, called with our parameters; the activation is torch's."""
    import transformer_engine.pytorch as te

    act = _ACT.get(activation)
    if act is None:
        return None
    modules: dict[tuple[Any, ...], torch.nn.Module] = {}

    def op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        key = (*weight.shape, weight.dtype, bias is None)
        if key not in modules:
            n, k = weight.shape
            modules[key] = te.Linear(k, n, bias=bias is not None, params_dtype=weight.dtype)
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return act(torch.func.functional_call(modules[key], parameters, (x,)))

    return op


_ACT: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def _given(bias: Tensor | None) -> tuple[Tensor, ...]:
    return () if bias is None else (bias,)


MAKERS: dict[str, Callable[[str], Op | None]] = {
    "apex": _apex,
    "flash_attn": _flash_attn,
    "quack": _quack,
    "transformer_engine": _transformer_engine,
}
FORWARD_ONLY = ("quack",)


def installed() -> tuple[str, ...]:
    """Return the names of the installed libraries, without importing them."""
    return tuple(name for name in MAKERS if find_spec(name) is not None)


Head = Callable[[Tensor, Tensor, Tensor], Tensor]
Block = Callable[[Tensor, Sequence[Tensor]], Tensor]


def _liger() -> Head:
    """Liger's fused linear cross entropy, which makes the gradients in forward, a block of rows at a time."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda x, weight, target: LigerFusedLinearCrossEntropyFunction.apply(x, weight, target)[0]


def _quack_mlp() -> Block:
    """quack's block of two layers, tanh GELU between them."""
    from quack.mlp import mlp_func

    return lambda x, weights: mlp_func(x, *weights, "gelu_tanh_approx")


Makers = Mapping[str, Callable[[], Callable[..., Tensor]]]
HEADS: Makers = {"liger": _liger}
BLOCKS: Makers = {"quack": _quack_mlp}


def importable(makers: Makers) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what these makers make, by name, and the reasons of those that cannot."""
    made, reasons = {}, {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Exception as failure:  # ImportError, or whatever the import of a library raises on this machine
            reasons[name] = f"{type(failure).__name__}: {first_line(failure)}"
    return made, reasons
