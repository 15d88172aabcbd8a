#!/usr/bin/env bash
# Train on one host with N processes: one per GPU or, without GPUs, N ranks on its cores.
#   launchers/local.sh [--dry-run] N RUN.yaml [--set KEY=VALUE ...]
# --dry-run prints the command and starts nothing.
set -euo pipefail

start=(exec)
show() { printf '%q' "$1" && printf ' %q' "${@:2}" && echo; }
if [[ ${1-} == --dry-run ]]; then start=(show) && shift; fi

ranks=${1:?usage: launchers/local.sh [--dry-run] N RUN.yaml [--set KEY=VALUE ...]}
shift
threads=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}     # the ranks share the cores

"${start[@]}" env OMP_NUM_THREADS="$threads" \
    torchrun --standalone --nproc-per-node "$ranks" -m megagrow train "$@"
