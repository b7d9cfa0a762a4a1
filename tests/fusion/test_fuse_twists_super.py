"""Twists of methods that override others: see module ``twists``."""

import copy
import pickle

import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse, report, unfuse
from tests.fusion.fusable import X, made, numbers, runs_fused
from tests.fusion.test_fuse_places import OfTorchrl, ThreeClasses


def test_overridden_methods_after_copies_and_changes():
    model = made(ThreeClasses)
    expected = numbers(model, X)
    kept = fuse(model).forward
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(numbers(again, X), expected, rtol=1e-12, atol=1e-12)
        assert runs_fused(again) and type(unfuse(again)) is ThreeClasses
    hook = model.fc1.register_forward_hook(lambda m, i, o: o * 2)
    stock = unfuse(copy.deepcopy(model))
    torch.testing.assert_close(model(X), stock(X), rtol=1e-12, atol=1e-12)
    hook.remove()
    assert [s.path for s in report(fuse(model, exclude="fc")).fused] == ["fc1"]
    unfuse(model)
    torch.testing.assert_close(kept(X), expected[0])
    assert not runs_fused(kept)


class Diamond(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.log = nn.Linear(6, 8), []

    def forward(self, x):
        self.log.append("Diamond")
        return F.relu(self.fc(x))


class Left(Diamond):
    def forward(self, x):
        self.log.append("Left")
        return super().forward(x) + 1


class Right(Diamond):
    def forward(self, x):
        self.log.append("Right")
        return super().forward(x) * 2 + super().forward(-x)


class Bottom(Left, Right):
    def forward(self, x):
        return super().forward(x) + super(Left, self).forward(x) + Diamond.forward(self, x)


def test_methods_of_several_parents():
    stock, fused = made(Bottom), fuse(made(Bottom))
    torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    assert fused.log == stock.log and runs_fused(fused) and [s.path for s in report(fused).fused] == ["fc"]
    assert report(fused).fused[0].where.startswith("Diamond.forward")


class OwnSuper(Diamond):
    def forward(self, x):
        super = lambda: Diamond()  # noqa: E731
        return x + type(super()).__mro__.index(Diamond)


def test_another_super():
    assert not report(fuse(made(OwnSuper))).fused


def test_a_parents_place_under_the_compiler():
    torch._dynamo.reset()
    for cls in (OfTorchrl, ThreeClasses):
        model = fuse(made(cls))
        expected = model(X)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(X), expected)
