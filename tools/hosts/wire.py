"""A long cable between two bridges, in the place of tc's netem, which many kernels lack.

    hosts_wire.py SECONDS

Makes the devices wire-near and wire-far in the network namespace that it is started in, says
`ready`, and gives to each what was sent to the other, SECONDS later; it never loses or reorders
anything. Ends with its standard input. See hosts.py.
"""

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
TAP_WITHOUT_HEADER = 0x0002 | 0x1000
FRAME = 1 << 16
"""Bytes that a frame has at most."""


def open_end(name: str) -> int:
    """One end of the cable: a device that gives its frames to this process."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_WITHOUT_HEADER))
    return end


def carry(ends: tuple[int, int], delay: float) -> None:
    """Carries frames between two ends until standard input ends; delay in seconds."""
    others = dict(zip(ends, reversed(ends), strict=True))
    on_the_way: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        ready, _, _ = select.select([*ends, 0], [], [], wait)
        if 0 in ready:
            return
        now = time.monotonic()
        for end in ready:
            while (frame := read(end)) is not None:
                on_the_way.append((now + delay, others[end], frame))
        while on_the_way and on_the_way[0][0] <= now:
            _, end, frame = on_the_way.popleft()
            write(end, frame)


def read(end: int) -> bytes | None:
    """The next frame that is there."""
    try:
        return os.read(end, FRAME)
    except OSError:  # none, or the device is not up yet
        return None


def write(end: int, frame: bytes) -> None:
    """Gives a frame to a device; while that is down it is lost, as anywhere."""
    try:
        os.write(end, frame)
    except OSError:
        return


if __name__ == "__main__":
    # A cable does not wait until the hosts have computed.
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    pair = (open_end("wire-near"), open_end("wire-far"))
    print("ready", flush=True)
    carry(pair, float(sys.argv[1]))
