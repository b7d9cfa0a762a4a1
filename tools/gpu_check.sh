#!/usr/bin/env bash
# gpu_check.sh [STAGE...]: turn a machine with a GPU into evidence. No network, no virtual environment: PYTHON (python3)
# is the one whose torch is a CUDA build. Logs, results and the summary go to OUT (build/gpu-check).
#
#   build     the extension for the GPU that is here, in place; one kernel is launched
#   test      the suite on the GPU (free memory full of NaN, every test synchronised), then the rest of it
#   paths     layers, chains, masks and losses once more, on every path of the CUDA dispatcher by force
#   sanitize  compute-sanitizer's memcheck, racecheck and synccheck on small shapes
#   bench     every layer of the GPU's grid: bench/results/GPU.json and its table
#   networks  whole networks, their graphs and the floor of chains: bench/results/GPU-networks.json
#   autotune  a few layers beside torch.compile's max-autotune, which tunes for minutes: GPU-max-autotune.json
#   dispatch  times every path of the CUDA dispatcher and writes dlkernels/routes/cuda-GPU.json; bench follows
#
# Without a stage all of them run, in this order. Each is meant to take less than 10 minutes on 16 cores, and is stopped
# where a kernel hangs; a benchmark stops after STAGE_SECONDS (590).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
out=${OUT:-build/gpu-check}
all=(build test paths sanitize bench networks autotune dispatch)
readonly SKIPPED=77
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
note=$(mktemp)
trap 'rm -f "$note"' EXIT

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
say() { echo "$*" >"$note"; } # what the summary says about the stage

built() { # otherwise every test would be skipped, and pass
  "$python" -c 'import sys; from dlkernels import _C; sys.exit(_C.build_config()["cuda"] is None)' ||
    { say "dlkernels is not built for CUDA here: run the build stage first" && return 1; }
}

stage_build() {
  "$python" tools/gpu.py setuptools ninja numpy 2>"$note" || { cat "$note" && return 1; }
  local toolkit
  toolkit=$("$python" -c 'import os; from _build.plan import find_toolkit; print(find_toolkit(os.environ) or "")')
  if [[ -z $toolkit ]]; then
    if built; then
      say "no nvcc on PATH, in CUDA_HOME or /usr/local/cuda; what was built before is used"
      return $SKIPPED
    fi
    say "no nvcc on PATH, in CUDA_HOME or /usr/local/cuda, and nothing was built for CUDA before: install the toolkit"
    return 1
  fi
  FORCE_CUDA=1 "$python" setup.py --quiet egg_info build_ext --inplace || { say "the compiler's message is in the log" && return 1; }
  "$python" -m dlkernels info || return 1
  "$python" - <<'EOF' || { say "it was built, and does not run: see the log" && return 1; }
import torch
from dlkernels import functional

x, w, b = (torch.randn(*s, device="cuda") for s in ((65, 33), (17, 33), (17,)))
torch.testing.assert_close(functional.linear_relu(x, w, b).cpu(), torch.relu(x @ w.t() + b).cpu())
print("a kernel ran")
EOF
}

# tested NAME SECONDS ARGUMENT...: pytest on half of the cores; adds a line to `results`, and 1 to `wrong` where it fails or
# hangs. No test collected is a failure too (exit status 5).
tested() {
  local options=() workers part status
  workers=$(($(nproc) / 2 < 8 ? $(nproc) / 2 : 8))
  has xdist && ((workers > 1)) && options+=(-n "$workers")
  has pytest_timeout && options+=(--timeout 300)
  part=$(mktemp)
  echo "== $1"
  OMP_NUM_THREADS=2 timeout -k 10 "$2" "$python" -m pytest -q "${options[@]}" "${@:3}" 2>&1 | tee "$part"
  status=${PIPESTATUS[0]}
  ((status == 0)) || ((++wrong))
  if ((status == 124 || status == 137)); then results+=("$1: ran past $2 s"); else results+=("$1: $(tail -1 "$part" | tr -d =)"); fi
  rm -f "$part"
}

stage_test() {
  "$python" tools/gpu.py pytest numpy rich 2>"$note" || { cat "$note" && return 1; }
  built || return 1
  local results=() wrong=0
  for which in "cuda and not slow" "not cuda and not slow"; do
    tested "$which" 900 -m "$which"
  done
  say "$(printf '%s; ' "${results[@]}")"
  return $((wrong > 0))
}

stage_paths() {
  "$python" tools/gpu.py pytest numpy rich 2>"$note" || { cat "$note" && return 1; }
  built || return 1
  local results=() wrong=0 path paths
  paths=$("$python" -c 'from bench import dispatch; print(*dispatch.paths())') || return 1
  for path in $paths; do
    DLKERNELS_CUDA_GEMM=$path tested "$path" 240 -m "cuda and not slow" \
      tests/ops/test_{forward_backward,mlp,masks,linear_cross_entropy,cuda}.py \
      --deselect=tests/ops/test_cuda.py::test_{at_most_four_launches_per_layer_and_step,forward_makes_no_full_size_temporary}
  done
  say "$(printf '%s; ' "${results[@]}")"
  return $((wrong > 0))
}

stage_sanitize() {
  "$python" tools/gpu.py pytest numpy 2>"$note" || { cat "$note" && return 1; }
  built || return 1
  local tool status=0 home results=()
  home=$("$python" -c 'import os; from _build.plan import find_toolkit; t = find_toolkit(os.environ); print(t.home if t else "/usr/local/cuda")')
  for tool in "$(command -v compute-sanitizer)" {"$home",/usr/local/cuda}/{bin,compute-sanitizer}/compute-sanitizer; do
    [[ -x $tool ]] && break
  done
  if [[ ! -x $tool ]]; then
    say "no compute-sanitizer on PATH or in $home"
    return $SKIPPED
  fi
  local options=(--error-exitcode 9 --kernel-regex kns=dlk) # only our kernels are instrumented
  # torch asks CUDA questions whose failure it expects: API errors are not ours.
  local -A own=([memcheck]="--report-api-errors no")
  # shellcheck disable=SC2086  # several words
  if ! "$tool" ${own[memcheck]} "${options[@]}" "$python" -c 'import torch; torch.ones(3, device="cuda").add(1).cpu()'; then
    say "compute-sanitizer does not work on this machine: see the log"
    return $SKIPPED
  fi
  local run check path
  for run in {memcheck,racecheck,synccheck} memcheck:cublas {memcheck,racecheck,synccheck}:hopper; do
    echo "== $run"
    check=${run%:*} path=${run#"${run%:*}"}
    # Without its cache torch allocates each tensor by itself, so that memcheck sees where one ends.
    # shellcheck disable=SC2086  # several words, or none
    DLKERNELS_CUDA_GEMM=${path#:} PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 170 \
      "$tool" --tool "$check" ${own[$check]-} "${options[@]}" \
      "$python" -m pytest -q -x -p no:cacheprovider tests/ops/test_cuda.py -k "small_shapes or test_losses or linear_cross"
    case $? in
      0) results+=("$run clean") ;;
      124 | 137) results+=("$run ran past 170 s") && status=1 ;;
      *) results+=("$run FAILED") && status=1 ;;
    esac
  done
  say "$(printf '%s; ' "${results[@]}")"
  return $status
}

# measured SUFFIX COMMAND...: runs the command with --out, and keeps what it wrote as the result for this GPU.
measured() {
  "$python" tools/gpu.py numpy rich triton 2>"$note" || { cat "$note" && return 1; }
  local name status=0
  name=$("$python" -c 'import torch; from bench import machine; print(machine.slug(torch.cuda.get_device_name()))')$1 || return 1
  timeout "${STAGE_SECONDS:-590}" "${@:2}" --out "$out/$name.json" || status=$?
  [[ $status == 124 ]] && say "ran past its time; what there was by then: $out/$name.partial.json"
  [[ -e $out/$name.json ]] || return 1
  cp "$out/$name.json" bench/results/ || status=1
  say "bench/results/$name.json; its table is in the log"
  return $status
}

stage_bench() { measured "" "$python" -m bench --device cuda; }

stage_networks() { measured -networks "$python" -m bench.networks --device cuda --budget 0.5; }

stage_autotune() {
  measured -max-autotune "$python" -m bench --device cuda --contenders stock "max-autotune, no graphs" dlkernels \
    --dtypes bf16 --shapes mnist-1 bert-ffn tall-128 llm-up llm-square
}

stage_dispatch() {
  "$python" -m bench.dispatch
  local status=$?
  case $status in
    0)
      say "dlkernels/routes/cuda-GPU.json; now bench again"
      cp dlkernels/routes/cuda-*.json "$out"
      ;;
    "$SKIPPED") say "this build has one path per product: nothing to choose from" ;;
  esac
  return $status
}

((${#@})) || set -- "${all[@]}"
for stage in "$@"; do
  if [[ " ${all[*]} " != *" $stage "* ]]; then
    echo "gpu-check: expected stages out of ${all[*]}; got $stage" >&2
    exit 2
  fi
done
if ! here=$("$python" tools/gpu.py 2>&1); then
  echo "gpu-check: $here" >&2
  exit 1
fi
mkdir -p "$out"
summary=()
failed=0 skipped=0
for stage in "$@"; do
  echo "==== $stage"
  : >"$note"
  start=$SECONDS
  "stage_$stage" 2>&1 | tee "$out/$stage.log"
  status=${PIPESTATUS[0]}
  case $status in
    0) word=passed ;;
    "$SKIPPED") word=SKIPPED && ((++skipped)) ;;
    *) word=FAILED && ((++failed)) ;;
  esac
  summary+=("$(printf '  %-9s %-8s %4ds  %s' "$stage" "$word" $((SECONDS - start)) "$(head -1 "$note")")")
  if [[ $stage == build && $word == FAILED && $# -gt 1 ]]; then
    summary+=("  nothing else was run: there is nothing to run")
    break
  fi
done
{
  echo "gpu-check on $here; commit $(git rev-parse --short HEAD 2>/dev/null || echo "${DLKERNELS_COMMIT:-unknown}")"
  printf '%s\n' "${summary[@]}"
  echo "  $failed of ${#} stages failed, $skipped skipped; logs in $out"
} | tee "$out/summary.txt"
((failed == 0))
