#!/usr/bin/env bash
# Checks of the CUDA code that need no GPU. They need nvcc, and nothing of torch's CUDA build.
#
#  1. Every kernel is compiled for every architecture we ship, and ptxas's report is judged: a register spill, a stack
#     frame, an ignored setmaxnreg or a serialised wgmma is an error, and so is a Hopper kernel without HGMMA. The table of all kernels: build/cuda-check/report.txt.
#  2. The host side (csrc/{ops,planning}/cuda) is type-checked against the headers of PYTHON's torch. A CPU build of torch
#     ships the CUDA ones but for a file of one define, which is made here.
#  3. Where there is a CUDA build of torch, PYTHON's or that of TORCH_CUDA_PYTHON, the whole extension is compiled,
#     linked and imported, which needs no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=build/cuda-check

if ! command -v nvcc >/dev/null; then
  echo "cuda-check: no nvcc on PATH, so no CUDA kernel was compiled"
  exit 0
fi
rm -rf "$out"
mkdir -p "$out/include/c10/cuda/impl"

# ---- 1. kernels
export out
compile() { # SOURCE ARCH
  local log kind
  log=$out/$(tr / - <<<"${1%.cu}").sm_$2.log
  kind=-cubin # the host's half is the same for every architecture: once is enough
  [[ $2 == 80 ]] && kind=-c
  echo "# $1 sm_$2" >"$log"
  nvcc -std=c++17 -O3 --expt-relaxed-constexpr -Werror all-warnings -Xptxas -v -I csrc \
    -gencode "arch=compute_$2,code=sm_$2" "$kind" "$1" -o "${log%.log}.o" >>"$log" 2>&1 || { cat "$log" >&2 && exit 255; }
}
export -f compile
# The longest, mlp and mma, begin before the many short ones, which fill the cores at the end.
find csrc/kernels/cuda -name '*.cu' | sort -r | while read -r source; do
  for arch in 80 90a 100a; do echo "$source" "$arch"; done
done | xargs -P "$(nproc)" -L 1 bash -c 'compile "$@"' compile
"$python" tools/ptxas_report.py "$out/report.txt" "$out"/*.log

# triton, which a CUDA build of torch brings along, has one
beside=$("${TORCH_CUDA_PYTHON:-$python}" -c 'import importlib.util as u, os
found = u.find_spec("triton"); print(os.path.join(os.path.dirname(found.origin), "backends/nvidia/bin") if found else "")' || true)
PATH=$PATH:$beside
if command -v cuobjdump >/dev/null; then
  "$python" tools/ptxas_report.py --hgmma "$out"/csrc-kernels-cuda-gemm-hopper-hopper_gemm.sm_90a.o
else
  echo "cuda-check: no cuobjdump on PATH, so wgmma instructions were not counted"
fi

# ---- 2. host code
# shellcheck disable=SC2016
toolkit=$("$python" -c 'import os, sys; sys.path.insert(0, "."); from _build.plan import find_toolkit
print(find_toolkit(os.environ).home)')
if torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))' 2>/dev/null); then
  real=$torch/include/c10/cuda/impl/cuda_cmake_macros.h
  [[ -e $real ]] || echo '#define C10_CUDA_BUILD_SHARED_LIBS' >"$out/include/c10/cuda/impl/cuda_cmake_macros.h"
  # csrc/python/explain.cpp, of the Python module, has a part for CUDA too.
  { find csrc/{ops,planning}/cuda -name '*.cpp' && echo csrc/python/explain.cpp; } | xargs -P "$(nproc)" -I {} \
    "${CXX:-g++}" -std=c++20 -fsyntax-only -Wall -Werror -Wno-psabi -fopenmp -DDLKERNELS_CUDA='""' -I csrc \
    -I "$out/include" -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
    -isystem "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')" -isystem "$toolkit/include" {}
  echo "$(find csrc/{ops,planning}/cuda -name '*.cpp' | wc -l) host files type-checked against $("$python" -c 'import torch; print("torch", torch.__version__)')"
else
  echo "cuda-check: $python has no torch, so the host files were not type-checked"
fi

# ---- 3. the extension
has_cuda='import sys, torch; sys.exit(torch.version.cuda is None)'
builder=
for candidate in ${TORCH_CUDA_PYTHON:-} "$python"; do
  "$candidate" -c "$has_cuda" 2>/dev/null && builder=$(realpath -s "$(command -v "$candidate")") && break
done
if [[ -z $builder ]]; then
  if [[ -n ${TORCH_CUDA_PYTHON:-} ]]; then
    echo "cuda-check: TORCH_CUDA_PYTHON=$TORCH_CUDA_PYTHON has no CUDA build of torch" >&2
    exit 1
  fi
  echo "cuda-check: no CUDA build of torch here (TORCH_CUDA_PYTHON names one), so the extension was not linked"
  exit 0
fi
FORCE_CUDA=1 "$builder" setup.py --quiet build --build-lib "$out/extension" >"$out/extension.log" 2>&1 ||
  { cat "$out/extension.log" >&2 && exit 1; }
cd "$out/extension"
"$builder" - <<'EOF'
import torch
import dlkernels
from dlkernels import _C

ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dlkernels::")]
cuda = [name for name in ops if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
config = _C.build_config()
assert config["cuda"] and cuda, f"expected ops with CUDA kernels, got {config} and {ops}"
print(f"extension built for torch {config['torch']}, CUDA {config['cuda']}, {config['cuda_archs']}: "
      f"imported; {len(cuda)} of {len(ops)} ops have CUDA kernels")
EOF
