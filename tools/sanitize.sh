#!/usr/bin/env bash
# sanitize.sh KINDS [pytest arguments]: build the extension with -fsanitize=KINDS in a folder of its own
# (build/sanitize-...) and run the kernel tests against that build.
set -euo pipefail
cd "$(dirname "$0")/.."
kinds=$1
shift
out=build/sanitize-${kinds//,/-}
runtime=libasan.so
[[ $kinds == *thread* ]] && runtime=libtsan.so

DLKERNELS_SANITIZE=$kinds FORCE_CPU=1 .venv/bin/python setup.py --quiet build --build-lib "$out"

# The runtime must be in the process before Python is. Leaks are not looked for: Python and torch never free
# everything. The first test fails unless it is the instrumented package that is tested: `python -m pytest` puts the
# folder of the sources in front of it, and so does a conftest unless it is appended.
# Tests that start a Python of their own (every_kernel_set) would leave the instrumented package.
[[ $# -gt 0 ]] || set -- -m "not slow" -k "not every_kernel_set" tests/ops/test_{forward_backward,special_values,promises,losses,linear_cross_entropy{,_autograd,_interface},mlp}.py
# --capture=sys: a sanitizer that ends the process writes its report past pytest, which would swallow it
LD_PRELOAD="$(g++ -print-file-name=$runtime) $(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  TSAN_OPTIONS=halt_on_error=1 DLKERNELS_SANITIZE=$kinds PYTHONPATH=$PWD/$out:$PWD \
  .venv/bin/pytest --capture=sys -o pythonpath= --import-mode=append tests/build/test_install.py::test_sanitizers_are_those_asked_for "$@"
