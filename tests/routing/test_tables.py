"""Route tables as files: which are taken, which are ignored and why, and that ``explain`` and ``info`` name them."""

import dataclasses
import itertools
import json
import threading
import warnings
from pathlib import Path

import pytest
import torch

from dlkernels import _C, _gpus, functional, routing
from dlkernels.__main__ import main
from dlkernels._processors import measured_relative
from dlkernels._version import __version__
from dlkernels.routing import LIBRARY, MLP_OPS, MLP_PATHS, OPS, STOCK, RouteError, Row, Table
from dlkernels.tuning.table import empty_table
from tests.support.subprocess_utils import python

SIZES = {"m": 300, "n": 200, "k": 100}
PACKED = {STOCK: 2.0, "packed": 1.0}


def row(op="forward", path="aten", where=None, us=None, **sizes):
    us = {STOCK: 2.0, "packed": 3.0, "aten": 1.5} if us is None else us
    sizes = SIZES | sizes
    threads = torch.get_num_threads() if where is None else where
    return Row(op, "float32", *sizes.values(), threads, path, us, "2026-11-28", "0123456789abcdef")


def table(*rows, **head):
    return dataclasses.replace(empty_table(any_threads=False), rows=rows or (row(),), **head)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The folders (shipped, tuned) of a process that has neither table, nor a wish."""
    monkeypatch.delenv(routing.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(routing, "SHIPPED", tmp_path / "shipped")
    for folder in (routing.SHIPPED, routing.cache_folder()):
        folder.mkdir(parents=True)
    yield routing.SHIPPED, routing.cache_folder()
    routing.use(())


def put(folder, table_or_text):
    text = table_or_text if isinstance(table_or_text, str) else table_or_text.text()
    (folder / routing.file_name()).write_text(text)


def forward_path(m=300, n=200, k=100):
    return functional.explain(torch.empty(m, k), torch.empty(n, k))[0].path


def test_a_table_is_read_back_as_it_was():
    one = table(row(), row("dgrad"), any_threads=True)
    assert routing.parse(one.text()) == one
    assert table().hash != table(row(m=301)).hash
    assert routing.parse(empty_table(False).text()).rows == ()


def changed(**changes):
    """The text of a table whose only row has other values; ``None`` takes a key away."""
    content = json.loads(table().text())
    content["rows"][0].update(changes)
    content["rows"][0] = {key: value for key, value in content["rows"][0].items() if value is not None}
    return json.dumps(content)


def other_head(**changes):
    return json.dumps(json.loads(table().text()) | changes)


DAMAGED = {
    "empty": ("", "no JSON"),
    "cut": (table().text()[:-40], "no JSON"),
    "bytes": ("\x00" * 100, "no JSON"),
    "list": ("[]", "an object with format 1, got 'list'"),
    "format": (other_head(format=2), "an object with format 1, got 2"),
    "device": (other_head(device="tpu"), "device: expected cpu or cuda, got 'tpu'"),
    "torch": (other_head(torch=2), "torch: expected text, got 2"),
    "rows": (other_head(rows={}), "a list of rows"),
    "threads of all": (other_head(any_threads=1), "any_threads"),
    "row": (other_head(rows=[3]), "row 1: expected an object"),
    "op": (changed(op="backward"), "row 1: expected op to be one of forward"),
    "dtype": (changed(dtype="float8"), "dtype to be one of"),
    "path": (changed(path="mma"), "path to be one of packed"),
    "size": (changed(m=0), "m to be a whole number"),
    "size as text": (changed(k="64"), "k to be a whole number"),
    "size as truth": (changed(n=True), "n to be a whole number"),
    "no threads": (changed(threads=None), "threads to be a whole number"),
    "times": (changed(us=[1]), "us to be microseconds"),
    "negative time": (changed(us={"stock": 1, "aten": -1}), "us to be positive"),
    "unknown time": (changed(us={"stock": 1, "blas": 1}), "us to be microseconds by names of paths"),
    "behind stock": (changed(path="packed"), "not clearly slower than stock, or aten"),
    "not measured": (changed(path="few_rows"), "a path that was measured"),
    "date": (changed(date=20261128), "date to be text"),
    "surrogate": (changed(date="\ud800"), "date to be text"),
    "NUL": (changed(commit="a\0b"), "commit to be text"),
    "op as list": (changed(op=[]), "op to be one of"),
    "dtype as list": (changed(dtype=["float32"]), "dtype to be one of"),
    "path as object": (changed(path={}), "path to be one of"),
    "device as list": (other_head(device=[]), r"device: expected cpu or cuda, got \[\]"),
    "device as object": (other_head(device={}), "device: expected cpu or cuda, got {}"),
    "format as truth": (other_head(format=True), "an object with format 1, got True"),
    "isa": (other_head(isa=None), "isa: expected text, got None"),
    "deep": ("[" * 200_000, "no JSON"),
    "deep within": (table().text().replace('"forward"', "[" * 900 + "]" * 900), "op to be one of"),
    "large number": ("1" * 100_000, "no JSON"),
    "not a number": (table().text().replace("1.5", "NaN"), "us to be positive"),
    "keys twice": (table().text().rstrip()[:-1] + ', "rows": []}', "a key is there twice"),
    "threads beyond": (changed(threads=2**20), "threads to be below a million"),
    "refused as text": (changed(refused="packed"), "refused to be a list of paths"),
    "refused twice": (changed(refused=["packed", "packed"]), "refused to be a list of paths"),
    "refused and unknown": (changed(refused=[["mma"]]), "refused to be a list of paths"),
    "no times": (changed(us={}), "a path that was measured"),
    "no time of stock": (changed(us={"aten": 1.0}), "us to have the time of stock"),
    "no time of its path": (changed(us={"stock": 1.0, "packed": 1.0}), "a path that was measured"),
    "not the fastest": (changed(path="packed", us={"stock": 50, "packed": 50, "aten": 5}), "the fastest path"),
    "library not the fastest": (changed(us={"stock": 2, "packed": 1, "aten": 2}), "the fastest path"),
    "refused and timed": (changed(refused=["packed"]), "no time of a path that was judged wrong"),
    "refused and taken": (changed(path="few_rows", refused=["few_rows"]), "a path that was not judged wrong"),
    "refused, ours untimed": (changed(path="few_rows", us={}, refused=["packed"]), "a path that was measured"),
    "twice": (table(row(), row()).text(), "two rows are of the same product"),
}


@pytest.mark.parametrize(("text", "why"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_ignored_and_said_so(places, text, why):
    shipped, tuned = places
    put(shipped, table(row(path="aten"), any_threads=True))
    put(tuned, text)
    with pytest.raises(RouteError, match=why):
        routing.parse(text)
    with pytest.warns(RuntimeWarning, match=f"{routing.file_name()} is ignored: it is damaged: .*tune` measures again"):
        routing.install()
    assert [one.source for one in routing.in_use()] == ["shipped"], "the other one counts"
    assert forward_path() == "aten"


SOUND = {
    "within noise of stock": ("packed", {"stock": 100.0, "packed": 103.0, "aten": 104.0}, ()),
    "within noise of the fastest": ("packed", {"stock": 2.0, "packed": 1.03, "aten": 1.0}, ()),
    "all behind stock": ("aten", {"stock": 1.0, "packed": 1.5, "aten": 2.0}, ()),
    "one was wrong": ("aten", {"stock": 1.0, "aten": 1.0}, ("packed",)),
    "one was wrong, no times": ("aten", {}, ("packed",)),
    "all were wrong": ("aten", {}, ("packed", "aten")),
    "the library was wrong, the rest behind": ("aten", {"stock": 1.0, "packed": 1.5}, ("aten",)),
}


@pytest.mark.parametrize(("path", "us", "refused"), SOUND.values(), ids=SOUND)
def test_what_a_row_may_say(path, us, refused):
    one = table(dataclasses.replace(row(path=path, us=us), refused=refused))
    assert routing.parse(one.text()) == one


def test_a_gpu_s_row_may_lack_the_time_of_stock():
    """bench.dispatch times paths against each other alone."""
    taken = Row("forward", "bfloat16", 300, 200, 100, 90, "mma", {"mma": 1.0, "cublas": 2.0}, "2026-11-28", "")
    gpu = Table("cuda", "NVIDIA H100", "", torch.__version__, __version__, False, (taken,))
    assert routing.parse(gpu.text()) == gpu
    assert "at 300, 100→200 on architecture 9.0" in taken.reason(gpu, 1)
    for path, us in (("mma", {"mma": 2.0, "cublas": 1.0}), ("mma", {"cublas": 1.0}), ("cublas", {})):
        other = dataclasses.replace(gpu, rows=(dataclasses.replace(taken, path=path, us=us),))
        with pytest.raises(RouteError, match=r"the fastest path|a path that was measured"):
            routing.parse(other.text())


def test_a_gpu_s_table_is_for_the_gpu_of_its_name(monkeypatch):
    gpu = Table("cuda", "NVIDIA H100", "", torch.__version__, __version__, False, ())
    config = routing._C.build_config() | {"cuda": "13.0"}
    monkeypatch.setattr(routing._C, "build_config", lambda: config)
    for here, why in (
        (("NVIDIA H200",), "it was measured on NVIDIA H100, and this is NVIDIA H200"),
        (("NVIDIA H100 NVL", "NVIDIA A100"), "and this is NVIDIA H100 NVL and NVIDIA A100"),
        (("NVIDIA H200", "NVIDIA H100"), ""),
        ((), ""),  # the driver says nothing: the architecture of the rows decides
    ):
        monkeypatch.setattr(routing, "gpu_names", lambda here=here: here)
        assert routing.why_not_here(gpu).endswith(why) and bool(routing.why_not_here(gpu)) == bool(why)
    monkeypatch.setattr(routing, "gpu_names", lambda: ("NVIDIA H100",))
    part = dataclasses.replace(gpu, processor="NVIDIA H100 MIG 1g.10gb")
    assert routing.why_not_here(part) == "", "a part of this GPU"


FOREIGN = {
    "processor": ({"processor": "authenticamd-1-1"}, "was measured on authenticamd-1-1 with .*, and this is"),
    "instruction set": ({"isa": "sve"}, "was measured on .* with sve, and this is"),
    "torch": ({"torch": "2.0.0"}, f"measured with torch 2.0.0, and this is torch {torch.__version__}"),
    "dlkernels": ({"dlkernels": "0.0.1"}, f"with dlkernels 0.0.1, and this is dlkernels {__version__}"),
}


@pytest.mark.parametrize(("head", "why"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_or_stale_table_is_ignored_and_said_so(places, head, why):
    put(places[1], table(**head))
    with pytest.warns(RuntimeWarning, match="is ignored: it was .*" + why.removeprefix("was ").replace("+", r"\+")):
        routing.install()
    assert routing.in_use() == () and routing.identity() == "none"
    assert forward_path() == "packed"


@pytest.mark.skipif(_C.build_config()["cuda"] is not None, reason="this build has CUDA kernels")
def test_a_table_for_cuda_is_foreign_to_a_build_for_cpu(places, tmp_path, monkeypatch):
    rows = (Row("forward", "bfloat16", 300, 200, 100, 90, "mma", {"mma": 1.0, "cublas": 2.0}, "2026-11-28", ""),)
    gpu = Table("cuda", "NVIDIA H100", "", torch.__version__, __version__, False, rows)
    assert routing.parse(gpu.text()) == gpu
    file = tmp_path / "cuda-nvidia-h100.json"
    file.write_text(gpu.text())
    monkeypatch.setenv(routing.VARIABLE, str(file))
    with pytest.warns(RuntimeWarning, match="it is for CUDA, and this build has no CUDA kernels"):
        routing.install()


def test_a_shipped_table_is_for_every_torch_and_every_number_of_threads(places):
    put(places[0], table(row(where=7), torch="2.0.0", any_threads=True))
    routing.install()
    assert forward_path() == "aten"
    put(places[0], table(row(where=torch.get_num_threads() + 1), any_threads=False))
    routing.install()
    assert forward_path() == "packed"


def test_the_tuned_table_comes_first(places):
    shipped, tuned = places
    put(shipped, table(row(), row(m=30), any_threads=True))
    put(tuned, table(row(path="packed", us=PACKED)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routing.install()
    assert [one.source for one in routing.in_use()] == ["tuned", "shipped"]
    assert (forward_path(), forward_path(m=30)) == ("packed", "aten")
    alone = routing.identity()
    routing.use(routing.in_use()[1:])
    assert routing.identity() != alone and (forward_path(), forward_path(m=30)) == ("aten", "aten")


def test_a_row_of_the_layer_s_size_comes_before_a_tuned_class(places):
    shipped, tuned = places
    put(shipped, table(row(), any_threads=True))
    put(tuned, table(row(path="packed", m=400, us=PACKED)))
    routing.install()
    assert (forward_path(), forward_path(m=400), forward_path(m=401)) == ("aten", "packed", "packed")


def test_a_wrong_path_is_taken_with_no_number_of_threads(places):
    """The user's row comes before a shipped one for any number of threads, and before the rules, which pack here."""
    shipped, tuned = places
    put(shipped, table(row(path="packed", us=PACKED), any_threads=True))
    wrong = dataclasses.replace(row(us={}), refused=("packed",))
    before = torch.get_num_threads()
    put(tuned, table(wrong))
    routing.install()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert forward_path() == "aten", threads
            assert "packed judged wrong" in functional.explain(torch.empty(300, 100), torch.empty(200, 100))[0].why
    finally:
        torch.set_num_threads(before)


def named(**versions):
    """The name of a tuned table of other versions."""
    return routing.tuned_name().replace(torch.__version__, versions.get("torch", torch.__version__))


def test_tables_of_other_versions_lie_beside_and_are_named_only_where_none_is_for_these(places, capsys):
    _, tuned = places
    (tuned / named(torch="2.0.0")).write_text(table(torch="2.0.0").text())
    with pytest.warns(RuntimeWarning, match="it was measured with torch 2.0.0, and this is torch"):
        routing.install()
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"{tuned / named(torch='2.0.0')}: it was measured with torch 2.0.0, and this is torch" in printed
    assert "ignored 1" in printed
    (tuned / named()).write_text(table().text())
    (tuned / routing.tuned_name(any_threads=True)).write_text(table(row("dgrad"), any_threads=True).text())
    (tuned / routing.file_name().replace(".json", "_bf16-torch-2.json")).write_text("of another instruction set")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routing.install()
    assert [(one.source, one.any_threads) for one in routing.in_use()] == [("tuned", False), ("tuned", True)]
    assert not any(name.startswith("ignored") for name in routing.facts())


def test_a_folder_that_cannot_be_searched_is_said_so(places, monkeypatch):
    put(places[0], table(any_threads=True))
    listed = routing.os.listdir

    def refuse(folder):
        if folder == places[1]:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(routing.os, "listdir", refuse)
    with pytest.warns(
        RuntimeWarning, match="the folder of route tables .* is ignored: it cannot be read: Permission denied"
    ):
        routing.install()
    assert [one.source for one in routing.in_use()] == ["shipped"]


def test_the_variable_chooses(places, tmp_path, monkeypatch):
    shipped, tuned = places
    put(shipped, table(row(), any_threads=True))
    put(tuned, table(row("dgrad")))
    file = tmp_path / "mine.json"
    file.write_text(table(row("wgrad")).text())
    sources = {"shipped": ["shipped"], "default": [], str(file): ["file"], "": ["tuned", "shipped"]}
    for choice, expected in sources.items():
        monkeypatch.setenv(routing.VARIABLE, choice)
        routing.install()
        assert [one.source for one in routing.in_use()] == expected


def test_a_choice_that_is_none_stops_the_import():
    for code in (["-c", "import dlkernels"], ["-m", "dlkernels", "info"]):
        said = python(*code, check=False, DLKERNELS_ROUTES="no/such/file")
        assert "DLKERNELS_ROUTES must be shipped, default or the file of a route table; got 'no/such/file'" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("choice", "why"),
    [("x" * 5000, "File name too long"), (".", "which is no file"), ("/dev/null/x", "Not a directory")],
)
def test_a_choice_that_cannot_be_a_file_is_refused_in_words(choice, why, monkeypatch):
    monkeypatch.setenv(routing.VARIABLE, choice)
    with pytest.raises(ImportError, match=f"{routing.VARIABLE} must be shipped, default or the file.*{why}"):
        routing.chosen()


def test_variables_that_choose_the_bits_are_part_of_the_identity(monkeypatch):
    assert routing.identity() == "none"
    monkeypatch.setenv("DLKERNELS_CPU_GEMM", "own")
    assert routing.identity() == "none with DLKERNELS_CPU_GEMM=own"
    monkeypatch.setenv("DLKERNELS_CPU_ISA", "avx2")
    assert routing.identity() == "none with DLKERNELS_CPU_GEMM=own DLKERNELS_CPU_ISA=avx2"
    assert routing.facts()["hash"] == routing.identity()


def test_an_import_takes_the_routes_of_a_file(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(table(any_threads=True).text())
    code = "import torch; from dlkernels import explain; print(explain(torch.ones(300, 100), torch.ones(200, 100))[0])"
    assert "path='aten'" in python("-c", code, DLKERNELS_ROUTES=str(file))
    damaged = tmp_path / "damaged.json"
    damaged.write_text(file.read_text()[:-40])
    said = python("-c", code, check=False, DLKERNELS_ROUTES=str(damaged))
    assert "path='packed'" in said and "RouteTableWarning: the route table" in said and "it is damaged" in said


def test_explain_and_info_name_table_and_row(places, capsys):
    put(places[1], table(row("dgrad"), row()))
    routing.install()
    plan = functional.explain(torch.empty(300, 100), torch.empty(200, 100))
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    told = (
        f"measured at 300, 100→200 with {threads}: 0.75 of stock's time (row 2 of {{}}, 2026-11-28, commit 0123456789)"
    )
    assert plan[0].why == plan.forward[0].why == told.format(routing.file_name())
    assert "backward in 0.75" in plan[1].why and "row 1 of" in plan[1].why
    assert "measured at" not in plan[2].why
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"{routing.file_name()} (tuned, 2 rows, hash {routing.identity()})" in printed
    routing.use(())
    assert main(["info"]) == 0
    assert "none: the built-in rules" in capsys.readouterr().out


def test_the_same_table_gives_the_same_bits():
    x, weight, bias = torch.randn(300, 100), torch.randn(200, 100), torch.randn(200)

    def results():
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = functional.linear_relu(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    one = table(row(), row("dgrad"), row("wgrad", path="packed", us=PACKED), any_threads=True)
    try:
        routing.use((one,))
        first = results()
        routing.use(())
        results()
        routing.use((dataclasses.replace(one, name="the same, read again"),))
        assert all(map(torch.equal, first, results()))
    finally:
        routing.use(())


def test_tables_change_while_layers_run():
    """A plan is made under the old table or under the new one, and both are right."""
    x, weight = torch.randn(300, 100), torch.randn(200, 100)
    exact = torch.relu(x.double() @ weight.double().t())
    stop, errors = threading.Event(), []

    def run():
        while not stop.is_set():
            errors.append(float((functional.linear_relu(x, weight).double() - exact).abs().max()))

    threads = [threading.Thread(target=run) for _ in range(3)]
    tables = [_C.make_routes([("forward", "float32", 300, 200, 100, 0, path, "", 0)]) for path in ("aten", "packed")]
    try:
        for thread in threads:
            thread.start()
        for turn in range(300):
            _C.use_routes(tables[turn % 2] if turn % 3 else -1)
            stop.wait(0.001)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        routing.use(())
    assert len(errors) > 100 and max(errors) < 1e-4


def test_what_is_no_table_is_refused():
    with pytest.raises(ValueError, match="expected a table of make_routes, or -1 for none; got 100000"):
        _C.use_routes(100000)
    good = ("forward", "float32", 1, 1, 1, 0, "packed", "", 0)
    for place, wrong in ((0, "backward"), (2, 0), (5, -1), (6, "fast"), (8, -1)):
        with pytest.raises(ValueError, match="expected"):
            _C.make_routes([(*good[:place], wrong, *good[place + 1 :])])


def test_near_relatives():
    relatives = {
        "genuineintel-6-167": ("genuineintel-6-143", "genuineintel-6-173", "genuineintel-6-174", "genuineintel-6-207"),
        "authenticamd-25-1": ("authenticamd-25-0", "authenticamd-25-33", "authenticamd-25-80"),
        "authenticamd-25-17": (
            "authenticamd-25-24",
            "authenticamd-25-97",
            "authenticamd-25-117",
            "authenticamd-25-160",
        ),
    }
    for measured, names in relatives.items():
        assert {measured_relative(name) for name in (measured, *names)} == {measured}
        assert any(file.name.startswith(f"{measured}-") for file in SHIPPED)
    for other in ("authenticamd-26-17", "authenticamd-25-176", "genuineintel-6-85", "genuineintel-19-1", "aarch64", ""):
        assert measured_relative(other) == other


def test_a_processor_without_a_table_takes_the_shipped_one_of_its_near_relative(places, monkeypatch, capsys):
    shipped, tuned = places
    isa = _C.cpu_kernels()["isa"]
    there, here = table(processor="genuineintel-6-167", any_threads=True), "genuineintel-6-143"
    monkeypatch.setattr(routing, "processor", lambda: here)
    (shipped / f"{there.processor}-{isa}.json").write_text(there.text())
    (shipped / f"{there.processor}-other.json").write_text("of another instruction set")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routing.install()
    assert forward_path() == "aten"
    assert main(["info"]) == 0
    assert f"{there.processor}-{isa}.json (shipped for a near relative, 1 rows" in capsys.readouterr().out
    put(tuned, dataclasses.replace(there, any_threads=False))
    with pytest.warns(
        RuntimeWarning, match=f"it was measured on {there.processor} with {isa}, and this is {here} with {isa}"
    ):
        routing.install()
    (tuned / routing.file_name()).unlink()
    put(shipped, table(row(path="packed", us=PACKED), processor=here, any_threads=True))
    routing.install()
    assert forward_path() == "packed", "its own table comes before that of a relative"
    assert [one.processor for one in routing.in_use()] == [here]


SHIPPED = sorted((Path(routing.__file__).parent / "routes").glob("*.json"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_a_shipped_table_is_sound(file):
    """Its name is that of its processor, it is for any number of threads, and each row says when and with what it was
    measured. Where it is used, no product takes a path that the table ranks behind
    stock by more than noise."""
    one = routing.read(file, "shipped")
    assert one.rows and all(r.date and r.commit and r.us for r in one.rows)
    if one.device == "cuda":
        return
    assert file.name == f"{one.processor}-{one.isa}.json" and one.any_threads
    if one.isa != _C.cpu_kernels()["isa"]:
        return  # the kernels of these rows are not here
    before = torch.get_num_threads()
    try:
        routing.use((one,))
        for r in one.rows:
            torch.set_num_threads(r.where)
            assert (_path_of_chain if r.hidden else _path_of_layer)(r) == r.path, r
            if r.hidden:  # stock is no path of a chain: its layers are one, and fuse splits it
                assert r.us[r.path] <= 1.031 * min(r.us[path] for path in MLP_PATHS if path in r.us), r
            else:
                assert r.path == LIBRARY["cpu"] or r.us[r.path] <= 1.031 * r.us[STOCK], r
        assert {r.op for r in one.rows if not r.hidden} == set(OPS)
        assert {r.op for r in one.rows if r.hidden} in (set(), set(MLP_OPS))
    finally:
        routing.use(())
        torch.set_num_threads(before)


def _path_of_layer(row):
    dtype = getattr(torch, row.dtype)
    plan = functional.explain(torch.empty(row.m, row.k, dtype=dtype), torch.empty(row.n, row.k, dtype=dtype))
    (product,) = (each for each in plan if each.op == row.op)
    assert "measured at" in product.why
    return product.path


def _path_of_chain(row):
    dtype = getattr(torch, row.dtype)
    weights = [torch.empty(n, k, dtype=dtype) for k, n in itertools.pairwise(row.features)]
    plan = functional.explain_mlp(torch.empty(row.m, row.k, dtype=dtype), weights)
    step = plan.forward if row.op == "mlp_forward" else plan.backward
    fused, layers = MLP_PATHS
    return fused if step else layers


class InventedDriver:
    """The functions of libnvidia-ml, for GPUs of these names; None stands for one that may not be asked."""

    def __init__(self, *names):
        self.names = names

    def nvmlInit_v2(self):
        return 0 if self.names else 9

    def nvmlShutdown(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.names)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = index + 1
        return 0 if self.names[index] else 4

    def nvmlDeviceGetName(self, device, name, length):
        name.value = self.names[device.value - 1].encode()
        return 0


def test_the_names_of_gpus_are_asked_of_the_driver():
    assert _gpus._asked(InventedDriver("H200", None, "A100", "H200")) == ("H200", "A100")
    assert _gpus._asked(InventedDriver()) == ()
