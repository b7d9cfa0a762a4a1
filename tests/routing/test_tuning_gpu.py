"""``tune`` for a GPU, with a stand-in on the host: routes, graphs and events are invented, the judge is real."""

import pytest
import torch
from torch import nn

import dlkernels
from dlkernels import functional, routing
from dlkernels.__main__ import main
from dlkernels.tuning import Size, TuneError, clock, layers, measurement, paths
from tests.conftest import HAS_GPU

USUAL, SIZE = "mma", (48, 64, 16)
TAKEN = {"simt", "mma", "hopper", "cublas"}  # fused_mlp does not take this layer


class InventedGpu:
    """Its kernels compute on the CPU. `hopper` is wrong by a thousandth. A graph takes the time of the paths that were
    in use when it was captured."""

    def __init__(self, monkeypatch, seconds):
        self.tables, self.table, self.now, self.seconds, self.captured = [], -1, 0.0, seconds, []
        right, draw = functional.linear_relu, measurement.draw
        # In the order of the calls: the paths, without which nothing can be asked; the layer; the clock.
        for module in (clock, paths):
            monkeypatch.setattr(module, "_C", self)
        monkeypatch.setattr(functional, "explain", self.explain)
        monkeypatch.setattr(functional, "linear_relu", lambda *a: right(*a) * self.factor())
        monkeypatch.setattr(measurement, "draw", lambda size: draw(Size(size.m, size.k, size.n, size.dtype)))
        monkeypatch.setattr(Size, "of", lambda x, w: Size(*x.shape, len(w), str(x.dtype)[6:], "cuda"))
        monkeypatch.setattr(layers, "no_gpu", lambda: "")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU (80 GB)")
        monkeypatch.setattr(clock.graph, "capture", self.capture)
        monkeypatch.setattr(clock.graph, "on_another_stream", lambda: torch.no_grad())
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: InventedEvent(self))

    # what dlkernels._C offers
    def make_routes(self, rows):
        self.tables.append({op: path for op, *_, path, why, table in rows})
        return len(self.tables) - 1

    def use_routes(self, table, cuda=False):
        assert cuda or table == -1, "the routes of the CPU stay as they are"
        before, self.table = self.table, table if cuda else self.table
        return before

    def path(self, op):
        asked = self.tables[self.table].get(op) if self.table >= 0 else None
        return asked if asked in TAKEN else USUAL

    def explain(self, x, weight):
        return [type("Product", (), {"op": op, "path": self.path(op)}) for op in routing.OPS]

    def factor(self):
        return 1.001 if self.path("forward") == "hopper" else 1.0

    def capture(self, body):
        paths = tuple(map(self.path, routing.OPS)) if self.table >= 0 else ("stock",) * 3
        self.captured.append(paths)

        def replay():
            self.now += sum(self.seconds[path] for path in paths)

        return replay


class InventedEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(routing, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(routing.VARIABLE, raising=False)
    monkeypatch.setattr(routing, "install", lambda: None)  # this build knows no CUDA
    return lambda **seconds: InventedGpu(monkeypatch, {"stock": 1e-3, **seconds})


def test_the_fastest_right_path_is_taken_and_the_table_is_the_gpu_s(gpu):
    one, told = gpu(simt=3e-3, mma=2e-3, hopper=1e-4, cublas=5e-4), []
    table = dlkernels.tune(shapes=[SIZE], dtypes=["float32"], seconds=0.01, device="cuda", told=told.append)
    assert (table.device, table.processor, table.any_threads) == ("cuda", "Some GPU (80 GB)", False)
    assert [(row.op, row.path, row.where) for row in table.rows] == [(op, "cublas", 90) for op in routing.OPS]
    assert all(set(row.us) == {"stock", "simt", "mma", "cublas"} for row in table.rows)
    assert list(told[0].refused) == ["hopper"] and "y: error" in told[0].refused["hopper"]
    assert one.captured[0] == ("stock",) * 3 and not any("hopper" in paths for paths in one.captured)
    file = routing.cache_folder() / routing.tuned_name(device="cuda")
    assert file.name.startswith("cuda-some-gpu-80-gb-torch-")
    assert routing.read(file, "") == table
    assert one.table == -1, "the built-in rules are back"


def test_the_usual_path_stays_within_noise_and_none_is_taken_behind_stock(gpu):
    gpu(simt=3e-3, mma=0.99e-3, hopper=1e-4, cublas=0.98e-3)
    table = dlkernels.tune(shapes=[SIZE], dtypes=["float32"], seconds=0.01, device="cuda")
    assert {row.path for row in table.rows} == {USUAL}
    gpu(simt=3e-3, mma=1.2e-3, hopper=1e-4, cublas=1.3e-3)
    table = dlkernels.tune(shapes=[SIZE], dtypes=["float32"], seconds=0.01, device="cuda")
    assert {row.path for row in table.rows} == {"cublas"}, "all are behind stock"


def test_a_path_that_the_environment_forces_leaves_nothing_to_measure(gpu, monkeypatch):
    gpu(mma=1.0)
    monkeypatch.setenv("DLKERNELS_CUDA_GEMM", "mma")
    with pytest.raises(TuneError, match="DLKERNELS_CUDA_GEMM takes the choice between paths away"):
        dlkernels.tune(shapes=[SIZE], device="cuda")


def test_a_layer_elsewhere_is_refused(gpu):
    gpu(mma=1.0)
    with pytest.raises(TuneError, match="tune measures on cuda, and a layer of the model is on cpu"):
        dlkernels.tune(nn.Linear(4, 4), torch.ones(2, 4), device="cuda")


@pytest.mark.skipif(HAS_GPU, reason="a GPU is here")
def test_without_a_gpu_one_sentence_says_so(capsys):
    with pytest.raises(TuneError, match=r"tune: (this build has no CUDA kernels|torch sees no GPU)"):
        dlkernels.tune(shapes=[SIZE], device="cuda")
    with pytest.raises(TuneError, match="the device is meta"):
        dlkernels.tune(nn.Linear(4, 4, device="meta"), torch.ones(2, 4))
    assert main(["tune", "--device", "cuda", "--shapes", "4x4x4"]) == 1
    assert "tune: this build has no CUDA kernels" in capsys.readouterr().err


def test_tuned_tables_of_gpus_are_read(gpu, monkeypatch):
    gpu(simt=3e-3, mma=2e-3, hopper=1e-4, cublas=5e-4)
    table = dlkernels.tune(shapes=[SIZE], dtypes=["float32"], seconds=0.01, device="cuda")
    config = routing._C.build_config() | {"cuda": "13.0"}
    monkeypatch.setattr(routing._C, "build_config", lambda: config)
    assert routing.chosen() == [table]
    monkeypatch.setenv(routing.VARIABLE, "shipped")
    assert routing.chosen() == []
