"""dlkernels.testing, as users call it: it accepts results that agree with stock and refuses others."""

import copy
import inspect
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlkernels
from dlkernels import functional, losses, testing
from dlkernels._errors import first_line
from dlkernels.testing import (
    Layer,
    LossJudge,
    assert_layer_no_worse,
    assert_models_agree,
    cross_entropy_oracle,
    gaussian_nll_oracle,
    mse_oracle,
)


def test_public_names_are_documented():
    for name in testing.__all__:
        value = getattr(testing, name)
        assert isinstance(value, dict) or inspect.getdoc(value), name
        assert name in testing.__doc__, name


def test_the_example_runs():
    example = textwrap.dedent(re.search(r"too:\n\n(.*?)\n\n\*", testing.__doc__, re.DOTALL).group(1))
    names = {}
    exec(example, names)
    tests = [f for name, f in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_losses_example_runs():
    example = textwrap.dedent(re.search(r"\n\n( {4}judge.*)", testing.losses.__doc__, re.DOTALL).group(1))
    exec(example, {"torch": torch, "F": F, "dlkernels": dlkernels, "LossJudge": LossJudge, "mse_oracle": mse_oracle})


def layer(activation="silu"):
    x, weight, bias = torch.randn(20, 12), torch.randn(7, 12), torch.randn(7)
    return Layer(x, weight, bias, torch.randn(20, 7), activation)


def test_a_wrong_layer_is_refused():
    assert_layer_no_worse(layer(), lambda x, w, b: functional.linear_act(x, w, b, "silu"))
    with pytest.raises(AssertionError, match=r"y: error .* twice stock's"):
        assert_layer_no_worse(layer(), lambda x, w, b: functional.linear_act(x, w, b, "silu") * (1 + 1e-5))
    with pytest.raises(AssertionError, match=r"y: expected .*float32.*got .*float64"):
        assert_layer_no_worse(layer(), lambda x, w, b: functional.linear_act(x, w, b, "silu").double())


def test_a_wrong_model_is_refused():
    stock = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(4, 6)
    assert_models_agree(dlkernels.fuse(stock, inplace=False), stock, x)
    other = copy.deepcopy(stock)
    with torch.no_grad():
        other[0].weight.mul_(1.001)
    with pytest.raises(AssertionError, match="DO NOT AGREE"):
        assert_models_agree(other, stock, x)


@pytest.mark.parametrize(
    ("ours", "stock", "oracle", "tensors"),
    [
        (losses.mse_loss, F.mse_loss, mse_oracle, lambda: (torch.randn(9), torch.randn(9))),
        (
            losses.gaussian_nll_loss,
            F.gaussian_nll_loss,
            gaussian_nll_oracle,
            lambda: (torch.randn(9), torch.randn(9), torch.rand(9) + 0.1),
        ),
        (
            losses.cross_entropy,
            F.cross_entropy,
            cross_entropy_oracle,
            lambda: (torch.randn(9, 4), torch.randn(9, 4).softmax(1)),
        ),
    ],
    ids=["mse", "gaussian_nll", "cross_entropy"],
)
def test_a_wrong_loss_is_refused(ours, stock, oracle, tensors):
    for factor, right in ((1, True), (1 + 1e-4, False)):
        judge = LossJudge()
        args = tensors()
        judge.compare(lambda *a, f=factor: ours(*a) * f, stock, args, oracle(*args))
        if right:
            judge.assert_no_worse()
        else:
            with pytest.raises(AssertionError, match="rounding units, stock"):
                judge.assert_no_worse()


def test_ignore_index_of_the_oracle():
    x, target = torch.randn(9, 4), torch.arange(9) % 4
    (loss, _), (grad, _) = cross_entropy_oracle(x, target, ignore_index=2)
    torch.testing.assert_close(torch.tensor(float(loss)), F.cross_entropy(x, target, ignore_index=2))
    assert (grad[(target == 2).numpy()] == 0).all()


def test_first_line():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
