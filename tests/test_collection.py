"""Whatever is written in tests/ runs: pytest leaves out folders by their names."""

from fnmatch import fnmatch
from types import SimpleNamespace

from tests import conftest
from tests.support.paths import ROOT


def test_no_folder_of_tests_is_left_out(pytestconfig):
    left_out = pytestconfig.getini("norecursedirs")
    folders = {part for file in (ROOT / "tests").rglob("test_*.py") for part in file.relative_to(ROOT).parts[:-1]}
    assert "build" in folders  # which pytest's own list has
    assert not [name for name in folders if any(fnmatch(name, pattern) for pattern in left_out)]


def test_the_longest_tests_come_first():
    def item(name, *marks):
        return SimpleNamespace(name=name, get_closest_marker={mark: mark for mark in marks}.get)

    items = [item("a"), item("b", "cuda"), item("c", "slow"), item("d"), item("e", "first", "cuda")]
    conftest.pytest_collection_modifyitems(items)
    assert [each.name for each in items] == ["c", "e", "a", "b", "d"]
