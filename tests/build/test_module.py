"""The functions of dlkernels._C take arguments as functions of Python do, and refuse others in words."""

import gc
import weakref

import pytest
import torch

from dlkernels import _C

ROW = ("forward", "float32", 3, 4, 5, 0, "packed", "measured")


def test_arguments_by_place_and_by_name():
    before = _C.use_routes(-1)
    try:
        number = _C.make_routes(rows=[ROW])
        assert _C.use_routes(number) == -1
        assert _C.use_routes(table=-1, cuda=False) == number
    finally:
        _C.use_routes(before)
    fused = _C.explain_fused_mlp(False, layers=((4096, 32, 16), [4096, 8, 32]), dtype="float32")
    assert fused == _C.explain_fused_mlp(cuda=False, layers=[(4096, 32, 16), (4096, 8, 32)], dtype="float32")
    assert isinstance(fused, tuple) and [type(value) for value in fused] == [int, str, int]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _C.use_routes(), TypeError, "expected the argument 'table'"),
        (lambda: _C.use_routes(-1, False, 0), TypeError, "expected 2 arguments, got 3"),
        (lambda: _C.use_routes(-1, table=-1), TypeError, "got the argument 'table' twice"),
        (lambda: _C.use_routes(tables=-1), TypeError, "there is no argument 'tables'"),
        (lambda: _C.use_routes("1"), TypeError, "'str' object cannot be interpreted as an integer"),
        (lambda: _C.use_routes(1.0), TypeError, "'float' object cannot be interpreted as an integer"),
        (lambda: _C.use_routes(2**31), TypeError, "expected an int of 32 bits, got 2147483648"),
        (lambda: _C.use_routes(2**70), OverflowError, "too big"),
        (lambda: _C.use_routes(10**6), ValueError, "expected a table of make_routes, or -1 for none; got 1000000"),
        (lambda: _C.make_routes(3), TypeError, "expected an iterable"),
        (lambda: _C.make_routes([ROW[:-1]]), TypeError, "expected 8 values, got 7"),
        (lambda: _C.make_routes([("sideways", *ROW[1:])]), ValueError, "expected forward, dgrad or wgrad"),
        (lambda: _C.make_routes([(b"forward", *ROW[1:])]), TypeError, "bad argument type"),
        (lambda: _C.explain_fused_mlp(False, [(1, 2)], "float32"), TypeError, "expected 3 values, got 2"),
        (lambda: _C.explain_fused_mlp(False, [], "float8"), TypeError, "expected float64, float32"),
        (lambda: _C.StepPlan(), TypeError, "expected 13 values, got 0"),
        (lambda: _C.StepPlan(x=1), TypeError, "StepPlan takes no keyword arguments"),
        (lambda: _C.Decided({}), TypeError, "Decided: expected a dict with the key missing"),
    ],
)  # fmt: skip
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


def test_methods_of_a_plan_refuse_other_arguments():
    plan = step_plan(Owner())
    with pytest.raises(TypeError, match="expected 2 values, got 1"):
        plan.expect_dict({})
    with pytest.raises(TypeError, match="expected a list"):
        plan.expect_list((1, 2))
    with pytest.raises(TypeError, match="expected a dict"):
        plan.expect_dict([], ())
    with pytest.raises(TypeError, match="expected 7 values, got 0"):
        plan.run()
