"""Plans of layers: pure functions, compiled here without a kernel and without torch.

Machines are made up: a kernel set by its name, a GPU by what it answers. A step reads as
"kind path outputs where-dz-is-made layer-below slices".
"""

import ctypes
import itertools

import pytest

from dlkernels._ops.activations import ACTIVATIONS
from tests.planning import gpu_plans
from tests.planning.library import AMD, ATEN, DBIAS, DTYPES, DWEIGHT, DX, INTEL, NO, OTHER, OWN, mlp_slices
from tests.support.paths import ROOT

ALL = DX | DWEIGHT | DBIAS
SAVED, BELOW, DBIAS_BELOW = 1, 2, 4
BIG, FEW_ROWS, FEW_COLUMNS = (1000, 300, 200), (4, 300, 200), (5000, 4, 64)


def sizes(shape):
    return list(map(ctypes.c_int64, shape))


def act_code(name):
    return ACTIVATIONS[name].code


def cpu_backward(
    planning, shape, dtype="float32", act="relu", *, isa="avx512", pairs=False, forced=NO, bf16_products=False, casts=0,
    wants=ALL, flags=SAVED, x_stride=1, weight_stride=1,
):  # fmt: skip
    m, n, k = sizes(shape)
    text = planning.cpu_backward(
        isa.encode(), pairs, forced, bf16_products, m, n, k, DTYPES.index(dtype), act_code(act), casts, wants, flags,
        ctypes.c_int64(x_stride), ctypes.c_int64(weight_stride),
    )  # fmt: skip
    return text.decode().split("|") if text else []


def cuda_backward(planning, shape, dtype="bfloat16", *, path="", arch=90, narrow=False, wants=ALL, flags=SAVED):
    m, n, k = sizes(shape)
    text = planning.cuda_backward(
        path.encode(), arch, narrow, m, n, k, DTYPES.index(dtype), act_code("relu"), wants, flags
    )
    return text.decode().split("|") if text else []


def test_our_products_make_dz_as_they_load_it(planning):
    assert cpu_backward(planning, BIG) == ["dgrad packed dx load - 1", "wgrad packed dweight+dbias load - 1"]
    assert cpu_backward(planning, BIG, flags=0) == ["dgrad packed dx - - 1", "wgrad packed dweight+dbias - - 1"]


def test_a_tall_batch_is_cut_in_slices(planning):
    *_, wgrad = cpu_backward(planning, (65536, 65, 64))
    assert wgrad == "wgrad packed dweight+dbias load - 16"


def test_a_library_reads_dz_from_memory(planning):
    steps = cpu_backward(planning, BIG, forced=ATEN)
    assert steps == ["gradient_pass elementwise dz+dbias load - 1", "dgrad aten dx - - 1", "wgrad aten dweight - - 1"]
    # without an activation grad_y is dz, and only dbias needs a pass
    plain = cpu_backward(planning, BIG, forced=ATEN, flags=0)
    assert plain == ["gradient_pass elementwise dbias load - 1", "dgrad aten dx - - 1", "wgrad aten dweight - - 1"]


def test_beside_tiles_a_pass_makes_dz_of_a_long_activation(planning):
    plan = ["gradient_pass elementwise dz+dbias load - 1", "dgrad packed dx - - 1", "wgrad packed dweight - - 1"]
    for act in ("gelu", "gelu_tanh", "silu"):
        assert cpu_backward(planning, BIG, "bfloat16", act, isa="amx") == plan
    in_load = ["dgrad packed dx load - 1", "wgrad packed dweight+dbias load - 1"]
    assert cpu_backward(planning, BIG, "bfloat16", "tanh", isa="amx") == in_load
    assert cpu_backward(planning, BIG, "float32", "gelu", isa="amx") == in_load
    assert cpu_backward(planning, BIG, "bfloat16", "gelu", isa="avx512_bf16") == in_load
    assert cpu_backward(planning, (300, 200, 200), "bfloat16", "gelu", isa="amx") == in_load  # dz is small
    alone = cpu_backward(planning, BIG, "bfloat16", "gelu", isa="amx", wants=DWEIGHT | DBIAS)
    assert alone == in_load[1:]


def test_narrow_products_in_float32_go_to_mkl_on_intel(planning):
    """``made``: the paths of forward, of dgrad and of wgrad."""

    def made(shape, act="relu", maker=INTEL, isa="avx512", dtype="float32", threads=4):
        m, n, k = sizes(shape)
        kind = DTYPES.index(dtype), act_code(act)
        return [planning.cpu_route(isa.encode(), maker, threads, op, m, n, k, *kind).decode() for op in range(3)]

    assert made((128, 63, 128)) == ["aten", "packed", "packed"] and made((128, 64, 128))[0] == "packed"
    assert made((128, 63, 127))[0] == made((127, 32, 128))[0] == "packed"
    assert made((127, 31, 128))[0] == "aten" and made((127, 31, 128), threads=1)[0] == "packed"
    assert made((300, 200, 1)) == ["packed", "aten", "aten"]
    assert made((300, 200, 63)) == ["packed", "packed", "packed"]
    assert made((300, 200, 63), "none") == ["packed", "aten", "aten"]
    assert made((4000, 200, 63), "none") == ["packed", "aten", "packed"]
    assert made((4000, 200, 63), "none", threads=1) == ["packed", "aten", "aten"]
    assert made((300, 200, 64), "none") == ["packed", "packed", "packed"]
    for other in ({"maker": AMD}, {"isa": "avx2", "maker": AMD}, {"dtype": "bfloat16"}, {"dtype": "float64"}):
        assert "aten" not in made((300, 200, 1), "none", **other)


@pytest.mark.parametrize("shape", [BIG, FEW_ROWS, FEW_COLUMNS, (0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("forced", [NO, OWN, ATEN])
def test_every_wanted_gradient_is_made_once_and_no_other(planning, shape, forced):
    """On CPU and CUDA, for every subset. Without outputs or in_features a layer has gradients without elements."""
    m, n, k = shape
    for wants in range(8):
        wanted = {name for bit, name in ((1, "dx"), (2, "dweight"), (4, "dbias")) if wants & bit}
        bits = (wants & 1) * DX + (wants >> 1 & 1) * DWEIGHT + (wants >> 2 & 1) * DBIAS
        expected = [] if m * n == 0 else sorted(wanted if k else wanted & {"dbias"})
        plans = [
            cpu_backward(planning, shape, dtype, forced=forced, wants=bits, flags=flags, pairs=pairs)
            for dtype, flags, pairs in itertools.product(("float32", "bfloat16"), (0, SAVED), (False, True))
        ]
        plans += [
            cuda_backward(planning, shape, path=path, wants=bits, flags=flags, narrow=narrow)
            for path, flags, narrow in itertools.product(("", "mma", "cublas"), (0, SAVED), (False, True))
        ]
        plans += [
            cuda_backward(planning, shape, "float32", path=path, wants=bits, flags=flags)
            for path, flags in itertools.product(("", "simt", "cublas"), (0, SAVED))
        ]
        for steps in plans:
            made = [name for step in steps for name in step.split()[2].split("+") if name != "dz"]
            assert sorted(made) == expected, steps


def test_dz_is_made_before_it_is_read(planning):
    paths = ("float32", "simt"), *(("bfloat16", path) for path in ("", "mma", "hopper", "cublas"))
    for (dtype, path), wants in itertools.product(paths, range(1, 8)):
        bits = (wants & 1) * DX + (wants >> 1 & 1) * DWEIGHT + (wants >> 2 & 1) * DBIAS
        made = False
        for step in cuda_backward(planning, (4096, 512, 512), dtype, path=path, wants=bits):
            kind, _, outputs, loads, *_ = step.split()
            assert made or loads == "load", step
            made = made or (kind == "gradient_pass" and "dz" in outputs.split("+"))


def test_few_columns_are_one_pass(planning):
    assert cpu_backward(planning, FEW_COLUMNS) == ["backward few_columns dx+dweight+dbias load - 32"]
    steps = cpu_backward(planning, FEW_COLUMNS, weight_stride=64)  # dgrad cannot read weight's rows
    assert steps == ["backward few_columns dweight+dbias load - 32", "dgrad packed dx load - 1"]


def test_few_rows_need_contiguous_weight_but_not_for_wgrad(planning):
    assert [step.split()[1] for step in cpu_backward(planning, FEW_ROWS)] == ["few_rows", "few_rows"]
    strided = cpu_backward(planning, FEW_ROWS, weight_stride=300, x_stride=4)
    assert [step.split()[1] for step in strided] == ["packed", "few_rows"]


def test_dbias_of_rounded_operands_has_a_pass_of_its_own(planning):
    steps = cpu_backward(planning, BIG, pairs=True, bf16_products=True)
    assert steps == [
        "gradient_pass elementwise dbias load - 1",
        "dgrad packed dx load - 1",
        "wgrad packed dweight load - 1",
    ]
    casts = cpu_backward(planning, BIG, "bfloat16", pairs=True, casts=1)
    assert casts == ["dgrad packed dx load - 1", "wgrad packed dweight+dbias load - 1"]


def test_the_layer_below(planning):
    """The packed dgrad applies its activation's gradient; other paths leave that to the layer itself."""
    assert cpu_backward(planning, BIG, flags=SAVED | BELOW)[0] == "dgrad packed dx load below 1"
    assert cpu_backward(planning, FEW_ROWS, flags=SAVED | BELOW)[0] == "dgrad few_rows dx load - 1"
    assert cpu_backward(planning, BIG, forced=ATEN, flags=SAVED | BELOW)[1] == "dgrad aten dx - - 1"
    flags = SAVED | BELOW | DBIAS_BELOW
    assert cuda_backward(planning, BIG, path="mma", flags=flags)[1] == "dgrad mma dx+dbias_below - below 1"
    assert cuda_backward(planning, BIG, "float32", path="simt", flags=flags)[0] == "dgrad simt dx load below 1"
    assert cuda_backward(planning, BIG, path="cublas", flags=flags)[1] == "dgrad cublas dx - - 1"


def test_cuda_ways_to_dz(planning):
    plain = cuda_backward(planning, BIG, "float32", path="simt")
    assert plain == ["dgrad simt dx load - 1", "wgrad simt dweight+dbias load - 1"]
    lone = cuda_backward(planning, BIG, path="mma", wants=DWEIGHT | DBIAS)
    assert lone == ["wgrad mma dweight+dbias load - 1"]
    both = cuda_backward(planning, BIG, path="mma")
    assert both == ["gradient_pass elementwise dz+dbias load - 1", "dgrad mma dx - - 1", "wgrad mma dweight - - 1"]
    narrow = cuda_backward(planning, (65536, 64, 64), narrow=True)
    assert narrow == ["backward fused_mlp dx+dweight+dbias load - 1"]


def test_forward_by_a_library_ends_in_a_pass(planning):
    def cpu(act, z, forced):
        m, n, k = sizes(BIG)
        return planning.cpu_forward(b"avx512", AMD, 0, forced, m, n, k, 1, act_code(act), z).decode().split("|")

    assert cpu("relu", 0, NO) == ["forward packed y - - 1"]
    assert cpu("gelu", 1, NO) == ["forward packed y+z - - 1"]
    assert cpu("relu", 0, ATEN) == ["forward aten y - - 1", "activation_pass elementwise y - - 1"]
    assert cpu("gelu", 1, ATEN) == ["forward aten z - - 1", "activation_pass elementwise y - - 1"]
    assert cpu("none", 0, ATEN) == ["forward aten y - - 1"]
    m, n, k = sizes(BIG)
    masked = planning.cuda_forward(b"cublas", 90, 0, m, n, k, 2, act_code("relu"), 0, 1).decode().split("|")
    assert masked == ["forward cublas y - - 1", "activation_pass elementwise y+mask - - 1"]
    masked = planning.cuda_forward(b"mma", 90, 0, m, n, k, 2, act_code("relu"), 0, 1).decode().split("|")
    assert masked == ["forward mma y+mask - - 1"]


@pytest.mark.parametrize("m", [1, 50, 2047, 2048, 2049, 100_000])
@pytest.mark.parametrize("given", [0, 1, 50])
def test_blocks_of_a_loss_cover_every_row_once(planning, m, given):
    rows, blocks, one = ctypes.c_int64(), ctypes.c_int64(), ctypes.c_int()
    for dtype in (2, 3):
        planning.loss_blocks(
            ctypes.c_int64(m), ctypes.c_int64(50_000), dtype, ctypes.c_int64(given),
            ctypes.byref(rows), ctypes.byref(blocks), ctypes.byref(one),
        )  # fmt: skip
        assert (blocks.value - 1) * rows.value < m <= blocks.value * rows.value
        assert rows.value <= (given or 2048)
        assert bool(one.value) == (blocks.value == 1 and dtype == 2)


# ---- route tables ----------------------------------------------------------------------------------------------------

FORWARD, DGRAD, WGRAD = range(3)  # the order of Op in csrc/kernels/params.h


@pytest.fixture
def table(planning):
    """A function that lets all plans take the routes of rows (op, dtype, shape, where, path, number of the table)."""

    def use(*rows):
        for op, dtype, shape, where, path, *number in rows:
            m, n, k = sizes(shape)
            planning.add_route(op, DTYPES.index(dtype), m, n, k, where, path.encode(), b"a row", *(number or [0]))
        planning.use_routes()

    yield use
    use()


def forward_path(planning, shape, dtype="float32", *, isa="avx512", maker=AMD, forced=NO):
    m, n, k = sizes(shape)
    text = planning.cpu_forward(isa.encode(), maker, 0, forced, m, n, k, DTYPES.index(dtype), act_code("none"), 0)
    return text.decode().split()[1]


def test_few_rows_by_the_rules(planning):
    """AVX-512 reads a weight of 1 MiB or more where it lies for up to 32 rows of float32, others for up to 16."""
    for isa, dtype, (n, k), most in (
        ("avx512", "float32", (512, 512), 32),
        ("avx512_bf16", "float32", (512, 512), 32),
        ("amx", "float32", (512, 512), 32),
        ("avx512", "float32", (511, 512), 16),
        ("avx512", "float64", (512, 512), 16),
        ("avx2", "float32", (512, 512), 16),
        ("avx512", "float32", (4096, 128), 8),
        ("avx512", "bfloat16", (64, 64), 32),
        ("avx2", "bfloat16", (64, 64), 8),
    ):
        assert forward_path(planning, (most, n, k), dtype, isa=isa) == "few_rows", (isa, dtype, n, k)
        assert forward_path(planning, (most + 1, n, k), dtype, isa=isa) == "packed", (isa, dtype, n, k)


def test_few_rows_of_backward_by_the_rules(planning):
    """Behind 4 rows a packed dgrad is faster on AVX-512; outer products write dweight of up to 12 rows in float32."""
    for isa, dtype, dgrad, wgrad in (
        ("avx512", "float32", 4, 12),
        ("amx", "float64", 4, 12),
        ("amx", "bfloat16", 4, 8),
        ("avx2", "float32", 8, 12),
        ("avx2", "float16", 8, 8),
    ):
        for rows in range(1, 20):
            steps = cpu_backward(planning, (rows, 300, 512), dtype, "none", isa=isa, flags=0)
            paths = {step.split()[0]: step.split()[1] for step in steps}
            few = {"dgrad": rows <= dgrad, "wgrad": rows <= wgrad}
            assert paths == {op: "few_rows" if taken else "packed" for op, taken in few.items()}, (isa, dtype, rows)


def test_tiles_of_amx_take_more_rows_where_they_read_x_from_l2(planning):
    def path(m, n, k):
        return forward_path(planning, (m, n, k), "bfloat16", isa="amx")

    assert [path(m, 255, 768) for m in (256, 257)] == ["few_rows", "packed"]
    assert [path(m, 256, 768) for m in (256, 257, 512, 513)] == ["few_rows", "few_rows", "few_rows", "packed"]
    assert [path(m, 1000, 1000) for m in (393, 394)] == ["few_rows", "packed"], "x of 393216 elements"
    assert [path(m, 2048, 2048) for m in (128, 256, 257)] == ["few_rows", "few_rows", "aten"], "a large weight"
    assert [path(m, 4096, 4096) for m in (128, 129)] == ["few_rows", "aten"]


def test_a_row_is_for_its_sizes_and_those_of_its_class(planning, table):
    table((FORWARD, "float32", (1000, 300, 200), 4, "aten"), (WGRAD, "float32", (1000, 300, 200), 0, "aten"))
    assert forward_path(planning, (1000, 300, 200)) == "aten"
    for shape in ((512, 256, 128), (1023, 511, 255)):
        assert forward_path(planning, shape) == "aten"
    for shape in ((511, 300, 200), (1024, 300, 200), (1000, 255, 200), (1000, 300, 256)):
        assert forward_path(planning, shape) == "packed"
    assert forward_path(planning, (1000, 300, 200), "float64") == "packed", "a row is for one dtype"
    backward = [step.split()[:2] for step in cpu_backward(planning, (1000, 300, 200))]
    assert backward == [["gradient_pass", "elementwise"], ["wgrad", "aten"], ["dgrad", "packed"]], "and for one product"


def test_a_row_is_for_its_number_of_threads(planning, table):
    """The machines of these tests have 4."""
    table((FORWARD, "float32", BIG, 2, "aten"))
    assert forward_path(planning, BIG) == "packed"
    table((FORWARD, "float32", BIG, 0, "aten"))
    assert forward_path(planning, BIG) == "aten"
    table((FORWARD, "float32", BIG, 0, "aten"), (FORWARD, "float32", BIG, 4, "packed"))
    assert forward_path(planning, BIG) == "packed", "the row for this number comes first"


def test_rows_of_one_class_that_differ(planning, table):
    shapes = [(4, 512, 512), (5, 600, 600)]
    table(*((FORWARD, "float32", shape, 4, path) for shape, path in zip(shapes, ("packed", "aten"), strict=True)))
    assert [forward_path(planning, shape) for shape in shapes] == ["packed", "aten"]
    assert forward_path(planning, (6, 700, 700)) == "aten", "the library's, where one row takes it"
    table(*((FORWARD, "float32", shape, 4, path) for shape, path in zip(shapes, ("packed", "few_rows"), strict=True)))
    assert forward_path(planning, (6, 700, 700)) == "few_rows", "the rules decide"
    table((FORWARD, "float32", shapes[0], 4, "packed"))
    assert forward_path(planning, (6, 700, 700)) == "packed"


def expected_route(rows, shape, threads):
    """The rule: a row of these sizes comes before a class; among equals the first table's come first, and of one table
    the rows for this number of threads before those for any."""
    places = [(where, number) for number in (0, 1) for where in (threads, 0)]
    for where, number in places:
        for row in rows:
            if row[2:4] == (shape, where) and row[5] == number:
                return row[4]
    for where, number in places:
        of_class = {row[4] for row in rows if row[3] == where and row[5] == number}
        if "aten" in of_class or len(of_class) == 1:
            return "aten" if "aten" in of_class else of_class.pop()
    return ""


def test_the_order_of_rows_is_the_rule_s(planning, table):
    """Every set of up to three rows of one class, of two tables, for 4 threads, for 2 and for any; in both orders."""
    shapes, paths = [(32, 512, 512), (33, 600, 600)], ("packed", "few_rows", "aten")
    every = [
        (FORWARD, "float32", shape, where, path, number)
        for number, shape, where, path in itertools.product((0, 1), shapes, (4, 2, 0), paths)
    ]
    tried = 0
    for rows in itertools.chain.from_iterable(itertools.combinations(every, count) for count in range(4)):
        if len({(row[2], row[3], row[5]) for row in rows}) < len(rows):
            continue  # a table has one row for a product
        for ordered in (rows, rows[::-1]):
            table(*ordered)
            for shape in shapes:
                got = planning.found_route(FORWARD, DTYPES.index("float32"), *map(ctypes.c_int64, shape), 4).decode()
                assert got == expected_route(rows, shape, 4), (rows, shape)
                tried += 1
    assert tried > 20000


def test_a_row_of_another_size_does_not_override_a_row_of_these_sizes(planning, table):
    """The shipped table measured the layer, for any number of threads, and the user tuned another one of its class."""
    table((FORWARD, "float32", (256, 256, 784), 0, "aten", 1), (FORWARD, "float32", (500, 500, 1000), 4, "packed", 0))
    assert forward_path(planning, (256, 256, 784)) == "aten"
    assert forward_path(planning, (500, 500, 1000)) == "packed"


def test_a_path_that_the_kernels_do_not_have_is_not_taken(planning, table):
    """The rows are of sizes that have the path, and the layers are others of their class."""
    table((FORWARD, "float32", (32, 512, 512), 4, "few_rows"), (DGRAD, "float32", (8, 64, 512), 4, "few_rows"))
    assert forward_path(planning, (32, 512, 512)) == "few_rows"
    assert forward_path(planning, (33, 512, 512)) == "packed"
    assert cpu_backward(planning, (8, 64, 512))[0].split()[1] == "few_rows"
    assert cpu_backward(planning, (9, 64, 512))[0].split()[1] == "packed"
    assert cpu_backward(planning, (8, 64, 512), weight_stride=64)[0].split()[1] == "packed"
    table((DGRAD, "float32", (5000, 16, 64), 4, "few_columns"), (DGRAD, "float32", (5000, 4, 64), 4, "simt"))
    assert cpu_backward(planning, (5000, 17, 64))[0].split()[1] == "packed"
    steps = cpu_backward(planning, (5000, 16, 64), weight_stride=64)
    assert [step.split()[:2] for step in steps] == [["backward", "few_columns"], ["dgrad", "packed"]]
    assert cpu_backward(planning, FEW_COLUMNS)[0].split()[1] == "few_columns", "a path of CUDA"
    table((FORWARD, "bfloat16", (256, 512, 16384), 4, "few_rows"), (FORWARD, "bfloat16", (256, 64, 64), 4, "few_rows"))
    assert forward_path(planning, (256, 64, 64), "bfloat16", isa="amx") == "few_rows"
    assert forward_path(planning, (511, 64, 64), "bfloat16", isa="amx") == "few_rows", "of its class"
    assert forward_path(planning, (512, 64, 64), "bfloat16", isa="amx") == "packed"
    assert forward_path(planning, (257, 512, 16384), "bfloat16", isa="amx") == "aten", "the rules' choice"
    assert forward_path(planning, (256, 64, 64), "bfloat16") == "packed", "tiles are AMX's"


def test_a_table_does_not_overrule_an_order(planning, table):
    table((FORWARD, "float32", BIG, 4, "aten"), (DGRAD, "float32", BIG, 4, "aten"), (DGRAD, "bfloat16", BIG, 4, "aten"))
    assert forward_path(planning, BIG, forced=OWN) == "packed"
    table((FORWARD, "float32", BIG, 4, "packed"), (DGRAD, "float32", BIG, 4, "aten"))
    assert forward_path(planning, BIG, forced=ATEN) == "aten"
    in_bf16 = cpu_backward(planning, BIG, pairs=True, bf16_products=True)
    assert in_bf16[1].split()[:2] == ["dgrad", "packed"], "no row was measured with float32 products in bfloat16"
    autocast = cpu_backward(planning, BIG, "bfloat16", pairs=True, casts=1)
    assert autocast[0].split()[:2] == ["dgrad", "packed"], "nor under autocast"
    assert cpu_backward(planning, (0, 3, 4)) == []


def test_an_instruction_set_without_measurements_has_torch_s_products(planning):
    for shape in (BIG, FEW_ROWS, FEW_COLUMNS):
        assert forward_path(planning, shape, isa="portable") == "aten"
    assert forward_path(planning, BIG, isa="portable", forced=OWN) == "packed"

    def slices(isa, forced=NO, capped=0):
        return mlp_slices(planning, 4096, 64, isa, forced=forced, capped=capped)

    assert slices("portable") == 0, "nor fused MLPs"
    assert slices("avx2") == slices("portable", OWN) == slices("portable", capped=1) == 4


@pytest.mark.parametrize(
    ("isa", "maker", "measured"),
    [
        ("avx2", AMD, True),
        ("avx2", INTEL, False),
        ("avx2", OTHER, False),
        ("avx512", INTEL, True),
        ("avx512_bf16", AMD, True),
        ("avx512", OTHER, False),
    ],
)
def test_a_maker_whose_processors_nobody_measured_has_torch_s_products(planning, table, isa, maker, measured):
    """MKL has other code for each maker's processors; in 16 bits torch's code depends on the instruction set alone."""
    ours = "packed" if measured else "aten"
    assert forward_path(planning, BIG, isa=isa, maker=maker) == ours
    assert forward_path(planning, BIG, "float64", isa=isa, maker=maker) == ours
    assert (mlp_slices(planning, 4096, 64, isa, maker=maker) > 0) == measured
    assert forward_path(planning, BIG, "bfloat16", isa=isa, maker=maker) == "packed"
    assert mlp_slices(planning, 4096, 64, isa, "bfloat16", maker=maker) > 0
    assert forward_path(planning, BIG, isa=isa, maker=maker, forced=OWN) == "packed"
    assert mlp_slices(planning, 4096, 64, isa, maker=maker, capped=1) > 0
    table((FORWARD, "float32", BIG, 4, "packed"))
    assert forward_path(planning, BIG, isa=isa, maker=maker) == "packed", "a measurement"


def test_rows_for_a_gpu(planning, table):
    table((DGRAD, "bfloat16", (4096, 512, 512), 90, "mma"), (WGRAD, "bfloat16", (4096, 512, 512), 90, "hopper"))
    steps = [step.split()[:2] for step in cuda_backward(planning, (4096, 512, 512))]
    assert steps == [["gradient_pass", "elementwise"], ["dgrad", "mma"], ["wgrad", "hopper"]]
    assert cuda_backward(planning, (4096, 512, 512), arch=80)[1].split()[:2] == ["dgrad", "cublas"]
    assert cuda_backward(planning, (4096, 512, 512), path="mma")[2].split()[:2] == ["wgrad", "mma"]
    table((DGRAD, "bfloat16", (4096, 512, 512), 90, "fused_mlp"))
    assert cuda_backward(planning, (4096, 512, 512))[1].split()[:2] == ["dgrad", "cublas"], (
        "only where it takes the layer"
    )


# ---- gated layers ----------------------------------------------------------------------------------------------------

HALVES = 1 << 20, (1 << 20) + 4 * 300 * 200  # the addresses of the halves of one float32 [600, 200]


def glu_forward(planning, shape, dtype="float32", *, isa="avx512", forced=NO, z=True, packed=False):
    text = planning.glu_forward(isa.encode(), forced, *sizes(shape), DTYPES.index(dtype), z, packed)
    fused, gate, up, both, _, makes, _ = text.decode().split(";")
    return bool(fused), [*(both.split("|") if both else (*gate.split("|"), *up.split("|"))), makes]


def glu_backward(
    planning, shape, dtype="float32", *, isa="avx512", forced=NO, needs=31, weights=(1 << 20, 1 << 21), together=False
):
    text = planning.glu_backward(
        isa.encode(), forced, *sizes(shape), DTYPES.index(dtype), needs, *map(ctypes.c_int64, weights), together
    )
    _, gate, up, _, dgrad, makes, dx_sum = text.decode().split(";")
    return [part.split("|") if part else [] for part in (gate, up, dgrad)], makes, dx_sum


def test_a_gated_forward_is_one_step_where_it_is_packed(planning):
    assert glu_forward(planning, BIG) == (True, ["forward packed y+z+z_up - - 1", "", ""])
    assert glu_forward(planning, BIG, z=False) == (True, ["forward packed y - - 1", "", ""])
    by_halves = (False, ["forward aten y - - 1", "forward aten y - - 1", "y"])
    assert glu_forward(planning, BIG, forced=ATEN) == by_halves
    assert glu_forward(planning, FEW_ROWS)[1][0] == "forward few_rows y - - 1"
    of_few_rows = glu_forward(planning, (64, 512, 256))  # and a large weight
    assert of_few_rows == (False, ["forward packed y - - 1", "forward packed y - - 1", "y"])
    assert all(glu_forward(planning, shape)[0] for shape in ((129, 512, 256), (64, 511, 256)))
    assert glu_forward(planning, (64, 512, 256), "float64")[0] and glu_forward(planning, (64, 512, 256), isa="avx2")[0]
    fused, steps = glu_forward(planning, BIG, isa="")
    assert not fused and steps[-1] == "y" and len(steps) == 3


def test_a_forward_of_packed_weights_is_one_product(planning):
    assert glu_forward(planning, BIG, packed=True) == glu_forward(planning, BIG)  # one step already
    assert glu_forward(planning, BIG, packed=True, forced=ATEN) == (False, ["forward aten y - - 1", "y"])
    assert glu_forward(planning, FEW_ROWS, packed=True) == (False, ["forward few_rows y - - 1", "y"])
    assert glu_forward(planning, (64, 512, 256), packed=True) == (False, ["forward packed y - - 1", "y"])
    fused, steps = glu_forward(planning, BIG, packed=True, isa="")
    assert not fused and steps[-1] == "y" and len(steps) == 2


def test_a_gated_backward_makes_both_dz_in_one_pass(planning):
    (gate, up, dgrad), makes, dx_sum = glu_backward(planning, BIG)
    assert gate == ["dgrad packed dx - - 1", "wgrad packed dweight - - 1"] == up and not dgrad
    assert makes == "dz+dbias+dz_up+dbias_up" and dx_sum == "rounded"
    assert glu_backward(planning, BIG, "bfloat16")[2] == "unrounded"
    assert glu_backward(planning, BIG, "bfloat16", forced=ATEN)[2] == "rounded"
    assert glu_backward(planning, FEW_ROWS)[2] == "apart"  # its kernels add to nothing


def test_large_gated_layers_on_a_cpu_with_amx_are_left_to_torchs_products(planning):
    large, small = (1024, 1376, 512), (1024, 320, 512)
    by_halves = (False, ["forward aten y - - 1", "forward aten y - - 1", "y"])
    for dtype in ("float32", "bfloat16"):
        assert glu_forward(planning, large, dtype, isa="amx") == by_halves
        (gate, up, _), _, _ = glu_backward(planning, large, dtype, isa="amx")
        assert gate == ["dgrad aten dx - - 1", "wgrad aten dweight - - 1"] == up
        for shape, isa, forced in ((small, "amx", NO), (large, "avx512_bf16", NO), (large, "amx", OWN)):
            assert glu_forward(planning, shape, dtype, isa=isa, forced=forced)[0]
    assert glu_forward(planning, large, "bfloat16", isa="amx", z=False)[0]  # forward alone is faster as one step
    assert not glu_forward(planning, large, isa="amx", z=False)[0]
    planning.add_route(FORWARD, DTYPES.index("float32"), *sizes(large), 0, b"packed", b"a row of a table", 0)
    planning.use_routes()
    try:
        assert glu_forward(planning, large, isa="amx")[0]
    finally:
        planning.use_routes()


@pytest.mark.parametrize("isa", ["avx512", ""])
def test_dx_of_halves_of_one_weight_is_one_product(planning, isa):
    for weights in (HALVES, HALVES[::-1]):
        (gate, up, dgrad), makes, _ = glu_backward(planning, BIG, isa=isa, weights=weights, together=True)
        assert [step.split()[0] for step in (*gate, *up, *dgrad)] == ["wgrad", "wgrad", "dgrad"]
        assert makes == "dz+dbias+dz_up+dbias_up"
    (*_, dgrad), _, _ = glu_backward(planning, BIG, isa=isa, weights=HALVES, together=False)
    assert not dgrad  # two tensors that lie behind each other by chance
    (*_, dgrad), _, _ = glu_backward(planning, BIG, isa=isa, weights=(1 << 20, (1 << 20) + 4), together=True)
    assert not dgrad


@pytest.mark.parametrize("shape", [BIG, FEW_ROWS, FEW_COLUMNS, (0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("isa", ["avx512", ""])
def test_every_gradient_of_a_gated_layer_is_made_once(planning, shape, isa):
    names = ("dx", "dweight", "dbias", "dweight_up", "dbias_up")
    m, n, k = shape
    for needs in range(32):
        wanted = {name for bit, name in enumerate(names) if needs >> bit & 1}
        if m * n == 0:
            wanted = set()
        if k == 0:
            wanted &= {"dbias", "dbias_up"}
        (gate, up, dgrad), makes, _ = glu_backward(planning, shape, isa=isa, needs=needs)
        assert not dgrad
        by_gate, by_up = ([name for step in half for name in step.split()[2].split("+")] for half in (gate, up))
        assert by_gate.count("dx") == by_up.count("dx") == ("dx" in wanted)  # the halves of one sum
        made = [name for name in makes.split("+") if name.startswith("dbias")]
        made += by_gate + [f"{name}_up" if name != "dx" else name for name in by_up]
        assert set(made) == wanted and len(made) == len(wanted) + ("dx" in wanted)


def test_the_guide_shows_the_plans_of_a_gpu(planning):
    """As ``python -m tests.planning.gpu_plans`` prints them."""
    assert gpu_plans.table(planning) in (ROOT / "docs/guide/routes.md").read_text()
