"""Tests of document and tile lists against a loop over tokens."""

import random
from itertools import pairwise

import pytest
import torch

from megagrow_kernels.packing import TILE, Packing, pack
from tests.helpers.kernels.documents import ids_of


def documents_of(packing: Packing) -> list[tuple[int, int]]:
    starts = packing.cu_seqlens.tolist()
    return list(pairwise(starts))


def check_tiles(packing: Packing) -> None:
    """Check that both lists hold every tile of every document once, most work first."""
    expected = [
        (first, start, end)
        for start, end in documents_of(packing)
        for first in range(start, end, TILE)
    ]
    for tiles in (packing.query_tiles, packing.key_tiles):
        real = [tuple(tile) for tile in tiles.tolist() if tile[2] > 0]
        assert sorted(real) == sorted(expected)
        assert len(tiles) == max(2, len(expected))
    work = [min(first + TILE, end) - start for first, start, end in packing.query_tiles.tolist()]
    assert work[: len(expected)] == sorted(work[: len(expected)], reverse=True)
    work = [end - first for first, start, end in packing.key_tiles.tolist()]
    assert work[: len(expected)] == sorted(work[: len(expected)], reverse=True)


def test_a_plain_batch_is_one_document_per_row():
    packing = pack(None, 3, 200)
    assert packing.cu_seqlens.tolist() == [0, 200, 400, 600]
    assert packing.longest == 200
    assert packing.query_tiles.tolist() == [
        [128, 0, 200],
        [328, 200, 400],
        [528, 400, 600],
        [0, 0, 200],
        [200, 200, 400],
        [400, 400, 600],
    ]
    assert [row[0] for row in packing.key_tiles.tolist()] == [0, 200, 400, 128, 328, 528]


def test_query_tiles_cover_the_last_queries_and_key_tiles_all_keys():
    packing = pack(None, 2, 300, queries=50)
    assert packing.query_tiles.tolist() == [
        [256, 0, 300],
        [556, 300, 600],
        [128, 0, 300],
        [428, 300, 600],
    ]
    assert [row[0] for row in packing.key_tiles.tolist()] == [0, 128, 300, 428, 256, 556]
    packing = pack(ids_of(((20, 280),)), 1, 300, queries=50)
    assert packing.query_tiles.tolist() == [[276, 20, 300], [148, 20, 300]]
    assert packing.key_tiles.tolist()[-1] == [0, 0, 20], "seen by no query, and still listed"


def test_documents_end_with_their_row():
    packing = pack(ids_of(((3, 1, 4), (8,))), 2, 8)
    assert documents_of(packing) == [(0, 3), (3, 4), (4, 8), (8, 16)]
    same_id_in_both = pack(torch.zeros(2, 8, dtype=torch.long), 2, 8)
    assert documents_of(same_id_in_both) == [(0, 8), (8, 16)]


def test_a_single_tile_stands_beside_an_empty_one():
    packing = pack(None, 1, 5)
    assert packing.query_tiles.tolist() == packing.key_tiles.tolist() == [[0, 0, 5], [0, 0, 0]]


def test_random_packings():
    draw = random.Random(0)
    for _ in range(20):
        sequence = draw.choice([1, 7, 128, 129, 700])
        rows = []
        for _ in range(draw.randint(1, 3)):
            row = []
            while sum(row) < sequence:
                row.append(min(draw.choice([1, 2, 127, 128, 129, 300]), sequence - sum(row)))
            rows.append(row)
        packing = pack(ids_of(rows), len(rows), sequence)
        lengths = [end - start for start, end in documents_of(packing)]
        assert lengths == [length for row in rows for length in row]
        assert packing.longest == max(lengths)
        for tensor in (packing.cu_seqlens, packing.query_tiles, packing.key_tiles):
            assert tensor.dtype == torch.int32
        check_tiles(packing)


def test_on_another_device_it_is_the_same():
    packing = pack(ids_of(((100, 200),)), 1, 300)
    moved = packing.to("meta")
    assert moved.longest == packing.longest
    assert moved.query_tiles.shape == packing.query_tiles.shape
    assert moved.cu_seqlens.device.type == "meta"
    assert torch.equal(packing.to("cpu").key_tiles, packing.key_tiles)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match=r"shape \(2, 8\), expected \(1, 8\)"):
        pack(torch.zeros(2, 8), 1, 8)
    with pytest.raises(ValueError, match="reappears"):
        pack(torch.tensor([[0, 1, 0]]), 1, 3)
    for queries in (0, 9):
        with pytest.raises(ValueError, match=f"{queries} queries per row of 8 keys; use 1 to 8"):
            pack(None, 1, 8, queries)
    with pytest.raises(ValueError, match="32-bit"):
        pack(None, 2**16, 2**15)
