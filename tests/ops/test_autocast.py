"""Layers under bfloat16 autocast that read float32 parameters without a cast: numbers, saved tensors, conditions."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dlkernels import _C, functional
from dlkernels.testing import STOCK, Layer, oracle
from tests.ops.test_forward_backward import layouts
from tests.ops.test_promises import SUBSETS, Record, saved_by
from tests.support.subprocess_utils import python

needs_kernels = pytest.mark.skipif(not _C.cpu_autocast(), reason="no products of bfloat16 here: autocast casts")
X_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# One row, few rows (8 forward and backward, 32 forward), packed, and edges of each; wgrad in slices.
SHAPES = [
    (1, 64, 1), (1, 1024, 257), (2, 3, 5), (4, 64, 24), (8, 65, 31), (9, 128, 49), (32, 200, 130), (33, 64, 65),
    (97, 1, 101), (129, 513, 40), (337, 129, 270), (9001, 20, 30),
]  # fmt: skip


def make(m, k, n, activation="relu", bias=True, dtype=torch.float32):
    torch.manual_seed(m * 7919 + k * 104729 + n)
    b = torch.randn(n) if bias else None
    return Layer(torch.randn(m, k).to(dtype), torch.randn(n, k) / k**0.5, b, torch.randn(m, n).bfloat16(), activation)


def under_autocast(op):
    def run(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return op(*args)

    return run


def ours(activation):
    return under_autocast(lambda x, w, b: functional.linear_act(x, w, b, activation))


def stock(activation):
    return under_autocast(lambda x, w, b: STOCK[activation](F.linear(x, w, b)))


def casts(activation):
    """The layer in bfloat16, after casts by torch."""
    return lambda *args: functional.linear_act(*(t if t is None else t.bfloat16() for t in args), activation)


def units(result, exact):
    """The largest error in rounding errors of bfloat16 times the scale of the sum, see oracle.error."""
    want, scale = exact
    unit = scale * torch.finfo(torch.bfloat16).eps / 2 + torch.finfo(torch.bfloat16).smallest_normal
    return float(((result.double() - want).abs() / unit).max()) if result.numel() else 0.0


def check(layer):
    mine, theirs = layer.run(ours(layer.activation)), layer.run(stock(layer.activation))
    exact, stock_exact = oracle(layer, mine["y"]), oracle(layer, theirs["y"])
    for name, t in mine.items():
        assert (t.shape, t.dtype) == (theirs[name].shape, theirs[name].dtype), name
        assert t.is_contiguous()
        error, allowed = units(t, exact[name]), 2 * max(1.0, units(theirs[name], stock_exact[name]))
        assert error <= allowed, f"{name}: error {error:.3g}, twice stock's is {allowed:.3g}"
    assert torch.equal(mine["y"], casts(layer.activation)(layer.x, layer.weight, layer.bias)), "the bits of casts"


@X_DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_over_shapes_under_autocast(shape, dtype):
    for bias in (True, False):
        check(make(*shape, "relu", bias, dtype))


@X_DTYPES
@pytest.mark.parametrize("activation", STOCK)
@pytest.mark.parametrize("shape", [(40, 70, 50), (3, 100, 33)], ids=str)
def test_every_activation_under_autocast(activation, dtype, shape):
    check(make(*shape, activation, dtype=dtype))


@pytest.mark.parametrize("which", ["x", "weight", "g"])
@pytest.mark.parametrize("shape", [(40, 70, 50), (3, 100, 33)], ids=str)
def test_strides_under_autocast(which, shape):
    layer = make(*shape, "silu")
    for t in layouts(getattr(layer, which)).values():
        changed = copy.copy(layer)
        setattr(changed, which, t)
        check(changed)


@X_DTYPES
@pytest.mark.parametrize("shape", [(0, 64, 5), (4, 0, 5), (4, 64, 0), (0, 0, 0)], ids=str)
def test_empty_under_autocast(shape, dtype):
    m, k, n = shape
    layer = Layer(torch.randn(m, k).to(dtype), torch.randn(n, k), torch.randn(n), torch.ones(m, n).bfloat16(), "gelu")
    mine, theirs = layer.run(ours("gelu")), layer.run(casts("gelu"))
    for name, t in mine.items():
        assert t.dtype == theirs[name].dtype
        assert torch.equal(t.bfloat16(), theirs[name].bfloat16()), name


def test_leading_sizes_under_autocast():
    layer = make(24, 65, 33, "gelu")
    flat = layer.run(ours("gelu"))
    layer.x, layer.g = layer.x.view(2, 3, 4, 65), layer.g.view(2, 3, 4, 33)
    for name, t in layer.run(ours("gelu")).items():
        assert torch.equal(t.view(flat[name].shape), flat[name])


@needs_kernels
@X_DTYPES
@pytest.mark.parametrize("activation", STOCK)
@pytest.mark.parametrize("needs", SUBSETS[1:], ids=str)
def test_exactly_what_was_asked_for_under_autocast(needs, activation, dtype):
    """There is one operator forward and one backward, and no cast. Only tensors for the needed gradients are saved."""
    layer = make(6, 70, 5, activation, dtype=dtype)
    leaves = [t.requires_grad_(n) for t, n in zip((layer.x, layer.weight, layer.bias), needs, strict=True)]
    x, w, _ = leaves
    with Record() as forward:
        y, kept = saved_by(ours(activation), *leaves)
    addresses = [address for address, _ in kept]
    assert (x.data_ptr() in addresses) == needs[1] and (w.data_ptr() in addresses) == needs[0]
    assert len(kept) == needs[0] + needs[1] + (activation != "none"), "y or z, once; nothing for the identity"
    with Record() as backward:
        y.backward(layer.g)
    for t, need in zip(leaves, needs, strict=True):
        assert (t.grad is not None) == need and (not need or t.grad.dtype == t.dtype)
    ((name, args),) = backward.ours()
    assert name == "autocast_backward" and tuple(args[-3:]) == needs
    for record in (forward, backward):
        assert {n for n, _ in record.calls if "dlkernels" not in n} <= {"aten::detach"} and len(record.ours()) == 1


@needs_kernels
@pytest.mark.parametrize("which", ["x", "weight"])
def test_change_in_place_before_backward_is_refused_under_autocast(which):
    layer = make(6, 70, 5)
    x, w = (t.requires_grad_() for t in (layer.x, layer.weight))
    y = ours("relu")(x, w, None)
    with torch.no_grad():
        {"x": x, "weight": w}[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(layer.g)


@pytest.mark.parametrize("activation", STOCK)
@pytest.mark.parametrize("shape", [(4, 70, 5), (40, 30, 20)], ids=str)
def test_double_backward_under_autocast(activation, shape):
    """A penalty on every gradient has the gradients of a layer with casts; x is computed from another tensor."""
    layer, results = make(*shape, activation), []
    for op in (ours(activation), casts(activation)):
        leaves = [t.detach().requires_grad_() for t in (layer.x, layer.weight, layer.bias)]
        y = op(leaves[0] * 2, *leaves[1:]).float()
        grads = torch.autograd.grad((y * layer.g).sum(), leaves, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads) + y.sum(), leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("shape", [(3, 500, 300), (700, 300, 500), (9001, 40, 30)], ids=str)
def test_same_bits_on_any_number_of_threads_under_autocast(shape):
    layer, before, results = make(*shape, "gelu"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(layer.run(ours("gelu")))
    finally:
        torch.set_num_threads(before)
    for name, t in results[0].items():
        assert torch.equal(t, results[1][name]) and torch.equal(t, results[2][name]), name


# ---- who goes by casts ---------------------------------------------------------------------------------------------


def operators(call):
    with Record() as record:
        call()
    return {name.removeprefix("dlkernels::_linear_act_") for name, _ in record.calls if "dlkernels" in name}


@needs_kernels
def test_dtypes_that_convert():
    floats, low = make(4, 70, 5), make(4, 70, 5, dtype=torch.bfloat16)
    x, w, b = floats.x, floats.weight, floats.bias
    for args in ((x, w, b), (x, w, None), (low.x, w, b)):
        assert operators(lambda args=args: ours("relu")(*args)) == {"autocast_forward"}
    for args in ((x.half(), w, b), (x, w.bfloat16(), b), (x, w, b.bfloat16())):
        assert operators(lambda args=args: ours("relu")(*args)) == {"forward"}
        assert torch.equal(ours("relu")(*args), casts("relu")(*args))
    with torch.autocast("cpu", torch.float16):
        assert operators(lambda: functional.linear_relu(x, w, b)) == {"forward"}


class Tagged(torch.Tensor):
    pass


def test_tools_that_look_inside_see_casts():
    """Transforms, forward mode, the compiler and subclasses give the derivatives of the layer in bfloat16."""
    layer = make(6, 70, 5, "silu")
    x, w, b = layer.x, layer.weight, layer.bias
    op, expected = ours("silu"), casts("silu")(x, w, b)
    torch.testing.assert_close(torch.func.vmap(op, (0, None, None))(x, w, b), expected)
    loss = lambda w: op(x, w, b).float().sum()  # noqa: E731
    want = torch.func.grad(lambda w: casts("silu")(x, w, b).float().sum())(w)
    torch.testing.assert_close(torch.func.grad(loss)(w), want)
    assert torch.func.jvp(loss, (w,), (w,))[1].abs() > 0
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    leaf = w.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], want)
    for args in ((x.as_subclass(Tagged), w, b), (x, w.as_subclass(Tagged), b), (x, w, b.as_subclass(Tagged))):
        assert operators(lambda args=args: op(*args)) == {"forward"}
        assert type(op(*args)) is Tagged


def test_wrong_operands_under_autocast_are_named():
    x, w, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for args, message in (
        ((x[:, :3], w, b), "in_features"),
        ((x, w, b[:3]), "bias must be"),
        ((x, w[0], b), "out_features, in_features"),
        ((x, w.to_sparse(), b), "dense"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ours("relu")(*args)


@needs_kernels
@X_DTYPES
def test_explain_says_who_converts(dtype):
    layer = make(500, 64, 70, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert all("rounds" in row.why for row in functional.explain(layer.x, layer.weight))
        few = functional.explain(layer.x[:3], layer.weight)
        casting = functional.explain(layer.x, layer.weight.bfloat16())
    assert {row.path for row in few} == {"few_rows"} and all("f32 rounded" in row.kernel for row in few)
    assert {row.kernel for row in casting} == {_C.cpu_kernels()["bfloat16"]}


@needs_kernels
@pytest.mark.parametrize(("rows", "hidden", "one_kernel"), [(17000, 300, False), (17000, 32, True), (2100, 32, False)])
def test_chain_goes_by_layers_unless_it_is_narrow_and_tall(rows, hidden, one_kernel):
    """One kernel for the chain needs copies in bfloat16. For few rows, and with AMX for any, they cost too much."""
    one_kernel = one_kernel and _C.cpu_kernels()["isa"] != "amx"
    operator, path = ("_mlp", "fused_mlp") if one_kernel else ("autocast_forward", "packed")
    x, weights = torch.randn(rows, 16), [torch.randn(hidden, 16), torch.randn(5, hidden)]
    biases = [torch.randn(hidden), torch.randn(5)]
    run = under_autocast(lambda: functional.mlp(x, weights, biases, "gelu"))
    (ran,) = operators(run)
    assert operator in ran
    layers = casts("none")(casts("gelu")(x, weights[0], biases[0]), weights[1], biases[1])
    torch.testing.assert_close(run(), layers, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert {row.path for rows in functional.explain_mlp(x, weights) for row in rows} == {path}


_EITHER = """
import torch
from dlkernels import _C, functional
x, w, b = torch.randn(40, 70, requires_grad=True), torch.randn(30, 70), torch.randn(30)
with torch.autocast("cpu", torch.bfloat16):
    y = functional.linear_act(x, w, b, "gelu")
y.sum().backward()
casts = functional.linear_act(x.bfloat16(), w.bfloat16(), b.bfloat16(), "gelu")
print(_C.cpu_autocast(), torch.equal(y, casts), x.grad.dtype)
"""


@pytest.mark.parametrize("cap", [{"DLKERNELS_CPU_ISA": "portable"}, {"DLKERNELS_CPU_GEMM": "aten"}], ids=str)
def test_without_such_products_autocast_casts(cap):
    """Instruction sets without such kernels, and torch's GEMM, whose operands must have one dtype."""
    assert python("-c", _EITHER, **cap).strip() == "False True torch.float32"


def test_the_op_refuses_where_no_kernel_converts():
    code = "import torch, dlkernels; o = torch.ones; f = torch.ops.dlkernels._linear_act_autocast_forward\n"
    code += "dlkernels.nn; f(o(3, 4), o(5, 4), None, 1, 0.0)"
    for cap in ({"DLKERNELS_CPU_ISA": "portable"}, {"DLKERNELS_CPU_GEMM": "aten"}):
        assert "no products of bfloat16 on this CPU; cast x, weight and bias first" in python(
            "-c", code, check=False, **cap
        )
