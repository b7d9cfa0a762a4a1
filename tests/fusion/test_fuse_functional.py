"""``F.linear(x, self.weight, self.bias)``: a layer that is no module, beside its stock twin."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize

from dlkernels import functional, fuse, report, unfuse
from dlkernels.fusion import backend
from dlkernels.fusion import call as calls
from tests.fusion.fusable import X, fused_places, fused_runs, gated_runs, made, numbers


@pytest.fixture(autouse=True)
def small_layers_are_fused(monkeypatch):
    """The models here are tiny. Where a decision is not remembered, such layers stay stock."""
    monkeypatch.setattr(calls, "LEAST_UNKEPT", 0)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape) / 3)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.other = parameter(8, 6), parameter(8), parameter(8, 8)
        self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.act, self.drop, self.use_act, self.log = nn.GELU(), nn.Dropout(0.5), True, []
        self.packed, self.up = parameter(16, 6), parameter(8, 6)
        self.weights = nn.ParameterList([parameter(6, 6) for _ in range(3)])
        self.biases = nn.ParameterList([parameter(6) for _ in range(3)])
        self.register_buffer("fixed", torch.randn(8, 6))


FORMS: dict = {}


def form(*sites, calls=1):
    """A forward, its sites in the report, and the number of fused calls in eval mode."""

    def take(forward):
        cls = type("Of" + forward.__name__.title(), (Base,), {"forward": forward})
        globals()[cls.__name__] = cls  # for pickle
        FORMS[forward.__name__] = cls, list(sites), calls
        return forward

    return take


@form(("weight", "relu"))
def nested(self, x):
    return F.relu(F.linear(x, self.weight, self.bias))


@form(("weight", "gelu"))
def by_its_long_name(self, x):
    return self.act(torch.nn.functional.linear(x, self.weight, bias=self.bias))


@form(("weight", "tanh"))
def in_words(self, x):
    return F.linear(bias=self.bias, input=x, weight=self.weight).tanh()


@form(("weight", "silu"))
def without_a_bias(self, x):
    return F.silu(linear(x * 2, self.weight))


@form(("weight", "relu"))
def without_a_bias_in_words(self, x):
    return F.relu(F.linear(x, self.weight, None))


@form(("weight", "leaky_relu"))
def named(self, x):
    h = F.linear(x, self.weight, self.bias)
    h = F.leaky_relu(h, 0.2)
    return h


@form(("weight", "relu"))
def overwritten(self, x):
    h = F.linear(x, self.weight, self.bias)
    h.relu_()
    return h * 2


@form(("weight", "gelu"))
def guarded(self, x):
    h = F.linear(x, self.weight, self.bias)
    if self.use_act:
        h = self.act(h)
    return h


@form(("fc.weight", "relu"))
def of_a_submodule(self, x):
    return F.relu(F.linear(x, self.fc.weight, self.fc.bias))


@form(("fixed", "relu"))
def of_a_buffer(self, x):
    return F.relu(F.linear(x, self.fixed, self.bias))


@form(("weight", "relu"))
def of_a_local_name(self, x):
    weight = self.weight
    return F.relu(F.linear(x, weight, self.bias))


@form(("weight", "relu"), ("other", "gelu"))
def chain(self, x):
    x = F.relu(F.linear(x, self.weight, self.bias))
    x = self.drop(x)
    x = self.act(F.linear(x, self.other))
    return self.out(x)


@form(("fc", "relu"))
def last_of_a_chain(self, x):
    return F.linear(F.relu(self.fc(x)), self.other, self.bias)


@form(("weights.0", "relu"), ("weights.1", "relu"))
def loop(self, x):
    for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):  # noqa: B905
        x = F.linear(x, weight, bias)
        if i < 2:
            x = F.relu(x)
    return x


@form(("weights.0", "relu"), ("weights.1", "relu"))
def loop_over_parameters(self, x):
    for i, weight in enumerate(self.weights):
        x = F.linear(x, weight)
        if i < len(self.weights) - 1:
            x = F.relu(x)
    return x


@form(("weights.0", "tanh"), ("weights.1", "tanh"), ("weights.2", "tanh"), calls=3)
def loop_by_number(self, x):
    for i in range(3):
        x = torch.tanh(F.linear(x, self.weights[i], self.biases[i]))
    return x


@form(("weight", "silu"))
def gated(self, x):
    return F.silu(F.linear(x, self.weight)) * F.linear(x, self.up, self.bias)


@form(("weight", "gelu"))
def gated_with_a_module(self, x):
    gate = F.linear(x, self.weight)
    up = self.fc(x)
    return self.act(gate) * up


@form(("weight", "silu"))
def gated_over_statements(self, x):
    gate = F.linear(x, self.weight, self.bias)
    up = F.linear(x, self.up)
    return F.silu(gate) * up


@form(("weight", "relu"))
def another_layer_in_between(self, x):
    h = F.linear(x, self.weight)
    other = F.linear(x, self.up)
    return F.relu(h) + other


@form(("packed", "gelu"))
def packed_halves(self, x):
    g, u = F.linear(x, self.packed).chunk(2, dim=-1)
    return F.gelu(g) * u


@form(("packed", "sigmoid"))
def packed_glu(self, x):
    h = F.linear(x * 2, self.packed)
    return F.glu(h, dim=-1)


@form(("packed", "silu"))
def packed_and_cut(self, x):
    both = F.linear(weight=self.packed, input=x)
    up, gate = both[..., :8], both[..., 8:]
    return F.silu(gate) * up


@form(("up", "gelu_tanh"))
def gated_with_a_form_of_gelu(self, x):
    return F.linear(x, self.weight, bias=self.bias) * F.gelu(F.linear(x, self.up), approximate="tanh")


@form(("fc.weight", "silu"))
def gated_of_submodules(self, x):
    return F.silu(F.linear(x, self.fc.weight, self.fc.bias)) * F.linear(x, self.up)


class OwnForward(nn.Linear):
    """A layer with its activation."""

    def __init__(self):
        super().__init__(6, 8)

    def forward(self, x):
        return F.relu(F.linear(x, self.weight, self.bias))


class Mask(nn.Module):
    """As in pruning: the weight of a layer in another module."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 8)

    def forward(self, x):
        return torch.sigmoid(F.linear(x, self.inner.weight, self.inner.bias))


FORMS["a_subclass_of_linear"] = OwnForward, [("weight", "relu")], 1
FORMS["of_a_masked_layer"] = Mask, [("inner.weight", "sigmoid")], 1


def runs(model, x=X):
    with fused_runs() as found:
        model(x)
    return found.ops


@pytest.fixture
def gates():
    with gated_runs() as ran:
        yield ran


@pytest.mark.parametrize("name", FORMS)
def test_forms(name, gates):
    cls, sites, calls = FORMS[name]
    stock, fused = made(cls), fuse(made(cls))
    assert fused_places(report(fused)) == sites, str(report(fused))
    for training in (True, False):
        stock.train(training), fused.train(training)
        torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    gates.clear()
    assert runs(fused) + len(gates) == calls, str(report(fused))
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        gates.clear()
        assert runs(again) + len(gates) == calls
        assert list(again.state_dict()) == list(stock.state_dict())
        assert fused_places(report(again)) == sites
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(numbers(compiled, X)[0], numbers(stock, X)[0], rtol=1e-12, atol=1e-12)
    unfuse(fused)
    assert type(fused) is cls and torch.equal(fused(X), stock(X)) and not report(fused).fused


def moved(model, name):
    """Replace a parameter wherever it is."""
    holder = next(m for m in model.modules() if name in m._parameters)
    setattr(holder, name, nn.Parameter(holder._parameters[name].detach() * 2))


class Times(nn.Module):
    def forward(self, weight):
        return weight * 2


class Marked(torch.Tensor):
    """A subclass that must see the operators."""


def marked(model):
    weight = model._parameters.pop("weight")
    model.weight = weight.detach().as_subclass(Marked)


class Child(nn.Module):
    """Holds a model, so that a child's parameters are two modules below."""

    def __init__(self):
        super().__init__()
        self.inner = Mask()

    def forward(self, x):
        return F.relu(F.linear(x, self.inner.inner.weight, self.inner.inner.bias))


def decisions(model, monkeypatch):
    """The number of layers that a call of the model decides about."""
    found = []
    real = calls.decide
    with monkeypatch.context() as patch:
        patch.setattr(calls, "decide", lambda *args: found.append(args) or real(*args))
        model(X)
    return len(found)


REMEMBERED = [
    *("nested", "in_words", "without_a_bias", "guarded", "of_a_submodule", "of_a_masked_layer", "a_subclass_of_linear"),
    *("chain", "loop", "loop_over_parameters", "loop_by_number"),
    *("gated", "gated_with_a_module", "gated_of_submodules", "gated_with_a_form_of_gelu", "gated_over_statements"),
    *("packed_halves", "packed_glu", "packed_and_cut"),
]


@pytest.mark.parametrize("name", REMEMBERED)
def test_a_second_call_decides_nothing(name, monkeypatch):
    monkeypatch.setattr(calls, "LEAST_UNKEPT", 1 << 60)  # what is not remembered stays stock
    model = fuse(made(FORMS[name][0])).eval()
    assert decisions(model, monkeypatch) > 0
    assert decisions(model, monkeypatch) == 0


def test_parameters_two_modules_below(monkeypatch):
    monkeypatch.setattr(calls, "LEAST_UNKEPT", 1 << 60)
    stock, fused = made(Child), fuse(made(Child))
    for _ in range(2):
        torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    assert runs(fused) == 1 and decisions(fused, monkeypatch) == 0


def test_tied_parameters():
    """The search finds a tied weight at the first of its places; later the source gives another from the second."""
    stock, fused = made(FORMS["of_a_submodule"][0]), fuse(made(FORMS["of_a_submodule"][0]))
    for model in (stock, fused):
        model.first = model.fc.weight
        model._parameters["a"] = model._parameters.pop("first")
        model(X), model(X)
        model.fc.weight = nn.Parameter(model.fc.weight.detach() * 2)
    for _ in range(2):
        torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)


# A later change of a model, and the number of fused calls after it.
CHANGES = {
    "weight replaced": (lambda m: moved(m, "weight"), 1),
    "weight set": (lambda m: m.weight.data.mul_(2), 1),
    "weight frozen": (lambda m: m.weight.requires_grad_(False), 1),
    "bias removed": (lambda m: setattr(m, "bias", None), 1),
    "parametrized": (lambda m: parametrize.register_parametrization(m, "weight", Times()), 0),
    "a tensor of a subclass": (marked, 0),
    "a computed weight": (lambda m: (m._parameters.pop("weight"), setattr(m, "weight", m.up * 2)), 0),
    "bias of another shape": (lambda m: setattr(m, "bias", nn.Parameter(torch.ones(1).double())), 0),
    "weight of another dtype": (lambda m: m.half(), 0),
    "hook on the activation": (lambda m: m.act.register_forward_hook(lambda m, i, o: o * 2), 0),
    "another activation": (lambda m: setattr(m, "act", nn.Softplus()), 0),
    "forward replaced": (lambda m: setattr(m, "forward", lambda x: x * m.bias.sum()), 0),
}


def replaced(model, name):
    """Put another module in the place of one."""
    child = getattr(model, name)
    setattr(model, name, copy.deepcopy(child))
    for p in getattr(model, name).parameters():
        p.data *= 2


def patched(model):
    model.fc.__class__ = type("Scaled", (nn.Linear,), {"weight": property(lambda self: self._parameters["weight"] * 2)})


# The same for the parameters of submodules and lists, by form.
BELOW = {
    "weight": (["of_a_submodule", "gated_of_submodules"], lambda m: moved(m.fc, "weight"), 1),
    "module": (["of_a_submodule", "gated_of_submodules"], lambda m: replaced(m, "fc"), 1),
    "no bias": (["of_a_submodule", "gated_of_submodules"], lambda m: setattr(m.fc, "bias", None), 1),
    "a property": (["of_a_submodule"], patched, 0),
    "parametrized": (["of_a_submodule"], lambda m: parametrize.register_parametrization(m.fc, "weight", Times()), 0),
    "a list's weight": (["loop", "loop_over_parameters"], lambda m: moved(m.weights, "1"), 1),
    "an element set": (["loop_by_number"], lambda m: m.weights.__setitem__(1, nn.Parameter(m.weights[1] * 2)), 3),
    "a list": (["loop_by_number"], lambda m: replaced(m, "weights"), 3),
    "a list in a loop": (["loop", "loop_over_parameters"], lambda m: replaced(m, "weights"), 1),
    "a packed weight": (["packed_halves", "packed_glu", "packed_and_cut"], lambda m: moved(m, "packed"), 1),
    "another gate": (["gated", "gated_with_a_module", "gated_over_statements"], lambda m: moved(m, "weight"), 1),
    "another up": (["gated", "gated_of_submodules", "gated_over_statements"], lambda m: moved(m, "up"), 1),
    "weights exchanged": (["gated"], lambda m: (m.register_parameter("weight", m.up), moved(m, "up")), 1),
}


@pytest.mark.parametrize(
    ("change", "name"), [(change, name) for change, (names, _, _) in BELOW.items() for name in names]
)
def test_later_changes_below(name, change, gates):
    cls, _, _ = FORMS[name]
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    fused(X), fused(X)
    _, how, calls = BELOW[change]
    for model in (stock, fused):
        how(model)
    for _ in range(2):
        torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    gates.clear()
    assert runs(fused) + len(gates) == calls


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["by_its_long_name", "guarded"])
def test_later_changes(name, change):
    cls, _, _ = FORMS[name]
    stock, fused = made(cls).eval(), fuse(made(cls)).eval()
    assert runs(fused) == 1
    how, calls = CHANGES[change]
    for model in (stock, fused):
        how(model)
    if change == "weight of another dtype":
        for model in (stock, fused):
            with pytest.raises(RuntimeError, match="same dtype"):
                model(X)
        return
    torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    assert runs(fused) == calls


def test_a_hook_on_the_owner_and_on_the_module_of_the_weight():
    stock, fused = made(FORMS["of_a_submodule"][0]), fuse(made(FORMS["of_a_submodule"][0]))
    for model in (stock, fused):
        model.register_forward_hook(lambda m, i, o: o * 2)
        model.fc.register_forward_hook(lambda m, i, o: o * 3)  # a call of F.linear runs no hook of the module
    torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    assert runs(fused) == 1


@pytest.mark.parametrize("name", ["nested", "named", "chain", "gated", "packed_halves", "loop_by_number"])
def test_a_replaced_function_runs(name, monkeypatch, gates):
    stock, fused = made(FORMS[name][0]).eval(), fuse(made(FORMS[name][0])).eval()
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda input, weight, bias=None: real(input, weight, bias) * 2)
    torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    gates.clear()
    assert runs(fused) == 0 and not gates


def test_a_name_that_means_another_function_later(monkeypatch):
    stock, fused = made(FORMS["without_a_bias"][0]), fuse(made(FORMS["without_a_bias"][0]))
    assert runs(fused) == 1
    monkeypatch.setitem(globals(), "linear", lambda input, weight, bias=None: F.linear(input, weight, bias) * 2)
    torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    assert runs(fused) == 0


# ---- not fused -----------------------------------------------------------------------------------------------------

REFUSED: dict = {}


def refused(forward):
    REFUSED[forward.__name__] = type("Of" + forward.__name__.title(), (Base,), {"forward": forward})
    return forward


@refused
def computed_weight(self, x):
    weight = self.weight * 2
    return F.relu(F.linear(x, weight, self.bias))


@refused
def used_twice(self, x):
    h = F.linear(x, self.weight, self.bias)
    return F.relu(h) + h


@refused
def another_function(self, x):
    return F.relu(self.linear(x, self.weight, self.bias))


@refused
def given_by_a_star(self, x):
    return F.relu(F.linear(x, *(self.weight, self.bias)))


@refused
def effect_in_between(self, x):
    h = F.linear(x, self.weight, self.bias)
    self.noted()
    return self.act(h)


@refused
def computed_property(self, x):
    return F.relu(F.linear(x, self.scaled, self.bias))


@refused
def gated_with_a_property(self, x):
    return F.silu(F.linear(x, self.scaled)) * F.linear(x, self.up)


def noted(self):
    self.log.append(1)
    self.act = nn.Tanh()


for _cls in REFUSED.values():
    _cls.noted = noted
    _cls.linear = lambda self, x, weight, bias: F.linear(x, weight, bias) * 2
    _cls.scaled = property(lambda self: (self.log.append(1), self.weight * 2)[1])


@pytest.mark.parametrize("name", REFUSED)
def test_near_misses(name, gates):
    stock, fused = made(REFUSED[name]), fuse(made(REFUSED[name]))
    for _ in range(2):
        torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
        assert fused.log == stock.log
    assert runs(fused) == 0 and not gates
    assert not report(fused).fused


def test_the_weight_is_looked_up_after_the_input():
    class Switches(Base):
        def switch(self, x):
            self.weight = nn.Parameter(self.weight.detach() * 2)
            return x

        def forward(self, x):
            return F.relu(F.linear(self.switch(x), self.weight, self.bias))

    stock, fused = made(Switches), fuse(made(Switches))
    for _ in range(2):
        torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    assert runs(fused) == 1


def test_a_weight_that_changes_within_what_would_be_a_chain():
    class Switches(Base):
        def switch(self):
            self.other = nn.Parameter(self.other.detach() * 2)

        def forward(self, x):
            h = F.relu(F.linear(x, self.weight, self.bias))
            self.switch()
            return F.linear(h, self.other)

    stock, fused = made(Switches), fuse(made(Switches))
    for _ in range(2):
        torch.testing.assert_close(numbers(fused, X)[0], numbers(stock, X)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["nested", "named", "chain", "gated"])
@pytest.mark.parametrize("x", [torch.ones(5, 7).double(), torch.ones(5, 6)], ids=["shape", "dtype"])
def test_errors_are_stocks(name, x):
    errors = []
    for model in (made(FORMS[name][0]), fuse(made(FORMS[name][0]))):
        with pytest.raises(RuntimeError) as caught:
            model(x)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


# ---- the arguments of fuse, and the report -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({"exclude": "weight"}, [("other", "gelu")]),
        ({"include": ["w*"]}, [("weight", "relu")]),
        ({"exclude": lambda path, layer: layer.in_features == 8}, [("weight", "relu")]),
        ({"exclude": nn.Linear}, [("weight", "relu"), ("other", "gelu")]),
        ({"activations": "gelu"}, [("other", "gelu")]),
    ],
)
def test_which_layers(settings, fused):
    stock, model = made(FORMS["chain"][0]).eval(), fuse(made(FORMS["chain"][0]), **settings).eval()
    assert fused_places(report(model)) == fused
    with fused_runs() as found:
        torch.testing.assert_close(numbers(model, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    assert found.places == len(fused)


@pytest.mark.parametrize("name", ["nested", "chain", "gated", "loop_over_parameters", "a_subclass_of_linear"])
def test_example_inputs(name):
    cls, sites, _ = FORMS[name]
    model = fuse(made(cls), example_inputs=X, min_gain=0)
    assert fused_places(report(model)) == sites
    assert all(site.reached and site.gain > 0 for site in report(model).fused)
    fuse(model, example_inputs=X, min_gain=1e9)
    assert not report(model).fused and [s.slower for s in report(model) if s.path == sites[0][0]] == [True]
    fuse(model)
    assert fused_places(report(model)) == sites


def test_a_parameter_that_is_known_at_the_call_only():
    class Given(Base):
        def forward(self, x, weight=None):
            return F.relu(F.linear(x, self.weight if weight is None else weight, self.bias))

    class Passed(Base):
        def run(self, x, weight):
            return F.relu(F.linear(x, weight, self.bias))

        def forward(self, x):
            return self.run(x, self.up)

    model = fuse(made(Passed))
    assert [s.status for s in report(model)][-1] == "undecided" and runs(model) == 1
    fuse(model, example_inputs=X, min_gain=0)
    assert fused_places(report(model)) == [("up", "relu")]
    assert runs(fuse(made(Given))) == 0


def test_the_reason_for_what_is_not_fused():
    model = made(FORMS["nested"][0])
    model.weight = nn.Parameter(torch.randn(8, 6, dtype=torch.complex64))
    (site,) = [s for s in report(fuse(model)) if s.path == "weight"]
    assert site.status == "skipped" and "no kernels for torch.complex64" in site.why
    model = made(REFUSED["used_twice"])
    (site,) = [s for s in report(fuse(model)) if s.path == "weight"]
    assert site.why == "its output is used 2 times"


def test_parameters_may_be_swapped():
    """torch.utils.swap_tensors refuses tensors that somebody else refers to."""
    model = fuse(made(FORMS["chain"][0])).eval()
    report(model)
    model(X)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert runs(model, X.float()) == 1


def test_transforms_and_modes():
    stock, fused = made(FORMS["nested"][0]), fuse(made(FORMS["nested"][0]))
    parameters = {n: p.detach() * 2 for n, p in stock.named_parameters()}
    for call in (
        lambda m: torch.func.functional_call(m, parameters, (X,)),
        lambda m: torch.func.vmap(m)(X),
        lambda m: torch.func.jvp(m, (X,), (torch.ones_like(X),)),
        lambda m: torch.autograd.functional.hessian(lambda x: m(x).sum(), X[:1]),
    ):
        torch.testing.assert_close(call(fused), call(stock), rtol=1e-12, atol=1e-12)
    with torch.overrides.BaseTorchFunctionMode():
        assert runs(fused) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused.float()(X.float()).dtype == torch.bfloat16
    assert "dlkernels::" not in str(torch.jit.trace(fused, X.float()).inlined_graph)


def test_the_backend_joins_them():
    found = []

    def count(graph, inputs):
        backend.fuse_graph(graph)
        found.extend(n.target for n in graph.graph.nodes)
        return graph.forward

    model = made(FORMS["chain"][0]).eval()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend=count)(X), model(X))
    assert functional.mlp in found
