"""The activations themselves, element by element, in float32: weight = [[1]] makes z = x exactly.

The oracle's rule holds for each binade: the largest error against float64 is at most twice stock torch's. The unit of
errors is one rounding of the result plus the effect of one rounding of x, eps/2 · (|f| + |x f'|). Near a zero of f
(silu's gradient has one) units in the last place of f would compare noise. Below the normal numbers the unit is the
spacing of the subnormals.
"""

import pytest
import torch

from dlkernels import functional
from dlkernels.testing import EXACT, STOCK


def binades(first, end, count):
    """``count`` numbers in each binade from 2^first to 2^end, [(end - first) · count]."""
    mantissas = 1 + torch.arange(count, dtype=torch.float64) / count
    return (2.0 ** torch.arange(first, end, dtype=torch.float64).unsqueeze(1) * mantissas).flatten()


def sweep():
    """Every binade from the subnormals to 2^127, both signs, 257 numbers each; 8191 in those from 2^-16 to 2^4.

    Special points of exp and tanh come on top. The numbers are quotients of integers, which every processor rounds
    alike. linspace has other numbers on other processors: on one of them it found an error of 2.06 units that it had
    missed elsewhere.
    """
    magnitudes = torch.cat([binades(-149, 128, 257), binades(-16, 4, 8191)])
    around = torch.tensor(
        [0.0, 0.63, 0.99999, 1.0, 4.0, 5.5, 8.9, 9.1, 17.0, 87.3, 88.0, 88.72, 89.0, 100.0, 103.9, 104.1]
    )
    dense = torch.arange(40_001, dtype=torch.float64) * 3 / 10_000  # to 12
    x = torch.cat([magnitudes, around.double(), dense]).float()
    return torch.cat([x, -x]).unique()


def errors(actual, exact, scale):
    """The error of each element in units. It is 0 if both are the same infinity, inf if only one is NaN or infinite."""
    info = torch.finfo(torch.float32)
    difference = (actual.double() - exact).abs() / (scale * (info.eps / 2) + info.smallest_normal * info.eps)
    difference = difference.masked_fill(actual == exact.float(), 0.0)  # also two infinities
    return difference.nan_to_num(nan=float("inf"))


def derivatives(f, x):
    """f, f' and f'' at x, computed on the device of x."""
    x = x.detach().requires_grad_()
    y = f(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    second = (
        torch.autograd.grad(first.sum(), x, materialize_grads=True)[0]
        if first.requires_grad
        else torch.zeros_like(first)
    )
    return [t.detach().cpu() for t in (y, first, second)]


def largest_per_binade(error, x):
    binade = x.double().abs().clamp(min=2.0**-149).log2().floor().long() + 149
    binade = binade * 2 + (x < 0)  # each sign separately: one side of gelu and silu decays
    return torch.zeros(2 * 278, dtype=torch.float64).scatter_reduce(0, binade, error, "amax")


@pytest.mark.parametrize("activation", STOCK)
def test_error_in_every_binade(activation, device):
    x = sweep()
    one = torch.ones(1, 1, device=device)
    ours = derivatives(lambda x: functional.linear_act(x[:, None], one, None, activation)[:, 0], x.to(device))
    stock = derivatives(STOCK[activation], x.to(device))
    f, first, second = derivatives(EXACT[activation], x.double())
    for what, order, exact, slope in (("value", 0, f, first), ("gradient", 1, first, second)):
        scale = exact.abs() + (x.double() * slope).abs()
        sound = scale.isfinite()  # float64's formulas give NaN for some huge x: then there is no reference
        assert sound.sum() > 0.75 * len(x)
        mine, allowed = (
            largest_per_binade(errors(r[order][sound], exact[sound], scale[sound]), x[sound]) for r in (ours, stock)
        )
        worse = mine / (2 * allowed.clamp(min=1.0))
        worse[allowed.isinf()] = 0.0  # stock overflows or gives NaN too early
        at = worse.argmax().item()
        assert worse[at] <= 1, (
            f"{what}, |x| in [2^{at // 2 - 149}, 2^{at // 2 - 148}), x {'<' if at % 2 else '>'} 0: "
            f"error {mine[at]:.3g} units, stock's is {allowed[at]:.3g}"
        )


def test_gelu_in_its_left_tail(device):
    """The error is a few rounding errors, also where stock's 1 + erf(z) cancels completely."""
    x = -torch.linspace(0, 12.8, 100_001)
    one = torch.ones(1, 1, device=device)
    ours = derivatives(lambda x: functional.linear_act(x[:, None], one, None, "gelu")[:, 0], x.to(device))
    f, first, second = derivatives(EXACT["gelu"], x.double())
    for mine, exact, slope in ((ours[0], f, first), (ours[1], first, second)):
        assert errors(mine, exact, exact.abs() + (x.double() * slope).abs()).max() < 8


@pytest.mark.parametrize("activation", STOCK)
def test_infinities(activation, device):
    """The results are the formulas' limits, where stock in float64 has them too."""
    x = torch.tensor([float("inf"), float("-inf")])
    y = functional.linear_act(x[:, None].to(device), torch.ones(1, 1, device=device), None, activation)[:, 0].cpu()
    exact = STOCK[activation](x.double())
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.nan_to_num(), exact.float().nan_to_num())


@pytest.mark.parametrize("activation", STOCK)
def test_no_subnormal_where_stock_has_zero(activation):
    """In float32 a product that reads subnormal numbers is many times as slow; GELU's tail once had them."""
    x = torch.linspace(-130, 130, 520_001)
    one = torch.ones(1, 1)
    ours = derivatives(lambda x: functional.linear_act(x[:, None], one, None, activation)[:, 0], x)
    stock = derivatives(STOCK[activation], x)
    for mine, theirs in list(zip(ours, stock, strict=True))[:2]:
        subnormal = (mine != 0) & (mine.abs() < torch.finfo(torch.float32).smallest_normal)
        assert not (subnormal & (theirs == 0)).any()
