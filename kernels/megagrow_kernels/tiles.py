"""The tiles that kernels work in: a frozen table per op, and the pure function that reads it.

A table is a file `tiles/OP.json`, written by `tools/gpu/tune_kernels.py` on a GPU and committed. It
maps a compute capability to rows that are tried in their order. A row holds `when` (features that
have to be equal), `up_to` (features that may be at most so large), `use` (what the kernel is
started with: its tile sizes, num_warps, num_stages) and `measured` (device, date and time, or
null). So every rank of a run takes the same tiles, and no run ever stands still to try some out.
"""

import json
from functools import cache
from importlib import resources
from typing import Any

Row = dict[str, Any]


def select(op: str, architecture: int, **features: int | bool | str) -> dict[str, int]:
    """What to start the kernel of an op with, for features such as head_dim=128.

    Takes the rows of the newest architecture listed that is not newer than the one at hand, and of
    these the first that fits. Raises LookupError, naming op and features, if none does.
    """
    return dict(row(op, architecture, **features)["use"])


def row(op: str, architecture: int, **features: int | bool | str) -> Row:
    """The row that `select` takes, of `rows` itself. Raises as it does."""
    for listed in rows_for(op, architecture):
        equal = all(features[name] == value for name, value in listed["when"].items())
        if equal and all(features[name] <= most for name, most in listed["up_to"].items()):
            return listed
    shown = ", ".join(f"{name}={value}" for name, value in features.items())
    raise LookupError(f"tiles/{op}.json has no row for architecture {architecture}, {shown}")


def rows_for(op: str, architecture: int) -> list[Row]:
    """The rows that an architecture uses, which may be those of an older one."""
    table = rows(op)
    listed = [known for known in table if known <= architecture]
    return table[max(listed)] if listed else []


@cache
def rows(op: str) -> dict[int, list[Row]]:
    """The whole table of an op: compute capability to rows. Read once."""
    text = resources.files("megagrow_kernels").joinpath("tiles", f"{op}.json").read_text("utf-8")
    return {int(architecture): rows for architecture, rows in json.loads(text).items()}
