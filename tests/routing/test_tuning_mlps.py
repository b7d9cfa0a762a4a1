"""``tune`` measures chains of layers: one kernel against layer by layer, forward and backward."""

import itertools
import random
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dlkernels
from dlkernels import _C, functional, routing, tuning
from dlkernels.__main__ import main
from dlkernels.tuning import MlpSize, clock, measurement, mlps
from dlkernels.tuning.measurement import choose

FUSED, LAYERS = routing.MLP_PATHS
SMALL = (40, 8, 16, 4)  # rows, features
SIZE = MlpSize(40, (8, 16, 4), "float32")

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def times(monkeypatch):
    """Microseconds by a clock in place of the real one, by direction and path."""
    given = {"stock": 1.0}

    def invented(direction):
        def clock(mlp, tables, seconds):
            return {path: given.get((direction, path), 9.0) for path in tables}, given["stock"]

        return clock

    monkeypatch.setattr(mlps, "time_mlp_forward", invented("forward"))
    monkeypatch.setattr(mlps, "time_mlp_backward", invented("backward"))
    for name in ("time_forward", "time_backward"):
        monkeypatch.setattr(measurement, name, lambda layer, contenders, seconds: (dict.fromkeys(contenders, 9.0), 1.0))
    return given


def ways(m, *features, dtype=torch.float32):
    weights = [torch.empty(n, k, dtype=dtype) for k, n in itertools.pairwise(features)]
    plan = functional.explain_mlp(torch.empty(m, features[0], dtype=dtype), weights)
    return tuple(FUSED if step else LAYERS for step in (plan.forward, plan.backward))


def test_choices_without_a_library():
    assert choose({FUSED: 0.9, LAYERS: 0.5}, 1.0, FUSED, None) == LAYERS
    assert choose({FUSED: 1.5, LAYERS: 2.0}, 1.0, LAYERS, None) == FUSED, "all are behind stock"
    assert choose({FUSED: 1.98, LAYERS: 2.0}, 1.0, LAYERS, None) == LAYERS, "noise changes nothing"


@pytest.mark.parametrize("seed", range(10))
def test_each_direction_takes_the_faster_path(times, seed):
    draw = random.Random(seed)
    directions = ("forward", "backward")
    times.update({(d, path): draw.uniform(0.5, 2) for d in directions for path in routing.MLP_PATHS})
    table = dlkernels.tune(mlps=[SMALL], dtypes=["float32"])
    assert [(row.op, row.m, row.features) for row in table.rows] == [(op, 40, (8, 16, 4)) for op in routing.MLP_OPS]
    for row, direction in zip(table.rows, directions, strict=True):
        assert row.us == {"stock": 1.0, **{path: times[direction, path] for path in routing.MLP_PATHS}}
        assert row.us[row.path] <= 1.031 * min(row.us[path] for path in routing.MLP_PATHS)
    assert ways(*SMALL) == tuple(row.path for row in table.rows)


def test_the_path_that_the_rules_take_stays_within_noise(times):
    usual = ways(*SMALL)
    others = [{FUSED: LAYERS, LAYERS: FUSED}[path] for path in usual]
    for direction, path, other in zip(("forward", "backward"), usual, others, strict=True):
        times.update({(direction, path): 0.50, (direction, other): 0.49})
    assert tuple(row.path for row in dlkernels.tune(mlps=[SMALL], dtypes=["float32"]).rows) == usual
    times.update(dict.fromkeys(zip(("forward", "backward"), others, strict=True), 0.4))
    assert [row.path for row in dlkernels.tune(mlps=[SMALL], dtypes=["float32"]).rows] == others
    assert list(ways(*SMALL)) == others


def test_a_wrong_path_is_not_timed_and_out_of_use_with_any_number_of_threads(times, monkeypatch):
    """The kernel is fastest on this clock, and wrong by a thousandth."""
    right = functional.mlp

    def wrong(x, weights, biases):
        plan = functional.explain_mlp(x, weights)
        return right(x, weights, biases) * (1.001 if plan.forward else 1)

    monkeypatch.setattr(mlps.functional, "mlp", wrong)
    times.update({(d, path): t for d in ("forward", "backward") for path, t in ((FUSED, 0.1), (LAYERS, 0.5))})
    told, before = [], torch.get_num_threads()
    table = dlkernels.tune(mlps=[SMALL], dtypes=["float32"], told=told.append)
    assert {(row.path, row.refused, tuple(row.us)) for row in table.rows} == {(LAYERS, (FUSED,), ("stock", LAYERS))}
    assert "fused_mlp is left out: y: error" in str(told[0]) and "rounding units" in told[0].refused[FUSED]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert ways(*SMALL) == (LAYERS, LAYERS)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("every", [False, True])
def test_a_wrong_path_is_out_of_use_though_nothing_could_be_timed(times, monkeypatch, every):
    wrong = {FUSED: "y: too far off"} | ({LAYERS: "y: too far off"} if every else {})
    monkeypatch.setattr(mlps, "_objections", lambda size, paths, beneath: wrong)

    def busy(*args):
        raise clock.Unsteady

    monkeypatch.setattr(mlps, "time_mlp_backward", busy)
    told = []
    table = dlkernels.tune(mlps=[SMALL], dtypes=["float32"], told=told.append)
    refused = routing.MLP_PATHS if every else (FUSED,)
    assert [(row.path, row.us, row.refused) for row in table.rows] == [(LAYERS, {}, refused)] * 2
    assert ways(*SMALL) == (LAYERS, LAYERS)
    assert ("the machine is busy" in str(told[0])) == (not every)
    assert ("layer by layer was judged wrong" in str(told[0])) == every


def test_a_chain_that_a_busy_machine_measured_gets_no_row(monkeypatch, cache):
    def busy(steps, seconds):
        attempts.append(len(steps))
        return [[1.0, 1.0, 2.0, 2.0, 2.0]] * len(steps)

    attempts, told = [], []
    monkeypatch.setattr(clock, "take_turns", busy)
    assert dlkernels.tune(mlps=[SMALL], dtypes=["float32"], told=told.append).rows == ()
    assert attempts == [3] * clock.ATTEMPTS, "stock and two paths"
    assert "no row, the machine is busy" in str(told[0])
    assert not cache.exists()


def test_both_paths_are_measured_on_the_real_clock(cache, monkeypatch):
    monkeypatch.setattr(clock, "STEADY", 1e9)  # other tests may run beside this one
    told = []
    table = dlkernels.tune(mlps=[SMALL, (1, 8, 16, 4)], dtypes=["float64", "float32"], seconds=0.02, told=told.append)
    assert len(table.rows) == 8 and not any(measured.refused for measured in told)
    for row in table.rows:
        assert set(row.us) == {"stock", FUSED, LAYERS} and all(0 < time < 1e6 for time in row.us.values())
        assert (row.where, len(row.date), row.hidden) == (torch.get_num_threads(), 10, (16,))
    assert routing.read(cache / routing.tuned_name(), "") == table and routing.in_use() == (table,)


def test_the_clock_times_what_the_tables_say(monkeypatch):
    """Under each table the chain goes the way that the table names, and stock runs beside it."""
    seen = []

    def turns(steps, seconds):
        for table, step in steps:
            _C.use_routes(table)
            step()
            seen.append(ways(*SMALL) if table >= 0 else "stock")
        return [[1.0] * 5] * len(steps)

    monkeypatch.setattr(clock, "take_turns", turns)
    mlps.measure_mlp(SIZE, ())
    assert seen == ["stock", (FUSED, FUSED), (LAYERS, LAYERS)] * 2


def test_a_chain_that_the_kernel_does_not_take_has_one_path(times):
    (forward, backward) = dlkernels.tune(mlps=[(40, 300, 16, 4)], dtypes=["float32"]).rows
    assert set(forward.us) == set(backward.us) == {"stock", LAYERS}


def test_layers_are_measured_first_and_layer_by_layer_takes_their_routes(times, monkeypatch):
    order, beneath = [], []

    def objections(size, paths, tables):
        beneath.append([path for table in tables for path in {row.path for row in table.rows}])
        return {}

    monkeypatch.setattr(mlps, "_objections", objections)
    told = lambda measured: order.append(type(measured.size))  # noqa: E731
    dlkernels.tune(shapes=[(40, 8, 16)], mlps=[SMALL], dtypes=["float32"], told=told)
    assert order == [tuning.Size, MlpSize]
    assert beneath == [["aten"]], "no path of the layer was ahead on this clock"
    table = mlps.table_of(LAYERS, SIZE, routing.in_use())
    before = _C.use_routes(table)
    try:
        plan = functional.explain_mlp(torch.empty(40, 8), [torch.empty(16, 8), torch.empty(4, 16)])
    finally:
        _C.use_routes(before)
    assert plan.forward is None and plan[0][0].path == "aten"


def test_rows_are_written_after_every_chain(times, cache):
    def stop(measured):
        told.append(measured)
        if len(told) == 2:
            raise KeyboardInterrupt

    told = []
    with pytest.raises(KeyboardInterrupt):
        dlkernels.tune(mlps=[SMALL, (50, 8, 16, 4)], dtypes=["float32"], told=stop)
    assert {row.m for row in routing.read(cache / routing.tuned_name(), "").rows} == {40}


def test_large_chains_are_judged_on_fewer_rows(times, monkeypatch):
    seen = []
    monkeypatch.setattr(mlps, "JUDGED", 10 * (8 * 16 + 16 * 4))
    monkeypatch.setattr(mlps.MlpJudge, "objection", lambda judge, op: seen.append(judge.mlp.x.shape[0]))
    mlps.measure_mlp(SIZE, ())
    assert seen == [10, 10]


# ---- what is measured ------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """An MLP called twice, a chain of a Sequential, one by functional.mlp, a wide one, a single layer, an ensemble."""

    def __init__(self):
        super().__init__()
        self.chain = dlkernels.nn.MLP([20, 16, 12])
        self.stock = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU())
        self.weights = nn.ParameterList([torch.randn(6, 7), torch.randn(5, 6)])
        self.wide = dlkernels.nn.MLP([5, 700, 6])
        self.single = nn.Linear(6, 3)
        self.members = dlkernels.nn.MLPEnsemble(2, [3, 4, 2])

    def forward(self, x):
        h = self.chain(x) + self.chain(x[:, :1])
        h = functional.mlp(self.stock(h), list(self.weights))
        h = F.relu(self.single(self.wide(h)))
        return self.members(h[:, 0])


@pytest.mark.parametrize("fused", [False, True])
def test_the_chains_of_a_model_are_found(fused):
    model = Parts()
    if fused:
        dlkernels.fuse(model)
    classes = [type(module) for module in model.modules()]
    found = mlps.mlps_of(model, torch.randn(3, 4, 20))
    chains = [(12, (20, 16, 12)), (3, (20, 16, 12)), (12, (12, 9, 7)), (12, (7, 6, 5))]
    assert found == [MlpSize(m, features, "float32") for m, features in chains]
    assert [type(module) for module in model.modules()] == classes and model.training


def test_a_model_is_tuned(times):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16()
    times["backward", LAYERS] = 0.5
    table = dlkernels.tune(model, torch.randn(40, 8).bfloat16())
    chain = [row for row in table.rows if row.hidden]
    assert [(row.dtype, row.m, row.features) for row in chain] == [("bfloat16", 40, (8, 16, 4))] * 2
    assert len(table.rows) == 2 + 2 * 3 and chain[1].path == LAYERS
    assert ways(*SMALL, dtype=torch.bfloat16)[1] == LAYERS


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(16, 8), torch.randn(4, 16)])

    def forward(self, x):
        return functional.mlp(x, list(self.weights))


def test_a_model_of_a_chain_without_layers_is_tuned(times):
    assert [row.op for row in dlkernels.tune(ByHand(), torch.randn(40, 8)).rows] == list(routing.MLP_OPS)
    with pytest.raises(tuning.TuneError, match="no linear layer"):
        dlkernels.tune(ByHand(), torch.randn(0, 8))


def test_without_names_there_is_a_grid_of_layers_and_of_chains(times, monkeypatch):
    measured = []
    monkeypatch.setattr(
        tuning.entry, "measure", lambda size, *_: measured.append(size) or measurement.Measured(size, (), {})
    )
    monkeypatch.setattr(tuning.entry, "measure_mlp", tuning.entry.measure)
    dlkernels.tune(dtypes=["float32"])
    assert measured == [
        *(tuning.Size(*shape, "float32") for shape in tuning.GRID),
        *(MlpSize(m, tuple(features), "float32") for m, *features in tuning.MLP_GRID),
    ]
    del measured[:]
    dlkernels.tune(mlps=[SMALL], dtypes=["float32"])
    assert measured == [SIZE]
    assert all(mlps.takes(FUSED, MlpSize(m, tuple(features), "float32")) for m, *features in tuning.MLP_GRID)


@pytest.mark.parametrize("wrong", [(40, 8, 4), (40,), (40, 8, 0, 4), (0, 8, 16, 4), (40, 8.0, 16, 4)], ids=str)
def test_what_is_no_chain_is_refused(wrong):
    with pytest.raises(
        ValueError, match=r"expected a chain as \(rows, in_features, hidden features, ..., out_features\)"
    ):
        dlkernels.tune(mlps=[wrong])


def test_a_chain_on_another_device_is_refused(monkeypatch):
    with pytest.raises(tuning.TuneError, match="tune measures on cuda, and a chain of the model is on cpu"):
        mlps.mlps_of(ByHand(), torch.randn(40, 8), "cuda")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_measures_chains(times, capsys, cache):
    arguments = ["--mlps", "40x8-16-4", "50x8-16-16-4", "--dtypes", "float32", "--seconds", "0.01"]
    assert main(["tune", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    usual = r"(fused_mlp|layers) 9\.00"
    assert re.fullmatch(rf"40, 8→16→4 float32: mlp_forward {usual}, mlp_backward {usual}", lines[0])
    assert lines[1].startswith("50, 8→16→16→4 float32: mlp_forward ")
    assert lines[2].startswith(f"{cache / routing.tuned_name()}: 4 rows, hash ")
    assert main(["tune", "--shapes", "40x70x30", "--mlps", "40x8-16-4", "--dtypes", "float32"]) == 0
    assert "7 rows" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            ["--mlps", "40x8-4"],
            "expected --mlps MxK-N-...-N of two layers or more, such as 256x8-64-64-4; got '40x8-4'",
        ),
        (["--mlps", "40x8x16x4"], "expected --mlps MxK-N-...-N"),
        (["--mlps", "40x8-16-0"], "expected --mlps MxK-N-...-N"),
        (["--mlps", "40x8-16-4", "--model", "made:here"], "expected --model or --mlps, not both"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_mistakes_on_the_command_line(times, arguments, why, capsys):
    assert main(["tune", *arguments]) == 2
    assert why in capsys.readouterr().err
