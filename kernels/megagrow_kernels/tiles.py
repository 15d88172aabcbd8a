"""Tile sizes of the kernels: one committed table per op, read by a pure function.

A table is a file `tiles/OP.json`, written by `tools/gpu/tune_kernels.py` on a GPU and committed. It
maps a compute capability to rows that are tried in order. A row holds `when` (features that must be
equal), `up_to` (upper bounds of features), `use` (launch configuration: tile sizes, num_warps,
num_stages) and `measured` (device, date and time, or null). All ranks therefore use the same tiles,
and no run pauses to autotune.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

Row = dict[str, Any]


@cache
def select(op: str, architecture: int, **features: int | bool | str) -> Mapping[str, int]:
    """Return the launch configuration of an op's kernel for features such as head_dim=128. Cached.

    Uses the rows of the newest listed architecture that is not newer than `architecture`, and the
    first of them that matches. Raises LookupError, naming op and features, if no row matches.
    """
    return MappingProxyType(row(op, architecture, **features)["use"])


def row(op: str, architecture: int, **features: int | bool | str) -> Row:
    """Return the matching row of `rows` itself. Raises LookupError as `select` does."""
    for candidate in rows_for(op, architecture):
        equal = all(features[name] == value for name, value in candidate["when"].items())
        if equal and all(features[name] <= bound for name, bound in candidate["up_to"].items()):
            return candidate
    listing = ", ".join(f"{name}={value}" for name, value in features.items())
    raise LookupError(f"tiles/{op}.json has no row for architecture {architecture}, {listing}")


def rows_for(op: str, architecture: int) -> list[Row]:
    """Return the rows that an architecture uses, possibly those of an older architecture."""
    table = rows(op)
    usable = [known for known in table if known <= architecture]
    return table[max(usable)] if usable else []


@cache
def rows(op: str) -> dict[int, list[Row]]:
    """Read the table of an op, compute capability to rows. Cached."""
    text = resources.files("megagrow_kernels").joinpath("tiles", f"{op}.json").read_text("utf-8")
    return {int(architecture): rows for architecture, rows in json.loads(text).items()}


@contextmanager
def override(architecture: int, tables: Mapping[str, list[Row]]) -> Iterator[None]:
    """Replace the rows of an architecture in some tables within the context."""
    saved = {op: dict(rows(op)) for op in tables}
    try:
        for op, replacement in tables.items():
            rows(op)[architecture] = replacement
        select.cache_clear()
        yield
    finally:
        for op, original in saved.items():
            rows(op).clear()
            rows(op).update(original)
        select.cache_clear()
