"""Without example inputs, ``fuse`` asks the route tables which layers stock computes faster."""

import dataclasses

import pytest
import torch
from torch import nn

from dlkernels import fuse, report, routing
from dlkernels.routing import CLEARLY, MLP_OPS, OPS, STOCK, Row
from dlkernels.tuning.table import empty_table

BEHIND = {STOCK: 1.0, "packed": 9.0, "aten": 3.0}
AHEAD = {STOCK: 2.0, "packed": 1.0, "aten": 3.0}


@pytest.fixture(autouse=True)
def _no_tables():
    yield
    routing.use(())


def rows(us, m=300, ops=OPS, dtype="float32", where=1, path="aten", n=200):
    return [Row(op, dtype, m, n, 100, where, path, us, "2026-11-28", "") for op in ops]


def in_force(*several, any_threads=True, name="measured.json"):
    return dataclasses.replace(empty_table(any_threads), rows=tuple(several), name=name)


def fused(*tables, dtype=torch.float32, **how):
    """The rows of the report: a layer that the table knows, and one that it does not."""
    routing.use(tables)
    model = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.LayerNorm(200), nn.Linear(200, 50), nn.ReLU()).to(dtype)
    return report(fuse(model, **how))


def test_a_layer_that_every_row_ranks_behind_stock_stays_stock():
    table = fused(in_force(*rows(BEHIND), *rows(BEHIND, m=20)))
    known, other = table
    assert (known.status, known.slower, other.status) == ("skipped", True, "fused")
    assert known.why == (
        "slower than stock by the route table: measured at 300, 100→200 with 1 thread: 3.00 of stock's time "
        "(row 1 of measured.json, 2026-11-28), and its other 5 rows agree"
    )


NOISE = {STOCK: 1.0, "packed": 9.0, "aten": 0.999 / CLEARLY}


@pytest.mark.parametrize(
    ("tables", "how"),
    [
        ((), {}),
        ([in_force(*rows(BEHIND), *rows(AHEAD, m=20, path="packed"))], {}),  # at other row counts it is ahead
        ([in_force(*rows(BEHIND, ops=OPS[1:]), *rows(AHEAD, ops=OPS[:1], path="packed"))], {}),
        ([in_force(*rows(NOISE))], {}),
        ([in_force(*rows({}))], {}),  # a path is named, nothing was measured
        ([in_force(*rows(BEHIND, where=10_000), any_threads=False)], {}),
        ([in_force(*rows(BEHIND, dtype="bfloat16"))], {}),
        ([in_force(*rows(AHEAD, path="packed")), in_force(*rows(BEHIND))], {}),  # those in front take precedence
        ([in_force(*rows(BEHIND))], {"min_gain": 0}),
        ([in_force(*rows(BEHIND))], {"example_inputs": torch.ones(3, 100), "min_gain": 0.001}),
    ],
)
def test_a_layer_is_fused_where_a_row_says_so_or_none_speaks(tables, how):
    assert [site.status for site in fused(*tables, **how)] == ["fused", "fused"]


def test_rows_count_for_the_threads_in_use():
    table = fused(in_force(*rows(BEHIND, where=torch.get_num_threads()), any_threads=False))
    assert [site.status for site in table] == ["skipped", "fused"]


def test_a_forced_path_leaves_the_tables_unasked(monkeypatch):
    monkeypatch.setenv("DLKERNELS_CPU_GEMM", "aten")
    assert len(fused(in_force(*rows(BEHIND))).fused) == 2


def test_a_layer_that_stays_stock_splits_a_chain_and_the_first_line_says_if_none_is_left():
    routing.use([in_force(*rows(BEHIND))])
    model = fuse(nn.Sequential(nn.Linear(9, 100), nn.ReLU(), nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 3)))
    assert [(site.path, site.status) for site in report(model)] == [("0", "fused"), ("2", "skipped"), ("4", "skipped")]
    model = fuse(nn.Sequential(nn.Linear(100, 200), nn.ReLU()))
    assert str(report(model)).startswith("Nothing to gain on this machine") and type(model) is nn.Sequential
    fuse(model, min_gain=0)
    assert len(report(model).fused) == 1


CHAIN = (100, 64, 200)
SLOW = {STOCK: 1.0, "fused_mlp": 3.0, "layers": 2.0}
FAST = {STOCK: 2.0, "fused_mlp": 1.0, "layers": 3.0}


def chains(us, *, ops=MLP_OPS, m=300, features=CHAIN, where=1, dtype="float32"):
    k, *hidden, n = features
    path = "layers" if us is SLOW else "fused_mlp"
    return [Row(op, dtype, m, n, k, where, path, us, "2026-11-28", "", (), tuple(hidden)) for op in ops]


def sites(*tables, **how):
    routing.use(tables)
    model = nn.Sequential(nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 200), nn.ReLU())
    return report(fuse(model, **how))


def test_a_chain_that_every_row_ranks_behind_stock_is_fused_by_its_layers():
    (whole,) = sites()
    assert whole.then == (("2", "relu"),)
    first, second = sites(in_force(*chains(SLOW), *chains(SLOW, m=20)))
    assert (first.status, second.status, first.then, second.then) == ("fused", "fused", (), ())
    assert first.remark == second.remark
    assert first.remark == (
        "as one chain it was slower than stock by the route table: measured at 300, 100→64→200 with 1 thread: 2.00 of "
        "stock's time (row 1 of measured.json, 2026-11-28), and its other 3 rows agree"
    )
    first, second = sites(in_force(*chains(SLOW), *rows(BEHIND, n=64)))
    assert (first.status, second.status) == ("skipped", "fused"), "rows of its layers count for these"


@pytest.mark.parametrize(
    ("tables", "how"),
    [
        ([in_force(*chains(SLOW, ops=MLP_OPS[:1]), *chains(FAST, ops=MLP_OPS[1:]))], {}),
        ([in_force(*chains(SLOW), *chains(FAST, m=20))], {}),
        ([in_force(*chains(SLOW, features=(100, 65, 200)))], {}),
        ([in_force(*chains(SLOW, features=(100, 64, 64, 200)))], {}),
        ([in_force(*chains(SLOW, dtype="bfloat16"))], {}),
        ([in_force(*chains(SLOW, where=10_000), any_threads=False)], {}),
        ([in_force(*rows(BEHIND))], {}),  # of the layer 100→200
        ([in_force(*chains(SLOW))], {"min_gain": 0}),
    ],
)
def test_a_chain_is_one_where_a_row_says_so_or_none_speaks(tables, how):
    (whole,) = sites(*tables, **how)
    assert whole.then


def test_of_several_numbers_of_threads_the_rows_for_this_one_count():
    now = torch.get_num_threads()
    slow_here = in_force(*rows(BEHIND, where=now), *rows(AHEAD, where=now + 1, path="packed"))
    assert [site.status for site in fused(slow_here)] == ["skipped", "fused"]
    slow_elsewhere = in_force(*rows(AHEAD, where=now, path="packed"), *rows(BEHIND, where=now + 1))
    assert [site.status for site in fused(slow_elsewhere)] == ["fused", "fused"]
    slow_with_most = in_force(*rows(AHEAD, where=now + 1, path="packed"), *rows(BEHIND, where=now + 2))
    assert [site.status for site in fused(slow_with_most)] == ["skipped", "fused"]


def test_layers_without_an_activation_ask_the_tables_too():
    routing.use([in_force(*rows(BEHIND))])
    model = fuse(nn.Sequential(nn.Linear(100, 200)), activations="none")
    (site,) = report(model)
    assert site.slower and type(model[0]) is nn.Linear
    (site,) = report(fuse(model))
    assert site.why == "no activation takes its output"
