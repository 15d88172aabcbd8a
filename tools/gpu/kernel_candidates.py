"""Tile candidates, selection of the fastest, and serialization of tile tables. Pure functions.

A candidate is the `use` entry of a table row: tile sizes, num_warps, num_stages.
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
"""Largest head dimension for which both gradients of a block of keys fit in registers."""
TIE_TOLERANCE = 0.01
"""Relative difference below which times are considered equal. The first of equally fast candidates
is chosen, so that tables do not change with measurement noise.
"""

TABLE_FEATURES = {
    "rms_norm": ("width", "bytes"),
    "rms_norm_backward": ("width", "bytes"),
    "rms_norm_weight": ("width",),
    "rope": ("head_dim",),
    "swiglu": ("bytes",),
    "attention_forward": ("head_dim", "bytes", "hopper"),
    "attention_queries": ("head_dim", "bytes"),
    "attention_keys": ("head_dim", "bytes"),
    "vocab_statistics": ("width",),
    "combine_statistics": (),
    "vocab_gradient": ("width",),
    "causal_conv": (),
    "causal_conv_backward": (),
    "selective_scan": ("states",),
    "selective_scan_carry": (),
    "selective_scan_backward": ("states",),
}
"""Features that an op passes when it selects its tiles, by table."""

SPECIALIZED = "hopper"
"""Feature of calls that the warp-specialized attention supports. Only rows that require it may
select that kernel."""


def candidates(table: str, features: Features, architecture: int) -> list[Tiles]:
    """Return all plausible tiles: those with neither too little nor too much work per thread."""
    if table.startswith("attention"):
        listed = list(_attention(table, features["head_dim"], architecture))
        if table == "attention_forward" and features.get(SPECIALIZED, False):
            listed += _grid(GENERATION=(2,), STAGES=(1, 2, 3, 4))
        return listed
    if table.startswith("rms_norm"):
        return list(_norm(table, features["width"]))
    if table in ("selective_scan", "selective_scan_backward"):
        return list(_states(table, features["states"]))
    return list(_ROWWISE[table]())


def is_specialized(tiles: Mapping[str, int]) -> bool:
    """Return True for tiles of the warp-specialized attention forward."""
    return tiles.get("GENERATION", 1) == 2


def _grid(**choices: Sequence[int]) -> Iterator[Tiles]:
    """Yield all combinations, in the order of the arguments."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


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


def _conv() -> Iterator[Tiles]:
    for tiles in _grid(TOKENS=(8, 16, 32, 64), CHANNELS=(32, 64, 128), num_warps=(2, 4, 8)):
        if 4 <= tiles["TOKENS"] * tiles["CHANNELS"] / (LANES * tiles["num_warps"]) <= 32:
            yield tiles


def _carry() -> Iterator[Tiles]:
    return _grid(BLOCK=(128, 256, 512, 1024), num_warps=(2, 4))


def _states(table: str, states: int) -> Iterator[Tiles]:
    """Yield tiles of the kernels of a scan: a thread holds at most 32 numbers of a state."""
    steps = {"STEPS": (1, 2, 4)} if table == "selective_scan_backward" else {}
    numbers = 1 << math.ceil(math.log2(states))
    for tiles in _grid(CHANNELS=(16, 32, 64, 128), **steps, num_warps=(1, 2, 4)):
        if 4 <= numbers * tiles["CHANNELS"] / (LANES * tiles["num_warps"]) <= 32:
            yield tiles


_ROWWISE = {
    "rope": _rope,
    "swiglu": _swiglu,
    "vocab_statistics": _statistics,
    "combine_statistics": _combine,
    "vocab_gradient": _gradient,
    "causal_conv": _conv,
    "causal_conv_backward": _conv,
    "selective_scan_carry": _carry,
}


def _attention(table: str, head_dim: int, architecture: int) -> Iterator[Tiles]:
    """Yield tiles of the attention kernels.

    The resident block fits in a tile. The other block is streamed, in smaller pieces (EDGE_N,
    EDGE_M) where the causal mask applies. For wide heads the keys kernel may compute dK and dV in
    separate launches (SEPARATE).
    """
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
    """Return the fastest tiles with their seconds; of equally fast ones, the first."""
    fastest = min(time for _, time in seconds)
    return next((tiles, time) for tiles, time in seconds if time <= fastest * (1 + TIE_TOLERANCE))


def merge_rows(names: Sequence[str], known: Sequence[Row], measured: Sequence[Row]) -> list[Row]:
    """Return the rows of an architecture: the measured rows and the known rows they do not cover.

    An unmeasured row is kept if it can still be selected. Rows are sorted by their bounds, the
    narrowest first, with features in the order of `names`.
    """

    def bounds(row: Row) -> tuple[float, ...]:
        return tuple(row["when"].get(name, row["up_to"].get(name, math.inf)) for name in names)

    remaining = [row for row in known if not any(_covers(new, row) for new in measured)]
    return sorted([*measured, *remaining], key=bounds)


def row_conditions(
    names: Sequence[str], features: Features, known: Sequence[Row], specialized: bool = False
) -> Row:
    """Return a row without tiles that matches these features; of `specialized` tiles only those.

    Features that some known row matches exactly go to `when`, the others become upper bounds in
    `up_to`.
    """
    exact = {name for row in known for name in row["when"]}
    names = [name for name in names if name != SPECIALIZED or specialized]
    when = {name: features[name] for name in names if name in exact or name == SPECIALIZED}
    return {"when": when, "up_to": {name: features[name] for name in names if name not in when}}


def format_table(table: Mapping[int, Sequence[Row]]) -> str:
    """Return the JSON text of a table, with one line per row."""
    parts = []
    for architecture, rows in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        parts.append(f'  "{architecture}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _covers(new: Row, old: Row) -> bool:
    """Return True if the new row matches everything that the old row matches."""
    equal = all(old["when"].get(name) == value for name, value in new["when"].items())
    return equal and all(
        old["when"].get(name, old["up_to"].get(name, math.inf)) <= bound
        for name, bound in new["up_to"].items()
    )
