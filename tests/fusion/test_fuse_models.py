"""``fuse`` on models of other libraries: the same numbers, the same keys, and exactly the expected sites.

The models are in float64: there no ReLU has an input within rounding of 0, so an error would be large.
"""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from dlkernels import fuse, report, unfuse
from dlkernels.testing import assert_no_worse, error
from dlkernels.testing.agreement import perturbed
from tests.fusion.fusable import fused_places
from tests.fusion.zoo import MODELS, googlenet, linear_outputs_into_activations

NOTHING_TO_FUSE = {
    "torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:squeezenet1_1",
    "transformers:bloom", "transformers:clip_text_model",
}  # fmt: skip


def build(name, make=None):
    """The model in float64 and eval mode, and its inputs."""
    torch.manual_seed(0)
    try:
        model, inputs = (make or MODELS[name])()
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    return model.double().eval(), tree_map_only(
        torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs
    )


def run(model, inputs):
    torch.manual_seed(1)
    leaves = tree_leaves(model(**inputs) if isinstance(inputs, dict) else model(inputs))
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def outputs_and_gradients(model, inputs, moved=0.0):
    """``moved``: how far the gradients of the outputs are moved up or down."""
    outputs = run(model, inputs)
    torch.manual_seed(2)
    model.zero_grad()
    grads = [torch.randn_like(t) if t.requires_grad else None for t in outputs]
    if moved:
        grads = [g if g is None else g * (1 + moved * torch.randn_like(g).sign()) for g in grads]
    sum((t * g).sum() for t, g in zip(outputs, grads, strict=True) if g is not None).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [t.detach() for t in outputs], gradients


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    model, inputs = build(name)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    there = linear_outputs_into_activations(model, lambda m: run(m, inputs))
    there = {path for path, module in model.named_modules() if module in there}
    stock = outputs_and_gradients(model, inputs)

    assert fuse(model) is model
    table = report(model)
    fused = fused_places(table)
    assert {path for path, _ in fused} == there and len(fused) == len(there) and not table.undecided, str(table)
    assert bool(there) == (name not in NOTHING_TO_FUSE)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters

    fused = outputs_and_gradients(model, inputs)
    if name in NOTHING_TO_FUSE:
        assert [type(m) for m in model.modules()] == classes
        assert all(map(torch.equal, fused[0], stock[0]))
        assert all(torch.equal(g, stock[1][n]) for n, g in fused[1].items())
        return
    assert any(type(m) is not c for m, c in zip(model.modules(), classes, strict=True))
    assert [t.shape for t in fused[0]] == [t.shape for t in stock[0]] and list(fused[1]) == list(stock[1])
    unfuse(model)
    noisy = [outputs_and_gradients(perturbed(model, seed), inputs) for seed in range(2)]
    # A last layer's gradient of its bias is a sum of the outputs' gradients and depends on no weight: these are moved.
    unit = torch.finfo(torch.float64).eps / 2
    moved = [outputs_and_gradients(perturbed(model, seed), inputs, unit)[1] for seed in range(2)]
    for i, (ours, exact) in enumerate(zip(fused[0], stock[0], strict=True)):
        scale = exact.abs().max()
        assert_no_worse(ours, exact, scale, max(error(n[0][i], exact, scale) for n in noisy), f"output {i}")
    # One scale for all: the gradient of a key's bias is zero up to rounding, so it gives no scale.
    scale = torch.stack([g.abs().max() for g in stock[1].values()]).max()
    for key, ours in fused[1].items():
        exact = stock[1][key]
        noise = max(error(n[1][key], exact, scale) for n in noisy)
        assert_no_worse(ours, exact, scale, noise or max(error(m[key], exact, scale) for m in moved), key)

    assert [type(m) for m in model.modules()] == classes
    assert all(map(torch.equal, run(model, inputs), stock[0]))


def test_heads_that_only_train():
    """GoogLeNet's auxiliary heads: F.relu(self.fc1(x), inplace=True), in training mode only."""
    model, inputs = build("googlenet", googlenet)
    model.train()
    there = linear_outputs_into_activations(copy.deepcopy(model), lambda m: run(m, inputs))
    assert len(fused_places(report(fuse(model)))) == len(there) == 2
