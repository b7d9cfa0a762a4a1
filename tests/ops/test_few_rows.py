"""Layers of 1 to 17 rows of x, whose products read weight where it lies on the CPU, with every number of rows.

The tests vary the ends of registers, of the rows that a register serves, and of the columns of a task.
"""

import pytest
import torch

from dlkernels.testing import Layer, assert_layer_no_worse
from tests.ops.test_forward_backward import DTYPES, layouts, make, ours

# K, N: dgrad takes 8 rows of weight at a time, and tasks of 64 to 512 columns; wgrad takes 4 rows of dweight at a time,
# 32 in a task, and two registers of each.
SIZES = [(64, 17), (65, 300), (100, 33), (513, 41), (1100, 70)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, 18))
def test_few_rows_over_shapes(rows, dtype):
    for k, n in SIZES:
        # Of so few numbers one order of sums or another is lucky: two rounding errors are granted, not one.
        assert_layer_no_worse(make(rows, k, n, dtype, "silu"), ours("silu"), granted=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 7, 12])
def test_few_rows_of_any_strides(rows, dtype):
    base = make(rows, 70, 90, dtype, "gelu")
    for x in layouts(base.x).values():
        for weight in layouts(base.weight).values():
            assert_layer_no_worse(Layer(x, weight, base.bias, base.g, "gelu"), ours("gelu"), granted=2)
    for g in layouts(base.g).values():
        assert_layer_no_worse(Layer(base.x, base.weight, base.bias, g, "relu"), ours("relu"), granted=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 8, 12])
def test_few_rows_have_the_same_bits_on_any_number_of_threads(rows, dtype):
    layer, before = make(rows, 700, 130, dtype, "relu"), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(layer.run(ours("relu")))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], t) for name, t in results[0].items())
