"""The examples of known models, in the small setting: each learns what it says, fused as stock.

How near the two loss curves must be: a product of k terms in float32 is the exact product of weights that are off by
about sqrt(k) u each, u = eps / 2 (Higham and Mary, 2019, "A new approach to probabilistic rounding error analysis").
So training from weights that are off by so much shows what rounding may do to a curve, with all that the model and its
optimizer make of it. Stock and fused each err so: twice that is the bound, in the largest relative distance over the
beginning, and at least the rounding of the losses themselves.
"""

import itertools
import sys
from functools import partial

import pytest
import torch

from dlkernels.data.vision import import_torchvision
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "examples"))

both = pytest.importorskip("both")
EPS = torch.finfo(torch.float32).eps


def moved(model):
    """In place: every weight up or down by sqrt(fan_in) u; without a use of the training's random numbers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
            p.mul_(1 + signs * (p[0].numel() if p.ndim > 1 else 1) ** 0.5 * EPS / 2)
    return model


def beginning(train, prepare):
    torch.manual_seed(0)
    return list(itertools.islice(train(prepare), both.BEGINNING))


def run(name, fused):
    """The two results of the example; checks the fused layers and the curves, and that they came down."""
    train = partial(pytest.importorskip(name).train, small=True)
    outcome = both.both(train)
    assert sum(len(report.fused) for report in outcome.reports) == fused
    stock = beginning(train, lambda model: model)
    assert stock == outcome.stock.losses[: both.BEGINNING], "taking turns must change nothing"
    apart = max(abs(m - s) / abs(s) for m, s in zip(beginning(train, moved), stock, strict=True))
    assert outcome.apart <= 2 * max(apart, EPS)
    return outcome, [side.result for side in (outcome.stock, outcome.fused)]


def assert_losses_fell(outcome, share):
    for side in (outcome.stock, outcome.fused):
        assert sum(side.losses[-10:]) < share * sum(side.losses[:10])


def test_dqn():
    pytest.importorskip("gymnasium")
    _, returns = run("dqn", fused=1)  # a chain of three layers
    assert min(returns) >= 195


def test_transformer():
    outcome, exact = run("transformer", fused=2)
    assert_losses_fell(outcome, 0.1)
    assert min(exact) >= 0.8


def test_seq2seq():
    outcome, exact = run("seq2seq", fused=2)
    assert_losses_fell(outcome, 0.1)
    assert min(exact) >= 0.8


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_language_models_of_characters(name):
    pytest.importorskip("transformers")
    _, learnt = run(name, fused=2)  # a chain or a gated MLP in each block
    for side in learnt:
        assert side.held_out < 0.8 * side.unigram
        assert len(side.text) == 64


def test_bert():
    pytest.importorskip("transformers")
    _, learnt = run("bert", fused=5)
    for side in learnt:
        assert side.masked > 1.4 * side.commonest


def test_alexnet():
    try:
        import_torchvision()
    except ImportError as error:
        pytest.skip(f"alexnet is torchvision's: {error}")
    outcome, accuracies = run("alexnet", fused=1)  # a chain of three layers, which active dropouts cut
    assert_losses_fell(outcome, 0.5)
    assert min(accuracies) >= 0.7  # by chance 0.1


def test_resnet():
    _, accuracies = run("resnet", fused=38)  # without "x +" the second layer of a block ends in a ReLU too
    for side in accuracies:
        assert side.residual >= 0.93
        assert side.plain < 0.5  # too deep to learn without the way around
