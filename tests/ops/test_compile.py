"""The layer under torch.compile, torch.export and opcheck.

Where generated code does not matter, the backend is aot_eager.
"""

import io

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim

from dlkernels import functional
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels.nn import MLP, LinearReLU
from dlkernels.testing import STOCK

ops = torch.ops.dlkernels


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(device, m=6, dtype=torch.float32):
    shapes = ((m, 4), (5, 4), (5,))
    return tuple(torch.randn(*s, device=device, dtype=dtype, requires_grad=True) for s in shapes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", STOCK)
def test_fullgraph_forward_and_backward(activation, bias, device):
    """There is one graph with our operators, and it gives the same bits as eager."""

    def f(x, w, b):
        return functional.linear_act(x, w, b if bias else None, activation)

    args = arguments(device)
    wanted = args if bias else args[:2]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    results = []
    for op in (f, compiled):
        y = op(*args)
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("activation", STOCK)
def test_a_compiled_backward_is_one_operator(activation, dynamic, device):
    """The forward may have a second output z, for which a compiler would invent a gradient."""
    graphs = {"forward": [], "backward": []}

    def compiler(name):
        def record(graph, _):
            graphs[name] += [node.target for node in graph.graph.nodes if "dlkernels" in str(node.target)]
            return make_boxed_func(graph.forward)

        return record

    def f(x, w, b):
        return functional.linear_act(x, w, b, activation)

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    args = arguments(device)
    torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)(*args).sum().backward()
    assert graphs["backward"] == [ops._linear_act_backward.default]
    assert len(graphs["forward"]) == 1
    for got, want in zip(args, torch.autograd.grad(f(*args).sum(), args), strict=True):
        assert torch.equal(got.grad, want)


def test_training_step_by_the_default_compiler(device):
    """Inductor's own code around our operators: model, loss and gradients in one graph."""
    torch.manual_seed(0)
    model, reference = (MLP([8, 16, 16, 3], activation="gelu", device=device) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    x, target = torch.randn(10, 8, device=device), torch.randint(3, (10,), device=device)

    def loss(m):
        return F.cross_entropy(m(x) * 2 + 1, target)

    torch.compile(loss, fullgraph=True)(model).backward()
    loss(reference).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_no_needless_recompilation(device):
    """One dynamic graph serves every batch size."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(functional.linear_relu, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for m in (6, 7, 31, 64):
        args = arguments(device, m)
        y = f(*args)
        y.sum().backward()
        assert torch.equal(y, functional.linear_relu(*args))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


def test_steady_state_does_not_recompile(device):
    model = MLP([4, 8, 3], device=device)
    step = torch.compile(lambda x: model(x).square().mean(), backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(torch.randn(6, 4, device=device)).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            optimizer.step()
            optimizer.zero_grad()
            step(torch.randn(6, 4, device=device)).backward()


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp"])
def test_compiled_function_transforms(transform, device):
    x, w, b = (t.detach() for t in arguments(device, dtype=torch.float64))

    def loss(w, x):
        return functional.linear_act(x, w, b, "silu").square().sum()

    run = {
        "grad": lambda w: torch.func.grad(loss)(w, x),
        "vmap of grad": lambda w: torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x),
        "jvp": lambda w: torch.func.jvp(lambda w: loss(w, x), (w,), (w.cos(),))[1],
    }[transform]
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(w), run(w))


def test_autocast_inside_a_compiled_function(device):
    x, w, b = arguments(device)

    def f(x, w, b):
        with torch.autocast(device, torch.bfloat16):
            return functional.linear_relu(x, w, b)

    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x, w, b)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, f(x, w, b))


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_dynamic_batch_save_and_load(strict, device):
    wide = 300  # more than the fused MLP kernels take, which add up in another order than the layers that are exported
    model = MLP([wide, 8, 3], activation="gelu_tanh", device=device).eval()
    shapes = ({0: Dim("batch", min=1, max=4096)},)
    program = torch.export.export(model, (torch.randn(6, wide, device=device),), dynamic_shapes=shapes, strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    assert targets.count("dlkernels._linear_act.default") == 2, "our operators, exported"
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    for batch in (1, 6, 33):
        x = torch.randn(batch, wide, device=device)
        assert torch.equal(loaded(x), model(x))
        x = torch.randn(batch, wide, device=device)
        mine, theirs = (torch.autograd.grad(f(x).square().sum(), [*f.parameters()]) for f in (loaded, model))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), "an exported program trains"
    with pytest.raises(Exception, match=str(wide)):
        loaded(torch.randn(6, 5, device=device))


def test_export_of_one_layer_has_its_parameters(device):
    layer = LinearReLU(4, 3).to(device)
    program = torch.export.export(layer, (torch.randn(2, 4, device=device),))
    assert sorted(program.state_dict) == ["bias", "weight"]


# Left out for the kernels' operators: test_autograd_registration. The recorded operators have the gradients.
SCHEMA_AND_FAKE = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lead", [(), (6,), (2, 3)], ids=str)
def test_opcheck(lead, dtype, device):
    """Schemas are right about mutation and aliasing, and fake kernels about shapes, strides and dtypes."""
    x, w, b, g = (torch.randn(*s, device=device, dtype=dtype) for s in ((*lead, 4), (5, 4), (5,), (*lead, 5)))
    for bias in (b, None):
        for op in (ops._linear_act_forward, ops._linear_act_forward_z):
            torch.library.opcheck(op.default, (x, w, bias, 4, 0.01), test_utils=SCHEMA_AND_FAKE)
    for needs in ((True, True, True), (False, True, False), (True, False, True), (False, False, True)):
        args = (g, x if needs[1] else None, w if needs[0] else None, g, 1, 0.01, *needs)
        torch.library.opcheck(ops._linear_act_backward.default, args, test_utils=SCHEMA_AND_FAKE)


def test_opcheck_under_the_dispatcher_of_compile(device):
    x, w, b = (t.detach() for t in arguments(device))
    for op in (ops._linear_act_forward, ops._linear_act_forward_z):
        torch.library.opcheck(op.default, (x, w, b, 1, 0.01), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_opcheck_of_the_recorded_layer(act, device):
    """Schema, fake kernel, registration of autograd, and the dispatcher of compile, forward and backward."""
    x, w, b = arguments(device)
    for bias in (b, None):
        torch.library.opcheck(ops._linear_act.default, (x, w, bias, ACTIVATIONS[act].code, 0.01, False))


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_compiled_autograd(act, device):
    """The backward as a compiler of the whole autograd graph sees it."""
    from torch._dynamo import compiled_autograd

    leaves = arguments(device)
    y = functional.linear_act(*leaves, act)
    expected = torch.autograd.grad(y.square().sum(), leaves)
    y = functional.linear_act(*leaves, act)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        y.square().sum().backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


def test_fake_kernels_know_strides(device):
    """Outputs are contiguous for every input, and the fake kernels say so."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, w = torch.randn(4, 6, device=device).t(), torch.randn(4, 5, device=device).t()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = functional.linear_act(mode.from_tensor(x), mode.from_tensor(w), None, "gelu")
    real = functional.linear_act(x, w, None, "gelu")
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (real.shape, real.stride(), real.dtype, real.device)
