#!/usr/bin/env bash
# Between MIN and MAX machines, as many as are there: start it on each of them, with equal words.
#   launchers/elastic.sh [--dry-run] MIN:MAX N FIRST_HOST[:PORT] RUN.yaml [--set KEY=VALUE ...]
# N is the number of processes on each machine. FIRST_HOST is one of the machines, where all meet.
# When a rank fails or its machine is gone, torchrun starts all ranks again (MAX_RESTARTS times, 10
# by default), as when a machine joins (which does not count). The run goes on from its newest
# checkpoint, resharded to the ranks that are there. Each number of ranks must be possible: look
# with `megagrow train --dry-run --world N RUN.yaml`. A mistake in the run file is tried again, too.
# --dry-run prints the command and starts nothing.
set -euo pipefail

start=(exec)
show() { printf '%q' "$1" && printf ' %q' "${@:2}" && echo; }
if [[ ${1-} == --dry-run ]]; then start=(show) && shift; fi

usage="usage: launchers/elastic.sh [--dry-run] MIN:MAX N FIRST_HOST[:PORT] RUN.yaml [...]"
hosts=${1:?$usage} ranks=${2:?$usage} meeting=${3:?$usage}
shift 3
[[ $meeting == *:* ]] || meeting+=:29400
# Jobs that use one meeting place need different names: by default that of the run file.
name=${JOB_NAME:-$(basename -- "${1:?$usage}" .yaml)}

"${start[@]}" torchrun --nnodes "$hosts" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$meeting" --rdzv-id "$name" \
    --max-restarts "${MAX_RESTARTS:-10}" -m megagrow train "$@"
