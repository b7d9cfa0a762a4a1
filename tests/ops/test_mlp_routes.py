"""A chain whose forward and backward go different ways, as rows of a route table say, is right in every use."""

import contextlib
import itertools
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dlkernels import _C, functional, routing
from dlkernels._ops import autocast
from dlkernels._ops import mlp as _mlp
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels.nn import MLP
from dlkernels.testing import Mlp, MlpJudge
from dlkernels.tuning.mlps import MlpSize, draw
from tests.nn.training_steps import LOSSES, OPTIMIZERS, trained_both_ways
from tests.ops.test_ensemble import assert_bits_of_members, operands

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FUSED, LAYERS = routing.MLP_PATHS
WAYS = list(itertools.product(routing.MLP_PATHS, repeat=2))  # forward, backward
NARROW = (33, 64, 7, 50)


@contextlib.contextmanager
def ways(forward, backward, *chains, by_library=False):
    """Let chains (rows, features, dtype) go these ways. With ``by_library``, the products of their layers one by one
    are torch's, so that they can be counted."""
    mlps, rows = [], []
    for m, features, dtype in chains:
        name = str(dtype).removeprefix("torch.")
        both = zip(routing.MLP_OPS, (forward, backward), strict=True)
        mlps += [(op, name, m, features, 0, path, f"{path} by a row", 0) for op, path in both]
        shapes = [(m, n, k) for k, n in itertools.pairwise(features)]
        rows += [(op, name, *shape, 0, "aten", "", 0) for op in routing.OPS for shape in shapes]
    _C.use_routes(_C.make_routes(rows if by_library else [], mlps))
    try:
        yield
    finally:
        routing.use(())


def library_products(step):
    """The result of a step, and how many products torch's own GEMM did in it."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        result = step()
    return result, sum(e.count for e in prof.key_averages() if e.key in ("aten::mm", "aten::addmm"))


def by_kernels(x, weights, biases):
    acts = [ACTIVATIONS["relu"]] * (len(weights) - 1) + [ACTIVATIONS["none"]]
    *hidden, _ = _mlp.outputs_of_layers(x, weights, biases, acts)
    return [*hidden, functional.mlp(x, weights, biases)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 60, 2500])
@pytest.mark.parametrize(("forward", "backward"), WAYS)
def test_each_direction_goes_its_way_and_is_right(forward, backward, rows, dtype):
    chain = draw(MlpSize(rows, NARROW, str(dtype).removeprefix("torch.")))
    with ways(forward, backward, (rows, NARROW, dtype), by_library=True):
        assert (why := MlpJudge(chain).objection(by_kernels)) is None, why
        leaves = [t.requires_grad_() for t in (chain.x, *chain.weights, *chain.biases)]
        y, products = library_products(lambda: functional.mlp(chain.x, chain.weights, chain.biases))
        assert products == (0 if forward == FUSED else 3)
        _, products = library_products(lambda: torch.autograd.grad(y, leaves, chain.g))
        assert products == (0 if backward == FUSED else 6)


@pytest.mark.parametrize("activation", ["gelu", "tanh", "leaky_relu"])
@pytest.mark.parametrize(("forward", "backward"), WAYS)
def test_activations_that_keep_other_tensors(forward, backward, activation):
    drawn = draw(MlpSize(90, NARROW, "float32"))
    chain = Mlp(drawn.x, drawn.weights, drawn.biases, drawn.g, [activation] * 3)

    def ours(x, weights, biases):
        *hidden, _ = _mlp.outputs_of_layers(x, weights, biases, [ACTIVATIONS[activation]] * 3)
        return [*hidden, functional.mlp(x, weights, biases, activation, last_activation=activation)]

    with ways(forward, backward, (90, NARROW, torch.float32)):
        assert (why := MlpJudge(chain).objection(ours)) is None, why


def test_more_features_than_the_rule_allows():
    """In bfloat16 the rule stops at 128 features. A row may go on to what the kernels can take."""
    features = (150, 192, 256, 10)
    chain = draw(MlpSize(300, features, "bfloat16"))
    with ways(FUSED, FUSED, (300, features, torch.bfloat16)):
        plan = functional.explain_mlp(chain.x, chain.weights)
        assert plan.forward is not None and plan.backward is not None and plan.backward.splits == 2
        assert (why := MlpJudge(chain).objection(by_kernels)) is None, why


@pytest.mark.parametrize("whole", routing.MLP_PATHS)
@pytest.mark.parametrize("below", [LAYERS, FUSED])
def test_a_backward_that_stops_early_asks_for_its_own_layers(whole, below):
    """Nothing below the second layer needs a gradient, so backward is a chain of other features."""
    chain, cut = draw(MlpSize(90, NARROW, "float32")), NARROW[1:]
    fixed, *weights = chain.weights
    no_bias, *biases = chain.biases
    leaves = [t.requires_grad_() for t in (*weights, *biases)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    hidden = chain.stock(chain.x.double(), [fixed.double(), *exact[:2]], [no_bias.double(), *exact[2:]])[-1]
    wanted = torch.autograd.grad(hidden, exact, chain.g.double())
    mlps = [
        ("mlp_forward", "float32", 90, NARROW, 0, whole, "", 0),
        ("mlp_backward", "float32", 90, NARROW, 0, whole, "", 0),
        ("mlp_backward", "float32", 90, cut, 0, below, "", 0),
    ]
    shapes = [(90, n, k) for k, n in itertools.pairwise(NARROW)]
    _C.use_routes(_C.make_routes([(op, "float32", *s, 0, "aten", "", 0) for op in routing.OPS for s in shapes], mlps))
    try:
        y = functional.mlp(chain.x, [fixed, *weights], [no_bias, *biases])
        found, products = library_products(lambda: torch.autograd.grad(y, leaves, chain.g))
    finally:
        routing.use(())
    assert products == (0 if below == FUSED else 3), "one dgrad and two wgrads"
    for got, want in zip(found, wanted, strict=True):
        assert float((got.double() - want).norm()) < 1e-5 * float(want.norm())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("forward", "backward"), WAYS)
def test_members_of_an_ensemble(forward, backward, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ways(forward, backward, (60, NARROW, torch.float32)):
            assert_bits_of_members(*operands(5, 60, list(NARROW)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("forward", "backward"), WAYS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_training_step(forward, backward, optimizer):
    """Its gradients take turns in one memory where the layers run one by one, and not in one kernel."""
    with ways(forward, backward, (7, (5, 6, 6, 3), torch.float32), by_library=True):
        trained_both_ways(MLP([5, 6, 6, 3]), LOSSES["mse"], OPTIMIZERS[optimizer], 5)


def test_a_table_may_change_while_a_chain_runs():
    """A call asks for each direction once, so no way that it goes is a mixture."""
    chain = draw(MlpSize(90, NARROW, "float32"))
    judge, stop, wrong = MlpJudge(chain), threading.Event(), []
    mlp = [("float32", 90, NARROW, 0, path, "", 0) for path in routing.MLP_PATHS]
    tables = [_C.make_routes([], [(op, *row) for op in routing.MLP_OPS]) for row in mlp]

    def run():
        while not stop.is_set():
            wrong.append(judge.objection(by_kernels))

    threads = [threading.Thread(target=run) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for turn in range(300):
            _C.use_routes(tables[turn % 2])
            stop.wait(0.001)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        routing.use(())
    assert len(wrong) > 10 and set(wrong) == {None}


@pytest.mark.parametrize(("forward", "backward"), WAYS)
def test_autocast_casts_for_a_chain_that_one_kernel_takes(monkeypatch, forward, backward):
    """But not for few rows."""
    monkeypatch.setattr(autocast, "has_native_kernel", lambda x, *parameters: True)
    monkeypatch.setattr(_mlp, "_has_tiles", lambda: False)
    rows, weights = 1 << 14, [torch.randn(n, k) for k, n in itertools.pairwise(NARROW)]
    x = torch.randn(rows, 33)
    with ways(forward, backward, (rows, NARROW, torch.bfloat16)):
        assert _mlp.has_native_kernel(x, weights, [None] * 3) == (forward == backward == LAYERS)
        assert _mlp.has_native_kernel(x[1:], weights, [None] * 3)
