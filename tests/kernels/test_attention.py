"""Tests of attention in Triton's interpreter: accuracy and bitwise properties."""

from functools import partial

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from megagrow_kernels import reference
from megagrow_kernels.attention import attention
from megagrow_kernels.launching import INTERPRETER
from megagrow_kernels.packing import Packing, pack
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
    "window above the length": (((70, 29),), (1, 1, 64), {"window": 300}),
    "scale": (((70, 29),), (1, 1, 64), {"scale": 0.4}),
}


def packing_of(rows: Rows) -> Packing:
    ids = ids_of(rows)
    return pack(ids, *ids.shape)


def inputs_of(rows: Rows, heads: int, groups: int, head_dim: int) -> list[Tensor]:
    batch, sequence = ids_of(rows).shape
    shapes = [(batch, sequence, count, head_dim) for count in (heads, groups, groups)]
    return [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("case", CASES)
def test_accuracy(case, dtype):
    rows, sizes, options = CASES[case]
    kernel = partial(attention, packing=packing_of(rows), **options)
    eager = partial(reference.attention, document_ids=ids_of(rows), **options)
    # If every token sees only itself, scores have no gradient: the terms that cancel are dO V,
    # about 20.
    alone = options.get("window") == 1 or max(max(row) for row in rows) == 1
    check(kernel, eager, inputs_of(rows, *sizes), dtype, least=20.0 if alone else 0.0)


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
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


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
        summed = expected.unflatten(2, (2, 2)).sum(3)
        exact = expected.double().unflatten(2, (2, 2)).sum(3)
        close(actual, exact, summed, least=exact.abs().max().item())


def test_gradients_are_the_same_bits_on_every_run():
    rows = ((150, 9),)
    inputs = inputs_of(rows, 2, 1, 64)
    function = partial(attention, packing=packing_of(rows))
    first, second = (with_gradients(function, inputs, HALF) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("offset", [0, 1])
def test_views_of_one_projection(offset):
    """q, k and v are slices of one tensor, read in place if aligned; the gradient is expanded."""
    rows = ((60, 11),)
    projection = draw(1, 71, 4 * 64 + offset)[..., offset:].unflatten(-1, (4, 64))
    views = projection.split((2, 1, 1), dim=2)
    function = partial(attention, packing=packing_of(rows))
    upstream = draw(1, 71, 1, 64, seed=9).expand(1, 71, 2, 64)
    expected = results(function, [x.contiguous() for x in views], upstream.contiguous())
    for actual, other in zip(results(function, list(views), upstream), expected, strict=True):
        assert torch.equal(actual, other)


def test_what_does_not_fit_is_named():
    rows = ((5,),)
    call = partial(attention, packing=packing_of(rows))
    q, k, v = inputs_of(rows, 3, 3, 64)
    with pytest.raises(TypeError, match="float64"):
        call(q.double(), k.double(), v.double())
    with pytest.raises(TypeError, match="float16"):
        call(q, k.half(), v)
    with pytest.raises(ValueError, match="requires q"):
        call(q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="requires q"):
        call(q, k, v[:, :4])
    with pytest.raises(ValueError, match="head dimension 60"):
        call(*(x[..., :60] for x in (q, k, v)))
    with pytest.raises(ValueError, match="scale -1"):
        call(q, k, v, scale=-1.0)
    with pytest.raises(ValueError, match="window 0"):
        call(q, k, v, window=0)
    with pytest.raises(RuntimeError, match="bf16 wrongly"):
        call(*(x.bfloat16() for x in (q, k, v)))
