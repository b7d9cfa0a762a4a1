"""The checks of `make wheel` on made-up contents. The wheels themselves are built by hand."""

import re
from pathlib import Path

import pytest

from dlkernels import _load
from tests.support.paths import ROOT
from tools import install_matrix, wheel
from tools.marked import marks

NAME = "dlkernels-0.1.0+torch2.13.0.cpu-cp311-cp311-manylinux_2_34_x86_64.whl"
MODULES = [str(path.relative_to(ROOT)) for path in ROOT.glob("dlkernels/**/*.py")]
OTHERS = [name.replace("*", "a") for name in wheel.CONTENT]
LIBRARY = "dlkernels/_C.cpython-311-x86_64-linux-gnu.so"
WHOLE = [*MODULES, *OTHERS, LIBRARY]


def test_a_whole_wheel_passes():
    wheel.check_content(WHOLE, NAME)
    wheel.check_content(WHOLE, NAME.replace("34_x86_64", "27_x86_64.manylinux_2_28_x86_64"))


@pytest.mark.parametrize(
    ("names", "name", "message"),
    [
        (WHOLE, NAME.replace("manylinux_2_34", "linux"), "a manylinux tag; got dlkernels-0.1.0"),
        (WHOLE, NAME.replace("cp311-cp311", "cp311-abi3"), "equal Python tags"),
        (WHOLE, NAME.replace("311", "312"), "for Python 312 as the only library; got ['dlkernels/_C.cpython-311"),
        ([*WHOLE, "dlkernels.libs/libgomp-1.so.1"], NAME, "as the only library; got"),
        ([*MODULES, *OTHERS], NAME, "got none"),
        ([*WHOLE, "csrc/ops/layer.cpp"], NAME, "got csrc/ops/layer.cpp too"),
        ([*WHOLE, "dlkernels/gone.py"], NAME, "got dlkernels/gone.py too"),
        ([name for name in WHOLE if name != "dlkernels/nn/mlp.py"], NAME, "got no dlkernels/nn/mlp.py"),
        ([name for name in WHOLE if "routes/" not in name or name.endswith(".py")], NAME, "routes/*.json"),
    ],
)
def test_others_do_not(names, name, message):
    with pytest.raises(wheel.WheelError, match=re.escape(message)):
        wheel.check_content(names, name)


METADATA = "Version: 0.1.0\nRequires-Dist: torch>=2.11\nRequires-Dist: torchmetrics; extra == 'train'\n"


@pytest.mark.parametrize(("torch", "distribution"), [("2.13.0+cpu", "2.13.0+cpu"), ("2.13.0+cu130", "2.13.0")])
def test_it_names_its_torch(torch, distribution):
    """In its version and in its requirement: pip would else install it beside any torch."""
    version, metadata = wheel.with_torch(METADATA, torch, distribution)
    assert version == f"0.1.0+torch{torch.replace('+', '.')}"
    required = wheel.requirement(distribution)
    assert metadata == METADATA.replace("0.1.0", version).replace("torch>=2.11", required)
    with pytest.raises(wheel.WheelError, match="one requirement of torch in METADATA; got 0"):
        wheel.with_torch("Version: 0.1.0\n", torch, distribution)


BUILDS = ["2.13.0", "2.13.0+cpu", "2.13.0+cu130", "2.13.1", "2.13.1+cpu"]


@pytest.mark.parametrize("built", BUILDS)
def test_its_requirement_is_met_where_its_import_works(built):
    """By pip's own rules, that build of torch alone. So the wheel is not installed where dlkernels would refuse."""
    requirement = pytest.importorskip("packaging.requirements").Requirement(wheel.requirement(built))
    assert [each for each in BUILDS if requirement.specifier.contains(each)] == [built]


@pytest.mark.parametrize("built", BUILDS)
def test_the_advice_of_the_import_installs_that_torch(built):
    """The one after which the import works: to pip `torch==2.13.0` is met by every build of the release."""
    requirements = pytest.importorskip("packaging.requirements")
    with pytest.raises(ImportError) as refused:
        _load.check_torch(built, "2.14.0+cu130")
    [advised] = re.findall(r"`pip install (torch==\S+)`", str(refused.value))
    met = [each for each in BUILDS if requirements.Requirement(advised).specifier.contains(each)]
    assert met == [built] or "+" not in built  # without a local part pip has the usual index, which has one build
    assert ("--index-url" in str(refused.value)) == ("+" in built)


def test_its_row_is_recorded(tmp_path):
    file = tmp_path / NAME
    file.write_bytes(bytes(3 << 20))
    page = tmp_path / "install.md"
    begin, end = marks("wheels")
    page.write_text(f"before\n{begin}\n{end}\nafter\n")
    for torch in ("2.13.0+cpu", "2.14.0+cpu", "2.13.0+cpu"):  # the third replaces the first
        row = wheel.row(file, f'["3.11.7", "{torch}", "gcc 12.2.0", "CPU only"]')
        assert row[1:] == (f"`{NAME}`", "3.11.7", torch, "manylinux_2_34_x86_64", "gcc 12.2.0", "3.0", "works")
        install_matrix.record(page, [row], wheel.TABLE)
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", begin] and lines[-2:] == [end, "after"]
    assert lines[2] == install_matrix.line(wheel.TABLE.header).strip()
    assert [each.split(" | ")[3] for each in lines[4:-2]] == ["2.13.0+cpu", "2.14.0+cpu"]


@pytest.mark.parametrize("folder", ["/somewhere/abc/environment/venv", "/elsewhere/.cache/uv/builds-v0/.tmpUm49ld"])
def test_a_row_names_no_folder_of_the_machine(folder):
    said = install_matrix.as_cell(f"refused: {folder} has none: CXX=a|b", Path("/somewhere/abc"))
    assert said == "refused: the environment has none: CXX=a/b"
