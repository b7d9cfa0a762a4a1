"""Every example in its small setting: its result, that stock and fused begin alike, and that layers were fused."""

import importlib
import sys

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an example by name as its command would, on one thread; returns what its ``main`` does."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    threads = torch.get_num_threads()

    def run(name):
        monkeypatch.setattr(sys, "argv", [name, "--small", "--threads", "1", "--out", str(tmp_path)])
        return importlib.import_module(name).main()

    yield run
    torch.set_num_threads(threads)


def check(outcome, fused, widths, growth=1.0):
    """That many places were fused, as many steps taken, and the losses at the beginning are those of stock.

    A chain is one place. A product over ``in_features`` terms differs between two orders of summation by about
    sqrt(in_features) roundings. A step makes three products a layer (forward, dgrad, wgrad), and each step adds its
    roundings to those before. ``growth`` is how much more of a difference in the gradients an optimizer makes.
    """
    stock, ours = outcome.stock.losses, outcome.fused.losses
    assert [len(report.fused) for report in outcome.reports] == fused
    assert len(stock) == len(ours) > 0 and all(map(torch.isfinite, torch.tensor(ours)))
    steps = min(len(stock), sys.modules["both"].BEGINNING)
    assert outcome.apart <= growth * steps * 3 * sum(width**0.5 for width in widths) * EPS


def test_mnist_mlp(run):
    outcome = run("mnist_mlp")
    check(outcome, [1], [784, 256])
    for side in (outcome.stock, outcome.fused):
        assert side.result[0] < 0.25  # ten classes, not trained
        assert side.result[-1] > 0.85


def test_mnist_practice(run):
    outcome = run("mnist_practice")
    check(outcome, [1], [784, 256])
    for side in (outcome.stock, outcome.fused):
        assert side.result[0] < 0.25 and side.result[-1] > 0.85


def test_linear_regression(run, tmp_path):
    outcomes = run("linear_regression")  # asserts that the good step size finds the least-squares solution
    for name, outcome in outcomes.items():
        # 442 rows: the sum that is the gradient. Where steps are too large rounding grows with the distance, 2% a step
        check(outcome, [1], [442], growth=1.02**20 if name == "diverges" else 1.0)
    slow, good, diverges = (outcomes[name].fused.losses for name in ("slow", "good", "diverges"))
    assert good[-1] < 0.5 * slow[-1] < 0.5 * slow[0]
    assert diverges[-1] > diverges[0]
    assert (tmp_path / "linear_regression.png").stat().st_size > 0


def test_activations(run, tmp_path):
    outcomes = run("activations")  # asserts that values and gradients are torch's and the formulas'
    assert len(outcomes) == 8
    for name, outcome in outcomes.items():
        check(outcome, [1], [64, 64])
        assert [site.activation for site in outcome.reports[0].fused] == [name]
        assert min(outcome.stock.result, outcome.fused.result) > 0.85
    for file in ("activations.png", "activations_losses.png"):
        assert (tmp_path / file).stat().st_size > 0


def test_adam(run, tmp_path):
    outcomes = run("adam")  # asserts that Adam ends below SGD
    for name, outcome in outcomes.items():
        # RMSprop divides its first step by sqrt(1 - 0.99) of the gradient: every weight moves by ten step sizes, 0.1,
        # whatever its gradient. Where that is no more than rounding its sign differs, and 0.2 is added to the weight.
        check(outcome, [1], [784, 256], growth=100.0 if name == "RMSprop" else 1.0)
        assert outcome.fused.losses[-1] < outcome.fused.losses[0]
    assert (tmp_path / "adam.png").stat().st_size > 0


def test_generalisation(run):
    outcomes = run("generalisation")  # asserts that what k-fold validation chooses is better on held-out digits
    for kind, runs in outcomes.items():
        assert len(runs) == 3
        for outcome in runs:
            # One chain in the model of all labels and in that of each of three folds. Normalisation ends it. It divides
            # by the deviation of a feature over the batch, which may be small.
            places, growth = (2, 10.0) if kind == "batchnorm" else (1, 1.0)
            check(outcome, [places] * 4, [64, 256, 256], growth)


def test_gan(run, tmp_path):
    outcome = run("gan")  # asserts that the drawings come nearer to real digits, and real digits to them
    # Adam's first step is one step size in the sign of each gradient, however small: where it is no more than rounding,
    # signs differ. One network's differences are the other's gradients.
    check(outcome, [1, 1], [32, 128, 128, 64, 128, 128], growth=30.0)
    assert (tmp_path / "gan.png").stat().st_size > 0


def test_self_supervised(run):
    outcomes = run("self_supervised")  # asserts that pre-training is better in the mean of three seeds
    for runs in outcomes.values():
        assert len(runs) == 3
        for outcome in runs:
            check(outcome, [1], [64, 256, 128])
