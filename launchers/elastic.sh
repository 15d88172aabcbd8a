#!/usr/bin/env bash
# Train on MIN to MAX hosts, as many as are available; start it on each with equal arguments.
#   launchers/elastic.sh [--dry-run] MIN:MAX N FIRST_HOST[:PORT] RUN.yaml [--set KEY=VALUE ...]
# N is the number of processes per host. FIRST_HOST is the rendezvous host, one of the hosts.
# When a rank or host fails, torchrun restarts all ranks (MAX_RESTARTS times, 10 by default); when a
# host joins it does too, without counting. The run resumes from its newest checkpoint, resharded to
# the available ranks. Every possible number of ranks must be valid: check with
# `megagrow train --dry-run --world N RUN.yaml`. Errors in the run file are retried, too.
# --dry-run prints the command and starts nothing.
set -euo pipefail

start=(exec)
show() { printf '%q' "$1" && printf ' %q' "${@:2}" && echo; }
if [[ ${1-} == --dry-run ]]; then start=(show) && shift; fi

usage="usage: launchers/elastic.sh [--dry-run] MIN:MAX N FIRST_HOST[:PORT] RUN.yaml [...]"
hosts=${1:?$usage} ranks=${2:?$usage} endpoint=${3:?$usage}
shift 3
[[ $endpoint == *:* ]] || endpoint+=:29400
# Jobs that share a rendezvous endpoint need different names; default: the name of the run file.
name=${JOB_NAME:-$(basename -- "${1:?$usage}" .yaml)}

"${start[@]}" torchrun --nnodes "$hosts" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$name" \
    --max-restarts "${MAX_RESTARTS:-10}" -m megagrow train "$@"
