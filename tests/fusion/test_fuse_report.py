"""The report is true: the layers that reach a place, the reasons for skipped ones, the gain of a call."""

import copy
import functools
import pickle
import random
import re
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dlkernels import fuse, report, unfuse
from dlkernels.fusion import Gain, Report, Site, call, memory, observe
from dlkernels.fusion.sites import NOISE
from tests.fusion.fusable import Nested, X, fused_places, made


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.fc2, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.n = 3

    def project(self, x, *sizes):
        return x


def if_expression(self, x):
    for i, layer in enumerate(self.layers):
        x = F.relu(layer(x)) if i < self.n - 1 else layer(x)
    return x


def named_condition(self, x):
    for layer in self.layers:
        last = layer is self.layers[-1]
        x = layer(x) if last else F.relu(layer(x))
    return x


def loop_left(self, x):
    for i, layer in enumerate(self.layers):
        if i == len(self.layers) - 1:
            break
        x = F.relu(layer(x))
    return self.layers[-1](x)


def round_skipped(self, x):
    for i in range(3):
        if i == 2:
            x = self.layers[i](x)
            continue
        x = F.relu(self.layers[i](x))
    return x


def shorter_range(self, x):
    for i in range(len(self.layers) - 1):
        x = F.relu(self.layers[i](x))
    return self.layers[-1](x)


def depth_as_argument(self, x, depth=2):
    for i, layer in enumerate(self.layers):
        x = F.relu(layer(x)) if i < depth else layer(x)
    return x


def net(forward, base=Net):
    return type(forward.__name__, (base,), {"forward": forward})().double()


@pytest.mark.parametrize("forward", [if_expression, named_condition, loop_left, round_skipped, shorter_range])
def test_the_last_layer_that_has_no_activation_is_not_called_fused(forward):
    model = net(forward)
    expected = model(X)
    fused = fused_places(report(fuse(model)))
    assert fused == [("layers.0", "relu"), ("layers.1", "relu")], str(report(model))
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def test_what_depends_on_the_call_is_open_until_example_inputs_show_it():
    model = fuse(net(depth_as_argument))
    assert [s.path for s in report(model).undecided] == ["layers.0", "layers.1", "layers.2"] and not report(model).fused
    fuse(model, example_inputs=X, min_gain=0)
    rows = {s.path: (s.status, s.reached) for s in report(model) if s.path.startswith("layers")}
    assert rows == {"layers.0": ("fused", True), "layers.1": ("fused", True), "layers.2": ("skipped", False)}


def walrus(self, x):
    return F.relu(h := self.fc(x)) if x is not None else h


def walrus_before(self, x):
    if (h := self.fc(x)) is not None:
        h = F.relu(h)
    return h


def keyword(self, x):
    return F.relu(input=self.fc(x))


def several(self, x):
    a, self.kept = self.fc(x), self.fc2(x)
    return F.relu(a) + F.relu(self.kept)


def tried(self, x):
    try:
        h = self.fc(x)
        h = self.act(h)
    finally:
        pass
    return h


def another_block(self, x):
    h = self.fc(x)
    for _ in range(1):
        h = self.act(h)
    return h


def activation_before(self, x):
    x = self.act(x)
    x = self.fc(x)
    x = x + 1
    return self.act(x)


def by_name(self, x, name="fc"):
    return F.relu(getattr(self, name)(x))


class Parent(Net):
    def forward(self, x):
        return F.relu(self.fc(x))


def inherited(self, x):
    parent = super(inherited_class, self)
    return parent.forward(x)


inherited_class = type("inherited", (Parent,), {"forward": inherited})


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (net(walrus), "named by :="),
        (net(walrus_before), "named by :="),
        (net(keyword), "as a keyword argument"),
        (net(several), "an assignment of several values"),
        (net(tried), "in a try statement"),
        (net(another_block), "used 2 times"),
        (net(activation_before), "no activation takes its output"),
        (net(by_name), "fuse does not see where it is called"),
        (inherited_class(), "called by super()"),
    ],
    ids=lambda m: type(m).__name__ if isinstance(m, nn.Module) else "",
)
def test_an_activation_that_is_there_is_not_denied(model, why):
    (site,) = [s for s in report(fuse(model)) if s.path == "fc"]
    assert site.status == "skipped" and why in site.why, site


class GELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def own_gelu(x):
    return F.gelu(x) * 1.0


def of_a_function(self, x):
    return own_gelu(self.fc(x))


def of_a_method(self, x):
    return self.project(self.fc(x))


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(6, 6), GELU()), net(of_a_function), net(of_a_method)])
def test_an_activation_without_a_rule_is_not_one_without_a_kernel(model):
    why = next(iter(report(fuse(model)))).why
    assert "no rule for" in why and "register_fusion" in why and "no kernel" not in why


def no_activations(self, x, size=6):
    y = self.project(self.fc(x), -1, size) + F.relu(x.view(-1, size))
    return y + x.new_tensor(self.fc2(x), size, 1, 2) if x is None else y


def test_calls_that_are_no_activation_are_not_open():
    model = net(no_activations)
    table = report(fuse(model))
    assert not table.undecided and not table.fused, str(table)
    assert type(model).__name__ == "no_activations" and not hasattr(model, "_fused_plan"), "nothing was rewritten"


def test_what_was_not_selected_is_reported_as_such():
    model = made(Nested)
    assert "fuse was not called" in str(report(model))
    assert "not selected" in str(report(fuse(model, activations="tanh")))
    weight = model.fc.weight
    model.fc.weight = nn.Parameter(weight.detach().to(torch.complex64))
    fuse(model)
    model.fc.weight = weight
    (site,) = report(model)
    assert site.status == "skipped" and "call it again" in site.why
    assert len(report(fuse(model)).fused) == 1


def test_gain_counts_the_whole_call(monkeypatch):
    """Also the part that finds an earlier decision."""
    model, real = made(Nested), memory.run_again

    def slow(*args):
        time.sleep(0.002)
        return real(*args)

    monkeypatch.setattr(memory, "run_again", slow)
    gain = report(fuse(model, example_inputs=X, min_gain=0)).fused[0].gain
    assert gain < 0.5 and re.search(r"0\.\d\dx", str(report(model)))


class Listed(nn.Sequential):
    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def test_gain_counts_the_decision_where_each_call_decides(monkeypatch):
    """A loop over a list keeps no decision, and a gated layer whose activation is a partial keeps none."""
    real = call.decide

    def slow(*args, **kwargs):
        time.sleep(0.002)
        return real(*args, **kwargs)

    monkeypatch.setattr(call, "decide", slow)
    layers = Listed(nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6)).double()
    partly = net(gated)
    partly.leaky = functools.partial(F.leaky_relu, negative_slope=0.2)
    for model in (layers, partly):
        (site,) = report(fuse(model, example_inputs=X, min_gain=0)).fused
        assert site.gain < 0.5, site


def gated(self, x):
    return self.leaky(self.fc(x)) * self.fc2(x)


def guarded(self, x, flag=True):
    h = self.fc(x)
    if flag:
        h = self.act(h)
    n = self.fc2(h)
    if self.n > 5:
        n = F.relu(n)
    return n


def test_a_guard_that_only_the_call_knows_and_one_that_does_not_hold():
    model = fuse(net(guarded))
    rows = {s.path: s for s in report(model)}
    assert rows["fc"].status == "undecided" and rows["fc2"].status == "skipped"
    assert "self.n > 5 is False now" in rows["fc2"].why
    fuse(model, example_inputs=X, min_gain=0)
    assert {s.path for s in report(model).fused} == {"fc"}
    model.n = 6
    torch.testing.assert_close(model(X), F.relu(model.fc2(F.relu(model.fc(X)))), rtol=1e-12, atol=1e-12)
    assert {s.path for s in report(fuse(model)).fused} == {"fc2"}


def activate(x):
    return F.relu(x)


class SameName(Net):
    def activate(self, x):
        return activate(x)

    def forward(self, x):
        return self.activate(self.fc(x))


def test_a_method_that_calls_a_function_of_its_own_name():
    model = SameName().double()
    expected = model(X)
    assert [s.path for s in report(fuse(model)).fused] == ["fc"], str(report(model))
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def gains(monkeypatch):
    """Gains in place of measured ones, by the out_features of the layers: of a step, and of inference."""
    given = {}

    def measured(layers, x, stock, fused):
        return given[tuple(layer.out_features for layer in layers)]

    monkeypatch.setattr(observe, "_measured", measured)
    return given


def test_layers_that_gain_too_little_stay_stock(gains):
    """Of the three layers with an activation one gains, one loses, and one is told not to be fused."""
    gains.update({(8,): (Gain(0.9), Gain(1.5)), (9,): (Gain(1.2), None), (7,): (Gain(2.0), None)})
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 9), nn.ReLU(), nn.LayerNorm(9), nn.Linear(9, 7),
        nn.ReLU(),
    ).double()  # fmt: skip
    expected = model(X)
    for how in ({}, {"min_gain": 0.97}):
        fuse(model, example_inputs=X, exclude="6", **how)
        sites = {site.path: site for site in report(model).sites}
        assert {path: site.status for path, site in sites.items()} == {"0": "skipped", "3": "fused", "6": "skipped"}
        why = "fused was slower on the example inputs: 0.90 times stock's speed, and 1.50 times in inference"
        assert (sites["0"].why, sites["0"].slower, sites["0"].gain) == (why, True, 0.9)
        assert (sites["3"].gain, sites["6"].why) == (1.2, "not selected")
        torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
    for how in ({"min_gain": 0}, {"min_gain": 0.5}):
        assert len(report(fuse(model, example_inputs=X, **how)).fused) == 3
    assert [site.path for site in report(fuse(model, example_inputs=X, min_gain=1.5)).fused] == ["6"]
    unfuse(model)
    assert not report(model).fused and not any("slower" in site.why for site in report(model).sites)


@pytest.mark.parametrize(("gain", "status"), [(Gain(0.9, 0.2), "fused"), (Gain(0.9, 0.05), "skipped")])
def test_by_default_noise_leaves_no_layer_out(gains, gain, status):
    gains[(8,)] = gain, None
    model = fuse(nn.Sequential(nn.Linear(6, 8), nn.ReLU()).double(), example_inputs=X)
    assert [site.status for site in report(model)] == [status]


def test_a_chain_that_gains_too_little_is_tried_layer_by_layer(gains):
    """The chain loses; by itself its first layer gains, and its second loses too."""
    gains.update({(8, 9, 7): (Gain(0.8), None), (8,): (Gain(1.3), None), (9,): (Gain(0.9), None)})
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 7)).double()
    expected = model(X)
    fuse(model, example_inputs=X, min_gain=0)
    (site,) = report(model).sites
    assert (site.layers, site.gain) == ((("0", "relu"), ("2", "relu"), ("4", "none")), 0.8)
    assert "0 → 2 → 4  relu → relu → none  fused   0.80x" in str(report(model))
    fuse(model, example_inputs=X)
    first, second, third = report(model)
    assert [site.status for site in report(model)] == ["fused", "skipped", "skipped"]
    assert (first.gain, first.then, second.gain) == (1.3, (), 0.9) and "no activation" in third.why
    assert "as one chain it was slower on the example inputs: 0.80 times stock's speed" in str(report(model))
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [site.path for site in report(same).fused] == ["0"]
        assert layers_of_ours(same) == 1
        torch.testing.assert_close(same(X), expected, rtol=1e-12, atol=1e-12)
    gains[(8,)] = Gain(0.9), None
    fuse(model, example_inputs=X)
    assert [site.status for site in report(model)] == ["skipped"] * 3 and type(model) is nn.Sequential
    assert str(report(model)).startswith("Nothing to gain on this machine")
    assert torch.equal(model(X), expected)


def layers_of_ours(model):
    """Return how many single layers our kernels compute; a chain fails the test."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(X)
    names = [event.name for event in profile.events()]
    assert not any("mlp" in name for name in names)
    return sum(name == "dlkernels::_linear_act" for name in names)


def written_chain(self, x):
    x = F.relu(self.fc(x))
    return F.relu(self.fc2(x))


def test_a_written_chain_is_tried_layer_by_layer(gains):
    gains.update({(6, 6): (Gain(0.8), None), (6,): (Gain(1.3), None)})
    model = net(written_chain)
    expected = model(X)
    fuse(model, example_inputs=X)
    assert [(site.path, site.then, site.gain) for site in report(model).fused] == [("fc", (), 1.3), ("fc2", (), 1.3)]
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def looked_up(self, x, name="fc"):
    layer = getattr(self, f"{name}2")
    return F.relu(layer(x))


def test_a_layer_that_only_the_call_knows_stays_stock_too(gains):
    gains[(6,)] = Gain(0.9), None
    model = net(looked_up)
    expected = model(X)
    assert "fc2" in {site.path for site in report(fuse(model, example_inputs=X, min_gain=0)).fused}
    fuse(model, example_inputs=X)
    (site,) = [site for site in report(model) if site.path == "fc2"]
    assert (site.status, site.slower) == ("skipped", True) and "0.90 times stock's speed" in site.why
    assert torch.equal(model(X), expected)
    fuse(model, example_inputs=X, min_gain=0, exclude="fc2")
    assert not report(model).fused


def test_a_place_that_loses_in_inference_alone_stays_fused_with_a_remark(gains):
    gains[(8,)] = Gain(1.2), Gain(0.8)
    table = report(fuse(nn.Sequential(nn.Linear(6, 8), nn.ReLU()).double(), example_inputs=X))
    assert len(table.fused) == 1 and "slower in inference: 0.80 times stock's speed" in str(table)


def test_layers_without_an_activation_are_measured_too(gains):
    gains[(8,)] = Gain(0.9), None
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)).double()
    fuse(model, activations="none", example_inputs=X, min_gain=0)
    assert [(site.status, site.gain) for site in report(model)] == [("fused", 0.9)]
    fuse(model, activations="none", example_inputs=X)
    (site,) = report(model)
    assert (site.status, site.slower) == ("skipped", True) and type(model[0]) is nn.Linear


def test_the_noise_of_a_gain_is_the_spread_of_its_pairs():
    assert observe.gain_of([1.0] * 9) == Gain(1.0, NOISE), "never less than a table's"
    quiet, loud = ([0.9 + spread * i for i in range(-8, 9)] for spread in (0.001, 0.05))
    assert observe.gain_of(quiet).is_slower and not observe.gain_of(loud).is_slower
    assert not observe.gain_of([0.6, 0.7, 0.7, 0.7, 1.4]).is_slower, "five pairs of which one says the contrary"
    hiccup = [0.9] * 19 + [30.0]
    assert observe.gain_of(hiccup) == observe.gain_of([0.9] * 20), "a step that waited for other work"
    values = random.Random(0)
    medians = (observe.gain_of([values.gauss(1.0, 0.2) for _ in range(101)]) for _ in range(400))
    missed = sum(abs(gain.ratio - 1.0) > gain.noise for gain in medians)
    assert missed < 40, "the interval has the median with a probability of about 95 %"


def test_a_pair_counts_the_faster_of_two_steps_of_each_way(monkeypatch):
    """The clock of a machine where other work takes 100 of the time of every fourth step."""
    now, steps = [0.0], []
    took = {"stock": 3.0, "fused": 2.0}

    def step(way):
        steps.append(way)
        now[0] += took[way] + (100.0 if len(steps) % 4 == 0 else 0.0)

    monkeypatch.setattr(observe.time, "perf_counter", lambda: now[0])
    ratios = observe._pairs(step, ("stock", "fused"), torch.ones(1))
    assert set(ratios) == {1.5} and len(ratios) == observe.LEAST_PAIRS


def test_a_gain_is_measured_on_example_inputs():
    with pytest.raises(ValueError, match="expected example_inputs with min_gain"):
        fuse(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), min_gain=0.97)


def test_a_place_in_inference_mode_is_measured_without_backward():
    class Decides(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 8)

        @torch.inference_mode()
        def forward(self, x):
            return torch.relu(self.fc(x))

    model = nn.Sequential(Decides(), nn.Linear(8, 8), nn.ReLU())
    sites = report(fuse(model, example_inputs=torch.randn(4, 6), min_gain=0)).fused
    assert sites and all(site.gain > 0 and site.inference is None for site in sites)


def site(status="fused", gain=None, **more):
    return Site("0", "relu", "Sequential", status, gain=gain, **more)


NONE_CAN_BE = "Nothing to gain: no linear layer of this model can be fused with an activation. "
NONE_IS_FASTER = "Nothing to gain on this machine: no fused layer is clearly faster than stock. "
NOT_MEASURED = " (gains are not measured: fuse measures them on example_inputs)"


@pytest.mark.parametrize(
    ("sites", "first_line"),
    [
        ((), NONE_CAN_BE + "0 fused, 0 skipped"),
        ((site(gain=0.9), site(gain=1.0)), NONE_IS_FASTER + "2 fused, 0 skipped"),
        ((site(gain=1.02), site(gain=0.99)), NONE_IS_FASTER + "2 fused, 0 skipped"),  # within a table's noise
        ((site(gain=1.1, noise=0.2),), NONE_IS_FASTER + "1 fused, 0 skipped"),  # within its own
        ((site(gain=1.3, noise=0.2),), "1 fused, 0 skipped"),
        ((site(gain=1.0, inference=Gain(1.3)),), "1 fused, 0 skipped"),
        ((site("skipped", gain=0.9),), NONE_IS_FASTER + "0 fused, 1 skipped"),
        ((site("skipped", slower=True),), NONE_IS_FASTER + "0 fused, 1 skipped"),  # by a table
        ((site("skipped", slower=True), site(gain=1.2)), "1 fused, 1 skipped"),
        ((site(gain=0.9), site(gain=1.1)), "2 fused, 0 skipped"),
        ((site(), site(gain=0.9)), "2 fused, 0 skipped"),  # one was not measured
        ((site(),), "1 fused, 0 skipped" + NOT_MEASURED),
        ((site("undecided"),), "0 fused, 0 skipped, 1 undecided"),
        ((site("skipped", why="not selected"),), "0 fused, 1 skipped"),
    ],
)
def test_a_model_with_nothing_to_gain_is_told_so_in_the_first_line(sites, first_line):
    assert str(Report(sites)).splitlines()[0] == first_line


def test_the_first_line_of_a_model_that_is_not_fused_is_true():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    first = "Not fused yet: 1 of these layers can be fused when fuse is called. 0 fused, 1 skipped"
    assert str(report(model)).splitlines()[0] == first
    assert str(report(fuse(model))).splitlines()[0] == "1 fused, 0 skipped" + NOT_MEASURED


def test_a_report_fits_a_narrow_terminal(monkeypatch):
    """Reason and place of a layer are then below it, and a gain is one number where its range is none."""
    sites = (
        Site("encoder.layers.0.feed_forward", "gelu", "Encoder.forward:12", "fused", gain=1.2),
        Site("encoder.layers.1.feed_forward", "gelu", "Encoder.forward:12", "fused", gain=1.2),
        Site("head", "", "Encoder.forward:15", "skipped", "no activation takes its output, which is returned " * 2),
    )
    monkeypatch.setenv("COLUMNS", "64")
    narrow = str(Report(sites)).splitlines()
    assert max(map(len, narrow)) <= 64, narrow
    assert narrow[2:4] == ["encoder.layers.*.feed_forward  ×2  gelu        fused    1.20x", "  Encoder.forward:12"]
    monkeypatch.delenv("COLUMNS")
    assert len(str(Report(sites)).splitlines()) == 4


def test_a_model_without_activations_has_nothing_to_gain():
    assert str(report(fuse(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))))).startswith("Nothing to gain: ")
