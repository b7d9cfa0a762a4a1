"""torch's own tracers and exporters on our layers: fx.symbolic_trace, onnx.export, TensorBoard's add_graph."""

import copy

import pytest
import torch

import dlkernels
from dlkernels.nn import MLP, CrossEntropyLoss, GaussianNLLLoss, LinearAct, LinearCrossEntropyLoss, LinearReLU, MSELoss

LAYERS = {
    "LinearReLU": lambda: LinearReLU(8, 4),
    "LinearAct, no bias": lambda: LinearAct(8, 4, bias=False, activation="gelu"),
    "MLP": lambda: MLP([8, 6, 5, 4], activation="leaky_relu"),
    "MLP, dropout and norm": lambda: MLP([8, 6, 4], dropout=0.1, norm="batch").eval(),
    "in a Sequential": lambda: torch.nn.Sequential(MLP([8, 6, 4]), torch.nn.Sigmoid()),
    "fused": lambda: dlkernels.fuse(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_symbolic_trace(make):
    """The graph computes the same as the module, gradients included, and can be copied."""
    torch.manual_seed(0)
    module, x = make(), torch.randn(3, 8)
    graph = copy.deepcopy(torch.fx.symbolic_trace(module))
    torch.testing.assert_close(graph(x), module(x))  # for a fused model stock's operators are recorded
    graph(x).square().sum().backward()
    module(x).square().sum().backward()
    for ours, expected in zip(graph.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


LOSSES = {
    "LinearCrossEntropyLoss": (
        lambda: LinearCrossEntropyLoss(8, 4, bias=True),
        lambda: (torch.randn(3, 8), torch.tensor([1, 2, 3])),
    ),
    "CrossEntropyLoss": (CrossEntropyLoss, lambda: (torch.randn(3, 8), torch.tensor([1, 2, 3]))),
    "MSELoss": (MSELoss, lambda: (torch.randn(3, 8), torch.randn(3, 8))),
    "GaussianNLLLoss": (GaussianNLLLoss, lambda: (torch.randn(3, 8), torch.randn(3, 8), torch.rand(3, 8))),
}


class OfTwo(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x, target):
        return self.loss(x, target)


class OfThree(OfTwo):
    def forward(self, x, target, variance):
        return self.loss(x, target, variance)


@pytest.mark.parametrize(("make", "inputs"), LOSSES.values(), ids=LOSSES)
def test_symbolic_trace_of_losses(make, inputs):
    torch.manual_seed(0)
    loss, args = make(), inputs()
    graph = torch.fx.symbolic_trace((OfTwo if len(args) == 2 else OfThree)(loss))
    torch.testing.assert_close(graph(*args), loss(*args), rtol=0, atol=0)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_onnx_export_by_torch_itself(make):
    """The exported program has standard operators only."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(3, 8)
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    assert {node.domain for node in program.model_proto.graph.node} <= {"", "ai.onnx"}
    pytest.importorskip("onnxruntime")
    torch.testing.assert_close(program(x)[0], module(x))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_tensorboard_draws_the_graph(make):
    """By torch.jit.trace, as `SummaryWriter.add_graph` calls it."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard._pytorch_graph import graph

    drawn, _ = graph(make().eval(), torch.randn(3, 8))
    operators = {node.op for node in drawn.node}
    assert operators & {"aten::linear", "aten::addmm"} and not any("dlkernels" in op for op in operators)
