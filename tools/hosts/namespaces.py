"""Several hosts on one machine, emulated by Linux namespaces.

Each host has its own processes, name, address, shared memory and loopback device, and a link (a
veth pair) to a switch (a bridge in a separate namespace, so that the machine itself is unchanged).
Links can be taken down and up, limited in rate (tc tbf) and delayed (wire.py). The program that
creates the hosts holds a pipe to each. When it exits for any reason, the kernel kills all processes
of the hosts and removes the network.
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
"""Name of the network device of each host."""
NETWORK = f"GLOO_SOCKET_IFNAME={DEVICE}"
"""Network device of gloo. Its default is the device of the host name, which is the loopback device
on many systems."""
MTU = 9000
"""Frame size in bytes, as on most clusters."""
SENT_COLUMN = 8
"""Column of a device in /proc/net/dev with the bytes sent."""
QUEUE = ("burst", "128kb", "latency", "200ms")
"""Queue of a rate-limited link."""

INIT = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo ready
read -r _
"""
"""Script of the init process of a host; it exits with its pipe, and all others with it."""


def unsupported_reason() -> str | None:
    """Return the reason why hosts cannot be created, or None if they can."""
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
    """A host or its network could not be created."""


@dataclass(frozen=True)
class Host:
    """One emulated host."""

    name: str
    address: str
    init_pid: int
    """Process id of its init process on this machine."""

    def enter(self, command: tuple[object, ...]) -> list[str]:
        """Return the command that runs a command on this host, in the root of the repository."""
        namespaces = ["nsenter", "-t", str(self.init_pid), "-n", "-u", "-i", "-m", "-p", "--"]
        setting = ["env", f"--chdir={ROOT}", NETWORK]
        return [*namespaces, *setting, *map(str, command)]

    def start(self, *command: object, **options: Any) -> subprocess.Popen[str]:
        """Start a command on this host."""
        return subprocess.Popen(self.enter(command), stdin=subprocess.DEVNULL, text=True, **options)

    def processes(self) -> list[str]:
        """Return the command lines of all processes except the init process."""
        done = _run(*self.enter(("ps", "-e", "-o", "pid=,args=")))
        lines = [line.split(maxsplit=1) for line in done.splitlines()]
        return [text for pid, text in lines if pid != "1" and not text.startswith("ps -e")]


class Hosts:
    """Context manager of `count` hosts: host0, host1 and so on.

    `round_trip` is the additional round-trip time in seconds between the first half of the hosts
    and the others. Raises HostsError.
    """

    def __init__(self, count: int, round_trip: float = 0.0) -> None:
        self._round_trip = round_trip
        self._holders: list[subprocess.Popen[str]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="megagrow-hosts-")
        self._names = {f"host{i}": f"10.77.0.{i + 1}" for i in range(count)}
        self.hosts: list[Host] = []

    def __enter__(self) -> "Hosts":
        try:
            self._create()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self._holders:
            # The init process exits, and the kernel kills the other processes of the host.
            holder.communicate()
        self._folder.cleanup()

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def disconnect(self, host: Host) -> None:
        """Take the link of a host down."""
        self._on(host.init_pid, "ip", "link", "set", DEVICE, "down")

    def reconnect(self, host: Host) -> None:
        """Take the link of a host up again."""
        self._on(host.init_pid, "ip", "link", "set", DEVICE, "up")

    def limit(self, rate: str) -> None:
        """Limit the send rate of each host, in the notation of tc: "100mbit"."""
        for host in self.hosts:
            self._on(
                host.init_pid, *f"tc qdisc replace dev {DEVICE} root tbf rate".split(), rate, *QUEUE
            )

    def sent(self, host: Host) -> int:
        """Return the bytes that a host has sent so far, with all headers."""
        lines = Path(f"/proc/{host.init_pid}/net/dev").read_text(encoding="ascii").splitlines()
        (counts,) = (line.split(":")[1] for line in lines if line.strip().startswith(DEVICE))
        return int(counts.split()[SENT_COLUMN])

    def _create(self) -> None:
        table = Path(self._folder.name) / "hosts"
        # torch looks up the second form for peers that connect to an IPv6 socket.
        forms = ("", "::ffff:")
        lines = [f"{f}{address} {name}" for f in forms for name, address in self._names.items()]
        table.write_text(
            "\n".join(["127.0.0.1 localhost", "::ffff:127.0.0.1 localhost", *lines, ""]),
            encoding="ascii",
        )
        switch = self._start_init("switch", table)
        bridges = ["near", "far"] if self._round_trip else ["near"]
        for bridge in bridges:
            self._on(switch, *f"ip link add {bridge} mtu {MTU} type bridge".split())
            self._on(switch, *f"ip link set {bridge} up".split())
        for number, (name, address) in enumerate(self._names.items()):
            init_pid = self._start_init(name, table)
            port, bridge = f"port{number}", bridges[number * len(bridges) // len(self._names)]
            pair = f"ip link add {DEVICE} mtu {MTU} netns {init_pid} type veth"
            _run(*pair.split(), *f"peer name {port} mtu {MTU} netns {switch}".split())
            self._on(switch, *f"ip link set {port} master {bridge} up".split())
            self._on(init_pid, *f"ip address add {address}/24 dev {DEVICE}".split())
            self._on(init_pid, *f"ip link set {DEVICE} up".split())
            self.hosts.append(Host(name, address, init_pid))
        if self._round_trip:
            self._start_wire(switch)

    def _start_init(self, name: str, table: Path) -> int:
        """Start the init process of a host or of the switch and return its process id."""
        isolated = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child")
        words = ("unshare", *isolated, "--mount-proc", "sh", "-c", INIT, "sh", name, table)
        holder = self._hold(words)
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        return int(children.read_text(encoding="ascii"))

    def _start_wire(self, switch: int) -> None:
        wire = Path(__file__).with_name("wire.py")
        words = ("nsenter", "-t", switch, "-n", "--", sys.executable, wire, self._round_trip / 2)
        self._hold(words)
        for bridge in ("near", "far"):
            self._on(switch, *f"ip link set wire-{bridge} mtu {MTU} master {bridge} up".split())

    def _hold(self, words: tuple[object, ...]) -> subprocess.Popen[str]:
        """Start a process that exits with its standard input or with this program."""
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

    def _on(self, init_pid: int, *words: str) -> str:
        """Run a command of this machine in the network of a host or of the switch."""
        return _run("nsenter", "-t", str(init_pid), "-n", "--", *words)


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise HostsError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
