"""The stages: which jobs each has, and how many seconds it may take.

`EXPECTS` has the parts from which the time of a job is added up. Those of the host were measured, with one core: they
are what a process costs before it does anything on the GPU. The time on the GPU itself is not known before a GPU was
here, so every stage has room above the sum, and a job that takes longer is killed at its limit. The first stage has the
most room: on a machine that was just started, torch's libraries (4 GiB) are read from a disk and not from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tools.lease.jobs import Job

ROOT = Path(__file__).resolve().parents[2]
PREBUILT = ROOT / "build" / "gpu-wheel" / "lib"  # what `make gpu-wheel` leaves
FIRST_LIGHT = PREBUILT / "first_light.so"
PATHS = ("simt", "mma", "hopper", "cublas", "fused_mlp")  # of dlkernels.routing.PATHS["cuda"]

# Seconds. start: python, torch and dlkernels imported. collect: pytest collects the tests of the ops. context: CUDA's,
# with its kernels and cuBLAS (a guess). layer: what one layer costs the timing of a path: to draw, to judge on up to
# 1024 rows, to capture and replay four graphs (a guess).
EXPECTS = {"start": 3.5, "collect": 4.0, "context": 2.0, "layer": 0.7}

# The layers whose products are timed by every path, and those in float32, which cuBLAS gets by default anyway.
BF16_SHAPES = (
    "mnist-1", "mnist-2", "dqn-fc", "infer-1", "infer-32", "small-batch", "few-classes", "regression",
    "tall-64", "tall-128", "wide", "gpt2-ffn", "vit-s-ffn", "transformer-ffn", "bert-ffn", "square",
)  # fmt: skip
FP32_SHAPES = ("mnist-1", "mnist-2", "dqn-fc", "tall-64", "wide", "square")
COMPILED_SHAPES = ("tall-128", "bert-ffn", "wide", "mnist-1", "transformer-ffn", "square", "tall-64", "gpt2-ffn")


@dataclass(frozen=True)
class Where:
    """This machine: its Python, the folder for results, and the folder for what need not come back."""

    python: str
    out: Path
    work: Path

    @property
    def table(self) -> Path:
        """The route table that is measured here."""
        return self.out / "cuda-routes.json"

    def module(self, *words: str) -> tuple[str, ...]:
        return (self.python, "-m", *words)

    def pytest(self, *words: str, timeout: int = 0, workers: int = 0) -> tuple[str, ...]:
        """Return the command for pytest. ``timeout``: seconds of a test; the thread that ends one ends its process."""
        own = ("-q", "--tb=short", "-p", "no:cacheprovider", "-p", "tools.lease.pytest_lines")
        command = self.module("pytest", *own, *words)
        if timeout and find_spec("pytest_timeout"):
            command += (f"--timeout={timeout}", "--timeout-method=thread")
        return command + (("-n", str(workers), "--dist=worksteal") if workers and find_spec("xdist") else ())


@dataclass(frozen=True)
class Stage:
    """Jobs, of which ``at_once`` run at a time, in ``seconds`` altogether.

    ``vital``: names of jobs. If one of these fails, the stages that need torch's GPU are left out; not if it was only
    too slow. ``needs_torch``: it is one of these.
    """

    name: str
    seconds: float
    jobs: Callable[[Where], Sequence[Job]]
    at_once: int = 1
    vital: tuple[str, ...] = ()
    needs_torch: bool = True


ONE_KERNEL = """
import torch
from dlkernels import _C, functional
assert _C.build_config()["cuda"], "dlkernels is not built for CUDA here: make gpu-wheel, or make gpu-check STAGES=build"
x, w, b = (torch.randn(*s, device="cuda") for s in ((65, 33), (17, 33), (17,)))
torch.testing.assert_close(functional.linear_relu(x, w, b).cpu(), torch.relu(x @ w.t() + b).cpu())
print("a kernel ran:", functional.explain(x, w)[0].path)
"""


def facts(where: Where) -> list[Job]:
    own = EXPECTS["start"] + EXPECTS["context"]
    return [
        Job("gpu", (where.python, "tools/gpu.py", "pytest", "numpy", "rich"), 39, own),
        Job("info", where.module("dlkernels", "info"), 39, own),
        Job("one kernel", (where.python, "-c", ONE_KERNEL), 39, own),
    ]


# Without a GPU, or where the package cannot be imported, nothing else runs. A kernel that faults or is wrong says
# nothing about the others.
WITHOUT_THESE = ("gpu", "info")

# The host tests of each path (tests/emulation), on the GPU and without a CUDA build of torch: name, file, selection.
HOST_TESTS = (
    ("simt", "test_cuda_gemm.py", "simt and not route"),
    ("mma64", "test_cuda_gemm.py", "mma64"),
    ("mma128", "test_cuda_gemm.py", "mma128"),
    ("hopper", "test_hopper.py", ""),
    ("fused_mlp", "test_cuda_fused_mlp.py", ""),
    ("passes", "test_cuda_grad_pass.py", ""),
    ("losses", "test_cuda_losses.py", ""),
    ("masks", "test_cuda_masks.py", ""),
)


def host_test(where: Where, name: str, file: str, chosen: str, limit: float) -> Job:
    command = where.pytest(timeout=20)
    select = (f"tests/emulation/{file}", *(("-k", chosen) if chosen else ()))
    return Job(f"first light: {name}", command, limit, EXPECTS["start"] + 9, select, ON_DEVICE)


ON_DEVICE = {"DLKERNELS_TEST_ON_DEVICE": str(FIRST_LIGHT), "OMP_NUM_THREADS": "1"}


def light(where: Where) -> list[Job]:
    jobs = [host_test(where, *test, limit=48) for test in HOST_TESTS]
    command = where.pytest(timeout=20)
    for path in PATHS:
        select = ("tests/ops/test_cuda.py", "-k", "small_shapes or linear_cross")
        expects = EXPECTS["start"] + EXPECTS["collect"] + EXPECTS["context"] + 8
        env = {"DLKERNELS_CUDA_GEMM": path, "OMP_NUM_THREADS": "1"}
        jobs.append(Job(f"ops by {path}", command, 48, expects, select, env))
    return jobs


# The test files that matter most come first: what is cut off at the end was the least of it.
TESTS = tuple(
    f"tests/ops/test_{name}.py"
    for name in (
        "cuda", "forward_backward", "masks", "mlp", "linear_cross_entropy", "linear_cross_entropy_autograd",
        "linear_cross_entropy_interface", "special_values", "promises", "losses",
        "losses_cross_entropy", "losses_autograd", "losses_regression", "losses_gaussian_nll", "autograd", "autocast",
        "compile", "composes", "conversions", "errors", "explain", "modes", "precision",
    )
)  # fmt: skip


def tests(where: Where) -> list[Job]:
    command = where.pytest("-m", "cuda and not slow", timeout=40, workers=8)
    return [Job("tests", command, 600, EXPECTS["start"] + EXPECTS["collect"] + 80, TESTS, {"OMP_NUM_THREADS": "2"})]


def routes(where: Where) -> list[Job]:
    command = where.module("bench.dispatch", "--rounds", "1", "--patience", "32", "--table", str(where.table))
    command += ("--bf16", *BF16_SHAPES, "--fp32", *FP32_SHAPES)
    layers = len(BF16_SHAPES) + len(FP32_SHAPES)
    # cuBLAS takes every layer; simt those in fp32; mma and hopper those in 16 bits; fused_mlp the narrow ones.
    timed = layers + len(FP32_SHAPES) + 2 * len(BF16_SHAPES) + 5
    expects = len(PATHS) * (EXPECTS["start"] + EXPECTS["context"]) + timed * EXPECTS["layer"]
    return [Job("routes", command, 600, expects)]


def grid(where: Where) -> list[Job]:
    def bench(name: str, file: str, expects: float, *words: str) -> Job:
        command = where.module("bench", "--device", "cuda", "--columns", "graph", "--budget", "0.03", *words)
        env = {"DLKERNELS_ROUTES": str(where.table)} if where.table.exists() else {}
        out = where.work / file  # the benchmark writes more than one file there
        return Job(name, (*command, "--out", str(out)), 50, expects, env=env, keeps=out)

    own, layer = EXPECTS["start"] + EXPECTS["context"] + 5, EXPECTS["layer"]
    few = ("--contenders", "stock", "in-place", "dlkernels", "--dtypes", "bf16", "fp32")
    compiled = ("--contenders", "stock", "compile", "dlkernels", "--dtypes", "bf16", "--shapes", *COMPILED_SHAPES)
    return [
        bench("grid", "bench.json", own + 44 * layer, *few),
        bench("grid with compile", "bench-compile.json", own + 4 * len(COMPILED_SHAPES), *compiled),
    ]


def networks(where: Where) -> list[Job]:
    command = where.module("bench.networks", "--device", "cuda", "--dtypes", "bf16", "--budget", "0.1")
    env = {"DLKERNELS_ROUTES": str(where.table)} if where.table.exists() else {}
    return [Job("networks and heads", command, 50, EXPECTS["start"] + EXPECTS["context"] + 30, env=env)]


SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "LaunchStats", "Occupancy")


def profile(where: Where) -> list[Job]:
    words = [word for section in SECTIONS for word in ("--section", section)]
    # By default ncu compares the name without its namespace, which is what ours have in common.
    ours = ("--kernel-name-base", "demangled", "--kernel-name", "regex:dlk::")
    ncu = ("ncu", "--clock-control", "none", *ours, "--launch-skip", "8", *words)
    script = where.module("tools.lease.four_kernels")
    memcheck = (*sanitizer("memcheck"), *where.pytest("-x"))
    light = {**ON_DEVICE, "DLKERNELS_EXACT_MEMORY": "1"}
    hopper = ("tests/emulation/test_hopper.py", "-k", "forward")
    chain = ("tests/emulation/test_cuda_fused_mlp.py", "-k", "network")
    return [
        Job("ncu", (*ncu, *script), 58, EXPECTS["start"] + EXPECTS["context"] + 20),
        Job("memcheck hopper", memcheck, 58, EXPECTS["start"] + 25, hopper, light),
        Job("memcheck chain", memcheck, 58, EXPECTS["start"] + 25, chain, light),
    ]


def sanitizer(tool: str) -> tuple[str, ...]:
    return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=dlk")


LEASE = (
    Stage("facts", 40, facts, at_once=3, vital=WITHOUT_THESE, needs_torch=False),
    Stage("light", 50, light, at_once=13, needs_torch=False),
    Stage("tests", 115, tests),
    Stage("routes", 140, routes),
    Stage("grid", 100, grid),
    Stage("networks", 50, networks),
    Stage("profile", 60, profile, at_once=3, needs_torch=False),
)
"""For a lent GPU: 555 s."""
AGAIN = 150.0
"""Seconds for what failed."""


# ---- for the owner of a GPU ------------------------------------------------------------------------------------------


def build(where: Where) -> list[Job]:
    own = {"FORCE_CUDA": "1"}
    return [
        Job(
            "extension", (where.python, "setup.py", "--quiet", "egg_info", "build_ext", "--inplace"), 3600, 600, env=own
        ),
        Job("first light", where.module("tools.first_light", str(FIRST_LIGHT)), 1800, 60),
    ]


def all_tests(where: Where) -> list[Job]:
    command = where.pytest(timeout=300, workers=8)
    marks = {"on the GPU": "cuda and not slow", "the rest": "not cuda and not slow"}
    env = {"OMP_NUM_THREADS": "2"}
    return [Job(f"tests, {name}", (*command, "-m", mark), 900, 600, env=env) for name, mark in marks.items()]


def paths(where: Where) -> list[Job]:
    command = where.pytest("-m", "cuda and not slow", timeout=300, workers=8)
    loss = ("linear_cross_entropy", "linear_cross_entropy_autograd")
    files = tuple(f"tests/ops/test_{name}.py" for name in ("forward_backward", "mlp", "masks", *loss, "cuda"))
    counted = (
        "at_most_four_launches_per_layer_and_step",
        "forward_makes_no_full_size_temporary",
    )  # of the default path
    left_out = tuple(f"--deselect=tests/ops/test_cuda.py::test_{name}" for name in counted)
    env = {"OMP_NUM_THREADS": "2"}
    return [
        Job(f"tests by {path}", command + left_out, 240, 200, files, {**env, "DLKERNELS_CUDA_GEMM": path})
        for path in PATHS
    ]


def sanitize(where: Where) -> list[Job]:
    """Small shapes through torch; then the host tests, whose memory ends with its operands."""
    jobs = []
    for tool in ("memcheck", "racecheck", "synccheck"):
        # torch asks CUDA questions whose failure it expects: API errors are not ours.
        command = (
            *sanitizer(tool),
            *(("--report-api-errors", "no") if tool == "memcheck" else ()),
            *where.pytest("-x"),
        )
        for path in ("", "hopper", "cublas"):
            if path != "cublas" or tool == "memcheck":
                select = ("tests/ops/test_cuda.py", "-k", "small_shapes or test_losses or linear_cross")
                env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DLKERNELS_CUDA_GEMM": path}
                jobs.append(Job(f"{tool} {path or 'default'}", command, 170, 150, select, env))
        for name, file, chosen in HOST_TESTS:
            job = host_test(where, name, file, chosen, 300)
            exact = {**job.env, "DLKERNELS_EXACT_MEMORY": "1"}
            jobs.append(Job(f"{tool} {job.name}", (*sanitizer(tool), *where.pytest("-x")), 300, 150, job.select, exact))
    return jobs


def all_routes(where: Where) -> list[Job]:
    return [Job("routes", where.module("bench.dispatch"), 1800, 900)]  # into dlkernels/routes, where it counts at once


def all_layers(where: Where) -> list[Job]:
    return [Job("grid", where.module("bench", "--device", "cuda"), 1800, 590)]  # into bench/results


def all_networks(where: Where) -> list[Job]:
    command = where.module(
        "bench.networks", "--device", "cuda", "--budget", "0.5", "--out", str(where.out / "networks.json")
    )
    return [Job("networks and heads", command, 900, 590)]


def autotune(where: Where) -> list[Job]:
    """A few layers beside torch.compile's max-autotune, which tunes for minutes."""
    command = where.module("bench", "--device", "cuda", "--contenders", "stock", "max-autotune, no graphs", "dlkernels")
    words = ("--dtypes", "bf16", "--shapes", "mnist-1", "bert-ffn", "tall-128", "llm-up", "llm-square")
    return [Job("autotune", (*command, *words, "--out", str(where.out / "max-autotune.json")), 1800, 590)]


HOUR = 3600.0
CHECK: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("build", 2 * HOUR, build, vital=("extension",)),
        Stage("facts", 60, facts, at_once=3, vital=WITHOUT_THESE),
        Stage("light", 600, light, at_once=4, needs_torch=False),
        Stage("test", HOUR, all_tests),
        Stage("paths", HOUR, paths),
        Stage("sanitize", 3 * HOUR, sanitize),
        Stage("routes", HOUR, all_routes),
        Stage("bench", HOUR, all_layers),
        Stage("networks", HOUR, all_networks),
        Stage("autotune", HOUR, autotune),
    )
}
