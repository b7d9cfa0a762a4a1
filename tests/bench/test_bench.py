"""The benchmark: it times nobody whose numbers are wrong, and what it reports follows from what it timed."""

import io
import itertools
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from bench import command, contenders, figures, harness, isa, machine, memory, peak, plot
from bench import record as records
from bench import run as runs
from bench.__main__ import main, parser
from bench.grid import DTYPES, MODES, SHAPES, Shape, shape_named
from bench.readme_table import main as write_readme
from bench.readme_table import markdown
from bench.record import Peak, Timing
from bench.table import show
from bench.trainer_loop import run as trainer_loop
from bench.trainer_loop.__main__ import main as time_trainer_loop
from dlkernels import _C
from dlkernels.testing import STOCK, Layer, LayerJudge
from dlkernels.tuning import layers
from tests.support.paths import ROOT
from tools.marked import marks

BEGIN, END = marks("bench")
SMALL = Shape("small", 24, 48, 16)


def layer(dtype="fp32", shape=SMALL, activation="relu"):
    drawn = harness.draw(shape, dtype, seed=1)
    return Layer(drawn.x, drawn.weight, drawn.bias, drawn.g, activation)


class BentGradient(torch.autograd.Function):
    """The identity, with one element of its gradient wrong by 1 %."""

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        g.view(-1)[-1] *= 1.01
        return g


def stock(x, w, b):
    return F.relu(F.linear(x, w, b))


def cut_tail(x, w, b):
    y = stock(x, w, b)
    return torch.cat([y[:-1], y[-2:-1]])  # the last row is another's


def fails(x, w, b):
    raise RuntimeError("no such kernel\nand more")


WRONG = {
    "y: error": cut_tail,
    "dweight: error": lambda x, w, b: stock(x, BentGradient.apply(w), b),
    "dx: error": lambda x, w, b: stock(BentGradient.apply(x), w, b),
    "dbias: error": lambda x, w, b: stock(x, w, BentGradient.apply(b)),
    "y: error nan": lambda x, w, b: stock(x, w, b) * float("nan"),
    "y: expected torch.float32 (24, 16), got torch.float32 (24, 15)": lambda x, w, b: stock(x, w, b)[:, 1:],
    "RuntimeError: no such kernel": fails,
}


@pytest.mark.parametrize("why", WRONG)
def test_the_judge_refuses_what_is_wrong(why):
    one = layer()
    if "15" in why:
        one.run = lambda op: {"y": op(one.x, one.weight, one.bias)}
    assert LayerJudge(one).objection(WRONG[why]).startswith(why)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", STOCK)
def test_the_judge_accepts_every_contender(dtype, activation):
    judge = LayerJudge(layer(dtype, activation=activation))
    ops = contenders.make(contenders.DEFAULT, activation)
    assert {contenders.OURS, contenders.STOCK} <= ops.keys()
    assert {name: judge.objection(op) for name, op in ops.items()} == dict.fromkeys(ops)


def test_the_judge_accepts_either_side_of_the_kink():
    """Where z is within rounding of 0, a gate may differ from stock's, and the gradients with it."""
    one, shift = layer(), torch.zeros(SMALL.m, SMALL.n)
    one.x[0] = one.weight[0] = 0
    one.x[0, :2] = 1
    one.weight[0, 0], one.weight[0, 1], one.bias[0] = 1, -1, 1e-9  # z[0, 0] = 1 - 1 + 1e-9
    shift[0, 0] = 1e-8

    def shifted(x, w, b):
        return F.relu(F.linear(x, w, b) - shift)

    assert one.stock()["y"][0, 0] > 0
    assert one.run(shifted)["y"][0, 0] == 0
    assert LayerJudge(one).objection(shifted) is None


@pytest.mark.slow
def test_the_judge_accepts_the_compiled_contenders():
    judge = LayerJudge(layer())
    for name, op in contenders.make(contenders.COMPILED, "relu").items():
        assert judge.objection(op, name not in contenders.FORWARD_ONLY) is None, name


@pytest.mark.slow
def test_the_frozen_contender_is_compiled_for_each_weight_and_timed_hot_alone():
    op = contenders.make([contenders.FROZEN], "relu")[contenders.FROZEN]
    for scale in (1, -2):
        one = layer()
        one.weight *= scale
        for _ in range(2):
            assert LayerJudge(one).objection(op, False) is None
            assert not op(one.x, one.weight.requires_grad_(), one.bias).requires_grad
            one.weight.requires_grad_(False)
    ops = contenders.make([contenders.FROZEN, *contenders.DEFAULT], "relu")
    settings = runs.Settings(columns=("hot", "cold"), modes=("forward", "forward+backward"), budget=0.01)
    measured = runs.measure_layer(settings, SMALL, "fp32", "relu", ops, seed=0)
    timed = {(m.mode, m.column) for m in measured.measurements if contenders.FROZEN in m.times}
    assert timed == {("forward", "hot")}
    assert all(m.times.keys() == m.peak_bytes.keys() for m in measured.measurements)


def test_the_judge_accepts_the_pointwise_contender():
    if "linear_pointwise" not in contenders.names("cpu"):
        pytest.skip("this torch has no oneDNN")
    for activation in STOCK:
        ops = contenders.make(["linear_pointwise"], activation)
        assert ("linear_pointwise" in ops) == (activation != "relu2")
        for name, op in ops.items():
            assert name in contenders.FORWARD_ONLY
            assert LayerJudge(layer(activation=activation)).objection(op, False) is None


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_loop_on_registers_counts_its_operations(dtype):
    once, ten = _C.peak_loop(dtype, 1), _C.peak_loop(dtype, 10)
    assert ten == 10 * once > 0
    start = time.perf_counter()
    _C.peak_loop(dtype, 1_000_000)
    assert time.perf_counter() - start > 1e-5  # a million steps: the compiler has not left the work out


def test_a_record_without_the_loop_on_registers_is_read(tmp_path):
    made().save(tmp_path / "r.json")
    values = json.loads((tmp_path / "r.json").read_text())
    del values["peak"]["registers"]  # as in records of earlier versions
    (tmp_path / "r.json").write_text(json.dumps(values))
    old = records.load(tmp_path / "r.json")
    assert [row.share_of_peak for row in figures.rows(old)] == [None] * 4
    show(old, Console(file=io.StringIO()))


def settings(**options):
    return runs.Settings(**{"dtypes": ["fp32"], "shapes": ["24x48x16"], "budget": 0.01, "seed": 1, **options})


def test_a_wrong_contender_is_never_timed():
    calls = []

    def wrong(x, w, b):
        calls.append(1)
        return cut_tail(x, w, b)

    ops = {**contenders.make(contenders.DEFAULT, "relu"), "wrong": wrong}
    measured = runs.measure_layer(settings(columns=["hot"]), SMALL, "fp32", "relu", ops, seed=1)
    assert len(calls) == 1  # when it was judged
    assert measured.refused.keys() == {"wrong"}
    assert [m.mode for m in measured.measurements] == list(MODES)
    for m in measured.measurements:
        assert m.times.keys() == m.peak_bytes.keys() == set(contenders.DEFAULT)


def inputs(mode, count=1):
    return [harness.draw(SMALL, "fp32", seed).leaves(mode) for seed in range(count)]


def test_a_slow_contender_is_timed_once_and_the_others_in_turns(monkeypatch):
    monkeypatch.setattr(harness, "SLOW", 0.01)
    steps = {"fast": lambda _: None, "slow": lambda _: time.sleep(0.06)}
    found = harness.take_turns(steps, lambda: None, budget=0.05, refill=False)
    assert found["slow"].calls == 1 and found["slow"].median >= 0.06
    assert found["fast"].calls > harness.TURN_CALLS
    alone = harness.take_turns({"slow": steps["slow"]}, lambda: None, budget=0.05, refill=False)
    assert alone["slow"].calls >= harness.LEAST_TURNS


@pytest.mark.parametrize("mode", MODES)
def test_contenders_take_turns_and_training_changes_the_weight(mode):
    order, versions = [], []

    def contender(name):
        def op(x, w, b):
            order.append(name)
            versions.append(w._version)
            return stock(x, w, b)

        return op

    times = harness.measure(
        {name: contender(name) for name in "abc"}, inputs(mode), mode, budget=1
    )  # a busy machine may take 10 times as long
    assert all(t.q20 <= t.median <= t.q80 and t.calls >= harness.LEAST_TURNS for t in times.values())
    turns = [name for i, name in enumerate(order) if i == 0 or name != order[i - 1]]
    expected = "abc" + "abc" + "bca" + "cab"  # warm-up, then turns, each in another order
    assert "".join(turns).startswith(expected)
    raised = [b > a for a, b in itertools.pairwise(versions)]
    assert all(raised) if mode != "forward" else not any(raised)


def test_cold_goes_round_all_buffers():
    seen = []

    def op(x, w, b):
        seen.append(x.data_ptr())
        return stock(x, w, b)

    sets = inputs("forward", 5)
    harness.measure({"a": op, "b": op}, sets, "forward", budget=0.01)
    assert len(set(seen[:5])) == 5
    assert seen[5:] == seen[:-5]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_mode(mode):
    one = inputs(mode)[0]
    with torch.set_grad_enabled(mode != "forward"):
        found = harness.step(stock, mode)(one)
    shapes = {"forward": [], "forward+backward": [one.x], "first layer": []}[mode]
    expected = one.g if mode == "forward" else [*shapes, one.weight, one.bias]
    if mode == "forward":
        assert found.shape == expected.shape
        assert not found.requires_grad
    else:
        assert [t.shape for t in found] == [t.shape for t in expected]


def test_peak_memory_counts_tensors_that_live_at_once():
    one, y = inputs("forward")[0], 24 * 16 * 4
    in_place = contenders.make(["in-place"], "relu")["in-place"]
    assert memory.extra_bytes(harness.step(stock, "forward"), one) == 2 * y
    assert memory.extra_bytes(harness.step(in_place, "forward"), one) == y

    def frees(x, w, b):
        big = torch.empty(1000, dtype=torch.uint8)
        del big
        return torch.empty(10, dtype=torch.uint8)

    assert memory.extra_bytes(harness.step(frees, "forward"), one) == 1000


def test_work_of_a_shape():
    shape = Shape("s", m=2, k=3, n=5)
    assert [shape.flops(mode) for mode in MODES] == [60, 180, 120]
    x, w, b, y = 6, 15, 5, 10
    forward = x + w + b + y
    assert shape.moved("forward", 4) == 4 * forward
    assert shape.moved("first layer", 4) == 4 * (forward + x + y + y + w + b)
    assert shape.moved("forward+backward", 4) == 4 * (forward + x + y + y + w + b + w + x)
    assert shape_named("2x3x5") == Shape("2x3x5", 2, 3, 5)
    assert shape_named("bert-ffn") is SHAPES["bert-ffn"]
    for wrong in ("bert", "0x3x5", "2x3"):
        with pytest.raises(ValueError, match="expected a shape MxKxN"):
            shape_named(wrong)


def made(complete=True, commit="a" * 40, **medians):
    """A record of two layers with known medians: by default stock 3 and 1 seconds, ours 1 and 2."""
    result = records.Record(
        created="2026-01-02T03:04:05+00:00",
        settings={},
        versions={"torch": "2.13.0"},
        commit={"hash": commit, "dirty": False},
        machine={"cpu": "Some CPU", "threads": 2, "isa": "avx512"},
        peak=Peak({"fp32": 100.0}, [(1000, 400.0), (10**9, 10.0)], {"fp32": [100.0, 120.0]}),
        complete=complete,
    )
    for name, (theirs, in_place, ours) in {"fast": (3.0, 2.0, 1.0), "slow": (1.0, 4.0, 2.0)}.items():
        times = {
            who: Timing(t, 0.9 * t, 1.1 * t, 10)
            for who, t in (("stock", theirs), ("in-place", in_place), ("dlkernels", ours))
        }
        paths = [{"op": op, "path": "packed"} for op in ("forward", "dgrad", "wgrad")]
        result.layers.append(
            records.Layer(
                name,
                2,
                3,
                5,
                "fp32",
                "relu",
                paths,
                {},
                [records.Measurement("forward", column, times, {"stock": 80}) for column in ("hot", "cold")],
            )
        )
    return result


def test_figures():
    fast, fast_cold, slow, _ = figures.rows(made())
    assert (fast.ratio, fast.best_other, fast.vs_best, fast.loses) == (3.0, "in-place", 2.0, False)
    assert (slow.ratio, slow.best_other, slow.vs_best, slow.loses) == (0.5, "stock", 0.5, True)
    assert (fast.rate, fast.paths, fast.our_bytes, fast.stock_bytes) == (60.0, "packed", None, 80)
    # 60 operations at 100 per second; 144 bytes at 400 per second from a cache, at 10 per second from memory
    assert fast.share == pytest.approx(0.6)
    assert fast_cold.share == pytest.approx(14.4)
    assert (fast.share_of_peak, slow.share_of_peak) == (0.5, 0.25)  # 60 and 30 operations per second, of 120
    hot = figures.geomeans([fast, slow])[0]
    assert hot["geomean"] == pytest.approx(1.5**0.5)
    assert (hot["worst"], hot["best"], hot["layers"]) == (0.5, 3.0, 2)
    assert [loss["layer"] for loss in figures.losses([fast, slow])] == ["slow"]
    faster = made()
    faster.layers[0].measurements[0].times["stock"] = Timing(0.1, 0.1, 0.1, 1)
    assert figures.best_gemm_rates(faster) == {"fp32": pytest.approx(600.0)}


def shown(result):
    console = Console(width=150, file=io.StringIO())
    show(result, console)
    return console.file.getvalue()


def test_table_and_plot(tmp_path):
    result = made(complete=False)
    result.layers[0].refused["in-place"] = "y: error [bold]7"
    text = shown(result)
    for line in (
        "Some CPU, 2 threads, avx512; torch 2.13.0; commit aaaaaaaaaa; 2026-01-02",
        "slow ◀",
        "Slower than stock: 2 of 4",
        "0.50x slow, fp32, forward, hot",
        "REFUSED in-place on fast fp32 relu, not timed: y: error [bold]7",
        "interrupted",
    ):
        assert line in text
    assert "fast ◀" not in text
    plot.plot(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    result.layers.clear()
    with pytest.raises(ValueError, match="got one without"):
        plot.plot(result, tmp_path / "b.png")


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(peak, "_SECONDS", 0.001)
    monkeypatch.setattr(peak, "_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(machine, "caches", lambda: {2: 1 << 16})  # so that cold takes few buffers


ARGUMENTS = ["--shapes", "24x48x16", "mnist-2", "--dtypes", "fp32", "--budget", "0.01", "--seed", "3"]


def test_the_command_line_writes_record_and_plot(tmp_path, small_machine, capsys):
    out = tmp_path / "new" / "r.json"
    assert main([*ARGUMENTS, "--activations", "relu", "gelu", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["r.json", "r.png"]
    values = json.loads(out.read_text())
    assert values["schema"] == 1
    assert values["complete"] is True
    assert values["settings"]["seed"] == 3
    assert values["versions"]["torch"] == torch.__version__
    assert values["commit"].keys() == {"hash", "dirty"}
    assert {"cpu", "cores", "threads", "isa", "environment"} <= values["machine"].keys()
    assert values["peak"]["gemm"]["fp32"] > 0
    before, after = values["peak"]["registers"]["fp32"]
    assert min(before, after) > 0
    names = [(one["shape"], one["activation"]) for one in values["layers"]]
    assert names == [(s, a) for a in ("relu", "gelu") for s in ("24x48x16", "mnist-2")]
    for one in values["layers"]:
        assert one["refused"] == {}
        assert [product["op"] for product in one["explain"]] == ["forward", "dgrad", "wgrad"]
        assert all(product["path"] and product["why"] for product in one["explain"])
        measured = [(m["mode"], m["column"]) for m in one["measurements"]]
        assert measured == [(mode, column) for mode in MODES for column in ("hot", "cold")]
        for m in one["measurements"]:
            who = {"stock", "dlkernels"} | ({"in-place"} if one["activation"] == "relu" else set())
            assert m["times"].keys() == m["peak_bytes"].keys() == who
            for t in m["times"].values():
                assert 0 < t["q20"] <= t["median"] <= t["q80"]
    assert {"best_gemm_rate", "ratios", "slower_than_stock", "slower_than_best"} == values["summary"].keys()
    assert "mnist-2 gelu" in capsys.readouterr().out
    again = records.load(out)
    assert shown(again).startswith("\n" + str(machine.facts()["cpu"]))
    again.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == values


def test_exit_status_tells_that_we_were_wrong(tmp_path, small_machine, monkeypatch, capsys):
    monkeypatch.setitem(contenders._MAKERS, contenders.OURS, lambda activation: cut_tail)
    assert main([*ARGUMENTS, "--columns", "hot", "--out", str(tmp_path / "r.json")]) == 1
    assert "REFUSED dlkernels on mnist-2" in capsys.readouterr().out
    assert not (tmp_path / "r.png").exists()  # nothing to compare


def test_a_run_broken_off_leaves_earlier_results_alone(tmp_path, small_machine, monkeypatch, capsys):
    measure_layer, calls = runs.measure_layer, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_layer(*args, **options)

    monkeypatch.setattr(runs, "measure_layer", interrupted)
    out = tmp_path / "r.json"
    out.write_text("earlier")
    assert main([*ARGUMENTS, "--columns", "hot", "--out", str(out)]) == 130
    assert out.read_text() == "earlier"
    partial = records.load(tmp_path / "r.partial.json")
    assert (len(partial.layers), partial.complete) == (1, False)
    assert "interrupted" in capsys.readouterr().out


def test_saving_is_all_or_nothing(tmp_path):
    path = tmp_path / "r.json"
    made().save(path)
    before = path.read_bytes()
    bad = made()
    bad.machine["cpu"] = object()  # no JSON for it
    with pytest.raises(TypeError):
        bad.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"schema": 99}', '{"schema": 1, "layers": 3}'])
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match="expected a benchmark record of schema 1"):
        records.load(tmp_path / "r.json")


def test_readme_is_rewritten_between_its_markers_only(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results" / "r.json"
    results.parent.mkdir()
    made().save(results)
    readme.write_text(f"before\n\n{BEGIN}\nold table\n{END}\n\nafter\n")
    for _ in range(2):  # the second time changes nothing
        assert write_readme([str(results), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n\n{BEGIN}\n| layer | M, K→N | fp32 forward |\n|---|---|---:|\n")
        assert text.endswith(f"\n{END}\n\nafter\n")
        assert "old table" not in text
        assert "| fast | 2, 3→5 | 3.00x |\n| slow | 2, 3→5 | 0.50x (slower) |\n" in text
        assert "| **geometric mean** | 2 layers | **1.22x** |\n" in text
        assert "| geometric mean against the fastest other | | 1.00x |\n" in text
        assert "slower in 1 of 2 cells. Some CPU, 2 threads" in text
        assert "commit aaaaaaaaaa; 2026-01-02" in text
        assert "[r.json](results/r.json)" in text
        assert text.count(BEGIN) == text.count(END) == 1


def test_readme_has_a_mean_for_every_other_contender():
    result = made()
    for layer, compiled in zip(result.layers, (4.0, None), strict=True):
        if compiled is None:
            layer.refused["compile"] = "y: error 7"
            continue
        for measurement in layer.measurements:
            measurement.times["compile"] = Timing(compiled, compiled, compiled, 10)
    table = markdown(result, "r.json")
    assert "| geometric mean against in-place | | 2.00x |\n" in table
    assert "| geometric mean against compile | | 4.00x |\n" in table
    assert "compile was not timed in 1 layer: the file says why." in table
    assert "2.00x in-place, 4.00x compile" in shown(result)


@pytest.mark.parametrize(("ours", "cell"), [(3.012, "1.00x"), (3.016, "0.99x (slower)")])
def test_readme_calls_slower_what_prints_below_one(ours, cell):
    result = made()
    for measurement in result.layers[0].measurements:
        measurement.times["dlkernels"] = Timing(ours, ours, ours, 10)
    table = markdown(result, "r.json")
    assert f"| fast | 2, 3→5 | {cell} |\n" in table
    assert f"slower in {1 + ('slower' in cell)} of 2 cells" in table


def test_readme_shows_several_machines_side_by_side(tmp_path):
    readme, paths = tmp_path / "README.md", [tmp_path / f"{name}.json" for name in "ab"]
    readme.write_text(f"{BEGIN}\n{END}\n")
    for path, cpu in zip(paths, ("CPU A", "CPU B"), strict=True):
        result = made()
        result.machine["cpu"] = cpu
        result.save(path)
    assert write_readme([*map(str, paths), "--readme", str(readme)]) == 0
    headings = [line for line in readme.read_text().splitlines() if line.startswith("### ")]
    isa = made().machine["isa"]
    assert headings == [f"### CPU A, {isa}", f"### CPU B, {isa}"]
    assert readme.read_text().count("| **geometric mean** |") == 2


def test_readme_takes_no_broken_off_run():
    with pytest.raises(ValueError, match="expected a complete run"):
        markdown(made(complete=False), "r.json")


def test_settings_name_what_is_unknown(capsys):
    for option, value in {
        "dtypes": "fp8",
        "shapes": "1x2",
        "activations": "rely",
        "modes": "backward",
        "columns": "warm",
        "contenders": "stok",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main([f"--{option}", value])
        assert stopped.value.code == 2
        assert f"got {value!r}" in (message := capsys.readouterr().err) or f"got {value}" in message
    with pytest.raises(ValueError, match="dlkernels must be among them"):
        runs.Settings(contenders=["stock"])


def test_quick_and_full_defaults(monkeypatch, capsys):
    parse = parser().parse_args
    monkeypatch.setattr(layers, "usual_dtypes", lambda device: ("float32", "bfloat16"))
    quick, full = (command.settings(parse(argv)) for argv in (["--quick"], []))
    assert (quick.dtypes, quick.columns) == (("fp32", "bf16"), ("hot",))
    assert (full.dtypes, full.columns, full.modes) == (("fp32", "bf16", "fp64"), ("hot", "cold"), MODES)
    assert list(full.shapes) == list(quick.shapes) == list(SHAPES)
    assert command.settings(parse(["--quick", "--dtypes", "fp64"])).dtypes == ["fp64"]
    assert command.settings(parse(["--contenders", "all"])).contenders == contenders.names("cpu")
    assert command.default_path(True, quick).parent.name == "local"
    assert command.default_path(False, full).parent.name == "results"
    path = command.default_path(False, command.settings(parse(["--threads", "3"])))
    assert path.stem.endswith(f"-{_C.cpu_kernels()['isa']}-3t"), "two kinds of AMD EPYC have two files"
    assert not capsys.readouterr().err


def test_bfloat16_is_left_out_where_stock_would_take_half_a_minute_for_a_step(monkeypatch, capsys):
    parse = parser().parse_args
    monkeypatch.setattr(layers, "usual_dtypes", lambda device: ("float32",))
    assert command.settings(parse(["--quick"])).dtypes == ["fp32"]
    assert command.settings(parse([])).dtypes == ["fp32", "fp64"]
    assert "--dtypes bf16 measures it" in capsys.readouterr().err
    assert command.settings(parse(["--dtypes", "bf16"])).dtypes == ["bf16"]
    assert not capsys.readouterr().err


def test_without_matplotlib_it_says_how_to_get_the_picture(tmp_path, small_machine, capsys, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'matplotlib.figure'", name="matplotlib.figure")

    monkeypatch.setattr(plot, "plot", missing)
    quick = ["--shapes", "8x8x8", "--dtypes", "fp32", "--modes", "forward", "--columns", "hot", "--budget", "0.01"]
    assert main([*quick, "--out", str(tmp_path / "r.json")]) == 0
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert "and no picture" in last and "run pip install" in last and "matplotlib" in last


def test_the_command_line_is_read_before_torch_loads():
    """The caps on instruction sets are environment variables that torch reads when it loads."""
    code = "import bench.__main__, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, check=True)


def test_a_cap_is_set_for_everybody_and_recorded(monkeypatch):
    environment = {"PATH": "/bin", "OMP_NUM_THREADS": "2"}
    monkeypatch.setattr(isa, "os", SimpleNamespace(environ=environment))
    isa.apply("avx2")
    assert isa.in_force() == {**isa.CAPS["avx2"], "OMP_NUM_THREADS": "2"}


def test_trainer_loop(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trainer_loop, "SAMPLES", 2048)
    monkeypatch.setattr(trainer_loop, "BLOCK", 4)
    assert time_trainer_loop(["--epochs", "1", "--out", str(tmp_path / "loop.json")]) == 0
    found = json.loads((tmp_path / "loop.json").read_text())
    assert found["bare"] > 0 < found["trainer"]
    assert f"{found['ratio']:.3f} of it" in capsys.readouterr().out


def test_tables_in_a_file_are_whole(monkeypatch, capsys):
    """No terminal, no width: nothing is cut off."""
    from bench import table

    monkeypatch.setenv("COLUMNS", "80")
    table.show(records.load(ROOT / "bench/results/amd-epyc-2t.json"))
    assert "…" not in capsys.readouterr().out


def test_tables_fit_a_narrow_terminal():
    """Columns that have no room are in a second table, with the layers again."""
    from bench import table

    def columns(width):
        console = Console(width=width, file=io.StringIO())
        table.show(records.load(ROOT / "bench/results/amd-epyc-2t.json"), console)
        lines = console.file.getvalue().splitlines()
        heads = [line.split() for line in lines if line.lstrip().startswith("layer")]
        return lines, [word for head in heads[: len(heads) // 4] for word in head]  # of one group of four

    (narrow, folded), (_, whole) = columns(80), columns(250)
    tables = [line for line in narrow if "  " in line.strip()]
    assert max(map(len, tables)) <= 80 and "…" not in "".join(narrow)
    assert set(folded) == set(whole) and folded.count("layer") > 1
