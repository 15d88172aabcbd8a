"""Mutations of valid input: bits flipped, numbers changed, keys gone, types wrong."""

import json
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

Path_ = tuple[Any, ...]
"""Keys and places that lead to something in a tree of dicts and lists."""

CANARY = "canary-9f3a"
"""The name of a file outside of every folder that is loaded: nothing may open it."""

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63),
    *(2**64 - 1, -(2**63), 10**18, 10**30, 10**310, 0.0, -0.5, 1e-300, 1e300),
    *(float("inf"), float("nan")),
)
TEXTS = (
    *("", " ", ".", "..", f"../{CANARY}", f"../../{CANARY}", f"/tmp/{CANARY}", "a/b", "a\\b"),
    *("\0", "a\nb", "\u2028", "x" * 300, "null", "true", "1e99T", "10B", "-3", "0x10", "F64", "I8"),
    *(
        "!!python/object/apply:os.system ['true']",
        "__class__",
        "__init__",
        "rank-00009.safetensors",
    ),
    *("\ud800", "\U0001f680", "{}", "%s%n", "base", "auto"),
)


def _deep(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


wild: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from((None, True, False)),
    st.integers(-(2**70), 2**70),
    st.text(max_size=12),
    st.builds(list),
    st.builds(dict),
    st.lists(st.sampled_from((*NUMBERS, *TEXTS)), max_size=4),
    st.dictionaries(st.text(max_size=4), st.sampled_from(NUMBERS), max_size=3),
    st.sampled_from((2, 40, 200)).map(_deep),
)
"""Values that were not expected at the place where they stand."""


def paths(tree: Any, above: Path_ = ()) -> Iterator[Path_]:
    """Return the paths of the values in a tree; the root itself comes first."""
    yield above
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from paths(value, (*above, key))


def at(tree: Any, path: Path_) -> Any:
    """Return the value at a path."""
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: Any, path: Path_, value: Any) -> Any:
    if not path:
        return value
    at(tree, path[:-1])[path[-1]] = value
    return tree


@st.composite
def _edited(draw: st.DrawFn, tree: Any) -> Any:
    """One edit somewhere in a tree, which is changed in place where it can be."""
    places = list(paths(tree))
    path = draw(st.sampled_from(places))
    old = at(tree, path)
    kind = draw(st.sampled_from(("wild", "number", "delete", "rename", "nest", "swap", "add")))
    if kind == "number" and type(old) in (int, float):
        change = draw(st.sampled_from((-1, 1, 2, 1000)))
        return _set(tree, path, draw(st.sampled_from((old + change, old * change, -old))))
    if kind == "delete" and path:
        del at(tree, path[:-1])[path[-1]]
        return tree
    if kind == "rename" and path and isinstance(path[-1], str):
        parent = at(tree, path[:-1])
        parent[draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=6)))] = parent.pop(path[-1])
        return tree
    if kind == "nest":
        return _set(tree, path, [old] if draw(st.booleans()) else {"a": old})
    if kind == "swap":
        other = draw(st.sampled_from(places))
        return _set(tree, path, deepcopy(at(tree, other)))
    if kind == "add" and isinstance(old, dict):
        old[draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=6)))] = draw(wild)
        return tree
    if kind == "add" and isinstance(old, list):
        old.insert(0, draw(wild))
        return tree
    return _set(tree, path, draw(wild))


@st.composite
def mutated_tree(draw: st.DrawFn, valid: Any) -> Any:
    """A valid tree after up to four edits, or as it is."""
    tree = deepcopy(valid)
    for _ in range(draw(st.integers(0, 4))):
        tree = draw(_edited(tree))
    return tree


@st.composite
def mutated_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid bytes after up to four edits, or as they are."""
    raw = bytearray(valid)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(raw) - 1)))
        kind = draw(st.sampled_from(("flip", "set", "number", "cut", "insert", "repeat", "end")))
        if kind == "flip" and raw:
            raw[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and raw:
            raw[place] = draw(st.sampled_from((0, 1, 9, 10, 34, 45, 91, 123, 125, 127, 128, 255)))
        elif kind == "number":
            form, limit = draw(st.sampled_from((("<i", 2**31), ("<q", 2**63))))
            number = draw(st.sampled_from([n for n in NUMBERS if isinstance(n, int)]))
            packed = struct.pack(form, max(-limit, min(limit - 1, number)))
            raw[place : place + len(packed)] = packed
        elif kind == "cut":
            del raw[place : place + draw(st.integers(1, 40))]
        elif kind == "insert":
            raw[place:place] = draw(st.binary(max_size=8))
        elif kind == "repeat":
            raw[place:place] = raw[place : place + 20] * draw(st.integers(1, 3))
        else:
            del raw[place:]
    return bytes(raw)


def damaged(
    valid: Any, write: Callable[[Any], bytes] = lambda tree: json.dumps(tree).encode()
) -> st.SearchStrategy[bytes]:
    """Files made from a tree: the tree changed, the text changed, or bytes of any kind."""
    return st.one_of(
        mutated_tree(valid).map(write),
        mutated_tree(valid).map(write),
        mutated_bytes(write(valid)),
        st.binary(max_size=60),
    )
