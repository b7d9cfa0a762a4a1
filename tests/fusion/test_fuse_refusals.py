"""Layers that ``fuse`` must not fuse, and the reasons that it reports."""

import functools
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from dlkernels import fuse, report
from tests.fusion.fusable import Lora, Net, Subclass, X


def cached(function):
    return functools.lru_cache(function)


REFUSED: list = []


def refused(reason, change=lambda model: None):
    def take(forward):
        cls = type(forward.__name__.capitalize(), (Net,), {"forward": forward})
        REFUSED.append(pytest.param(cls, change, reason, id=forward.__name__))
        return forward

    return take


def relu_of_fc1(self, x):
    return F.relu(self.fc1(x))


def when(name, reason, change):
    forward = type(relu_of_fc1)(relu_of_fc1.__code__, globals(), name)
    refused(reason, change)(forward)


when("forward_hook", "hook", lambda m: m.fc1.register_forward_hook(lambda *a: None))
when("backward_hook", "hook", lambda m: m.fc1.register_full_backward_hook(lambda *a: None))
when("weight_norm", "parametrized", lambda m: parametrizations.weight_norm(m.fc1))
when("own_forward", "its own forward", lambda m: setattr(m, "fc1", Subclass(6, 8)))
when("lora", "no activation takes", lambda m: setattr(m, "fc1", Lora(m.fc1)))
when("lazy", "hook", lambda m: setattr(m, "fc1", nn.LazyLinear(8)))
when("forward_of_the_layer", "hook", lambda m: setattr(m.fc1, "forward", m.fc1.forward))
when("forward_of_the_owner", "was replaced", lambda m: setattr(m, "forward", m.forward))
when("integers", "no kernels for torch.complex64", lambda m: m.fc1.to(torch.complex64))


@refused("used 2 times")
def also_added(self, x):
    h = self.fc1(x)
    return F.relu(h) + h


@refused("stored in an attribute")
def also_kept(self, x):
    self.kept = h = self.fc1(x)
    return F.relu(h)


@refused("used 2 times")
def read_in_a_closure(self, x):
    h = self.fc1(x)
    read = lambda: h  # noqa: E731
    h = F.relu(h)
    return h + read()


@refused("used 2 times")
def returned_in_one_case(self, x):
    h = self.fc1(x)
    if x.sum() > 1e9:
        return h
    return F.relu(h)


@refused("used 2 times")
def changed_in_between(self, x):
    h = self.fc1(x)
    h += 1
    return F.relu(h)


@refused("between it and the activation, may have a side effect")
def an_effect_in_between(self, x):
    h = self.fc1(x)
    torch.set_grad_enabled(True)
    return F.relu(h)


@refused("called in a try statement")
def a_handler_might_read_it(self, x):
    h = x
    try:
        h = self.fc1(x)
        h = F.relu(h)
    except ValueError:
        pass
    return h


@refused("looks at its variables (locals)")
def looks_at_names(self, x):
    h = self.fc1(x)
    h = F.relu(h)
    return locals()["h"]


@refused("no kernel has the activation hardtanh")
def another_activation(self, x):
    return F.hardtanh(self.fc1(x))


@refused("no kernel has the activation leaky_relu")
def negative_slope(self, x):
    return F.leaky_relu(self.fc1(x), -0.1)


@refused("no kernel has the activation Dropout")
def activation_before(self, x):
    return self.drop(self.fc1(F.relu(x)))


@refused("has no Python source")
@cached
def decorated_by_a_cache(self, x):
    return F.relu(self.fc1(x))


@pytest.mark.parametrize(("cls", "change", "reason"), REFUSED)
def test_what_would_change_results_is_left_alone(cls, change, reason):
    model = cls()
    change(model)
    before = [type(m) for m in model.modules()]
    fuse(model)
    assert [type(m) for m in model.modules()] == before
    (site,) = [s for s in report(model) if s.path in ("fc1", "fc1.base")]
    assert site.status == "skipped" and reason in site.why, site


def test_quantised_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    before = [type(m) for m in quantised.modules()]
    fuse(quantised)
    assert [type(m) for m in quantised.modules()] == before and not report(quantised).fused


def test_source_that_is_not_what_runs(tmp_path):
    """A file edited since it was imported."""
    text = (
        "import torch.nn.functional as F\nfrom torch import nn\nclass Edited(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(6, 8)\n"
        "    def forward(self, x):\n        return F.relu(self.fc(x)) * 1\n"
    )
    path = tmp_path / "edited.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("edited", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path.write_text(text.replace("* 1", "* 2"))
    model = module.Edited()
    fuse(model)
    assert type(model) is module.Edited
    assert [s.why for s in report(model)] == ["the source of Edited.forward is not the code that runs"]


def test_a_file_that_is_edited_and_loaded_again(tmp_path):
    path = tmp_path / "edited_again.py"
    for slope in ("0.1", "0.25"):
        path.write_text(
            "import torch.nn.functional as F\nfrom torch import nn\nclass Edited(nn.Module):\n"
            "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(6, 8)\n"
            f"    def forward(self, x):\n        return F.leaky_relu(self.fc(x), {slope})\n"
        )
        spec = importlib.util.spec_from_file_location("edited_again", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.Edited().double()
        expected = model(X)
        assert len(report(fuse(model)).fused) == 1
        torch.testing.assert_close(model(X), expected)


def test_no_source():
    scope = {"nn": nn, "F": F}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return F.relu(self.fc(x))", scope)
    model = scope["Hidden"]()
    model.fc = nn.Linear(6, 8)
    fuse(model)
    assert type(model) is scope["Hidden"] and "no source of Hidden.forward" in str(report(model))
