#!/usr/bin/env bash
# venv.sh FOLDER EXTRA: make FOLDER a virtual environment with torch and, built against it, dlkernels[EXTRA]. Says what it
# does, phase by phase, with the seconds since it began, and leaves the seconds of each in FOLDER/phases.
set -euo pipefail
venv=$1 extra=$2
has_torch='import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)'

began=0 name=start phases=""
phase() {
  phases+="$name"$'\t'"$((SECONDS - began))"$'\n' began=$SECONDS name=${1%%:*}
  echo "== $* (after $SECONDS s)"
}

# pip need not compile the thousands of modules of torch: Python does that with those that are imported, where it may.
options=(--quiet)
[[ -n ${PYTHONDONTWRITEBYTECODE:-} ]] || options+=(--no-compile)
pip_install() { "$venv/bin/python" -m pip --disable-pip-version-check install "${options[@]}" "$@"; }

if [[ ! -x $venv/bin/python ]]; then
  # A torch that is there already is the one its owner wants to build against.
  if "$PYTHON" -c "$has_torch" 2>/dev/null; then
    phase "environment: $venv, with the torch of $PYTHON"
    "$PYTHON" -m venv --system-site-packages "$venv"
  else
    phase "environment: $venv"
    "$PYTHON" -m venv "$venv"
  fi
fi
pip_install "setuptools>=77" ninja

# The kernels need no torch: they compile while pip fetches it. The counter and the file of ninja's lines are shown; what
# else a compiler says is in the log.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
counted() {
  tee -a "$log" | sed -nu -e 's/^dlkernels: /  &/p' -e 's/^\(\[[0-9]*\/[0-9]*\]\).* -c [^ ]*\/\(\(csrc\|build\/units\)\/[^ ]*\) .*/  \1 \2/p'
}
phase "packages: torch and what dlkernels[$extra] needs; the kernels compile meanwhile"
"$venv/bin/python" -m _build.compile_kernels 2>&1 | counted &
kernels=$!
if ! "$venv/bin/python" -c "$has_torch" 2>/dev/null; then
  echo "  $TORCH, the largest download"
  # shellcheck disable=SC2086  # TORCH may hold options too, such as an index
  pip_install $TORCH
fi
"$venv/bin/python" tools/requirements.py "$extra" >"$venv/requirements"
pip_install --requirement "$venv/requirements"

# Compiled here, where it can be seen, and not by pip, which shows nothing until it is done: pip finds the objects.
phase "build: the rest of the kernels, and the operators"
wait "$kernels" || { cat "$log" >&2 && exit 1; }
"$venv/bin/python" setup.py build_ext --inplace 2>&1 | counted || { cat "$log" >&2 && exit 1; }

phase "install: dlkernels[$extra]"
pip_install --no-build-isolation --editable ".[$extra]"

# The tests of `fuse` use torchvision's models. Its wheels pin one torch, which may not be this one: so without their
# dependencies, in the release that goes with torch 2.N. Where there is none, those tests are skipped and say so.
if [[ $extra == dev ]]; then
  release=$("$venv/bin/python" -c 'import torch; print(int(torch.__version__.split(".")[1]) + 15)')
  pip_install --no-deps "torchvision==0.$release.*" pillow ||
    echo "no torchvision 0.$release for this torch: the tests of its models will be skipped" >&2
fi
phase "ready"
printf '%s' "$phases" | awk -F '\t' '$2 > 0' >"$venv/phases"
