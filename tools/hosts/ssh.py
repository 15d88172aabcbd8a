"""ssh servers on emulated hosts, with temporary keys.

The machine itself is unchanged: the servers run in the namespaces of the hosts, and the client is a
script named `ssh` that passes the keys to the installed client.
"""

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tools.hosts.namespaces import Host

COMMANDS = ("pdsh", "ssh", "sshd", "ssh-keygen")
SYSTEM = "/usr/sbin:/sbin"
"""Search path of sshd, which is not on a user's PATH."""
TIMEOUT = 20.0
"""Seconds until a server responds."""

SERVER = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
"""
CLIENT = """#!/bin/sh
exec {ssh} -F none -i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \\
    -o LogLevel=ERROR "$@"
"""
BEGIN = "mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && exec {sshd} -D -f {folder}/server"
"""sshd requires an empty folder /run/sshd; each host has its own /run."""


def unavailable_reason() -> str | None:
    """Return the reason why ssh cannot be used, or None if it can."""
    absent = [name for name in COMMANDS if _path_of(name) is None]
    return f"needs the commands {', '.join(absent)} (pdsh, openssh)" if absent else None


def start_servers(hosts: Sequence[Host], folder: Path) -> Path:
    """Start one server per host and return the folder of the `ssh` client for PATH.

    The servers exit with their hosts. Raises AssertionError if the first host cannot reach another.
    """
    folder.mkdir(mode=0o700)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True
    )
    values = {"folder": folder, "ssh": _path_of("ssh"), "sshd": _path_of("sshd")}
    (folder / "server").write_text(SERVER.format_map(values), encoding="utf-8")
    client = folder / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text(CLIENT.format_map(values), encoding="utf-8")
    client.chmod(0o755)
    for host in hosts:
        host.start("sh", "-c", BEGIN.format_map(values), stderr=subprocess.DEVNULL)
    for host in hosts:
        _wait_for(hosts[0], host, client)
    return client.parent


def _wait_for(first: Host, host: Host, client: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while first.start(client, host.name, "true", stderr=subprocess.DEVNULL).wait() != 0:
        if time.monotonic() > deadline:
            raise AssertionError(f"{host.name} cannot be reached by ssh as this user")
        time.sleep(0.2)


def _path_of(command: str) -> str | None:
    return shutil.which(command) or shutil.which(command, path=SYSTEM)
