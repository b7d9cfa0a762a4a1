"""Exported files run without this package, in standard operators, on any batch, and agree with the model."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from dlkernels import fuse, losses
from dlkernels._ops.activations import ACTIVATIONS
from dlkernels._ops.decompositions import DECOMPOSITIONS
from dlkernels.nn import MLP, LinearAct, LinearCrossEntropyLoss
from dlkernels.serving import check, decompose, export_onnx, export_program, onnx
from dlkernels.serving.decompose import operators
from dlkernels.serving.export import ExportError
from dlkernels.testing.agreement import arguments, judge
from tests.support.paths import CSRC
from tests.support.subprocess_utils import python


class Attention(nn.Module):
    """A block as in a transformer, with a mask as keyword argument, tokens as input and two outputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)

    def forward(self, tokens, mask=None):
        h = self.block(self.embed(tokens), src_key_padding_mask=mask)
        return {"scores": self.down(self.act(self.up(h)))[:, 0], "hidden": h}


def convolutions():
    """Fused, with batch statistics."""
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 12), nn.LeakyReLU(0.1)]
    return fuse(nn.Sequential(*layers, nn.Linear(12, 4)))


MASK = torch.tensor([[False, False, True, True], [False] * 4])
MODELS = {
    "mlp": lambda: (MLP([6, 12, 8, 3], "gelu_tanh", dropout=0.3), torch.rand(1, 6)),
    "normalised": lambda: (MLP([6, 12, 3], "relu2", norm="batch"), (torch.rand(5, 6),)),
    "convolutions": lambda: (convolutions(), torch.rand(3, 1, 5, 5)),
    "attention": lambda: (fuse(Attention()), {"mask": MASK, "tokens": torch.randint(11, (2, 4))}),
}


def made(name):
    torch.manual_seed(0)
    model, example = MODELS[name]()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)  # batch statistics that show
    return model, example


def seven(example):
    """A batch size that was neither traced nor checked."""
    return check.random_inputs(example, 7, seed=99)


def call(model, inputs):
    with torch.no_grad():
        out = (
            model(**inputs) if isinstance(inputs, dict) else model(*inputs if isinstance(inputs, tuple) else (inputs,))
        )
    return list(out.values()) if isinstance(out, dict) else [out]


# ---- dlkernels operators as torch's ----------------------------------------------------------------------------------


def test_every_forward_operator_has_a_form_in_torch():
    """All operators except those that only eager calls use: derivatives, autocast's and the whole training step."""
    defined = set(re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "ops" / "binding.cpp").read_text()))
    assert len(defined) > 8
    forward = {name for name in defined if not re.search("_backward$|^_act_derivative$|^_mlp_loss$|_autocast", name)}
    assert {op._schema.name.removeprefix("dlkernels::") for op in DECOMPOSITIONS} == forward


class Everything(nn.Module):
    def __init__(self, reduction, dtype):
        super().__init__()
        self.layers = nn.ModuleList(
            LinearAct(4, 5, bias=name != "tanh", activation=name, negative_slope=0.2, dtype=dtype)
            for name in ACTIVATIONS
        )
        weight = torch.rand(5, dtype=dtype)
        self.head = LinearCrossEntropyLoss(
            4, 5, bias=True, weight=weight, reduction=reduction, label_smoothing=0.1, dtype=dtype
        )
        self.reduction = reduction

    def forward(self, x, classes):
        y = [layer(x) for layer in self.layers]
        values = {"reduction": self.reduction}
        return (
            *y,
            self.head(x, classes),
            losses.cross_entropy(y[0], classes, self.head.weight, ignore_index=2, label_smoothing=0.2, **values),
            losses.cross_entropy(y[0], y[1].softmax(1), **values),
            losses.mse_loss(y[0], y[1], **values),
            losses.gaussian_nll_loss(y[0], y[1], y[2].abs(), full=True, eps=0.01, **values),
        )


@pytest.mark.parametrize(("reduction", "dtype"), [("mean", torch.float64), ("none", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_decomposed_program_computes_the_same(reduction, dtype, grad):
    model = Everything(reduction, dtype)
    x, classes = torch.randn(6, 4, dtype=dtype), torch.randint(5, (6,))
    x[0, 0] = float("nan") if reduction == "none" else 0.0
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x, classes))
    assert any(name.startswith("dlkernels.") for name in operators(program))
    decomposed = decompose(program)
    assert not any(name.startswith("dlkernels.") for name in operators(decomposed))
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    for ours, theirs in zip(decomposed.module()(x, classes), model(x, classes), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)


# ---- torch.export ----------------------------------------------------------------------------------------------------

WITHOUT_US = """
import sys, torch
sys.modules["dlkernels"] = None  # importing it fails
for folder in sys.argv[1:]:
    args, kwargs, expected = torch.load(f"{folder}/data.pt")
    out = torch.export.load(f"{folder}/model.pt2").module()(*args, **kwargs)
    for ours, theirs in zip(out.values() if isinstance(out, dict) else [out], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
assert not hasattr(torch.ops.dlkernels, "_linear_act_forward")
print("the same")
"""


def test_programs_run_where_the_package_is_not(tmp_path):
    for name in MODELS:
        (tmp_path / name).mkdir()
        model, example = made(name)
        done = export_program(model, example, tmp_path / name / "model.pt2")
        size = max(check.batch_size(example), 2)
        assert (done.batch_sizes, bool(done.agreement)) == ((1, size + 1), True)
        assert 0 <= done.difference < 1e-5
        assert str(done.path) in str(done) and f"torch {torch.__version__}" in str(done)
        inputs = seven(example)
        torch.save((*arguments(inputs), call(model.eval(), inputs)), tmp_path / name / "data.pt")
    assert python("-c", WITHOUT_US, *(str(tmp_path / name) for name in MODELS)).strip() == "the same"


FULL_DISK = """
import resource, sys, torch
from dlkernels.nn import MLP
from dlkernels.serving import export_program
model, example = MLP([64, 64, 2]), torch.rand(3, 64)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    export_program(model, example, sys.argv[1])
except OSError as error:
    print(error.filename)
"""


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    """The limit of the size of a file stands for the disk. torch itself would end the process."""
    assert python("-c", FULL_DISK, str(tmp_path / "model.pt2")).strip() == str(tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_model_is_left_as_it_was(tmp_path):
    model = MLP([4, 5, 6, 2], dropout=0.5)
    model[0].eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    example = torch.rand(3, 4)
    state = torch.get_rng_state()
    export_program(model, example, tmp_path / "model.pt2")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in model.parameters())


def test_fixed_batch(tmp_path):
    class Pairs(nn.Module):
        def forward(self, x):
            return x.view(4, 6).sum(1)

    with pytest.raises(ExportError, match=r"cannot trace Pairs.*give dynamic_batch=False"):
        export_program(Pairs(), torch.rand(4, 6), tmp_path / "model.pt2")
    done = export_program(Pairs(), torch.rand(4, 6), tmp_path / "model.pt2", dynamic_batch=False)
    assert done.batch_sizes == (4,)
    with pytest.raises(ExportError, match="a batch of at least one sample"):
        export_program(Pairs(), torch.rand(0, 6), tmp_path / "model.pt2")


def test_refuses_what_it_cannot_trace(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"torch\.export cannot trace Branches: ."):
        export_program(Branches(), torch.rand(4, 6), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [export_program, export_onnx])
def test_wrong_program_is_not_kept(tmp_path, monkeypatch, write):
    """If the decomposition of an operator is wrong, the earlier file stays."""
    if write is export_onnx:
        pytest.importorskip("onnxscript")
    path = tmp_path / "model"
    path.write_text("older")
    for op, form in DECOMPOSITIONS.items():
        if op._schema.name.endswith("_linear_act_forward"):
            monkeypatch.setitem(DECOMPOSITIONS, op, lambda *args, form=form: form(*args) * 1.0001)
    with pytest.raises(ExportError, match="DO NOT AGREE"):
        write(MLP([4, 8, 2]), torch.rand(3, 4), path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def onnxruntime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", MODELS)
def test_onnx_is_standard_and_takes_any_batch(name, tmp_path, onnxruntime):
    import onnx as onnx_package

    model, example = made(name)
    done = export_onnx(model, example, tmp_path / "model.onnx")
    assert done.runtime.startswith("onnxruntime ") and done.agreement
    graph = onnx_package.load(done.path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert {put.type.tensor_type.shape.dim[0].dim_param for put in graph.input} == {"batch"}

    inputs = seven(example)
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    named = (
        inputs
        if isinstance(inputs, dict)
        else dict(
            zip(
                [put.name for put in session.get_inputs()],
                inputs if isinstance(inputs, tuple) else (inputs,),
                strict=True,
            )
        )
    )
    out = session.run(None, {name: t.numpy() for name, t in named.items()})
    for ours, theirs in zip(out, call(model.eval(), inputs), strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "runtime"),
    [(torch.float64, "onnxruntime"), (torch.float16, "onnxruntime"), (torch.bfloat16, "ONNX's reference evaluator")],
    ids=str,
)
def test_onnx_dtypes(tmp_path, onnxruntime, dtype, runtime):
    done = export_onnx(MLP([6, 12, 3], dtype=dtype), torch.rand(3, 6, dtype=dtype), tmp_path / "model.onnx")
    assert done.runtime.startswith(runtime)
    assert export_program(MLP([6, 12, 3], dtype=dtype), torch.rand(3, 6, dtype=dtype), tmp_path / "model.pt2").agreement


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="needs onnx and onnxscript: run pip install"):
        export_onnx(MLP([4, 2]), torch.rand(3, 4), tmp_path / "model.onnx")


def test_onnx_without_a_runtime(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    real = onnx.find_spec
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    done = export_onnx(MLP([4, 3, 2]), torch.rand(3, 4), tmp_path / "model.onnx")
    assert done.runtime.startswith("ONNX's reference evaluator")


# ---- the new inputs --------------------------------------------------------------------------------------------------


def test_fresh_inputs_are_legal_and_new():
    example = {"tokens": torch.tensor([[3, 5], [5, 9]]), "scale": torch.tensor(2.0), "x": torch.ones(2, 3)}
    inputs = check.random_inputs(example, 50, seed=1)
    assert {name: tuple(t.shape) for name, t in inputs.items()} == {"tokens": (50, 2), "scale": (), "x": (50, 3)}
    assert set(inputs["tokens"].flatten().tolist()) == {3, 5, 9}
    assert inputs["x"].std() > 0.1
    again = check.random_inputs(example, 50, seed=1)
    assert all(torch.equal(t, again[name]) for name, t in inputs.items())


# ---- the judge -------------------------------------------------------------------------------------------------------


class Scores(nn.Module):
    """Scores and the best class; always in float32, so that a float64 copy of the model fails."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        z = self.layer(x.to(torch.float32))
        return z, z.argmax(1)


def test_judge():
    model, x = Scores().eval(), torch.rand(5, 6)
    z, best = call(model, (x,))[0]
    near = z * (1 + torch.finfo(torch.float32).eps)
    assert judge([z, best], model, x) and judge([near, best], model, x)
    for wrong in ([z * 1.0001, best], [z, best + 1], [z[:4], best], [z.double(), best], [z], [z, best, z]):
        assert not judge(wrong, model, x)
    z = z.clone()
    z[0, 0] = float("nan")
    assert not judge([z, best], model, x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # the model's own error, not hidden
        judge([z, best], model, torch.rand(5, 7))


def test_model_without_a_float64_copy(tmp_path):
    assert export_program(Scores(), torch.rand(2, 6), tmp_path / "model.pt2").agreement
