"""The fixture that all tests of the ops share."""

import pytest

from dlkernels._ops import modes


@pytest.fixture(autouse=True)
def our_functions_in_transforms(request, monkeypatch):
    """The networks of these tests are small, and torch's operators would run: our Functions are to be tested.

    Tests with the mark ``measured`` get the choice as it was measured.
    """
    if request.node.get_closest_marker("measured") is None:
        monkeypatch.setattr(modes, "MOST_DERIVATIVES", 99)
        monkeypatch.setattr(modes, "LEAST_MULTIPLICATIONS", 0)
        monkeypatch.setattr(modes, "LEAST_ROWS", 0)
