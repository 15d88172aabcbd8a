#!/usr/bin/env bash
# Several machines that reach each other by ssh or pdsh: start it on one of them.
#   launchers/deepspeed.sh HOSTFILE RUN.yaml [--set KEY=VALUE ...]
# The hostfile has a line `HOST slots=8` for each machine. All of them need this environment, the
# corpora and the run's output_dir at the same paths (a shared file system). NCCL_*, PYTHON* and the
# variables in ~/.deepspeed_env are passed on to them.
set -euo pipefail

hostfile=${1:?usage: launchers/deepspeed.sh HOSTFILE RUN.yaml [--set KEY=VALUE ...]}
shift

exec deepspeed --hostfile "$hostfile" --module megagrow train "$@"
