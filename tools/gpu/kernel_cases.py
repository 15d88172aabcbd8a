"""Calls of each op that together use every row of the tile tables.

`tools/gpu/kernel_code.py` inspects their machine code, and `tools/gpu/tune_kernels.py` times them.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megagrow_kernels.attention_hopper import fits
from megagrow_kernels.tiles import Row, override, row, rows_for
from tools.gpu.kernel_candidates import SPECIALIZED, is_specialized

Features = dict[str, Any]

ROWS = 8192
DTYPES = {2: "bfloat16", 4: "float32"}
HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class OpTables:
    """An op of `megagrow_kernels.calls`, and its tile tables."""

    tables: tuple[str, ...]
    features: Mapping[str, tuple[Any, ...]]
    """Typical values of the table features, and of other features that change the kernel."""
    arguments: Callable[[Features], dict[str, Any]]
    """Function from features to the arguments of a call."""
    derived: Callable[[int, Features], Features] = lambda architecture, features: {}
    """(architecture, features): features that follow from the others."""


@dataclass(frozen=True)
class KernelCase:
    """One call of an op, and the table rows it uses."""

    op: str
    features: Features
    arguments: dict[str, Any]
    rows: dict[str, Row]

    @property
    def specialized(self) -> bool:
        """True if a row selects the warp-specialized kernel."""
        return any(is_specialized(row["use"]) for row in self.rows.values())


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


def _generation(architecture: int, features: Features) -> Features:
    dtype = getattr(torch, DTYPES[features["bytes"]])
    return {SPECIALIZED: fits(architecture, features["head_dim"], dtype)}


def _vocabulary(features: Features) -> dict[str, Any]:
    return _norm(features) | {"real": features["width"], "ranks": 1}


def _channels(features: Features) -> dict[str, Any]:
    sizes = {"batch": 4, "sequence": 2048, "channels": 4096}
    return sizes | dict.fromkeys(("dtype", "parameter_dtype"), DTYPES[features["bytes"]])


def _conv(features: Features) -> dict[str, Any]:
    return _channels(features) | {"taps": 4}


def _scan(features: Features) -> dict[str, Any]:
    return _channels(features) | {"states": features["states"]}


_NORM = {"width": (1024, 2048, 2560, 4096), "bytes": (2, 4)}
_NORM_TABLES = ("rms_norm", "rms_norm_backward", "rms_norm_weight")
OPS = {
    "rms_norm": OpTables(_NORM_TABLES, _NORM, _norm),
    "add_rms_norm": OpTables(_NORM_TABLES, _NORM, _norm),
    "rope": OpTables(("rope",), {"head_dim": HEAD_DIMS, "bytes": (2, 4)}, _rope),
    "swiglu": OpTables(("swiglu",), {"bytes": (2, 4)}, _swiglu),
    "attention": OpTables(
        ("attention_forward", "attention_queries", "attention_keys"),
        {"head_dim": HEAD_DIMS, "bytes": (2, 4), "window": (None, 512)},
        _attention,
        _generation,
    ),
    "cross_entropy": OpTables(
        ("vocab_statistics", "combine_statistics", "vocab_gradient"),
        {"width": (32000, 128256), "bytes": (2, 4)},
        _vocabulary,
    ),
    "causal_conv": OpTables(("causal_conv", "causal_conv_backward"), {"bytes": (2, 4)}, _conv),
    "selective_scan": OpTables(
        ("selective_scan", "selective_scan_carry", "selective_scan_backward"),
        {"states": (16,), "bytes": (2, 4)},
        _scan,
    ),
}


KERNELS = {
    "rms_norm": ("_forward_kernel",),
    "rms_norm_backward": ("_backward_kernel",),
    "rms_norm_weight": ("_weight_kernel",),
    "rope": ("_rope_kernel",),
    "swiglu": ("_forward_kernel", "_backward_kernel"),
    "attention_forward": ("_forward_kernel", "_kernel"),
    "attention_queries": ("_queries_kernel",),
    "attention_keys": ("_keys_kernel",),
    "vocab_statistics": ("_statistics_kernel",),
    "combine_statistics": ("_combine_kernel",),
    "vocab_gradient": ("_gradient_kernel",),
    "causal_conv": ("_forward_kernel",),
    "causal_conv_backward": ("_backward_kernel",),
    "selective_scan": ("_summary_kernel", "_output_kernel"),
    "selective_scan_carry": ("_carry_kernel",),
    "selective_scan_backward": ("_gradient_kernel",),
}
"""Kernels launched with the tiles of a table, within its op."""


def tables() -> list[str]:
    """Return the tables of all ops, without duplicates."""
    return list(dict.fromkeys(table for op in OPS.values() for table in op.tables))


def cases(op: str, architecture: int) -> Iterator[KernelCase]:
    """Yield calls of an op on an architecture.

    They cover all combinations of typical features and of the bounds of table rows for which the
    op's tables have rows.
    """
    spec = OPS[op]
    values = {name: set(typical) for name, typical in spec.features.items()}
    for table in spec.tables:
        for candidate in rows_for(table, architecture):
            for name, value in (candidate["when"] | candidate["up_to"]).items():
                if name in values:
                    values[name].add(value)
    for combination in itertools.product(*(_in_order(options) for options in values.values())):
        features = dict(zip(values, combination, strict=True))
        features |= spec.derived(architecture, features)
        try:
            selected = {table: row(table, architecture, **features) for table in spec.tables}
        except LookupError:
            continue
        yield KernelCase(op, features, spec.arguments(features), selected)


def unused_rows(architecture: int) -> list[tuple[str, Row]]:
    """Return table rows that no case of any op uses."""
    used = {
        (table, id(row))
        for op in OPS
        for case in cases(op, architecture)
        for table, row in case.rows.items()
    }
    return [
        (table, candidate)
        for table in tables()
        for candidate in rows_for(table, architecture)
        if (table, id(candidate)) not in used
    ]


@contextmanager
def override_tiles(architecture: int, tiles: Mapping[str, dict[str, int]]) -> Iterator[None]:
    """Temporarily replace tables by one row for an architecture, which matches everything."""
    every: Row = {"when": {}, "up_to": {}, "measured": None}
    with override(architecture, {table: [every | {"use": use}] for table, use in tiles.items()}):
        yield


def _in_order(values: set[Any]) -> list[Any]:
    return sorted(values, key=lambda value: (value is not None, value))
