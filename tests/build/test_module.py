"""The functions of dlkernels._C refuse other arguments in words, and the garbage collector sees what a plan holds."""

import gc
import weakref

import pytest
import torch

from dlkernels import _C

ROW = ("forward", "float32", 3, 4, 5, 0, "packed", "measured", 0)


def test_arguments_by_place_and_by_name():
    before = _C.use_routes(-1)
    try:
        number = _C.make_routes(rows=[ROW])
        assert _C.use_routes(number) == -1
        assert _C.use_routes(table=-1, cuda=False) == number
    finally:
        _C.use_routes(before)
    settings = {"dtype": "float32", "threads": 1, "in_bf16": False}
    fused = _C.explain_mlp(False, True, layers=((4096, 32, 16), [4096, 8, 32]), **settings)
    layers = [(4096, 32, 16), (4096, 8, 32)]
    assert fused == _C.explain_mlp(cuda=False, backward=True, layers=layers, **settings)
    assert isinstance(fused, tuple) and [type(value) for value in fused] == [int, str, int, str]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _C.use_routes(), TypeError, "incompatible function arguments"),
        (lambda: _C.use_routes("1"), TypeError, "incompatible function arguments"),
        (lambda: _C.use_routes(2**31), TypeError, "incompatible function arguments"),
        (lambda: _C.use_routes(10**6), ValueError, "expected a table of make_routes, or -1 for none; got 1000000"),
        (lambda: _C.make_routes([ROW[:-1]]), TypeError, "incompatible function arguments"),
        (lambda: _C.make_routes([("sideways", *ROW[1:])]), ValueError, "expected forward, dgrad or wgrad"),
        (lambda: _C.explain_mlp(False, False, [], "float8", 1, False), TypeError, "expected float64, float32"),
        (lambda: _C.StepPlan(), TypeError, "incompatible constructor arguments"),
    ],
)
def test_others_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Owner:
    """Holds a plan that holds it."""


def step_plan(owner):
    x, target, weight = torch.ones(2, 3), torch.ones(2, 4), torch.ones(4, 3, requires_grad=True)
    return _C.StepPlan((owner, owner, owner), x, target, False, [weight], [None], [0], 0.0, 0, None, 1, -100, 0.0)


def test_the_garbage_collector_sees_through_a_plan():
    owner = Owner()
    owner.plan = step_plan(owner)
    owner.plan.expect_dict(owner.__dict__, ())
    owner.plan.expect_list([owner])
    owner.plan.expect_attribute(owner, "plan", owner.plan)
    owner.plan.expect_class(owner)
    gone = weakref.ref(owner)
    assert any(owner is held for held in gc.get_referents(owner.plan))
    del owner
    gc.collect()
    assert gone() is None
