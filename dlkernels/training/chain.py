"""The model: the layers of the chain that it is, or the reason why it is none."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from dlkernels._ops.activations import Activation, activation_named
from dlkernels.fusion.containers import SEQUENTIAL, containers, leaves, runs_in_order
from dlkernels.fusion.reading import activation_of
from dlkernels.fusion.rules import linear_rule
from dlkernels.nn import MLP, LinearAct, LinearReLU, MLPEnsemble, StackedLinear
from dlkernels.nn.untouched import does_nothing, untouched
from dlkernels.training.context import Ordinary

_IN_ORDER = (*SEQUENTIAL, MLP.forward)  # as they were at import


@dataclass
class Chain:
    """The layers, and all ``modules`` that were read for them: ``containers`` and the modules in them."""

    containers: list[nn.Module]
    modules: list[nn.Module] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor | None] = field(default_factory=list)
    acts: list[int] = field(default_factory=list)
    slope: float | None = None  # of leaky_relu; None: there is none


def has_members(target: Tensor) -> bool:
    """Return True if a target has the members in front: [members, rows, ...], or of indices [members, rows]."""
    return target.dim() >= (3 if target.is_floating_point() else 2)


def of_one_member(members: int, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return an input and a target of one member of an ensemble."""
    if x.dim() not in (2, 3) or (x.dim() == 3 and len(x) != members):
        raise Ordinary("the input is neither [rows, features] nor [members, rows, features]")
    own = has_members(target)
    if own and len(target) != members:
        raise Ordinary("the target has another number of members")
    return x if x.dim() == 2 else x[0], target[0] if own else target


def chain_of(model: nn.Module, x: Tensor) -> tuple[Tensor, Chain]:
    """Return the model's layers, and x as its first layer gets it."""
    if type(model) is MLPEnsemble:
        return x, _chain_of_ensemble(model)
    if not runs_in_order(model, _IN_ORDER):
        if isinstance(model, nn.Sequential) and not untouched(model):
            raise Ordinary("the model has a hook, or its forward was replaced or compiled")
        raise Ordinary(f"the model is a {type(model).__name__}, not an nn.Sequential or MLP")
    chain = Chain([model])
    ready = False  # the last layer of the chain can take an activation
    chain.containers += containers(model, _IN_ORDER)
    for module, _ in leaves(model, (model,), _IN_ORDER):
        if module is None:
            raise Ordinary("the model has a None among its modules")
        kind = type(module)
        if not untouched(module):
            raise Ordinary(f"a {kind.__name__} has a hook, or its forward was replaced or compiled")
        chain.modules.append(module)
        if does_nothing(module):
            continue
        if isinstance(module, nn.Flatten) and not chain.weights and _is_flatten_of_samples(module, x):
            x = x.flatten(1)
        elif isinstance(module, LinearAct) and kind in (LinearAct, LinearReLU):
            _add(chain, module.weight, module.bias)
            _set_activation(chain, module.activation, module.negative_slope)
            ready = module.activation == "none"
        elif (rule := linear_rule(kind)) is not None:
            parameters = rule(module)
            if parameters is None:
                raise Ordinary(f"the parameters of a {kind.__name__} are computed from other tensors")
            _add(chain, *parameters)
            ready = True
        else:
            known = activation_of(module)
            if known is None or not ready:
                raise Ordinary(f"the model has a {kind.__name__} that is in no chain of layers")
            _set_activation(chain, *known)
            ready = False
    if not chain.weights:
        raise Ordinary("the model has no linear layer")
    return x, chain


def _chain_of_ensemble(model: MLPEnsemble) -> Chain:
    chain = Chain([model])
    for layer in model._modules.values():
        if type(layer) is not StackedLinear:
            raise Ordinary(f"the ensemble has a {type(layer).__name__} among its layers")
        chain.modules.append(layer)
        _add(chain, layer.weight, layer.bias)
        _set_activation(chain, str(model.activation), 0.01)
    if not all(map(untouched, (model, *chain.modules))):
        raise Ordinary("the model has a hook, or its forward was replaced or compiled")
    _set_activation(chain, "none", 0.01)
    return chain


def _is_flatten_of_samples(module: nn.Flatten, x: Tensor) -> bool:
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1) and x.dim() > 1


def _add(chain: Chain, weight: Tensor, bias: Tensor | None) -> None:
    chain.weights.append(weight)
    chain.biases.append(bias)
    chain.acts.append(0)


def _set_activation(chain: Chain, name: str, slope: float) -> None:
    act: Activation = activation_named(name)
    if name == "leaky_relu":
        if chain.slope not in (None, slope):
            raise Ordinary("the slopes of leaky_relu differ")
        chain.slope = slope
    chain.acts[-1] = act.code
