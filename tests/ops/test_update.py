"""The update of a training step: the error against float64 is at most twice that of torch's optimizer.

That is the optimizer with ``fused=True``, whose order of operations the update follows.
"""

import copy
from functools import partial

import pytest
import torch
from torch import optim

from dlkernels import _C, losses
from dlkernels.nn import MLP
from dlkernels.testing.oracle import assert_no_worse, error
from dlkernels.training import training_step

OPTIMIZERS = {
    "sgd": partial(optim.SGD, lr=0.05),
    "momentum": partial(optim.SGD, lr=0.02, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov maximize": partial(optim.SGD, lr=0.02, momentum=0.9, nesterov=True, maximize=True),
    "adam": partial(optim.Adam, lr=0.01, weight_decay=0.1),
    "adam maximize": partial(optim.Adam, lr=0.01, betas=(0.4, 0.9), maximize=True),
    "adamw amsgrad": partial(optim.AdamW, lr=0.01, weight_decay=0.1, amsgrad=True),
}
# Weights and biases of less than a register, of whole ones, and with a rest; the last one has several tasks.
SIZES = ([1, 3], [7, 13, 5], [8, 32, 16], [33, 47, 9], [101, 130, 3])


def updated(make, parameters, grads, state, dtype):
    """Return these parameters and their states after torch's update in ``dtype``, fused in float32."""
    fused = dtype == torch.float32
    parameters = [torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in parameters]
    optimizer = make(parameters, fused=fused)
    optimizer.load_state_dict(copy.deepcopy(state))
    for group in optimizer.param_groups:
        group.update(fused=fused, foreach=False)
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad.to(dtype)
    optimizer.step()
    return [{"p": p.detach(), **optimizer.state[p]} for p in parameters]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_error_of_the_update(optimizer):
    torch.manual_seed(0)
    make, dtype = OPTIMIZERS[optimizer], torch.float32
    for sizes in SIZES:
        model = MLP(sizes, "tanh", dtype=dtype)
        mine = make(model.parameters(), fused=True)
        step = training_step(model, losses.MSELoss(), mine, keep_grads=True)
        for number in range(4):
            before = copy.deepcopy([*model.parameters()])
            state = copy.deepcopy(mine.state_dict())
            step(torch.randn(11, sizes[0], dtype=dtype), torch.randn(11, sizes[-1], dtype=dtype))
            if number == 0:
                continue  # the step in which torch makes the state
            assert not step.why
            grads = [p.grad for p in model.parameters()]
            exact, stock = (updated(make, before, grads, state, d) for d in (torch.float64, dtype))
            for p, was, grad, wanted, stocks in zip(model.parameters(), before, grads, exact, stock, strict=True):
                term = was.detach().double().abs() + grad.double().abs()
                for name, value in wanted.items():
                    got = p.detach() if name == "p" else mine.state[p][name]
                    if value is None or name == "step":
                        assert got == value
                        continue
                    scale = value.abs() if "sq" in name else term
                    assert_no_worse(got, value, scale, error(stocks[name], value, scale), f"{sizes} {name}")


@pytest.mark.skipif(not _C.cpu_features()["avx2"], reason="torch's kernel was compared on processors with AVX2")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_our_kernel_is_used(dtype):
    """Where its bits were no longer torch's, torch's kernel would do the work, and no test of results would notice."""
    if _C.cpu_kernels()["isa"] == "portable" or "DEFAULT" in torch.backends.cpu.get_cpu_capability():
        pytest.skip("without fused multiply-add")
    assert all(_C.updates_like_torch(dtype, rule) for rule in range(3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torchs_kernel_in_16_bits(dtype):
    assert not any(_C.updates_like_torch(dtype, rule) for rule in range(3))
