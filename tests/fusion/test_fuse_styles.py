"""Small models in the styles of fields that ``fuse`` was not written for, each with its sites and its calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical

from dlkernels import fuse, report, unfuse
from tests.fusion.fusable import X, fused_places, fused_runs, made, numbers

STYLES: list = []


def style(*sites, calls):
    """A model, the places in its report, and the number of fused calls in eval mode."""

    def take(cls):
        STYLES.append(pytest.param(cls, list(sites), calls, id=cls.__name__))
        return cls

    return take


@style(("blocks.0.0", "leaky_relu"), ("blocks.1.0", "leaky_relu"), ("head", "sigmoid"), calls=3)
class Discriminator(nn.Module):
    """Of a GAN, with its features for feature matching."""

    def __init__(self):
        super().__init__()
        sizes = ((6, 8), (8, 8))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(*s), nn.LeakyReLU(0.2, inplace=True)) for s in sizes])
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x.mean())
        return torch.sigmoid(self.head(x)) + sum(features)


@style(("fc0", "leaky_relu"), ("fc1", "leaky_relu"), calls=2)
class Mapping(nn.Module):
    """StyleGAN's mapping network; its layers have the names of a loop."""

    def __init__(self):
        super().__init__()
        self.count = 2
        for i in range(2):
            self.add_module(f"fc{i}", nn.Linear(6, 6))

    def forward(self, z):
        x = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for i in range(self.count):
            layer = getattr(self, f"fc{i}")
            x = layer(x)
            x = F.leaky_relu(x, 0.2)
        return x


@style(("linear_1", "silu"), calls=1)
class TimeEmbedding(nn.Module):
    """Of diffusers' U-Nets."""

    def __init__(self):
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 8)
        self.cond_proj, self.post_act = None, None

    def forward(self, sample, condition=None):
        if condition is not None:
            sample = sample + self.cond_proj(condition)
        sample = self.linear_1(sample)
        if self.act is not None:
            sample = self.act(sample)
        sample = self.linear_2(sample)
        if self.post_act is not None:
            sample = self.post_act(sample)
        return sample


@style(("proj", "tanh"), calls=1)
class Readout(nn.Module):
    """Of an RNN."""

    def __init__(self):
        super().__init__()
        self.rnn, self.drop = nn.GRU(6, 8, batch_first=True), nn.Dropout(0.1)
        self.proj, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        out, _ = self.rnn(x.unsqueeze(1))
        logits = self.out(self.drop(torch.tanh(self.proj(out[:, -1]))))
        return F.log_softmax(logits, dim=-1)


@style(("linear0", "relu"), calls=1)
class Tabular(nn.Module):
    """rtdl's ResNet block: a dropout is asked if it is there."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear0, self.linear1 = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.act, self.drop0, self.drop1 = nn.ReLU(), nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x):
        z = self.norm(x)
        z = self.linear0(z)
        z = self.act(z)
        if self.drop0:
            z = self.drop0(z)
        z = self.linear1(z)
        z = self.drop1(z) if self.drop1 else z
        return x + z


@style(("dense", "tanh"), calls=1)
class ClassificationHead(nn.Module):
    """RoBERTa's."""

    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.out_proj = nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, features, **kwargs):
        x = features[:, 0, :] if features.dim() == 3 else features
        x = self.dropout(x)
        x = self.dense(x)
        x = torch.tanh(x)
        x = self.dropout(x)
        x = self.out_proj(x)
        return x


@style(("fc1", "tanh"), ("fc2", "tanh"), calls=1)
class Actor(nn.Module):
    """Of reinforcement learning, with a distribution as output."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.fc1(x))
        h = torch.tanh(self.fc2(h))
        return Categorical(logits=self.fc3(h)).entropy()


@style(("fc1", "relu"), ("fc3", "sigmoid"), calls=2)
class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.mean, self.log_var = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.fc3 = nn.Linear(2, 6)

    def encode(self, x):
        h = F.relu(self.fc1(x))
        return self.mean(h), self.log_var(h)

    def forward(self, x):
        mean, log_var = self.encode(x.view(-1, 6))
        return torch.sigmoid(self.fc3(mean)) + log_var.sum()


@style(("points.0", "relu"), ("points.1", "relu"), ("points.2", "relu"), calls=3)
class Field(nn.Module):
    """NeRF's, with a skip connection in the loop."""

    def __init__(self):
        super().__init__()
        self.points = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(14, 8)])
        self.skips, self.alpha = [1], nn.Linear(8, 1)

    def forward(self, x):
        h = x
        for i, _ in enumerate(self.points):
            h = self.points[i](h)
            h = F.relu(h)
            if i in self.skips:
                h = torch.cat([x, h], -1)
        return self.alpha(h)


@style(("table.up", "gelu"), calls=1)
class ByName(nn.Module):
    """Layers and activations in tables."""

    def __init__(self):
        super().__init__()
        self.table = nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)})
        self.acts = {"relu": F.relu, "gelu": nn.GELU()}

    def forward(self, x):
        h = self.table["up"](x)
        h = self.acts["gelu"](h)
        return self.table["down"](h)


@style(("fc1", "gelu"), calls=1)
class WithoutANorm(nn.Module):
    """A step between the layer and its activation is left out."""

    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.act, self.fc2 = nn.Linear(6, 8), None, nn.GELU(), nn.Linear(8, 6)

    def forward(self, x):
        x = self.fc1(x)
        if self.norm is not None:
            x = self.norm(x)
        x = self.act(x)
        return self.fc2(x)


@style(calls=2)
class GivenLayers(nn.Module):
    """A method that is given the layer; the report is undecided."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)

    def block(self, fc, x, act=True):
        y = fc(x)
        if act:
            y = F.relu(y)
        return y

    def forward(self, x):
        return self.block(self.fc3, self.block(self.fc2, self.block(self.fc1, x)), act=False)


@pytest.mark.parametrize(("cls", "sites", "calls"), STYLES)
def test_styles(cls, sites, calls):
    stock, fused = made(cls), fuse(made(cls))
    assert fused_places(report(fused)) == sites, str(report(fused))
    for training in (True, False):
        stock.train(training), fused.train(training)
        torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
    for _ in range(2):
        with fused_runs() as runs:
            fused(X)
        assert runs.ops == calls, str(report(fused))
    unfuse(fused)
    assert torch.equal(fused(X), stock(X))


def test_what_is_left_out_may_come_back():
    stock, fused = made(WithoutANorm), fuse(made(WithoutANorm))
    for norm in (nn.LayerNorm(8).double(), nn.Identity(), None):
        for model in (stock, fused):
            model.norm = norm
        torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)


def test_the_example_inputs_show_the_given_layers():
    model = fuse(made(GivenLayers), example_inputs=X, min_gain=0)
    assert fused_places(report(model)) == [("fc1", "relu"), ("fc2", "relu")]


class Asked(nn.Dropout):
    """A dropout that has a truth value of its own."""

    def __bool__(self):
        self.asked = getattr(self, "asked", 0) + 1
        return True


def test_a_module_with_a_truth_value_of_its_own():
    stock, fused = made(Tabular), made(Tabular)
    for model in (stock, fused):
        model.drop0 = Asked(0.0)
    fuse(fused)
    for _ in range(2):
        torch.testing.assert_close(numbers(fused, X), numbers(stock, X), rtol=1e-12, atol=1e-12)
        assert fused.drop0.asked == stock.drop0.asked
    with fused_runs() as runs:
        fused(X)
    assert runs.places == 1
