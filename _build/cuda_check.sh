#!/usr/bin/env bash
# Compile every CUDA kernel for every architecture we ship and look at what ptxas says: a register spill or a stack
# frame is an error. Kernels know no torch, so this needs nvcc alone: neither a GPU nor a CUDA build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvcc >/dev/null; then
  echo "cuda-check: no nvcc on PATH, so no CUDA kernel was compiled"
  exit 0
fi
out=build/cuda-check
mkdir -p "$out"
for arch in 80 90a 100a; do
  for source in csrc/cuda/*.cu; do
    log=$out/$(basename "$source" .cu).sm_$arch.log
    nvcc -std=c++17 -O3 --expt-relaxed-constexpr -Werror all-warnings -Xptxas -v \
      -gencode "arch=compute_$arch,code=sm_$arch" -c "$source" -o "${log%.log}.o" >"$log" 2>&1 || {
      cat "$log" >&2
      exit 1
    }
    kernels=$(grep -c 'Compiling entry function' "$log")
    registers=$(sed -n 's/.*Used \([0-9]*\) registers.*/\1/p' "$log" | sort -n | tail -1)
    spilling=$(grep -c ' [1-9][0-9]* bytes spill' "$log" || true)
    echo "$source sm_$arch: $kernels kernels, at most $registers registers, $spilling with spills"
    [[ $spilling == 0 ]]
  done
done
