#!/usr/bin/env bash
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Train under SLURM with one task per GPU; requeues itself until the run is done.
#   sbatch --nodes N launchers/slurm.sh RUN.yaml [--set KEY=VALUE ...]
#   launchers/slurm.sh --dry-run RUN.yaml [...]     prints the command and starts nothing
# USR1, sent 5 minutes before the time limit, makes the run save a checkpoint and exit; so does a
# preemption (TERM) if a step and a save fit into SLURM's KillWait (often 30 s). The job is then
# requeued and resumes. srun starts the ranks without torchrun, so signals reach them and no
# launcher kills them before they have saved. Exit codes (docs/guides/fault-tolerance.md):
#   0          done
#   75         stopped by a signal: requeued without limit
#   1, 2, 3    bug, invalid input, diverged: not requeued, it would fail again
#   other      hung or dead rank, failed host: requeued MAX_FAILURES times (3) in total, recorded in
#              megagrow-JOBID.failures
set -euo pipefail

dry_run=false
show() { printf '%q' "$1" && printf ' %q' "${@:2}" && echo; }
if [[ ${1-} == --dry-run ]]; then dry_run=true && shift; fi
: "${1:?usage: sbatch --nodes N launchers/slurm.sh RUN.yaml [--set KEY=VALUE ...]}"

log() { echo "slurm.sh: $*" >&2; }

requeue() {
    log "$1; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}

if $dry_run; then
    MASTER_ADDR=FIRST_HOST
else
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${hosts%%$'\n'*}
fi
# One port per job: another job may run on the same hosts.
MASTER_PORT=${MASTER_PORT:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))}
# --kill-on-bad-exit=0: when a rank fails, the others report it and exit within seconds.
# --wait=60: when all exit after a signal, srun must not kill the last ones.
# --cpus-per-task: since 22.05 srun does not inherit the value given to sbatch.
# shellcheck disable=SC2016
command=(srun --kill-on-bad-exit=0 --wait=60
    ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}
    env MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT" bash -c
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' rank
    python -m megagrow train --stop-code 75 "$@")
if $dry_run; then
    show "${command[@]}"
    exit
fi

# Signals meant for the ranks may reach this script as well; it only waits for the ranks.
trap : TERM USR1
code=0
"${command[@]}" || code=$?

# A job that is canceled, preempted or on a lost host is COMPLETING now; SLURM requeues it itself in
# the latter two cases. SIGNALING: the USR1 warning may still be in delivery.
if [[ $code != 0 && $(scontrol show job "$SLURM_JOB_ID") != *JobState=@(RUNNING|SIGNALING)* ]]; then
    log "job $SLURM_JOB_ID is being terminated by SLURM, which decides whether to requeue it"
    exit "$code"
fi

failures=megagrow-$SLURM_JOB_ID.failures
case $code in
0 | 1 | 2 | 3) exit "$code" ;;
75) requeue "stopped by a signal" ;;
*)
    echo "$(date -Is) exit code $code on $SLURM_JOB_NODELIST" >>"$failures"
    if (($(wc -l <"$failures") > ${MAX_FAILURES:-3})); then
        log "exit code $code after ${MAX_FAILURES:-3} earlier failures, see $failures"
        exit "$code"
    fi
    requeue "exit code $code"
    ;;
esac
