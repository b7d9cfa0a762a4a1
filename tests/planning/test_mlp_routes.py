"""How a chain of layers runs, one kernel or layer by layer: by the rules, and by rows of a route table."""

import ctypes
import random

import pytest

from tests.planning.library import (
    ATEN,
    BACKWARD,
    DTYPES,
    FORWARD,
    OTHER,
    OWN,
    chain,
    mlp_route,
    mlp_slices,
)

SMALL, WIDE = (8, 64, 64, 4), (63, 256, 256, 4)


@pytest.fixture
def table(planning):
    """A function that lets all chains take the routes of rows (direction, m, features, where, fused), each with its
    number as the reason. More fields are the number of the table, and the dtype."""

    def use(*rows):
        for place, (direction, m, features, where, fused, *more) in enumerate(rows, start=1):
            number, dtype = (*more, *(0, "float32")[len(more) :])
            planning.add_mlp_route(
                direction, DTYPES.index(dtype), *chain(m, features), where, fused, f"row {place}".encode(), number
            )
        planning.use_routes()

    yield use
    use()


def test_chains_of_few_rows(planning):
    def slices(features, *rows, **machine):
        return [mlp_slices(planning, m, features, **machine) for m in rows]

    assert slices(64, 0, 1, 127, 128, 256, 1000, 4096, 65536) == [0, 1, 1, 2, 4, 4, 4, 32], "8192 parameters"
    assert slices(128, 1, 127, 128, 256) == [0, 0, 2, 4], "32768: as many rows as features"
    assert slices(256, 255, 256, 1024) == [0, 2, 4], "slices of 128 rows"
    assert slices(64, 1, 256, dtype="float64") == [1, 4]


@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16", "amx"])
def test_chains_of_few_rows_on_avx512(planning, isa):
    def slices(features, *rows, **machine):
        return [mlp_slices(planning, m, features, isa=isa, **machine) for m in rows]

    assert slices(64, 1, 256, 1000) == [1, 4, 4], "8192 parameters"
    assert slices(128, 1, 255, 256) == [0, 0, 4], "32768: twice as many rows as features"
    assert slices(64, 1, 256, dtype="float64") == [1, 4], "64 KiB"
    assert slices(90, 1, 359, 360, dtype="float64") == [0, 0, 4], "four times as many rows as features"


def test_chains_of_few_rows_where_nobody_measured_them(planning):
    for machine in ({"dtype": "bfloat16"}, {"dtype": "float16"}, {"isa": "avx512_bf16", "dtype": "bfloat16"}):
        assert mlp_slices(planning, 1024, 64, **machine) == 0
        assert mlp_slices(planning, 2048, 64, **machine) == 2


def test_bf16_on_amx(planning):
    def slices(m, features, direction=FORWARD, **machine):
        return mlp_route(planning, m, features, direction, isa="amx", dtype="bfloat16", **machine)[0]

    for direction in (FORWARD, BACKWARD):
        assert [slices(m, SMALL, direction) for m in (1, 191, 192, 288, 384, 2048)] == [1, 1, 2, 3, 4, 2], "of 96 rows"
        assert [slices(65536, [n] * 6, direction) for n in (64, 128, 256)] == [32, 32, 12]
    assert [slices(m, [256] * 4) for m in (127, 128, 1024)] == [0, 1, 2], "half as many rows as features"
    assert [slices(m, [256] * 4, BACKWARD) for m in (128, 1024, 2048)] == [0, 0, 2], "many rows"
    assert slices(1024, [256] * 4, threads=3) == 0, "2²³ multiplications take as long as waking threads"
    assert slices(1024, SMALL, threads=8) == 4
    assert slices(65536, [64] * 6, forced=OWN) == 32
    assert mlp_slices(planning, 65536, 64, isa="avx512_bf16", dtype="bfloat16") == 32, "without AMX"


def test_more_threads_than_slices_take_layer_by_layer(planning):
    """Not where a slice has less than 2²⁰ multiplications: waking threads for every product takes as long."""
    assert [mlp_slices(planning, 1024, 256, threads=threads) for threads in (1, 4, 5)] == [4, 4, 0]
    assert [mlp_slices(planning, 256, 64, threads=threads) for threads in (4, 5, 64)] == [4, 4, 4]
    for rows, slices in ((2048, 2), (3072, 3), (4096, 4)):  # many rows: the same on any number of threads
        assert {mlp_slices(planning, rows, 256, threads=threads) for threads in (1, 2, 4, 64)} == {slices}


# ---- rows of a table -------------------------------------------------------------------------------------------------


def test_each_direction_has_its_own_row(planning, table):
    assert mlp_route(planning, 256, SMALL)[0] == mlp_route(planning, 256, SMALL, BACKWARD)[0] == 4
    table((BACKWARD, 256, SMALL, 0, False))
    assert mlp_route(planning, 256, SMALL)[0] == 4
    assert mlp_route(planning, 256, SMALL, BACKWARD) == (0, "row 1")
    table((FORWARD, 256, SMALL, 0, False), (BACKWARD, 256, SMALL, 0, True))
    assert mlp_route(planning, 256, SMALL) == (0, "row 1")
    assert mlp_route(planning, 256, SMALL, BACKWARD) == (4, "row 2")


def test_a_row_takes_the_kernel_where_the_rule_does_not(planning, table):
    """In as many slices as the rule would cut the rows in, if the kernel were worth it; in one at least."""
    for m, features, slices, machine in (
        (32, WIDE, 1, {}),
        (1024, WIDE, 4, {"threads": 64}),
        (200, (8, 128, 128, 128), 3, {"isa": "avx512"}),
        (64, [256] * 4, 1, {"isa": "amx", "dtype": "bfloat16"}),
        (1, SMALL, 1, {"dtype": "bfloat16"}),
        (3000, (192, 192, 192), 2, {"dtype": "bfloat16"}),
        (256, SMALL, 4, {"isa": "portable"}),
        (256, SMALL, 4, {"maker": OTHER}),
    ):
        table()
        assert mlp_route(planning, m, features, **machine)[0] == 0
        table((FORWARD, m, features, 0, True, 0, machine.get("dtype", "float32")))
        assert mlp_route(planning, m, features, **machine) == (slices, "row 1")


def test_a_row_says_layer_by_layer_for_many_rows_too(planning, table):
    table((FORWARD, 65536, [64] * 6, 0, False))
    assert mlp_route(planning, 65536, [64] * 6) == (0, "row 1")
    assert mlp_route(planning, 65536, [64] * 6, BACKWARD)[0] == 32


def test_a_row_does_not_overrule_the_limits_of_the_kernels(planning, table):
    too_wide, too_long, empty = (257, 64, 64), [16] * 18, (8, 0, 4)
    table(*((FORWARD, 256, features, 0, True) for features in (too_wide, too_long, (8, 4))))
    for features in (too_wide, too_long, empty, (8, 4)):
        assert mlp_route(planning, 256, features)[0] == 0
    assert mlp_route(planning, 256, too_wide)[1] == "wider layers than the fused MLP kernels take"
    assert mlp_route(planning, 0, SMALL)[0] == 0


def test_a_row_does_not_overrule_an_order(planning, table):
    table((FORWARD, 256, SMALL, 0, True))
    assert mlp_route(planning, 256, SMALL, forced=ATEN) == (0, "DLKERNELS_CPU_GEMM=aten")
    table((FORWARD, 256, SMALL, 0, False), (FORWARD, 256, SMALL, 0, False, 0, "bfloat16"))
    assert mlp_route(planning, 256, SMALL, forced=OWN)[0] == 4
    assert mlp_route(planning, 256, SMALL, bf16_products=True)[0] == 4, "no row was measured so"
    assert mlp_route(planning, 3000, SMALL, bf16_products=True, dtype="bfloat16")[0] == 2
    assert mlp_route(planning, 256, SMALL, bf16_products=True, dtype="bfloat16") == (0, "row 2")


def test_a_row_is_for_its_very_features_and_its_class_of_rows(planning, table):
    table((FORWARD, 256, SMALL, 0, False))
    for m in (256, 300, 511):
        assert mlp_route(planning, m, SMALL)[0] == 0
    for m, features in ((255, SMALL), (512, SMALL), (256, (9, 64, 64, 4)), (256, (8, 64, 4)), (256, (8, 64, 64, 5))):
        assert mlp_route(planning, m, features)[0] > 0
    assert mlp_route(planning, 256, SMALL, dtype="float64")[0] > 0


def expected(rows, asked, threads):
    """The number of the row that counts, from 1; 0 for none: of the nearest rows of the class, then of fewer rows, then
    of the first table, then for this number of threads."""
    direction, m, features, dtype = asked
    found = [
        (abs(row[1] - m), row[1], row[5], row[3] == 0, place)
        for place, row in enumerate(rows, start=1)
        if row[0] == direction and tuple(row[2]) == tuple(features) and row[6] == dtype
        and row[3] in (0, threads) and row[1].bit_length() == m.bit_length()
    ]  # fmt: skip
    return min(found)[-1] if found else 0


@pytest.mark.parametrize("seed", range(20))
def test_the_row_that_counts_is_the_rule_s(planning, table, seed):
    draw = random.Random(seed)
    chains = [(8, 64, 4), (8, 64, 64, 4), (64, 8, 4), (8, 4, 64)]
    sizes = [1, 2, 3, 31, 32, 33, 47, 48, 49, 63, 64, 100]

    def drawn():
        return draw.choice((FORWARD, BACKWARD)), draw.choice(sizes), draw.choice(chains)

    rows = {}
    for _ in range(draw.choice((1, 10, 100, 400))):
        direction, m, features = drawn()
        where, number, dtype = draw.choice((0, 1, 2, 4)), draw.choice((0, 1, 2)), draw.choice(("float32", "float64"))
        rows[direction, m, features, where, number, dtype] = draw.choice((True, False))
    listed = [
        (direction, m, features, where, fused, number, dtype)
        for (direction, m, features, where, number, dtype), fused in rows.items()
    ]
    table(*listed)
    counted = 0
    for _ in range(500):
        direction, m, features = drawn()
        dtype, threads = draw.choice(("float32", "float64", "bfloat16")), draw.choice((1, 2, 3))
        got = planning.found_mlp(direction, DTYPES.index(dtype), *chain(m, features), threads).decode()
        want = expected(listed, (direction, m, features, dtype), threads)
        assert got == (f"row {want}" if want else "")
        counted += bool(want)
    assert counted or len(listed) == 1


def test_rows_of_layers_and_of_chains_do_not_meet(planning, table):
    planning.add_route(0, DTYPES.index("float32"), *map(ctypes.c_int64, (256, 64, 8)), 0, b"aten", b"a layer", 0)
    table((FORWARD, 256, SMALL, 0, False))
    assert mlp_route(planning, 256, SMALL) == (0, "row 1")
    path = planning.found_route(0, DTYPES.index("float32"), *map(ctypes.c_int64, (256, 64, 8)), 2)
    assert path == b"aten"


# ---- CUDA ------------------------------------------------------------------------------------------------------------


def cuda_route(planning, m, features, direction=FORWARD, *, path="", arch=90, tf32=False, slices=7, dtype="float32"):
    answer = planning.cuda_mlp(path.encode(), arch, tf32, slices, direction, DTYPES.index(dtype), *chain(m, features))
    slices, why = answer.decode().split(maxsplit=1)
    return int(slices), why


def test_rows_for_a_gpu(planning, table):
    assert cuda_route(planning, 256, SMALL) == (7, "narrow layers: their weights fit in shared memory together")
    table((FORWARD, 256, SMALL, 90, False), (BACKWARD, 256, SMALL, 90, True))
    assert cuda_route(planning, 256, SMALL) == (0, "row 1")
    assert cuda_route(planning, 256, SMALL, BACKWARD) == (7, "row 2")
    assert cuda_route(planning, 256, SMALL, arch=80)[0] == 7
    assert cuda_route(planning, 256, SMALL, tf32=True)[0] == 7, "no row was measured so"
    assert cuda_route(planning, 256, SMALL, path="mma")[0] == 7, "DLKERNELS_CUDA_GEMM leaves the tables unasked"
    table((FORWARD, 256, SMALL, 90, True))
    assert cuda_route(planning, 256, SMALL, slices=0)[0] == 0, "the kernels do not take it"
