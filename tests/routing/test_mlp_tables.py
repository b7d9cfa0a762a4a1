"""Rows of chains in route tables, and tables with rows of one product for several numbers of threads."""

import dataclasses
import itertools
import json

import pytest
import torch

from dlkernels import _C, functional, routing
from dlkernels._version import __version__
from dlkernels.routing import MLP_OPS, STOCK, RouteError, Row, Table
from dlkernels.tuning.table import empty_table, with_rows

FUSED, LAYERS = routing.MLP_PATHS
FEATURES = (8, 64, 64, 4)
AHEAD = {
    FUSED: {STOCK: 2.0, FUSED: 1.0, LAYERS: 1.5},
    LAYERS: {STOCK: 2.0, FUSED: 1.5, LAYERS: 1.0},
}


def row(op="mlp_forward", path=FUSED, where=None, us=None, m=256, features=FEATURES, refused=()):
    k, *hidden, n = features
    where = torch.get_num_threads() if where is None else where
    us = AHEAD[path] if us is None else us
    return Row(op, "float32", m, n, k, where, path, us, "2026-11-28", "0123456789abcdef", refused, tuple(hidden))


def layer(path, where, us):
    return Row("forward", "float32", 300, 200, 100, where, path, us, "2026-11-28", "")


def table(*rows, any_threads=False, **head):
    return dataclasses.replace(empty_table(any_threads), rows=rows or (row(),), name="mine.json", **head)


@pytest.fixture(autouse=True)
def _no_tables():
    before = torch.get_num_threads()
    yield
    routing.use(())
    torch.set_num_threads(before)


def plan(m=256, features=FEATURES):
    weights = [torch.empty(n, k) for k, n in itertools.pairwise(features)]
    return functional.explain_mlp(torch.empty(m, features[0]), weights)


def ways(m=256, features=FEATURES):
    found = plan(m, features)
    return tuple(FUSED if step else LAYERS for step in (found.forward, found.backward))


def test_a_table_with_chains_is_read_back_as_it_was():
    one = table(row(), row("mlp_backward", LAYERS), layer("aten", 2, {STOCK: 1.0, "aten": 1.0}))
    assert routing.parse(one.text()) == dataclasses.replace(one, name="")
    written = json.loads(one.text())["rows"]
    assert list(written[0])[:6] == ["op", "dtype", "m", "k", "hidden", "n"] and written[0]["hidden"] == [64, 64]
    assert "hidden" not in written[2]
    assert table().hash != table(row(features=(8, 64, 65, 4))).hash


def changed(**changes):
    """The text of a table whose only row has other values; ``None`` takes a key away."""
    content = json.loads(table().text())
    content["rows"][0].update(changes)
    content["rows"][0] = {key: value for key, value in content["rows"][0].items() if value is not None}
    return json.dumps(content)


DAMAGED = {
    "no hidden": (changed(hidden=None), "hidden to be a list of whole numbers of at least 1, got None"),
    "empty hidden": (changed(hidden=[]), "hidden to be a list of whole numbers"),
    "hidden of nothing": (changed(hidden=[64, 0]), "hidden to be a list of whole numbers"),
    "hidden as text": (changed(hidden="64"), "hidden to be a list of whole numbers"),
    "hidden as truth": (changed(hidden=[True]), "hidden to be a list of whole numbers"),
    "hidden of a layer": (changed(op="forward", path="aten"), "hidden to be absent: only chains have it, got .64, 64."),
    "path of a product": (changed(path="packed"), "path to be one of fused_mlp, layers, got 'packed'"),
    "path of a chain": (changed(op="forward", hidden=None), "path to be one of packed, few_rows, few_columns, aten"),
    "time of a product": (changed(us={"stock": 1, "fused_mlp": 1, "aten": 1}), "us to be microseconds by names of"),
    "op": (changed(op="mlp"), "op to be one of forward, dgrad, wgrad, mlp_forward, mlp_backward, got 'mlp'"),
    "behind stock": (changed(us={"stock": 1, "fused_mlp": 2, "layers": 1}), "not clearly slower than stock"),
    "not the fastest": (changed(us={"stock": 9, "fused_mlp": 2, "layers": 1}), "the fastest path"),
    "not the fastest behind stock": (changed(us={"stock": 1, "fused_mlp": 3, "layers": 2}), "the fastest path"),
    "no time of stock": (changed(us={"fused_mlp": 1}), "us to have the time of stock"),
    "not measured": (changed(us={"stock": 1, "layers": 1}), "a path that was measured"),
    "refused and taken": (changed(us={}, refused=["fused_mlp"]), "a path that was not judged wrong"),
    "refused of a product": (changed(refused=["packed"]), "refused to be a list of paths"),
    "twice": (table(row(), row()).text(), "two rows are of the same product"),
}


@pytest.mark.parametrize(("text", "why"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_row_is_refused(text, why):
    with pytest.raises(RouteError, match=why):
        routing.parse(text)


SOUND = {
    "ahead": row(),
    "within noise of the fastest": row(us={STOCK: 2.0, FUSED: 1.03, LAYERS: 1.0}),
    "all behind stock, the fastest": row(us={STOCK: 1.0, FUSED: 1.5, LAYERS: 2.0}),
    "all behind stock, layer by layer": row(path=LAYERS, us={STOCK: 1.0, FUSED: 2.0, LAYERS: 1.5}),
    "one was wrong": row(path=LAYERS, us={STOCK: 1.0, LAYERS: 1.0}, refused=(FUSED,)),
    "one was wrong, no times": row(path=LAYERS, us={}, refused=(FUSED,)),
    "layer by layer was wrong": row(us={STOCK: 1.0, FUSED: 0.5}, refused=(LAYERS,)),
}


@pytest.mark.parametrize("one", SOUND.values(), ids=SOUND)
def test_what_a_row_may_say(one):
    assert routing.parse(table(one).text()).rows == (one,)


def test_two_chains_may_differ_in_hidden_features_alone():
    rows = (row(), row(features=(8, 64, 4)), row(features=(8, 32, 64, 4)), row("mlp_backward"))
    assert routing.parse(table(*rows).text()).rows == rows


def test_the_reason_says_what_was_measured():
    one = table(row(where=2), row("mlp_backward", LAYERS, where=1))
    said = "measured at 256, 8→64→64→4 with 2 threads: 0.50 of stock's time (row 1 of mine.json, 2026-11-28, commit "
    assert one.rows[0].reason(one, 1) == f"{said}0123456789)"
    assert "→4 with 1 thread: backward in 0.50 of stock's time (row 2" in one.rows[1].reason(one, 2)
    gpu = Table("cuda", "NVIDIA H100", "", torch.__version__, __version__, False, (row(where=90),))
    assert "→4 on architecture 9.0: 0.50 of" in gpu.rows[0].reason(gpu, 1)
    assert routing.parse(gpu.text()) == gpu


def test_each_direction_follows_its_row_and_explain_names_it():
    for forward, backward in ((FUSED, LAYERS), (LAYERS, FUSED)):
        routing.use([table(row(path=forward), row("mlp_backward", backward))])
        assert ways() == ways(m=300) == (forward, backward)
        found = plan()
        assert all(f"row {number} of mine.json" in why for number, why in enumerate(found.why, start=1))
        assert {each.path == FUSED for each in (rows[0] for rows in found)} == {forward == FUSED}
        assert {each.path == FUSED for rows in found for each in rows[1:]} == {backward == FUSED}
        text = str(found)
        for direction, path in (("forward", forward), ("backward", backward)):
            by_layer = direction if path == LAYERS else ""
            assert (f"\n  {direction} layer by layer\n    why: measured at 256" in text) == bool(by_layer)
            assert (f"\n  {direction} as one kernel: {direction} -> " in text) == (not by_layer)
            assert (f"\n  {direction}:\n    1. " in text) == bool(by_layer), "the steps of layers that run one by one"


def test_a_damaged_table_is_ignored_and_the_rules_decide(tmp_path, monkeypatch):
    usual = ways()
    other = {FUSED: LAYERS, LAYERS: FUSED}[usual[0]]
    file = tmp_path / "mine.json"
    monkeypatch.setenv(routing.VARIABLE, str(file))
    file.write_text(table(row(path=other)).text())
    routing.install()
    assert ways() == (other, usual[1])
    file.write_text(file.read_text().replace("[64, 64]", "[64, -64]"))
    with pytest.warns(RuntimeWarning, match=r"is damaged: row 1: expected hidden to be"):
        routing.install()
    assert ways() == usual


def test_a_wrong_path_is_taken_with_no_number_of_threads():
    shipped = table(row(), row("mlp_backward"), any_threads=True)
    wrong = [row(op, LAYERS, where=2, us={}, refused=(FUSED,)) for op in MLP_OPS]
    routing.use([table(*wrong), shipped])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert ways() == (LAYERS, LAYERS)
        assert "fused_mlp judged wrong" in plan().why[0]


def test_tables_that_change_a_row_keep_those_of_other_chains():
    first = table(row(), row(features=(8, 64, 4)), row(m=32))
    again = with_rows(first, [row(path=LAYERS, us={STOCK: 1.0, LAYERS: 1.0}, refused=(FUSED,))])
    assert [(one.m, one.features, one.path) for one in again.rows] == [
        (32, FEATURES, FUSED), (256, (8, 64, 4), FUSED), (256, FEATURES, LAYERS)
    ]  # fmt: skip


# ---- tables for any number of threads --------------------------------------------------------------------------------


def test_the_row_for_its_number_counts_and_the_one_with_the_most_threads_for_all_others():
    packed, aten = {STOCK: 2.0, "packed": 1.0}, {STOCK: 2.0, "aten": 1.0}
    rows = [layer("packed", 4, packed), layer("aten", 1, aten), layer("aten", 2, aten)]
    rows += [row(path=FUSED, where=2), row(path=LAYERS, where=1), row("mlp_backward", LAYERS, where=1)]
    backward = ways()[1]
    routing.use([table(*rows, any_threads=True)])
    for threads, path, forward in ((1, "aten", LAYERS), (2, "aten", FUSED), (3, "packed", FUSED), (4, "packed", FUSED)):
        torch.set_num_threads(threads)
        found = functional.explain(torch.empty(300, 100), torch.empty(200, 100))[0]
        assert found.path == path and f"with {4 if threads > 2 else threads} thread" in found.why
        assert ways() == (forward, LAYERS), "the row of backward alone is for any number"
    routing.use(())
    assert ways()[1] == backward


def test_a_user_s_row_for_any_number_comes_before_a_shipped_one_for_this_number():
    packed, aten = {STOCK: 2.0, "packed": 1.0}, {STOCK: 2.0, "aten": 1.0}
    tuned = table(layer("packed", 7, packed), row(path=LAYERS, where=7), any_threads=True)
    shipped = table(layer("aten", 1, aten), layer("aten", 2, aten), row(where=1), row(where=2), any_threads=True)
    routing.use([tuned, shipped])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert functional.explain(torch.empty(300, 100), torch.empty(200, 100))[0].path == "packed"
        assert ways()[0] == LAYERS


def test_rows_in_force():
    rows = [row(where=1), row(where=2), row(m=32, where=3), row("mlp_backward", where=1)]
    any_number, one_number = table(*rows, any_threads=True), table(*rows)
    assert [number for number, _ in any_number.in_force(1)] == [1, 3, 4]
    assert [number for number, _ in any_number.in_force(2)] == [2, 3, 4]
    assert [number for number, _ in any_number.in_force(5)] == [2, 3, 4]
    assert [number for number, _ in one_number.in_force(1)] == [1, 4]
    assert [number for number, _ in one_number.in_force(5)] == []


@pytest.mark.parametrize(
    "wrong",
    [
        ("forward", "float32", 1, (1, 1, 1), 0, FUSED, "", 0),
        ("mlp_forward", "float32", 0, (1, 1, 1), 0, FUSED, "", 0),
        ("mlp_forward", "float32", 1, (1, 1), 0, FUSED, "", 0),
        ("mlp_forward", "float32", 1, (1, 0, 1), 0, FUSED, "", 0),
        ("mlp_forward", "float32", 1, (1, 1, 1), -1, FUSED, "", 0),
        ("mlp_forward", "float32", 1, (1, 1, 1), 0, "packed", "", 0),
        ("mlp_forward", "float32", 1, (1, 1, 1), 0, FUSED, "", -1),
    ],
    ids=str,
)
def test_what_is_no_row_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        _C.make_routes([], [wrong])
