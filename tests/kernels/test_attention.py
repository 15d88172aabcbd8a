"""Tests of attention in Triton's interpreter: accuracy and bitwise properties."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from megagrow.model.attention_ops import sdpa
from megagrow_kernels import reference
from megagrow_kernels.accuracy import attention_terms
from megagrow_kernels.attention import attention
from megagrow_kernels.launching import INTERPRETER
from megagrow_kernels.packing import TILE, Packing, pack
from tests.helpers.kernels.accuracy import check, close, draw, with_gradients
from tests.helpers.kernels.documents import Rows, ids_of, ranges_of
from tools.gpu.kernel_cases import override_tiles

HALF, SINGLE = torch.float16, torch.float32

# A window may be empty past the end of a document; the result is never written.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

CASES: dict[str, tuple[Rows, tuple[int, int, int], dict]] = {
    # rows of document lengths, (query heads, key/value heads, head dimension), options
    "one token": (((1,),), (1, 1, 64), {}),
    "one document": (((199,),), (2, 1, 64), {}),
    "a full tile": (((128,), (128,)), (1, 1, 64), {}),
    "documents": (((37, 1, 61), (1, 97, 1)), (2, 2, 64), {}),
    "one-token documents": (((1,) * 9,), (2, 1, 64), {}),
    "empty tail": (((150, 35), (185,)), (2, 1, 64), {}),
    "head dimension 8": (((33, 20),), (2, 1, 8), {}),
    "head dimension 80": (((70, 30),), (2, 1, 80), {}),
    "head dimension 96": (((70, 30),), (2, 1, 96), {}),
    "head dimension 128": (((130, 30),), (2, 1, 128), {}),
    "head dimension 256": (((70, 30),), (2, 1, 256), {}),
    "four queries a key": (((100, 61),), (4, 1, 64), {}),
    "eight queries a key": (((40, 13),), (8, 1, 64), {}),
    "window of one": (((70, 3),), (1, 1, 64), {"window": 1}),
    "window below a block": (((199, 3),), (2, 1, 64), {"window": 17}),
    "window of a block": (((150, 49),), (1, 1, 64), {"window": 64}),
    "window below the length": (((199,),), (2, 2, 64), {"window": 101}),
    "window below a tile": (((261, 40),), (2, 1, 16), {"window": TILE - 1}),
    "window of a tile": (((261, 40),), (2, 1, 16), {"window": TILE}),
    "window above a tile": (((261, 40),), (2, 1, 16), {"window": TILE + 1}),
    "window above two tiles": (((397,),), (2, 1, 16), {"window": 2 * TILE + 20}),
    "window above the length": (((70, 29),), (1, 1, 64), {"window": 300}),
    "scale": (((70, 29),), (1, 1, 64), {"scale": 0.4}),
    "one query of a row": (((150, 49), (199,)), (2, 1, 16), {"queries": 1}),
    "queries from inside a block": (((40, 107, 52), (199,)), (4, 2, 16), {"queries": 101}),
    "queries from the end of a block": (((64, 135), (199,)), (2, 1, 16), {"queries": 135}),
    "queries and a small window": (((300,), (9, 291)), (2, 1, 16), {"queries": 77, "window": 40}),
    "queries and a window": (((397,), (60, 337)), (2, 1, 16), {"queries": 130, "window": 201}),
}


def packing_of(rows: Rows, queries: int | None = None) -> Packing:
    ids = ids_of(rows)
    return pack(ids, *ids.shape, queries)


def inputs_of(rows: Rows, heads: int, groups: int, head_dim: int) -> list[Tensor]:
    batch, sequence = ids_of(rows).shape
    shapes = [(batch, sequence, count, head_dim) for count in (heads, groups, groups)]
    return [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def check_attention(
    rows: Rows,
    inputs: list[Tensor],
    dtype: torch.dtype,
    queries: int | None = None,
    **options: Any,
) -> None:
    """Check output and gradients of the last `queries` queries of each row, by default of all."""
    inputs = [inputs[0][:, -(queries or 0) :], *inputs[1:]]
    kernel = partial(attention, packing=packing_of(rows, queries), **options)
    definition = partial(reference.attention, document_ids=ids_of(rows), **options)
    terms = partial(attention_terms, document_ids=ids_of(rows), **options)
    check(kernel, definition, inputs, dtype, terms)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("case", CASES)
def test_accuracy(case, dtype):
    rows, sizes, options = CASES[case]
    check_attention(rows, inputs_of(rows, *sizes), dtype, **options)


@pytest.mark.parametrize(
    ("table", "tiles", "message"),
    [
        ("attention_forward", {"BLOCK_M": 256, "BLOCK_N": 16, "EDGE_N": 16}, "block of 256 tokens"),
        ("attention_keys", {"BLOCK_M": 32, "BLOCK_N": 16, "EDGE_M": 32}, "EDGE_M must divide"),
    ],
)
def test_tiles_that_would_give_wrong_results_are_refused(table, tiles, message):
    q = draw(1, 40, 1, 16).requires_grad_()
    with (
        override_tiles(INTERPRETER, {table: tiles | {"DESCRIPTORS": 0}}),
        pytest.raises((ValueError, InterpreterError), match=message),
    ):
        attention(q, q, q, pack(None, 1, 40)).sum().backward()


@pytest.mark.parametrize("window", [None, 50])
def test_packed_documents_are_documents_alone_to_the_bit(window):
    rows = ((150, 1, 34), (7, 178))
    inputs = inputs_of(rows, 2, 1, 64)
    function = partial(attention, packing=packing_of(rows), window=window)
    packed = results(function, inputs, draw(*inputs[0].shape, seed=9))
    for row, where in ranges_of(rows):
        alone = [x[row : row + 1, where] for x in inputs]
        function = partial(attention, packing=pack(None, 1, alone[0].shape[1]), window=window)
        upstream = draw(*inputs[0].shape, seed=9)[row : row + 1, where]
        for one, all_of_them in zip(results(function, alone, upstream), packed, strict=True):
            assert torch.equal(one, all_of_them[row : row + 1, where])


def results(function, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of all inputs given that of the output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("window", [None, 50])
def test_the_last_queries_are_rows_of_all_queries_to_the_bit(window):
    rows, queries = ((150, 49), (7, 192)), 61
    inputs, upstream = inputs_of(rows, 2, 1, 16), draw(2, 199, 2, 16, seed=9)
    function = partial(attention, packing=packing_of(rows), window=window)
    full = results(function, inputs, upstream)
    function = partial(attention, packing=packing_of(rows, queries), window=window)
    last = results(function, [inputs[0][:, -queries:], *inputs[1:]], upstream[:, -queries:])
    for one, all_of_them in zip(last[:2], full[:2], strict=True):
        assert torch.equal(one, all_of_them[:, -queries:])
    for gradient in last[2:]:
        assert (gradient[1, :7] == 0).all(), "no query sees this document"


def test_nothing_flows_from_later_tokens():
    rows, until = ((199,),), 77
    function = partial(attention, packing=packing_of(rows))
    inputs = inputs_of(rows, 2, 1, 64)
    upstream = draw(*inputs[0].shape, seed=9)
    upstream[:, until:] = 0
    baseline = results(function, inputs, upstream)
    for gradient in baseline[1:]:
        assert (gradient[:, until:] == 0).all()
        assert (gradient[:, :until] != 0).any()
    later = [x.clone() for x in inputs]
    for x in later:
        x[:, until:] = 1e4
    for actual, expected in zip(results(function, later, upstream), baseline, strict=True):
        assert torch.equal(actual[:, :until], expected[:, :until])


def test_nothing_flows_between_documents():
    rows = ((40, 59, 45),)
    inside = torch.zeros(144, dtype=torch.bool)
    inside[40:99] = True
    function = partial(attention, packing=packing_of(rows))
    inputs = inputs_of(rows, 2, 1, 64)
    upstream = draw(*inputs[0].shape, seed=9) * inside[None, :, None, None]
    baseline = results(function, inputs, upstream)
    for gradient in baseline[1:]:
        assert (gradient[:, ~inside] == 0).all()
    broken = [x.clone() for x in (*inputs, upstream)]
    for x in broken:
        x[:, ~inside] = float("nan")
    for actual, expected in zip(results(function, broken[:3], broken[3]), baseline, strict=True):
        assert torch.equal(actual[:, inside], expected[:, inside])


def test_a_window_that_holds_everything_changes_no_bit():
    rows = ((130, 69),)
    inputs = inputs_of(rows, 2, 1, 64)
    kernel = partial(attention, packing=packing_of(rows))
    plain = with_gradients(kernel, inputs, SINGLE)
    for actual, expected in zip(
        with_gradients(partial(kernel, window=130), inputs, SINGLE), plain, strict=True
    ):
        assert torch.equal(actual, expected)


def test_shared_heads_are_repeated_heads():
    rows = ((130, 21),)
    q, k, v = inputs_of(rows, 4, 2, 64)
    function = partial(attention, packing=packing_of(rows))
    shared = with_gradients(function, (q, k, v), SINGLE)
    repeated = [x.repeat_interleave(2, dim=2) for x in (k, v)]
    own = with_gradients(function, (q, *repeated), SINGLE)
    for actual, expected in zip(shared[:2], own[:2], strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(shared[2:], own[2:], strict=True):
        parts = expected.unflatten(2, (2, 2))
        exact, terms = parts.double().sum(3), parts.double().square().sum(3).sqrt()
        close(actual, exact, parts.sum(3), terms=terms)


def test_gradients_are_the_same_bits_on_every_run():
    rows = ((150, 9),)
    inputs = inputs_of(rows, 2, 1, 64)
    function = partial(attention, packing=packing_of(rows))
    first, second = (with_gradients(function, inputs, HALF) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


SMALL = {
    "attention_forward": {"BLOCK_M": 16, "BLOCK_N": 16, "EDGE_N": 16, "DESCRIPTORS": 1},
    "attention_queries": {"BLOCK_M": 16, "BLOCK_N": 16, "EDGE_N": 16, "DESCRIPTORS": 1},
    "attention_keys": {"BLOCK_M": 16, "BLOCK_N": 16, "EDGE_M": 16, "DESCRIPTORS": 1},
}


def test_every_tail_length():
    """One document for each number of tokens after its last full block."""
    rows = (tuple(16 + tail for tail in range(1, 17)),)
    with override_tiles(INTERPRETER, SMALL):
        check_attention(rows, inputs_of(rows, 1, 1, 16), SINGLE)


@pytest.mark.parametrize(("resident", "streamed"), [(16, 32), (32, 16), (32, 64)])
def test_windows_that_cut_hide_and_leave_blocks(resident, streamed):
    """For blocks of all relative sizes, and chunks of queries from every part of a block."""
    by_queries = {"BLOCK_M": resident, "BLOCK_N": streamed, "EDGE_N": 16, "DESCRIPTORS": 1}
    by_keys = {"BLOCK_N": resident, "BLOCK_M": streamed, "EDGE_M": 16, "DESCRIPTORS": 1}
    tiles = {f"attention_{name}": by_queries for name in ("forward", "queries")}
    rows = ((99,),)
    with override_tiles(INTERPRETER, tiles | {"attention_keys": by_keys}):
        for window in (16, 33, 63, 80):
            check_attention(rows, inputs_of(rows, 1, 1, 16), SINGLE, window=window)
        for queries, window in ((35, None), (36, 33), (51, 63), (67, None)):
            options = {"queries": queries, "window": window}
            check_attention(rows, inputs_of(rows, 1, 1, 16), SINGLE, **options)


@pytest.mark.parametrize("window", [None, 50])
def test_against_torch(window):
    """The reference is not involved: torch's attention with a mask computes the exact result."""
    rows = ((150, 20), (70, 100))
    mask = reference.attention_mask(ids_of(rows), window)
    kernel = partial(attention, packing=packing_of(rows), window=window)
    terms = partial(attention_terms, document_ids=ids_of(rows), window=window)
    check(kernel, partial(sdpa, mask=mask), inputs_of(rows, 2, 1, 32), SINGLE, terms)


def strided(x: Tensor, layout: str) -> Tensor:
    """Return x (B, S, heads, D) in another memory layout."""
    match layout:
        case "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "batch last":
            return x.movedim(0, -1).contiguous().movedim(-1, 0)
        case "every second token":
            return x.repeat_interleave(2, dim=1)[:, ::2]
        case "unaligned":
            return torch.nn.functional.pad(x, (1, 0))[..., 1:]
    return x


LAYOUTS = ("heads first", "batch last", "every second token", "unaligned")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_and_gradients(layout):
    """Each of q, k, v and the output's gradient may have its own strides."""
    rows = ((26, 11), (37,))
    inputs = [*inputs_of(rows, 2, 2, 16), draw(2, 37, 2, 16, seed=9)]
    function = partial(attention, packing=packing_of(rows))
    expected = results(function, inputs[:3], inputs[3])
    for index in range(4):
        views = [strided(x, layout) if i == index else x for i, x in enumerate(inputs)]
        assert not views[index].is_contiguous()
        for actual, other in zip(results(function, views[:3], views[3]), expected, strict=True):
            assert torch.equal(actual, other), index


def test_views_of_one_projection():
    """q, k and v are slices of one tensor; the gradient is expanded from one head."""
    rows = ((60, 11),)
    views = draw(1, 71, 4 * 64).unflatten(-1, (4, 64)).split((2, 1, 1), dim=2)
    function = partial(attention, packing=packing_of(rows))
    upstream = draw(1, 71, 1, 64, seed=9).expand(1, 71, 2, 64)
    expected = results(function, [x.contiguous() for x in views], upstream.contiguous())
    for actual, other in zip(results(function, list(views), upstream), expected, strict=True):
        assert torch.equal(actual, other)
