"""What the tables of tiles are for: for each op, the calls that between them take every row.

The code of all of them is inspected by `tools/gpu/kernel_code.py`, and they are timed by
`tools/gpu/tune_kernels.py`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megagrow_kernels.tiles import Row, row, rows, rows_for

Features = dict[str, Any]

ROWS = 8192
DTYPES = {2: "bfloat16", 4: "float32"}
HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Op:
    """An op of `megagrow_kernels.calls`, and the tables that it reads."""

    tables: tuple[str, ...]
    features: Mapping[str, tuple[Any, ...]]
    """What the tables tell apart, and whatever else makes other kernels: typical values."""
    arguments: Callable[[Features], dict[str, Any]]
    """The arguments of a call that has such features."""


@dataclass(frozen=True)
class Case:
    """One call of an op, and which rows it takes of which table."""

    op: str
    features: Features
    arguments: dict[str, Any]
    rows: dict[str, Row]

    @property
    def specialised(self) -> bool:
        """Whether a row asks for warps of different work."""
        return any(row["use"].get("GENERATION", 1) == 2 for row in self.rows.values())


def _norm(features: Features) -> dict[str, Any]:
    return {"rows": ROWS, "width": features["width"], "dtype": DTYPES[features["bytes"]]}


def _swiglu(features: Features) -> dict[str, Any]:
    return {"rows": ROWS, "width": 5632, "dtype": DTYPES[features["bytes"]]}


def _heads(features: Features) -> dict[str, Any]:
    sizes = {"batch": 4, "sequence": 2048, "heads": 32, "groups": 8}
    return sizes | {"head_dim": features["head_dim"], "dtype": DTYPES[features["bytes"]]}


def _rope(features: Features) -> dict[str, Any]:
    return _heads(features) | {"table_dtype": DTYPES[features["bytes"]]}


def _attention(features: Features) -> dict[str, Any]:
    return _heads(features) | {"window": features["window"]}


def _vocabulary(features: Features) -> dict[str, Any]:
    return _norm(features) | {"real": features["width"], "ranks": 1}


_NORM = {"width": (1024, 2048, 2560, 4096), "bytes": (2, 4)}
_NORM_TABLES = ("rms_norm", "rms_norm_backward", "rms_norm_weight")
OPS = {
    "rms_norm": Op(_NORM_TABLES, _NORM, _norm),
    "add_rms_norm": Op(_NORM_TABLES, _NORM, _norm),
    "rope": Op(("rope",), {"head_dim": HEAD_DIMS, "bytes": (2, 4)}, _rope),
    "swiglu": Op(("swiglu",), {"bytes": (2, 4)}, _swiglu),
    "attention": Op(
        ("attention_forward", "attention_queries", "attention_keys"),
        {"head_dim": HEAD_DIMS, "bytes": (2, 4), "window": (None, 512)},
        _attention,
    ),
    "cross_entropy": Op(
        ("vocab_statistics", "combine_statistics", "vocab_gradient"),
        {"width": (32000, 128256), "bytes": (2, 4)},
        _vocabulary,
    ),
}


KERNELS = {
    "rms_norm": ("_forward_kernel",),
    "rms_norm_backward": ("_backward_kernel",),
    "rms_norm_weight": ("_weight_kernel",),
    "rope": ("_rope_kernel",),
    "swiglu": ("_forward_kernel", "_backward_kernel"),
    "attention_forward": ("_forward_kernel",),
    "attention_queries": ("_queries_kernel",),
    "attention_keys": ("_keys_kernel",),
    "vocab_statistics": ("_statistics_kernel",),
    "combine_statistics": ("_combine_kernel",),
    "vocab_gradient": ("_gradient_kernel",),
}
"""What is started with the tiles of a table, within its op."""


def tables() -> list[str]:
    """The tables of all ops, each once."""
    return list(dict.fromkeys(table for op in OPS.values() for table in op.tables))


def cases(op: str, architecture: int) -> Iterator[Case]:
    """Calls of an op on an architecture: all combinations of typical features, and of those at
    which a row ends, that its tables have rows for."""
    wanted = OPS[op]
    values = {name: set(known) for name, known in wanted.features.items()}
    for table in wanted.tables:
        for listed in rows_for(table, architecture):
            for name, value in (listed["when"] | listed["up_to"]).items():
                values[name].add(value)
    for chosen in itertools.product(*(_in_order(known) for known in values.values())):
        features = dict(zip(values, chosen, strict=True))
        try:
            taken = {table: row(table, architecture, **features) for table in wanted.tables}
        except LookupError:
            continue
        yield Case(op, features, wanted.arguments(features), taken)


def untaken(architecture: int) -> list[tuple[str, Row]]:
    """Rows of any table that no case of any op takes: nothing would ever use them."""
    taken = {
        (table, id(row))
        for op in OPS
        for case in cases(op, architecture)
        for table, row in case.rows.items()
    }
    return [
        (table, listed)
        for table in tables()
        for listed in rows_for(table, architecture)
        if (table, id(listed)) not in taken
    ]


@contextmanager
def replaced(architecture: int, tiles: Mapping[str, dict[str, int]]) -> Iterator[None]:
    """Within it, tables have one row for an architecture, which fits all: the tiles given."""
    before = {table: dict(rows(table)) for table in tiles}
    try:
        for table, use in tiles.items():
            rows(table)[architecture] = [{"when": {}, "up_to": {}, "use": use, "measured": None}]
        yield
    finally:
        for table, known in before.items():
            rows(table).clear()
            rows(table).update(known)


def _in_order(values: set[Any]) -> list[Any]:
    return sorted(values, key=lambda value: (value is not None, value))
