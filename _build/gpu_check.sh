#!/usr/bin/env bash
# On a machine with a GPU: build for it and run the whole suite, its cuda tests included.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

if ! $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu-check: torch $($python -c 'import torch; print(torch.__version__)') sees no GPU here:" \
    "run it on a machine with one, in an environment whose torch is a CUDA build." >&2
  exit 1
fi
FORCE_CUDA=1 $python -m pip install --quiet --no-build-isolation --no-deps --editable .
$python -m dlkernels info
.venv/bin/python -m pytest
.venv/bin/python -m pytest -m cuda  # by themselves too: no test collected is a failure here (exit status 5)
