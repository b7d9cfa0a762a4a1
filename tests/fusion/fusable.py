"""Models for ``fuse``'s tests, and the checks for all of them: their numbers, and that they run fused."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import _decisions
from dlkernels.fusion import call, chain, gated, memory, stages, written

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


_runs = []  # the counts that are open


class _Counted:
    """A decision within steps: C++ runs it, so it counts by itself."""

    def __init__(self, decision):
        self.decision = decision

    def run(self, owner, x, *given):
        y = self.decision.run(owner, x, *given)
        for runs in _runs if y is not None else ():
            _count(runs, self.decision.activations())
        return y


class _Steps:
    def __init__(self, steps):
        self._steps = steps

    def __getattr__(self, name):
        return getattr(self._steps, name)

    def keep(self, i, decision, *end):
        self._steps.keep(i, _Counted(decision), *end)


def _with_counts(real):
    def made(*args):
        turn = real(*args)
        return None if turn is None else turn._replace(steps=_Steps(turn.steps))

    return made


chain.new_turn, chain.known_turn = map(_with_counts, (chain.new_turn, chain.known_turn))
written.turn_of_calls, written.known_turn = map(_with_counts, (written.turn_of_calls, written.known_turn))


def _count(runs, activations):
    runs.ops += 1
    runs.layers += len(activations)
    runs.places += sum(name not in ("none", 0) for name in activations)


@contextlib.contextmanager
def fused_runs():
    """Count fused calls while it lasts: ``ops``, their ``layers``, and ``places``, the layers with an activation."""
    runs = SimpleNamespace(ops=0, layers=0, places=0)

    def counting(real, activations):
        def run(*args):
            result = real(*args)
            if result is not None and (ran := activations(*args)) is not None:
                _count(runs, ran)
            return result

        return run

    with (
        mock.patch.object(call, "_run", counting(call._run, lambda x, ready: [ready[2]])),
        mock.patch.object(stages, "run_several", counting(stages.run_several, lambda x, all_: [r[2] for r in all_])),
        mock.patch.object(memory, "run_again", counting(memory.run_again, _remembered)),
    ):
        _runs.append(runs)
        try:
            yield runs
        finally:
            _runs.remove(runs)


def _remembered(key, owner, x, *given):
    return None if key[0] == "gated" else _decisions._decided[key][0].activations()


@contextlib.contextmanager
def decided_glus(note=None):
    """Collect the arguments of gated layers, of two weights or of a packed one, that a call decides about.

    ``note`` is called for each of them.
    """
    calls = []

    def counting(real):
        def run(*args):
            calls.append(args)
            if note is not None:
                note()
            return real(*args)

        return run

    names = "linear_glu", "linear_glu_packed"
    with mock.patch.multiple(gated, **{name: counting(getattr(gated, name)) for name in names}):
        yield calls


@contextlib.contextmanager
def gated_runs():
    """Count gated layers that run as one while it lasts, in a list; they are no places of ``fused_runs``."""
    runs = []

    def run_again(key, *args, real=memory.run_again):
        y = real(key, *args)
        if y is not None and key[0] == "gated":
            runs.append(key)
        return y

    with mock.patch.object(memory, "run_again", run_again), decided_glus(lambda: runs.append(None)):
        yield runs


def runs_fused(model, x=X):
    with fused_runs() as runs:
        model(x)
    return runs.places > 0


def fused_places(report):
    """Path and activation of each layer that is fused with an activation, also within chains."""
    return [(path, act) for site in report.fused for path, act in site.layers if act != "none"]
