"""An example whose library is not installed says which one it needs and how to get it, in one sentence."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.support.paths import ROOT

# The libraries that each example needs, by the names they are imported by. Each is hidden in turn.
NEEDS = {
    "activations": ["matplotlib", "sklearn"],
    "adam": ["matplotlib"],
    "alexnet": ["sklearn", "torchvision"],
    "bert": ["transformers"],
    "dqn": ["gymnasium"],
    "gan": ["matplotlib", "sklearn"],
    "generalisation": ["sklearn"],
    "gpt": ["transformers"],
    "linear_regression": ["matplotlib", "sklearn"],
    "llama": ["transformers"],
    "mnist_mlp": [],
    "mnist_practice": [],
    "one_call": ["sklearn"],
    "resnet": ["sklearn"],
    "self_supervised": ["sklearn"],
    "seq2seq": [],
    "transformer": [],
    "with_accelerate": ["accelerate", "sklearn"],
    "with_lightning": ["lightning", "sklearn"],
    "with_skorch": ["skorch", "sklearn"],
    "with_stable_baselines3": ["stable_baselines3"],
    "with_torch_benchmark": [],
    "with_transformers": ["transformers", "peft", "safetensors"],
}

# Runs each example as a program, with a library hidden, in a fork of a process that has imported torch. Prints what
# each wrote to its standard error, as JSON.
RUNNER = """
import contextlib, importlib, json, os, runpy, sys, tempfile
import torch, dlkernels
from dlkernels.data.vision import import_torchvision

torch.set_num_threads(1)
with contextlib.suppress(ImportError):
    import_torchvision()
for name in ("matplotlib.figure", "transformers"):  # slow to import, so once for all forks
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

class Hidden:
    def __init__(self, library):
        self.library = library

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.library:
            raise ModuleNotFoundError(f"No module named {self.library!r}", name=self.library)

def run(path, library):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        del sys.modules[name]
    sys.meta_path.insert(0, Hidden(library))
    sys.argv = [path, "--small"]
    sys.path[0] = os.path.dirname(path)
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)

said = {}
for path, library in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as errors, open(os.devnull, "w") as nowhere:
        if (child := os.fork()) == 0:
            os.dup2(nowhere.fileno(), 1), os.dup2(errors.fileno(), 2)
            try:
                run(path, library)
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(child, 0)
        errors.seek(0)
        said[f"{os.path.basename(path)} without {library}"] = errors.read()
print(json.dumps(said))
"""


def test_every_example_is_listed():
    main = 'if __name__ == "__main__"'
    programs = {path.stem for path in (ROOT / "examples").glob("*.py") if main in path.read_text()}
    assert NEEDS.keys() == programs - {"table"}  # table.py runs the others


def test_an_example_says_which_library_is_missing_and_how_to_get_it(tmp_path):
    for library in ("sklearn", "matplotlib"):
        pytest.importorskip(library)
    pairs = [
        (str(ROOT / "examples" / f"{name}.py"), library)
        for name, needs in NEEDS.items()
        for library in needs
        if all(other == library or find_spec(other) for other in needs)  # else it names another one
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(pairs),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout)
    assert len(said) == len(pairs)
    for case, text in said.items():
        lines = text.splitlines()
        library = case.rpartition(" ")[2]
        assert len(lines) == 1 and library in lines[0] and "run pip install" in lines[0], f"{case}:\n{text}"
