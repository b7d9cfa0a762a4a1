"""The device of a test's tensors."""

import pytest

ON_EVERY_DEVICE = pytest.mark.usefixtures("on_device")
