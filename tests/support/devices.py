"""Where a test's tensors lie."""

import pytest

ON_EVERY_DEVICE = pytest.mark.usefixtures("on_device")
