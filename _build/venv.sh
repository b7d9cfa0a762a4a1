#!/usr/bin/env bash
# venv.sh FOLDER EXTRA: make FOLDER a virtual environment with torch and, built against it, dlkernels[EXTRA].
set -euo pipefail
venv=$1 extra=$2
has_torch='import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)'

if [[ ! -x $venv/bin/python ]]; then
  # A torch that is there already is the one its owner wants to build against.
  if "$PYTHON" -c "$has_torch" 2>/dev/null; then
    "$PYTHON" -m venv --system-site-packages "$venv"
  else
    "$PYTHON" -m venv "$venv"
  fi
fi
if ! "$venv/bin/python" -c "$has_torch" 2>/dev/null; then
  # shellcheck disable=SC2086  # TORCH may hold options too, such as an index
  "$venv/bin/python" -m pip install --quiet $TORCH
fi
"$venv/bin/python" -m pip install --quiet --editable ".[$extra]"
