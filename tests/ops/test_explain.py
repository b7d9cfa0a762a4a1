"""explain() tells the truth: about the instruction set, the path, and why."""

import json
from itertools import pairwise, product

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dlkernels import _C, functional
from tests.support.subprocess_utils import python


def paths(x, weight):
    return {row.op: row.path for row in functional.explain(x, weight)}


def layer(m, n, k, dtype=torch.float32):
    return torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)


def library_products(x, weight):
    """How many products torch's own GEMM did in forward and in backward."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    counts, results = [], []
    for step in (
        lambda: functional.linear_relu(x, weight),
        lambda: torch.autograd.grad(results[0].sum(), (x, weight)),
    ):
        with profile(activities=[ProfilerActivity.CPU]) as prof:
            results.append(step())
        counts.append(sum(e.count for e in prof.key_averages() if e.key in ("aten::mm", "aten::addmm")))
    return tuple(counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 64), (8, 70, 100), (20, 70, 100), (40, 50, 30), (300, 64, 64)], ids=str)
def test_path_is_the_one_taken(shape, dtype):
    """torch's GEMM runs exactly where explain() says "aten"."""
    x, weight = layer(*shape, dtype)
    told = paths(x, weight)
    expected = (int(told["forward"] == "aten"), sum(told[op] == "aten" for op in ("dgrad", "wgrad")))
    assert library_products(x, weight) == expected


@pytest.mark.parametrize("shape", [*product((0, 3), repeat=3)], ids=str)
def test_layers_of_nothing(shape):
    """Planning divides by sizes: a division by 0 would end the process."""
    code = "from dlkernels.functional import explain; import torch, sys; m, n, k = map(int, sys.argv[1:])\n"
    code += "for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):\n"
    code += "    print(*(row.op for row in explain(torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype))))"
    assert python("-c", code, *map(str, shape)).splitlines() == ["forward dgrad wgrad"] * 4


def test_rows_and_reasons():
    for rows in (functional.explain(*layer(5, 100, 100)), functional.explain(*layer(500, 100, 100))):
        assert [row.op for row in rows] == ["forward", "dgrad", "wgrad"]
        for row in rows:
            assert row.path in ("packed", "few_rows", "few_columns", "aten")
            assert row.kernel == _C.cpu_kernels()["float32"]
            assert len(row.why) > 10
            assert row.splits >= 1
    assert {row.path for row in functional.explain(*layer(1, 512, 512))} == {"few_rows"}
    assert {row.path for row in functional.explain(*layer(512, 512, 512))} == {"packed"}
    (_, _, wgrad) = functional.explain(*layer(65536, 64, 64))
    assert wgrad.splits > 1, "a tall batch is cut"


def test_a_batch_that_has_no_view_as_rows_is_copied_first():
    """So that its own strides say nothing about the path."""
    x = torch.randn(70, 3, 2).permute(2, 1, 0)
    weight = torch.randn(9, 70)
    assert x.stride(-1) != 1
    assert functional.explain(x, weight) == functional.explain(x.contiguous(), weight)


def test_strides_decide():
    x, weight = layer(4, 100, 100)
    assert paths(x, weight)["forward"] == "few_rows"
    assert paths(x.t().contiguous().t(), weight)["forward"] == "packed"
    assert paths(x, weight.t().contiguous().t())["dgrad"] == "packed"


_ASK = """
import dataclasses, json, torch
from dlkernels import _C, functional
rows = functional.explain(torch.ones(200, 64), torch.ones(50, 64))
print(json.dumps([_C.cpu_kernels(), [dataclasses.asdict(r) for r in rows]]))
"""


def ask(**environment):
    return json.loads(python("-c", _ASK, **environment))


def test_library_gemm_on_request():
    _, rows = ask(DLKERNELS_CPU_GEMM="aten")
    assert {row["path"] for row in rows} == {"aten"}
    assert all("DLKERNELS_CPU_GEMM=aten" in row["why"] for row in rows)


def test_instruction_set_on_request():
    kernels, rows = ask(DLKERNELS_CPU_ISA="portable", DLKERNELS_CPU_GEMM="own")
    assert kernels["isa"] == "portable"
    assert all("portable" in row["kernel"] and row["path"] == "packed" for row in rows)


_TRANSPOSED = """
import torch
from dlkernels import _C, functional
torch.set_num_threads(2)
print(_C.cpu_kernels()["isa"], functional.explain(torch.ones(32, 3136), torch.ones(512, 3136)).forward[0].scratch_bytes)
"""


def test_scratch_of_a_product_that_is_multiplied_as_its_transpose():
    isa, scratch = python("-c", _TRANSPOSED, DLKERNELS_CPU_ISA="avx2", DLKERNELS_CPU_GEMM="own").split()
    if isa != "avx2":
        pytest.skip("only AVX2 multiplies the transpose")
    assert int(scratch) >= 32 * 3136 * 4, "x is packed once, for all tiles of rows of weight"


def test_explain_mlp_names_the_chain_where_it_runs():
    def paths_of(m, sizes, **kind):
        weights = [torch.randn(n, k, **kind) for k, n in pairwise(sizes)]
        return [
            {row.path for row in rows} for rows in functional.explain_mlp(torch.randn(m, sizes[0], **kind), weights)
        ]

    assert paths_of(4096, [64, 32, 10]) == [{"fused_mlp"}, {"fused_mlp"}]
    assert paths_of(4096, [64, 128, 10], dtype=torch.bfloat16) == [{"fused_mlp"}, {"fused_mlp"}]
    assert paths_of(300, [300, 100, 10]) == [{"packed"}, {"few_columns"}]
    assert paths_of(4096, [784, 100, 10]) == [{"packed"}, {"few_columns"}]
    assert paths_of(4096, [64, 32]) == [{"packed"}]
    (rows,) = functional.explain_mlp(*(t := layer(300, 400, 500))[:1], t[1:])
    assert rows == functional.explain(*t)
    with pytest.raises(RuntimeError):
        functional.explain_mlp(torch.randn(3, 4), [torch.randn(5, 4), torch.randn(6, 7)])


_THREADS = """
import torch
from dlkernels import _C, functional
x, weights = torch.empty(1024, 256), [torch.empty(256, 256), torch.empty(256, 256)]
for threads in (4, 5):
    torch.set_num_threads(threads)
    plan = functional.explain_mlp(x, weights)
    print(_C.cpu_kernels()["isa"], plan[0][0].path, plan.backward is not None, plan.why[1])
"""


def test_explain_mlp_asks_for_the_number_of_threads_in_use():
    """On AVX2 four threads take four slices of rows, and five work layer by layer."""
    four, five = python("-c", _THREADS, DLKERNELS_CPU_ISA="avx2").splitlines()
    if not four.startswith("avx2"):
        pytest.skip("only AVX2 has such a rule")
    assert four == ("avx2 fused_mlp True narrow layers: a block of rows goes through all of them while it is in cache")
    assert five == "avx2 packed False fewer slices of rows than threads: layer by layer all of them work"


def test_a_chain_of_no_layers_is_refused():
    with pytest.raises(RuntimeError, match="mlp: expected at least one layer, got no weights"):
        functional.explain_mlp(torch.randn(3, 4), [])


def test_the_plan_of_a_layer():
    plan = functional.explain(*layer(2000, 300, 200), "gelu")
    (forward,) = plan.forward
    assert (forward.kind, forward.path, forward.makes) == ("forward", "packed", ("y", "z"))
    assert forward.fused == ("bias", "gelu")
    assert [step.makes for step in plan.backward] == [("dx",), ("dweight", "dbias")]
    assert all("dz made while grad_y is loaded" in step.fused for step in plan.backward)
    assert plan.keeps == ("x", "weight", "z")
    assert functional.explain(*layer(2000, 300, 200)).keeps == ("x", "weight", "y")
    assert functional.explain(*layer(2000, 300, 200), "none").keeps == ("x", "weight")
    assert plan.scratch_bytes > 0, "a tall batch has its weight packed once for all tiles"
    without = functional.explain(*layer(2000, 300, 200), bias=False)
    assert without.forward[0].fused == ("relu",) and without.backward[1].makes == ("dweight",)


def test_the_plan_around_torch_s_gemm():
    code = "import torch; from dlkernels import explain; print(explain(torch.ones(500, 64), torch.ones(50, 64)))"
    text = python("-c", code, DLKERNELS_CPU_GEMM="aten")
    assert "1. forward -> y; aten (torch's GEMM); fused: bias\n" in text
    assert "2. activation_pass -> y; elementwise\n" in text
    assert "1. gradient_pass -> dz, dbias; elementwise" in text


def test_a_plan_prints_its_steps_and_reasons():
    text = str(functional.explain(*layer(20000, 1, 32)))
    assert text.startswith("x [20000, 32], weight [1, 32], relu, float32 on cpu")
    assert "1. backward -> dx, dweight, dbias; few_columns" in text
    assert "scratch" in text and "keeps for backward: x, weight, y" in text
    assert "wgrad by few_columns: few columns: x is read where it lies" in text


def test_the_plan_of_several_layers():
    x, weights = torch.randn(300, 300), [torch.randn(96, 300), torch.randn(80, 96)]
    plan = functional.explain_mlp(x, weights, "relu")
    assert plan.forward is None and plan.backward is None
    assert "activation gradient of the layer below" in plan[1].backward[0].fused
    assert "activation gradient of the layer below" not in plan[0].backward[0].fused
    assert "dz made while grad_y is loaded" not in plan[0].backward[0].fused, "dgrad of the layer above made dz"
    assert plan[0].forward[0].fused == ("bias", "relu") and plan[1].forward[0].fused == ("bias",)
    narrow = functional.explain_mlp(torch.randn(4096, 64), [torch.randn(32, 64), torch.randn(10, 32)])
    assert narrow.backward is not None and narrow.backward.splits > 1 and narrow.backward.scratch_bytes > 0
    assert narrow.forward is not None and narrow.forward.makes == ("y",)
    assert "one kernel" in str(narrow)
    assert narrow.backward.makes == ("dx", "dweight", "dbias")
    without = functional.explain_mlp(torch.randn(4096, 64), [torch.randn(32, 64), torch.randn(10, 32)], bias=False)
    assert without.backward is not None and without.backward.makes == ("dx", "dweight")
    with pytest.raises(ValueError, match="for 2 weights expected 1 activations"):
        functional.explain_mlp(x, weights, ["relu", "relu"])


def test_an_empty_layer_has_nothing_to_do():
    plan = functional.explain(torch.randn(3, 0), torch.randn(5, 0))
    assert [step.makes for step in plan.backward] == [("dbias",)], "dx and dweight have no elements"
    assert functional.explain(torch.randn(0, 4), torch.randn(5, 4)).forward == ()
    assert "forward: nothing to do" in str(functional.explain(torch.randn(0, 4), torch.randn(5, 4)))


@pytest.mark.skipif(_C.build_config()["cuda"] is not None, reason="this build has CUDA kernels")
def test_a_build_for_cpu_explains_no_cuda():
    with pytest.raises(RuntimeError, match="no CUDA kernels"):
        _C.explain_mlp(True, False, [(4, 3, 2)], "float32", 1, False)
    assert _C.explain_mlp(False, False, [], "float32", 1, False)[0] == 0
