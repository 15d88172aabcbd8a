#!/usr/bin/env bash
# Several machines that reach each other by pdsh over ssh: start it on one of them.
#   launchers/deepspeed.sh [--dry-run] HOSTFILE RUN.yaml [--set KEY=VALUE ...]
# --dry-run checks the hostfile, prints the command and starts nothing.
# The hostfile has a line `HOST slots=8` for each machine. All of them need this environment, the
# corpora and the run's output_dir at the same paths (a shared file system). NCCL_*, PYTHON* and the
# variables in ~/.deepspeed_env are passed on to them.
# The ranks of a lost machine cannot tell that they have ended: ssh gives it up after a minute, so
# that this command ends too, not with 0. After Ctrl-C or SIGTERM it ends at once, with 1; the ranks
# finish their step, save and leave, for which DeepSpeed gives them 30 seconds.
set -euo pipefail

start=(exec)
show() { printf '%q' "$1" && printf ' %q' "${@:2}" && echo; }
if [[ ${1-} == --dry-run ]]; then start=(show) && shift; fi

hostfile=${1:?usage: launchers/deepspeed.sh [--dry-run] HOSTFILE RUN.yaml [--set KEY=VALUE ...]}
shift

refuse() {
    echo "error: $1" >&2
    exit 2
}

# Who can write the hostfile, or put another one in its place, decides where your commands run.
# A name that is a link is looked at with the file that it leads to.
[[ -f $hostfile ]] || refuse "$hostfile: no such hostfile"
for file in "$hostfile" "$(readlink -f -- "$hostfile")"; do
    folder=$(dirname -- "$file")
    mode=$(stat -L -c %a -- "$file")
    above=$(stat -L -c %a -- "$folder")
    if ((8#$mode & 8#0002)); then
        refuse "$file: everybody may write to this hostfile; chmod o-w it and check its lines"
    elif ((8#$above & 8#0002 && !(8#$above & 8#1000))); then
        refuse "$file: everybody may replace it; chmod o-w $folder, or move the hostfile"
    fi
done

# What the user gives counts: of two equal options ssh takes the first.
alive="${PDSH_SSH_ARGS_APPEND:+$PDSH_SSH_ARGS_APPEND }-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
"${start[@]}" env PDSH_SSH_ARGS_APPEND="$alive" \
    deepspeed --hostfile "$hostfile" --module megagrow train "$@"
