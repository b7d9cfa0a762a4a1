"""The checks of `make wheel` on made-up contents. The wheels themselves are built by hand."""

import re

import pytest

from tests.support.paths import ROOT
from tools import wheel

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


def test_it_names_its_torch():
    """In its version and in its requirement: pip would else install it beside any torch."""
    version, metadata = wheel.with_torch(METADATA, "2.13.0+cpu")
    assert version == "0.1.0+torch2.13.0.cpu"
    assert metadata == METADATA.replace("0.1.0", version).replace("torch>=2.11", "torch==2.13.0")
    with pytest.raises(wheel.WheelError, match="one requirement of torch in METADATA; got 0"):
        wheel.with_torch("Version: 0.1.0\n", "2.13.0")
