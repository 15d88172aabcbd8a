"""Sliding-window attention of every backend: a direct computation, and transformers' Mistral."""

import pytest
import torch
from torch import Tensor

from megagrow.model.backends import Backends, KernelWorkload
from megagrow.model.decoder import CausalLM
from megagrow.model.layers.decoding import DecodedSequences
from megagrow.model.machine import machine_of
from megagrow.model.ops import Ops, make_ops
from megagrow_kernels.packing import TILE
from tests.helpers.hugging_face import hugging_face, tiny, tokens
from tests.helpers.kernels.documents import ids_of, ranges_of

LENGTH = 2 * TILE + 5
ROWS = {"plain": ((LENGTH,), (LENGTH,)), "packed": ((TILE + 2, 1, TILE + 2), (3, LENGTH - 3))}
WINDOWS = (1, 5, TILE - 1, TILE, TILE + 1, LENGTH, 10 * LENGTH)
BACKENDS = ("sdpa", "reference", "triton")
CASES = [(backend, window) for backend in BACKENDS[:2] for window in WINDOWS]
CASES.append(("triton", TILE + 1))  # tests/kernels/test_attention.py has more of its windows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def ops_of(backend: str, packed: bool) -> Ops:
    work = KernelWorkload(torch.float32, 8, packed, windowed=True)
    backends = Backends(backend, "torch", "torch", "torch")
    return make_ops(backends, machine_of(torch.device("cpu")), work)


def by_definition(q: Tensor, k: Tensor, v: Tensor, rows: tuple, window: int) -> Tensor:
    """Attend query by query, over a slice of keys."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    out = torch.zeros_like(q)
    for row, document in ranges_of(rows):
        for token in range(document.start, document.stop):
            seen = slice(max(document.start, token - window + 1), token + 1)
            scores = torch.einsum("hk,shk->sh", q[row, token], k[row, seen]) * q.shape[-1] ** -0.5
            out[row, token] = torch.einsum("sh,shk->hk", scores.softmax(0), v[row, seen])
    return out


def outcome(function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of the inputs, in fp64."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, grad))]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(("backend", "window"), CASES)
def test_outputs_and_gradients(backend: str, window: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, ids = ROWS[kind], ids_of(ROWS[kind])
    inputs = [torch.randn(2, LENGTH, heads, 8, generator=generator) for heads in (4, 2, 2)]
    ops = ops_of(backend, packed=kind == "packed")
    documents = ops.pack(ids) if kind == "packed" else None
    mask = ops.attention_mask(documents, torch.arange(LENGTH).expand(2, -1), window)
    found = outcome(lambda q, k, v: ops.attention(q, k, v, mask), inputs, torch.float32)
    exact = outcome(lambda q, k, v: by_definition(q, k, v, rows, window), inputs, torch.float64)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_window_of_the_sequence_needs_no_mask() -> None:
    ops, positions = ops_of("sdpa", packed=False), torch.arange(12)[None]
    masks = [ops.attention_mask(None, positions, window) for window in (None, 12, 11)]
    assert masks[:2] == [None, None] and masks[2].shape == (1, 1, 12, 12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_those_of_mistral(backend: str) -> None:
    """The text is four times as long as the window."""
    window = 5
    config = tiny(num_key_value_heads=2, model_type="mistral", sliding_window=window)
    mistral = hugging_face(config)
    model = CausalLM(config, ops=ops_of(backend, packed=False))
    model.load_state_dict(mistral.state_dict())
    ids, _ = tokens(config, 2, 4 * window)
    with torch.no_grad():
        expected = mistral(ids).logits
        found = model(ids, torch.arange(4 * window).expand(2, -1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_decoding_reads_the_positions_in_the_window() -> None:
    sequences = DecodedSequences(torch.device("cpu"))
    for counts in ([5, 2], [2, 1]):
        sequences.begin(counts)
        positions = sequences.positions(sequences.columns)
        seen = sequences.visible(positions, window=3)
        sequences.end()
    assert positions.tolist() == [[5, 6], [2, 3]]
    stored = [[row.nonzero()[:, 0].tolist() for row in each] for each in seen]
    assert stored == [[[3, 4, 5], [4, 5, 6]], [[0, 1, 2], [1, 2, 3]]]
    everything = sequences.visible(positions, window=100)
    assert torch.equal(everything, sequences.visible(positions))
