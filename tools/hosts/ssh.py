"""An ssh server on each of several hosts (hosts.py), with keys that were made for it alone.

Nothing of this machine changes: the servers run in the namespaces of the hosts, and the client is a
script of the name `ssh` that gives the real one the keys.
"""

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tools.hosts.namespaces import Host

COMMANDS = ("pdsh", "ssh", "sshd", "ssh-keygen")
SYSTEM = "/usr/sbin:/sbin"
"""sshd is not where a user's programs are."""
SECONDS = 20.0
"""In which a server answers."""

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
"""sshd wants an empty folder there; the /run of a host is its own."""


def missing() -> str | None:
    """Why hosts cannot be reached by ssh here, in words; None if they can."""
    absent = [name for name in COMMANDS if _where(name) is None]
    return f"needs the commands {', '.join(absent)} (pdsh, openssh)" if absent else None


def open_doors(hosts: Sequence[Host], folder: Path) -> Path:
    """Starts the servers, which end with their hosts; returns the folder of `ssh` for PATH.

    Raises AssertionError if a host cannot be reached from the first one.
    """
    folder.mkdir(mode=0o700)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True
    )
    places = {"folder": folder, "ssh": _where("ssh"), "sshd": _where("sshd")}
    (folder / "server").write_text(SERVER.format_map(places), encoding="utf-8")
    client = folder / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text(CLIENT.format_map(places), encoding="utf-8")
    client.chmod(0o755)
    for host in hosts:
        host.start("sh", "-c", BEGIN.format_map(places), stderr=subprocess.DEVNULL)
    for host in hosts:
        _wait_for(hosts[0], host, client)
    return client.parent


def _wait_for(first: Host, host: Host, client: Path) -> None:
    until = time.monotonic() + SECONDS
    while first.start(client, host.name, "true", stderr=subprocess.DEVNULL).wait() != 0:
        if time.monotonic() > until:
            raise AssertionError(f"{host.name} cannot be reached by ssh as this user")
        time.sleep(0.2)


def _where(command: str) -> str | None:
    return shutil.which(command) or shutil.which(command, path=SYSTEM)
