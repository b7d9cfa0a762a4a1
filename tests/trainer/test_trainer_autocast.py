"""The trainer under autocast: weights and losses stay in float32, whatever container the output is."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from dlkernels.trainer import Trainer, adam, sgd
from dlkernels.trainer.transfer import cast_to_float32
from tests.trainer.training import X, Y, batches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_weights_and_loss_in_float32(dtype):
    seen = []

    def loss(output, y):
        seen.append(output.dtype)
        return nn.functional.cross_entropy(output, y)

    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    inner = []
    model[2].register_forward_hook(lambda module, inputs, output: inner.append(output.dtype))
    trainer = Trainer(model, loss, adam(model.parameters()), batches(), progress="silent", autocast=dtype)
    trainer.fit(1)
    assert set(inner) == {dtype}
    assert set(seen) == {torch.float32}
    assert model[0].weight.dtype == torch.float32


class Answer(NamedTuple):
    scores: torch.Tensor
    note: str


@dataclass(frozen=True)
class Record:
    scores: torch.Tensor
    parts: list


class Slotted:
    __slots__ = ("scores",)

    def __init__(self, scores):
        self.scores = scores


class Nested(nn.Module):
    """A network whose output is wrapped in a container."""

    def __init__(self, around):
        super().__init__()
        self.layer, self.around = nn.Linear(64, 1), around

    def forward(self, x):
        return self.around(self.layer(x))


def normal(z):
    return torch.distributions.Normal(z, torch.ones_like(z), validate_args=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("around", "take"),
    [
        (lambda z: (z, "note"), lambda out: out[0]),
        (lambda z: {"deep": [z, (z, 1)]}, lambda out: out["deep"][1][0]),
        (lambda z: OrderedDict(scores=z), lambda out: out["scores"]),
        (lambda z: Answer(z, "note"), lambda out: out.scores),
        (lambda z: Record(z, [z]), lambda out: out.parts[0]),
        (lambda z: Record(z, [z]), lambda out: out.scores),
        (lambda z: SimpleNamespace(scores=z), lambda out: out.scores),
        (normal, lambda out: out.loc),
        (Slotted, lambda out: out.scores),
        (lambda z: deque([z]), lambda out: out[0]),
    ],
)
def test_autocast_computes_the_loss_of_any_output_in_float32(around, take, dtype):
    """The square of an error of 400 is 160,000, beyond float16; the types of the containers stay."""
    kind, losses = type(around(torch.zeros(1))), []

    def loss(output, y):
        assert type(output) is kind
        value = (take(output) - 400).square().mean()
        losses.append((value.dtype, value.item()))
        return value

    model = Nested(around)
    nn.init.zeros_(model.layer.weight), nn.init.zeros_(model.layer.bias)
    data = [(X[:8], torch.zeros(8, 1))]
    trainer = Trainer(model, loss, sgd(model.parameters(), lr=1e-9), data, data, progress="silent", autocast=dtype)
    assert trainer.evaluate() == {"loss": 160_000}
    trainer.fit(1)
    assert set(losses) == {(torch.float32, 160_000.0)}


def test_autocast_of_transformers_outputs():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = Nested(lambda z: outputs.SequenceClassifierOutput(logits=z, hidden_states=(z,)))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X[:8]).logits.dtype == torch.bfloat16
    seen = []

    def loss(output, y):
        seen.append((type(output).__name__, output.logits.dtype, output[0].dtype, output.hidden_states[0].dtype))
        return output.logits.square().mean()

    trainer = Trainer(model, loss, sgd(model.parameters()), [(X, Y)], progress="silent", autocast=torch.bfloat16)
    trainer.fit(1)
    assert seen == [("SequenceClassifierOutput", *[torch.float32] * 3)]


def test_autocast_leaves_float64_and_integers():
    output = {"double": torch.ones(2, dtype=torch.float64), "index": torch.ones(2, dtype=torch.int64)}
    assert cast_to_float32(output) is output
