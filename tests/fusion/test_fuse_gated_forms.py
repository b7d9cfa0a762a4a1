"""How gated layers are written: names of preactivations, calls that cut halves, products by function, dropouts."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F

from dlkernels import functional, fuse, report
from dlkernels.fusion import backend
from tests.fusion import gated_forms
from tests.fusion.fusable import Subclass, X, made, numbers
from tests.fusion.gated_forms import FORMS, REFUSED, SEEN, Base, is_npu_available_with_an_effect
from tests.fusion.test_fuse_gated import runs
from tests.fusion.twists import Truth


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    model, stock = made(FORMS[name]), made(FORMS[name])
    fuse(model)
    for training in (True, False):
        model.train(training), stock.train(training)
        assert runs(model) == 1, str(report(model))
        torch.testing.assert_close(numbers(model, X), numbers(stock, X))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(numbers(compiled, X)[0], numbers(stock, X)[0])


@pytest.mark.parametrize("name", REFUSED)
def test_near_misses(name):
    model, stock = made(REFUSED[name]), made(REFUSED[name])
    fuse(model)
    for training in (True, False):
        model.train(training), stock.train(training)
        assert runs(model) == 0, str(report(model))
        model.log.clear()
        torch.testing.assert_close(numbers(model, X), numbers(stock, X))
        assert model.log == stock.log
        stock.log.clear()


CHANGES = {
    "hook on a layer": lambda m: [
        getattr(m, n).register_forward_hook(lambda m, a, y: y * 2) for n in ("gate", "packed")
    ],
    "hook on the other layer": lambda m: [
        getattr(m, n).register_forward_pre_hook(lambda m, a: (a[0] * 2,)) for n in ("up", "packed")
    ],
    "subclass": lambda m: (setattr(m, "gate", Subclass(6, 8).double()), setattr(m, "packed", Subclass(6, 16).double())),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FORMS)
def test_later_changes(name, change):
    model, stock = fuse(made(FORMS[name])), made(FORMS[name])
    for each in (model, stock):
        torch.manual_seed(0)
        CHANGES[change](each)
    assert runs(model) == 0
    torch.testing.assert_close(numbers(model, X), numbers(stock, X))


def test_a_method_overridden_in_a_subclass():
    class Child(FORMS["named_preactivations"]):
        def forward(self, x):
            return super().forward(x) * 2

    class Other(FORMS["named_preactivations"]):
        def forward(self, x):
            return self.down(torch.tanh(self.gate(x)) + self.up(x))

    for cls, count in ((Child, 1), (Other, 0)):
        model, stock = fuse(made(cls)), made(cls)
        assert runs(model) == count
        torch.testing.assert_close(numbers(model, X), numbers(stock, X))


@pytest.mark.parametrize("way", ["nested", "statement", "function"])
def test_a_dropout_on_the_gate_is_looked_through_while_it_is_inactive(way):
    class Dropped(Base):
        def forward(self, x):
            if way == "nested":
                return self.down(self.drop(self.act(self.gate(x))) * self.up(x))
            if way == "function":
                g = F.dropout(self.act(self.gate(x)), 0.5, self.training)
                return self.down(g * self.up(x))
            g = self.act(self.gate(x))
            g = self.drop(g)
            return self.down(g * self.up(x))

    model, stock = fuse(made(Dropped)), made(Dropped)
    for training in (True, False, True):
        model.train(training), stock.train(training)
        assert runs(model) == (not training)
        torch.testing.assert_close(numbers(model, X), numbers(stock, X))


@pytest.mark.parametrize("packed", [False, True])
def test_bilinear_layers_with_none_among_the_activations(packed):
    class Bilinear(Base):
        def forward(self, x):
            if packed:
                a, b = self.packed(x).chunk(2, dim=-1)
                return self.down(a * b)
            return self.down(self.gate(x) * self.up(x))

    model, stock = fuse(made(Bilinear), activations=["none", "silu"]), made(Bilinear)
    assert runs(model) == 1
    torch.testing.assert_close(numbers(model, X), numbers(stock, X))


def test_sizes_that_change_later():
    model, stock = fuse(made(FORMS["split_by_attribute"])), made(FORMS["split_by_attribute"])
    assert runs(model) == 1
    model.half = stock.half = 7
    for each in (model, stock):
        with pytest.raises(RuntimeError, match="split"):
            each(X)
    model.half = stock.half = 8
    model.last = stock.last = 0
    with pytest.raises(RuntimeError):
        model(X)


@pytest.mark.parametrize("left_out", ["gate", "up"])
def test_the_report_says_why_the_other_half_is_not_fused(left_out):
    rows = {site.path: site for site in report(fuse(made(FORMS["named_preactivations"]), exclude=[left_out]))}
    assert rows["up"].why == "the gated layer of gate is not fused"
    assert rows["gate"].status == ("skipped" if left_out == "gate" else "fused")


@pytest.mark.parametrize("name", ["of_timm_glu_mlp", "of_timm_glu_mlp_gate_first", "ends_between", "in_a_branch"])
def test_a_condition_that_changes_later(name):
    """The other branch runs as it is written."""
    model, stock = fuse(made(FORMS[name])), made(FORMS[name])
    assert runs(model) == 1
    for value, count in ((False, 0), (1, 1), (torch.ones(()), 0), (True, 1)):
        model.gate_last = stock.gate_last = value
        assert runs(model) == count
        torch.testing.assert_close(numbers(model, X), numbers(stock, X))


def test_a_condition_of_a_function_that_changes_later(monkeypatch):
    model, stock = fuse(made(FORMS["of_diffusers_geglu"])), made(FORMS["of_diffusers_geglu"])
    assert runs(model) == 1
    with monkeypatch.context() as patch:
        patch.setitem(vars(gated_forms), "is_npu_available", is_npu_available_with_an_effect)
        SEEN.clear()
        torch.testing.assert_close(model(X), stock(X))
        assert SEEN == [1, 1] and runs(model) == 0
    with monkeypatch.context() as patch:
        patch.setitem(vars(gated_forms), "_npu_available", True)
        for each in (model, stock):
            with pytest.raises(AttributeError, match="nothing_of_this_name"):
                each(X)
    with monkeypatch.context() as patch:
        patch.setitem(vars(gated_forms), "_npu_available", Truth())  # asked once by each call
        with contextlib.suppress(AttributeError):
            stock(X)
        with contextlib.suppress(AttributeError):
            stock(X)
        asked = gated_forms._npu_available.asked
        patch.setitem(vars(gated_forms), "_npu_available", Truth())
        for _ in range(2):
            with contextlib.suppress(AttributeError):
                model(X)
        assert gated_forms._npu_available.asked == asked == 2
    assert runs(model) == 1


def test_the_report_of_a_branch_that_is_not_taken():
    for value in (True, False):
        model = made(FORMS["of_timm_glu_mlp"])
        model.gate_last = value
        rows = [site for site in report(fuse(model)) if site.path == "packed"]
        assert [(site.status, site.activation) for site in rows] == [("fused", "silu")]
        assert runs(model) == 1


def test_functions_replaced_later(monkeypatch):
    model, stock = fuse(made(FORMS["product_of_torch"])), made(FORMS["product_of_torch"])
    assert runs(model) == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mul", torch.add)
        assert runs(model) == 0
        torch.testing.assert_close(numbers(model, X), numbers(stock, X))
    assert runs(model) == 1


def test_a_dimension_counted_from_the_first_is_known_at_the_call():
    model = made(FORMS["last_dimension_by_its_number"])
    (site,) = [s for s in report(fuse(copy.deepcopy(model))) if s.path == "packed"]
    assert site.status == "undecided"
    fuse(model, example_inputs=X, min_gain=0)
    (site,) = [s for s in report(model) if s.path == "packed"]
    assert site.status == "fused" and site.gain > 0


def found_by_the_backend(model, x):
    """The number of gated layers in the graphs that the backend makes of a call, and its value."""
    found = []

    def count(graph, inputs):
        backend.fuse_graph(graph)
        found.append(sum(n.target in (functional.linear_glu, functional.linear_glu_packed) for n in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    y = torch.compile(model, backend=count)(x)
    return sum(found), y


@pytest.mark.parametrize("name", FORMS)
def test_the_backend_finds_the_forms(name):
    model = made(FORMS[name])
    expected = numbers(model, X)
    found, y = found_by_the_backend(model, X)
    assert found == 1
    torch.testing.assert_close(y, expected[0])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="dlkernels", options={"then": "aot_eager"})
    y, gradients = numbers(compiled, X)
    torch.testing.assert_close((y, {n.removeprefix("_orig_mod."): g for n, g in gradients.items()}), expected)


NOT_IN_THE_GRAPH = [
    name
    for name in REFUSED
    # In the graph the branches are taken, the effects are gone and a method is followed: these are gated layers there.
    if name
    not in (
        *("statement_between", "effect_before_the_activation", "one_branch", "input_changed_between"),
        *("condition_with_an_effect", "function_with_an_effect", "condition_that_reads_the_output"),
        *("condition_on_an_object", "augmented_attribute"),
    )
    and not name.startswith("deleted")
]


@pytest.mark.parametrize("name", NOT_IN_THE_GRAPH)
def test_the_backend_refuses_near_misses(name):
    model = made(REFUSED[name])
    found, y = found_by_the_backend(model, X)
    assert found == 0
    torch.testing.assert_close(y, model(X))


def test_the_backend_refuses_halves_of_a_graph_that_turns_gradients_off():
    class Turns(Base):
        def forward(self, x):
            h = self.packed(x)
            with torch.no_grad():
                g, u = h.chunk(2, dim=-1)
                y = F.silu(g) * u
            return self.down(y)

    model = made(Turns)
    assert found_by_the_backend(model, X)[0] == 0
