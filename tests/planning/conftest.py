"""Planning, compiled once for the tests of this folder."""

import pytest

from tests.planning.library import compiled


@pytest.fixture(scope="session")
def planning(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("planning") / "planning.so")
