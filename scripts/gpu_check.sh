#!/usr/bin/env bash
# All that needs a GPU, in under ten minutes and with no network: build for this card, CUDA tests,
# compute-sanitizer, benchmarks. One JSON with everything: ${OUT:-benchmarks/results}/gpu_check.json.
#
#   scripts/gpu_check.sh        PYTHON chooses the interpreter, which has PyTorch with CUDA
#
# Exit status: 0, all passed; 1, something failed; 2, there is nothing to check it on.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python3}" "$root/scripts/gpu_check.py" "${OUT:-$root/benchmarks/results}"
