#!/usr/bin/env bash
# Train on several hosts reachable by pdsh over ssh; start it on one of them.
#   launchers/deepspeed.sh [--dry-run] HOSTFILE RUN.yaml [--set KEY=VALUE ...]
# --dry-run checks the hostfile, prints the command and starts nothing.
# The hostfile has a line `HOST slots=8` for each host. All hosts need this environment, the corpora
# and the run's output_dir at the same paths (a shared file system). NCCL_*, PYTHON* and the
# variables in ~/.deepspeed_env are forwarded.
# ssh drops a lost host after a minute, so that this command ends too, with a nonzero exit code.
# After Ctrl-C or SIGTERM it exits at once with code 1; the ranks finish their step, save and exit,
# for which DeepSpeed gives them 30 seconds.
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

# Whoever can write or replace the hostfile decides where commands run. For a symbolic link, both
# the link and its target are checked.
[[ -f $hostfile ]] || refuse "$hostfile: no such hostfile"
for file in "$hostfile" "$(readlink -f -- "$hostfile")"; do
    folder=$(dirname -- "$file")
    mode=$(stat -L -c %a -- "$file")
    above=$(stat -L -c %a -- "$folder")
    if ((8#$mode & 8#0002)); then
        refuse "$file: the hostfile is world-writable; run chmod o-w on it and check its lines"
    elif ((8#$above & 8#0002 && !(8#$above & 8#1000))); then
        refuse "$file: its folder is world-writable; run chmod o-w $folder, or move the hostfile"
    fi
done

# User options take precedence: ssh uses the first of two equal options.
alive="${PDSH_SSH_ARGS_APPEND:+$PDSH_SSH_ARGS_APPEND }-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
"${start[@]}" env PDSH_SSH_ARGS_APPEND="$alive" \
    deepspeed --hostfile "$hostfile" --module megagrow train "$@"
