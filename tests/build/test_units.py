"""Which sources are compiled together."""

import os
import re
from pathlib import Path

import pytest

from _build import compile_kernels as kernels
from _build.units import TENSORS, units
from tests.support.paths import ROOT

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for room in ("ops", "python")
    for path in ROOT.glob(f"csrc/{room}/**/*.cpp")
    if path.parent.name != "cuda"
)


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return units(SOURCES, tmp_path)


def included(path):
    return re.findall(r'^#include "(.*)"\n', path.read_text(), re.MULTILINE)


def test_every_source_is_compiled_once(made, tmp_path):
    assert sorted(f"csrc/{name}" for path in tmp_path.iterdir() for name in included(path)) == SOURCES
    assert sorted(made) == sorted(map(str, tmp_path.iterdir()))


def test_a_unit_is_all_files_of_one_room(made, tmp_path):
    assert sorted(path.stem for path in tmp_path.iterdir()) == [
        "ops",
        "ops-autograd",
        "ops-cpu",
        "python",
        "python-tensors",
    ]
    for path in tmp_path.iterdir():
        rooms = {Path(name).parent.as_posix().replace("/", "-") for name in included(path)}
        assert rooms == {path.stem.removesuffix("-tensors")}


def test_the_units_of_the_module_differ_in_tensors(made, tmp_path):
    for path in tmp_path.glob("python*.cpp"):
        with_tensors = [bool(TENSORS.search((ROOT / "csrc" / name).read_text())) for name in included(path)]
        assert set(with_tensors) == {path.stem == "python-tensors"}


def test_an_unchanged_unit_is_not_written_again(made, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    first = next(iter(sorted(tmp_path.iterdir())))
    first.write_text("")
    assert units(SOURCES, tmp_path) == made
    assert {path for path in tmp_path.iterdir() if path.stat().st_mtime != 1} == {first}
    assert included(first)


def test_the_kernels_have_a_compilers_cache_where_there_is_one(tmp_path, monkeypatch):
    """As the operators have from torch; and they do without."""
    cache = tmp_path / "ccache"
    cache.write_text("#!/bin/sh\n")
    cache.chmod(0o755)
    commands = []
    monkeypatch.setattr(kernels, "_ninja", lambda command, *rest: commands.append(command) or [])
    monkeypatch.setenv("CXX", "g++-12")
    monkeypatch.delenv("TORCH_NO_COMPILER_WRAPPER", raising=False)
    for path in (tmp_path, tmp_path / "nothing"):
        monkeypatch.setenv("PATH", str(path))
        kernels.compile_host_kernels([], [], 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_NO_COMPILER_WRAPPER", "1")
    kernels.compile_host_kernels([], [], 1)
    assert [command.split()[:2] for command in commands] == [["ccache", "g++-12"]] + 2 * [["g++-12", "-std=c++20"]]
