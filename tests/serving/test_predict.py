"""Predictions: reading files, errors, and the commands ``predict`` and ``export`` on a real run."""

from __future__ import annotations

import gzip
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dlkernels.__main__ import main
from dlkernels.choices import INFO
from dlkernels.nn import MLP
from dlkernels.serving import predict
from dlkernels.serving.readers import InputError, read

Image = pytest.importorskip("PIL.Image", reason="images are read by Pillow")

DIGITS = INFO["digits"]


def drawing(seed=0):
    """[8, 8] uint8, light on dark, with a dark border."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[1:-1, 1:-1] = np.random.default_rng(seed).integers(0, 256, (6, 6))
    return pixels


def pixels_of(path: Path, invert=None, info=DIGITS):
    (place,), samples = read([path], info, invert)
    assert place.file == path and place.row is None
    return samples.view(info.height, info.width), place.inverted


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "I;16"])
def test_modes_of_png(tmp_path, mode):
    drawn = drawing()
    if mode == "1":
        drawn = np.where(drawn > 127, 255, 0).astype(np.uint8)
    image = Image.fromarray(drawn.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(drawn).convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "x.png")
    pixels, inverted = pixels_of(tmp_path / "x.png")
    assert not inverted
    torch.testing.assert_close(pixels, torch.tensor(drawn / 255, dtype=torch.float32), rtol=0, atol=1e-6)


@pytest.mark.parametrize("white", [1, 255])
def test_floating_point_images_are_in_0_to_1_or_of_the_range_of_8_bits(tmp_path, white):
    drawn = drawing() / np.float32(255)
    Image.fromarray((drawn * white).astype(np.float32)).save(tmp_path / "x.tif")
    torch.testing.assert_close(pixels_of(tmp_path / "x.tif")[0], torch.tensor(drawn), rtol=0, atol=1e-6)
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif cannot be read as an image: it holds NaN"):
        pixels_of(tmp_path / "x.tif")


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_plain_values(tmp_path, kind):
    values = torch.zeros(2, 64)
    torch.save(values.to_sparse() if kind == "sparse" else values.to("meta"), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt cannot be read as an array"):
        read([tmp_path / "x.pt"], DIGITS)


@pytest.mark.parametrize("color", [0, 255])
def test_transparent_background_contrasts(tmp_path, color):
    """Black or white ink on transparency: both become white on black."""
    drawn = np.where(drawing() > 127, 255, 0).astype(np.uint8)
    rgba = np.dstack([np.full_like(drawn, color)] * 3 + [drawn])
    Image.fromarray(rgba).save(tmp_path / "x.png")
    pixels, inverted = pixels_of(tmp_path / "x.png")
    assert inverted == (color == 0)
    assert torch.equal(pixels, torch.tensor(drawn / 255, dtype=torch.float32))


def test_inverts_what_has_a_light_border(tmp_path):
    drawn = torch.tensor(drawing() / 255, dtype=torch.float32)
    Image.fromarray(255 - drawing()).save(tmp_path / "dark_on_light.png")
    for invert, expected in ((None, drawn), (True, drawn), (False, 1 - drawn)):
        pixels, inverted = pixels_of(tmp_path / "dark_on_light.png", invert)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
        assert inverted == (invert is not False)
    bold = np.pad(np.full((6, 6), 255, np.uint8), 1)  # light all over, but for its border
    Image.fromarray(bold).save(tmp_path / "bold.png")
    pixels, inverted = pixels_of(tmp_path / "bold.png")
    assert not inverted and torch.equal(pixels, torch.tensor(bold / 255, dtype=torch.float32))


def test_scales_and_keeps_proportions(tmp_path):
    """A tall white bar fills the height of the digits' 8 pixels; --no-crop scales the wide picture around it, too."""
    wide = np.zeros((40, 80), np.uint8)
    wide[:, 10:30] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels, _ = pixels_of(tmp_path / "wide.png", invert=False)
    assert pixels[:, 2:6].min() > 0.9 and pixels[:, :2].max() < 0.2 and pixels[:, 6:].max() < 0.2
    _, samples = read([tmp_path / "wide.png"], DIGITS, invert=False, crop=False)
    pixels = samples.view(8, 8)
    assert pixels[2:6, 1:3].min() > 0.9
    assert pixels[:2].max() == pixels[6:].max() == 0 and pixels[:, 4:].max() < 0.2


def letter():
    """[28, 28] uint8, as MNIST has it: the longer side is 20 pixels, the centre of mass in the middle. An L."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[3:23, 11:15] = 255
    pixels[19:23, 15:22] = 200
    return pixels


def test_what_is_drawn_goes_where_mnist_has_it(tmp_path):
    """The result does not depend on place and size; a digit placed as in MNIST keeps its pixels."""
    mnist = INFO["mnist"]
    for name, picture in {
        "as it is": letter(),
        "moved": np.roll(letter(), (5, -9), (0, 1)),
        "in a corner": np.pad(letter(), ((0, 200), (300, 0))),
        "four times as large": np.pad(letter().repeat(4, 0).repeat(4, 1), ((90, 3), (5, 160))),
        "dark on light": 255 - np.pad(letter(), ((0, 50), (0, 0))),
    }.items():
        Image.fromarray(picture).save(tmp_path / "x.png")
        pixels, inverted = pixels_of(tmp_path / "x.png", info=mnist)
        assert inverted == (name == "dark on light")
        exact = name != "four times as large"
        expected = torch.tensor(letter() / 255, dtype=torch.float32)
        assert (pixels - expected).abs().mean() < (1e-6 if exact else 0.02), name
    Image.fromarray(np.full((50, 60), 7, np.uint8)).save(tmp_path / "x.png")  # nothing is drawn
    assert pixels_of(tmp_path / "x.png", info=mnist)[0].max() <= 7 / 255 + 1e-6


def test_mnist_s_own_images_keep_their_pixels(tmp_path):
    from dlkernels.data import DataError, load

    try:
        splits = load("mnist")
    except DataError as error:
        pytest.skip(str(error))
    for pixels in splits.test_x[:100]:
        Image.fromarray((pixels.view(28, 28) * 255).round().byte().numpy()).save(tmp_path / "x.png")
        assert torch.equal(pixels_of(tmp_path / "x.png", info=INFO["mnist"])[0].flatten(), pixels)


def test_turns_as_the_camera_says(tmp_path):
    image = Image.fromarray(drawing())
    exif = image.getexif()
    exif[0x0112] = 6  # turn a quarter to the right to show it
    image.save(tmp_path / "x.png", exif=exif)
    expected = torch.tensor(np.rot90(drawing(), -1) / 255, dtype=torch.float32)
    torch.testing.assert_close(pixels_of(tmp_path / "x.png")[0], expected)


def test_folders_in_order(tmp_path):
    for seed, name in enumerate(["b/2.png", "a.png", "b/1.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(drawing(seed)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("left out")
    places, samples = read([tmp_path, tmp_path / "a.png"], DIGITS)
    assert [str(place) for place in places] == [str(tmp_path / n) for n in ("a.png", "b/1.png", "b/2.png", "a.png")]
    expected = [torch.tensor(drawing(seed) / 255, dtype=torch.float32).flatten() for seed in (1, 2, 0, 1)]
    torch.testing.assert_close(samples, torch.stack(expected))


# ---- arrays ----------------------------------------------------------------------------------------------------------

RAW = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8) % 17
SCALED = torch.tensor(RAW / 16, dtype=torch.float32).view(3, 64)


def idx(pixels):
    return struct.pack(">4i", 0x0803, *pixels.shape) + pixels.tobytes()


WRITERS = {
    "raw.npy": lambda path: np.save(path, RAW),
    "rows.npy": lambda path: np.save(path, SCALED.numpy()),
    "channel.npy": lambda path: np.save(path, RAW[:, None].astype(">i4")),
    "one.npz": lambda path: np.savez(path, anything=RAW),
    "several.npz": lambda path: np.savez(path, y=np.arange(3), x=SCALED.numpy().astype(np.float64)),
    "tensor.pt": lambda path: torch.save(SCALED.bfloat16().requires_grad_(), path),
    "dict.pt": lambda path: torch.save({"images": torch.tensor(RAW), "labels": torch.arange(3)}, path),
    "images-idx3-ubyte": lambda path: path.write_bytes(idx(RAW)),
    "images-idx3-ubyte.gz": lambda path: path.write_bytes(gzip.compress(idx(RAW))),
}


@pytest.mark.parametrize("name", WRITERS)
def test_arrays(tmp_path, name):
    WRITERS[name](tmp_path / name)
    places, samples = read([tmp_path / name], DIGITS)
    assert [str(place) for place in places] == [f"{tmp_path / name}[{row}]" for row in range(3)]
    assert samples.dtype == torch.float32
    assert torch.equal(samples, SCALED)  # sixteenths: exact even in bfloat16


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8)])
def test_an_array_may_be_one_sample(tmp_path, shape):
    np.save(tmp_path / "x.npy", RAW[1].reshape(shape))
    assert torch.equal(read([tmp_path / "x.npy"], DIGITS)[1], SCALED[1:2])


def png(path, size):
    Image.fromarray(drawing().repeat(9, 0)).save(path)
    path.write_bytes(path.read_bytes()[:size])


SHAPES = r"expected samples \[N, 64\], \[N, 8, 8\] or \[N, 1, 8, 8\]; got "
DAMAGED = {
    "cut.png": (lambda path: png(path, 100), "cannot be read as an image: "),
    "text.png": (lambda path: path.write_text("no image"), "cannot be read as an image: cannot identify"),
    "unknown.csv": (lambda path: path.write_text("1,2"), "cannot be read as an image: cannot identify"),
    "cut.npy": (lambda path: (np.save(path, RAW), path.write_bytes(path.read_bytes()[:150])), "cannot be read as an a"),
    "cut.npz": (lambda path: path.write_bytes(b"PK\3\4 and no more"), "cannot be read as an array: "),
    "objects.npy": (lambda path: np.save(path, np.array([{}])), "as an array: Object arrays cannot be loaded"),
    "names.npy": (lambda path: np.save(path, np.array(["a", "b"])), "cannot be read as an array: "),
    "several.npz": (
        lambda path: np.savez(path, a=RAW, b=RAW),
        "expected one array, or one called x or images; got a, b",
    ),
    "wide.npy": (lambda path: np.save(path, np.zeros((3, 65))), SHAPES + r"\[3, 65\]"),
    "empty.npy": (lambda path: np.save(path, np.zeros((0, 64))), SHAPES + r"\[0, 64\]"),
    "range.npy": (lambda path: np.save(path, RAW + 1), "expected integers from 0 to 16; got values from 1 to 17"),
    "bright.npy": (
        lambda path: np.save(path, RAW * 1.0),
        "expected floating point from 0 to 1; got values from 0 to 16",
    ),
    "nan.npy": (lambda path: np.save(path, np.full(64, np.nan)), "expected floating point from 0 to 1; got .* nan"),
    "complex.npy": (lambda path: np.save(path, RAW * 1j), "expected real numbers; got torch.complex128"),
    "list.pt": (lambda path: torch.save([1], path), "expected an array, or a dict of arrays; got a list"),
    "module.pt": (lambda path: torch.save(nn.Linear(1, 1), path), "cannot be read as an array: "),
    "labels-idx1-ubyte": (
        lambda path: path.write_bytes(struct.pack(">2i", 0x0801, 3) + bytes(3)),
        "expected images, 3 dimensions; got an idx file of 1",
    ),
    "cut-idx3-ubyte": (lambda path: path.write_bytes(idx(RAW)[:-1]), r"expected 192 bytes .* \[3, 8, 8\]; got 191"),
    "cut-idx3-ubyte.gz": (lambda path: path.write_bytes(gzip.compress(idx(RAW))[:-9]), "cannot be read as an array"),
    "empty": (lambda path: path.mkdir(), "expected a folder with images .* it has none"),
    "missing.png": (lambda path: None, "there is no file or folder"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(tmp_path, name):
    """The message names the file."""
    write, message = DAMAGED[name]
    write(tmp_path / name)
    with pytest.raises(InputError, match=message) as error:
        read([tmp_path / name], DIGITS)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


# ---- the model -------------------------------------------------------------------------------------------------------


def test_predicts_in_batches():
    model = nn.Sequential(MLP([64, 30, 5]), nn.Dropout(0.9)).double()
    found = predict(model, SCALED, batch_size=2)
    with torch.no_grad():
        expected = model[0](SCALED.double()).softmax(1)
    torch.testing.assert_close(found.probabilities, expected)
    assert torch.equal(found.classes, expected.argmax(1)) and len(found) == 3
    values, classes = found.top(9)
    assert classes.shape == (3, 5) and torch.equal(classes[:, 0], found.classes)
    assert torch.equal(values, expected.sort(1, descending=True).values) or torch.allclose(
        values.sum(1), values.new_ones(3)
    )
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("model", "inputs", "batch_size", "message"),
    [
        (MLP([4, 2]), torch.rand(0, 4), 2, r"at least one sample, \[N, \.\.\.\]; got a tensor of shape \[0, 4\]"),
        (MLP([4, 2]), torch.rand(3, 4), 0, "batch_size >= 1; got 0"),
        (nn.Flatten(0), torch.rand(3, 4), 2, r"scores \[2, classes\]; got shape \[8\]"),
        (nn.LSTM(4, 2), torch.rand(3, 4), 2, "scores .* got tuple"),
    ],
)
def test_refuses_what_is_no_classification(model, inputs, batch_size, message):
    with pytest.raises(ValueError, match=message):
        predict(model, inputs, batch_size)


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one epoch."""
    for package in ("pydantic", "sklearn", "matplotlib", "jinja2", "tomli_w"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", "--dataset", "digits", "--epochs", "1", "--out", str(folder), "-q"]) == 0
    return folder


@pytest.fixture
def model(run):
    from dlkernels.runs.folder import load_model

    return load_model(run)


def test_command_predicts(run, model, tmp_path, capsys, monkeypatch):
    Image.fromarray(255 - drawing()).save(tmp_path / "light.png")
    np.save(tmp_path / "rows.npy", RAW)
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "400")  # the paths of the inputs on one line
    inputs = [str(tmp_path / "light.png"), str(tmp_path / "rows.npy")]
    assert main(["predict", str(run), *inputs, "--top", "2", "--json", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    drawn = torch.tensor(drawing() / 255, dtype=torch.float32).view(1, 64)
    with torch.no_grad():
        expected = model(torch.cat([drawn, SCALED])).softmax(1).topk(2)
    places = [inputs[0], *(f"{inputs[1]}[{row}]" for row in range(3))]
    for line, place, p, c in zip(lines[2:6], places, expected.values.tolist(), expected.indices.tolist(), strict=True):
        assert line.split() == [place, str(c[0]), f"{p[0]:.3f}", str(c[1]), f"{p[1]:.3f}"]
    assert lines[-1] == "1 image has a light border and was inverted (--no-invert keeps them)"

    monkeypatch.setenv("COLUMNS", "60")  # too narrow for 5 classes side by side: they are below one another
    assert main(["predict", str(run), inputs[1], "--top", "5"]) == 0
    narrow = capsys.readouterr().out.splitlines()
    assert max(map(len, narrow)) <= 60 and narrow[0].split() == ["input", "class", "probability"]
    ranked = model(SCALED).softmax(1).topk(5)
    shown = [line.split()[-2:] for line in narrow[2:] if re.search(r"  \d +0\.\d{3}$|  \d +1\.000$", line)]
    assert shown == [
        [str(c), f"{p:.3f}"]
        for values, classes in zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)
        for p, c in zip(values, classes, strict=True)
    ]

    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["file"], row["row"], row["inverted"]) for row in rows] == [
        (inputs[0], None, True), *((inputs[1], row, False) for row in range(3))
    ]  # fmt: skip
    assert [[best["class"] for best in row["top"]] for row in rows] == expected.indices.tolist()
    assert [row["probability"] for row in rows] == pytest.approx(expected.values[:, 0].tolist(), rel=1e-6)

    assert main(["predict", str(run), inputs[0], "--no-invert", "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        scores = model(1 - drawn)
    assert (row["class"], row["inverted"]) == (int(scores.argmax()), False)


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_command_predicts_on_a_device(run, model, tmp_path, capsys, request, monkeypatch, place):
    if place == "cuda":
        request.getfixturevalue("gpu")
    used = []
    monkeypatch.setattr(
        "dlkernels.serving.predict",
        lambda model, *rest: used.append(next(model.parameters()).device.type) or predict(model, *rest),
    )
    np.save(tmp_path / "rows.npy", RAW)
    assert main(["predict", str(run), str(tmp_path / "rows.npy"), "--device", place, "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert used == [place]
    with torch.no_grad():
        expected = model(SCALED).softmax(1).max(1).values
    assert [row["probability"] for row in rows] == pytest.approx(expected.tolist(), rel=1e-4)


def test_command_exports(run, model, tmp_path, capsys):
    assert main(["export", str(run), "--format", "pt2"]) == 0
    assert "largest difference of an output to the model's: " in capsys.readouterr().out
    program = torch.export.load(run / "model.pt2").module()
    x = torch.rand(9, 64)
    torch.testing.assert_close(program(x), model(x))

    pytest.importorskip("onnxscript")
    assert main(["export", str(run), "--format", "onnx", "--fixed-batch", "4", "--out", str(tmp_path / "m.onnx")]) == 0
    assert f"{tmp_path / 'm.onnx'}: run by " in capsys.readouterr().out
    graph = pytest.importorskip("onnx").load(tmp_path / "m.onnx").graph
    assert [size.dim_value for size in graph.input[0].type.tensor_type.shape.dim] == [4, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "RUN", "nothing.png"], "predict: there is no file or folder nothing.png"),
        (["predict", "RUN", "x.png", "--top", "0"], "predict: expected --top and --batch-size of at least 1"),
        (["predict", "nowhere", "x.png"], "predict: there is no folder nowhere"),
        (
            ["predict", "RUN", "x.png", "--device", "quantum"],
            "predict: expected a --device that works here; got quantum: ",
        ),
        (["predict", "RUN", "x.png", "--device", "meta"], "predict: expected a --device that works here; got meta: "),
        (
            ["export", "RUN", "--format", "pt2", "--fixed-batch", "0"],
            "export: expected --fixed-batch of at least 1; got 0",
        ),
        (["export", "RUN", "--format", "pt2", "--out", "/dev/null/m.pt2"], "export: "),
        (["export", "nowhere", "--format", "pt2"], "export: there is no folder nowhere"),
    ],
)
def test_commands_refuse(run, capsys, arguments, message):
    capsys.readouterr()
    status = main([str(run) if argument == "RUN" else argument for argument in arguments])
    # A file that cannot be read or written is a failure; anything else is a mistake in what was typed.
    assert status == (1 if "nothing.png" in arguments or "/dev/null/m.pt2" in arguments else 2)
    printed = capsys.readouterr().err
    assert f"python -m dlkernels {message}" in printed and printed.count("\n") == 1
