"""Gated layers as they are written: names of preactivations, calls that cut halves, products by function, dropouts.

``FORMS`` has those that ``fuse`` takes, ``REFUSED`` near misses.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tests.fusion.test_fuse_gated import Gated


class Noted:
    """It is true, and the question has an effect."""

    def __init__(self, log):
        self.log = log

    def __bool__(self):
        self.log.append(3)
        return True


class Base(Gated):
    def __init__(self):
        super().__init__()
        self.half, self.last, self.log = 8, -1, []
        self.norm, self.other = nn.LayerNorm(8), nn.Linear(6, 8)
        self.gate_last, self.truth = True, Noted(self.log)

    def noted(self):
        self.log.append(1)
        return 1.0


_npu_available = False


def is_npu_available():
    return _npu_available


def is_npu_available_with_an_effect():
    SEEN.append(1)
    return _npu_available


SEEN: list = []
FORMS: dict = {}
REFUSED: dict = {}


def form(forward):
    FORMS[forward.__name__] = type("Of" + forward.__name__.title(), (Base,), {"forward": forward})
    return forward


def refused(forward):
    REFUSED[forward.__name__] = type("Of" + forward.__name__.title(), (Base,), {"forward": forward})
    return forward


@form
def named_preactivations(self, x):
    g = self.gate(x)
    u = self.up(x)
    return self.down(F.silu(g) * u)


@form
def of_timm(self, x):
    x_gate = self.gate(x)
    x = self.up(x)
    x = self.act(x_gate) * x
    x = self.down(x)
    return x


@form
def four_statements(self, x):
    g: torch.Tensor = self.gate(x)
    u = self.up(x)
    g = self.act(g)
    h = u * g
    return self.down(h)


@form
def product_in_a_statement(self, x):
    h = self.act(self.gate(x))
    h = h * self.up(x)
    return self.down(h)


@form
def in_one_assignment(self, x):
    g, u = self.gate(x), self.up(x)
    return self.down(self.act(g) * u)


@form
def up_by_name_alone(self, x):
    u = self.up(x)
    return self.down(self.act(self.gate(x)) * u)


@form
def product_of_torch(self, x):
    return self.down(torch.mul(self.up(x), torch.relu(self.gate(x))))


@form
def product_by_method(self, x):
    return self.down(self.act(self.gate(x)).mul(self.up(x)))


@form
def chunk_of_torch(self, x):
    h = self.packed(x)
    g, u = torch.chunk(h, 2, -1)
    return self.down(F.gelu(g) * u)


@form
def chunk_in_words(self, x):
    g, u = self.packed(x).chunk(chunks=2, dim=-1)
    return self.down(u * self.act(g))


@form
def chunk_of_torch_in_words(self, x):
    g, u = torch.chunk(dim=-1, input=self.packed(x), chunks=2)
    return self.down(u * self.act(g))


@form
def split_by_number(self, x):
    g, u = self.packed(x).split(8, -1)
    return self.down(F.gelu(g) * u)


@form
def split_by_attribute(self, x):
    g, u = torch.split(self.packed(x), [self.half, self.half], dim=self.last)
    return self.down(F.gelu(g) * u)


@form
def last_dimension_by_its_number(self, x):
    g, u = self.packed(x).split(self.half, dim=1)
    return self.down(F.gelu(g) * u)


@form
def slices(self, x):
    h = self.packed(x)
    d = h.shape[-1] // 2
    return self.down(F.silu(h[..., :d]) * h[..., d:])


@form
def named_slices(self, x):
    h = self.packed(x)
    u = h[..., : self.half]
    g = h[..., self.half :]
    return self.down(u * F.silu(g))


@form
def glu(self, x):
    return self.down(F.glu(self.packed(x * 2)))


@form
def glu_of_a_name(self, x):
    h = self.packed(x)
    y = F.glu(h, dim=-1)
    return self.down(y)


@form
def activation_in_a_statement(self, x):
    x, gate = self.packed(x + 1).chunk(2, dim=-1)
    gate = F.gelu(gate)
    return self.down(x * gate)


@form
def augmented(self, x):
    h = self.act(self.gate(x))
    h *= self.up(x)
    return self.down(h)


@form
def augmented_by_a_name(self, x):
    g = self.gate(x)
    h = self.up(x)
    g = self.act(g)
    h *= g
    h = self.down(h)
    return h


@form
def of_timm_glu_mlp(self, x):
    x = self.packed(x)
    x1, x2 = x.chunk(2, dim=self.last)
    x = x1 * self.act(x2) if self.gate_last else self.act(x1) * x2
    x = self.down(x)
    return x


@form
def of_timm_glu_mlp_gate_first(self, x):
    x = self.packed(x + 1)
    x1, x2 = x.chunk(2, dim=self.last)
    x = x1 * self.act(x2) if not self.gate_last else self.act(x1) * x2
    return self.down(x)


@form
def of_diffusers_geglu(self, x):
    x = self.packed(x)
    if is_npu_available():
        return torch.nothing_of_this_name(x, dim=-1, approximate=1)[0]
    else:
        x, gate = x.chunk(2, dim=-1)
        return self.down(x * F.gelu(gate))


@form
def ends_between(self, x):
    h = self.packed(x)
    if self.last != -1 or not self.gate_last:
        return self.down(h[..., :8])
    a, b = h.chunk(2, dim=-1)
    y = F.silu(a) * b
    return self.down(y)


@form
def in_a_branch(self, x):
    h = self.packed(x)
    if self.gate_last:
        a, b = h.chunk(2, dim=-1)
        y = a * torch.tanh(b)
    else:
        y = h[..., :8]
    return self.down(y)


@refused
def condition_with_an_effect(self, x):
    h = self.packed(x)
    if self.noted() > 2:
        return self.down(h[..., :8])
    a, b = h.chunk(2, dim=-1)
    return self.down(F.silu(a) * b)


@refused
def function_with_an_effect(self, x):
    h = self.packed(x)
    if is_npu_available_with_an_effect():
        return h
    a, b = h.chunk(2, dim=-1)
    return self.down(F.silu(a) * b)


@refused
def condition_that_reads_the_output(self, x):
    h = self.packed(x)
    if h.sum() > 1e9:
        return h
    a, b = h.chunk(2, dim=-1)
    return self.down(F.silu(a) * b)


@refused
def condition_on_an_object(self, x):
    h = self.packed(x)
    a, b = h.chunk(2, dim=-1)
    y = F.silu(a) * b if self.truth else a * 2
    return self.down(y)


@refused
def output_read_in_another_branch_too(self, x):
    h = self.packed(x)
    if self.gate_last:
        a, b = h.chunk(2, dim=-1)
        y = a * torch.tanh(b)
    else:
        y = h[..., :8]
    return self.down(y) + self.down(h[..., 8:])


@refused
def augmented_attribute(self, x):
    self.kept = self.act(self.gate(x))
    self.kept *= self.up(x)
    return self.down(self.kept)


@refused
def augmented_twice(self, x):
    h = self.act(self.gate(x))
    h += 1
    h *= self.up(x)
    return self.down(h)


@refused
def augmented_and_kept(self, x):
    h = self.act(self.gate(x))
    y = h
    h *= self.up(x)
    return self.down(h) + y.sum()


@refused
def gate_used_again(self, x):
    g = self.gate(x)
    u = self.up(x)
    return self.down(F.silu(g) * u) + self.down(g)


@refused
def input_changed_between(self, x):
    x = self.gate(x)
    u = self.up(x[:, :6])
    return self.down(F.silu(x) * u)


@refused
def statement_between(self, x):
    g = self.gate(x)
    self.log.append(2)
    u = self.up(x)
    return self.down(F.silu(g) * u)


@refused
def effect_before_the_activation(self, x):
    """The effect may change the activation, which is looked up behind it."""
    g, u = self.packed(x).chunk(2, dim=-1)
    return self.noted() + self.act(g) * u


@refused
def one_branch(self, x):
    g, u = self.packed(x).chunk(2, dim=-1)
    return self.act(g) * u if self.noted() else x


@refused
def quarters(self, x):
    g, u = self.packed(x).split([4, 12], dim=-1)
    return F.gelu(g).sum() * u


@refused
def unequal_parts(self, x):
    h = self.packed(x)
    return self.down(F.silu(h[..., :4]).repeat(1, 2) * h[..., 8:])


@refused
def overlapping_slices(self, x):
    h = self.packed(x)
    return self.down(F.silu(h[..., :8]) * h[..., :8])


@refused
def another_dimension(self, x):
    g, u = torch.chunk(self.packed(x[:4]), 2, dim=0)
    return self.down((F.gelu(g) * u)[:, :8])


@refused
def glu_of_another_dimension(self, x):
    return F.glu(self.packed(x[:4]), 0)


@refused
def another_chunk(self, x):
    g, u = self.chunk(self.packed(x), 2, -1)
    return self.down(F.gelu(g) * u)


@refused
def bilinear_without_asking(self, x):
    return self.down(self.gate(x) * self.up(x))


@refused
def norm_between(self, x):
    return self.down(self.norm(self.act(self.gate(x))) * self.up(x))


@refused
def deleted_halves(self, x):
    h = self.packed(x)
    a, b = h.chunk(2, dim=-1)
    y = F.silu(a) * b
    del h, a, b
    return y


@refused
def deleted_preactivations(self, x):
    g = F.silu(self.gate(x))
    u = self.up(x)
    y = g * u
    del g, u
    return y


@refused
def deleted_under_a_condition(self, x):
    g = self.gate(x)
    y = F.silu(g) * self.up(x)
    if self.training:
        del g
    return y


REFUSED["another_chunk"].chunk = staticmethod(lambda h, n, dim: (h[:, 1:9], h[:, 7:15]))
