#!/usr/bin/env bash
# compute-sanitizer over every compiled program at small shapes: tests/gpu/sanitize.sh [words of a check's name]
# Needs a GPU. Kernels are built first if they are not in the cache.
set -euo pipefail
here="$(dirname "$0")"
for tool in memcheck synccheck racecheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 5 --kernel-name kernel_substring=hsa_ \
    "${PYTHON:-python3}" "$here/check.py" --small --only "${*:-}"
done
