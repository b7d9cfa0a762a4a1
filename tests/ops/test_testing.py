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
    Mlp,
    MlpJudge,
    assert_layer_no_worse,
    assert_models_agree,
    cross_entropy_oracle,
    gaussian_nll_oracle,
    mlp_oracle,
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


def chain(dtype=torch.float32, rows=200, activations=("relu", "leaky_relu", "none")):
    sizes = [(64, 12), (64, 64), (4, 64)]
    weights = [(torch.randn(n, k) / k**0.5).to(dtype) for n, k in sizes]
    biases = [torch.randn(n).to(dtype) for n, _ in sizes]
    return Mlp(torch.randn(rows, 12).to(dtype), weights, biases, torch.randn(rows, 4).to(dtype), activations)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2000])
def test_a_chain_in_another_order_of_sums_is_right(rows, dtype):
    """Of an equally good chain no draw is refused, though a single row has few numbers to compare."""
    for _ in range(30):
        one = chain(dtype, rows)

        def reordered(x, weights, biases, one=one):
            outputs = [x]
            for weight, bias, activation in zip(weights, biases, one.activations, strict=True):
                rows, columns = map(torch.randperm, weight.shape)
                z = F.linear(outputs[-1][:, columns], weight[rows][:, columns], bias[rows])
                outputs.append(testing.STOCK[activation](z[:, rows.argsort()]))
            return outputs[1:]

        assert (why := MlpJudge(one).objection(reordered)) is None, why


def test_a_wrong_chain_is_refused():
    one = chain()
    judge = MlpJudge(one)
    assert judge.objection(one.stock) is None
    wide = judge.objection(lambda *operands: [t.double() for t in one.stock(*operands)])
    assert wide == "y: expected torch.float32 (200, 4), got torch.float64 (200, 4)"
    assert judge.objection(lambda *_: 1 / 0) == "ZeroDivisionError: division by zero"
    wrong = judge.objection(lambda *operands: [t * (1 + 1e-5) for t in one.stock(*operands)])
    assert re.match(r"y: error .* rounding units, twice stock's is ", wrong)

    def one_row(x, weights, biases):
        *hidden, y = one.stock(x, weights, biases)
        return [*hidden, torch.cat([y[:-1], y[-1:] * 1.01])]

    assert judge.objection(one_row).startswith("y: error ")
    for place, name in enumerate(("dx", "dweight0", "dbias0")):

        def scaled(x, weights, biases, place=place):
            operands = [x, weights[0], biases[0]]
            same = operands[place]
            operands[place] = same + (same - same.detach()) * 1e-4  # only its gradient is another
            x, weight, bias = operands
            return one.stock(x, [weight, *weights[1:]], [bias, *biases[1:]])

        assert judge.objection(scaled).startswith(f"{name}: error ")
    assert "nan" in judge.objection(lambda *operands: [t * torch.nan for t in one.stock(*operands)])


def test_the_oracle_of_a_chain_reads_gates_from_the_outputs():
    """A gate that rounding moved is no error of the layers below it."""
    one = chain(activations=("relu", "relu", "none"))
    exact = mlp_oracle(one, one.stock(one.x, one.weights, one.biases))
    one.biases[0] = one.biases[0] - 1e-3  # moves some gates
    moved = one.stock(one.x, one.weights, one.biases)
    one.biases[0] = one.biases[0] + 1e-3
    assert not torch.equal(mlp_oracle(one, moved)["dweight0"][0], exact["dweight0"][0])
    results, outputs = one.run(one.stock)
    for name, (value, scale) in mlp_oracle(one, outputs).items():
        assert results[name].shape == value.shape == scale.shape
        assert float((results[name].double() - value).norm()) < 1e-6 * float(value.norm()), name
        assert bool((scale >= value.abs() * (1 - 1e-12)).all()), name


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
