"""Every program of the sources answers ``--help`` at once: it reads its command line before it imports torch."""

import ast
import os
import resource
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

FOLDERS = ("_build", "bench", "dlkernels", "examples", "tools")
HEAVY = {"torch", "numpy", "matplotlib", "sklearn", "transformers"}


def is_program(path):
    tests = (node.test for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
    return any(ast.unparse(test) == "__name__ == '__main__'" for test in tests)


def command(path):
    """As users start it: an example by its path, all others by their names."""
    place = path.relative_to(ROOT).with_suffix("")
    if place.parts[0] == "examples":
        return (str(path),)
    return ("-m", ".".join(place.parts[:-1] if place.name == "__main__" else place.parts))


PROGRAMS = [command(path) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if is_program(path)]


def test_the_programs_are_found():
    known = [("-m", name) for name in ("bench", "bench.networks", "tools.wheel", "tools.lease", "dlkernels")]
    assert {*known, (str(ROOT / "examples" / "gpt.py"),)} < set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS, ids=[program[-1].removeprefix(f"{ROOT}/") for program in PROGRAMS])
def test_help_is_quick_and_imports_no_torch(program, tmp_path):
    """-X importtime lists every module on standard error. Processor time does not depend on what else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *program, "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-2000:]
    name = os.path.basename(program[-1]) if len(program) == 1 else f"python -m {program[-1]}"
    assert done.stdout.startswith(f"usage: {name} ")
    assert not {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & HEAVY
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert not list(tmp_path.iterdir()), "asking for help writes nothing"
