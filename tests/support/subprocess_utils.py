"""Code in a new interpreter: for settings that a process reads once (environment variables), and for crashes."""

import os
import subprocess
import sys

from tests.support.paths import ROOT


def python(*arguments: str, check: bool = True, timeout: float = 240, **environment: str) -> str:
    """Return the standard output of ``python arguments`` in the checkout. Only the given dlkernels variables are set.

    With ``check`` any exit status except 0 fails, and shows both outputs. Without it both outputs are returned.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DLKERNELS_CPU_")}
    # A script elsewhere imports this checkout too, and not what is installed.
    inherited["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if not check:
        return done.stdout + done.stderr
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
