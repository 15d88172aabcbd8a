"""Several hosts on one machine, for trying what happens between them: Linux namespaces.

Each host has processes, a name, an address, shared memory and a loopback device of its own, and a
cable (a veth pair) to a switch (a bridge in a namespace of its own, so that nothing of this machine
changes). Cables can be cut and mended, made slow (tc tbf), and long (wire.py). The program
that made the hosts holds a pipe to each: however it ends, every process on them is killed by the
kernel, and the network is gone with them.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("ip", "tc", "unshare", "nsenter")
DEVICE = "eth0"
"""What the cable is called on each host."""
NETWORK = f"GLOO_SOCKET_IFNAME={DEVICE}"
"""What gloo has to be told: it would else take the device that the host's name leads to, which on
many systems is the loopback device."""
MTU = 9000
"""Bytes of a frame, as on most clusters."""
SENT_COLUMN = 8
"""Of the counts of a device in /proc/net/dev: the bytes it has sent."""
QUEUE = ("burst", "128kb", "latency", "200ms")
"""How a slow cable lets packets wait."""

LIVE = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo ready
read -r _
"""
"""The first process of a host; it ends with the pipe that it reads, and all others with it."""


def missing() -> str | None:
    """Why hosts cannot be made here, in words; None if they can."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        return f"needs the commands {', '.join(absent)} (iproute2, util-linux)"
    try:
        with Hosts(1) as hosts:
            hosts.limit("1gbit")
    except HostsError as error:
        return f"needs root, and a kernel with namespaces, veth, bridge and tbf: {error}"
    return None


class HostsError(Exception):
    """A host, or something of the network between them, could not be made."""


@dataclass(frozen=True)
class Host:
    """A host: its name, its address, and its first process as this machine numbers it."""

    name: str
    address: str
    first: int

    def words(self, command: tuple[object, ...]) -> list[str]:
        """The command that runs a command on this host, in the root of the repository."""
        enter = ["nsenter", "-t", str(self.first), "-n", "-u", "-i", "-m", "-p", "--"]
        setting = ["env", f"--chdir={ROOT}", NETWORK]
        return [*enter, *setting, *map(str, command)]

    def start(self, *command: object, **options: Any) -> subprocess.Popen[str]:
        """Starts a command on this host."""
        words = self.words(command)
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, text=True, **options)

    def processes(self) -> list[str]:
        """The command lines of all that runs on it, but for what keeps it alive."""
        done = _run(*self.words(("ps", "-e", "-o", "pid=,args=")))
        lines = [line.split(maxsplit=1) for line in done.splitlines()]
        return [words for pid, words in lines if pid != "1" and not words.startswith("ps -e")]


class Hosts:
    """A context in which `count` hosts, host0 and on, are there.

    round_trip: seconds that a packet and its answer take longer than they do on this machine,
    between the first half of the hosts and the others. Raises HostsError.
    """

    def __init__(self, count: int, round_trip: float = 0.0) -> None:
        self._round_trip = round_trip
        self._holders: list[subprocess.Popen[str]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="megagrow-hosts-")
        self._names = {f"host{i}": f"10.77.0.{i + 1}" for i in range(count)}
        self.hosts: list[Host] = []

    def __enter__(self) -> "Hosts":
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self._holders:
            # The first process of a host ends, the kernel kills the others, and all are gone.
            holder.communicate()
        self._folder.cleanup()

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def cut(self, host: Host) -> None:
        """Takes the link of a host down: from now on it hears nobody, and nobody hears it."""
        self._on(host.first, "ip", "link", "set", DEVICE, "down")

    def mend(self, host: Host) -> None:
        """The link of a host is up again."""
        self._on(host.first, "ip", "link", "set", DEVICE, "up")

    def limit(self, rate: str) -> None:
        """What each host can send, in tc's words: "100mbit"."""
        for host in self.hosts:
            self._on(
                host.first, *f"tc qdisc replace dev {DEVICE} root tbf rate".split(), rate, *QUEUE
            )

    def sent(self, host: Host) -> int:
        """Bytes that a host has sent so far, with all headers."""
        lines = Path(f"/proc/{host.first}/net/dev").read_text(encoding="ascii").splitlines()
        (counts,) = (line.split(":")[1] for line in lines if line.strip().startswith(DEVICE))
        return int(counts.split()[SENT_COLUMN])

    def _make(self) -> None:
        table = Path(self._folder.name) / "hosts"
        # The second form is what torch looks up of who connects to a socket that knows IPv6 too.
        forms = ("", "::ffff:")
        lines = [f"{f}{address} {name}" for f in forms for name, address in self._names.items()]
        table.write_text(
            "\n".join(["127.0.0.1 localhost", "::ffff:127.0.0.1 localhost", *lines, ""]),
            encoding="ascii",
        )
        switch = self._live("switch", table)
        bridges = ["near", "far"] if self._round_trip else ["near"]
        for bridge in bridges:
            self._on(switch, *f"ip link add {bridge} mtu {MTU} type bridge".split())
            self._on(switch, *f"ip link set {bridge} up".split())
        for number, (name, address) in enumerate(self._names.items()):
            first = self._live(name, table)
            port, bridge = f"port{number}", bridges[number * len(bridges) // len(self._names)]
            pair = f"ip link add {DEVICE} mtu {MTU} netns {first} type veth"
            _run(*pair.split(), *f"peer name {port} mtu {MTU} netns {switch}".split())
            self._on(switch, *f"ip link set {port} master {bridge} up".split())
            self._on(first, *f"ip address add {address}/24 dev {DEVICE}".split())
            self._on(first, *f"ip link set {DEVICE} up".split())
            self.hosts.append(Host(name, address, first))
        if self._round_trip:
            self._lay_wire(switch)

    def _live(self, name: str, table: Path) -> int:
        """The first process of a new host."""
        own = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child")
        words = ("unshare", *own, "--mount-proc", "sh", "-c", LIVE, "sh", name, table)
        holder = self._hold(words)
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        return int(children.read_text(encoding="ascii"))

    def _lay_wire(self, switch: int) -> None:
        wire = Path(__file__).with_name("wire.py")
        words = ("nsenter", "-t", switch, "-n", "--", sys.executable, wire, self._round_trip / 2)
        self._hold(words)
        for bridge in ("near", "far"):
            self._on(switch, *f"ip link set wire-{bridge} mtu {MTU} master {bridge} up".split())

    def _hold(self, words: tuple[object, ...]) -> subprocess.Popen[str]:
        """Starts what runs until its standard input, or this program, has ended."""
        holder = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._holders.append(holder)
        first = _stream(holder.stdout).readline()
        if first != "ready\n":
            raise HostsError((first + _stream(holder.stdout).read()).strip())
        return holder

    def _on(self, first: int, *words: str) -> str:
        """What a command of this machine says in the network of a host, or of the switch."""
        return _run("nsenter", "-t", str(first), "-n", "--", *words)


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise HostsError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
