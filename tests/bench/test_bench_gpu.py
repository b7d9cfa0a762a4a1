"""The benchmark of a GPU, as far as it can be tried without one: clocks, rotation, floors, tables, dispatch."""

import inspect
import io
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from bench import command, contenders, figures, floors, harness, machine, peak, peers
from bench import record as records
from bench.__main__ import main, parser
from bench.clock import CudaClock
from bench.dispatch import run as dispatch
from bench.dispatch.run import Product
from bench.floors import Rates
from bench.grid import COLUMNS, DTYPES, GPU_SHAPES, MODES, SHAPES, Shape, shape_named
from bench.networks import blocks, chains, common, heads
from bench.record import Peak, Timing
from bench.table import show
from dlkernels import routing
from dlkernels.routing import Row, Table
from dlkernels.testing import Layer, LayerJudge
from tests.conftest import HAS_GPU

H200 = Rates(790e12, 4.3e12)  # operations and bytes per second
BF16 = 2


class Device:
    """A GPU that works behind the host's back: what is put into its stream takes ``cost`` milliseconds at the end."""

    def __init__(self):
        self.now, self.pending, self.synchronised = 0.0, [], 0

    def work(self, cost):
        self.pending.append(lambda: self.advance(cost))

    def advance(self, cost):
        self.now += cost

    def synchronize(self):
        for task in self.pending:
            task()
        self.pending = []
        self.synchronised += 1

    def event(self):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self):
        self.device.pending.append(lambda: setattr(self, "at", self.device.now))

    def elapsed_time(self, other):
        return other.at - self.at


def test_cuda_clock_times_what_the_device_did_between_the_events():
    device, costs = Device(), iter([2.0, 3.0, 5.0])

    def argument():
        device.work(100.0)  # not the step's
        return next(costs)

    clock = CudaClock(event=device.event, synchronize=device.synchronize)
    assert clock.sample(device.work, argument, 3) == pytest.approx([2e-3, 3e-3, 5e-3])
    assert device.synchronised == 1
    replays = CudaClock(repeats=4, event=device.event, synchronize=device.synchronize)
    assert replays.sample(device.work, lambda: 2.0, 1) == pytest.approx([0.5e-3])


def test_turns_of_replays_hold_as_many_calls_as_fit():
    """A call of 4 steps counts fourfold against the length of a turn; times are a step's."""
    device = Device()
    clock = CudaClock(repeats=4, event=device.event, synchronize=device.synchronize)
    steps = {"a": lambda _: device.work(2.0), "b": lambda _: device.work(1.0)}
    times = harness.take_turns(steps, lambda: None, budget=0.0, refill=False, clock=clock)
    assert (times["a"].median, times["b"].median) == pytest.approx((0.5e-3, 0.25e-3))
    assert {name: t.calls for name, t in times.items()} == {
        "a": int(harness.TURN / 2e-3),
        "b": int(harness.TURN / 1e-3),
    }


@pytest.mark.parametrize(("cache", "copies"), [(1, 1), (10_000, 6), (10**12, harness.MOST_COPIES)])
def test_rotation_is_larger_than_twice_the_cache(cache, copies):
    one = harness.draw(Shape("s", 8, 16, 32), "fp32", seed=1)  # 4 · (128 + 512 + 32 + 256) bytes
    sets = harness.rotation(one, 4, cache)
    assert len(sets) == 1 + copies
    assert len({i.x.data_ptr() for i in sets}) == len(sets)
    assert all(torch.equal(i.g, one.g) for i in sets[:3])


# The ceilings of fusion over ideal eager torch (mask and dbias as passes of their own), for forward and for the
# backward of kinds (a) and (b), at the rates of an H200; worked out by hand from the bytes each pass moves.
CEILINGS = {
    (256, 784, 256): (1.27, 1.12, 1.28),
    (8192, 4096, 4096): (1.09, 1.04, 1.09),
    (16384, 1024, 4096): (1.36, 1.15, 1.36),
    (65536, 128, 128): (1.94, 1.32, 1.97),
}


@pytest.mark.parametrize("sizes", CEILINGS, ids=str)
def test_floors_give_the_ceilings_of_fusion(sizes):
    shape = Shape("s", *sizes)
    y = shape.m * shape.n * BF16
    product = floors.forward(shape, BF16, H200, keeps_mask=False)
    eager_forward = product + 2 * y / H200.bandwidth  # ReLU reads and writes y
    eager_backward = 2 * product + (3 * y + y) / H200.bandwidth  # g, y to dz; dz to dbias
    found = (
        eager_forward / floors.forward(shape, BF16, H200, keeps_mask=True),
        eager_backward / floors.backward_a(shape, BF16, H200),
        eager_backward / floors.backward_b(shape, BF16, H200),
    )
    assert found == pytest.approx(CEILINGS[sizes], abs=0.011)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GPU_SHAPES)
def test_floors_are_in_order(name, mode):
    shape = GPU_SHAPES[name]
    a, b = (floors.step(shape, mode, BF16, H200, chained) for chained in (False, True))
    assert 0 < b <= a
    assert a >= shape.flops(mode) / H200.gemm
    if mode == "forward":
        assert a == b == floors.forward(shape, BF16, H200, keeps_mask=False)
    else:
        first = floors.step(shape, "first layer", BF16, H200, chained=True)
        assert first <= b, "without dx there is less to do"


def test_floor_of_a_chain():
    """The first layer makes no dx and the last one has no mask."""
    rows, sizes = 1000, [64, 32, 16]
    first, last = Shape("", rows, 64, 32), Shape("", rows, 32, 16)
    expected = floors.forward(first, BF16, H200, True) + floors.forward(last, BF16, H200, False)
    assert chains.floor_b(rows, sizes, BF16, False, H200) < expected
    expected += floors.backward_b(first, BF16, H200, need_dx=False) + floors.backward_b(last, BF16, H200)
    assert chains.floor_b(rows, sizes, BF16, True, H200) == pytest.approx(expected)


def made(ours=2e-3, best=3e-3):
    """The record of one layer on a GPU."""
    times = {
        name: Timing(t, t, t, 9) for name, t in (("stock", 4e-3), ("compile", best), (contenders.OURS, ours))
    }  # fmt: skip
    where = {"gpu": "NVIDIA H200", "driver": "580", "cuda": "13.0", "cpu": "c", "threads": 16, "isa": "avx2"}
    layer = records.Layer("llm-up", 16384, 1024, 4096, "bf16", "relu", [], {"quack": "ImportError: no"})
    layer.measurements = [records.Measurement(mode, "graph", times, {}) for mode in ("forward", "forward+backward")]
    return records.Record(
        created="2026-01-02T03:04:05+00:00",
        settings={},
        versions={"torch": "2.11.0"},
        commit={"hash": "b" * 40, "dirty": False},
        machine=where,
        peak=Peak({"bf16": 790e12}, [(8 << 30, 4.3e12)]),
        layers=[layer],
        complete=True,
    )


def test_shares_of_both_floors(tmp_path):
    result = made()
    result.save(tmp_path / "r.json")
    forward, step = figures.rows(records.load(tmp_path / "r.json"))
    shape = GPU_SHAPES["llm-up"]
    assert forward.share == forward.share_b == pytest.approx(floors.forward(shape, BF16, H200, False) / 2e-3)
    assert step.share == pytest.approx(floors.step(shape, "forward+backward", BF16, H200, False) / 2e-3)
    assert step.share_b == pytest.approx(floors.step(shape, "forward+backward", BF16, H200, True) / 2e-3)
    assert step.share_b < step.share


def test_table_of_a_gpu():
    console = Console(width=170, file=io.StringIO())
    show(made(ours=3.5e-3), console)
    text = console.file.getvalue()
    for line in (
        "NVIDIA H200, driver 580, CUDA 13.0; torch 2.11.0; commit bbbbbbbbbb; 2026-01-02",
        "of (a)",
        "of (b)",
        "Slower than the best other contender: 2 of 2",
        "0.86x llm-up, bf16, forward+backward, graph: compile",
        "REFUSED quack on llm-up bf16 relu, not timed: ImportError: no",
    ):
        assert line in text


@pytest.mark.skipif(HAS_GPU, reason="a GPU is here")
@pytest.mark.parametrize("module", ["bench", "bench.networks", "bench.dispatch"])
def test_without_a_gpu_it_stops_with_one_sentence(module):
    options = [] if module == "bench.dispatch" else ["--device", "cuda"]
    run = subprocess.run([sys.executable, "-m", module, *options], cwd=machine.ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"{module}: torch {torch.__version__} ")


def test_defaults_of_a_gpu():
    settings = command.settings(parser().parse_args(["--device", "cuda"]))
    assert settings.columns == COLUMNS["cuda"]
    assert list(settings.shapes) == [*SHAPES, "llm-square", "llm-up"]
    assert {"stock", "in-place", "compile", "addmm_activation", contenders.OURS} <= set(settings.contenders)
    assert not any("max-autotune" in name for name in settings.contenders)
    assert settings.device == "cuda"
    quick = command.settings(parser().parse_args(["--device", "cuda", "--quick", "--dtypes", "fp16"]))
    assert (quick.columns, quick.dtypes) == (("graph",), ["fp16"])
    assert shape_named("llm-up") == Shape("llm-up", 16384, 1024, 4096)
    with pytest.raises(SystemExit):
        main(["--columns", "graph"])  # a CPU has none


def test_only_peers_that_are_installed_run(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: name == "apex" or None)
    assert "apex" in contenders.names("cuda")
    assert "quack" not in contenders.names("cuda")
    assert not {"apex", "addmm_activation"} & set(contenders.names("cpu"))


def test_forward_only_contenders_are_judged_by_their_forward():
    drawn = harness.draw(Shape("small", 24, 48, 16), "fp32", seed=1)
    judge = LayerJudge(Layer(drawn.x, drawn.weight, drawn.bias, drawn.g, "relu"))
    op = contenders.make(["addmm_activation"], "relu")["addmm_activation"]
    assert judge.objection(op, backward=False) is None
    assert judge.objection(lambda x, w, b: op(x, w, b) * 1.01, backward=False).startswith("y: error")
    assert contenders.make(["addmm_activation"], "silu") == {}
    assert contenders.make(["addmm_activation"], "gelu") == {}, "its GELU is the tanh form"


def test_the_gelu_of_addmm_activation(monkeypatch):
    """cuBLASLt's GELU is the tanh form; torch's stand-in for it on CPU is not."""

    def on_a_gpu(bias, x, weight, *, use_gelu):
        assert use_gelu
        return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", on_a_gpu)
    drawn = harness.draw(Shape("small", 24, 48, 16), "fp32", seed=1)
    judge = LayerJudge(Layer(drawn.x, drawn.weight, drawn.bias, drawn.g, "gelu_tanh"))
    op = contenders.make(["addmm_activation"], "gelu_tanh")["addmm_activation"]
    assert judge.objection(op, backward=False) is None


# ---- peers of heads and blocks: stand-ins for libraries that are not installed here ----------------------------------


class Liger:
    """Liger's autograd function, as far as it is called: the loss, and a second result."""

    @staticmethod
    def apply(x, weight, target):
        return F.cross_entropy(F.linear(x, weight), target), None


def quack_mlp(x, up, down, activation):
    assert activation == "gelu_tanh_approx"
    return F.linear(F.gelu(F.linear(x, up), approximate="tanh"), down)


@pytest.fixture
def stand_ins(monkeypatch):
    """Modules in place of Liger and quack."""

    def module(name, **content):
        for parent in (name.split(".")[0], name.rpartition(".")[0], name):
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        for key, value in content.items():
            monkeypatch.setattr(sys.modules[name], key, value, raising=False)

    module("liger_kernel.ops.fused_linear_cross_entropy", LigerFusedLinearCrossEntropyFunction=Liger)
    module("quack.mlp", mlp_func=quack_mlp)


SMALL_HEAD, SMALL_BLOCK = (24, 16, 40, torch.float32, "cpu"), (24, 16, 32, common.Asked(torch.float32, "cpu"))


def test_peers_of_heads_and_blocks(stand_ins):
    calls, missing = heads.head(*SMALL_HEAD, peers.HEADS)
    assert {"stock", "liger", common.OURS} <= set(calls) and not missing
    block = blocks.Block(*SMALL_BLOCK, peers.BLOCKS)
    block.refuse_wrong()
    assert list(block.forward()) == list(block.forward_backward()) == ["stock", common.OURS, "quack"]
    assert not block.refused
    for call in [*calls.values(), *block.forward().values(), *block.forward_backward().values()]:
        call()


def test_peers_that_are_not_there_have_a_reason(monkeypatch):
    for name in ("liger_kernel", "quack"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails, also where it is installed
    calls, missing = heads.head(*SMALL_HEAD, peers.HEADS)
    assert "liger" not in calls and "liger_kernel" in missing["liger"]
    block = blocks.Block(*SMALL_BLOCK, peers.BLOCKS)
    block.refuse_wrong()
    assert list(block.calls) == ["stock", common.OURS]
    assert "quack" in block.refused["quack"]


def test_peers_that_fail_or_are_wrong_have_a_reason():
    wrong, refuses = (lambda *given: 2 * Liger.apply(*given)[0]), (lambda *_: 1 / 0)
    calls, missing = heads.head(*SMALL_HEAD, {"wrong": lambda: wrong, "refuses": lambda: refuses})
    assert set(calls).isdisjoint(missing)
    assert missing["wrong"].startswith("error ") and missing["refuses"].startswith("ZeroDivisionError")
    twice = {"wrong": lambda: lambda x, weights: 2 * quack_mlp(x, *weights, "gelu_tanh_approx")}
    block = blocks.Block(*SMALL_BLOCK, twice)
    block.refuse_wrong()
    assert list(block.calls) == ["stock", common.OURS] and block.refused["wrong"].startswith("error ")


def test_our_own_wrong_results_are_an_error():
    one = torch.ones(2)
    gradients = {"stock": lambda: (one,), common.OURS: lambda: (torch.zeros(2),)}
    with pytest.raises(AssertionError, match="error 1, stock's"):
        common.right(gradients, (one.double() + 1e-7,), {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H200", "nvidia-h200"), ("A100-SXM4-80GB", "a100-sxm4-80gb"), (" GeForce (R) 9 ", "geforce-r-9")],
)
def test_file_names_of_gpus(name, expected):
    assert machine.slug(name) == expected


def test_sources_without_git_may_name_their_commit(monkeypatch):
    monkeypatch.setattr(machine, "_git", lambda *arguments: None)
    assert machine.commit() == {"hash": None, "dirty": None}
    monkeypatch.setenv("DLKERNELS_COMMIT", "abc")
    assert machine.commit() == {"hash": "abc", "dirty": None}


class HostEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return max(1e-6, 1e3 * (end.at - self.at))


class HostGraph:
    """Replays by running the steps again."""

    def __init__(self, steps):
        self.steps = steps
        self.replay()

    def replay(self):
        for step in self.steps:
            step()


@pytest.fixture
def host_as_gpu(monkeypatch):
    """Everything of the GPU's benchmark but the GPU: its clock, graphs and memory are the host's."""
    where = {"gpu": "Some GPU", "driver": "1", "cuda": "13.0", "gpu_l2": 1 << 14}
    on_cpu = {name: getattr(module, name) for module, name in ((harness, "draw"), (peak, "_gemm"), (peak, "_copying"))}
    monkeypatch.setattr(machine, "no_gpu", lambda: None)
    monkeypatch.setattr(machine, "_gpu", lambda: where)
    monkeypatch.setattr(machine, "last_level_cache", lambda device="cpu": where["gpu_l2"])
    monkeypatch.setattr(harness, "draw", lambda shape, dtype, seed, device: on_cpu["draw"](shape, dtype, seed))
    monkeypatch.setattr(harness, "clock_of", lambda device: CudaClock())
    monkeypatch.setattr(harness, "Graph", HostGraph)
    monkeypatch.setattr(peak, "_SECONDS", 0.001)
    monkeypatch.setattr(peak, "_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(peak, "_gemm", lambda dtype, device: on_cpu["_gemm"](dtype, "cpu"))
    monkeypatch.setattr(peak, "_copying", lambda size, device: on_cpu["_copying"](size, "cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 20))
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_the_whole_run_of_a_gpu(host_as_gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(contenders._MAKERS, "addmm_activation", refuses_capture)
    names = ["stock", "in-place", "addmm_activation", contenders.OURS]
    line = ["--device", "cuda", "--shapes", "24x48x16", "--dtypes", "fp32", "--budget", "0.01", "--contenders", *names]
    assert main([*line, "--out", str(tmp_path / "r.json")]) == 0
    text = capsys.readouterr().out
    assert "Some GPU, driver 1, CUDA 13.0" in text
    assert "as a graph on 24x48x16 fp32 relu, not timed: RuntimeError: not while capturing" in text
    (layer,) = records.load(tmp_path / "r.json").layers
    measured = {(m.mode, m.column): set(m.times) for m in layer.measurements}
    with_gradients = set(names) - {"addmm_activation"}
    assert measured == {
        ("forward", "plain"): set(names),
        ("forward", "graph"): with_gradients,
        ("forward+backward", "plain"): with_gradients,
        ("forward+backward", "graph"): with_gradients,
    }
    assert all(t.q20 <= t.median <= t.q80 for m in layer.measurements for t in m.times.values())


def test_nothing_to_replay_is_no_timing(host_as_gpu, monkeypatch):
    def no_graph(steps):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(harness, "Graph", no_graph)
    sets = [harness.draw(Shape("s", 8, 16, 32), "fp32", 1, "cuda")]
    times, refused = harness.measure_replays({"a": lambda x, w, b: x}, sets, "forward", 0.01)
    assert (times, refused) == ({}, {"a": "RuntimeError: operation not permitted when stream is capturing"})


def refuses_capture(activation):
    """Right when called one by one; as what is captured it waits for the device."""

    def op(x, w, b):
        if any(frame.function == "replay" for frame in inspect.stack()):
            raise RuntimeError("not while capturing")
        return torch.relu(torch.nn.functional.linear(x, w, b))

    return op


# ---- the dispatch table ----------------------------------------------------------------------------------------------

HEAD = Table("cuda", "a GPU", "", "2.13.0", "0.1.0", False, ())
EMPTY = HEAD.text()
ONE, TWO = Product(90, "bf16", 256, 256, 784, "forward"), Product(90, "bf16", 256, 256, 784, "wgrad")
OTHER = Product(80, "fp32", 8, 16, 32, "dgrad")


def test_rows_are_sorted_and_read_back():
    rows = {TWO: "simt", ONE: "mma", OTHER: "cublas"}
    times = {"simt": {TWO: 2e-6}, "mma": {ONE: 1e-6, TWO: 3e-6}, "cublas": {OTHER: 1e-5}}
    table = dispatch.with_rows(HEAD, rows, times, "2026-11-28", "abc")
    assert table.rows == (
        Row("dgrad", "float32", 8, 16, 32, 80, "cublas", {"cublas": 10.0}, "2026-11-28", "abc"),
        Row("forward", "bfloat16", 256, 256, 784, 90, "mma", {"mma": 1.0}, "2026-11-28", "abc"),
        Row("wgrad", "bfloat16", 256, 256, 784, 90, "simt", {"simt": 2.0, "mma": 3.0}, "2026-11-28", "abc"),
    )
    text = table.text()
    assert dispatch.parse(text) == rows
    assert dispatch.with_rows(table, rows, {}, "later", "other").text() == text, "nothing was measured again"
    assert dispatch.with_rows(HEAD, {}, {}, "", "").text() == EMPTY


def test_rows_of_chains_stay():
    """``tune`` measures them; two of them may have the same rows, in_features and out_features."""
    us = {"fused_mlp": 1.0, "layers": 2.0}
    chains = tuple(
        Row("mlp_forward", "bfloat16", 256, 4, 8, 90, "fused_mlp", us, "today", "", hidden=hidden)
        for hidden in ((64,), (64, 64))
    )
    table = dispatch.with_rows(replace(HEAD, rows=chains), {ONE: "mma"}, {"mma": {ONE: 1e-6}}, "2026-11-28", "abc")
    assert table.rows[1:] == chains and table.rows[0].op == "forward"
    assert dispatch.parse(table.text()) == {ONE: "mma"}


@pytest.mark.parametrize(
    "text",
    ["", "[]", EMPTY[:-4], EMPTY + EMPTY, EMPTY.replace("cuda", "cpu"), EMPTY.replace('"rows": [', '"rows": [1')],
    ids=["empty", "list", "cut", "twice", "cpu", "row"],
)
def test_a_damaged_table_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|JSON"):
        dispatch.parse(text)


def test_the_committed_tables_are_sound():
    for file in routing.SHIPPED.glob("cuda-*.json"):
        dispatch.parse(file.read_text())
    assert dispatch.table_of("NVIDIA H200").name == "cuda-nvidia-h200.json"


def test_the_fastest_path_is_chosen_and_noise_changes_nothing():
    times = {"simt": {ONE: 5.0, TWO: 1.00}, "mma": {ONE: 2.0, TWO: 0.98}, "hopper": {ONE: 1.0}}
    assert dispatch.choose({}, times) == {ONE: "hopper", TWO: "mma"}
    old = {ONE: "mma", TWO: "simt", OTHER: "cublas"}
    assert dispatch.choose(old, times) == {ONE: "hopper", TWO: "simt", OTHER: "cublas"}
    assert dispatch.choose({ONE: "gone"}, times)[ONE] == "hopper"


def test_update_takes_the_better_of_two_rounds(tmp_path):
    table, asked = tmp_path / "t.json", []
    rounds = {"simt": iter([{ONE: 9.0}, {ONE: 1.0}]), "mma": iter([{ONE: 2.0}, {ONE: 2.0}])}

    def measure(path, cublas):
        asked.append(path)
        return next(rounds[path])

    assert dispatch.update(table, HEAD, ("simt", "mma"), measure, "today", "abc") == ({ONE: "simt"}, 1)
    assert asked == ["simt", "mma", "simt", "mma"]
    assert dispatch.parse(table.read_text()) == {ONE: "simt"}
    (row,) = routing.parse(table.read_text()).rows
    assert (row.us, row.date, row.commit) == ({"simt": 1e6, "mma": 2e6}, "today", "abc")
    assert dispatch.update(table, HEAD, ("mma",), lambda path, cublas: {TWO: 1.0}, "later", "def") == (
        {ONE: "simt", TWO: "mma"},
        1,
    ), "the other row stays"


def test_a_path_that_fails_is_left_out(tmp_path, capsys):
    table = tmp_path / "t.json"
    table.write_text(EMPTY)

    def measure(path, cublas):
        if path == "hopper":
            raise RuntimeError("no such kernel")
        return {ONE: 2.0}

    assert dispatch.update(table, HEAD, ("hopper", "mma"), measure, "", "") == ({ONE: "mma"}, 1)
    assert "bench.dispatch: hopper is left out: no such kernel" in capsys.readouterr().err


def test_every_class_is_timed_once():
    found = [dispatch.class_of(shape) for shape in dispatch.shapes()]
    assert len(set(found)) == len(found)
    assert {dispatch.class_of(shape) for shape in GPU_SHAPES.values()} <= set(found)
    assert [dispatch.products(90, "bf16", Shape("any", 256, 784, 256))[at] for at in (0, 2)] == [ONE, TWO]
    assert set(dispatch._NAMES) == set(DTYPES)


def test_gradients_share_the_time_of_the_backward_that_makes_both():
    taken = {"forward": 1.0, "dgrad": 3.0, "wgrad": 1.0}

    def one_read(products):  # a second gradient costs nothing beyond the first
        return taken["forward"] + max((taken[p] for p in products if p != "forward"), default=0)

    assert dispatch.shares(one_read) == {"forward": 1.0, "dgrad": 2.25, "wgrad": 0.75}
    assert dispatch.shares(lambda products: sum(taken[p] for p in products)) == taken


def test_cublas_is_timed_first_and_the_table_is_written_after_every_path(tmp_path):
    table, asked = tmp_path / "t.json", []

    def measure(path, cublas):
        asked.append((path, dict(cublas), dispatch.parse(table.read_text()) if table.exists() else None))
        return {"simt": {ONE: 3.0}, "mma": {ONE: 1.0}, "cublas": {ONE: 2.0}}[path]

    dispatch.update(table, HEAD, ("simt", "mma", "cublas"), measure, "", "", rounds=1)
    assert asked == [
        ("cublas", {}, None),
        ("simt", {ONE: 2.0}, {ONE: "cublas"}),
        ("mma", {ONE: 2.0}, {ONE: "cublas"}),
    ]
    assert dispatch.parse(table.read_text()) == {ONE: "mma"}


def test_what_cannot_come_near_cublas_is_not_timed():
    large, half = (Product(90, dtype, 8192, 4096, 4096, "forward") for dtype in ("fp32", "bf16"))
    assert dispatch.hopeless("simt", large, {large: 2e-3})  # 137 G multiplications: 8 ms on plain FMAs
    assert not dispatch.hopeless("simt", large, {large: 4e-3})
    assert not dispatch.hopeless("mma", half, {half: 0.4e-3})
    assert not dispatch.hopeless("simt", large, {}), "cuBLAS was not timed"
    assert not dispatch.hopeless("hopper", half, {half: 1e-9}), "nothing is known about it"


SHAPES_ASKED = [("bf16", Shape("any", 256, 784, 256)), ("fp32", Shape("other", 8, 16, 32))]


def test_a_path_is_timed_in_a_process_of_its_own(monkeypatch):
    def run(line, env, stdout, **options):
        assert env[dispatch.VARIABLE] == "mma"
        assert dispatch.read_asked(Path(line[-1])) == (SHAPES_ASKED, {TWO: 2.0})
        stdout.write('[[90, "bf16", 256, 256, 784, "forward"], 0.5]\n')
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(dispatch.subprocess, "run", run)
    assert dispatch.time_path("mma", SHAPES_ASKED, {TWO: 2.0}) == {ONE: 0.5}
    monkeypatch.setattr(dispatch.subprocess, "run", lambda line, **o: subprocess.CompletedProcess(line, 3))
    with pytest.raises(RuntimeError, match="DLKERNELS_CUDA_GEMM=mma: exit status 3"):
        dispatch.time_path("mma", SHAPES_ASKED, {})

    def hang(line, timeout, **options):
        raise subprocess.TimeoutExpired(line, timeout)

    monkeypatch.setattr(dispatch.subprocess, "run", hang)
    with pytest.raises(RuntimeError, match="DLKERNELS_CUDA_GEMM=mma: no layer within 300 s"):
        dispatch.time_path("mma", SHAPES_ASKED, {})


def test_what_was_timed_before_the_time_ran_out_counts(monkeypatch):
    def slow(line, stdout, timeout, **options):
        stdout.write('[[90, "bf16", 256, 256, 784, "forward"], 0.5]\n[[90, "bf16", 256')
        raise subprocess.TimeoutExpired(line, timeout)

    monkeypatch.setattr(dispatch.subprocess, "run", slow)
    assert dispatch.time_path("mma", SHAPES_ASKED, {}, patience=1) == {ONE: 0.5}


def test_a_wrong_path_is_never_timed(monkeypatch):
    shape = Shape("any", 5000, 33, 17)
    dispatch.refuse_wrong(shape, "fp32", "cpu")
    monkeypatch.setattr(dispatch.functional, "linear_relu", lambda x, w, b: torch.relu(x @ w.t() + 1.001 * b))
    with pytest.raises(RuntimeError, match="wrong at 5000, 33→17 in fp32: y: error"):
        dispatch.refuse_wrong(shape, "fp32", "cpu")
