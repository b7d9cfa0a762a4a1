"""Which sources are compiled together."""

import os
import re

import pytest

from _build.units import FILES, LARGE, TORCH, units
from tests.support.paths import ROOT

SOURCES = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.cpp") if path.parts[-2] != "kernels"
)


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return units(SOURCES, tmp_path)


def included(path):
    return re.findall(r'^#include "(.*)"\n', path.read_text(), re.MULTILINE)


def test_every_source_is_compiled_once(made, tmp_path):
    together = [f"csrc/{name}" for path in tmp_path.iterdir() for name in included(path)]
    alone = [path for path in made if path.startswith("csrc/")]
    assert sorted(together + alone) == SOURCES
    assert sorted(str(tmp_path / path.name) for path in tmp_path.iterdir()) == sorted(set(made) - set(alone))


def test_a_unit_is_small_files_of_one_room(made, tmp_path):
    for path in tmp_path.iterdir():
        names = included(path)
        assert 1 < len(names) <= FILES
        assert len({name.rpartition("/")[0] for name in names}) == 1
        for name in names:
            text = (ROOT / "csrc" / name).read_text()
            assert name.startswith(("ops/", "python/")) and "/cuda/" not in name
            assert not TORCH.search(text) and not any(f"<{large}>" in text for large in LARGE)


def test_an_unchanged_unit_is_not_written_again(made, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    first = next(iter(sorted(tmp_path.iterdir())))
    first.write_text("")
    assert units(SOURCES, tmp_path) == made
    assert {path for path in tmp_path.iterdir() if path.stat().st_mtime != 1} == {first}
    assert included(first)
