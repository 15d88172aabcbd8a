"""The warp-specialised attention for sm_90, executed in a model of Gluon on the CPU."""

from typing import Any

import pytest
import torch
from megagrow_kernels import (
    attention_forward,
    attention_hopper,
    attention_hopper_warps,
    launching,
    reference,
)
from megagrow_kernels.packing import pack
from torch import Tensor

from tests.kernels.accuracy import close, draw, poisoned
from tests.kernels.documents import Rows, ids_of, ranges_of
from tests.kernels.gluon_model import Deadlock, Model, functions, launcher

HALF = torch.float16
MODULES = (attention_hopper_warps, attention_hopper)

CASES: dict[str, tuple[Rows, tuple[int, int, int], int | None]] = {
    # rows of document lengths, (query heads, key/value heads, head dimension), window
    "one token": (((1,),), (1, 1, 64), None),
    "199 tokens": (((199,),), (2, 1, 64), None),
    "documents": (((130, 1, 128, 41), (300,)), (2, 1, 64), None),
    "many tiles": (((700,),), (1, 1, 64), None),
    "head dimension 128": (((300,), (171, 129)), (2, 2, 128), None),
    "four queries a key": (((256, 20),), (8, 2, 64), None),
    "window of one": (((300, 9),), (1, 1, 64), 1),
    "window below a tile": (((300, 9),), (2, 1, 64), 100),
    "window of a tile": (((400,),), (1, 1, 64), 128),
    "window of two tiles and a bit": (((700,),), (1, 1, 128), 300),
    "window above the length": (((300,),), (1, 1, 64), 1000),
}


def inputs_of(rows: Rows, heads: int, groups: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    batch, sequence = ids_of(rows).shape
    shapes = [(batch, sequence, count, width) for count in (heads, groups, groups)]
    return [draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def modelled(
    patch: pytest.MonkeyPatch,
    inputs: list[Tensor],
    rows: Rows,
    *,
    window: int | None = None,
    seed: int = 0,
    programs: int = 3,
    stages: int = 2,
) -> tuple[Tensor, Tensor]:
    """What the kernel computes in the model, on so many multiprocessors, with a scale of 0.2."""
    patch.setattr(attention_hopper, "launch", launcher(MODULES, seed, programs))
    ids = ids_of(rows)
    tiles = pack(ids, *ids.shape).query_tiles
    with poisoned():
        return attention_hopper.attention_hopper_forward(*inputs, tiles, 0.2, window, stages)


def logsumexp_of(q: Tensor, k: Tensor, ids: Tensor, window: int | None) -> Tensor:
    """(H, T), to base 2, in fp64 or fp32."""
    q, k = (x if x.dtype == torch.float64 else x.float() for x in (q, k))
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bshd,bthd->hbst", q, k) * 0.2
    seen = reference.attention_mask(ids, window).transpose(0, 1)
    scores = scores.masked_fill(~seen, float("-inf"))
    return scores.logsumexp(-1).flatten(1) / torch.tensor(2.0, dtype=q.dtype).log()


@pytest.mark.parametrize("case", CASES)
def test_accuracy(monkeypatch, case):
    rows, sizes, window = CASES[case]
    ids, inputs = ids_of(rows), inputs_of(rows, *sizes, HALF)
    out, logsumexp = modelled(monkeypatch, inputs, rows, window=window)
    wide = [x.double() for x in inputs]
    exact, twin = (reference.attention(*x, ids, 0.2, window) for x in (wide, inputs))
    close(out, exact, twin, "output")
    exact, twin = (logsumexp_of(*x[:2], ids, window) for x in (wide, inputs))
    close(logsumexp, exact, twin, "logsumexp")


def test_order_of_events_and_programs_change_no_bit(monkeypatch):
    rows = ((290, 10), (300,))
    inputs = inputs_of(rows, 3, 1, 64, torch.bfloat16)
    expected = modelled(monkeypatch, inputs, rows, programs=1)
    for seed, programs, stages in ((1, 1, 1), (2, 2, 2), (3, 5, 3), (4, 64, 2)):
        found = modelled(
            monkeypatch, inputs, rows, seed=seed, programs=programs, stages=stages
        )
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_nothing_flows_between_documents(monkeypatch):
    rows = ((130, 271, 9),)
    inputs = inputs_of(rows, 2, 1, 64, HALF)
    whole = modelled(monkeypatch, inputs, rows)
    for _, where in ranges_of(rows):
        alone = [x[:, where] for x in inputs]
        found = modelled(monkeypatch, alone, ((alone[0].shape[1],),))
        broken = [torch.full_like(x, float("nan")) for x in inputs]
        for to, kept in zip(broken, alone, strict=True):
            to[:, where] = kept
        among_nan = modelled(monkeypatch, broken, rows)
        assert torch.equal(found[0], whole[0][:, where])
        assert torch.equal(found[0], among_nan[0][:, where])
        assert torch.equal(found[1], whole[1][:, where])
        assert torch.equal(found[1], among_nan[1][:, where])


def test_nothing_flows_from_later_tokens(monkeypatch):
    rows, until = ((300,),), 77
    inputs = inputs_of(rows, 1, 1, 64, HALF)
    before, _ = modelled(monkeypatch, inputs, rows)
    for x in inputs:
        x[:, until:] = 100.0
    found, _ = modelled(monkeypatch, inputs, rows)
    assert torch.equal(found[:, :until], before[:, :until])


def test_views_of_one_projection(monkeypatch):
    rows = ((160, 11),)
    whole = draw(1, 171, 4, 64, dtype=HALF)
    views = list(whole.split((2, 1, 1), dim=2))
    expected = modelled(monkeypatch, [x.contiguous() for x in views], rows)
    for one, other in zip(modelled(monkeypatch, views, rows), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("left_out", ["wait", "arrive", "warpgroup_mma_wait"])
def test_the_model_notices_what_is_left_out(monkeypatch, left_out):
    """The tests above can fail: without one kind of synchronisation, the kernel does."""
    kept = Model.warpgroup_mma_wait
    replaced, error = {
        "wait": (lambda *_: None, AssertionError),
        "arrive": (lambda *_: None, Deadlock),
        "warpgroup_mma_wait": (lambda self, n, deps: kept(self, n + 1, deps), AssertionError),
    }[left_out]
    monkeypatch.setattr(Model, left_out, replaced)
    rows = ((700,),)
    with pytest.raises(error):
        modelled(monkeypatch, inputs_of(rows, 1, 1, 64, HALF), rows)


@pytest.mark.parametrize("programs", [1, 3, 7, 132])
@pytest.mark.parametrize("items", [0, 1, 6, 7, 131, 132, 133, 1000])
def test_every_item_has_one_program(items, programs):
    taken = []
    for program in range(programs):
        names = functions(MODULES, Model(program, programs, 0).namespace())
        for number in range(names["items_of_program"](torch.tensor(items))):
            taken.append(number * programs + int(names["place_in_round"](number)))
    assert sorted(taken) == list(range(items))


ROW: dict[str, Any] = {
    **{"when": {"hopper": True}, "up_to": {}, "measured": None},
    "use": {"GENERATION": 2, "STAGES": 2},
}


@pytest.mark.parametrize(
    ("architecture", "width", "dtype", "expected"),
    [
        (90, 128, torch.bfloat16, True),
        (90, 64, torch.float16, True),
        (90, 96, torch.bfloat16, False),
        (90, 128, torch.float32, False),
        (80, 128, torch.bfloat16, False),
        (100, 128, torch.bfloat16, False),
        (launching.INTERPRETER, 64, torch.float16, False),
    ],
)
def test_it_is_taken_where_it_fits_if_a_row_asks_for_it(
    monkeypatch, architecture, width, dtype, expected
):
    assert attention_hopper.fits(architecture, width, dtype) is expected


def test_no_row_asks_for_it_yet():
    from megagrow_kernels import tiles

    for rows in tiles.rows("attention_forward").values():
        assert all("GENERATION" not in row["use"] for row in rows)
