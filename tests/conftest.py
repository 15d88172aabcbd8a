"""Every test process computes with one thread: repeatable, and safe to fork (see spawn.py)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
