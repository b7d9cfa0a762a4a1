"""The fused MLP kernels on CUDA, executed without a GPU (tests/emulation/cuda), against float64.

The output of a layer is rounded to the dtype before the next layer reads it. Forward is therefore compared layer by
layer, from the input that the kernel stored. The rounded dz of backward are not visible, so the reference carries their
errors along as bounds.
"""

import ctypes
from itertools import pairwise

import pytest
import torch

from tests.emulation.cuda.library import DTYPES, ILLEGAL_ADDRESS, Call, assert_within, tensor
from tests.emulation.cuda.library import kernels as compiled_kernels
from tests.emulation.test_cuda_gemm import ACTIVATIONS, GRADIENT_FROM_Y, SLOPE

OF_DTYPES = pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
H100, A100, SMALL = 227 * 1024, 163 * 1024, 99 * 1024  # the shared memory that a block may take
# (sizes, rows, multiprocessors): one to five layers, rows for one block and for several, partial blocks, and widths
# that are a multiple of 16 bytes or not
NETWORKS = [
    ([1, 1], 1, 1),
    ([3, 10], 7, 2),
    ([128, 128], 130, 1),
    ([16, 64, 16], 300, 2),
    ([33, 100, 3], 64, 1),
    ([64, 128, 33, 10], 130, 2),
    ([10, 64, 64, 64, 16], 130, 1),
    ([128, 100, 1, 33, 16, 3], 300, 1),
]
OF_NETWORKS = pytest.mark.parametrize(("sizes", "rows", "sms"), NETWORKS, ids=lambda v: str(v).replace(", ", "-"))
MIXED = ["relu", "gelu", "none", "tanh", "silu"]


class View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("col_stride", ctypes.c_int64)]


class Activation(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("slope", ctypes.c_double)]


class FusedMlpLayer(ctypes.Structure):  # of csrc/kernels/params.h
    _fields_ = [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("weight", View),
        ("bias", ctypes.c_void_p),
        ("act", Activation),
        *((name, ctypes.c_void_p) for name in ("h", "z", "dweight", "dbias", "mask")),
    ]


class FusedMlp(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("layers", ctypes.c_int),
        ("layer", ctypes.POINTER(FusedMlpLayer)),
        ("x", View),
        ("grad_y", View),
        ("dx", ctypes.c_void_p),
        ("slices", ctypes.c_int),
        ("partials", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def kernels():
    library = compiled_kernels()
    library.fused_mlp_partials.restype = ctypes.c_int64
    library.fused_mlp_takes.restype = ctypes.c_bool
    yield library
    pretend(library, H100, 132)


def pretend(kernels, shared, sms):
    if kernels.on_device():
        if shared != H100:
            pytest.skip("about another device than the GPU that is here")
        return
    kernels.pretend_device(ctypes.c_size_t(shared), sms)


class Network:
    """The operands of a fused MLP, and the calls on it. Memory is guarded, and outputs are filled with NaN."""

    def __init__(self, kernels, sizes, rows, dtype, acts=None, *, bias=True):
        self.kernels, self.dtype, self.rows, self.pairs = kernels, dtype, rows, list(pairwise(sizes))
        self.acts = acts or MIXED[: len(self.pairs)]
        self.x = tensor(rows, sizes[0], dtype=dtype)
        self.weights = [tensor(n, k, dtype=dtype, seed=1 + i) / k**0.5 for i, (k, n) in enumerate(self.pairs)]
        self.biases = [tensor(n, dtype=dtype, seed=31 + i) if bias else None for i, (_, n) in enumerate(self.pairs)]
        self.g = tensor(rows, sizes[-1], dtype=dtype, seed=77)

    def saves_y(self, layer):
        return ACTIVATIONS[self.acts[layer]][1]

    def description(self, call):
        layers = (FusedMlpLayer * len(self.pairs))()
        for layer, weight, act, (k, n) in zip(layers, self.weights, self.acts, self.pairs, strict=True):
            layer.n, layer.k = n, k
            layer.weight = view(call, weight)
            layer.act = Activation(list(ACTIVATIONS).index(act), SLOPE)
        return FusedMlp(self.rows, len(layers), layers, view(call, self.x)), layers

    def _call(self, function, mlp):
        status = function(ctypes.byref(mlp), DTYPES.index(self.dtype))
        assert status != ILLEGAL_ADDRESS, "touched memory beyond its operands"
        assert status == 0

    def ask(self, question):
        """Return fused_mlp_takes, fused_mlp_slices or fused_mlp_partials of this network."""
        mlp, _ = self.description(Call(self.kernels))
        return getattr(self.kernels, f"fused_mlp_{question}")(ctypes.byref(mlp), DTYPES.index(self.dtype))

    def launches_several(self):
        """Return whether backward has several launches, which need memory beyond the partial sums."""
        sums = self.ask("slices") * sum(n * k + n for k, n in self.pairs)
        return self.ask("partials") > sums + 3

    def forward(self, *, keep=True, masks=None):
        """Return h and z of every layer, None where not stored. Appends the mask of each layer to a list ``masks``."""
        call = Call(self.kernels)
        mlp, layers = self.description(call)
        h, z = [None] * len(layers), [None] * len(layers)
        for i, layer in enumerate(layers):
            layer.bias = call.pointer(self.biases[i]).value
            if keep or i + 1 == len(layers):
                pointer, h[i] = call.output(self.rows, layer.n, dtype=self.dtype)
                layer.h = pointer.value
            if keep and not self.saves_y(i):
                pointer, z[i] = call.output(self.rows, layer.n, dtype=self.dtype)
                layer.z = pointer.value
            if masks is not None:
                pointer, mask = call.output(self.rows, layer.n // 8, dtype=torch.uint8)
                layer.mask = pointer.value
                masks.append(mask)
        self._call(self.kernels.fused_mlp_forward, mlp)
        if masks is not None:
            masks[:] = [mask.clone() for mask in masks]
        return [t if t is None else t.clone() for t in h], [t if t is None else t.clone() for t in z]

    def backward(self, h, z, wanted=None, mask=None):
        """Return the gradients named in ``wanted``, or all: "dx", "dweight0", "dbias0", … ``mask`` is for one layer."""
        call = Call(self.kernels, aligned=mask is not None)
        mlp, layers = self.description(call)
        outputs = {}

        def output(name, *shape):
            if wanted is not None and name not in wanted:
                return None
            pointer, outputs[name] = call.output(*shape, dtype=self.dtype)
            return pointer.value

        for i, layer in enumerate(layers):
            # y only where act' reads it
            reads_h = i + 1 < len(layers) or (self.saves_y(i) and self.acts[i] != "none")
            layer.h = call.pointer(h[i] if reads_h else None).value
            layer.z = call.pointer(z[i]).value
            layer.mask = call.pointer(mask).value
            layer.dweight = output(f"dweight{i}", layer.n, layer.k)
            layer.dbias = output(f"dbias{i}", layer.n)
        mlp.dx = output("dx", self.rows, layers[0].k)
        mlp.grad_y = view(call, self.g)
        mlp.slices = self.kernels.fused_mlp_slices(ctypes.byref(mlp), DTYPES.index(self.dtype))
        size = self.kernels.fused_mlp_partials(ctypes.byref(mlp), DTYPES.index(self.dtype))
        pointer, _ = call.output(size, dtype=torch.float32)
        mlp.partials = pointer.value
        self._call(self.kernels.fused_mlp_backward, mlp)
        return {name: t.clone() for name, t in outputs.items()}

    def check_forward(self, h, z):
        before = self.x
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            want = before.double() @ weight.double().T
            scale = before.double().abs() @ weight.double().abs().T
            if bias is not None:
                want, scale = want + bias.double(), scale + bias.double().abs()
            k = weight.shape[1]
            if z[i] is not None:
                assert_within(z[i], want, scale, k)
            steepest = 2 * want.abs() + 2  # above |act'| between the exact and the computed z
            assert_within(h[i], ACTIVATIONS[self.acts[i]][0](want), scale * steepest, k)
            before = h[i]

    def check_backward(self, got, h, z):
        """Compare every gradient with float64. ``bound``: the error of dz, from its rounding and from layers above."""
        f32, unit = torch.finfo(torch.float32).eps, torch.finfo(self.dtype).eps
        least = torch.finfo(self.dtype).smallest_normal

        def through(i, pre, bound):
            """Return dz = pre · act' and its bound."""
            slope = derivative(self.acts[i], h[i], z[i])
            dz = pre * slope
            bound = bound * slope.abs() + 32 * f32 * pre.abs() * (slope.abs() + 3)  # terms of act' cancel
            return dz, bound + unit * dz.abs() + least

        def check(name, want, bound, scale, terms):
            if name in got:
                allowed = bound + (terms + 16) * f32 * scale + unit * (want.abs() + bound) + least
                error = (got[name].double() - want).abs()
                worst = f"{name}: largest error {(error / allowed).max():.2f} times its bound"
                assert (error <= allowed).all(), worst

        dz, bound = through(len(self.pairs) - 1, self.g.double(), torch.zeros_like(self.g, dtype=torch.float64))
        for i in reversed(range(len(self.pairs))):
            below = (h[i - 1] if i else self.x).double()
            weight = self.weights[i].double()
            size = dz.abs() + bound
            check(f"dweight{i}", dz.T @ below, bound.T @ below.abs(), size.T @ below.abs(), self.rows)
            check(f"dbias{i}", dz.sum(0), bound.sum(0), size.sum(0), self.rows)
            pre, bound, size = dz @ weight, bound @ weight.abs(), size @ weight.abs()
            if i == 0:
                check("dx", pre, bound, size, weight.shape[0])
            else:
                dz, bound = through(i - 1, pre, bound + (weight.shape[0] + 16) * f32 * size)


def view(call, t):
    pointer, row, col = call.view(t)
    return View(pointer.value, row.value, col.value)


def derivative(act, y, z):
    """Return act' in float64, computed from the tensor that forward saved."""
    if ACTIVATIONS[act][1]:
        one = torch.ones_like(y, dtype=torch.float64)
        return GRADIENT_FROM_Y[act](one, y.double())
    z = z.double().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[act][0](z).sum(), z)[0]


@OF_DTYPES
@OF_NETWORKS
def test_network(kernels, sizes, rows, sms, dtype):
    pretend(kernels, H100, sms)
    network = Network(kernels, sizes, rows, dtype)
    assert network.ask("takes")
    h, z = network.forward()
    network.check_forward(h, z)
    y, nothing = network.forward(keep=False)
    assert torch.equal(y[-1], h[-1])
    assert nothing == [None] * len(z)
    network.check_backward(network.backward(h, z), h, z)


@OF_DTYPES
@pytest.mark.parametrize(
    "sizes",
    [[128, 128], [64, 64], [16, 16], [128, 10], [10, 128], [96, 40], [100, 96], [33, 65]],
    ids=lambda v: f"{v[0]}-{v[1]}",
)
def test_one_layer(kernels, sizes, dtype):
    """There are more blocks of rows than stages. One warp or several sum a tile of dweight; some warps have none."""
    for shared, rows in ((H100, 600), (A100, 333)):
        pretend(kernels, shared, 2)
        network = Network(kernels, sizes, rows, dtype, ["tanh"])
        assert network.ask("slices") == 2
        h, z = network.forward()
        network.check_backward(network.backward(h, z), h, z)


@OF_DTYPES
@pytest.mark.parametrize("acts", [["relu", "none"], ["relu", "silu"], ["gelu", "none"], ["gelu", "silu"]], ids="-".join)
def test_layers_one_by_one(kernels, acts, dtype):
    """act' of a layer and of the layer below reads nothing, the input, one z, or two z."""
    sizes = [128] * 3 if dtype == torch.float32 else [120, 128, 128]
    pretend(kernels, H100, 1)
    network = Network(kernels, sizes, 260, dtype, acts)
    assert network.launches_several()
    h, z = network.forward()
    every = network.backward(h, z)
    network.check_backward(every, h, z)
    for wanted in ({"dx"}, {"dbias1"}, {"dweight1", "dbias0"}):
        got = network.backward(h, z, wanted)
        assert all(torch.equal(t, every[name]) for name, t in got.items())


@OF_DTYPES
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(kernels, act, dtype):
    pretend(kernels, H100, 2)
    network = Network(kernels, [24, 40, 9], 70, dtype, [act, act], bias=act != "none")
    h, z = network.forward()
    network.check_forward(h, z)
    network.check_backward(network.backward(h, z), h, z)


@OF_DTYPES
def test_an_mlp_in_several_launches(kernels, dtype):
    """A block of the small device holds few layers, so dz goes through memory from one launch to the next."""
    sizes = [40, 64, 33, 48, 64] if dtype != torch.float32 else [20, 32, 33, 16, 32]
    acts = ["relu", "silu", "none", "relu"]
    whole = Network(kernels, sizes, 140, dtype, acts)
    pretend(kernels, H100, 2)
    h, z = whole.forward()
    together = whole.backward(h, z)
    assert not whole.launches_several()
    for shared in (72 * 1024, 64 * 1024):
        pretend(kernels, shared, 2)
        assert whole.ask("takes") and whole.launches_several()
        assert all(torch.equal(a, b) for a, b in zip(whole.forward()[0], h, strict=True))
        apart = whole.backward(h, z)
        whole.check_backward(apart, h, z)
        assert torch.equal(apart["dx"], together["dx"])


def test_which_networks_are_taken(kernels):
    def takes(sizes, dtype=torch.bfloat16):
        return Network(kernels, sizes, 1, dtype, ["relu"] * (len(sizes) - 1)).ask("takes")

    pretend(kernels, H100, 132)
    assert takes([128] * 6)
    assert takes([128] * 3, torch.float32)
    assert takes([64] * 12)
    assert takes([1] * 17)
    assert not takes([1] * 18)
    assert not takes([128] * 8)
    assert not takes([129, 10])
    assert not takes([10, 129])
    assert not takes([0, 10])
    assert not takes([10, 10], torch.float64)
    pretend(kernels, A100, 108)
    assert takes([128] * 4)
    assert takes([128, 128], torch.float32)
    assert not takes([128] * 6)
    pretend(kernels, SMALL, 58)
    assert takes([64] * 5)
    assert takes([128, 128])
    assert not takes([128, 128], torch.float32)
    assert not takes([128] * 3)
    pretend(kernels, 48 * 1024, 20)
    assert not takes([128, 128])


@OF_DTYPES
@pytest.mark.parametrize("acts", [["relu", "tanh", "relu"], ["gelu", "relu", "silu"]], ids="-".join)
def test_some_gradients(kernels, acts, dtype):
    pretend(kernels, (80 if dtype == torch.float32 else 56) * 1024, 2)
    network = Network(kernels, [20, 33, 64, 10], 100, dtype, acts)
    assert network.launches_several()
    h, z = network.forward()
    every = network.backward(h, z)
    for wanted in (
        *({name} for name in every),
        {"dweight2", "dbias0"},
        {"dx", "dweight1"},
        {"dbias0", "dbias1", "dbias2"},
        set(),
    ):
        got = network.backward(h, z, wanted)
        assert set(got) == wanted
        assert all(torch.equal(t, every[name]) for name, t in got.items())


@OF_DTYPES
def test_strides(kernels, dtype):
    """x, weights and grad_y may have any strides. Where 16-byte reads are impossible, elements are read one by one."""
    pretend(kernels, H100, 1)

    def spread(t):
        return torch.stack([t, t + 1], -1).flatten(1)[:, ::2]

    def shifted(t):
        return torch.cat([t.new_zeros(t.shape[0], 1), t], 1)[:, 1:]

    def down(t):
        return t.T.contiguous().T

    for sizes in ([24, 40, 16], [23, 33, 9]):
        plain = Network(kernels, sizes, 70, dtype, ["tanh", "none"])
        h, z = plain.forward()
        want = plain.backward(h, z)
        for change in (spread, shifted, down):
            network = Network(kernels, sizes, 70, dtype, ["tanh", "none"])
            network.x, network.g = change(network.x), change(network.g)
            network.weights = [change(w) for w in network.weights]
            assert torch.equal(network.forward()[0][-1], h[-1])
            got = network.backward(h, z)
            assert all(torch.equal(got[name], t) for name, t in want.items())
        row = Network(kernels, sizes, 70, dtype, ["tanh", "none"])
        row.g = row.g[:1].expand(70, -1)  # as the gradient of a sum: rows of stride 0
        row.check_backward(row.backward(h, z), h, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(kernels, dtype):
    pretend(kernels, H100, 3)
    network = Network(kernels, [24, 64, 33], 2000, dtype)
    assert network.ask("slices") == (3 if dtype == torch.float32 else 6)  # one block on each of 3 SMs, or two
    h, z = network.forward()
    first = network.backward(h, z)
    network.check_backward(first, h, z)
    for _ in range(2):
        again, _ = network.forward()
        assert all(torch.equal(a, b) for a, b in zip(again, h, strict=True))
        assert all(torch.equal(t, first[name]) for name, t in network.backward(h, z).items())


@OF_DTYPES
def test_inf_and_nan_stay_in_their_rows(kernels, dtype):
    """With odd widths, the zeros behind the end of a row must not be multiplied by an Inf."""
    pretend(kernels, H100, 1)
    inf, nan = float("inf"), float("nan")
    network = Network(kernels, [3, 33, 5], 40, dtype, ["relu", "none"])
    network.x[3, 2], network.x[7, 0] = inf, nan
    network.weights = [w.abs() for w in network.weights]
    h, z = network.forward()
    assert (h[-1][3] == inf).all()
    assert h[-1][7].isnan().all()
    others = [r for r in range(40) if r not in (3, 7)]
    assert h[-1][others].isfinite().all()
    network.g[5, 1] = inf
    network.weights[1][:, 4] = nan
    h[0][5] = 0.0  # inactive units: 0, even with an infinite gradient
    got = network.backward(h, z, {"dx"})["dx"]
    assert (got[5] == 0).all()
    network = Network(kernels, [3, 33, 5], 37, dtype, ["none", "none"])  # 37: 11 rows of a tile of 48 do not exist
    network.x, network.g, network.weights = network.x.abs(), network.g.abs(), [w.abs() for w in network.weights]
    network.weights[1][0, 4] = inf
    got = network.backward(*network.forward(), {"dweight0"})["dweight0"]
    assert (got[4] == inf).all()
    assert got[:4].isfinite().all()


@OF_DTYPES
def test_no_rows(kernels, dtype):
    pretend(kernels, H100, 2)
    network = Network(kernels, [5, 7, 3], 0, dtype)
    h, z = network.forward()
    got = network.backward(h, z)
    assert got["dx"].shape == (0, 5)
    assert all((t == 0).all() for t in got.values())


def test_a_kernel_may_first_run_in_a_capture(kernels):
    """Loading a kernel is a call that a capture forbids; launches make it in a mode of their own, and end that mode."""
    pretend(kernels, H100, 5)  # another device, on which no kernel was loaded
    net = Network(kernels, [16, 24], 40, torch.bfloat16)
    if kernels.on_device():
        pytest.skip("a GPU loads kernels by itself")
    assert kernels.capture(True)
    try:
        net.forward()
        assert kernels.capture(True)
    finally:
        kernels.capture(False)
        pretend(kernels, H100, 132)
