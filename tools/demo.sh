#!/usr/bin/env bash
# demo.sh VENV [FLAG...]: load MNIST and train 784-256-10, fused and stock in turns. Between them come the seconds of each
# phase of `make demo` so far (venv.sh has left its own in VENV/phases): the training ends on the table and the path of the
# picture. The flags are added to those of the training.
set -euo pipefail
venv=$1
shift
run=runs/demo
train=("$venv/bin/python" -m dlkernels train --dataset mnist --sizes 784 256 10 --batch-size 256 --epochs 10
  --compare-stock --out "$run" "$@")

echo "== data: MNIST, from the cache or fetched"
SECONDS=0
"$venv/bin/python" -c "import logging
logging.basicConfig(level=logging.INFO, format='%(message)s')
from dlkernels.data import load
print(load('mnist'))"
data=$SECONDS
echo "== seconds of each phase"
{
  cat "$venv/phases" 2>/dev/null || true  # those of the first `make demo`; later ones have no such phases
  printf '%s\t%d\n' data "$data"
} | awk -F '\t' '{ printf "  %-12s %4d\n", $1, $2; sum += $2 } END { printf "  %-12s %4d\n", "all", sum }'
rm -f "$venv/phases"
echo "== training: 10 epochs, fused and stock in turns"
echo "${train[*]}"
"${train[@]}"
