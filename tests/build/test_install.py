"""Installation as a user does it: real builds by pip in environments of their own, each seeing this torch.

One full compilation serves them all, in all processes of a run: sdist → unpack → `pip install .`; what follows, in the
same folder and for the same interpreter, reuses its objects. One test at a time uses this environment.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock

import dlkernels
from dlkernels import _C, _load
from tests.support import shared
from tests.support.paths import ROOT

SITE = Path(torch.__file__).parents[1]

SANITIZE = os.environ.get("DLKERNELS_SANITIZE", "")

# The environment of these tests, less what would change the builds.
VARIABLES = (
    "FORCE_CUDA",
    "FORCE_CPU",
    "DLKERNELS_SANITIZE",
    "TORCH_CUDA_ARCH_LIST",
    "PYTHONPATH",
    "LD_PRELOAD",
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # One ninja for all builds: another version of it would compile everything anew.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)


def run(*command, ok=True, cwd=None, **kwargs) -> str:
    """Run the command and return both its streams. It must succeed; with ok=False it must fail."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=cwd,
        **kwargs,
    )
    assert (done.returncode == 0) == ok, done.stdout[-5000:]
    return done.stdout


def pip_install(python: Path, *arguments, **kwargs) -> str:
    return run(sys.executable, "-m", "pip", "--python", python, "install", *arguments, **kwargs)


def environment(folder: Path, *, with_torch: bool) -> Path:
    """The interpreter of a new virtual environment that sees this torch through a .pth, or none."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    if with_torch:
        purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(purelib, "torch_from_outside.pth").write_text(f"{SITE}\n")
    return python


def readme_commands(heading: str) -> list[str]:
    """The lines of the first block of commands under the heading."""
    block = (ROOT / "README.md").read_text().partition(heading)[2].partition("```sh\n")[2].partition("```")[0]
    return [line for line in block.splitlines() if line]


def sources(folder: Path) -> Path:
    """Copy the sources to ``folder``, without anything built."""
    anywhere = shutil.ignore_patterns(".*", "*.egg-info", "_C*.so", "_C.json", "__pycache__")
    made = {"build", "dist", "runs"}  # here; dlkernels/runs is a package
    return shutil.copytree(
        ROOT, folder, ignore=lambda place, names: anywhere(place, names) | (made if Path(place) == ROOT else set())
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return sources(tmp_path_factory.mktemp("checkout") / "dlkernels")


def unpacked(folder: Path) -> Path:
    """Make an sdist by `python -m build`, whose isolated environment has no torch, and unpack it in ``folder``."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, sources(folder / "checkout"))
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


IMPORT = """
import json, sys
import torch, dlkernels
from dlkernels import _C
x, w = torch.randn(3, 4), torch.randn(5, 4)
assert torch.equal(
    dlkernels.functional.linear_relu(x, w) > 0, torch.nn.functional.linear(x, w) > 0
), "the installed kernels do not compute"
print(json.dumps([dlkernels.__file__, torch.__file__, torch.__version__, _C.build_config()]))
"""


class Facts(NamedTuple):
    """Where an installed package was imported from, beside which torch, and how it was built."""

    where: Path
    torch_where: Path
    version: str
    config: dict[str, Any]


def facts(python: Path, cwd: Path) -> Facts:
    where, torch_where, version, config = json.loads(run(python, "-c", IMPORT, cwd=cwd).splitlines()[-1])
    return Facts(Path(where), Path(torch_where), version, config)


class Installed(NamedTuple):
    """The folder of the sources, the environment's interpreter, and what pip said and made at first."""

    unpacked: Path
    python: Path
    said: str
    facts: Facts


def install(record: Path) -> None:
    """`pip install .`, with no flags but the verbosity we read. ``record`` is told where everything is."""
    folder = Path(tempfile.mkdtemp(prefix="install-", dir=record.parent))
    made = unpacked(folder)
    python = environment(folder / "env", with_torch=True)
    said = pip_install(python, "--verbose", ".", cwd=made)
    record.write_text(json.dumps([str(made), str(python), said, facts(python, folder)], default=str))


@pytest.fixture
def installed() -> Iterator[Installed]:
    record = shared.once("install.json", install)
    made, python, said, (where, torch_where, *others) = json.loads(record.read_text())
    with FileLock(record.with_suffix(".in-use")):
        yield Installed(Path(made), Path(python), said, Facts(Path(where), Path(torch_where), *others))


@pytest.mark.slow
def test_plain_install_builds_against_the_torch_that_is_there(installed):
    _, python, said, (where, torch_where, version, config) = installed
    assert where.is_relative_to(python.parents[1])
    assert torch_where == Path(torch.__file__)
    assert config["torch"] == version == torch.__version__
    assert (where.parent / "runs" / "templates" / "report.html").is_file()
    assert "dlkernels: building " in said


@pytest.mark.slow
def test_plain_install_does_not_fetch_another_torch(installed):
    _, python, said, _ = installed
    assert "Collecting setuptools" in said  # the isolated environment was made, and pip speaks this language
    fetched = re.findall(r"(?:Collecting|Downloading|Processing) \S*\btorch[-=<> \d].*", said)
    assert fetched == []
    assert list(python.parents[1].rglob("libtorch*.so")) == []


@pytest.mark.slow
def test_another_torch_is_refused_before_the_module_is_loaded(installed, tmp_path):
    python = installed.python
    said = run(
        python,
        "-c",
        "import sys, torch; torch.__version__ = '2.99.0+cu140'\n"
        "try:\n    import dlkernels\n"
        "except ImportError as e:\n    assert 'dlkernels._C' not in sys.modules; print(e)",
        cwd=tmp_path,
    )
    assert f"built for torch {torch.__version__}" in said
    assert "this is torch 2.99.0+cu140" in said
    assert "pip install --force-reinstall --no-deps" in said


@pytest.mark.slow
def test_editable_install_reuses_the_objects(installed, tmp_path):
    unpacked, python, *_ = installed
    said = pip_install(python, "--verbose", "--editable", ".", cwd=unpacked)
    assert "ninja: no work to do" in said
    where, _, _, config = facts(python, tmp_path)
    assert where == unpacked / "dlkernels" / "__init__.py"
    [link] = python.parents[1].rglob("__editable__*dlkernels*.pth")
    assert Path(link.read_text().strip()) == unpacked, "type checkers follow a path only"
    assert config["torch"] == torch.__version__


@pytest.mark.slow
def test_the_readme_s_order_of_commands(installed):
    """Its Install, as printed, in the folder of the sources."""
    unpacked, python, *_ = installed
    install, *commands = readme_commands("## Install")
    pip_install(python, *shlex.split(install)[2:], cwd=unpacked)
    assert commands[0].startswith("python -m dlkernels info")
    for command in commands:
        run(python, *command.partition(" #")[0].split()[1:], "--help", cwd=unpacked)
    said = run(python, "-m", "dlkernels", "info", cwd=unpacked)
    assert torch.__version__ in said and said.splitlines()[-1].startswith("for a bug report: ")
    assert run(python.with_name("dlkernels"), "info", cwd=unpacked.parent) == said


@pytest.mark.slow
def test_install_without_isolation(installed, tmp_path):
    unpacked, python, *_ = installed
    pip_install(python, "--no-build-isolation", ".", cwd=unpacked)
    where, _, _, config = facts(python, tmp_path)
    assert where.is_relative_to(python.parents[1])
    assert config["torch"] == torch.__version__


@pytest.mark.slow
def test_without_torch_one_sentence_asks_for_it(checkout, tmp_path):
    python = environment(tmp_path / "bare", with_torch=False)
    said = pip_install(python, ".", cwd=checkout, ok=False)
    assert "run `pip install torch` first" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_build_that_cannot_be_is_one_sentence(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    if torch.version.cuda:  # there FORCE_CUDA=1 alone may well succeed
        monkeypatch.setenv("FORCE_CPU", "1")
    python = environment(tmp_path / "forced", with_torch=True)
    said = pip_install(python, ".", cwd=checkout, ok=False)
    mend = "unset one of them" if torch.version.cuda else "install a CUDA build of torch"
    [sentence] = [line for line in said.splitlines() if "dlkernels: F" in line]
    assert mend in sentence
    assert "Traceback" not in said


def test_sources_without_a_build_say_so(tmp_path):
    shutil.copytree(ROOT / "dlkernels", tmp_path / "dlkernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    said = run(sys.executable, "-c", "import dlkernels", cwd=tmp_path, ok=False)
    assert "ImportError: dlkernels is not compiled" in said
    assert f"Run `pip install -e .` in {tmp_path}" in said


@pytest.mark.parametrize("have", ["2.13.1+cpu", "2.13.0+cu130", "2.13.0", "2.11.0+cpu"])
def test_only_exactly_the_same_torch_will_do(have):
    _load.check_torch("2.13.0+cpu", "2.13.0+cpu")
    with pytest.raises(ImportError, match=re.escape(f"this is torch {have}")):
        _load.check_torch("2.13.0+cpu", have)


def test_build_config_tells_the_truth():
    config = _C.build_config()
    assert config["torch"] == torch.__version__ == _load.BUILT_FOR["torch"]
    assert config["cuda_archs"] == _load.BUILT_FOR["cuda"]
    for op in ("_linear_act_forward", "_linear_act_forward_z", "_linear_act_forward_mask", "_linear_act_backward"):
        has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"dlkernels::{op}", "CUDA")
        assert has_cuda == (config["cuda"] is not None)
    assert config["cxx_standard"] in (17, 20)
    assert config["openmp"]


def test_sanitizers_are_those_asked_for():
    assert (_C.build_config()["sanitize"] or "") == SANITIZE


def test_isa_in_use_is_one_this_cpu_has():
    kernels, features = _C.cpu_kernels(), _C.cpu_features()
    assert kernels["isa"] == "portable" or features[kernels["isa"]]
    if sys.platform == "linux" and Path("/proc/cpuinfo").exists():
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
        assert features["avx2"] == {"avx2", "fma", "f16c"}.issubset(flags)
        assert features["avx512"] == {"avx512f", "avx512bw", "avx512vl", "avx512dq"}.issubset(flags)


def test_info_prints_built_for_against_you_have():
    said = run(sys.executable, "-m", "dlkernels", "info")
    built, have = said.index("built for"), said.index("you have")
    assert torch.__version__ in said[built:have]
    assert torch.__version__ in said[have:]
    assert _C.cpu_kernels()["isa"] in said


def test_version_is_the_one_in_the_metadata():
    from importlib.metadata import version

    assert dlkernels.__version__ == version("dlkernels")


def test_the_sdist_has_what_its_tests_and_makefile_use(tmp_path):
    """All that git has but its own settings."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("no checkout")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
        [described] = [m for m in tar.getmembers() if m.name.count("/") == 1 and m.name.endswith("/PKG-INFO")]
        metadata = tar.extractfile(described).read().decode()
    ours = {name for name in tracked if not name.startswith((".ci/", ".git", ".pre-commit"))}
    assert ours - packed == set()
    # On an index's page a link to a file of the sources leads nowhere.
    assert "# dlkernels\n" in metadata and re.findall(r"\]\((?!https?:)", metadata) == []
