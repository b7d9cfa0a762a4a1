"""Every command that the README, the docs and the examples print is run as printed, but for a small setting.

They run in their order, in a copy of the tracked files with the compiled extension, so that a later command finds what
an earlier one wrote. A new command fails the test until it stands in one of the two tables: ``SMALL`` has what is run
in its place, ``NOT_RUN`` the reason why it is not.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.docs.pages import BLOCKS, PAGES
from tests.support.paths import ROOT

TUNE = "--dtypes float32 --seconds 0.01 --out routes.json"
NETWORKS = "'batch 32' 'tanh, 32 points' members gated 'gelu 768' 32k"  # one of each kind
BENCH = "--shapes 8x8x8 --modes forward --dtypes fp32 --budget 0.05 --out bench.json"

# As printed, and as run; None: as printed.
SMALL: dict[str, str | None] = {
    "python -m dlkernels info": None,
    "python -m dlkernels train": "python -m dlkernels train --dataset digits --epochs 1 --out runs/mnist",
    "python -m dlkernels train --dataset digits --epochs 20 --schedule cosine --out runs/a":
        "python -m dlkernels train --dataset digits --epochs 3 --schedule cosine --out runs/a",
    "python -m dlkernels train --config runs/a/config.toml --lr 0.003 --out runs/b":
        "python -m dlkernels train --config runs/a/config.toml --lr 0.003 --out runs/b --epochs 1",
    "python -m dlkernels compare runs/a runs/b --out comparison.html": None,
    "python -m dlkernels find-lr --dataset digits": "python -m dlkernels find-lr --dataset digits --batches 10",
    "python -m dlkernels cross-validate --dataset digits":
        "python -m dlkernels cross-validate --dataset digits --epochs 1 --folds 2",
    "python -m dlkernels predict runs/mnist digit.png": None,
    "python -m dlkernels export runs/mnist --format onnx": None,
    "python -m dlkernels fuse --model torchvision:alexnet":
        "python -m dlkernels fuse --model torchvision:alexnet --batch-size 1 --size 64",
    "python -m bench.networks": f"python -m bench.networks --dtypes fp32 --budget 0.01 --networks {NETWORKS}",
    "python -m tests.planning.gpu_plans": None,
    "python -m bench": f"python -m bench {BENCH}",
    "python -m bench --quick": f"python -m bench --quick {BENCH}",
    "python -m bench --activations none": f"python -m bench --activations none {BENCH}",
    "python -m bench.overhead": "python -m bench.overhead --seconds 0.01",
    "python -m bench.sweep": "python -m bench.sweep --seconds 0.1",
    "python -m bench.trainer_loop": "python -m bench.trainer_loop --epochs 1 --threads 1",
    "python -m bench.readme_table bench/results/amd-epyc-2t.json": None,
    "python -m bench.readme_table bench/results/amd-epyc-zen3-2t.json": None,
    "python -m bench.readme_table bench/results/intel-xeon-amx-2t.json": None,
    "python -m bench.networks.page FILE...": "python -m bench.networks.page bench/results/amd-epyc-2t-networks.json",
    "python -m bench.aims": "python -m bench.aims bench/results/amd-epyc-2t.json",
    "python -m bench.aims FILE...": "python -m bench.aims bench/results/amd-epyc-2t.json",
    "python -m bench.networks.page": "python -m bench.networks.page bench/results/amd-epyc-2t-networks.json",
    "python -m bench.readme_table FILE": "python -m bench.readme_table bench/results/amd-epyc-2t.json",
    "python -m dlkernels tune": f"python -m dlkernels tune --shapes 8x8x8 {TUNE}",
    "python -m dlkernels tune --any-threads --seconds 0.6 --out dlkernels/routes/PROCESSOR-ISA.json":
        f"python -m dlkernels tune --any-threads --shapes 8x8x8 {TUNE.replace('routes', 'routes-of-any')}",
    "python -m tools.hub_kernel build/hub-kernel": None,
    "python -m dlkernels tune --shapes 64x784x256 64x256x10 --threads 4":
        f"python -m dlkernels tune --shapes 64x784x256 64x256x10 --threads 4 {TUNE}",
    "python -m dlkernels tune --mlps 256x8-64-64-4": f"python -m dlkernels tune --mlps 256x8-64-64-4 {TUNE}",
    'python -c "from dlkernels import routing; print(routing.file_name())"': None,
    "python -m dlkernels train --resume --out runs/a": None,
    "python -m dlkernels train --resume --out runs/a --epochs 30":
        "python -m dlkernels train --resume --out runs/mnist --epochs 2",  # the schedule of runs/a fixes its epochs
    "python -m dlkernels train --resume runs/a/checkpoints/epoch-0003.pt --out runs/b": None,
    "python -m dlkernels find-lr --dataset digits --optimizer sgd":
        "python -m dlkernels find-lr --dataset digits --optimizer sgd --batches 10",
    "python -m dlkernels cross-validate --config runs/a/config.toml --lr 0.01 --folds 5 --kind stratified":
        "python -m dlkernels cross-validate --config runs/a/config.toml --lr 0.01 --folds 2 --kind stratified "
        "--epochs 1",
}  # fmt: skip

# The libraries of no extra, and those of extras that a machine without a registry may lack.
NEEDS = {"torchvision": "torchvision", "--format onnx": "onnxscript"}

MATRIX = "downloads packages and compiles for minutes; tools/install_matrix.py runs it"
INSTALL = "compiles for minutes; tests/build/test_install.py runs it, a slow test"
NETWORK = "downloads packages; no test runs it"
CI = ".github/workflows runs it on each push"
GPU = "needs a GPU"
NAME = "the name of a program in a sentence"
NOT_RUN = {
    "python -m bench.networks --compile": "it compiles for minutes; tests/bench/test_networks.py compiles one network",
    "pip install -e '.[train]'": INSTALL,
    "pip install -e '.[dev]'": "downloads packages; `make test` installs them, on each push",
    "pip install -e '.[neighbours]'": "downloads packages; `make test` installs them with those of the extra dev",
    "pip install -e .": MATRIX,
    "pip install .": MATRIX,
    "pip install -v .": INSTALL,
    "pip install --no-build-isolation .": MATRIX,
    "uv pip install --no-build-isolation .": MATRIX,
    "uv pip install .": MATRIX,
    "pip install -U setuptools ninja": MATRIX,
    "pip install dist/dlkernels-*.tar.gz": MATRIX,
    "pip wheel --no-deps .": NETWORK,
    "pip install --force-reinstall --no-deps --no-cache-dir .": MATRIX,
    "pip install --no-deps torchvision==0.N.*": NETWORK,
    "pip install build": MATRIX,
    "pip install torch": NETWORK,
    "pip install git+file://FOLDER": MATRIX,
    "python -m build": NAME,
    "python -m build --sdist": MATRIX,
    "python -m build --wheel --no-isolation": MATRIX,
    "python -m tools.install_matrix --record docs/guide/install.md": NETWORK,
    "make wheel": NETWORK,
    "python -m tools.wheel": NETWORK,
    "python -m tools.wheel --record docs/guide/install.md": NETWORK,
    "python -m tools.wheel --python python3.11 python3.12 --torch torch==2.13.0": NETWORK,
    "python -m tools.hub_kernel build/hub-kernel --build": "compiles for minutes",
    "source .venv/bin/activate": "changes the reader's shell; `make demo` made .venv",
    "make test": CI,
    "make lint": CI,
    "make docs": CI,
    "tools/lint.sh --fix": "changes the sources; `make lint` runs the same tools without --fix",
    "pre-commit install": "changes the settings of git",
    "pytest -n 8": "the suite itself",
    "pytest -m 'not slow'": "the suite itself",
    "make demo": "compiles and downloads for minutes; tests/cli/test_train_cli.py runs tools/demo.sh, which it calls",
    "make bench": "compiles; `python -m bench --quick` is run, which it calls",
    "make test-isa": "runs the suite several times",
    "make sanitize": "runs the suite with sanitizers",
    "make mutations": "compiles for an hour",
    "make races": "compiles for minutes",
    "make cuda-check": "needs nvcc",
    "make gpu-wheel": "needs nvcc, and downloads 5 GB",
    "make gpu-check": GPU,
    "PYTHON=python3 make gpu-check": GPU,
    "DLKERNELS_TEST_ON_DEVICE=build/gpu-wheel/lib/first_light.so python -m pytest tests/emulation/test_cuda_gemm.py":
        GPU,
    'make gpu-check STAGES="build light"': GPU,
    "make gpu-lease": GPU,
    "make gpu-lease RUN=again": GPU,
    "python -m bench.dispatch": GPU,
    "python -m dlkernels tune --device cuda --shapes 64x784x256": GPU,
    "torchrun --nproc-per-node=8 -m dlkernels train --dataset mnist --device cuda": GPU,
    "torchrun --nproc-per-node=8 -m dlkernels train --dataset mnist --device cuda --parallel fsdp": GPU,
    "torchrun --nproc-per-node=2 --max-restarts=3 -m dlkernels train --dataset digits": "half a minute; "
    "tests/trainer/test_torchrun.py runs it",
    "torchrun --nproc-per-node=8 train.py": "train.py is the reader's",
    "torchrun -m dlkernels train": NAME,
    "python -m dlkernels": NAME,
    "python -m dlkernels COMMAND": NAME,
    "python -m dlkernels COMMAND --help": NAME,
    "python -m bench.readme_table": NAME,
    "python -m tests.kernels.every_processor": "runs the suite several times",
    "python -m _build.compile_kernels": "compiles for a minute; `make` runs it",
    "python setup.py build_ext --inplace": "compiles for minutes; no test runs it",
    "python -m tools.compile_cost": "compiles for minutes; no test runs it",
    "python -m dlkernels tune --model torchvision:alexnet --batch-size 32": "times 4,096 wide layers for minutes; "
    "tests/routing/test_tuning.py tunes for a model",
}  # fmt: skip

# Runs the commands that come as JSON, in the current folder. Each is a fork of a process that has imported what most of
# them need and takes seconds. It prints the exit status and the output of each that failed.
RUNNER = """
import json, os, runpy, shlex, subprocess, sys, tempfile, traceback
import matplotlib.figure, sklearn.datasets, torch.testing, torch.utils.flop_counter

torch.set_num_threads(1)

def call(words):
    if words[0] != "python":
        return subprocess.run(words).returncode
    try:
        if words[1] == "-c":
            exec(words[2], {"__name__": "__main__"})
        else:
            assert words[1] == "-m", words
            sys.argv = words[2:]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0

for command in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as output:
        if (child := os.fork()) == 0:
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            try:
                status = call(shlex.split(command))
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            output.seek(0)
            print(f"{command}\\n{output.read()[-2000:]}exit status {status}\\n", flush=True)
"""


# In a sentence: a program with arguments, after variables or not. In a block of commands every line is one.
PROGRAMS = r"python3?|pip|uv|make|torchrun|pytest|pre-commit|source|git|bash|(?:tools|\.)/[\w/]+\.sh"
IN_A_SENTENCE = re.compile(rf"`((?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) [^`\n]*)`")


def commands(text, blocks=()):
    """Every command of a page's text and of its blocks, without the comments behind them."""
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.sub(r"\s+# .*", "", line) for line in [*lines, *IN_A_SENTENCE.findall(text)]]
    return [line for line in found if line and not line.startswith("#")]


def printed():
    """Every command on the pages with its page, in their order, but for blocks that say why they do not run."""
    shells = [block for block in BLOCKS if block.language == "sh" and not block.not_run]
    return [
        (page, line)
        for page in PAGES
        for line in commands(page.read_text(), [block.text for block in shells if block.page == page])
    ]


def test_commands_in_sentences_are_seen():
    text = "`uv pip install .`, `PYTHON=python3 make gpu-check`, `tools/lint.sh --fix`; `pytest`, `make` and `pip.ini`"
    assert commands(text, ["A=1 B='2' python -m x \\\n  --y  # why\n# a comment\n"]) == [
        "A=1 B='2' python -m x    --y",
        "uv pip install .",
        "PYTHON=python3 make gpu-check",
        "tools/lint.sh --fix",
    ]


def test_every_printed_command_is_in_one_of_the_tables():
    assert not SMALL.keys() & NOT_RUN.keys()
    lines = {line for _, line in printed() if not re.match(r"python examples/\w+\.py", line)}
    unknown = {line for line in lines if line not in SMALL and line not in NOT_RUN}
    assert not unknown, f"{sorted(unknown)}: add it to SMALL or to NOT_RUN in {__file__}"
    gone = (SMALL.keys() | NOT_RUN.keys()) - lines
    assert not gone, f"{sorted(gone)}: no page prints it any more"


def test_every_example_that_is_printed_is_run_by_its_tests():
    """The tests of the examples call the ``main`` or ``train`` of each in its small setting."""
    tests = "".join(path.read_text() for path in (ROOT / "tests/examples").glob("test_*.py"))
    named = {line.split()[1] for _, line in printed() if line.startswith("python examples/")} - {"examples/NAME.py"}
    for path in sorted((ROOT / "examples").glob("*.py")):
        if re.search(rf"^python examples/{path.name}", path.read_text(), re.MULTILINE):
            named.add(f"examples/{path.name}")
    for name in sorted(named):
        assert (ROOT / name).is_file()
        stem = name.removeprefix("examples/").removesuffix(".py")
        assert re.search(rf'"{stem}"', tests), f"no test in tests/examples runs {name}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the tracked files, as a fresh clone has them, and the compiled extension."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("clone")
    extension = [str(path.relative_to(ROOT)) for path in (ROOT / "dlkernels").glob("_C*")]
    for name in {*listed.stdout.splitlines(), *extension}:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.mark.first
def test_printed_commands_run(clone):
    for library in ("sklearn", "matplotlib", "pydantic"):
        pytest.importorskip(library)
    from PIL import Image

    Image.linear_gradient("L").resize((8, 8)).save(clone / "digit.png")
    lines = dict.fromkeys(line for _, line in printed() if line in SMALL)  # each once, in the order of the pages
    commands = [
        SMALL[line] or line
        for line in lines
        if not any(part in line and find_spec(library) is None for part, library in NEEDS.items())
    ]
    assert len(commands) > 20
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    environment = {
        "PYTHONPATH": str(clone),
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(clone / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(commands),
        cwd=clone,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 and not done.stdout, done.stdout
    for made in ("comparison.html", "runs/a/report.html", "runs/mnist/model.onnx", "routes.json", "bench.json"):
        assert (clone / made).exists(), made
