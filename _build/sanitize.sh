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
# everything. PYTHONPATH puts the instrumented package before the editable one.
[[ $# -gt 0 ]] || set -- -m "not slow" tests/test_linear_act*.py tests/test_losses*.py
LD_PRELOAD="$(g++ -print-file-name=$runtime) $(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  TSAN_OPTIONS=halt_on_error=1 DLKERNELS_SANITIZE=$kinds PYTHONPATH=$PWD/$out \
  .venv/bin/pytest --capture=sys "$@"  # pytest would keep the report of a process that ends at once
