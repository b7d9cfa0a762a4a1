"""Tests that need a GPU: unwritten memory, captured graphs, launches, streams, devices.

The numbers of the other test files are checked on the GPU too, in every test that takes the ``device`` fixture.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from bench.clock import Graph
from dlkernels import functional, losses
from dlkernels.nn import MLP
from dlkernels.routing import OPS
from dlkernels.testing import STOCK, Layer, assert_layer_no_worse
from dlkernels.tuning import Size
from dlkernels.tuning.paths import only_routes
from tests.conftest import fill_free_memory_with_nan
from tests.ops.test_forward_backward import DTYPES, SHAPES, make, ours

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu")]

# Below, at and above the edges of tiles; compute-sanitizer is a hundred times slower than the GPU.
SMALL = [
    (1, 1, 1), (7, 3, 5), (65, 17, 63), (128, 32, 64), (130, 40, 10), (3, 129, 33), (130, 264, 136), (2100, 144, 136),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small_shapes(shape, activation, dtype):
    """The test that compute-sanitizer runs (tools/lease: the stage sanitize)."""
    for bias in (True, False):
        assert_layer_no_worse(make(*shape, dtype, activation, bias, "cuda"), ours(activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [[33, 64, 7, 50], [136, 264, 144, 152]], ids=["narrow", "wide"])
@pytest.mark.parametrize("rows", [3, 130])
def test_small_shapes_of_a_chain(rows, sizes, dtype):
    model, x = MLP(sizes, device="cuda", dtype=dtype), torch.randn(rows, sizes[0], device="cuda", dtype=dtype)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5000, 520, 520), (2048, 2048, 1536), (4096, 768, 1024)], ids=str)
def test_products_of_many_tiles(shape, dtype):
    """Large tiles on tensor cores, several waves of blocks, sums over rows in slices."""
    assert_layer_no_worse(make(*shape, dtype, "relu", device="cuda"), ours("relu"))


@pytest.mark.parametrize(("dtype", "classes"), [(torch.float32, 12_288), (torch.bfloat16, 24_576)], ids=str)
def test_a_row_that_just_fits_in_shared_memory(dtype, classes):
    """48 KiB. With the kernel's own shared memory it is more than a block gets by default."""
    x, target = torch.randn(3, classes, dtype=dtype, device="cuda"), torch.tensor([0, 5, classes - 1], device="cuda")
    loss = losses.cross_entropy(x, target)
    torch.testing.assert_close(loss, F.cross_entropy(x.double(), target).to(dtype))


@pytest.fixture
def nothing_uninitialised():
    """torch fills what at::empty returns with NaN, in our operators too."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3, device="cuda").isnan().all(), "the test needs the filling"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", STOCK)
def test_every_element_is_written(activation, dtype, nothing_uninitialised):
    for shape in (*SHAPES, (256, 784, 256), (9001, 20, 30)):
        for name, t in make(*shape, dtype, activation, device="cuda").run(ours(activation)).items():
            assert not t.isnan().any(), f"{name} at M, K, N = {shape}"


def test_free_memory_is_full_of_nan(gpu):
    for count in (1, 1000, 10**5, 10**7):
        fill_free_memory_with_nan()  # what was asked of the last one lies there
        assert torch.empty(count, device=gpu).isnan().all()


def refilled(layer, seed):
    """Other values in the same memory."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for t in (layer.x, layer.weight, layer.bias, layer.g):
            t.copy_(torch.randn_like(t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("shape", [(256, 784, 256), (33, 65, 17), (4096, 64, 64)], ids=str)
def test_captured_graph_gives_the_bits_of_eager(shape, activation, dtype):
    layer = make(*shape, dtype, activation, device="cuda")
    graph = Graph([lambda: layer.run(ours(activation))])
    for seed in (1, 2):
        refilled(layer, seed)
        graph.replay()
        for name, t in layer.run(ours(activation)).items():
            assert torch.equal(graph.results[0][name], t), name


def test_captured_training_is_eager_training():
    """The step of the MNIST practice: forward, loss, backward and optimizer in one graph."""
    x, target = torch.randn(256, 784, device="cuda"), torch.randint(10, (256,), device="cuda")
    torch.manual_seed(3)
    start = MLP([784, 256, 10], device="cuda").state_dict()
    trained = []
    for captured in (False, True):
        model = MLP([784, 256, 10], device="cuda")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            losses.cross_entropy(model(x), target).backward()
            optimizer.step()

        run = Graph([step]).replay if captured else step  # its warm-up has trained, too
        model.load_state_dict(start)
        for _ in range(5):
            run()
        trained.append(model.state_dict())
    for name, t in trained[0].items():
        assert torch.equal(t, trained[1][name]), name
        assert not torch.equal(t, start[name]), f"{name} was not trained"


def launches(step):
    """Return the number of kernels, copies and fills that the GPU ran."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        step()
        torch.cuda.synchronize()
    return [e.name for e in run.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize(("dtype", "path"), [(torch.float32, "simt"), (torch.bfloat16, "mma")], ids=str)
def test_at_most_four_launches_per_layer_and_step(dtype, path):
    """256, 784→256 is launch-bound: eager torch needs 6 (forward, ReLU; mask, dbias, dgrad, wgrad)."""
    layer = make(256, 784, 256, dtype, "relu", device="cuda")
    inputs = [t.requires_grad_() for t in (layer.x, layer.weight, layer.bias)]
    with only_routes(dict.fromkeys(OPS, path), Size.of(layer.x, layer.weight)):
        names = launches(lambda: torch.autograd.grad(functional.linear_relu(*inputs), inputs, layer.g))
    assert 1 <= len(names) <= 4, names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1024, 1024), (32, 200, 130), (256, 784, 256), (65536, 64, 64)], ids=str)
def test_same_bits_every_time(shape, dtype):
    layer = make(*shape, dtype, "gelu", device="cuda")
    first = layer.run(ours("gelu"))
    for _ in range(3):
        for name, t in layer.run(ours("gelu")).items():
            assert torch.equal(t, first[name]), name


def test_kernels_run_on_the_current_stream():
    """x arrives late on its own stream: on another stream the kernel would read the old x."""
    layer = make(300, 200, 100, torch.float32, "relu", device="cuda")
    late = torch.randn_like(layer.x)
    expected = Layer(late, layer.weight, layer.bias, layer.g, "relu").run(ours("relu"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: some 25 ms
        layer.x.copy_(late)
        results = layer.run(ours("relu"))
    stream.synchronize()
    for name, t in results.items():
        assert torch.equal(t, expected[name]), name


def test_forward_makes_no_full_size_temporary():
    """y is 64 MiB, and a mask of one bit per element is allowed besides."""
    x, w, b = (torch.randn(*s, device="cuda", requires_grad=True) for s in ((4096, 32), (4096, 32), (4096,)))
    functional.linear_relu(x, w, b)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = functional.linear_relu(x, w, b)
    grown = (torch.cuda.max_memory_allocated() - before) / 2**20
    assert y.numel() * 4 == 64 * 2**20
    assert grown < 64 + 2 + 14, f"grew by {grown:.0f} MiB"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    """Tensors decide where a kernel runs, not the current device; and they must agree."""
    layer = make(65, 33, 17, torch.float32, "relu", device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_layer_no_worse(layer, ours("relu"))
    assert {t.device.index for t in layer.run(ours("relu")).values()} == {1}
    with pytest.raises(RuntimeError, match="cuda:0"):
        functional.linear_relu(layer.x, layer.weight.to("cuda:0"))


LOSSES = {
    "mse": (lambda y, _: losses.mse_loss(y, y.detach().cos()), lambda y, _: F.mse_loss(y, y.detach().cos())),
    "gaussian nll": (
        lambda y, _: losses.gaussian_nll_loss(y, y.detach().cos(), y.detach().square() + 1),
        lambda y, _: F.gaussian_nll_loss(y, y.detach().cos(), y.detach().square() + 1),
    ),
    "cross entropy": (losses.cross_entropy, F.cross_entropy),
}


def relative(actual, exact):
    return float((actual.cpu().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, dtype):
    """Loss and gradient: at most twice stock's error, in the Frobenius norm; one rounding is always allowed."""
    ours_, stock = LOSSES[loss]
    start, target = torch.randn(50, 33).to(dtype), torch.randint(33, (50,))

    def results(op, y, target):
        y = y.requires_grad_()
        value = op(y, target)
        return value.detach(), *torch.autograd.grad(value, y)

    exact = results(stock, start.double(), target)
    pairs = [results(op, start.clone().to("cuda"), target.to("cuda")) for op in (ours_, stock)]
    for mine, theirs, want in zip(*pairs, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.device == theirs.device
        unit = torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)
        assert relative(mine, want) <= 2 * max(relative(theirs, want), unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy(dtype):
    x, weight = torch.randn(130, 64).to(dtype), (torch.randn(999, 64) / 8).to(dtype)
    target = torch.randint(999, (130,))

    def results(op, *operands):
        leaves = [t.detach().requires_grad_() for t in operands]
        value = op(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    exact = results(lambda x, w: F.cross_entropy(F.linear(x, w), target), x.double(), weight.double())
    there = target.to("cuda")
    mine = results(lambda x, w: functional.linear_cross_entropy(x, w, there), x.to("cuda"), weight.to("cuda"))
    stock = results(lambda x, w: F.cross_entropy(F.linear(x, w), there), x.to("cuda"), weight.to("cuda"))
    for a, b, want in zip(mine, stock, exact, strict=True):
        assert relative(a, want) <= 2 * max(relative(b, want), torch.finfo(dtype).eps)


def test_chain_is_its_layers():
    """functional.mlp on the GPU, by any path, against the layers one by one."""
    sizes = [784, 256, 128, 10]
    weights = [torch.randn(n, k, device="cuda").div(k**0.5).requires_grad_() for k, n in pairwise(sizes)]
    biases = [torch.randn(n, device="cuda", requires_grad=True) for n in sizes[1:]]
    x, leaves = torch.randn(300, 784, device="cuda"), [*weights, *biases]
    y, h = functional.mlp(x, weights, biases), x
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        h = functional.linear_act(h, w, b, "none" if i == 2 else "relu")
    torch.testing.assert_close(y, h)
    for mine, layers in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (y, h)), strict=True):
        assert relative(mine, layers.cpu().double()) < 1e-5
