#!/usr/bin/env bash
# Start the ranks of one host, for schedulers that start one command per host (Kubernetes).
#   launchers/ranks.sh [--dry-run] N HOSTS HOST_RANK FIRST_HOST RUN.yaml [--set KEY=VALUE ...]
# N processes on each of HOSTS hosts; HOST_RANK is this host's index from 0; FIRST_HOST is the
# address of host 0, MASTER_PORT (29500) its port. Signals reach the ranks directly, and no launcher
# kills them before they have saved. Exit codes: docs/guides/fault-tolerance.md. If ranks differ,
# the lowest one is returned, which is the cause (1 a bug, 5 ranks that lost a peer); 75 means that
# a signal stopped the run before its end.
# --dry-run prints the command of each rank and starts nothing.
set -euo pipefail

dry_run=false
show() { printf '%q' "$1" && printf ' %q' "${@:2}" && echo; }
if [[ ${1-} == --dry-run ]]; then dry_run=true && shift; fi

usage="usage: launchers/ranks.sh [--dry-run] N HOSTS HOST_RANK FIRST_HOST RUN.yaml [...]"
ranks=${1:?$usage} hosts=${2:?$usage} host=${3:?$usage} first=${4:?$usage}
shift 4

pids=()
# Ranks that have already exited are no error.
# shellcheck disable=SC2329  # the traps call it
forward() { kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward USR1' USR1

for ((local_rank = 0; local_rank < ranks; local_rank++)); do
    command=(env RANK=$((host * ranks + local_rank)) LOCAL_RANK="$local_rank"
        WORLD_SIZE=$((hosts * ranks)) MASTER_ADDR="$first" MASTER_PORT="${MASTER_PORT:-29500}"
        python -m megagrow train --stop-code 75 "$@")
    if $dry_run; then
        show "${command[@]}"
    else
        "${command[@]}" &
        pids+=($!)
    fi
done

result=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    while kill -0 "$pid" 2>/dev/null; do    # a signal interrupts wait, not the rank
        code=0
        wait "$pid" || code=$?
    done
    if ((code && (result == 0 || code < result))); then result=$code; fi
done
exit "$result"
