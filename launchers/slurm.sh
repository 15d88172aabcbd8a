#!/usr/bin/env bash
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR1@300
#SBATCH --requeue
# SLURM, one task for each GPU: a warning 5 minutes before the end saves a checkpoint and leaves.
#   sbatch --nodes N launchers/slurm.sh RUN.yaml [--set KEY=VALUE ...]
# srun starts the ranks itself, without torchrun: so the signal reaches them, and nobody ends them
# 30 seconds later. Exit code 0 is the end or a stop; `scontrol requeue` after a stop goes on.
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}

exec srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python -m megagrow train "$@"' megagrow "$@"
