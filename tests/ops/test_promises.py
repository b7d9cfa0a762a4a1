"""The layer's promises besides numbers: the gradients it computes, the memory it uses, the mistakes it detects."""

import gc
import weakref
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dlkernels import functional
from dlkernels.testing import STOCK, Layer, assert_layer_no_worse
from tests.ops.test_forward_backward import DTYPES, make, ours
from tests.support.subprocess_utils import python

SUBSETS = list(product([False, True], repeat=3))  # of (x, weight, bias) that require gradients


def leaves(device, needs=(True, True, True), m=6, k=5, n=4, dtype=torch.float32):
    shapes = ((m, k), (n, k), (n,))
    return [
        torch.randn(*s, device=device, dtype=dtype, requires_grad=need) for s, need in zip(shapes, needs, strict=True)
    ]


class Record(TorchDispatchMode):
    """The operators that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls.append((op.name(), args))
        return op(*args, **(kwargs or {}))

    def ours(self):
        return [(name.removeprefix("dlkernels::_linear_act_"), args) for name, args in self.calls if "dlk" in name]


@pytest.mark.parametrize("activation", STOCK)
@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_exactly_the_gradients_asked_for(needs, activation, device):
    mine = leaves(device, needs)
    stock = [t.detach().clone().requires_grad_(t.requires_grad) for t in mine]
    y = functional.linear_act(*mine, activation)
    assert y.requires_grad == any(needs) and (y.grad_fn is not None) == any(needs)
    if not any(needs):
        return
    g = torch.randn_like(y)
    with Record() as record:
        y.backward(g)
    STOCK[activation](F.linear(*stock)).backward(g)
    for t, s, need in zip(mine, stock, needs, strict=True):
        assert (t.grad is not None) == need == (s.grad is not None)
        if need:
            torch.testing.assert_close(t.grad, s.grad)
    ((name, args),) = record.ours()
    assert name == "backward" and tuple(args[-3:]) == needs, "computed more or less than asked"


def test_no_grad_saves_nothing_and_builds_no_graph(device):
    x, w, b = leaves(device)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Record() as record:
            y = functional.linear_act(x, w, b, "gelu")
        assert not y.requires_grad and y.grad_fn is None
        assert [name for name, _ in record.calls] == ["dlkernels::_linear_act_forward"]


@pytest.mark.parametrize("activation", STOCK)
def test_one_operator_forward_and_one_backward(activation, device):
    """Only our two operators run: no bias pass, no mask, no transposed copy, no cast."""
    x, w, b = leaves(device)
    with Record() as forward:
        y = functional.linear_act(x, w, b, activation)
    g = torch.randn_like(y)
    with Record() as backward:
        torch.autograd.grad(y, (x, w, b), g)
    for record in (forward, backward):
        assert len(record.ours()) == 1
        others = {name for name, _ in record.calls if "dlkernels" not in name}
        assert others <= {"aten::detach"}, "views cost nothing, all else does"


def saved_by(op, *args):
    """The (address, bytes) of every tensor that op(*args) keeps for its backward."""
    kept = []

    def pack(t):
        kept.append((t.data_ptr(), t.numel() * t.element_size()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = op(*args)
    return y, kept


@pytest.mark.parametrize("activation", STOCK)
@pytest.mark.parametrize("needs", SUBSETS[1:], ids=str)
def test_keeps_no_more_than_the_gradients_need(needs, activation, device):
    x, w, b = leaves(device, needs)
    _, kept = saved_by(ours(activation), x, w, b)
    _, by_stock = saved_by(lambda *args: STOCK[activation](F.linear(*args)), x, w, b)
    addresses = [address for address, _ in kept]
    assert (x.data_ptr() in addresses) == needs[1], "x is needed for the gradient of weight, and for nothing else"
    assert (w.data_ptr() in addresses) == needs[0], "weight is needed for the gradient of x, and for nothing else"
    others = [entry for entry in kept if entry[0] not in (x.data_ptr(), w.data_ptr())]
    assert len(others) == (activation != "none"), "y or z, once; nothing for the identity"
    assert sum(size for _, size in kept) <= sum(size for _, size in by_stock)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_graph_is_freed_with_its_output(activation, device):
    """No reference cycle keeps activations alive until the garbage collector runs."""
    x, w, b = leaves(device)
    gc.collect()
    gc.disable()
    try:
        y = functional.linear_act(x, w, b, activation)
        freed = []
        owned_by_the_graph = type("Owned", (), {})()
        torch.autograd.graph.get_gradient_edge(y).node.metadata["owned"] = owned_by_the_graph
        weakref.finalize(owned_by_the_graph, freed.append, True)
        del owned_by_the_graph
        del y
        assert freed == [True]
    finally:
        gc.enable()


LAYERS = {
    "linear_act": (
        lambda x, w, v: functional.linear_act(x, w, None, "gelu"),
        lambda x, w, v: F.gelu(F.linear(x, w)),
    ),
    "linear_glu": (
        lambda x, w, v: functional.linear_glu(x, w, w * 1),
        lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, w * 1),
    ),
    "mlp": (
        lambda x, w, v: functional.mlp(x, [w, v], activation="silu"),
        lambda x, w, v: F.linear(F.silu(F.linear(x, w)), v),
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("order", [1, 2])
def test_data_that_was_replaced_before_backward(layer, order, device):
    """Backward reads the memory that forward read, and gradients of gradients reach the parameter, as in stock."""
    results = []
    for f in LAYERS[layer]:
        torch.manual_seed(0)
        x, w, v = (
            torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in ((3, 5), (4, 5), (2, 4))
        )
        y = f(x, w, v)
        w.data, v.data = torch.ones_like(w), torch.ones_like(v)
        found = torch.autograd.grad(y.square().sum(), [x, w], create_graph=order == 2)
        if order == 2:
            found += torch.autograd.grad(found[0].square().sum(), [x, w])
        results.append(found)
    torch.testing.assert_close(*results)


# Each of these tensors is changed in place between forward and backward. Backward must raise where stock raises.
# Stock's leaky_relu saves z, ours saves y (one tensor less): so there a changed y raises, but not in stock.
CHANGED = ["x", "weight", "bias", "y"]
STRICTER = {("leaky_relu", "y")}


def gradients_after_change(op, which, device):
    """Return the gradients of op after ``which`` was changed in place; None if backward raises."""
    torch.manual_seed(1)
    x, w, b = leaves(device)
    y = op(x, w, b)
    with torch.no_grad():
        {"x": x, "weight": w, "bias": b, "y": y}[which].add_(1)
    try:
        return torch.autograd.grad(y, (x, w, b), torch.ones_like(y))
    except RuntimeError as e:
        if "modified by an inplace operation" in str(e):
            return None
        raise


@pytest.mark.parametrize("which", CHANGED)
@pytest.mark.parametrize("activation", STOCK)
def test_change_in_place_between_forward_and_backward(activation, which, device):
    gradients = gradients_after_change(ours(activation), which, device)
    expected = gradients_after_change(lambda *a: STOCK[activation](F.linear(*a)), which, device)
    if (activation, which) in STRICTER:
        assert gradients is None
        assert expected is not None
        return
    assert (gradients is None) == (expected is None)
    if gradients is not None:
        torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_matmul_precision_setting(precision, device):
    """Lower settings allow lower precision; "highest" is float32. "medium" is in tests/ops/test_precision.py."""
    before = torch.get_float32_matmul_precision()
    shapes = {"relu": (64, 300, 40), "gelu": (3, 100, 33)}
    layers = [make(*shape, torch.float32, activation, device=device) for activation, shape in shapes.items()]
    highest = [layer.run(ours(layer.activation)) for layer in layers]
    # TF32 rounds both operands to 2⁻¹¹, float32's unit is 2⁻²⁴; and cuBLAS may not use it.
    granted = 2.0**14 if precision == "high" and device == "cuda" else 1.0
    try:
        torch.set_float32_matmul_precision(precision)
        for layer in layers:
            assert_layer_no_worse(layer, ours(layer.activation), granted)
    finally:
        torch.set_float32_matmul_precision(before)
    if precision == "highest":
        for layer, expected in zip(layers, highest, strict=True):
            assert all(torch.equal(t, expected[name]) for name, t in layer.run(ours(layer.activation)).items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_fresh_contiguous_tensors(dtype, device):
    x = torch.randn(5, 3, 4, device=device, dtype=dtype).permute(2, 1, 0).requires_grad_()
    w = torch.randn(5, 6, device=device, dtype=dtype).t().requires_grad_()
    b = torch.randn(12, device=device, dtype=dtype)[::2].requires_grad_()
    y = functional.linear_relu(x, w, b)
    grads = torch.autograd.grad(y.sum(), (x, w, b))
    for t, shape in zip((y, *grads), ((4, 3, 6), (4, 3, 5), (6, 5), (6,)), strict=True):
        assert t.shape == shape and t.is_contiguous() and t.dtype == dtype and t.device.type == device
        assert t.storage_offset() == 0 and t.untyped_storage().nbytes() == t.numel() * t.element_size()
        assert t.data_ptr() not in {s.data_ptr() for s in (x, w, b)}


_PEAK = """
import resource, sys, torch
from dlkernels import functional
activation = sys.argv[1]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
def step(m, n, k):
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((m, k), (n, k), (n,)))
    p0 = peak(); y = functional.linear_act(x, w, b, activation)
    p1 = peak(); torch.autograd.grad(y, (x, w, b), torch.ones(1, 1).expand(m, n))
    return p1 - p0, peak() - p1
torch.set_num_threads(2)
step(512, 512, 32)  # code, threads and their scratch
print(*step(4096, 4096, 32))
"""


@pytest.mark.parametrize(("activation", "outputs"), [("relu", 1), ("gelu", 2)])
def test_no_full_size_temporary(activation, outputs):
    """y (and z) are 64 MiB each. In forward the process's peak memory grows by them, and by no third tensor.

    Backward computes its [M, N] gradient of z in registers, so only the small gradients are new.
    """
    forward, backward = map(float, python("-c", _PEAK, activation, DLKERNELS_CPU_GEMM="own").split())
    assert forward < outputs * 64 + 32, f"forward grew by {forward:.0f} MiB"
    assert backward < 32, f"backward grew by {backward:.0f} MiB"


def test_layer_that_shares_storage_with_its_input(device):
    """x and weight may be views of one memory, as in tied autoencoders."""
    both = torch.randn(7, 7, device=device)
    assert_layer_no_worse(Layer(both, both.t(), both[0], torch.randn(7, 7, device=device), "relu"), ours("relu"))
