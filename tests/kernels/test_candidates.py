"""Tests of all tile candidates of the tuner, in Triton's interpreter: each computes the result."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from megagrow_kernels import reference, self_check
from megagrow_kernels.accuracy import attention_terms
from megagrow_kernels.attention import attention
from megagrow_kernels.launching import INTERPRETER
from megagrow_kernels.packing import TILE, pack
from tests.helpers.kernels.accuracy import check, draw
from tests.helpers.kernels.documents import ids_of
from tools.gpu.kernel_candidates import Tiles, candidates
from tools.gpu.kernel_cases import HEAD_DIMS, OPS, override_tiles

FEATURES = {"width": 2048, "bytes": 2, "states": 16}
FIXED = {"num_warps": 1, "num_stages": 1, "STAGES": 1}
"""Options without effect in the interpreter."""
RUNS = 16
"""Sets of attention tiles that are run."""


def distinct(table: str) -> list[Tiles]:
    """Return the candidates of a table for all head dimensions that differ in the interpreter."""
    listed = {
        str(tiles): tiles
        for head_dim in HEAD_DIMS
        for use in candidates(table, FEATURES | {"head_dim": head_dim}, 90)
        for tiles in [use | {name: FIXED[name] for name in FIXED.keys() & use.keys()}]
    }
    return list(listed.values())


def together(op: str, runs: int | None = None) -> Iterator[dict[str, Tiles]]:
    """Yield tiles of all tables of an op, so that each candidate is used, or `runs` of them."""
    shuffled = {}
    for table in OPS[op].tables:
        tiles = distinct(table)
        random.Random(0).shuffle(tiles)
        shuffled[table] = tiles
    for index in range(runs or max(map(len, shuffled.values()))):
        yield {table: tiles[index % len(tiles)] for table, tiles in shuffled.items()}


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_attention():
    """The document starts at an odd token and ends in the second block of its second tile."""
    rows = ((1, TILE + 20),)
    ids = ids_of(rows)
    packing = pack(ids, *ids.shape)
    inputs = [draw(*ids.shape, heads, 8, seed=seed) for seed, heads in enumerate((2, 1, 1))]
    sizes = set()
    for index, tiles in enumerate(together("attention", RUNS)):
        window = (None, None, 70)[index % 3]
        kernel = partial(attention, packing=packing, window=window)
        eager = partial(reference.attention, document_ids=ids, window=window)
        terms = partial(attention_terms, document_ids=ids, window=window)
        with override_tiles(INTERPRETER, tiles):
            check(kernel, eager, inputs, torch.float32, terms)
        sizes |= {(name, use["BLOCK_M"], use["BLOCK_N"]) for name, use in tiles.items()}
    every = {
        (table, use["BLOCK_M"], use["BLOCK_N"])
        for table in OPS["attention"].tables
        for use in distinct(table)
    }
    assert sizes == every


ROWWISE: dict[str, dict[str, Any]] = {
    "rms_norm": {"rows": 67, "width": 24},
    "rope": {"batch": 1, "sequence": 19, "heads": 5, "groups": 1, "head_dim": 8}
    | {"table_dtype": "float32"},
    "swiglu": {"rows": 3, "width": 1707},
    "causal_conv": {"batch": 1, "sequence": 11, "channels": 70, "taps": 3}
    | {"parameter_dtype": "float32"},
    "selective_scan": {"batch": 1, "sequence": 5, "channels": 20, "states": 3}
    | {"parameter_dtype": "float32"},
    "cross_entropy": {"rows": 5, "width": 1300, "real": 1290, "ranks": 2},
}


@pytest.mark.parametrize("op", ROWWISE)
def test_rowwise(op: str):
    for tiles in together(op):
        with override_tiles(INTERPRETER, tiles):
            result = self_check.check(op, torch.device("cpu"), ROWWISE[op] | {"dtype": "float32"})
        assert self_check.is_correct(result), (tiles, result)
