#!/usr/bin/env bash
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# SLURM, one task for each GPU; goes back into the queue by itself until the run is done.
#   sbatch --nodes N launchers/slurm.sh RUN.yaml [--set KEY=VALUE ...]
#   launchers/slurm.sh --dry-run RUN.yaml [...]     prints the command and starts nothing
# A warning 5 minutes before the end of the job's time (USR1) lets the run save a checkpoint and
# leave; so does a preemption (TERM), if a step and a save fit into SLURM's KillWait (often 30 s).
# Then the job is requeued, and goes on from there. srun starts the ranks itself, without torchrun:
# so the signal reaches them, and nobody ends them before they have saved. By exit code
# (docs/guides/fault-tolerance.md):
#   0          done
#   75         stopped by a signal: requeued, as often as it takes
#   1, 2, 3    a bug, a mistake in the input, diverged: not requeued, it would come again
#   else       a rank hangs or died, a host failed: requeued, MAX_FAILURES times (3) in all, which
#              are noted in megagrow-JOBID.failures
set -euo pipefail

dry_run=false
show() { printf '%q' "$1" && printf ' %q' "${@:2}" && echo; }
if [[ ${1-} == --dry-run ]]; then dry_run=true && shift; fi
: "${1:?usage: sbatch --nodes N launchers/slurm.sh RUN.yaml [--set KEY=VALUE ...]}"

say() { echo "slurm.sh: $*" >&2; }

# Once more from the queue.
requeue() {
    say "$1: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}

if $dry_run; then
    MASTER_ADDR=FIRST_HOST
else
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${hosts%%$'\n'*}
fi
# A port of this job's own: another one may be on the same hosts.
MASTER_PORT=${MASTER_PORT:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))}
# A bad exit of one rank ends no other one at once: they say who is missing, and end within seconds.
# When all leave after a signal, srun must not kill the last ones: it waits for a minute.
# From 22.05 on srun does not know by itself what sbatch was told of CPUs.
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

# A signal for the ranks may come to this script as well: it only waits for them.
trap : TERM USR1
code=0
"${command[@]}" || code=$?

# A job that its user cancels, or that SLURM preempts or takes off a lost host, is COMPLETING now;
# SLURM requeues the latter two by itself. SIGNALING: the warning may still be on its way.
if [[ $code != 0 && $(scontrol show job "$SLURM_JOB_ID") != *JobState=@(RUNNING|SIGNALING)* ]]; then
    say "job $SLURM_JOB_ID is being ended from outside: SLURM knows whether it comes again"
    exit "$code"
fi

failures=megagrow-$SLURM_JOB_ID.failures
case $code in
0 | 1 | 2 | 3) exit "$code" ;;
75) requeue "stopped by a signal" ;;
*)
    echo "$(date -Is) exit code $code on $SLURM_JOB_NODELIST" >>"$failures"
    if (($(wc -l <"$failures") > ${MAX_FAILURES:-3})); then
        say "exit code $code, after ${MAX_FAILURES:-3} failures: see $failures"
        exit "$code"
    fi
    requeue "exit code $code"
    ;;
esac
