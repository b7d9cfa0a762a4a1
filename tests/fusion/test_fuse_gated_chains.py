"""Gated layers and chains in one model: each of them is one site, and neither hides the other."""

import copy

import pytest
import torch
from torch import nn

from dlkernels import fuse, report
from dlkernels.fusion import written
from dlkernels.testing import assert_no_worse, error
from dlkernels.testing.agreement import perturbed
from tests.fusion.fusable import decided_glus


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(13, 19), nn.Linear(13, 19), nn.Linear(19, 13)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class PlainMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(13, 29), nn.Linear(29, 13)
        self.act = nn.GELU()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A transformer block with a gated MLP beside a plain one."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(13, 1, batch_first=True)
        self.norm, self.gated, self.plain = nn.LayerNorm(13), GatedMLP(), PlainMLP()

    def forward(self, x):
        h = x + self.attention(x, x, x, need_weights=False)[0]
        n = self.norm(h)
        return h + self.gated(n) + self.plain(n)


class Behind(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(13, 19), nn.Linear(13, 19)
        self.packed = nn.Linear(13, 38)
        self.fc1, self.fc2, self.act = nn.Linear(19, 23), nn.Linear(23, 13), nn.ReLU()


class BehindNested(Behind):
    """The product is the argument of the chain."""

    def forward(self, x):
        return self.fc2(self.act(self.fc1(self.act(self.gate(x)) * self.up(x))))


class BehindNamed(Behind):
    def forward(self, x):
        g = self.act(self.gate(x))
        u = self.up(x)
        h = self.act(self.fc1(g * u))
        return self.fc2(h)


class BehindStatement(Behind):
    def forward(self, x):
        h = self.act(self.gate(x)) * self.up(x)
        h = self.act(self.fc1(h))
        return self.fc2(h)


class BehindPacked(Behind):
    def forward(self, x):
        g, u = self.packed(x).chunk(2, dim=-1)
        return self.fc2(self.act(self.fc1(self.act(g) * u)))


class Before(nn.Module):
    """A packed layer ends the line: the chain in front of it leaves it to the gated layer."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.packed = nn.Linear(13, 23), nn.Linear(23, 17), nn.Linear(17, 38)
        self.act = nn.Sigmoid()

    def forward(self, x):
        h = self.packed(self.act(self.fc2(self.act(self.fc1(x)))))
        g, u = h.chunk(2, dim=-1)
        return self.act(g) * u


ROWS = {
    Block: {("gated.gate", "gated.up", ()), ("plain.fc1", "", ("plain.fc2",))},
    BehindNested: {("gate", "up", ()), ("fc1", "", ("fc2",))},
    BehindNamed: {("gate", "up", ()), ("fc1", "", ("fc2",))},
    BehindStatement: {("gate", "up", ()), ("fc1", "", ("fc2",))},
    BehindPacked: {("packed", "", ()), ("fc1", "", ("fc2",))},
    Before: {("packed", "", ()), ("fc1", "", ("fc2",))},
}


def outputs_and_gradients(model, x, moved=0.0):
    """``moved``: how far the gradient of the output is moved up or down."""
    model.zero_grad()
    y = model(x)
    torch.manual_seed(2)
    grad = torch.randn_like(y)
    y.backward(grad * (1 + moved * torch.randn_like(y).sign()))
    return {"output": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cls", ROWS, ids=lambda cls: cls.__name__)
def test_both_are_sites(cls, monkeypatch):
    torch.manual_seed(0)
    model, x = cls().double(), torch.randn(5, 7, 13, dtype=torch.float64)
    stock = outputs_and_gradients(model, x)
    # The gradient is moved too: a last layer's gradient of its bias is its sum, and depends on no weight.
    unit = torch.finfo(torch.float64).eps / 2
    noisy = [outputs_and_gradients(perturbed(model, seed), x, unit) for seed in range(2)]
    fused = fuse(copy.deepcopy(model))
    table = report(fused)
    assert {(s.path, s.up, tuple(p for p, _ in s.then)) for s in table.fused} == ROWS[cls], str(table)

    several, chain_run = [], written.Chain.run
    monkeypatch.setattr(written.Chain, "run", lambda c, h: several.append(len(c.layers)) or chain_run(c, h))
    with decided_glus() as glus:
        ours = outputs_and_gradients(fused, x)
    assert several == [2] and len(glus) == 1
    for name, exact in stock.items():
        scale = exact.abs().max()
        noise = max(error(n[name], exact, scale) for n in noisy)
        assert_no_worse(ours[name], exact, scale, noise, name)


@pytest.mark.parametrize("left_out", ["up", "gate", "fc2"])
def test_one_part_is_left_out(left_out):
    torch.manual_seed(0)
    model, x = BehindNested().double(), torch.randn(5, 13, dtype=torch.float64)
    fused = fuse(copy.deepcopy(model), exclude=left_out)
    rows = {(s.path, s.up, tuple(p for p, _ in s.then)) for s in report(fused).fused}
    assert (
        rows
        == {
            "up": {("gate", "", ()), ("fc1", "", ("fc2",))},
            "gate": {("fc1", "", ("fc2",))},
            "fc2": {("gate", "up", ()), ("fc1", "", ())},
        }[left_out]
    )
    torch.testing.assert_close(fused(x), model(x))


def test_example_inputs_time_both():
    torch.manual_seed(0)
    table = report(fuse(Block(), example_inputs=torch.randn(2, 7, 13), min_gain=0))
    assert len(table.fused) == 2 and all(site.reached and site.gain for site in table.fused), str(table)
    assert "gated.gate * up" in str(table) and "plain.fc1 → plain.fc2" in str(table)
