#!/usr/bin/env bash
# Formatting, style and types, with the tools on PATH; `lint.sh --fix` repairs what can be repaired.
set -euo pipefail
cd "$(dirname "$0")/.."
mapfile -t cpp < <(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' | sort)

if [[ ${1-} == --fix ]]; then
  ruff check --fix .
  ruff format .
  clang-format -i "${cpp[@]}"
else
  ruff check .
  ruff format --check .
  clang-format --dry-run -Werror "${cpp[@]}"
fi
mypy
