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

# The tests of `fuse` use torchvision's models. Its wheels pin one torch, which may not be this one: so without their
# dependencies, in the release that goes with torch 2.N. Where there is none, those tests are skipped and say so.
if [[ $extra == dev ]]; then
  release=$("$venv/bin/python" -c 'import torch; print(int(torch.__version__.split(".")[1]) + 15)')
  "$venv/bin/python" -m pip install --quiet --no-deps "torchvision==0.$release.*" pillow ||
    echo "no torchvision 0.$release for this torch: the tests of its models will be skipped" >&2
fi
