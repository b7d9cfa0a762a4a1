"""``tune``: a path is judged, timed beside stock, and taken only where it is right and ahead."""

import itertools
import json
import random

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

SMALL = (40, 70, 30)  # rows, in_features, out_features


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder, from which this process takes its tables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(routing, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(routing.VARIABLE)
    yield routing.cache_folder()
    routing.use(())


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
    assert choose({"packed": 1.2, "few_rows": 1.1}, 1.0, "packed", "aten") is None, "torch's was wrong"


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


def test_every_path_is_measured_on_the_real_clock(cache, monkeypatch):
    monkeypatch.setattr(clock, "STEADY", 1e9)  # other tests may run beside this one
    table = dlkernels.tune(shapes=[SMALL, (4, 128, 30)], dtypes=["float32"], seconds=0.02)
    assert [(row.m, row.op) for row in table.rows] == [(m, op) for m in (4, 40) for op in routing.OPS]
    for row in table.rows:
        timed = {"stock", "packed", "aten"} | ({"few_rows"} if row.m == 4 else set())
        assert set(row.us) == timed and all(0 < time < 1e6 for time in row.us.values())
        assert (row.where, row.dtype, len(row.date)) == (torch.get_num_threads(), "float32", 10)
    file = cache / routing.file_name()
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
    stale = (cache / routing.file_name()).read_text().replace(torch.__version__, "2.0.0")
    (cache / routing.file_name()).write_text(stale)
    assert len(dlkernels.tune(shapes=[SMALL], dtypes=["float32"]).rows) == 3, "rows of another torch do not stay"


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
    assert {row.m for row in routing.read(cache / routing.file_name(), "").rows} == {40}
    assert paths(*SMALL)["forward"] == "aten", "and the routes are taken"


def test_a_table_is_whole_or_absent(times, cache, monkeypatch):
    dlkernels.tune(shapes=[SMALL], dtypes=["float32"])
    before = (cache / routing.file_name()).read_text()
    monkeypatch.setattr(measurement, "choose", lambda times, stock, usual, library: usual)  # behind stock
    with pytest.raises(routing.RouteError, match="not clearly slower than stock"):
        dlkernels.tune(shapes=[SMALL], dtypes=["float32"])
    assert (cache / routing.file_name()).read_text() == before
    assert [file.name for file in cache.iterdir()] == [routing.file_name()]


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
    assert lines[1].startswith(f"{cache / routing.file_name()}: 3 rows, hash ")
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
