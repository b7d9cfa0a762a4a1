"""csrc/kernels/cuda compiled for the host, and what tests need to call it: guarded memory, pointers, bounds.

Index arithmetic, masks, epilogues, edges, barriers and determinism are those of the real code. Memory coalescing,
occupancy and speed need a GPU.
"""

import ctypes
import functools
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.paths import CSRC
from tests.support.shared import once

HERE = Path(__file__).parent
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]  # the order of DType in csrc/kernels/params.h
HOPPER = HERE.parent / "hopper"  # headers in front of ours, of which they are an extension
# a fortified longjmp refuses to switch stacks
COMPILER = f"{os.environ.get('CXX', 'g++')} -std=c++17 -O2 -march=native -fPIC -U_FORTIFY_SOURCE"
RACES = "DLKERNELS_TEST_RACES"  # in the environment: look for races (races.h)
INSTRUMENTED = "-fsanitize=thread -fno-tree-vectorize"  # kernels
ILLEGAL_ADDRESS = 700
# Every kernel but Hopper's, as patterns in csrc.
KERNELS = tuple(
    f"kernels/cuda/{room}/*.cu" for room in ("gemm", "gemm/simt", "gemm/mma", "mlp", "losses", "elementwise")
)
PLANNING = ("planning/plan.cpp", "planning/routes.cpp", "planning/linear_glu.cpp", "planning/cuda/*.cpp")
ON_DEVICE = "DLKERNELS_TEST_ON_DEVICE"  # a library of the kernels that nvcc compiled (tools/first_light.py): for a GPU
MUTATION = "DLKERNELS_TEST_MUTATION"  # JSON: file, text, its replacement, what to compile; see mutations.py


def build(
    here: Path,
    changes: Mapping[str, tuple[str, str]] | None = None,
    *,
    files: Sequence[str] = (*KERNELS, *PLANNING, "entry*.cpp"),
    stand_ins: Sequence[Path] = (HERE,),
    compiling: str = "",
    linking: str = "",
) -> Path:
    """Build kernels and their C entry points as one library in the folder ``here``, and return its path.

    ``changes``, for tests of the tests: a file name, or the end of its path → (text, replacement). ``files``: patterns,
    in csrc and in the folders ``stand_ins``, whose headers come before those of csrc. ``compiling``: more options for
    files that are no kernels. ``linking``: options for the library. A kernel is compiled once in a test run, for all
    libraries that contain it.
    """
    source = CSRC
    if changes:
        source = here / "csrc"
        _changed_copy(source, changes)

    def compiled(path: Path) -> Path:
        if path.suffix == ".cu":
            return _compiled(path, (HOPPER, HERE, source))
        return _compiled(path, (*stand_ins, source), compiling)

    paths = [path for pattern in files for place in (source, *stand_ins) for path in sorted(place.glob(pattern))]
    if RACES in os.environ:
        paths.append(HERE / "races.cpp")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = " ".join(map(str, pool.map(compiled, paths)))
    library = here / "kernels.so"
    subprocess.run(f"{COMPILER} -shared {objects} {linking} -o {library}", shell=True, check=True)
    return library


def _compiled(path: Path, includes: tuple[Path, ...], options: str = "") -> Path:
    folders = " ".join(f"-I {include}" for include in includes)
    if RACES in os.environ:
        # Without gnu-unique: with it all libraries of a process have the shared memory of the first one, and races.cpp
        # looks for it in its own.
        options += f" -DDLK_TEST_RACES -fno-gnu-unique {INSTRUMENTED if path.suffix == '.cu' else ''}"
    command = f"{COMPILER} {folders} {options} -x c++ -c {path}"
    name = f"{path.stem}-{hashlib.sha256(command.encode()).hexdigest()[:16]}.o"
    return once(name, lambda output: subprocess.run(f"{command} -o {output}", shell=True, check=True))


def compile_kernels(changes: Mapping[str, tuple[str, str]] | None = None, **options: Any) -> ctypes.CDLL:
    """:func:`build`, loaded; with ``ON_DEVICE`` in the environment the library that it names, for a GPU."""
    if ON_DEVICE in os.environ:
        loaded = ctypes.CDLL(os.environ[ON_DEVICE])
    else:
        with tempfile.TemporaryDirectory() as folder:
            loaded = ctypes.CDLL(str(build(Path(folder), changes, **options)))
    for name, result in (
        ("guarded_new", ctypes.c_void_p),
        ("guarded_data", ctypes.c_void_p),
        ("guarded_host", ctypes.c_void_p),
        ("route", ctypes.c_char_p),
        ("route_why", ctypes.c_char_p),
    ):
        if hasattr(loaded, name):
            getattr(loaded, name).restype = result
    return loaded


def _changed_copy(to: Path, changes: Mapping[str, tuple[str, str]]) -> None:
    for path in CSRC.rglob("*"):
        if path.suffix in {".h", ".cuh", ".cu", ".cpp", ".inc"}:
            text = path.read_text()
            for name in filter(path.match, changes):
                old, new = changes[name]
                assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {path.name}"
                text = text.replace(old, new)
            copy = to / path.relative_to(CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)


@functools.cache
def kernels() -> ctypes.CDLL:
    changes, files = mutation()
    return compile_kernels(changes, files=files) if files else compile_kernels()


def mutation() -> tuple[dict[str, tuple[str, str]] | None, list[str]]:
    """Return the change that mutations.py asks for, and the files to compile for it; in an ordinary run neither."""
    if MUTATION not in os.environ:
        return None, []
    file, old, new, files = json.loads(os.environ[MUTATION])
    return {file: (old, new)}, files


class Guarded:
    """A copy of a tensor with the same strides, whose memory ends at a forbidden page. ``tensor`` views it.

    ``aligned``: it begins at a multiple of 16 bytes, as torch's memory does, and ends up to 15 bytes before that page.
    """

    def __init__(self, library: ctypes.CDLL, t: Tensor, aligned: bool = False) -> None:
        self._library = library
        span = (
            1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        )
        bytes_ = span * t.element_size()
        room = -(-bytes_ // 16) * 16 if aligned else bytes_
        self._memory = ctypes.c_void_p(library.guarded_new(ctypes.c_size_t(room)))
        self.pointer = ctypes.c_void_p(library.guarded_data(self._memory))
        self.strides = t.stride()
        if span:
            buffer = (ctypes.c_char * bytes_).from_address(library.guarded_host(self._memory))
            self.tensor = torch.frombuffer(buffer, dtype=t.dtype).as_strided(t.shape, t.stride())
            flat = torch.as_strided(t, (span,), (1,), t.storage_offset())
            torch.frombuffer(buffer, dtype=t.dtype).copy_(flat)
        else:
            self.tensor = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)

    def __del__(self) -> None:
        self._library.guarded_delete(self._memory)


class Call:
    """The arguments of one call. Outputs are filled with NaN before the call and read back after it."""

    def __init__(self, library: ctypes.CDLL, aligned: bool = False) -> None:
        self.library, self.aligned = library, aligned
        self._held: list[Guarded] = []

    def _guarded(self, t: Tensor) -> Guarded:
        self._held.append(Guarded(self.library, t, self.aligned))
        return self._held[-1]

    def pointer(self, t: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None) if t is None else self._guarded(t).pointer

    def view(self, t: Tensor | None) -> list:
        """Return (pointer, row stride, column stride); a null pointer for None."""
        return [self.pointer(t), *map(ctypes.c_int64, (0, 0) if t is None else t.stride())]

    def output(self, *shape: int, dtype: torch.dtype) -> tuple[ctypes.c_void_p, Tensor]:
        guarded = self._guarded(torch.full(shape, float("nan") if dtype.is_floating_point else 0xAA, dtype=dtype))
        return guarded.pointer, guarded.tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_within(got: Tensor, want: Tensor, scale: Tensor, k: int, *, operand_eps: float = 0.0) -> None:
    """Assert |got - want| ≤ the sum of: one rounding to the dtype of got; k roundings of the accumulator on terms whose
    absolute values add up to ``scale``, and a few for the activation; one rounding of ``operand_eps`` of every term."""
    acc = torch.finfo(accumulator(got.dtype)).eps
    bound = torch.finfo(got.dtype).eps * want.abs() + (k + 16) * acc * (scale + want.abs()) + operand_eps * scale
    bound += torch.finfo(got.dtype).smallest_normal
    error = (got.double() - want).abs()
    assert (error <= bound).all(), f"largest error {(error / bound).max():.2f} times its bound"


def tensor(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
