"""The contenders of networks by torch.compile, and the operations that a row counts."""

import pytest
import torch
from torch.nn import functional as F

from bench.names import COMPILED, COMPILED_STEP, STOCK
from bench.networks.chains import Network
from bench.networks.common import Asked
from bench.networks.residuals import STEP
from bench.networks.run import every_case, execute, flops

ROWS, SIZES = 8, [3, 4, 2]


@pytest.fixture(scope="module")
def network():
    yield Network(ROWS, SIZES, Asked(torch.float32, "cpu", compiled=True))
    torch.compiler.reset()


def test_compiled_contenders(network):
    """The compiled network has stock's results, and the step that compiles its optimizer too lowers the loss."""
    network.refuse_wrong()
    assert network.refused == {}
    forward = network.forward()
    torch.testing.assert_close(forward[COMPILED](), forward[STOCK]())
    for ours, stocks in zip(*(network.forward_backward()[name]() for name in (COMPILED, STOCK)), strict=True):
        torch.testing.assert_close(ours, stocks)
    assert {COMPILED, COMPILED_STEP} <= network.training().keys()
    step = network.compiled_step(F.mse_loss, network.g)
    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses[0], F.mse_loss(forward[STOCK](), network.g))


def test_without_the_option_nothing_is_compiled():
    made = Network(ROWS, SIZES, Asked(torch.float32, "cpu"))
    assert COMPILED not in made.models and not {COMPILED, COMPILED_STEP} & made.training().keys()


def test_a_row_counts_the_products_of_stock(network):
    forward = 2 * ROWS * (3 * 4 + 4 * 2)
    assert flops(network.forward()[STOCK]) == forward
    dgrad = 2 * ROWS * 4 * 2  # the first layer has none
    for calls in (network.forward_backward(), network.training()):
        assert flops(calls[STOCK]) == 2 * forward + dgrad


def test_networks_are_chosen_by_parts_of_their_names(capsys):
    found = [(case.network, case.timed) for _, case in every_case(["fp32"], "cpu", False, ["batch 32", "tanh, 32 po"])]
    modes = ("forward", "forward+backward", "training step")
    assert found == [*(("8-64-64-4, batch 32", mode) for mode in modes), ("heat 2-64-64-1, tanh, 32 points", STEP)]
    assert execute(["fp32"], 0.01, False, None, "cpu", ["no such"]) == 2
    assert "expected parts of networks' names, got no such" in capsys.readouterr().err
