"""The axes of the curves."""

import pytest

pytest.importorskip("matplotlib")

from dlkernels.trainer.plots import log_if_wide, new_figure


@pytest.mark.parametrize(
    ("values", "scale"),
    [((2.28, 1.57), "linear"), ((2.3, 0.02), "log"), ((3.0, 0.0), "linear"), ((1.0, 1.0), "linear")],
)
def test_an_axis_is_logarithmic_over_a_factor_of_ten(values, scale):
    _, (panel,) = new_figure(1)
    panel.plot(range(len(values)), values)
    log_if_wide(panel)
    assert panel.get_yscale() == scale
