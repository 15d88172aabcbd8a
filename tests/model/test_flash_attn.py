"""Attention by flash-attn: the arguments it gets, on a stand-in that computes by the reference."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megagrow.errors import InputError
from megagrow.model.backends import KernelWorkload
from megagrow_kernels import reference
from tests.helpers.model.ops import DOCUMENTS, draw, ops_by, outcome


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """A stand-in that computes by the reference, after flash-attn's own signatures; the calls."""
    calls = []

    def window_of(window_size):
        left, right = window_size
        assert left == right == -1 or (left >= 0 and right == 0)
        return None if left == -1 else left + 1

    def whole(q, k, v, causal=False, window_size=(-1, -1), deterministic=False):
        assert causal and q.dtype == torch.bfloat16
        calls.append(("flash_attn_func", deterministic))
        return reference.attention(q, k, v, window=window_of(window_size))

    def packed(q, k, v, cu_q, cu_k, longest_q, longest_k, window_size=(-1, -1), **options):
        assert options.pop("causal") and q.dtype == torch.bfloat16
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (cu_q[-1], cu_k[-1]) == (len(q), len(k))
        assert longest_q >= cu_q.diff().max() and longest_k == cu_k.diff().max()
        calls.append(("flash_attn_varlen_func", options.pop("deterministic")))
        assert not options
        window, out = window_of(window_size), []
        splits = (x.split(cu.diff().tolist()) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k)))
        for document in zip(*splits, strict=True):
            out.append(reference.attention(*(x[None] for x in document), window=window)[0])
        return torch.cat(out)

    module = SimpleNamespace(flash_attn_func=whole, flash_attn_varlen_func=packed)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
    ("deterministic", "window", "queries"),
    [(False, None, 12), (True, None, 12), (False, 4, 12), (False, None, 5), (False, 4, 5)],
)
def test_attention_by_flash_attn(
    flash_attn: list[tuple[str, bool]],
    packed: bool,
    deterministic: bool,
    window: int | None,
    queries: int,
) -> None:
    work = KernelWorkload(torch.bfloat16, 16, packed, deterministic)
    documents = DOCUMENTS if packed else None
    ops = ops_by(work, attention="flash_attn")
    inputs = draw(2, queries, 4, 16), draw(2, 12, 2, 16, seed=1), draw(2, 12, 2, 16, seed=2)
    attention_mask = ops.attention_mask(
        ops.pack(documents, queries).to("cpu") if packed else None, DOCUMENTS, window, queries
    )
    found = outcome(lambda q, k, v: ops.attention(q, k, v, attention_mask), *inputs)

    def expected(*inputs: Tensor) -> Tensor:
        return reference.attention(*(x.bfloat16() for x in inputs), documents, window=window)

    for one, other in zip(found, outcome(expected, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    name = "flash_attn_varlen_func" if packed else "flash_attn_func"
    assert flash_attn == [(name, deterministic)]


def test_flash_attn_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(InputError, match="flash-attn is installed but cannot be imported"):
        ops_by(attention="flash_attn")
