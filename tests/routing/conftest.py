"""The tables of a process under test."""

import pytest

from dlkernels import routing


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder, from which this process takes its tables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(routing, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(routing.VARIABLE)
    yield routing.cache_folder()
    routing.use(())
