#!/usr/bin/env bash
# All that needs a GPU, in under ten minutes and with no network: build for this card, CUDA tests beside
# compute-sanitizer's four tools on every instantiation of the kernels, each operator's bandwidth, whole
# steps. One JSON with everything, written as it is found: ${OUT:-benchmarks/results}/gpu_check.json.
# What the steps print lies beside it, in gpu_check/.
#
#   scripts/gpu_check.sh [STEP...]   those steps alone; default: all
#                               PYTHON chooses the interpreter, which has PyTorch with CUDA
#                               FASTJAC_PREBUILT=1: the libraries are there, built from these sources
#
# Exit status: 0, all passed; 1, something failed; 2, there is nothing to check it on.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python3}" "$root/scripts/gpu_check.py" "${OUT:-$root/benchmarks/results}" "$@"
