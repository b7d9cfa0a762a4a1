"""The code blocks of the README and the docs.

The Python blocks of a page run in order, as written, in one process and in an empty folder. The shell blocks are taken
apart into commands: each must name a command, flags, files, extras or targets that exist. A block that cannot run says
so in its first line ("# not run by the tests: REASON"), and is listed as a skipped test.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest

from tests.docs.pages import BLOCKS, PAGES
from tests.support.paths import ROOT

# The names that a page takes for granted: what a reader has when he comes there.
GIVEN = {
    "docs/guide/training.md": """
import contextlib, torch
from dlkernels.data import TensorLoader, load
from dlkernels.data.vision import import_torchvision

with contextlib.suppress(ImportError):  # torchmetrics imports torchvision, which needs help beside a CPU build of torch
    import_torchvision()
from dlkernels.nn import MLP

digits = load("digits")
x, y = digits.train_x[:256], digits.train_y[:256]
loss = torch.nn.CrossEntropyLoss()
train_batches = TensorLoader(x, y, batch_size=16, shuffle=True)
val_batches = TensorLoader(digits.test_x, digits.test_y)


def make_model():
    return MLP([digits.features, 16, digits.classes])
""",
}

# The libraries of the extras that a page uses. Machines with a GPU may lack them, and no registry may be in reach.
NEEDS = {
    "README.md": ("sklearn", "onnx", "onnxscript"),
    "docs/guide/serving.md": ("onnx", "onnxscript"),
    "docs/guide/training.md": ("sklearn", "torchmetrics", "matplotlib"),
}

# Runs the blocks that come as JSON, [name, line, code] each.
RUNNER = """
import json, sys

namespace = {"__name__": "__main__"}
for page, line, code in json.load(sys.stdin):
    exec(compile("\\n" * (line - 1) + code, page, "exec"), namespace)
"""

PYTHON = {page: [b for b in BLOCKS if b.page == page and b.language == "python" and not b.not_run] for page in PAGES}
SHELL = [block for block in BLOCKS if block.language == "sh" and not block.not_run]


def named(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page, found in PYTHON.items() if found], ids=named)
def test_python_blocks_run_as_written(page, tmp_path):
    for library in NEEDS.get(named(page), ()):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    given = [["given", 1, GIVEN[named(page)]]] if named(page) in GIVEN else []
    written = [[named(page), block.line, block.text] for block in PYTHON[page]]
    if page.name == "training.md":  # as written for one epoch, then with the line that resumes that run
        first = PYTHON[page][0].text
        given.append(["the run before", 1, first.replace("epochs=50", "epochs=1")])
        resumed, found = re.subn(r"^# (?=trainer\.load)", "", first, flags=re.MULTILINE)
        assert found == 1, "the example of training.md shows how to resume in one commented line"
        written[0][2] = resumed
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(given + written),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.not_run], ids=lambda b: b.name)
def test_blocks_that_are_not_run_are_listed(block):
    if block.language == "python":
        compile(block.text, block.name, "exec")
    pytest.skip(block.not_run)


@cache
def help_of(*command):
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def check_flags(words, *command):
    """``command --help`` works, and lists every --flag among the words behind it."""
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    unknown = {flag for flag in flags if not re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(*command))}
    assert not unknown, f"python {' '.join(command)} has no {', '.join(sorted(unknown))}"


def check_python(words):
    if words[0] == "-m" and words[1] == "dlkernels":
        check_flags(words[3:], *words[:3])
    elif words[0] == "-m":
        check_flags(words[2:], *words[:2])
    else:
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
        if words[0] != "setup.py":
            check_flags(words[1:], words[0])


def check_pip(words):
    extras = set((ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].split())
    for word in words:
        for extra in re.findall(r"\[([\w,]+)\]", word):
            assert set(extra.split(",")) <= extras, f"there is no extra {extra}"


def check_make(words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets), f"the Makefile has no target {set(words) - set(targets)}"


def check_torchrun(words):
    check_python(words[words.index("-m") :])


CHECKS = {"python": check_python, "pip": check_pip, "make": check_make, "torchrun": check_torchrun}


@pytest.mark.parametrize("block", SHELL, ids=lambda b: b.name)
def test_commands_exist_with_their_flags(block):
    for line in block.text.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z]+=\S*", word)]
        if words:
            assert words[0] in CHECKS, f"no rule for {line!r}: add one, or mark the block as not run"
            CHECKS[words[0]](words[1:])


def test_the_run_of_the_readme_and_of_its_guide(tmp_path):
    """``train``, ``train --config`` and ``compare`` as printed, but for fewer epochs."""
    pytest.importorskip("pydantic")
    pytest.importorskip("sklearn")
    [block] = [b for b in SHELL if b.page.name == "README.md" and "--out runs/a" in b.text]
    for line in block.text.replace("--epochs 20", "--epochs 1").splitlines():
        words = shlex.split(line, comments=True)
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}"
    assert (tmp_path / "comparison.html").is_file()


def test_every_block_has_a_language():
    """Blocks of code without one are not checked; trees and console output are indented or plain on purpose."""
    assert {block.language for block in BLOCKS} <= {"python", "sh", ""}
    assert len(SHELL) >= 5 and sum(map(len, PYTHON.values())) >= 10
