"""DDP, FSDP2 and tensor parallelism of dlkernels layers: the checks that every rank runs in ``test_distributed.py``.

Results are judged by the rule of ``oracle.py``: their error against float64 is at most twice that of stock torch in a
single process. A network's error is that of its worst tensor, on the scale of that tensor's largest element: of a bias
with six elements, chance alone decides stock's error.
"""

import copy
from contextlib import nullcontext
from functools import partial
from itertools import cycle, product

import pytest
import torch
import torch._dynamo  # here and not in every rank
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

from dlkernels import functional, fuse
from dlkernels.nn import MLP, LinearAct, LinearReLU
from dlkernels.parallel import ColwiseParallel, RowwiseParallel
from dlkernels.stock import ACTIVATIONS, copy_parameters, stock_mlp
from dlkernels.testing.oracle import assert_no_worse, error
from tests.trainer.ranks import check

# ---- what is trained ------------------------------------------------------------------------------------------------

ROWS, SIZES = 24, [20, 32, 16, 6]


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, SIZES[0], generator=generator)
    # Only two of the six classes: with all six, the last bias' gradient would be the rounding of a cancelling sum.
    return x, torch.randint(2, (ROWS,), generator=generator)


def mine(t):
    """This rank's part of the rows."""
    return t.chunk(dist.get_world_size())[dist.get_rank()]


def fused_layers():
    return nn.Sequential(LinearReLU(20, 32), LinearReLU(32, 16), nn.Linear(16, 6))


NETWORKS = {"layers": fused_layers, "MLP": lambda: MLP(SIZES), "fuse": lambda: fuse(stock_mlp(SIZES))}


def start():
    """A stock network with the common initial weights."""
    torch.manual_seed(3)
    return stock_mlp(SIZES)


def train(model, x, y, steps=3, loss=F.cross_entropy):
    """Run full-batch steps; return the last output."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(x)
        loss(output, y).backward()
        optimizer.step()
    return output.detach()


def values(model):
    """The full weights and their last gradients, in order."""
    return [whole(t) for p in model.parameters() for t in (p, p.grad)]


def whole(t):
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_close(ours, stock, exact, what):
    """``stock``: the tensors of one stock computation, or of several behind each other."""
    scales = [torch.full_like(t, float(t.abs().max())) for t in exact]
    stock_error = max(map(error, stock, cycle(exact), cycle(scales)))
    for i, (t, true, scale) in enumerate(zip(ours, exact, scales, strict=True)):
        assert_no_worse(t, true, scale, stock_error, f"{what} tensor {i}")


def judge(what, models, steps=3):
    """Compare weights and gradients of ``models``, trained on parts of the rows, with a single process on all rows."""
    x, y = data()
    stock, exact = start(), start().double()
    train(stock, x, y, steps)
    train(exact, x.double(), y, steps)
    for name, model in models.items():
        assert_close(values(model), values(stock), values(exact), f"{what}, {name}:")


def networks():
    for name, make in NETWORKS.items():
        model = make()
        copy_parameters(start(), model)
        yield name, model


# ---- data parallel --------------------------------------------------------------------------------------------------


@check
def ddp():
    x, y = data()
    models = {name: nn.parallel.DistributedDataParallel(model) for name, model in networks()}
    for model in models.values():
        train(model, mine(x), mine(y))
    judge("DDP", models)


@check
def ddp_accumulates_without_sync():
    """Two halves of this rank's rows; the gradients are reduced over the ranks with the second half."""
    x, y = (t.chunk(2) for t in map(mine, data()))
    models = {name: nn.parallel.DistributedDataParallel(model) for name, model in networks()}
    for model in models.values():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for half in (0, 1):
            with nullcontext() if half else model.no_sync():
                (F.cross_entropy(model(x[half]), y[half]) / 2).backward()
        optimizer.step()
    judge("DDP, no_sync", models, steps=1)


class TwoWays(nn.Module):
    """Each rank uses another branch, so that each rank leaves parameters without a gradient."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(LinearReLU(20, 6) for _ in range(2))

    def forward(self, x, way):
        return self.branches[way](x)


@check
def ddp_finds_unused_parameters():
    x, y = data()
    torch.manual_seed(3)
    model = TwoWays()
    single = copy.deepcopy(model)
    world, rank = dist.get_world_size(), dist.get_rank()
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    F.cross_entropy(parallel(mine(x), rank % 2), mine(y)).backward()
    for i, (part, target) in enumerate(zip(x.chunk(world), y.chunk(world), strict=True)):
        (F.cross_entropy(single(part, i % 2), target) / world).backward()
    for a, b in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---- FSDP2 ----------------------------------------------------------------------------------------------------------


def shard(model, **options):
    """Shard every layer with weights, then the rest, as users of FSDP2 do; an MLP is sharded as one."""
    if not isinstance(model, MLP):
        for layer in model.children():
            if any(True for _ in layer.parameters()):
                fully_shard(layer, **options)
    return fully_shard(model, **options)


@check
def fsdp():
    x, y = data()
    models = {name: shard(model) for name, model in networks()}
    for model in models.values():
        train(model, mine(x), mine(y))
        assert all(p.to_local().numel() < p.numel() for p in model.parameters() if p.ndim == 2)  # it is split
    judge("FSDP2", models)


@check
def fsdp_state_loads_in_a_single_process():
    x, y = data()
    for name, model in networks():
        shard(model)
        output = train(model, mine(x), mine(y))
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            single = MLP(SIZES) if name != "layers" else fused_layers()
            single.load_state_dict(state)
            assert all(torch.equal(a, b) for a, b in zip(single.parameters(), state.values(), strict=True))
        with torch.no_grad():
            again = model(mine(x))
        if dist.get_rank() == 0:
            assert not torch.equal(again, output)  # it has learnt since
            torch.testing.assert_close(single(mine(x)), again)


@check
def fsdp_mixed_precision():
    """bfloat16 products, float32 weights and sums over ranks; compared with stock under the same policy."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    x, y = data()
    stock, exact = shard(start(), mp_policy=policy), start().double()
    train(stock, mine(x), mine(y), loss=in_float32)
    train(exact, x.double(), y)
    for name, model in networks():
        shard(model, mp_policy=policy)
        output = train(model, mine(x), mine(y), loss=in_float32)
        assert output.dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert_close(values(model), values(stock), values(exact), f"FSDP2 bfloat16, {name}:")


def in_float32(output, y):
    return F.cross_entropy(output.float(), y)


# ---- tensor parallel ------------------------------------------------------------------------------------------------


def mesh(*sizes, **options):
    return init_device_mesh("cpu", sizes or (dist.get_world_size(),), **options)


def run_layers(model, x, g):
    """The full output, and the full gradients of x and all parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    grads = torch.autograd.grad(y, [x, *model.parameters()], g)
    return [whole(t) for t in (y, *grads)]


def activations():
    """All activations in two processes; with more, one that saves z, one that saves y, and none."""
    return ACTIVATIONS if dist.get_world_size() == 2 else ("gelu", "relu", "none")


def pair(activation, last="none"):
    """The up and down layers of a transformer block, fused, and their stock form with the same weights."""
    torch.manual_seed(3)
    stock = nn.Sequential(nn.Linear(20, 32), ACTIVATIONS[activation](), nn.Linear(32, 12), ACTIVATIONS[last]())
    second = nn.Linear(32, 12) if last == "none" else LinearAct(32, 12, activation=last)
    ours = nn.Sequential(LinearAct(20, 32, activation=activation), second)
    copy_parameters(stock, ours)
    return ours, stock


def judge_layers(what, ours, stock, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    g = torch.randn(stock(x).shape, generator=torch.Generator().manual_seed(2))
    exact = run_layers(copy.deepcopy(stock).double(), x.double(), g.double())
    assert_close(run_layers(ours, x, g), run_layers(stock, x, g), exact, f"{what} {shape}:")


@check
def column_then_row():
    """The pair needs one all-reduce forward and one backward, and nothing else."""
    for activation, last in zip(activations(), cycle(["none", "relu"]), strict=False):
        ours, stock = pair(activation, last)
        parallelize_module(ours, mesh(), {"0": ColwiseParallel(), "1": RowwiseParallel()})
        judge_layers(f"column, row, {activation}", ours, stock, (4, 6, 20))
        assert communication(ours, torch.randn(24, 20)) == [{"all_reduce": 1}] * 2, activation


def communication(model, x):
    """The number of calls of each collective, forward and backward."""
    x.requires_grad_()
    with CommDebugMode() as forward:
        y = model(x)
    with CommDebugMode() as backward:
        y.sum().backward()
    return [{str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()} for mode in (forward, backward)]


@check
def row_wise_fused_layer():
    """The activation comes after the sum over ranks; a replicated x is split locally."""
    for activation in activations():
        ours, stock = pair(activation, "relu")
        styles = {i: RowwiseParallel(input_layouts=Replicate()) for i in "01"}
        parallelize_module(ours, mesh(), styles)
        assert all(layer.weight.to_local().shape[1] < layer.weight.shape[1] for layer in ours)
        judge_layers(f"row, row, {activation}", ours, stock, (24, 20))
        gathers_dx = {"all_gather_into_tensor": 1}
        assert communication(ours[0], torch.randn(24, 20)) == [{"all_reduce": 1}, gathers_dx], activation


@check
def parallel_styles_take_what_torchs_take():
    ours = parallelize_module(nn.Embedding(8, 4), mesh(), RowwiseParallel())
    assert ours.weight.to_local().shape[0] < 8
    with pytest.raises(NotImplementedError):
        parallelize_module(nn.LayerNorm(4), mesh(), ColwiseParallel())


@check
def networks_split_by_columns_and_rows():
    """Train an MLP, and a stock network that was fused before it was split."""
    x, y = data()
    models = dict(networks())
    for name, model in models.items():
        first, second = ("0", "1") if name == "layers" else ("0", "2")
        parallelize_module(model, mesh(), {first: ColwiseParallel(), second: RowwiseParallel()})
        train(model, x, y)
    judge("column, row", models)


@check
def fsdp_and_tensor_parallel():
    """Two dimensions: rows over the first, features over the second."""
    x, y = data()
    groups = dist.get_world_size() // 2
    both = mesh(groups, 2, mesh_dim_names=("rows", "features"))
    part = both.get_local_rank("rows")
    models = dict(networks())
    for name, model in models.items():
        first, second = ("0", "1") if name == "layers" else ("0", "2")
        parallelize_module(model, both["features"], {first: ColwiseParallel(), second: RowwiseParallel()})
        fully_shard(model, mesh=both["rows"])
        train(model, x.chunk(groups)[part], y.chunk(groups)[part])
    judge("FSDP2 and column, row", models)


@check
def every_placement():
    """The sharding rules alone: DTensors split in every way, with features not divisible by the ranks."""
    generator = torch.Generator().manual_seed(1)
    anywhere = [Replicate(), Shard(0), Shard(1), Shard(2)]
    cases = ("relu", (4, 6, 9)), ("none", (8, 9)), ("gelu", (8, 9))
    for activation, shape in cases if dist.get_world_size() == 2 else cases[1:]:
        args = [torch.randn(s, generator=generator) for s in (shape, (10, 9), (10,))]
        g = torch.randn(*shape[:-1], 10, generator=generator)
        stock, exact = (
            layer(F.linear, ACTIVATIONS[activation](), [t.to(dtype) for t in args], g.to(dtype))
            for dtype in (torch.float32, torch.float64)
        )
        op = partial(functional.linear_act, activation=activation)
        for placements in product(anywhere[: len(shape) + 1], anywhere[:3], anywhere[:2]):
            split = [distribute_tensor(t, mesh(), [p]) for t, p in zip(args, placements, strict=True)]
            assert_close(layer(op, None, split, g), stock, exact, f"{activation} {shape} {placements}:")


def layer(linear, act, args, g):
    leaves = [t.detach().requires_grad_() for t in args]
    y = linear(*leaves) if act is None else act(linear(*leaves))
    if isinstance(y, DTensor):
        g = distribute_tensor(g, y.device_mesh, [Replicate()])
    return [whole(t) for t in (y, *torch.autograd.grad(y, leaves, g))]


@check
def derivatives_and_autocast_of_dtensors():
    x, weight, bias = torch.randn(6, 8), torch.randn(12, 8), torch.randn(12)

    def second(args):
        leaves = [t.detach().double().requires_grad_() for t in args]
        (d,) = torch.autograd.grad(functional.linear_act(*leaves, "gelu").square().sum(), leaves[0], create_graph=True)
        return [whole(t) for t in torch.autograd.grad(d.square().sum(), leaves)]

    columns = Replicate(), Shard(0), Shard(0)
    split = [distribute_tensor(t, mesh(), [p]) for t, p in zip((x, weight, bias), columns, strict=True)]
    for a, b in zip(second(split), second((x, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = functional.linear_relu(*split), functional.linear_relu(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(whole(y), expected)


@check
def gated_layers_of_dtensors():
    """By the rules of two layers: columns of both weights, rows of x, and the sum of a row-wise layer."""
    generator = torch.Generator().manual_seed(1)
    args = [torch.randn(s, generator=generator) for s in ((6, 9), (10, 9), (10, 9))]
    g = torch.randn(6, 10, generator=generator)

    def stock(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    expected, exact = (
        layer(stock, None, [t.to(dtype) for t in args], g.to(dtype)) for dtype in (torch.float32, torch.float64)
    )
    # Stock with its sums in another order: of these few terms one order can be twice as good as another by chance.
    flipped = layer(stock, None, [args[0].flip(0, 1), *(w.flip(1) for w in args[1:])], g.flip(0))
    expected += [t.flip(dims) for t, dims in zip(flipped, ((0,), (0, 1), (1,), (1,)), strict=True)]
    for of_x, of_weights in ((Replicate(), Shard(0)), (Shard(0), Replicate()), (Shard(1), Shard(1))):
        placements = of_x, of_weights, of_weights
        split = [distribute_tensor(t, mesh(), [p]) for t, p in zip(args, placements, strict=True)]
        in_parts = layer(stock, None, split, g)  # torch adds up the same parts
        assert_close(layer(functional.linear_glu, None, split, g), expected + in_parts, exact, f"gated {placements}:")


@check
def losses_of_dtensors():
    """Losses use torch's formulas, and the scores stay split by classes."""
    x, y = torch.randn(8, 12), torch.arange(8)
    scores = distribute_tensor(x, mesh(), [Shard(1)]).requires_grad_()
    target = distribute_tensor(y, mesh(), [Replicate()])
    with loss_parallel():
        loss = functional.cross_entropy(scores, target)
        loss.backward()
    assert scores.grad.placements == (Shard(1),)
    leaf = x.clone().requires_grad_()
    expected = F.cross_entropy(leaf, y)
    expected.backward()
    torch.testing.assert_close(whole(loss), expected.detach())
    torch.testing.assert_close(whole(scores.grad), leaf.grad)

    weight = torch.randn(5, 12)
    rows = distribute_tensor(x, mesh(), [Shard(0)])
    found = functional.linear_cross_entropy(rows, distribute_tensor(weight, mesh(), [Replicate()]), target % 5)
    torch.testing.assert_close(whole(found), F.cross_entropy(F.linear(x, weight), y % 5))
    other = distribute_tensor(torch.ones(8, 12), mesh(), [Shard(0)])
    torch.testing.assert_close(whole(functional.mse_loss(rows, other)), F.mse_loss(x, torch.ones(8, 12)))
    torch.testing.assert_close(
        whole(functional.gaussian_nll_loss(rows, other, other)), F.gaussian_nll_loss(x, torch.ones(8, 12), 1.0)
    )


@check
def compiled():
    """Dynamo and AOTAutograd see through the rules, forward and backward."""
    if dist.get_world_size() > 2:
        return  # they know nothing of the number, and take seconds in every rank
    args = torch.randn(6, 8), torch.randn(12, 8), torch.randn(12)
    g = torch.randn(6, 12)
    op = torch.compile(functional.linear_relu, backend="aot_eager", fullgraph=True)
    split = [distribute_tensor(t, mesh(), [p]) for t, p in zip(args, (Replicate(), Shard(0), Shard(0)), strict=True)]
    for a, b in zip(layer(op, None, split, g), layer(functional.linear_relu, None, args, g), strict=True):
        torch.testing.assert_close(a, b)
