"""Whatever is written in tests/ runs: pytest leaves out folders by their names."""

from fnmatch import fnmatch

from tests.support.paths import ROOT


def test_no_folder_of_tests_is_left_out(pytestconfig):
    left_out = pytestconfig.getini("norecursedirs")
    folders = {part for file in (ROOT / "tests").rglob("test_*.py") for part in file.relative_to(ROOT).parts[:-1]}
    assert "build" in folders  # which pytest's own list has
    assert not [name for name in folders if any(fnmatch(name, pattern) for pattern in left_out)]
