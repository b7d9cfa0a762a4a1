"""Malformed calls: each raises a Python exception that says what was expected and what came."""

import re

import pytest
import torch

from dlkernels import functional
from dlkernels.nn import MLP, LinearAct, LinearReLU
from tests.support.subprocess_utils import python

X, W, B = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5)
G = torch.ones(3, 5)
ops = torch.ops.dlkernels


def act(x=X, w=W, b=B, activation="relu", **kw):
    return functional.linear_act(x, w, b, activation, **kw)


def forward(x=X, w=W, b=B, code=1, slope=0.0):
    return ops._linear_act_forward(x, w, b, code, slope)


def backward(g=G, x=X, w=W, saved=G, code=1, needs=(True, True, True)):
    return ops._linear_act_backward(g, x, w, saved, code, 0.0, *needs)


def quantized(t):
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


FORMATS = "float64, float32, bfloat16 or float16"
# name: (call, exception, what the message must say: expected, then got)
CALLS = {
    # shapes
    "x is a scalar": (lambda: act(torch.tensor(1.0)), RuntimeError, r"x must be \[\.\.\., in_.*0-dimensional"),
    "weight is a vector": (lambda: act(w=W[0]), RuntimeError, r"weight must be \[out_features, in_features\].*\[4\]"),
    "weight is 3-D": (lambda: act(w=W[None]), RuntimeError, r"weight must be \[out_.*got shape \[1, 5, 4\]"),
    "features differ": (lambda: act(X[:, :3]), RuntimeError, r"in_features = 4 .*\[5, 4\].*\[3, 3\]"),
    "weight transposed": (lambda: act(w=W.t(), b=None), RuntimeError, r"in_features = 5.*\[3, 4\]"),
    "empty x": (lambda: act(X[:, :0]), RuntimeError, r"in_features = 4.*\[3, 0\]"),
    "bias too short": (lambda: act(b=B[:3]), RuntimeError, r"bias must be \[out_features\] = \[5\], got shape \[3\]"),
    "bias would broadcast": (lambda: act(b=B[:1]), RuntimeError, r"bias must be .*\[5\], got shape \[1\]"),
    "bias is 2-D": (lambda: act(b=B[None]), RuntimeError, r"bias must be .*\[5\], got shape \[1, 5\]"),
    "bias is a scalar tensor": (lambda: act(b=B[0]), RuntimeError, r"bias must be .*\[5\], got shape \[\]"),
    "module fed other features": (lambda: LinearReLU(2, 3)(X), RuntimeError, r"in_features = 2.*\[3, 4\]"),
    # dtypes
    **{
        f"all {dtype}": (lambda d=dtype: act(X.to(d), W.to(d), B.to(d)), TypeError, f"expected {FORMATS} .*got {name}")
        for dtype, name in [(torch.int32, "Int"), (torch.int64, "Long"), (torch.uint8, "Byte"), (torch.bool, "Bool"),
                            (torch.complex64, "ComplexFloat"), (torch.complex128, "ComplexDouble"),
                            (torch.float8_e4m3fn, "Float8_e4m3fn")]
    },
    "x float64": (lambda: act(X.double()), RuntimeError, "weight has dtype Float but x has dtype Double.*convert"),
    "weight bfloat16": (lambda: act(w=W.bfloat16()), RuntimeError, "weight has dtype BFloat16 but x has dtype Float"),
    "bias float16": (lambda: act(b=B.half()), RuntimeError, "bias has dtype Half but x has dtype Float"),
    "integer weight": (lambda: act(w=W.long()), RuntimeError, "weight has dtype Long but x has dtype Float"),
    "complex bias": (lambda: act(b=B.cfloat()), RuntimeError, "bias has dtype ComplexFloat but x has dtype Float"),
    "module fed float64": (lambda: LinearReLU(4, 3)(X.double()), RuntimeError, "dtype Float but x has dtype Double"),
    # layouts and devices
    "x sparse": (lambda: act(X.to_sparse()), RuntimeError, r"x must be a dense.*got layout Sparse.*to_dense"),
    "weight sparse": (lambda: act(w=W.to_sparse()), RuntimeError, "weight must be a dense.*got layout Sparse"),
    "bias sparse": (lambda: act(b=B.to_sparse()), RuntimeError, "bias must be a dense.*got layout Sparse"),
    "x CSR": (lambda: act(X.to_sparse_csr()), RuntimeError, "x must be a dense.*got layout SparseCsr"),
    "weight CSC": (lambda: act(w=W.to_sparse_csc()), RuntimeError, "weight must be a dense.*got layout SparseCsc"),
    "x quantized": (lambda: act(quantized(X)), RuntimeError, r"x must be floating point, got a quantized.*QInt8"),
    "weight quantized": (lambda: act(w=quantized(W)), RuntimeError, r"weight must be floating point, got a quantized"),
    "x mkldnn": (lambda: act(X.to_mkldnn()), RuntimeError, "x must be a dense.*got layout Mkldnn"),
    "weight mkldnn": (lambda: act(w=W.to_mkldnn()), RuntimeError, "weight must be a dense.*got layout Mkldnn"),
    "weight on meta": (lambda: act(w=W.to("meta")), RuntimeError, "weight is .* on meta, but x is .* on cpu"),
    "x on meta": (lambda: act(X.to("meta")), RuntimeError, "weight is .* on cpu, but x is .* on meta"),
    "bias on meta": (lambda: act(b=B.to("meta")), RuntimeError, "bias is .* on meta, but x is .* on cpu"),
    "integers on meta": (lambda: act(X.int().to("meta"), W.int().to("meta"), None), TypeError,
                         f"expected {FORMATS} .*got torch.int32"),
    "shapes on meta": (lambda: act(X[:, :3].to("meta"), W.to("meta"), None), RuntimeError,
                       r"x must be.*\(3, 3\).*\(5, 4\)"),
    # no tensors
    "x is a list": (lambda: act([[1.0]]), TypeError, "must be tensors.*got list, Tensor, Tensor"),
    "x is nested": (lambda: act(torch.nested.as_nested_tensor([X], layout=torch.jagged)), TypeError, "a nested one"),
    "x is None": (lambda: act(None), TypeError, "must be tensors.*got NoneType, Tensor, Tensor"),
    "x is an array": (lambda: act(X.numpy()), TypeError, "must be tensors.*got ndarray"),
    "weight is None": (lambda: act(w=None), TypeError, "must be tensors.*got Tensor, NoneType"),
    "bias is a number": (lambda: act(b=1.0), TypeError, "bias a tensor or None.*got Tensor, Tensor, float"),
    "bias is a bool": (lambda: act(b=True), TypeError, "bias a tensor or None.*got Tensor, Tensor, bool"),
    # activations
    "unknown activation": (lambda: act(activation="relu6"), ValueError, "one of none, relu, .*sigmoid; got 'relu6'"),
    "activation in capitals": (lambda: act(activation="ReLU"), ValueError, "one of .*; got 'ReLU'"),
    "activation is None": (lambda: act(activation=None), ValueError, "one of .*; got None"),
    "activation is a function": (lambda: act(activation=torch.relu), ValueError, "one of .*; got <"),
    "activation is unhashable": (lambda: act(activation=["relu"]), ValueError, r"one of .*; got \['relu'\]"),
    "negative slope": (lambda: act(activation="leaky_relu", negative_slope=-1.0), ValueError, "must be >= 0.*got -1"),
    "slope is NaN": (lambda: act(activation="leaky_relu", negative_slope=float("nan")), ValueError, ">= 0.*got nan"),
    "slope is a string": (lambda: act(negative_slope="0.1"), TypeError, r"must be a number, got '0.1' \(str\)"),
    "slope is None": (lambda: act(negative_slope=None), TypeError, "^linear_act: negative_slope .*got None"),
    "slope of mlp is None": (lambda: functional.mlp(X, [W], negative_slope=None), TypeError, "mlp: negative_slope"),
    # sequences
    "mlp of None": (lambda: functional.mlp(X, None), TypeError, "mlp: weights must be a sequence .*got NoneType"),
    "mlp of a number": (lambda: functional.mlp(X, 3), TypeError, "mlp: weights must be a sequence of tensors, got int"),
    "biases are a number": (lambda: functional.mlp(X, [W], 1.0), TypeError, "mlp: biases must be .*None, got float"),
    "activations are None": (lambda: functional.mlp(X, [W], None, None), TypeError, "activation must.*got NoneType"),
    "linear_relu takes no activation": (lambda: functional.linear_relu(X, W, B, "gelu"), TypeError, "positional"),
    # modules
    "layer of negative size": (lambda: LinearReLU(-1, 3), ValueError, "in_features must be at least 0, got -1"),
    "layer of fractional size": (lambda: LinearReLU(2, 2.5), TypeError, r"out_features must be an integer, got 2.5"),
    "layer sized by a string": (lambda: LinearReLU("2", 2), TypeError, "in_features must be an integer, got '2'"),
    "layer of unknown activation": (lambda: LinearAct(2, 3, activation="x"), ValueError, "one of .*got 'x'"),
    "layer with slope NaN": (lambda: LinearAct(2, 3, negative_slope=float("nan")), ValueError, "at least 0, got nan"),
    "layer with slope None": (lambda: LinearAct(2, 3, negative_slope=None), TypeError, "must be a number, got None"),
    "LinearReLU takes no activation": (lambda: LinearReLU(2, 3, activation="gelu"), TypeError, "activation"),
    "layer of integers": (lambda: LinearReLU(2, 3, dtype=torch.int32), RuntimeError, "floating point"),
    "checkpoint of other shape": (lambda: LinearReLU(4, 3).load_state_dict(LinearReLU(4, 2).state_dict()), RuntimeError,
                                  r"\[2, 4\].*\[3, 4\]"),
    "MLP without sizes": (lambda: MLP([]), ValueError, r"at least an input and an output size, got \[\]"),
    "MLP of one size": (lambda: MLP([3]), ValueError, r"at least an input and an output size, got \[3\]"),
    "MLP of a number": (lambda: MLP(7), TypeError, "sequence of integers, got 7"),
    "MLP of negative size": (lambda: MLP([3, -1, 2]), ValueError, "at least 0, got -1"),
    "MLP of fractional size": (lambda: MLP([3, 4.5]), TypeError, "an integer, got 4.5"),
    "MLP of unknown activation": (lambda: MLP([3, 2], activation="x"), ValueError, "one of .*got 'x'"),
    "MLP norm, unknown activation": (lambda: MLP([3, 4, 2], "x", norm="layer"), ValueError, "one of .*got 'x'"),
    "MLP drops all": (lambda: MLP([3, 2], dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    "MLP drops NaN": (lambda: MLP([3, 2], dropout=float("nan")), ValueError, r"in \[0, 1\), got nan"),
    "MLP drops a string": (lambda: MLP([3, 2], dropout="0.1"), TypeError, "dropout must be a number, got '0.1'"),
    "MLP of unknown norm": (lambda: MLP([3, 2], norm="group"), ValueError, "None, 'batch' or 'layer', got 'group'"),
    "MLP of two norms": (lambda: MLP([3, 2], norm=["batch"]), ValueError, r"'batch' or 'layer', got \['batch'\]"),
    # explain
    "explain integers": (lambda: functional.explain(X.int(), W.int()), TypeError, f"expected {FORMATS}.*got.*int32"),
    "explain shapes": (lambda: functional.explain(X, W[:, :2]), RuntimeError, r"\(3, 4\) and \(5, 2\)"),
    "explain sparse": (lambda: functional.explain(X.to_sparse(), W), TypeError, "x must be a dense.*sparse_coo"),
    "explain lists": (lambda: functional.explain([1.0], W), TypeError, "must be tensors.*got list"),
    "explain meta": (lambda: functional.explain(X.to("meta"), W.to("meta")), NotImplementedError, "x is on meta"),
    "explain weight on meta": (lambda: functional.explain(X, W.to("meta")), RuntimeError,
                               "weight is on meta, but x is on cpu"),
    # the private operators, called with garbage
    "code too large": (lambda: forward(code=99), ValueError, r"activation code in \[0, 9\), got 99"),
    "code negative": (lambda: forward(code=-1), ValueError, r"activation code in \[0, 9\), got -1"),
    "code of 2**62": (lambda: forward(code=2**62), ValueError, f"got {2**62}"),
    "code is text": (lambda: forward(code="relu"), RuntimeError, "type 'int'.*'act'.*'str'"),
    "raw negative slope": (lambda: forward(slope=-0.5), ValueError, "must be >= 0.*got -0.5"),
    "arguments missing": (lambda: ops._linear_act_forward(X, W), RuntimeError, "missing value for argument 'bias'"),
    "backward code": (lambda: backward(code=77), ValueError, "got 77"),
    "backward without x": (lambda: backward(x=None), RuntimeError, "gradient of weight needs x, got None"),
    "backward without weight": (lambda: backward(w=None), RuntimeError, "gradient of x needs weight, got None"),
    "backward, short saved": (lambda: backward(saved=G[:2]), RuntimeError, r"grad_y's shape \[3, 5\], got \[2, 5\]"),
    "backward, short x": (lambda: backward(x=X[:2]), RuntimeError, r"sizes of grad_y \(\[3, 5\]\), got \[2, 4\]"),
    "backward, x of other features": (lambda: backward(x=X[:, :2]), RuntimeError, r"x must be .*got \[3, 2\]"),
    "backward, x of other rank": (lambda: backward(x=X[None]), RuntimeError, r"x must be .*got \[1, 3, 4\]"),
    "backward, weight transposed": (lambda: backward(w=W.t()), RuntimeError, r"out_features = 5.*got \[4, 5\]"),
    "backward, weight a vector": (lambda: backward(w=W[:, 0]), RuntimeError, r"weight must be .*got \[5\]"),
    "backward, g a scalar": (lambda: backward(g=G[0, 0]), RuntimeError, r"grad_y must be .*0-dimensional"),
    "backward, g sparse": (lambda: backward(g=G.to_sparse()), RuntimeError, "grad_y must be a dense.*layout Sparse"),
    "backward, saved sparse": (lambda: backward(saved=G.to_sparse()), RuntimeError, "saved must be a dense.*Sparse"),
    "backward, saved on meta": (lambda: backward(saved=G.to("meta")), RuntimeError, "saved is .* meta, but grad_y"),
    "backward, mixed dtypes": (lambda: backward(w=W.double()), RuntimeError, "weight has dtype Double but grad_y"),
    "backward of integers": (lambda: backward(G.int(), X.int(), W.int(), G.int()), TypeError, f"{FORMATS} .*got Int"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("name", CALLS)
def test_malformed_call(name):
    call, exception, says = CALLS[name]
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    assert re.search(says, str(caught.value), re.DOTALL), f"the message is: {caught.value}"


def test_a_failed_call_leaves_everything_usable():
    for call, exception, _ in CALLS.values():
        with pytest.raises(exception):
            call()
    assert torch.equal(act(), torch.full((3, 5), 5.0))


def test_malformed_calls_do_not_crash_a_process():
    """All malformed calls run in one new interpreter, which then exits normally. Here a crash would end pytest."""
    script = """
import warnings; warnings.simplefilter("ignore")
from tests.ops import test_errors
raised = 0
for call, exception, _ in test_errors.CALLS.values():
    try:
        call()
    except exception:
        raised += 1
print(raised)
"""
    assert int(python("-c", script)) == len(CALLS) >= 40


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [("DLKERNELS_CPU_ISA", "sse9", "must be one of portable, .*got 'sse9'"),
     ("DLKERNELS_CPU_GEMM", "blas", "must be own or aten, got 'blas'")],
)  # fmt: skip
def test_bad_environment_variables(variable, value, says):
    """The first call raises, and so does the next one."""
    script = """
import torch
from dlkernels import functional
x, w = torch.ones(3, 4), torch.ones(5, 4)
for call in (functional.linear_relu, functional.explain):
    for _ in range(2):
        try:
            call(x, w)
        except RuntimeError as e:
            print(e)
"""
    messages = python("-c", script, **{variable: value})
    assert len(re.findall(f"{variable} {says}", messages)) == 4, messages


@pytest.mark.parametrize("code", [-1, 9])
def test_codes_of_the_backward_in_torch(code):
    ops, g = torch.ops.dlkernels, torch.ones(2, 4)
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match=rf"activation code in \[0, 9\), got {code}"):
        ops._linear_act_differentiable_backward(g, None, x, w, g, None, code, 0.0, True, True, True, False)
    with pytest.raises(ValueError, match=rf"activation code in \[0, 9\), got {code}"):
        ops._act_derivative(g, g, code, 0.0, 1)
