#!/usr/bin/env bash
# demo.sh VENV: load MNIST and train 784-256-10, fused and stock in turns. Ends on the seconds of each phase of `make demo`;
# venv.sh has left those before in VENV/phases.
set -euo pipefail
venv=$1
train=("$venv/bin/python" -m dlkernels train --dataset mnist --sizes 784 256 10 --batch-size 256 --epochs 10
  --compare-stock --out runs/demo)

echo "== data: MNIST, from the cache or fetched"
SECONDS=0
"$venv/bin/python" -c "import logging
logging.basicConfig(level=logging.INFO, format='%(message)s')
from dlkernels.data import load
print(load('mnist'))"
data=$SECONDS
echo "== training: 10 epochs, fused and stock in turns"
echo "${train[*]}"
"${train[@]}"
training=$((SECONDS - data))

echo "== seconds of each phase"
{
  cat "$venv/phases" 2>/dev/null || true  # those of the first `make demo`; later ones have no such phases
  printf '%s\t%d\n' data "$data" training "$training"
} | awk -F '\t' '{ printf "  %-12s %4d\n", $1, $2; sum += $2 } END { printf "  %-12s %4d\n", "all", sum }'
rm -f "$venv/phases"
