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
    def item(path, name, *marks):
        return SimpleNamespace(path=path, name=name, get_closest_marker={mark: mark for mark in marks}.get)

    items = [item("a", "1"), item("a", "2", "cuda"), item("b", "3"), item("b", "4", "slow"), item("c", "5", "first")]
    conftest.pytest_collection_modifyitems(items)
    assert [each.name for each in items] == ["3", "4", "5", "1", "2"], "a file stays whole"
