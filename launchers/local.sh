#!/usr/bin/env bash
# One machine: a run on N processes, one for each GPU or, without GPUs, N ranks on its cores.
#   launchers/local.sh N RUN.yaml [--set KEY=VALUE ...]
set -euo pipefail

ranks=${1:?usage: launchers/local.sh N RUN.yaml [--set KEY=VALUE ...]}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}

exec torchrun --standalone --nproc-per-node "$ranks" -m megagrow train "$@"
