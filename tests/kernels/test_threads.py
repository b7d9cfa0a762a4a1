"""The kernels' threads under ThreadSanitizer (threads/driver.cpp): no data race, the same bits on any number."""

import os
import subprocess

import pytest

from tests.support.paths import ROOT

KERNELS = 22


def build(folder, *flags):
    driver = folder / "driver"
    sources = [
        ROOT / "tests/kernels/threads/driver.cpp",
        *(ROOT / "csrc/kernels/cpu" / f"{n}.cpp" for n in ("sizes", "huge_pages", "isa/isa", "isa/amx_check")),
    ]
    subprocess.run(
        [
            os.environ.get("CXX", "g++"),
            *("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"),
            *("-Wno-psabi", "-Wno-ignored-attributes", f"-I{ROOT}/csrc", *flags),
            *(*map(str, sources), f"{ROOT}/csrc/kernels/cpu/isa/ukernel_portable.cpp", "-o", str(driver)),
        ],
        check=True,
    )
    return driver


@pytest.mark.slow
def test_no_data_races(tmp_path):
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    made = subprocess.run(
        [os.environ.get("CXX", "g++"), "-fsanitize=thread", str(probe), "-o", str(tmp_path / "probe")],
        capture_output=True,
    )
    if made.returncode or subprocess.run([tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip("this compiler or machine has no ThreadSanitizer")
    driver = build(tmp_path, "-fsanitize=thread")
    done = subprocess.run([driver], capture_output=True, text=True, env={"TSAN_OPTIONS": "halt_on_error=1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == KERNELS
