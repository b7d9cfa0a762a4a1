"""dlkernels.training_step: the same numbers as the separate calls; separate calls where it cannot take a step."""

import copy
import functools
import warnings
from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F

import dlkernels
from dlkernels import losses
from dlkernels.nn import MLP, LinearAct
from dlkernels.training import training_step
from tests.nn.training_steps import LOSSES, OPTIMIZERS, REASONS, assert_same, batches, by_calls, trained_both_ways
from tests.support.ids import without_address


def test_checkpoint_and_other_way():
    """The state is torch's: a step by calls may follow one by the op, and the other way round, also after loading."""
    loss, make = LOSSES["cross entropy"], partial(optim.AdamW, lr=0.01, fused=True)
    model = MLP([5, 6, 3])
    other = copy.deepcopy(model)
    optimizer, its = make(model.parameters()), make(other.parameters())
    step = training_step(model, loss, optimizer)
    for number, (x, target) in enumerate(batches(loss, 12)):
        if number % 4 == 3:
            by_calls(model, loss, optimizer, x, target)
        else:
            step(x, target)
        by_calls(other, loss, its, x, target)
        if number == 5:
            state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = MLP([5, 6, 3])
            optimizer = make(model.parameters())
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            step = training_step(model, loss, optimizer)
    assert not step.why
    assert_same(model, other)
    for a, b in zip(optimizer.state.values(), its.state.values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_schedule_groups_and_frozen_layers():
    def prepared():
        torch.manual_seed(1)
        model = MLP([5, 6, 4, 3])
        model[0].weight.requires_grad_(False)
        weights = [p for p in model.parameters() if p.dim() == 2]
        biases = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.003}]
        optimizer = optim.AdamW(groups, lr=0.01, fused=True)
        return model, optimizer, optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    (model, optimizer, schedule), (other, its, other_schedule) = prepared(), prepared()
    step = training_step(model, losses.cross_entropy, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a schedule warns if no step came before it
        for x, target in batches(None, 10):
            step(x, target)
            schedule.step()
            by_calls(other, losses.cross_entropy, its, x, target)
            other_schedule.step()
    assert not step.why
    assert_same(model, other)


def test_keep_grads():
    model = MLP([5, 6, 3])
    step = training_step(model, losses.MSELoss(), optim.SGD(model.parameters(), lr=0.0), keep_grads=True)
    x, target = next(batches(nn.MSELoss(), 1))
    for _ in range(2):
        step(x, target)
    assert not step.why
    for p, grad in zip(
        model.parameters(), torch.autograd.grad(losses.mse_loss(model(x), target), [*model.parameters()]), strict=True
    ):
        assert torch.equal(p.grad, grad)


def test_another_parameter_of_the_optimizer():
    """zero_grad takes the gradient of every parameter that the optimizer has."""
    model, other = MLP([5, 6, 3]), nn.Parameter(torch.ones(1))
    step = training_step(model, losses.MSELoss(), optim.SGD([*model.parameters(), other], lr=0.1))
    other.grad = torch.ones(1)
    step(*next(batches(nn.MSELoss(), 1)))
    assert not step.why
    assert other.grad is None and other.item() == 1
    later = nn.Parameter(torch.ones(1))
    step.optimizer.add_param_group({"params": [later]})
    later.grad = torch.ones(1)
    step(*next(batches(nn.MSELoss(), 1)))
    assert not step.why
    assert later.grad is None and later.item() == 1


def test_fused_model():
    model = dlkernels.fuse(nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 3), nn.Sigmoid()))
    trained_both_ways(model, losses.MSELoss(), OPTIMIZERS["momentum"], 5)


def test_a_rate_that_is_a_tensor():
    model = MLP([5, 6, 3])
    make = partial(optim.Adam, fused=True)
    other = copy.deepcopy(model)
    rates = torch.tensor(0.01), torch.tensor(0.01)
    optimizer, its = make(model.parameters(), lr=rates[0]), make(other.parameters(), lr=rates[1])
    step = training_step(model, losses.MSELoss(), optimizer)
    for x, target in batches(nn.MSELoss(), 6):
        step(x, target)
        by_calls(other, losses.MSELoss(), its, x, target)
        for rate in rates:
            rate.mul_(0.5)
    assert not step.why
    assert_same(model, other)


# ---- steps that it leaves to the separate calls ----------------------------------------------------------------------


class Residual(nn.Sequential):
    def forward(self, x):
        return x[:, :3] + super().forward(x)


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_changes_that_need_the_calls(change):
    def prepared():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
        return model, optim.SGD(model.parameters(), lr=0.1), nn.MSELoss()

    (model, optimizer, loss), (other, its, its_loss) = prepared(), prepared()
    step = training_step(model, loss, optimizer)
    data = [*batches(loss, 3)]
    step(*data[0])
    assert not step.why
    by_calls(other, its_loss, its, *data[0])
    change(model, optimizer, loss)
    change(other, its, its_loss)
    for x, target in data[1:]:
        step(x, target)
        by_calls(other, its_loss, its, x, target)
    assert step.why and REASONS[change] in step.why
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class Doubled(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x * 2)


class First(nn.Sequential):
    def __iter__(self):
        return iter([*self._modules.values()][:1])


def transposed():
    model = nn.Sequential(nn.Linear(5, 3))
    model[0].weight = nn.Parameter(torch.randn(5, 3).t())
    return model


def test_nothing_to_train():
    model = nn.Sequential(nn.Linear(5, 3)).requires_grad_(False)
    step = training_step(model, nn.MSELoss(), optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="does not require grad"):
        step(*next(batches(nn.MSELoss(), 1)))
    assert "no parameter" in step.why


def test_replaced_methods_of_the_optimizer():
    """Also where a schedule has wrapped the replaced step."""
    model = MLP([5, 6, 3])
    x, target = next(batches(nn.MSELoss(), 1))
    optimizer, called = optim.SGD(model.parameters(), lr=0.1), []
    step = training_step(model, losses.MSELoss(), optimizer)
    optimizer.zero_grad = lambda: called.append("zero_grad")
    step(x, target)
    assert "replaced" in step.why and "zero_grad" in called
    del optimizer.zero_grad
    optimizer.step = (lambda self, closure=None: called.append("step")).__get__(optimizer)
    optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    step(x, target)
    assert "replaced" in step.why and called.count("step") == 1


PATCHES = {
    "activation": (nn.ReLU, "forward", lambda self, x: x * 2),
    "function of the activation": (F, "relu", lambda x, inplace=False: x * 2),
    "loss": (nn.MSELoss, "forward", lambda self, y, t: (y - t).abs().mean()),
    "function of the loss": (F, "mse_loss", lambda y, t, reduction="mean": (y - t).abs().mean()),
    "step": (optim.SGD, "step", lambda self, closure=None: self.param_groups[0]["params"][0].data.mul_(0.5)),
    "zero_grad": (optim.SGD, "zero_grad", lambda self, set_to_none=True: None),
    "linear": (F, "linear", lambda x, w, b: torch.zeros(len(x), len(w)) + w.sum(1)),
}


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("kept", [True, False])
def test_replaced_classes_and_functions_of_torch(monkeypatch, patch, kept):
    """Before the first step, and while a plan is kept; afterwards steps take one call again."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    other = copy.deepcopy(model)
    optimizer, its = (optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    step = training_step(model, nn.MSELoss(), optimizer, keep_grads=True)
    holder, name, value = PATCHES[patch]
    *data, last = batches(nn.MSELoss(), 4)
    if kept:
        step(*data[0])
        by_calls(other, nn.MSELoss(), its, *data.pop(0))
        assert step._plan is not None
    with monkeypatch.context() as patched:
        patched.setattr(holder, name, value)
        for x, target in data:
            torch.testing.assert_close(step(x, target), by_calls(other, nn.MSELoss(), its, x, target))
            assert "replaced" in step.why
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    step(*last)
    assert not step.why and step._plan is not None


def test_a_step_that_was_replaced_by_a_wrapper():
    """functools.wraps gives it the attributes of the original."""
    original, called = optim.SGD.step, []

    @functools.wraps(original)
    def counted(self, closure=None):
        called.append(self)
        return original(self, closure)

    model = MLP([5, 6, 3])
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    step = training_step(model, losses.MSELoss(), optimizer)
    batch = next(batches(nn.MSELoss(), 1))
    step(*batch)
    assert not step.why
    try:
        optim.SGD.step = counted
        step(*batch)
    finally:
        optim.SGD.step = original
    assert "step" in step.why and called == [optimizer]


SWAPS = {
    "swap_tensors": lambda model: [
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 2)) for p in model.parameters()
    ],
    "to": lambda model: model.to(torch.float64),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_parameters_may_be_swapped(swap):
    """torch.utils.swap_tensors raises if anybody else holds a parameter."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = MLP([5, 6, 3])
        other = copy.deepcopy(model)
        optimizer, its = (optim.SGD(m.parameters(), lr=0.1, fused=True) for m in (model, other))
        step = training_step(model, losses.MSELoss(), optimizer)
        for number, (x, target) in enumerate(batches(nn.MSELoss(), 6)):
            if number in (2, 4):
                assert step._plan is not None
                SWAPS[swap](model), SWAPS[swap](other)
            x, target = x.to(model[0].weight.dtype), target.to(model[0].weight.dtype)
            step(x, target)
            by_calls(other, losses.MSELoss(), its, x, target)
            assert not step.why
        assert_same(model, other)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_state_of_another_dtype_or_layout():
    """The error, or the update, is the one of the calls."""
    model = MLP([5, 6, 3])
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = training_step(model, losses.MSELoss(), optimizer)
    data = [*batches(nn.MSELoss(), 2)]
    step(*data[0])
    buffer = optimizer.state[model[0].weight]
    buffer["momentum_buffer"] = buffer["momentum_buffer"].t().contiguous().t()
    other = copy.deepcopy(model)
    its = optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(*data[1])
    by_calls(other, losses.MSELoss(), its, *data[1])
    assert "not like its parameter" in step.why
    assert_same(model, other)


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (nn.MSELoss(), torch.randn(1, 3)),
        (nn.MSELoss(), torch.randn(7, 3).double()),
        (nn.MSELoss(), torch.randint(3, (7, 3))),
        (nn.CrossEntropyLoss(), torch.rand(7, 3).double()),
        (nn.CrossEntropyLoss(weight=torch.ones(3).double()), torch.rand(7, 3)),
    ],
    ids=["shape", "float64", "integers", "probabilities", "weight"],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_need_the_calls(loss, target):
    model = nn.Sequential(nn.Linear(5, 3))
    other = copy.deepcopy(model)
    step = training_step(model, loss, optim.SGD(model.parameters(), lr=0.1))
    its, x = optim.SGD(other.parameters(), lr=0.1), torch.randn(7, 5)
    try:
        by_calls(other, loss, its, x, target)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            step(x, target)
    else:
        step(x, target)
    assert step.why
    assert_same(model, other)


def test_version_of_the_weights():
    """A graph from before the step has no gradient any more, as after the calls."""
    model = MLP([5, 6, 3])
    step = training_step(model, losses.MSELoss(), optim.SGD(model.parameters(), lr=0.1))
    x, target = next(batches(nn.MSELoss(), 1))
    y = model(x)
    step(x, target)
    assert not step.why
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_under_the_compiler():
    model = MLP([5, 6, 3])
    other = copy.deepcopy(model)
    make = OPTIMIZERS["adam"]
    step, its = training_step(model, losses.MSELoss(), make(model.parameters())), make(other.parameters())
    compiled = torch.compile(lambda x, target: step(x, target), backend="aot_eager")
    for x, target in batches(nn.MSELoss(), 4):
        compiled(x, target)
        by_calls(other, losses.MSELoss(), its, x, target)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("model", "loss", "make", "why"),
    [
        (Doubled(nn.Linear(5, 3)), nn.MSELoss(), optim.SGD, "a Doubled"),
        (First(nn.Linear(5, 3), nn.ReLU()), nn.MSELoss(), optim.SGD, "a First"),
        (transposed(), nn.MSELoss(), optim.SGD, "not contiguous"),
        (
            nn.Sequential(nn.Linear(5, 4), nn.LeakyReLU(0.0), nn.Linear(4, 3), nn.LeakyReLU(0.3)),
            nn.MSELoss(),
            optim.SGD,
            "slopes",
        ),
        (Residual(nn.Linear(5, 3)), nn.MSELoss(), optim.SGD, "a Residual"),
        (nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)), nn.MSELoss(), optim.SGD, "a Dropout"),
        (nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)), nn.MSELoss(), optim.SGD, "a LayerNorm"),
        (nn.Sequential(nn.ReLU(), nn.Linear(5, 3)), nn.MSELoss(), optim.SGD, "a ReLU"),
        (nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Tanh()), nn.MSELoss(), optim.SGD, "a Tanh"),
        (nn.Sequential(nn.Linear(5, 3)), nn.L1Loss(), optim.SGD, "L1Loss"),
        (nn.Sequential(nn.Linear(5, 3)), lambda y, t: F.mse_loss(y, t), optim.SGD, "lambda"),
        (nn.Sequential(nn.Linear(5, 3)), nn.MSELoss(), optim.RMSprop, "a RMSprop"),
        (
            nn.Sequential(LinearAct(5, 4, activation="leaky_relu"), nn.Linear(4, 3), nn.LeakyReLU(0.3)),
            nn.MSELoss(),
            optim.SGD,
            "slopes",
        ),
    ],
    ids=without_address,
)
def test_what_it_leaves_to_the_calls(model, loss, make, why):
    other = copy.deepcopy(model)
    optimizer, its = make(model.parameters(), lr=0.01), make(other.parameters(), lr=0.01)
    step = training_step(model, loss, optimizer)
    for seed, (x, target) in enumerate(batches(nn.MSELoss(), 3)):
        torch.manual_seed(seed)
        value = step(x, target)
        torch.manual_seed(seed)
        assert torch.equal(value, by_calls(other, loss, its, x, target))
    assert why in step.why and step.why
    assert_same(model, other)


def test_contexts_that_need_the_calls():
    model = MLP([5, 6, 3])
    step = training_step(model, losses.MSELoss(), optim.SGD(model.parameters(), lr=0.1))
    x, target = next(batches(nn.MSELoss(), 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(x, target)
    assert "autocast" in step.why
    step(x.requires_grad_(), target)
    assert "requires a gradient" in step.why
    assert x.grad is not None
    x = x.detach()
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        step(x, target)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        step(x, target)
    assert "saved tensors" in step.why
    with torch.autograd.detect_anomaly(check_nan=False):
        step(x, target)
    assert "anomaly" in step.why
    step(x, target)
    assert not step.why


@pytest.mark.parametrize(
    ("x", "target", "error"),
    [
        (torch.randn(7, 4), torch.zeros(7, dtype=torch.int64), RuntimeError),
        (torch.randn(7, 5), torch.zeros(6, dtype=torch.int64), ValueError),
        (torch.randn(7, 5), torch.full((7,), 9), IndexError),
        (torch.randn(7, 5).double(), torch.zeros(7, dtype=torch.int64), RuntimeError),
    ],
    ids=["features", "rows", "class", "dtype"],
)
def test_an_error_changes_nothing(x, target, error):
    model = MLP([5, 6, 3])
    optimizer = optim.Adam(model.parameters())
    step = training_step(model, losses.CrossEntropyLoss(), optimizer)
    for good in batches(None, 2):
        step(*good)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with pytest.raises(error):
        step(x, target)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name])
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], before[1][key][name]) for name in state)


@pytest.mark.parametrize("wrong", range(3))
def test_malformed(wrong):
    model = MLP([5, 6, 3])
    args = [model, losses.MSELoss(), optim.SGD(model.parameters(), lr=0.1)]
    args[wrong] = 3
    with pytest.raises(TypeError, match=r"training_step: (model|loss|optimizer) must be"):
        training_step(*args)


def test_raw_op_checks():
    op = torch.ops.dlkernels._mlp_loss
    x, w, t = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4)
    rest = (None, 1, -100, 0.0)
    for args, message in (
        ((x, [], [], [], 0.0, t, 0, *rest, []), "at least one layer"),
        ((x, [w], [None], [0], 0.0, t, 0, *rest, [1]), "two entries in needs"),
        ((x, [w], [None], [0], 0.0, t, 2, *rest, [1, 0]), "loss kind"),
        ((x, [w], [None], [0], 0.0, t, 0, None, 0, -100, 0.0, [1, 0]), "reduction"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            op(*args)
    loss, y, grads = op(x, [w], [None], [0], 0.0, t, 0, *rest, [0, 0])
    assert loss.item() == 4.0 and torch.equal(y, torch.full((2, 4), 3.0)) and grads == []


def test_a_capturable_optimizer_on_the_cpu_takes_the_calls():
    model = MLP([5, 6, 3])
    optimizer = optim.Adam(model.parameters(), fused=True)
    step = training_step(model, nn.MSELoss(), optimizer)
    x, target = torch.randn(4, 5), torch.randn(4, 3)
    step(x, target), step(x, target)
    assert not step.why
    optimizer.param_groups[0]["capturable"] = True
    step(x, target)
    assert "capturable" in step.why


@pytest.mark.cuda
@pytest.mark.parametrize("rate_on_gpu", [True, False])
@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW])
def test_a_step_in_a_cuda_graph(gpu, kind, rate_on_gpu):
    """A replay is a whole step, and reads the learning rate anew where it is a tensor on the GPU."""
    torch.manual_seed(1)
    model = MLP([8, 64, 64, 4]).to(gpu)
    other = copy.deepcopy(model)

    def optimizer_of(model):
        rate = torch.tensor(0.01, device=gpu) if rate_on_gpu else 0.01
        return kind(model.parameters(), lr=rate, fused=True, capturable=True)

    optimizer, its = optimizer_of(model), optimizer_of(other)
    step, other_step = (training_step(m, nn.MSELoss(), o) for m, o in ((model, optimizer), (other, its)))
    x, target = torch.randn(32, 8, device=gpu), torch.randn(32, 4, device=gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x, target)
    torch.cuda.current_stream().wait_stream(stream)
    assert not step.why
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step(x, target)
    assert not step.why
    for number in range(8):
        if number == 4 and rate_on_gpu:
            for each in (optimizer, its):
                each.param_groups[0]["lr"].fill_(0.001)
        if number >= 3:
            graph.replay()
        expected = other_step(x, target)
    torch.testing.assert_close(value, expected)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
