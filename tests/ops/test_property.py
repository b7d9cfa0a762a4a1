"""hypothesis searches for a call that breaks the rule: any shape, rank, strides, dtype, activation, gradients."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlkernels import functional
from dlkernels.testing import STOCK, Layer, assert_no_worse, oracle, stock_errors

BOUNDED = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    # The device is the same for all examples of a test, so its fixture is created once.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
SIZES = st.one_of(st.integers(0, 5), st.integers(0, 70))


@st.composite
def strided(draw, shape, dtype, seed):
    """A tensor of this shape: a slice with steps of a larger tensor, from an offset, transposed, expanded."""
    sizes, index, expand = [], [], []
    for size in shape:
        step, before, after = draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.integers(0, 2))
        stretched = draw(st.integers(0, 7)) == 0
        kept = 1 if stretched else size
        sizes.append(before + kept * step + after)
        index.append(slice(before, before + kept * step, step))
        expand.append(size)
    order = draw(st.permutations(range(len(shape))))
    memory = torch.full(
        [sizes[i] for i in order], float("nan"), dtype=dtype
    )  # the elements in between must not be read
    t = memory.permute([order.index(i) for i in range(len(shape))])[tuple(index)]
    generator = torch.Generator().manual_seed(seed)
    t.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64))
    return t.expand(expand)


def moved(t, device):
    """Return it with the same strides and offset in memory of ``device``, with the elements in between."""
    if t is None or device == "cpu":
        return t
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return memory.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


@st.composite
def layers(draw):
    lead = draw(st.one_of(st.tuples(SIZES), st.lists(st.integers(0, 5), max_size=3).map(tuple)))
    k, n = draw(SIZES), draw(SIZES)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 10**6))
    bias = draw(strided((n,), dtype, seed)) if draw(st.booleans()) else None
    return Layer(
        draw(strided((*lead, k), dtype, seed + 1)),
        draw(strided((n, k), dtype, seed + 2)),
        bias,
        draw(strided((*lead, n), dtype, seed + 3)),
        draw(st.sampled_from(list(STOCK))),
    )


@BOUNDED
@given(layers(), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_any_call_follows_the_rule(device, layer, needs):
    parts = (moved(t, device) for t in (layer.x, layer.weight, layer.bias, layer.g))
    layer = Layer(*parts, layer.activation)
    leaves = [
        t.detach().requires_grad_(need)
        for t, need in zip((layer.x, layer.weight, layer.bias), needs, strict=True)
        if t is not None
    ]
    y = functional.linear_act(*leaves, *[None] * (3 - len(leaves)), activation=layer.activation)
    wanted = [t for t in leaves if t.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, layer.g) if wanted else ())
    names = [name for name, t in zip(("dx", "dweight", "dbias"), leaves, strict=False) if t.requires_grad]
    ours = {"y": y.detach(), **dict(zip(names, grads, strict=True))}
    for name, t in ours.items():
        assert t.dtype == layer.x.dtype
        assert t.is_contiguous()
        assert not t.isnan().any(), f"{name} has NaN: memory was read that does not belong to the operands"
    if 0 in (layer.x.numel(), layer.g.numel()):  # sums over nothing: no rounding
        expected = layer.stock()
        torch.testing.assert_close(ours, {name: expected[name] for name in ours})
        return
    exact = oracle(layer, ours["y"])
    stock = layer.stock()
    allowed = stock_errors(layer, stock, oracle(layer, stock["y"]))
    for name, t in ours.items():
        assert t.shape == stock[name].shape
        assert_no_worse(t, *exact[name], allowed[name], name)


@BOUNDED
@given(layers(), st.integers(1, 3))
def test_number_of_threads_changes_no_bit(layer, threads):

    def run():
        return layer.run(lambda x, w, b: functional.linear_act(x, w, b, layer.activation))

    results = run()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for name, t in run().items():
            assert torch.equal(t, results[name]), name
    finally:
        torch.set_num_threads(before)
