"""The project of the Hub kernel: complete, with names of its own, and swapped in by ``kernelize``."""

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tools.hub_kernel.__main__ import OPERATORS, build, write

tomllib = pytest.importorskip("tomllib")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "dlkernels"
    write(folder)
    return folder


def test_every_source_is_there_and_finds_its_headers(project):
    settings = tomllib.loads((project / "build.toml").read_text())
    named = {*settings["torch"]["src"], *settings["kernel"]["dlkernels_cpu"]["src"]}
    written = {str(p.relative_to(project)) for p in project.rglob("*") if p.suffix in (".cpp", ".h")}
    assert named == written and settings["general"]["backends"] == ["cpu"]
    for name in named:
        for header in re.findall(r'#include "(.*)"', (project / name).read_text()):
            assert header == "registration.h" or (project / "csrc" / header).is_file(), f"{name} includes {header}"


def test_nothing_has_the_name_of_the_package(project):
    """Several builds, and the package itself, may be in one process."""
    for path in project.rglob("*"):
        if path.suffix in (".cpp", ".h", ".py"):
            text = path.read_text()
            ours = r'"dlkernels::|TORCH_LIBRARY\w*\(dlkernels|torch\.ops\.dlkernels|"dlkernels"'
            assert not re.search(ours, text), path
            assert not re.search(r"^\s*(from|import) dlkernels", text, re.MULTILINE), path


def test_the_python_modules_find_each_other(project):
    folder = project / "torch-ext/dlkernels/operators"
    for name in OPERATORS:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                wanted = [node.module] if node.module else [alias.name for alias in node.names]
                assert set(wanted) <= set(OPERATORS), f"{name} imports {wanted}: add it to OPERATORS"


def test_a_folder_in_use_is_refused(project):
    with pytest.raises(SystemExit, match="expected a folder that is empty or not there"):
        write(project)


KERNELIZE = """
import copy, sys
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional as F
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

@use_kernel_forward_from_hub("LinearGELU")
class Hidden(nn.Linear):
    def forward(self, x):
        return F.gelu(F.linear(x, self.weight, self.bias))

@use_kernel_forward_from_hub("SiLUGatedMLP")
class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

names = ("LinearGELU", "SiLUGatedMLP")
layers = {name: {"cpu": LocalLayerRepository(Path(sys.argv[1]), layer_name=name)} for name in names}
torch.manual_seed(0)
stock = nn.Sequential(Hidden(8, 16), Gated(), nn.Linear(16, 4))
with use_kernel_mapping(layers):
    ours = kernelize(copy.deepcopy(stock), mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
x = torch.randn(32, 8)
with torch.profiler.profile() as profile:
    ours(x)
called = {event.name for event in profile.events()}
assert {f"_dlkernels_local::_linear_{kind}_forward_z" for kind in ("act", "glu")} <= called, called
for run in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
    for model in (stock, ours):
        model.zero_grad()
    stock(x).square().sum().backward()
    run(x).square().sum().backward()
    torch.testing.assert_close(run(x), stock(x))
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
[g] = torch.autograd.grad(ours(x).square().sum(), ours[0].weight, create_graph=True)
g.square().sum().backward()
import dlkernels  # beside the package
torch.testing.assert_close(dlkernels.functional.linear_act(x, stock[0].weight, stock[0].bias, "gelu"), ours[0](x))
print("kernelized")
"""


@pytest.mark.slow
def test_kernelize_swaps_the_layers_in(tmp_path):
    """Forward, backward, double backward and torch.compile, beside the package and without a network."""
    pytest.importorskip("kernels")
    project = tmp_path / "dlkernels"  # its own: a build leaves files in it
    write(project)
    build(project)
    done = subprocess.run(
        [sys.executable, "-c", KERNELIZE, str(project)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "kernelized", done.stdout[-4000:]
