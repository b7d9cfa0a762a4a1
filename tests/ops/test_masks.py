"""Activation masks in the ops and their autograd, on devices whose kernels have them: all results equal those of y."""

from itertools import pairwise

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from dlkernels import functional
from dlkernels._ops import masks
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels._ops.decompositions import DECOMPOSITIONS

ops = torch.ops.dlkernels
OF_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
OF_ACTIVATIONS = pytest.mark.parametrize("act", ["relu", "leaky_relu"])
M, N, K = 37, 136, 72
SLOPE = 0.01


@pytest.fixture
def masked(device):
    if device not in masks.DEVICES:
        pytest.skip("no masks on this device")
    return device


def operands(device, dtype, m=M, n=N, k=K):
    generator = torch.Generator(device).manual_seed(0)
    made = [torch.randn(s, device=device, dtype=dtype, generator=generator) for s in ((m, k), (n, k), (n,), (m, n))]
    return *(t.requires_grad_() for t in made[:3]), made[3]


def saved_masks(call):
    """Return what ``call()`` returns, and the masks among the tensors that it saves for backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call()
    return y, [t for t in saved if t.dtype == torch.uint8]


def saved_mask(call):
    _, (mask,) = saved_masks(call)
    return mask


def from_y(monkeypatch, function):
    """Return the result of ``function`` without masks."""
    with monkeypatch.context() as patch:
        patch.setattr(masks, "DEVICES", set())
        return function()


def moved(t):
    """A mask at an address where no 16-byte access may begin."""
    return torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape) if t.dtype == torch.uint8 else t


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# ---- in plain torch -------------------------------------------------------------------------------------------------


@OF_ACTIVATIONS
@OF_DTYPES
def test_a_mask_has_every_derivative_of_y(act, dtype):
    activation = ACTIVATIONS[act]
    y = torch.randn(5, 3, 24, dtype=dtype)
    y.view(-1)[:6] = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, -1.0, -float("inf")])
    mask = masks.pack(y, activation)
    assert mask.shape == (5, 3, 3)
    assert mask.dtype == torch.uint8
    g, identity = torch.ones_like(y, requires_grad=True), torch.eye(24, dtype=dtype)
    anchor = torch.empty(0, dtype=dtype, requires_grad=True)
    backward = torch.ops.dlkernels._linear_act_differentiable_backward
    rest = activation.code, SLOPE, True, False, False, False
    from_mask, *_ = backward(g, None, None, identity, mask, anchor, *rest)
    from_y, *_ = backward(g, None, None, identity, y, None, *rest)
    assert torch.equal(from_mask, from_y)
    assert torch.autograd.grad(from_mask.sum(), anchor)[0].shape == (0,)


def test_bits_of_a_byte():
    y = torch.tensor([[1.0, 0, 2, -3, 0, 0, 0, 0.5, 0, 7, 0, 0, 0, 0, 0, 0]])
    assert masks.pack(y, ACTIVATIONS["relu"]).tolist() == [[0b10000101, 0b10]]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates_are_activations_of_which_a_bit_is_enough(name):
    """The derivative takes two values, and reads y."""
    act = ACTIVATIONS[name]
    s = torch.linspace(-3, 3, 1001)
    two_values = len(act.times_derivative(torch.ones_like(s), s, SLOPE).unique()) == 2
    assert act.needs_sign_only == (act.saves_output and two_values)


# ---- in the kernels -------------------------------------------------------------------------------------------------


@OF_ACTIVATIONS
@OF_DTYPES
@pytest.mark.parametrize("shape", [(M, N, K), (1, 8, 8), (300, 128, 64), (4, 1024, 24), (0, 8, 8)], ids=str)
def test_training_is_as_from_y(shape, act, dtype, masked, monkeypatch):
    x, w, b, g = operands(masked, dtype, *shape)

    def step():
        y = functional.linear_act(x, w, b, act)
        return y, *torch.autograd.grad(y, (x, w, b), g)

    assert saved_mask(lambda: functional.linear_act(x, w, b, act)).shape == (shape[0], shape[1] // 8)
    assert_same_bits(step(), from_y(monkeypatch, step))
    y, mask = ops._linear_act_forward_mask(*(t.detach() for t in (x, w, b)), ACTIVATIONS[act].code, SLOPE)
    assert torch.equal(mask, masks.pack(y, ACTIVATIONS[act]))


@OF_ACTIVATIONS
@OF_DTYPES
def test_each_gradient_alone(act, dtype, masked, monkeypatch):
    x, w, b, g = operands(masked, dtype)
    for wanted in (x, w, b):

        def step(wanted=wanted):
            tensors = [t if t is wanted else t.detach() for t in (x, w, b)]
            return torch.autograd.grad(functional.linear_act(*tensors, act), wanted, g)

        assert_same_bits(step(), from_y(monkeypatch, step))


@OF_ACTIVATIONS
@OF_DTYPES
def test_a_gradient_that_is_differentiated(act, dtype, masked, monkeypatch):
    x, w, b, g = operands(masked, dtype)
    g.requires_grad_()

    def twice():
        first = torch.autograd.grad(functional.linear_act(x, w, b, act), (x, w, b), g, create_graph=True)
        return torch.autograd.grad(sum((t.float() ** 2).sum() for t in first), (g, x, w))

    assert_same_bits(twice(), from_y(monkeypatch, twice))


@OF_ACTIVATIONS
def test_a_gradient_depends_on_what_y_is_made_of(act, masked, monkeypatch):
    """The second derivative is zeros, as in stock: for one gradient, alone and batched, and each subset of inputs."""
    values = [t.detach() for t in operands(masked, torch.bfloat16, 4, 8, 3)]
    g = values.pop()
    for frozen in range(4):
        inputs = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(values)]
        trained = [t for t in inputs if t.requires_grad]

        def second(inputs=inputs, trained=trained):
            y = functional.linear_act(*inputs, act)
            results = []
            for t in trained:
                (first,) = torch.autograd.grad(y, t, g, create_graph=True)
                (many,) = torch.autograd.grad(y, t, g[None], is_grads_batched=True, create_graph=True)
                results += [first, many]
                results += torch.autograd.grad(first.sum(), trained, retain_graph=True)
                results += torch.autograd.grad(many.sum(), trained, retain_graph=True)
            return results

        assert_same_bits(second(), from_y(monkeypatch, second))


def test_y_may_change_before_backward(masked, monkeypatch):
    x, w, b, g = operands(masked, torch.bfloat16)

    def step(change):
        y = functional.linear_relu(x, w, b)
        if change:
            with torch.no_grad():
                y.zero_()
        return torch.autograd.grad(y, (x, w, b), g)

    assert_same_bits(step(True), step(False))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        from_y(monkeypatch, lambda: step(True))


@pytest.mark.parametrize("n", [1, 12, 132])
def test_no_mask_of_part_of_a_byte(n, masked):
    x, w, b, _ = operands(masked, torch.bfloat16, n=n)
    with pytest.raises(ValueError, match="not enough values"):
        saved_mask(lambda: functional.linear_relu(x, w, b))
    with pytest.raises(RuntimeError, match="multiple of 8 out_features"):
        ops._linear_act_forward_mask(x, w, b, 1, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_mask_of_wider_types(dtype, masked):
    x, w, b, _ = operands(masked, dtype)
    with pytest.raises(ValueError, match="not enough values"):
        saved_mask(lambda: functional.linear_relu(x, w, b))
    with pytest.raises(RuntimeError, match="bfloat16 or float16"):
        ops._linear_act_forward_mask(x, w, b, 1, 0.0)


@OF_DTYPES
def test_an_unaligned_bias(dtype, masked, monkeypatch):
    x, w, b, g = operands(masked, dtype)
    b = torch.cat([b, b])[1 : N + 1].detach().requires_grad_()

    def step():
        y = functional.linear_relu(x, w, b)
        return y, *torch.autograd.grad(y, (x, w, b), g)

    assert_same_bits(step(), from_y(monkeypatch, step))


@pytest.mark.parametrize("shape", [(M, N, K), (300, 128, 64)], ids=str)
def test_a_mask_that_comes_back_otherwise(shape, masked):
    """Hooks for saved tensors return it with other strides, or at an address where no 16-byte access may begin."""
    x, w, b, g = operands(masked, torch.float16, *shape)

    def otherwise(t):
        if t.dtype != torch.uint8:
            return t
        wide = t.new_zeros(t.shape[0] + 1, 2 * t.shape[1])
        wide[1:, 1::2] = t
        return wide[1:, 1::2]

    def step(unpack):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = functional.linear_relu(x, w, b)
        return torch.autograd.grad(y, (x, w, b), g)

    want = step(lambda t: t)
    assert_same_bits(step(otherwise), want)
    assert_same_bits(step(moved), want)


def test_a_mask_that_is_none(masked):
    x, w, b, g = operands(masked, torch.bfloat16)
    y, mask = ops._linear_act_forward_mask(x.detach(), w.detach(), b.detach(), 1, 0.0)

    def backward(mask, code=1, dtype=torch.bfloat16):
        return ops._linear_act_backward(*(t.detach().to(dtype) for t in (g, x, w)), mask, code, 0.0, *[True] * 3)

    backward(mask)
    with pytest.raises(RuntimeError, match=r"expected the mask of grad_y \[37, 136\] to be \[37, 17\], got \[37, 16\]"):
        backward(mask[:, 1:])
    with pytest.raises(RuntimeError, match="relu or leaky_relu"):
        backward(mask, ACTIVATIONS["gelu"].code)
    with pytest.raises(RuntimeError, match="bfloat16 or float16"):
        backward(mask, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="saved has dtype Char but grad_y has dtype BFloat16"):
        backward(y.to(torch.int8))


@OF_DTYPES
def test_opcheck(dtype, masked):
    x, w, b, g = (t.detach() for t in operands(masked, dtype))
    checks = ("test_schema", "test_faketensor")
    for bias in (b, None):
        torch.library.opcheck(ops._linear_act_forward_mask.default, (x, w, bias, 1, 0.0), test_utils=checks)
    mask = ops._linear_act_forward_mask(x, w, b, 1, 0.0)[1]
    args = (g, x, w, mask, 1, 0.0, True, True, True)
    torch.library.opcheck(ops._linear_act_backward.default, args, test_utils=checks)


@OF_ACTIVATIONS
def test_decomposition(act, masked):
    x, w, b, _ = (t.detach() for t in operands(masked, torch.bfloat16))
    settings = ACTIVATIONS[act].code, SLOPE
    y, mask = DECOMPOSITIONS[ops._linear_act_forward_mask.default](x, w, b, *settings)
    assert torch.equal(mask, masks.pack(y, ACTIVATIONS[act]))
    torch.testing.assert_close(y, ops._linear_act_forward(x, w, b, *settings))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_writes_none(strict, masked):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(24, 16, device=masked, dtype=torch.bfloat16))

        def forward(self, x):
            return functional.linear_relu(x, self.weight)

    x = torch.randn(3, 16, device=masked, dtype=torch.bfloat16)
    program = torch.export.export(Layer(), (x,), strict=strict)
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    calls = [node for graph in graphs for node in graph.nodes if node.target is ops._linear_act.default]
    assert [node.args[-1] for node in calls] == [False], "one layer, without a mask"
    targets = {node.target for graph in graphs for node in graph.nodes}
    assert ops._linear_act_forward_mask.default not in targets


def test_compiled(masked):
    x, w, b, g = operands(masked, torch.bfloat16)

    def step(x, w, b):
        return functional.linear_relu(x, w, b)

    targets = []

    def compiler(graph, _):
        targets.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    want, got = step(x, w, b), compiled(x, w, b)
    assert ops._linear_act_forward_mask.default in targets
    assert torch.equal(got, want)
    assert_same_bits(torch.autograd.grad(got, (x, w, b), g), torch.autograd.grad(want, (x, w, b), g))


@OF_DTYPES
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_chain(act, dtype, masked):
    """functional.mlp keeps the masks of hidden layers that run one by one; they are read by the dgrad above."""
    sizes = (40, 264, 136, 24, 10)
    layers = [(n, k) for k, n in pairwise(sizes)]
    x = torch.randn(M, sizes[0], device=masked, dtype=dtype, requires_grad=True)
    weights = [(torch.randn(s, device=masked) / s[1] ** 0.5).to(dtype).requires_grad_() for s in layers]
    biases = [torch.randn(n, device=masked, dtype=dtype, requires_grad=True) for n, _ in layers]
    acts = [act] * (len(layers) - 1) + ["none"]
    y, kept = saved_masks(lambda: functional.mlp(x, weights, biases, act))
    assert [t.shape[1] * 8 for t in kept] == list(sizes[1:-1])
    one_by_one = x
    for w, b, a in zip(weights, biases, acts, strict=True):
        one_by_one = functional.linear_act(one_by_one, w, b, a)
    g = torch.randn_like(y)
    inputs = [x, *weights, *biases]
    gradients = torch.autograd.grad(y, inputs, g)
    for got, want in zip(gradients, torch.autograd.grad(one_by_one, inputs, g), strict=True):
        # a chain sums dbias before it rounds dz
        torch.testing.assert_close(got, want, rtol=0, atol=float(4 * torch.finfo(dtype).eps * want.abs().max()))

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, moved):
        again = functional.mlp(x, weights, biases, act)
    assert_same_bits(torch.autograd.grad(again, inputs, g), gradients)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.float() if t.dtype == torch.uint8 else t),
        pytest.raises(RuntimeError, match="expected of layer 0 what forward kept"),
    ):
        functional.mlp(x, weights, biases, act).backward(g)
