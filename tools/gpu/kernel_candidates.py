"""Which tiles are worth a trial, which of them is taken, and how a table of tiles is written. Pure.

A candidate is what a row of a table holds as `use`: tile sizes, num_warps, num_stages.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megagrow_kernels.tiles import Row

Tiles = dict[str, int]
Features = Mapping[str, Any]

LANES = 32
"""Threads in a warp."""
WIDE_HEAD = 128
"""Head dimensions above it leave no registers for both gradients of a block of keys."""
SAME = 0.01
"""Tiles whose times differ by less are equally fast: the first of them is taken, so that tables do
not change with the noise of a measurement."""

TOLD = {
    "rms_norm": ("width", "bytes"),
    "rms_norm_backward": ("width", "bytes"),
    "rms_norm_weight": ("width",),
    "rope": ("head_dim",),
    "swiglu": ("bytes",),
    "attention_forward": ("head_dim", "bytes"),
    "attention_queries": ("head_dim", "bytes"),
    "attention_keys": ("head_dim", "bytes"),
    "vocab_statistics": ("width",),
    "combine_statistics": (),
    "vocab_gradient": ("width",),
}
"""What an op tells of itself when it asks for its tiles, by table."""


def candidates(table: str, features: Features, architecture: int) -> list[Tiles]:
    """All tiles that may be fast: those that give each thread enough to do and not too much."""
    if table.startswith("attention"):
        return list(_attention(table, features["head_dim"], architecture))
    if table.startswith("rms_norm"):
        return list(_norm(table, features["width"]))
    return list(_ROWWISE[table]())


def _grid(**choices: Sequence[int]) -> Iterator[Tiles]:
    """All combinations, in the order in which they are written."""
    for chosen in itertools.product(*choices.values()):
        yield dict(zip(choices, chosen, strict=True))


def _norm(table: str, width: int) -> Iterator[Tiles]:
    if table == "rms_norm_weight":
        yield from _grid(ROWS=(16, 32, 64, 128), COLUMNS=(16, 32, 64, 128), num_warps=(2, 4, 8))
        return
    passes = {"STAGES": (1, 2, 3), "REREAD": (0, 1)} if table == "rms_norm_backward" else {}
    block = 1 << math.ceil(math.log2(width))
    for tiles in _grid(ROWS=(1, 2, 4, 8, 16, 32), **passes, num_warps=(1, 2, 4, 8, 16, 32)):
        if 4 <= tiles["ROWS"] * block / (LANES * tiles["num_warps"]) <= 64:
            yield tiles


def _rope() -> Iterator[Tiles]:
    return _grid(TOKENS=(1, 2, 4, 8, 16), HEADS=(2, 4, 8, 16), num_warps=(2, 4, 8))


def _swiglu() -> Iterator[Tiles]:
    return _grid(BLOCK=(512, 1024, 2048, 4096), num_warps=(2, 4, 8))


def _statistics() -> Iterator[Tiles]:
    for tiles in _grid(
        LANES=(64, 128, 256, 512), VECTOR=(4, 8, 16), num_warps=(2, 4, 8, 16), num_stages=(1, 2, 3)
    ):
        if tiles["LANES"] >= LANES * tiles["num_warps"]:
            yield tiles


def _combine() -> Iterator[Tiles]:
    return _grid(BLOCK=(64, 128, 256), num_warps=(1, 2, 4), num_stages=(1,))


def _gradient() -> Iterator[Tiles]:
    return _grid(BLOCK=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16), num_stages=(1,))


_ROWWISE = {
    "rope": _rope,
    "swiglu": _swiglu,
    "vocab_statistics": _statistics,
    "combine_statistics": _combine,
    "vocab_gradient": _gradient,
}


def _attention(table: str, head_dim: int, architecture: int) -> Iterator[Tiles]:
    """The block that a program keeps goes into a tile; the other one passes by, in smaller pieces
    (EDGE_N, EDGE_M) where causal order cuts. Where heads are wide a program that keeps keys may
    make dK and dV one after the other (SEPARATE)."""
    wide = head_dim > WIDE_HEAD
    shared = {"DESCRIPTORS": (0, 1) if architecture >= 90 else (0,)}
    shared |= {"num_warps": (4, 8), "num_stages": (1, 2) if wide else (1, 2, 3)}
    if table == "attention_keys":
        for tiles in _grid(BLOCK_M=(32, 64), BLOCK_N=(32, 64, 128), EDGE_M=(16, 32), **shared):
            yield tiles
            if wide:
                yield tiles | {"SEPARATE": 1}
        return
    for tiles in _grid(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), EDGE_N=(16, 32, 64), **shared):
        if tiles["EDGE_N"] <= tiles["BLOCK_N"]:
            yield tiles


def choose(seconds: Sequence[tuple[Tiles, float]]) -> tuple[Tiles, float]:
    """The fastest tiles with their time; of those that are equally fast the first."""
    least = min(time for _, time in seconds)
    return next((tiles, time) for tiles, time in seconds if time <= least * (1 + SAME))


def merged(told: Sequence[str], known: Sequence[Row], measured: Sequence[Row]) -> list[Row]:
    """The rows of an architecture: those that were measured, and what is still known beside them.

    A row that is not measured stays if it may still be taken. Rows come in the order of what they
    are good for, the narrowest first, as `told` names their features.
    """

    def reach(row: Row) -> tuple[float, ...]:
        return tuple(row["when"].get(name, row["up_to"].get(name, math.inf)) for name in told)

    kept = [row for row in known if not any(_covers(new, row) for new in measured)]
    return sorted([*measured, *kept], key=reach)


def conditions(told: Sequence[str], features: Features, known: Sequence[Row]) -> Row:
    """A row without tiles for what has these features, or less: `when` for those that the rows
    known so far want to be equal, `up_to` for the others."""
    exact = {name for row in known for name in row["when"]}
    return {
        "when": {name: features[name] for name in told if name in exact},
        "up_to": {name: features[name] for name in told if name not in exact},
    }


def text_of(table: Mapping[int, Sequence[Row]]) -> str:
    """A table as it stands in its file: one line per row."""
    parts = []
    for architecture, rows in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        parts.append(f'  "{architecture}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _covers(new: Row, old: Row) -> bool:
    """Whether all that the old row is good for is taken by the new one."""
    equal = all(old["when"].get(name) == value for name, value in new["when"].items())
    return equal and all(
        old["when"].get(name, old["up_to"].get(name, math.inf)) <= most
        for name, most in new["up_to"].items()
    )
