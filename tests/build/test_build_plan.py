"""Every gate of the build (CPU or CUDA, for what, with how many jobs), decided without building anything."""

import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.support.paths import ROOT

_spec = importlib.util.spec_from_file_location("build_plan", ROOT / "_build" / "plan.py")
plan = sys.modules["build_plan"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plan)

CPU = plan.Torch("2.13.0+cpu", None)
CUDA = plan.Torch("2.13.0+cu130", "13.0")


def make_toolkit(root: Path, release: str = "13.0", archs: str = "75 80 86 90 100 120") -> Path:
    """A toolkit as far as the plan looks: an nvcc that answers questions, and one header."""
    (root / "bin").mkdir(parents=True)
    (root / "include").mkdir()
    (root / "include" / "cuda_runtime.h").touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--version) echo 'Cuda compilation tools, release {release}, V{release}.88';;\n"
        f"--list-gpu-arch) for a in {archs}; do echo compute_$a; done;;\n"
        f"--dryrun) echo '#$ _SPACE_= ' >&2; echo '#$ TOP={root}/bin/..' >&2;;\nesac\n"
    )
    nvcc.chmod(0o755)
    return root


@pytest.fixture
def env(tmp_path):
    """An environment whose PATH holds one toolkit's nvcc, beside the shell it needs."""
    home = make_toolkit(tmp_path / "cuda")
    return {"PATH": f"{home}/bin:/usr/bin:/bin"}


def refused(*args) -> str:
    with pytest.raises(plan.PlanError) as error:
        plan.make_plan(*args)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_cpu_torch_builds_for_cpu_even_where_a_toolkit_is(env, tmp_path):
    made = plan.make_plan({**env, "CUDA_HOME": str(tmp_path / "cuda")}, CPU)
    assert not made.cuda
    assert str(made) == "CPU only: torch 2.13.0+cpu is built without CUDA"


def test_cpu_torch_does_not_mind_a_wrong_cuda_home(tmp_path):
    assert not plan.make_plan({"CUDA_HOME": str(tmp_path)}, CPU).cuda


def test_cuda_torch_with_toolkit_builds_cuda_without_a_gpu(env, tmp_path):
    made = plan.make_plan(env, CUDA, gpus=())
    assert made.toolkit.home == tmp_path / "cuda"
    assert made.toolkit.version == "13.0"
    assert made.archs == "8.0+PTX;9.0a;10.0a"
    assert str(made).startswith("CUDA for 8.0+PTX;9.0a;10.0a (torch 2.13.0+cu130, nvcc 13.0")


def test_cuda_torch_without_toolkit_builds_for_cpu_and_says_why(monkeypatch):
    monkeypatch.setattr(plan, "find_toolkit", lambda env: None)
    made = plan.make_plan({}, CUDA)
    assert not made.cuda
    assert "no toolkit was found" in str(made)


def test_force_cpu_wins_over_cuda(env):
    assert str(plan.make_plan({**env, "FORCE_CPU": "1"}, CUDA)) == "CPU only: FORCE_CPU=1 is set"


@pytest.mark.parametrize("off", ["", "0", "no", "OFF", "false"])
def test_switches_can_be_off(env, off):
    assert plan.make_plan({**env, "FORCE_CPU": off, "FORCE_CUDA": off}, CUDA).cuda


def test_both_forces_contradict(env):
    assert "contradict" in refused({**env, "FORCE_CPU": "1", "FORCE_CUDA": "1"}, CUDA)


def test_force_cuda_under_cpu_torch_asks_for_a_cuda_torch(env):
    said = refused({**env, "FORCE_CUDA": "1"}, CPU)
    assert "torch 2.13.0+cpu is built without CUDA" in said
    assert "install a CUDA build of torch" in said


def test_force_cuda_under_rocm_torch(env):
    assert "ROCm" in refused({**env, "FORCE_CUDA": "1"}, plan.Torch("2.13.0+rocm7.1", None, "7.1"))


def test_force_cuda_without_toolkit_asks_for_one(monkeypatch):
    monkeypatch.setattr(plan, "find_toolkit", lambda env: None)
    assert "install CUDA 13.x (with nvcc)" in refused({"FORCE_CUDA": "1"}, CUDA)


def test_another_cuda_major_is_an_error_naming_both(tmp_path):
    home = make_toolkit(tmp_path / "old", release="12.6")
    said = refused({"CUDA_HOME": str(home)}, CUDA)
    assert "CUDA 13.0" in said
    assert "12.6" in said
    assert "FORCE_CPU=1" in said


def test_another_cuda_minor_is_fine(tmp_path):
    home = make_toolkit(tmp_path / "minor", release="13.1")
    assert plan.make_plan({"CUDA_HOME": str(home)}, CUDA).cuda


@pytest.mark.parametrize("version", ["2.10.0", "1.13.1+cu117", "2.9.1+cpu"])
def test_torch_older_than_supported(version):
    said = refused({}, plan.Torch(version, None))
    assert version in said
    assert "pip install 'torch>=2.11'" in said


@pytest.mark.parametrize("version", ["2.11.0", "2.14.0a0+gitcf30153", "3.0.0"])
def test_torch_new_enough(version):
    assert not plan.make_plan({}, plan.Torch(version, None)).cuda


def test_oldest_torch_is_the_one_in_the_metadata():
    assert f'"torch>={plan.OLDEST_TORCH[0]}.{plan.OLDEST_TORCH[1]}"' in (ROOT / "pyproject.toml").read_text()


# --- where the toolkit is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["script", "link"])
def test_root_behind_an_nvcc_that_is_not_the_real_one(tmp_path, kind):
    home = make_toolkit(tmp_path / "real")
    front = tmp_path / "bin" / "nvcc"
    front.parent.mkdir()
    if kind == "script":
        front.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
        front.chmod(0o755)
    else:
        front.symlink_to(home / "bin" / "nvcc")
    assert plan.find_toolkit({"PATH": f"{front.parent}:/usr/bin:/bin"}).home == home


def test_cuda_home_goes_before_path(env, tmp_path):
    named = make_toolkit(tmp_path / "named", release="13.2")
    assert plan.find_toolkit({**env, "CUDA_HOME": str(named)}).version == "13.2"


def test_cuda_home_without_a_toolkit_is_an_error_not_a_hint(env, tmp_path):
    said = refused({**env, "CUDA_HOME": str(tmp_path / "nothing")}, CUDA)
    assert "nothing holds no CUDA toolkit" in said
    assert "FORCE_CPU=1" in said


def test_headers_in_a_target_folder_count(tmp_path):
    home = make_toolkit(tmp_path / "cuda")
    (home / "targets" / "x86_64-linux").mkdir(parents=True)
    (home / "include").rename(home / "targets" / "x86_64-linux" / "include")
    assert plan.find_toolkit({"CUDA_HOME": str(home)}).home == home


# --- architectures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["8.0 9.0a+PTX", "8.0;9.0a+PTX", "8.0, 9.0a+PTX"])
def test_arch_list_is_honoured(env, asked):
    made = plan.make_plan({**env, "TORCH_CUDA_ARCH_LIST": asked}, CUDA, gpus=[(12, 0)])
    assert made.archs == "8.0;9.0a+PTX"


def test_named_architectures_are_left_to_torch(env):
    assert plan.make_plan({**env, "TORCH_CUDA_ARCH_LIST": "Hopper"}, CUDA).archs == "Hopper"


@pytest.mark.parametrize("bad", ["sm_90", "90", "9.0x", "gpu"])
def test_an_entry_that_is_no_architecture(env, bad):
    assert f'"{bad}"' in refused({**env, "TORCH_CUDA_ARCH_LIST": bad}, CUDA)


def test_an_architecture_this_nvcc_dropped(env):
    said = refused({**env, "TORCH_CUDA_ARCH_LIST": "7.0"}, CUDA)
    assert "nvcc 13.0 cannot compile for 7.0" in said
    assert "7.5, 8.0" in said


def test_default_leaves_out_what_an_older_nvcc_does_not_know(tmp_path):
    home = make_toolkit(tmp_path / "cuda", release="12.6", archs="50 80 90")
    made = plan.make_plan({"CUDA_HOME": str(home)}, plan.Torch("2.11.0+cu126", "12.6"))
    assert made.archs == "8.0+PTX;9.0a"


def test_a_long_build_is_announced(env):
    """Without a GPU and without architectures named, for all of them; it says how to have fewer, or none."""
    made = plan.make_plan(env, CUDA, gpus=())
    architectures = made.archs.count(";") + 1
    assert f"for {architectures} architectures, each in about two minutes" in made.advice
    assert "TORCH_CUDA_ARCH_LIST=" in made.advice and "FORCE_CPU=1" in made.advice
    assert plan.make_plan(env, CUDA, gpus=[(9, 0)]).advice == ""
    assert plan.make_plan({**env, "TORCH_CUDA_ARCH_LIST": "9.0a"}, CUDA, gpus=()).advice == ""
    assert plan.make_plan({**env, "FORCE_CPU": "1"}, CUDA, gpus=()).advice == ""


def test_visible_gpus_are_the_target_when_nothing_is_asked(env):
    assert plan.make_plan(env, CUDA, gpus=[(9, 0), (8, 6), (9, 0)]).archs == "8.6;9.0a"


def test_native_without_a_gpu(env):
    said = refused({**env, "TORCH_CUDA_ARCH_LIST": "native"}, CUDA)
    assert "no GPU is visible" in said


@pytest.mark.parametrize("archs", ["8.0+PTX;9.0a;10.0a", "8.6", "Hopper"])
def test_torch_takes_what_we_hand_it(archs, monkeypatch):
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    flags = _get_cuda_arch_flags()
    assert flags
    assert all(flag.startswith("-gencode=arch=compute_") for flag in flags)


# --- jobs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "free_gib", "cuda", "jobs"),
    [(2, 24, False, 2), (64, 24, False, 16), (64, 24, True, 8), (2, 0.5, True, 1), (1, 1000, False, 1)],
)
def test_jobs_fit_cores_and_memory(cores, free_gib, cuda, jobs):
    assert plan.job_count(cores, free_gib, cuda) == jobs


def test_this_machine_has_cores_and_memory():
    assert plan.usable_cores() >= 1
    assert 0 < plan.free_memory_gib() < 2**20


# ---- the compiler ----------------------------------------------------------------------------------------------------


def compiler(tmp_path, macros):
    """A program that prints these macros, as `c++ -dM -E` does."""
    path = tmp_path / "cxx"
    path.write_text("#!/bin/sh\n" + "\n".join(f"echo '#define {macro}'" for macro in macros) + "\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("version", ["11", "12", "15"])
def test_gcc_will_do(tmp_path, version):
    plan.check_compiler({"CXX": compiler(tmp_path, [f"__GNUC__ {version}"])})
    plan.check_compiler({"CXX": f"env A=b {compiler(tmp_path, [f'__GNUC__ {version}'])}", "PATH": os.environ["PATH"]})


@pytest.mark.parametrize(
    ("macros", "message"),
    [
        (["__GNUC__ 4", "__clang__ 1"], "is Clang, which ignores `#pragma GCC target`"),
        (["__GNUC__ 10"], "is GCC 10: install GCC 11 or newer"),
        ([], "is no GCC: install GCC 11 or newer"),
    ],
)
def test_other_compilers_are_refused_in_one_sentence(tmp_path, macros, message):
    with pytest.raises(plan.PlanError) as refused:
        plan.check_compiler({"CXX": compiler(tmp_path, macros)})
    assert message in str(refused.value) and "CXX" in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_compiler_is_one_sentence(tmp_path):
    for environment in ({"CXX": str(tmp_path / "nowhere")}, {"PATH": str(tmp_path)}):
        with pytest.raises(plan.PlanError, match=r"there is no C\+\+ compiler here .*apt-get install g\+\+"):
            plan.check_compiler(environment)


def test_the_backend_hides_no_package():
    """An installer looks in its folder first, and setuptools loads what installed packages add to it."""
    hidden = {path.stem for path in (ROOT / "_build").glob("*.py")} - {"backend"}
    adding = {entry.module.partition(".")[0] for entry in entry_points(group="egg_info.writers")}
    assert not hidden & {"kernels", "setuptools", "distutils", "wheel", *adding}
