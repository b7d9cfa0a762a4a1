"""``tune``: a path is judged, timed beside stock, and taken only where it is right and ahead."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dlkernels
from bench.grid import SHAPES
from dlkernels import functional, routing, tuning
from dlkernels.__main__ import main
from dlkernels.tuning import Size, clock, layers, measurement
from dlkernels.tuning.measurement import choose
from dlkernels.tuning.table import empty_table

SMALL = (40, 70, 30)  # rows, in_features, out_features

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def times(monkeypatch):
    """Microseconds by a clock in place of the real one: by path for forward, by pair of paths, and "stock"."""
    given = {"stock": 1.0}

    def invented(layer, contenders, seconds):
        return {key: given.get(key, 9.0) for key in contenders}, given["stock"]

    monkeypatch.setattr(measurement, "time_forward", invented)
    monkeypatch.setattr(measurement, "time_backward", invented)
    return given


def paths(m, k, n, dtype=torch.float32):
    x, weight = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
    return {row.op: row.path for row in functional.explain(x, weight)}


def test_choices():
    assert choose({"packed": 0.5, "aten": 0.9}, 1.0, "packed", "aten") == "packed"
    assert choose({"packed": 0.9, "aten": 0.5}, 1.0, "packed", "aten") == "aten"
    assert choose({"packed": 0.90, "aten": 0.89}, 1.0, "packed", "aten") == "packed", "noise changes nothing"
    assert choose({"packed": 1.04, "aten": 1.02}, 1.0, "packed", "aten") == "aten", "behind stock"
    assert choose({"packed": 1.05, "aten": 1.2}, 1.0, "packed", "aten") == "aten", "all are behind stock"
    assert choose({"packed": 1.02, "aten": 1.2}, 1.0, "packed", "aten") == "packed", "within noise of stock"
    assert choose({"packed": 1.02, "aten": 1.01}, 1.0, "packed", "aten") == "packed", "nor does it here"
    assert choose({"packed": 1.2, "few_rows": 1.1}, 1.0, "packed", "aten") == "aten", "even if torch's was judged wrong"


@pytest.mark.parametrize("seed", range(20))
def test_routes_never_take_a_path_that_the_table_ranks_behind_stock(times, seed):
    """For any times, a written path is not behind stock by more than noise, or it is torch's GEMM."""
    draw = random.Random(seed)
    shape = draw.choice([(4, 100, 30), (40, 70, 30), (300, 64, 8), (300, 65, 200)])
    dtype = draw.choice(["float32", "bfloat16"])
    every = ("packed", "few_rows", "few_columns", "aten")
    times.update({key: draw.uniform(0.5, 2) for key in (*every, *itertools.product(every, every))})
    table = dlkernels.tune(shapes=[shape], dtypes=[dtype])
    assert len(table.rows) == 3
    told = paths(*shape, getattr(torch, dtype))
    for row in table.rows:
        assert told[row.op] == row.path
        assert row.path == "aten" or row.us[row.path] < 1.031 * row.us["stock"]
    pair = tuple(row.path for row in table.rows[1:])
    assert pair == ("aten", "aten") or times[pair] < 1.031, "together, too"


def test_a_wrong_path_is_not_timed(times, monkeypatch):
    """packed is fastest on this clock, and wrong by a thousandth."""
    right = functional.linear_relu
    times.update({"packed": 0.1, ("packed", "packed"): 0.1, "aten": 0.5, ("aten", "aten"): 0.5})

    def wrong(x, weight, bias):
        packed = functional.explain(x, weight)[0].path == "packed"
        return right(x, weight, bias) * (1.001 if packed else 1)

    monkeypatch.setattr(functional, "linear_relu", wrong)
    told = []
    table = dlkernels.tune(shapes=[SMALL], dtypes=["float32"], told=told.append)
    assert {row.path for row in table.rows} == {"aten"}
    assert all("packed" not in row.us for row in table.rows)
    assert "rounding units" in told[0].refused["packed"]
    assert "packed is left out: y: error" in str(told[0])
    assert all(row.refused == ("packed",) for row in table.rows)


@pytest.fixture
def judged(monkeypatch):
    """Paths that the judge finds wrong, and why."""
    wrong = {}
    monkeypatch.setattr(measurement, "objections", lambda layer, takes: {p: wrong[p] for p in takes if p in wrong})
    return wrong


def test_a_path_that_is_judged_wrong_now_is_no_longer_taken(times, judged):
    """It was right at first, as before an update of torch or of the compiler."""
    before = torch.get_num_threads()
    times.update({"packed": 0.5, ("packed", "packed"): 0.5, "aten": 0.9, ("aten", "aten"): 0.9})
    try:
        torch.set_num_threads(2)
        dlkernels.tune(shapes=[SMALL], dtypes=["float32"])
        torch.set_num_threads(1)
        assert {row.path for row in dlkernels.tune(shapes=[SMALL], dtypes=["float32"]).rows} == {"packed"}
        judged["packed"] = "y: too far off"
        table = dlkernels.tune(shapes=[SMALL], dtypes=["float32"])
        assert [(row.where, row.path, row.refused) for row in table.rows] == [(1, "aten", ("packed",))] * 3
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert set(paths(*SMALL).values()) == {"aten"}, threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("every", [False, True])
def test_a_wrong_path_is_out_of_use_though_nothing_could_be_timed(times, judged, monkeypatch, every):
    times.update({"packed": 0.5, ("packed", "packed"): 0.5})
    dlkernels.tune(shapes=[SMALL], dtypes=["float32"])
    judged.update({"packed": "y: too far off"} | ({"aten": "y: too far off"} if every else {}))

    def busy(*args):
        raise clock.Unsteady

    monkeypatch.setattr(measurement, "time_forward", busy)
    told = []
    table = dlkernels.tune(shapes=[SMALL], dtypes=["float32"], told=told.append)
    refused = ("packed", "aten") if every else ("packed",)
    assert [(row.path, row.us, row.refused) for row in table.rows] == [("aten", {}, refused)] * 3
    assert set(paths(*SMALL).values()) == {"aten"}
    assert "forward aten not timed" in str(told[0])
    assert ("the measurement is at fault" in str(told[0])) == every
    assert ("the machine is busy" in str(told[0])) == (not every), "with no right path there is nothing to time"


def test_the_fastest_right_path_is_taken_though_torch_s_is_judged_wrong(times, judged):
    judged["aten"] = "y: too far off"
    times.update({"packed": 0.5, ("packed", "packed"): 2.0})
    told = []
    table = dlkernels.tune(shapes=[SMALL], dtypes=["float32"], told=told.append)
    assert [row.path for row in table.rows] == ["packed", "aten", "aten"], (
        "behind stock, torch's GEMM is taken all the same"
    )
    assert set(paths(*SMALL).items()) == {(row.op, row.path) for row in table.rows}
    assert "torch's own GEMM was judged wrong: the measurement is at fault" in str(told[0])


def test_every_path_is_measured_on_the_real_clock(cache, monkeypatch):
    monkeypatch.setattr(clock, "STEADY", 1e9)  # other tests may run beside this one
    table = dlkernels.tune(shapes=[SMALL, (4, 128, 30)], dtypes=["float32"], seconds=0.02)
    assert [(row.m, row.op) for row in table.rows] == [(m, op) for m in (4, 40) for op in routing.OPS]
    for row in table.rows:
        timed = {"stock", "packed", "aten"} | ({"few_rows"} if row.m == 4 else set())
        assert set(row.us) == timed and all(0 < time < 1e6 for time in row.us.values())
        assert (row.where, row.dtype, len(row.date)) == (torch.get_num_threads(), "float32", 10)
    file = cache / routing.tuned_name()
    assert routing.read(file, "") == table and routing.in_use() == (table,)
    assert paths(*SMALL) == {row.op: row.path for row in table.rows if row.m == 40}


def test_earlier_rows_stay_and_the_same_product_is_measured_anew(times, cache):
    dlkernels.tune(shapes=[SMALL, (50, 600, 30)], dtypes=["float32"])
    assert set(paths(*SMALL).values()) == {"aten"}, "no path is ahead"
    times.update({"packed": 0.5, ("packed", "packed"): 0.5})
    table = dlkernels.tune(shapes=[SMALL], dtypes=["float32", "float64"])
    assert [(row.m, row.dtype, row.path) for row in table.rows if row.op == "forward"] == [
        (40, "float64", "packed"), (40, "float32", "packed"), (50, "float32", "aten")
    ]  # fmt: skip
    assert set(paths(*SMALL).values()) == {"packed"} and set(paths(50, 600, 30).values()) == {"aten"}
    stale = (cache / routing.tuned_name()).read_text().replace(torch.__version__, "2.0.0")
    (cache / routing.tuned_name()).write_text(stale)
    assert len(dlkernels.tune(shapes=[SMALL], dtypes=["float32"]).rows) == 3, "rows of another torch do not stay"


def test_tables_of_other_versions_and_kinds_lose_nothing(times, cache, monkeypatch):
    here = dlkernels.tune(shapes=[SMALL], dtypes=["float32"])
    dlkernels.tune(shapes=[SMALL], dtypes=["float64"], any_threads=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        assert len(dlkernels.tune(shapes=[(50, 600, 30)], dtypes=["float32"]).rows) == 3
    assert len(list(cache.glob("*.json"))) == 3
    assert routing.read(cache / routing.tuned_name(), "") == here
    routing.install()
    assert [(one.any_threads, len(one.rows)) for one in routing.in_use()] == [(False, 3), (True, 3)]


def test_rows_that_another_process_writes_meanwhile_stay(times, cache):
    def another(layer):
        if layer.size.m == SMALL[0]:  # between the measurement and the writing of its rows
            dlkernels.tune(shapes=[(50, 600, 30)], dtypes=["float32"])

    table = dlkernels.tune(shapes=[SMALL, (60, 300, 30)], dtypes=["float32"], told=another)
    assert {row.m for row in table.rows} == {row.m for row in routing.in_use()[0].rows} == {40, 50, 60}


_WRITER = """
import sys
from pathlib import Path
from dlkernels.routing import Row
from dlkernels.tuning.table import add_rows, empty_table
for m in range(20):
    row = Row("forward", "float32", m + 1, int(sys.argv[2]), 8, 1, "aten", {"stock": 1.0, "aten": 1.0}, "today", "")
    add_rows(Path(sys.argv[1]), empty_table(False), True, [row])
"""


def test_two_processes_that_write_one_table_lose_no_row(tmp_path):
    file = tmp_path / "table.json"
    command = [sys.executable, "-c", _WRITER, str(file)]
    writers = [subprocess.Popen([*command, n], env={**os.environ, "DLKERNELS_ROUTES": "default"}) for n in "12"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(routing.read(file, "").rows) == 40


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("my thesis", "is no route table and stays as it is"),
        ('{"format": 1}', "is no route table and stays as it is"),
        (None, r"is a route table of another kind .*: torch is 2\.0\.0, here it would be .*name another file"),
    ],
)
def test_a_file_that_is_no_table_of_here_is_not_overwritten(times, tmp_path, text, why):
    file = tmp_path / "mine.json"
    file.write_text(text or replace(empty_table(any_threads=False), torch="2.0.0").text())
    before, measured = file.read_text(), []
    with pytest.raises(tuning.TuneError, match=why):
        dlkernels.tune(shapes=[SMALL], dtypes=["float32"], out=file, told=measured.append)
    assert file.read_text() == before and not measured


def test_a_table_elsewhere_counts_where_the_variable_names_it(times, tmp_path, monkeypatch):
    times.update({"aten": 0.5, ("aten", "aten"): 0.5})
    file = tmp_path / "mine.json"
    table = dlkernels.tune(shapes=[SMALL], dtypes=["float32"], out=file)
    assert (table.name, table.source, routing.in_use()) == ("mine.json", "file", ())
    monkeypatch.setenv(routing.VARIABLE, str(file))
    table = dlkernels.tune(shapes=[(50, 600, 30)], dtypes=["float32"], out=file)
    assert len(table.rows) == 6 and routing.in_use() == (table,)


def test_rows_for_another_number_of_threads_stay(times):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        dlkernels.tune(shapes=[SMALL], dtypes=["float32"])
        assert paths(*SMALL)["forward"] == "aten"
        torch.set_num_threads(2)
        assert paths(*SMALL)["forward"] == "packed", "nothing was measured with 2"
        times.update({"packed": 0.5})
        assert {row.where for row in dlkernels.tune(shapes=[SMALL], dtypes=["float32"]).rows} == {1, 2}
        torch.set_num_threads(1)
        assert paths(*SMALL)["forward"] == "aten"
    finally:
        torch.set_num_threads(before)


def test_a_layer_that_a_busy_machine_measured_gets_no_row(monkeypatch, cache):
    def busy(steps, seconds):
        attempts.append(len(steps))
        return [[1.0, 1.0, 2.0, 2.0, 2.0]] * len(steps)

    attempts, told = [], []
    monkeypatch.setattr(clock, "take_turns", busy)
    assert dlkernels.tune(shapes=[SMALL], dtypes=["float32"], told=told.append).rows == ()
    assert attempts == [3] * clock.ATTEMPTS, "stock and two paths"
    assert "no row, the machine is busy" in str(told[0])
    assert not cache.exists()
    monkeypatch.setattr(clock, "take_turns", lambda steps, seconds: [[1.0, 1.0, 1.0, 1.0, 9.0]] * len(steps))
    assert len(dlkernels.tune(shapes=[SMALL], dtypes=["float32"]).rows) == 3


def test_an_interruption_loses_nothing(times, cache):
    def stop(layer):
        told.append(layer)
        if len(told) == 2:
            raise KeyboardInterrupt

    told = []
    with pytest.raises(KeyboardInterrupt):
        dlkernels.tune(shapes=[SMALL, (50, 600, 30)], dtypes=["float32"], told=stop)
    assert {row.m for row in routing.read(cache / routing.tuned_name(), "").rows} == {40}
    assert paths(*SMALL)["forward"] == "aten", "and the routes are taken"


def test_a_table_is_whole_or_absent(times, cache, monkeypatch):
    dlkernels.tune(shapes=[SMALL], dtypes=["float32"])
    before = (cache / routing.tuned_name()).read_text()
    monkeypatch.setattr(measurement, "choose", lambda times, stock, usual, library: usual)  # behind stock
    with pytest.raises(routing.RouteError, match="not clearly slower than stock"):
        dlkernels.tune(shapes=[SMALL], dtypes=["float32"])
    assert (cache / routing.tuned_name()).read_text() == before
    name = routing.tuned_name()
    assert {file.name for file in cache.iterdir()} == {name, f".{name}.lock"}


def test_routes_are_back_after_an_error(monkeypatch):
    def fail(*args):
        raise RuntimeError("the clock stopped")

    monkeypatch.setattr(clock, "take_turns", fail)
    before = paths(*SMALL)
    with pytest.raises(RuntimeError, match="the clock stopped"):
        dlkernels.tune(shapes=[SMALL], dtypes=["float32"])
    assert paths(*SMALL) == before


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.chain = dlkernels.nn.MLP([20, 16, 12])
        self.ours = dlkernels.nn.LinearReLU(12, 9)
        self.stock = nn.Linear(9, 7)
        self.unused = nn.Linear(7, 7)
        self.last = nn.Linear(7, 5).double()

    def forward(self, x, *, scale):
        h = F.relu(self.stock(self.ours(self.chain(x)))) * scale
        return self.last(h.double())


@pytest.mark.parametrize("fused", [False, True])
def test_the_layers_of_a_model_are_found(fused):
    model = Parts()
    if fused:
        dlkernels.fuse(model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    found = layers.sizes_of(model, {"x": torch.randn(2, 3, 20), "scale": 2.0})
    expected = [(20, 16), (16, 12), (12, 9), (9, 7)]
    assert found == [*(Size(6, k, n, "float32") for k, n in expected), Size(6, 7, 5, "float64")]
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks and model.training


def test_a_model_is_tuned(times):
    model = nn.Sequential(nn.Linear(70, 30), nn.ReLU()).bfloat16()
    times.update({"aten": 0.5, ("aten", "aten"): 0.5})
    table = dlkernels.tune(model, torch.randn(40, 70).bfloat16())
    assert {(row.dtype, row.m, row.k, row.n, row.path) for row in table.rows} == {("bfloat16", 40, 70, 30, "aten")}
    assert set(paths(40, 70, 30, torch.bfloat16).values()) == {"aten"}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"shapes": [(1, 2)]}, r"expected \(rows, in_features, out_features\) of at least 1, got \(1, 2\)"),
        ({"shapes": [(0, 2, 3)]}, "of at least 1"),
        ({"shapes": [(1, 2.0, 3)]}, "of at least 1"),
        ({"dtypes": ["float8"]}, "expected dtypes from float64, float32, bfloat16, float16; got float8"),
        ({"seconds": 0}, "expected seconds above 0"),
        ({"example_inputs": 3}, "expected a model for the example inputs"),
        ({"model": nn.Linear(2, 2), "example_inputs": torch.ones(0, 2)}, "no linear layer"),
        ({"model": nn.ReLU(), "example_inputs": torch.ones(2)}, "no linear layer"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_measured_is_refused(arguments, why):
    with pytest.raises((ValueError, tuning.TuneError), match=why):
        dlkernels.tune(**arguments)


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return F.linear(x, self.w)


@pytest.mark.parametrize(
    ("model", "inputs", "kinds"),
    [
        (nn.LSTM(8, 8), torch.randn(3, 2, 8), "layers of other kinds, which are not measured: LSTM"),
        (ByHand(), torch.randn(4, 8), "layers of other kinds, which are not measured: ByHand"),
        (dlkernels.nn.MLPEnsemble(3, [8, 16, 4]), torch.randn(3, 4, 8), "which are not measured: StackedLinear"),
        (nn.MultiheadAttention(8, 2), (torch.randn(1, 3, 8),) * 3,
         r"were not called so: out_proj \(NonDynamicallyQuantizableLinear\); .* not measured: MultiheadAttention"),
        (nn.Linear(2, 2), torch.ones(0, 2), r"were not called so: the model \(Linear\)"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_model_without_linear_layers_is_told_its_layers(model, inputs, kinds):
    with pytest.raises(
        tuning.TuneError, match=r"Looked for: modules that are an nn\.Linear or a layer of dlkernels"
    ) as error:
        layers.sizes_of(model, inputs)
    assert re.search(kinds, str(error.value))


def test_a_forced_path_leaves_nothing_to_measure(monkeypatch):
    monkeypatch.setenv("DLKERNELS_CPU_GEMM", "own")
    with pytest.raises(tuning.TuneError, match="DLKERNELS_CPU_GEMM takes the choice between paths away"):
        dlkernels.tune(shapes=[SMALL])


def test_large_layers_are_judged_on_fewer_rows(times, monkeypatch):
    seen = []
    monkeypatch.setattr(measurement, "JUDGED", 10 * 70 * 30)
    monkeypatch.setattr(measurement, "objections", lambda layer, takes: seen.append(layer.x.shape) or {})
    measurement.measure(Size(*SMALL, "float32"))
    assert seen == [(10, 70)]


def test_the_grid_is_the_benchmark_s():
    assert {(shape.m, shape.k, shape.n) for shape in SHAPES.values()} == set(tuning.GRID)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_table(times, tmp_path, capsys, cache):
    assert main(["tune", "--shapes", "40x70x30", "--dtypes", "float32", "--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "40, 70→30 float32: forward aten 9.00, dgrad aten 9.00, wgrad aten 9.00"
    assert lines[1].startswith(f"{cache / routing.tuned_name()}: 3 rows, hash ")
    file = tmp_path / "mine.json"
    assert main(["tune", "--shapes", "40x70x30", "--dtypes", "float64", "--any-threads", "--out", str(file)]) == 0
    assert json.loads(file.read_text())["any_threads"] is True
    assert len(routing.in_use()) == 1, "only that of the cache folder"


def test_the_command_tunes_a_model(times, tmp_path, monkeypatch, capsys):
    (tmp_path / "made_here.py").write_text(
        "import torch\ndef make(width=30):\n    return torch.nn.Linear(70, width), torch.randn(40, 70)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--model", "made_here:make", "--set", "width=20", "--dtypes", "bfloat16", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["40, 70→20 bfloat16", "40, 70→20 float32"]
    assert "6 rows" in lines[2]


@pytest.mark.parametrize("is_fast", [True, False])
def test_bfloat16_is_measured_unless_stock_torch_would_take_an_hour(times, is_fast, monkeypatch, capsys):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_fast)
    table = dlkernels.tune(shapes=[(40, 70, 30)])
    assert {row.dtype for row in table.rows} == ({"float32", "bfloat16"} if is_fast else {"float32"})
    assert main(["tune", "--shapes", "40x70x30"]) == 0
    printed = capsys.readouterr().out
    assert ("--dtypes bfloat16 measures it" in printed) == (not is_fast)
    assert main(["tune", "--shapes", "40x70x30", "--dtypes", "bfloat16"]) == 0
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["--shapes", "40x70"], 2, "expected --shapes MxKxN, such as 256x784x10; got '40x70'"),
        (["--seconds", "0"], 2, "expected --seconds above 0"),
        (["--threads", "0"], 2, "expected --threads of at least 1; got 0"),
        (["--model", "nothing"], 2, "expected --model torchvision:NAME"),
        (["--shapes", "4x4x4", "--out", "/dev/null/x"], 1, "/dev/null"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_mistakes_on_the_command_line(times, arguments, status, why, capsys):
    assert main(["tune", *arguments]) == status
    assert why in capsys.readouterr().err
