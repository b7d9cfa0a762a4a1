"""Every kernel against the oracle: odd shapes, every dtype, every activation, forward and all gradients."""

import pytest
import torch

from dlkernels import functional
from dlkernels.testing import STOCK, Layer, assert_layer_no_worse

# M, K, N. Chosen against the tiles (14 × 32, few rows <= 8 and <= 32, k blocks of 128 and 256, slices): one below,
# at and above each edge, primes, ones, and what the landmark models use. The last rows: B in place or not, low and high
# tiles, and products multiplied as their transpose.
SHAPES = [
    (1, 1, 1), (1, 1, 17), (1, 63, 5), (1, 64, 1), (1, 1024, 257), (2, 3, 5), (3, 100, 33), (4, 64, 24), (8, 65, 31),
    (9, 128, 49), (13, 31, 16), (14, 32, 32), (15, 33, 33), (28, 257, 64), (31, 96, 47), (32, 200, 130), (33, 64, 65),
    (64, 300, 10), (97, 1, 101), (101, 103, 1), (129, 513, 40), (256, 784, 256), (337, 129, 270), (4099, 7, 3),
    (30, 2048, 70), (57, 2048, 40), (281, 90, 33), (701, 300, 800), (700, 800, 290), (18, 300, 77), (40, 331, 600),
    (70, 30, 1200), (300, 17, 601),
]  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(m, k, n, dtype, activation, bias=True, device="cpu"):
    g = torch.Generator().manual_seed(m * 7919 + k * 104729 + n)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    return Layer(draw(m, k), draw(n, k, scale=max(k, 1) ** -0.5), draw(n) if bias else None, draw(m, n), activation)


def ours(activation):
    return lambda x, w, b: functional.linear_act(x, w, b, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_over_shapes(shape, dtype, device):
    for bias in (True, False):
        assert_layer_no_worse(make(*shape, dtype, "relu", bias, device), ours("relu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", STOCK)
@pytest.mark.parametrize("shape", [(5, 7, 3), (40, 70, 50), (3, 100, 33)], ids=str)
def test_every_activation(activation, dtype, shape, device):
    assert_layer_no_worse(make(*shape, dtype, activation, device=device), ours(activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_tall_batch_is_cut_in_slices(dtype, activation, device):
    """wgrad over 9,000 rows and few features sums slices of k."""
    assert_layer_no_worse(make(9001, 20, 30, dtype, activation, device=device), ours(activation))


def layouts(t):
    """The same values in other memory layouts, by name."""
    wide = torch.randn(t.shape[0] * 2, t.shape[1] * 3, dtype=torch.float64).to(t.device, t.dtype)
    sliced = wide[::2, 1::3]
    sliced.copy_(t)
    padded = torch.full((t.shape[0], t.shape[1] + 5), float("nan"), dtype=t.dtype, device=t.device)
    padded[:, 2:-3] = t
    return {
        "contiguous": t,
        "column major": t.t().contiguous().t(),
        "every other": sliced,
        "padded rows": padded[:, 2:-3],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 70, 9), (40, 33, 50)], ids=str)
def test_strides_of_every_operand(shape, dtype, device):
    base = make(*shape, dtype, "gelu", device=device)
    for x in layouts(base.x).values():
        for weight in layouts(base.weight).values():
            assert_layer_no_worse(Layer(x, weight, base.bias, base.g, "gelu"), ours("gelu"))
    for g in layouts(base.g).values():
        assert_layer_no_worse(Layer(base.x, base.weight, base.bias, g, "relu"), ours("relu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stride_zero(dtype, device):
    base = make(40, 33, 50, dtype, "relu", device=device)
    x = base.x[:1].expand(40, -1)
    weight = base.weight[:, :1].expand(-1, 33)
    bias = base.bias[:1].expand(50)
    for g in (base.g[:1].expand(40, -1), base.g[:, :1].expand(-1, 50), base.g[:1, :1].expand(40, 50)):
        assert_layer_no_worse(Layer(x, weight, bias, g, "relu"), ours("relu"))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 4)], ids=str)
def test_leading_sizes(lead, device):
    x = torch.randn(*lead, 5, device=device)
    w = torch.randn(4, 5, device=device)
    b = torch.randn(4, device=device)
    # There are few sums, of six terms each, so stock's error may be small by chance: two rounding errors are granted.
    assert_layer_no_worse(Layer(x, w, b, torch.randn(*lead, 4, device=device), "relu"), ours("relu"), granted=2)


def test_channels_last_view(device):
    images = torch.randn(2, 6, 4, 4, device=device).to(memory_format=torch.channels_last)
    x = images.permute(0, 2, 3, 1)  # [2, 4, 4, 6], contiguous because the memory is channels last
    y = images.transpose(1, 3)  # [2, 4, 4, 6] with width and height swapped: no view as rows
    for t in (x, y):
        layer = Layer(t, torch.randn(5, 6, device=device), None, torch.randn(2, 4, 4, 5, device=device), "silu")
        assert_layer_no_worse(layer, ours("silu"))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0), (0, 3, 0)], ids=str)
def test_empty(shape, device):
    """Sums over nothing are zero: K = 0 gives act(bias), M = 0 gives zero gradients for weight and bias."""
    layer = make(*shape, torch.float32, "sigmoid", device=device)
    for name, t in layer.run(ours("sigmoid")).items():
        torch.testing.assert_close(t, layer.stock()[name])


def test_more_than_2_31_elements(device):
    """Offsets are 64-bit: the output has 2.3e9 elements, the inputs a stride of 0 or one column."""
    m, n = 70_000, 32_769
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free GPU memory")
    x = torch.ones(1, 1, dtype=torch.bfloat16, device=device).expand(m, 1)
    w = torch.arange(n, dtype=torch.float32, device=device).remainder(128).to(torch.bfloat16).unsqueeze(1)
    y = functional.linear_relu(x, w)
    assert y.shape == (m, n) and y.numel() > 2**31
    for row in (0, 1, 65_535, 65_536, m - 1):
        assert torch.equal(y[row], w[:, 0])
    del y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1024, 1024), (32, 200, 130), (256, 784, 256), (9001, 20, 30), (40, 20000, 50), (7, 9000, 5000)],
    ids=str,
)
def test_same_bits_every_time_on_any_number_of_threads(shape, dtype):
    layer = make(*shape, dtype, "gelu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = layer.run(ours("gelu"))
        for threads in (1, 2, 3, 40, 2):
            torch.set_num_threads(threads)
            again = layer.run(ours("gelu"))
            for name, t in first.items():
                assert torch.equal(t, again[name]), f"{name} on {threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(24, 200, 60), (40, 331, 600), (128, 1030, 259)], ids=str)
def test_same_bits_where_the_transpose_is_multiplied(shape, dtype):
    """It takes x and weight as they lie along k; with x the other way round the product itself is multiplied."""
    layer = make(*shape, dtype, "gelu")
    y = functional.linear_act(layer.x, layer.weight, layer.bias, "gelu")
    x = layer.x.t().contiguous().t()
    assert torch.equal(y, functional.linear_act(x, layer.weight, layer.bias, "gelu"))
