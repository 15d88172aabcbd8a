"""Delay line between two bridges, instead of tc netem, which many kernels lack.

    python tools/hosts/wire.py SECONDS

Creates the devices wire-near and wire-far in its network namespace, prints `ready`, and forwards
the frames of each device to the other after SECONDS, without loss or reordering. Exits with its
standard input. Started by tools/hosts/namespaces.py.
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
"""Maximum size of a frame in bytes."""


def open_end(name: str) -> int:
    """Create a TAP device and return its file descriptor."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_WITHOUT_HEADER))
    return end


def forward(ends: tuple[int, int], delay: float) -> None:
    """Forward frames between two devices after `delay` seconds until standard input ends."""
    others = dict(zip(ends, reversed(ends), strict=True))
    queue: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, queue[0][0] - time.monotonic()) if queue else None
        ready, _, _ = select.select([*ends, 0], [], [], wait)
        if 0 in ready:
            return
        now = time.monotonic()
        for end in ready:
            while (frame := read(end)) is not None:
                queue.append((now + delay, others[end], frame))
        while queue and queue[0][0] <= now:
            _, end, frame = queue.popleft()
            write(end, frame)


def read(end: int) -> bytes | None:
    """Return the next frame, or None if there is none."""
    try:
        return os.read(end, FRAME)
    except OSError:  # no frame, or the device is down
        return None


def write(end: int, frame: bytes) -> None:
    """Send a frame to a device; it is dropped while the device is down."""
    try:
        os.write(end, frame)
    except OSError:
        return


if __name__ == "__main__":
    # Real-time priority: the delay must not depend on the load of the hosts.
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    pair = (open_end("wire-near"), open_end("wire-far"))
    print("ready", flush=True)
    forward(pair, float(sys.argv[1]))
