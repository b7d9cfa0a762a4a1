"""Checkpoint files: damaged, foreign, of another run, or impossible to write."""

from __future__ import annotations

import datetime
import enum
import json
import os
import pickle
import random
import warnings
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dlkernels import routing
from dlkernels._errors import RouteTableWarning
from dlkernels.atomic import atomic_write, write_json
from dlkernels.trainer import Callback, CheckpointError, Checkpoints, Trainer, checkpoint
from dlkernels.tuning.table import empty_table
from tests.trainer.training import assert_same, batches, make, network, stop_after


@pytest.fixture
def saved(tmp_path) -> Path:
    trainer = make(checkpoint=tmp_path / "run.pt", config={"lr": 0.001})
    trainer.fit(1)
    return tmp_path / "run.pt"


def assert_refused(path: Path, match: str, **options) -> None:
    """The error names the reason, and the trainer is unchanged."""
    trainer = make(**{"config": {"lr": 0.001}, **options})
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    random_state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=match):
        trainer.load(path)
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert trainer.history == []


def test_missing(tmp_path):
    assert_refused(tmp_path / "none.pt", r"no checkpoint at .*none\.pt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated(saved, share):
    body = saved.read_bytes()
    saved.write_bytes(body[: int(len(body) * share)])
    assert_refused(saved, "cannot be read as a checkpoint")


def test_any_flipped_byte_is_noticed_or_harmless(saved):
    """Damage is refused, unless it is in unused bytes (padding, time stamps) and changes nothing."""
    body = saved.read_bytes()
    whole = pickle.dumps(comparable(checkpoint.load(saved)))
    generator = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(body)
        damaged[generator.randrange(len(body))] ^= 1 << generator.randrange(8)
        saved.write_bytes(damaged)
        try:
            state = checkpoint.load(saved)
        except CheckpointError:
            refused += 1
        else:
            assert pickle.dumps(comparable(state)) == whole
    assert refused > 30


def comparable(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    return value


def test_flipped_weight_is_named_as_damage(saved):
    body = bytearray(saved.read_bytes())
    weight = torch.load(saved, weights_only=True)["model"]["0.weight"].numpy().tobytes()
    body[body.index(weight) + 100] ^= 1
    saved.write_bytes(body)
    assert torch.load(saved, weights_only=True)  # which torch itself does not notice
    assert_refused(saved, "is damaged: .* fails its checksum")


def test_foreign_files(saved, tmp_path):
    torch.save(network().state_dict(), saved)
    assert_refused(saved, r"not a dlkernels checkpoint: expected format .* a dict with keys \['0.weight'")
    torch.save([1, 2], saved)
    assert_refused(saved, "it holds a list")
    saved.write_text("hello")
    assert_refused(saved, "cannot be read as a checkpoint")
    checkpoint.save(saved, {"model": network().state_dict()})
    assert_refused(saved, "not a trainer's checkpoint: it lacks batch, ")


def test_code_in_a_checkpoint_is_not_run(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "x": Evil()}, saved)
    assert_refused(saved, "cannot be read as a checkpoint")
    assert not (tmp_path / "evil").exists()


def test_newer_version(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 0)
    assert_refused(saved, "has checkpoint version 2; this dlkernels reads version 0")


# --- written values can be read back ---


class Level(enum.IntEnum):
    HIGH = 3


class Colour(str, enum.Enum):
    RED = "red"


class Notes(Callback):
    """Keeps ``held`` in the checkpoint."""

    def __init__(self, held=None):
        self.held = held

    def state_dict(self):
        return {"held": self.held}

    def load_state_dict(self, state):
        self.held = state["held"]


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array(2.5), 2.5),
        (Level.HIGH, 3),
        (Colour.RED, "red"),
        ([1, (np.float64(2), {np.int32(3): {np.float16(4)}})], [1, (2.0, {3: {4.0}})]),
        (OrderedDict(a=np.float64(1)), OrderedDict(a=1.0)),
        (Counter("aab"), Counter("aab")),
        (1j, 1j),
        (torch.Size([2]), torch.Size([2])),
    ],
)
def test_numbers_and_texts_are_written_as_they_can_be_read(tmp_path, value, read):
    make(checkpoint=tmp_path / "run.pt", callbacks=[Notes(value)]).fit(1)
    again = make(callbacks=[Notes()])
    again.load(tmp_path / "run.pt")

    def kinds(value):
        inside = value.items() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
        return type(value), [kinds(item) for item in inside]

    assert again.callbacks[0].held == read
    assert kinds(again.callbacks[0].held) == kinds(read)


class Scaled(torch.Tensor):
    """A tensor subclass that torch does not know."""


def noted():
    tensor = torch.ones(2)
    tensor.note = object()
    return tensor


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.ones(2), r"ndarray: give its tolist\(\), or torch\.from_numpy of it"),
        (Path("x"), "PosixPath"),
        (datetime.datetime(2020, 1, 1), "datetime"),
        (np.datetime64("2020"), "datetime64"),
        (defaultdict(int), "defaultdict"),
        (frozenset([1]), "frozenset"),
        pytest.param(10**1000, "int", id="a large int"),
        (np.longdouble(1), "longdouble"),
        (Notes, "type"),
        (len, "builtin_function_or_method"),
        (torch.ones(2).as_subclass(Scaled), "Scaled"),
        (noted(), "Tensor"),
        (torch.ones(2, device="meta"), "Tensor on the meta device, which has no values"),
    ],
)
def test_the_rest_is_refused_before_the_first_batch(tmp_path, value, named):
    path = tmp_path / "run.pt"
    for held, place in ((value, ""), ([{"x": value}], r"\[0\]\.x")):
        trainer = make(checkpoint=path, callbacks=[Notes(held)])
        with pytest.raises(TypeError, match=rf"callbacks\.0 Notes\.held{place} is a {named}"):
            trainer.fit(1)
        assert trainer.updates == 0
        with pytest.raises(TypeError, match=named):
            checkpoint.save(path, {"held": held})
    with pytest.raises(TypeError, match=f"config.x is a {named}"):
        make(checkpoint=path, config={"x": value}).fit(1)
    assert not list(tmp_path.iterdir())


class Means(Callback):
    """Puts a NumPy number in the row."""

    def on_epoch_end(self, trainer, row):
        row["mean"], row["half"] = np.mean([1.0, 2.0]), np.float32(0.5)


def test_numpys_numbers_anywhere_in_a_training(tmp_path):
    """NumPy numbers as learning rate, from a schedule, in a row and in the configuration."""

    def training(**options):
        model = network()
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.1), momentum=np.float32(0.5))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: np.float64(0.9) ** update)
        options |= {"scheduler": schedule, "callbacks": [Means()], "config": {"lr": np.float64(0.1)}}
        return Trainer(model, nn.CrossEntropyLoss(), optimizer, batches(), progress="silent", **options)

    whole = training()
    whole.fit(3)
    training(checkpoint=Checkpoints(tmp_path)).fit(2)
    again = training()
    again.load(tmp_path, fallback=True)
    again.fit(3)
    assert_same(again, whole)
    assert [type(again.history[0][name]) for name in ("mean", "half", "lr")] == [float] * 3
    assert json.loads(json.dumps(whole.history)) == whole.history
    assert not list(tmp_path.glob("*.damaged"))


def test_numbers_of_numpy_that_earlier_versions_wrote_are_read(saved):
    state = checkpoint.load(saved)
    state["history"][0]["mean"] = np.float64(1.5)
    state["optimizer"]["state"]["param_groups"][0]["lr"] = np.float32(0.5)
    torch.save(state, saved)
    trainer = make(config={"lr": 0.001})
    trainer.load(saved)
    assert type(trainer.history[0]["mean"]) is float
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5


def test_what_a_module_wrote_on_its_state_is_kept(tmp_path):
    state = OrderedDict(a=np.float64(1))
    state._metadata = {"": {"version": 2}}
    checkpoint.save(tmp_path / "x.pt", {"state": state})
    assert checkpoint.load(tmp_path / "x.pt")["state"]._metadata == {"": {"version": 2}}


def test_another_model(saved):
    wide = nn.Sequential(nn.Linear(64, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Dropout(0.2), nn.Linear(33, 10))
    match = r"another model: 0\.weight: expected \[33, 64\] float32; got \[32, 64\] float32; .*and \d+ more"
    assert_refused(saved, match, model=wide)
    assert_refused(saved, "1.weight: not in the model", model=nn.Sequential(nn.Linear(64, 32)))
    assert_refused(saved, "expected .*float64; got .*float32", model=network().double())


def test_another_optimizer(saved):
    model = network()
    data = batches()
    sgd = Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), data, config={"lr": 0.001})
    with pytest.raises(CheckpointError, match="holds the state of Adam; expected SGD"):
        sgd.load(saved)
    groups = [{"params": [p]} for p in model.parameters()]
    split = Trainer(model, nn.CrossEntropyLoss(), torch.optim.Adam(groups), data, config={"lr": 0.001})
    with pytest.raises(CheckpointError, match=r"groups of \[6\] parameters; expected \[1, 1, 1, 1, 1, 1\]"):
        split.load(saved)


def test_another_configuration(saved):
    assert_refused(saved, "made with lr = 0.001; this run has 0.01", config={"lr": 0.01})
    assert_refused(saved, "made with lr = 0.001; this run has None", config={})


def test_other_batches(saved, tmp_path):
    with pytest.warns(UserWarning, match="training goes on, but not as it would have"):
        make(batches(batch_size=32), config={"lr": 0.001}).load(saved)
    trainer = make(checkpoint=tmp_path / "mid.pt", config={"lr": 0.001})
    stop_after(trainer, epoch=0, batch=2)
    assert_refused(tmp_path / "mid.pt", "within an epoch only the same batches", data=batches(batch_size=32))


def test_unwritable_checkpoint_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make(checkpoint=tmp_path / "file" / "run.pt").fit(1)


def test_folder_in_the_place_of_the_file_is_noticed_before_training(tmp_path):
    trainer = make(checkpoint=tmp_path)
    with pytest.raises(IsADirectoryError, match=r"is a folder: give Checkpoints\(folder\)"):
        trainer.fit(1)
    assert trainer.updates == 0


def test_checkpoint_is_written_to_what_a_link_points_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run.pt").symlink_to(tmp_path / "disk" / "real.pt")
    (tmp_path / "disk" / ".real.pt.killed.tmp").write_text("")
    make(checkpoint=tmp_path / "run.pt").fit(1)
    assert (tmp_path / "run.pt").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real.pt"]
    make().load(tmp_path / "run.pt")


def test_checkpoints_stay_in_their_place_after_a_chdir(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainers = make(checkpoint="run.pt"), make(checkpoint=Checkpoints("run"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    for trainer in trainers:
        trainer.fit(1)
    assert (tmp_path / "run.pt").exists() and (tmp_path / "run" / "best.pt").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"old")

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_half()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="expected a file to write"):
        write_json(tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_written_files_have_ordinary_permissions(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    write_json(tmp_path / "new.json", {"nan": float("nan"), "list": [1.5, float("inf")]})
    assert (tmp_path / "new.json").stat().st_mode == ordinary.stat().st_mode
    assert json.loads((tmp_path / "new.json").read_text()) == {"nan": None, "list": [1.5, None]}
    (tmp_path / "new.json").chmod(0o600)
    write_json(tmp_path / "new.json", {})
    assert (tmp_path / "new.json").stat().st_mode & 0o777 == 0o600


def test_a_training_that_goes_on_under_other_routes_says_so(saved, monkeypatch):
    """Tables choose the order of sums, and so do the variables that choose before they do."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(config={"lr": 0.001}).load(saved)
    table = empty_table(any_threads=True)
    try:
        routing.use((table,))
        with pytest.warns(
            RouteTableWarning, match=f"the route tables none, and here they are {table.hash}: .*DLKERNELS_ROUTES"
        ):
            make(config={"lr": 0.001}).load(saved)
    finally:
        routing.use(())
    monkeypatch.setenv("DLKERNELS_CPU_ISA", "avx2")
    with pytest.warns(RouteTableWarning, match="here they are none with DLKERNELS_CPU_ISA=avx2"):
        make(config={"lr": 0.001}).load(saved)


def test_a_checkpoint_from_before_circumstances_were_kept_is_loaded(saved):
    state = checkpoint.load(saved)
    del state["circumstances"]
    checkpoint.save(saved, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(config={"lr": 0.001}).load(saved)
