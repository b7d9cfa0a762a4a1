"""The output of a run: the report in a browser, the comparison, the logs; and reading its folder."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from dlkernels.__main__ import main
from dlkernels.choices import INFO
from dlkernels.data import load_digits
from dlkernels.runs.comparison import RunComparison
from dlkernels.runs.evaluation import Evaluation
from dlkernels.runs.folder import RunError, RunFolder, load_model
from dlkernels.runs.loggers import CsvLog
from dlkernels.runs.report import write_report

for package in ("jinja2", "matplotlib", "tensorboard", "tomli_w"):
    pytest.importorskip(package)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
OFFLINE = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"),
]


def train(out: Path, *arguments: object) -> int:
    return main(["train", "--dataset", "digits", "--out", str(out), *map(str, arguments)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with two runs, ``first`` and ``second``."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(folder / "first", "--epochs", 3, "--quiet", "--schedule", "cosine") == 0
    assert train(folder / "second", "--epochs", 2, "--quiet", "--lr", 0.01, "--tensorboard") == 0
    return folder


@pytest.fixture
def first(runs, tmp_path) -> RunFolder:
    """A copy of ``first``, to be damaged."""
    return RunFolder(shutil.copytree(runs / "first", tmp_path / "first"))


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*OFFLINE, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser, page: Path) -> str:
    """Return the page's text, after checks: no error, no request, nothing wider than the window."""
    browser.get("about:blank")
    browser.get_log("performance")  # of the browser's own first page
    browser.get(page.resolve().as_uri())
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    images = browser.execute_script("return Array.from(document.images, i => i.complete && i.naturalWidth)")
    assert all(width > 100 for width in images)
    for width in (1200, 390):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    return browser.find_element("tag name", "body").text


def test_report_in_a_browser(runs, browser):
    record = RunFolder(runs / "first").record()
    text = opened(browser, runs / "first" / "report.html")
    assert text.startswith("digits, 64-256-10 relu, float32\nfirst: 3 of 3 epochs, seed 0")
    assert f"{record['accuracy_after']:.2%}" in text and "19,210" in text and "learning rate" in text.lower()
    assert f"train --config {runs / 'first' / 'config.toml'}" in text
    assert len(browser.find_elements("css selector", "svg")) == 3
    assert len(browser.find_elements("css selector", "img")) == 1
    drawn = browser.execute_script("return Array.from(document.querySelectorAll('svg'), s => s.getBBox().width)")
    assert all(width > 300 for width in drawn)
    cells = [int(cell.text) for cell in browser.find_elements("css selector", "table.confusion tbody td")]
    assert cells == [count for row in record["confusion"] for count in row]
    assert sum(cells[::11]) / 360 == pytest.approx(record["accuracy_after"])


def test_comparison_in_a_browser(runs, browser, capsys):
    page = runs / "comparison.html"
    assert main(["compare", str(runs / "first"), str(runs / "second"), "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^lr +0.001 +0.01$", printed, re.M) and re.search(r"^schedule +cosine +constant$", printed, re.M)
    assert re.search(r"^epochs +3 +2$", printed, re.M) and "activation" not in printed
    text = opened(browser, page)
    assert "first and second" in text and "schedule cosine constant" in text
    assert len(browser.find_elements("css selector", "svg")) == 3


def test_page_points_nowhere_else(runs):
    text = re.sub(r"data:image/png;base64,[\w+/=]+", "data:", (runs / "first" / "report.html").read_text())
    assert "//" not in text and "@import" not in text and "<script" not in text
    links = re.findall(r'\b(?:src|href)="([^"]*)"|url\(([^)]*)\)', text)
    assert links and all((link or target).startswith(("data:", "#")) for link, target in links)


def test_names_are_escaped(first, tmp_path):
    folder = RunFolder(first.path.rename(tmp_path / "<img src=x>&$a_b$ 'c'"))
    text = write_report(folder).read_text()
    assert "<img src=x>" not in text and "&lt;img src=x&gt;&amp;$a_b$ &#39;c&#39;" in text
    other = shutil.copytree(folder.path, tmp_path / "_hidden")
    RunComparison([folder.path, other]).write_page(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<img" not in text and text.count("_hidden</text>") == 3 and text.count("$a_b$ 'c'</text>") == 3


def test_report_of_an_unfinished_run(first, capsys):
    kept = (first.config_file, first.history_csv)
    for file in first.path.iterdir():
        if file.is_file() and file not in kept:
            file.unlink()
    assert main(["report", str(first.path)]) == 0
    assert capsys.readouterr().out == f"{first.report}\n"
    text = first.report.read_text()
    assert "not finished" in text and "<img" not in text and "Confusion" not in text and text.count("<svg") == 3


def interrupted(out: Path, monkeypatch, at: int, *arguments: object) -> None:
    """Run ``train``, and send Ctrl-C after epoch ``at`` (0: after the first batch)."""
    logged = CsvLog.on_epoch_end

    def on_batch_end(self, trainer):
        if not at:
            os.kill(os.getpid(), signal.SIGINT)

    def on_epoch_end(self, trainer, row):
        logged(self, trainer, row)
        if row["epoch"] == at:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(CsvLog, "on_batch_end", on_batch_end)
        patch.setattr(CsvLog, "on_epoch_end", on_epoch_end)
        assert train(out, *arguments) == 130


@pytest.fixture
def second(runs, tmp_path) -> RunFolder:
    """A copy of ``second``, to be resumed."""
    return RunFolder(shutil.copytree(runs / "second", tmp_path / "second"))


def test_finished_run_that_went_on_is_not_finished(runs, second, tmp_path, capsys, monkeypatch):
    interrupted(second.path, monkeypatch, 4, "--lr", 0.01, "--epochs", 9, "--resume", "--quiet")
    assert not second.report.exists() and second.confusion.exists()
    assert [row["epoch"] for row in second.record()["history"]] == [1, 2, 3, 4]
    assert "accuracy_after" not in second.record()
    assert main(["report", str(second.path)]) == 0
    text = second.report.read_text()
    assert "not finished" in text and "second: 4 of 9 epochs" in text and "weights.pt is of epoch 2." in text
    assert "Confusion" not in text and "data:image" not in text

    capsys.readouterr()
    assert main(["compare", str(second.path), str(runs / "first")]) == 0
    assert re.search(r"^epochs +4 of 9, not finished +3$", capsys.readouterr().out, re.M)
    torch.save(torch.rand(1, 64), tmp_path / "digit.pt")
    note = f"{second.path}: the training was finished at epoch 2, went on, and has reached epoch 4; weights.pt is of "
    for arguments in (["predict", second.path, tmp_path / "digit.pt"], ["export", second.path, "--format", "pt2"]):
        assert main([str(argument) for argument in arguments]) == 0
        assert capsys.readouterr().err.startswith(note)

    assert train(second.path, "--lr", 0.01, "--epochs", 5, "--resume") == 0
    assert "accuracy so far" in capsys.readouterr().out
    assert second.continuation_note() is None and second.record()["accuracy_before"] is None
    assert "not finished" not in second.report.read_text() and "before training" not in second.report.read_text()
    assert main(["predict", str(second.path), str(tmp_path / "digit.pt")]) == 0
    assert capsys.readouterr().err == ""


def test_run_that_went_on_but_finished_no_epoch_yet(second, monkeypatch):
    interrupted(second.path, monkeypatch, 0, "--lr", 0.01, "--epochs", 9, "--resume", "--quiet")
    assert "2 of 9 epochs" in write_report(second).read_text()
    assert "weights.pt is of epoch 2" in second.continuation_note()


def test_run_that_goes_on_from_an_earlier_epoch(second, monkeypatch):
    checkpoint = second.checkpoints / "epoch-0001.pt"
    interrupted(second.path, monkeypatch, 0, "--lr", 0.01, "--epochs", 2, "--resume", checkpoint, "--quiet")
    assert "has reached epoch 1; weights.pt is of epoch 2" in second.continuation_note()
    assert len(second.record()["history"]) == 1


def test_csv_and_json_say_the_same(runs):
    folder = RunFolder(runs / "first")
    with folder.history_csv.open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == folder.record()["history"] and len(rows) == 3


def test_tensorboard_has_the_history(runs, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(runs / "second")
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    for tag, key in (("loss/training", "loss"), ("loss/validation", "val_loss"), ("lr", "lr")):
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == pytest.approx({row["epoch"]: row[key] for row in folder.record()["history"]})
    assert not RunFolder(runs / "first").tensorboard.exists()
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    assert train(runs / "third", "--tensorboard") == 1
    assert "this command needs tensorboard" in capsys.readouterr().err


def test_a_log_has_no_control_characters_and_quiet_is_short(tmp_path, capsys):
    assert train(tmp_path / "run", "--epochs", 2) == 0  # no terminal here
    printed = capsys.readouterr()
    assert len(re.findall(r"^fused epoch \d/2 ", printed.out, re.M)) == 2
    assert re.findall(r"[^\n -~]", printed.out + printed.err) == []
    assert train(tmp_path / "run", "--epochs", 1, "-q") == 0
    quiet = capsys.readouterr()
    assert re.fullmatch(r"accuracy after training:  0\.\d+\n.* now holds .*\n", quiet.out) and quiet.err == ""
    # The earlier run was moved, and is complete.
    assert [len(RunFolder(tmp_path / name).record()["history"]) for name in ("run", "run-1")] == [1, 2]


def test_model_of_a_run(runs, first):
    model = load_model(runs / "first")
    splits, record = load_digits(), first.record()
    accuracy = (model(splits.test_x).argmax(1) == splits.test_y).double().mean().item()
    assert accuracy == pytest.approx(record["accuracy_after"]) and not model.training
    assert first.dataset is INFO["digits"] and first.config().sizes == [64, 256, 10]
    first.weights.write_bytes(first.weights.read_bytes()[:1000])
    with pytest.raises(RunError, match="cannot be read as the weights of this run"):
        load_model(first)
    first.weights.unlink()
    with pytest.raises(RunError, match="its training is not finished"):
        load_model(first.path)


def test_mistakes_are_the_most_confident_ones():
    scores = torch.tensor([[0.0, 9, 0], [5, 0, 0], [0, 0, 3], [1, 0, 0]])
    info = INFO["digits"].__class__(height=1, width=3, classes=3, white=1, batch_size=1, box=1, by_mass=False)
    evaluation = Evaluation(torch.nn.Identity(), scores, torch.tensor([0, 0, 1, 2]), info)
    assert evaluation.confusion.tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert [(one.truth, one.predicted) for one in evaluation.worst(2)] == [(0, 1), (1, 2)]
    assert [one.image.tolist() for one in evaluation.worst(9)] == [[[0, 9, 0]], [[0, 0, 3]], [[1, 0, 0]]]
    assert evaluation.worst(1)[0].confidence == pytest.approx(scores[0].softmax(0).max().item())


def spoil(name: str, text: str):
    return lambda folder: (folder.path / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: shutil.rmtree(folder.path), "there is no folder"),
        (lambda folder: folder.config_file.unlink(), "is not the folder of a run: it has no config.toml"),
        (spoil("config.toml", "lr = 0\n"), "config.toml: expected lr above 0; got 0"),
        (spoil("history.json", "{"), "history.json is damaged"),
        (spoil("history.json", '{"history": []}'), "history.json has no epoch"),
        (spoil("history.json", '{"history": 3}'), "history.json is damaged"),
        (lambda folder: [folder.record_file.unlink(), folder.history_csv.unlink()], "has no finished epoch"),
        (lambda folder: [folder.record_file.unlink(), spoil("history.csv", "epoch\nx\n")(folder)], "csv is damaged"),
        (lambda folder: [folder.record_file.unlink(), spoil("history.csv", "")(folder)], "csv is damaged"),
    ],
)
def test_damaged_folders_are_a_sentence(first, capsys, damage, sentence):
    damage(first)
    for arguments in (["report", first.path], ["compare", first.path, first.path]):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.startswith(f"python -m dlkernels {arguments[0]}: ")
        assert len(error.splitlines()) == 1


def test_comparison_fits_a_narrow_terminal(first, tmp_path, monkeypatch):
    folders = [shutil.copytree(first.path, tmp_path / f"a-run-with-a-long-name-{i}") for i in range(4)]
    monkeypatch.setenv("COLUMNS", "80")
    text = RunComparison(folders).text()
    assert max(map(len, text.splitlines())) <= 80 and "–" not in text


def test_comparison_needs_two_runs_and_tells_them_apart(runs, first, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # the paths of the runs on one line
    assert main(["compare", str(first.path)]) == 2
    assert "at least two runs to compare; got 1" in capsys.readouterr().err
    assert main(["compare", str(first.path), str(runs / "first")]) == 0
    printed = capsys.readouterr().out
    assert str(first.path) in printed and str(runs / "first") in printed and "none differs" in printed
