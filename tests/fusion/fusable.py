"""Models for ``fuse``'s tests, and the checks for all of them: their numbers, and that they run fused."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlkernels

X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers of each size, with modules and functions between them; the forms below are its forwards."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act, self.drop, self.inplace = nn.GELU(), nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.function = F.silu
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8)])
        self.acts = nn.ModuleList([nn.ReLU(), nn.Tanh()])
        self.mixed = nn.ModuleList([nn.Linear(6, 8), nn.LeakyReLU(0.3), nn.Linear(8, 8), nn.Sigmoid()])
        self.table = nn.ModuleDict({"up": nn.Linear(6, 8), "relu": nn.ReLU()})


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.scale = nn.Linear(6, 8), nn.ReLU(), 1.0

    def forward(self, x):
        h = self.fc(x)
        h = self.act(h)
        return h * self.scale


class Nested(Named):
    def forward(self, x):
        return self.act(self.fc(x)) * self.scale


class Chained(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(6, 8), nn.ReLU()


THREE = pytest.mark.parametrize("cls", [Named, Nested, Chained])


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def made(cls, *args):
    torch.manual_seed(5)
    return cls(*args).double()


def numbers(model, x):
    torch.manual_seed(3)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def runs_fused(model, x=X):
    with mock.patch("dlkernels.fusion.call._run", wraps=dlkernels.fusion.call._run) as runs:
        model(x)
    return runs.call_count > 0
