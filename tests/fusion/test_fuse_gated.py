"""``fuse`` on gated layers: the forms that it finds, what it refuses, the report, and the same numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import functional, fuse, report, unfuse
from dlkernels.fusion import backend
from tests.fusion.fusable import Lora, Subclass, X, decided_glus, gated_runs, made, numbers
from tests.fusion.zoo import _language


class Gated(nn.Module):
    """Layers of a gated block; the forms below are its forwards."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), nn.Linear(8, 6)
        self.packed, self.narrow = nn.Linear(6, 16), nn.Linear(6, 1)
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.5)


FORMS = {}
REFUSED = {}


def form(forward):
    FORMS[forward.__name__] = type("Of" + forward.__name__.title(), (Gated,), {"forward": forward})
    return forward


def refused(forward):
    REFUSED[forward.__name__] = type("Of" + forward.__name__.title(), (Gated,), {"forward": forward})
    return forward


@form
def llama(self, x):
    down_proj = self.down(self.act(self.gate(x)) * self.up(x))
    return down_proj


@form
def up_first(self, x):
    return self.down(self.up(x) * F.gelu(self.gate(x), approximate="tanh"))


@form
def method_of_a_tensor(self, x):
    return self.down(self.gate(x).sigmoid() * self.up(x))


@form
def t5(self, x):
    hidden_gelu = self.act(self.gate(x))
    hidden_linear = self.up(x)
    x = hidden_gelu * hidden_linear
    return self.down(x)


@form
def named_up_first(self, x):
    u = self.up(x)
    g = F.relu(self.gate(x))
    return self.down(u * g)


@form
def product_in_the_other_order(self, x):
    g = F.relu(self.gate(x))
    u = self.up(x)
    return self.down(u * g)


@form
def phi3(self, x):
    up_states = self.packed(x)
    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.act(gate)
    return self.down(up_states)


@form
def geglu(self, x):
    x, gate = self.packed(x).chunk(2, dim=-1)
    return self.down(x * F.gelu(gate))


@form
def packed_in_words(self, x):
    h = self.packed(x)
    gate, up = h.chunk(2, -1)
    y = torch.tanh(gate) * up
    return self.down(y) + self.down(y)


@form
def twice(self, x):
    for _ in range(2):
        g = self.act(self.gate(x))
        u = self.up(x)
        x = self.down(g * u)
    return self.act(self.gate(x)) * self.up(x)


@refused
def other_input(self, x):
    return self.down(self.act(self.gate(x)) * self.up(x + 1))


@refused
def dropout_beside(self, x):
    return self.down(self.act(self.gate(x)) * self.drop(self.up(x)))


@refused
def a_sum(self, x):
    return self.down(self.act(self.gate(x)) + self.up(x))


@refused
def second_use(self, x):
    g = self.act(self.gate(x))
    u = self.up(x)
    return self.down(g * u) + self.down(g)


@refused
def changed_between(self, x):
    g = self.act(self.gate(x))
    x = x + 1
    u = self.up(x)
    return self.down(g * u)


@refused
def both_activated(self, x):
    return self.down(self.act(self.gate(x)) * torch.tanh(self.up(x)))


@refused
def broadcast(self, x):
    return self.down(torch.sigmoid(self.narrow(x)) * self.up(x))


@refused
def three_parts(self, x):
    a, b, _ = F.pad(self.packed(x), (0, 8)).chunk(3, dim=-1)
    return self.down(F.gelu(a) * b)


@refused
def another_dimension(self, x):
    a, b = self.packed(x.t()[:6, :5].t()[:4]).chunk(2, dim=0)
    return self.down((F.gelu(a) * b).chunk(2, dim=-1)[0])


@refused
def halves_used_again(self, x):
    h = self.packed(x)
    a, b = h.chunk(2, dim=-1)
    y = F.gelu(a) * b
    return self.down(y) + self.down(b)


@refused
def whole_used_again(self, x):
    h = self.packed(x)
    a, b = h.chunk(2, dim=-1)
    y = F.gelu(a) * b
    return self.down(y) + h.sum()


@refused
def read_by_an_inner_function(self, x):
    g = self.act(self.gate(x))
    u = self.up(x)
    y = g * u
    return self.down(y) + (lambda: g)().sum()


def runs(model, x=X):
    """The number of gated layers that a call runs as one."""
    with gated_runs() as ran:
        model(x)
    return len(ran)


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    model = made(FORMS[name])
    stock = copy.deepcopy(model)
    assert fuse(model) is model
    expected = 3 if name == "twice" else 1
    assert runs(model) == expected
    torch.testing.assert_close(numbers(model, X), numbers(stock, X))
    sites = {site.path: site for site in report(model)}
    half = "packed" if "packed" in [site.path for site in report(model).fused] else "gate"
    assert sites[half].status == "fused"
    assert sites[half].up == ("up" if half == "gate" else "") and ("up" in sites) == (half == "packed")
    assert runs(copy.deepcopy(model)) == expected
    unfuse(model)
    assert runs(model) == 0
    assert torch.equal(model(X), stock(X))


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    model = made(REFUSED[name])
    stock = copy.deepcopy(model)
    fuse(model)
    assert runs(model) == 0
    model.eval(), stock.eval()
    torch.testing.assert_close(numbers(model, X), numbers(stock, X))
    assert not any(site.up for site in report(model))


def hook_on(name):
    return lambda model: getattr(model, name).register_forward_hook(lambda module, args, y: y * 2)


def replaced(name, make):
    def change(model):
        setattr(model, name, make(getattr(model, name)))

    return change


CHANGES = {
    "hook on gate": hook_on("gate"),
    "hook on up": hook_on("up"),
    "hook on the activation": hook_on("act"),
    "subclass": replaced("up", lambda old: Subclass(6, 8).double()),
    "lora": replaced("up", lambda old: Lora(old).double()),
    "another shape": replaced("up", lambda old: nn.Linear(6, 1).double()),
    "another activation": replaced("act", lambda old: nn.Softplus()),
    "no layer": replaced("up", lambda old: nn.Sequential(old, nn.Tanh())),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["llama", "t5", "up_first", "named_up_first"])
def test_changes_after_fuse(name, change):
    model = made(FORMS[name])
    stock = copy.deepcopy(model)
    fuse(model)
    for each in (model, stock):
        torch.manual_seed(0)
        CHANGES[change](each)
    fused = runs(model)
    assert fused == 0 or (change in ("another activation", "hook on the activation") and "first" in name)
    torch.testing.assert_close(numbers(model, X), numbers(stock, X))


@pytest.mark.parametrize("name", ["phi3", "geglu"])
def test_packed_changes_after_fuse(name):
    for change in (hook_on("packed"), replaced("packed", lambda old: Subclass(6, 16).double())):
        model = made(FORMS[name])
        stock = copy.deepcopy(model)
        fuse(model)
        for each in (model, stock):
            torch.manual_seed(0)
            change(each)
        assert runs(model) == 0
        torch.testing.assert_close(numbers(model, X), numbers(stock, X))


def test_a_layer_with_an_odd_number_of_features_is_not_cut():
    model = made(FORMS["packed_in_words"])
    model.packed = nn.Linear(6, 15).double()
    fuse(model)
    with pytest.raises(RuntimeError):  # stock's error: its halves differ
        model(X)


def test_calls_happen_in_stocks_order():
    """Layers with hooks are called as often and in the same order as in stock, and their callees looked up there."""
    order = []

    class Watched(Gated):
        @property
        def late(self):
            order.append("late")
            return self.up

        def forward(self, x):
            return self.down(self.act(self.gate(x)) * self.late(x))

    results = []
    for make in (lambda m: m, fuse):
        model = make(made(Watched))
        model.gate.register_forward_hook(lambda *_: order.append("gate"))
        model(X)
        results.append(list(order))
        order.clear()
    assert results[0] == results[1] == ["gate", "late"]


def test_excluded_halves():
    for exclude in ("up", "gate"):
        model = fuse(made(FORMS["llama"]), exclude=exclude)
        assert runs(model) == 0
        assert not any(site.up for site in report(model))


def test_not_selected_activations():
    model = fuse(made(FORMS["llama"]), activations=["relu"])
    assert runs(model) == 0


def test_example_inputs_show_the_gain_of_the_whole():
    for name, path in (("llama", "gate"), ("phi3", "packed")):
        model = made(FORMS[name])
        fuse(model, example_inputs=X, min_gain=0)
        (site,) = report(model).fused
        assert site.path == path and site.reached and site.gain > 0
    text = str(report(fuse(made(FORMS["llama"]))))
    assert "gate * up" in text


def test_under_autocast():
    model = made(FORMS["llama"]).float()
    stock = copy.deepcopy(model)
    fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert runs(model, X.float()) == 1
        y, expected = model(X.float()), stock(X.float())
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["llama", "t5", "phi3", "geglu"])
def test_compile(name):
    torch._dynamo.reset()
    model = fuse(made(FORMS[name]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(numbers(compiled, X)[0], numbers(model, X)[0])


class Graph(Gated):
    """Forms for the backend, which sees Dynamo's graph."""

    def forward(self, x, which):
        if which == "nested":
            return self.down(self.act(self.gate(x)) * self.up(x))
        if which == "named":
            u = self.up(x)
            g = F.relu(self.gate(x))
            return self.down(torch.mul(u, g))
        if which == "changed between":
            g = self.act(self.gate(x))
            x += 1
            return self.down(g * self.up(x))
        if which == "changed and used":
            g = self.act(self.gate(x))
            y = x.add_(1)
            return self.down(g * self.up(x)) + y
        return self.down(self.act(self.gate(x)) * torch.tanh(self.up(x)))


@pytest.mark.parametrize(
    ("which", "expected"),
    [("nested", 1), ("named", 1), ("changed between", 0), ("changed and used", 0), ("both activated", 0)],
)
def test_backend(which, expected):
    torch._dynamo.reset()
    model = made(Graph)
    y = torch.compile(model, fullgraph=True, backend=backend.dlkernels, options={"then": "eager"})(X.clone(), which)
    torch.testing.assert_close(y, model(X.clone(), which))
    found = []
    torch._dynamo.reset()

    def count(graph, inputs):
        backend.fuse_graph(graph)
        found.append(sum(n.target in (functional.linear_glu, functional.linear_glu_packed) for n in graph.graph.nodes))
        return graph.forward

    torch.testing.assert_close(torch.compile(model, backend=count)(X.clone(), which), y)
    assert sum(found) == expected


# Most of these families were not looked at while fuse learned the forms.
FAMILIES = [
    "llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3", "phi3", "olmo", "olmo2", "granite", "cohere", "stablelm",
    "glm", "smollm3", "ernie4_5", "helium", "seed_oss", "starcoder2",
]  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_public_models(kind):
    try:
        model, inputs = _language(kind, num_key_value_heads=2, head_dim=16)
    except (ImportError, ValueError) as missing:  # this version of transformers does not have it
        pytest.skip(str(missing))
    model.eval()
    stock = copy.deepcopy(model)
    fuse(model)
    with decided_glus() as counted, torch.no_grad():
        y, expected = model(**inputs), stock(**inputs)
    layers = model.config.num_hidden_layers
    assert len(counted) == (0 if kind == "starcoder2" else layers)  # starcoder2 has no gate
    torch.testing.assert_close(y[0], expected[0])


def test_t5():
    model, inputs = _language(
        "t5", feed_forward_proj="gated-gelu", d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=2
    )
    model.eval()
    stock = copy.deepcopy(model)
    fuse(model)
    tokens = inputs["input_ids"]
    with decided_glus() as counted, torch.no_grad():
        y, expected = (m(input_ids=tokens, decoder_input_ids=tokens)[0] for m in (model, stock))
    assert len(counted) == 4
    torch.testing.assert_close(y, expected)
