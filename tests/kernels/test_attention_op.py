"""Tests of the attention op with opcheck, torch.compile and activation checkpointing."""

import json
import os
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megagrow_kernels import attention as op
from megagrow_kernels import attention_backward as gradient
from megagrow_kernels.attention import attention
from megagrow_kernels.packing import Packing, pack
from tests.helpers.kernels.accuracy import draw
from tests.helpers.kernels.documents import ids_of


def inputs_of(batch: int, sequence: int) -> list[Tensor]:
    """Return q of two heads, k and v of one."""
    return [draw(batch, sequence, heads, 16, seed=heads).requires_grad_() for heads in (2, 1, 1)]


def packing_of(*rows: tuple[int, ...]) -> Packing:
    ids = ids_of(rows)
    return pack(ids, *ids.shape)


def test_opcheck():
    packing = packing_of((20, 13))
    arguments = (*inputs_of(1, 33), packing.query_tiles, packing.key_tiles, 0.25)
    for window in (None, 9):
        torch.library.opcheck(torch.ops.megagrow.attention, (*arguments, window))


def test_opcheck_of_the_gradient():
    packing = packing_of((20, 13))
    q, k, v = (x.detach() for x in inputs_of(1, 33))
    tiles = (packing.query_tiles, packing.key_tiles)
    out, logsumexp = torch.ops.megagrow.attention(q, k, v, *tiles, 0.25, None)
    arguments = (torch.ones_like(out), q, k, v, out, logsumexp, *tiles, 0.25, None)
    torch.library.opcheck(torch.ops.megagrow.attention_backward, arguments)


def block(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    return attention(q * 2, k, v, packing, window=30).square().sum()


def test_compiled_and_checkpointed_it_is_the_same():
    packing = packing_of((20, 13), (33,))
    inputs = inputs_of(2, 33)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(block(*inputs, packing), inputs)
    again = torch.autograd.grad(checkpoint(block, *inputs, packing, use_reentrant=False), inputs)
    for actual in (torch.autograd.grad(compiled(*inputs, packing), inputs), again):
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)


def random_packings(count: int, sequence: int) -> list[Packing]:
    """Return packings of two rows with random document lengths, from one to all tokens."""
    source, packings = random.Random(0), []
    for _ in range(count):
        rows = []
        for _ in range(2):
            cuts = sorted(source.sample(range(1, sequence), source.randint(0, 6)))
            rows.append(tuple(b - a for a, b in zip([0, *cuts], [*cuts, sequence], strict=True)))
        packings.append(packing_of(*rows))
    return packings


def test_another_packing_never_compiles_anew(monkeypatch):
    """Only torch's compiler is tested here, so the computation is trivial."""

    def forward(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return q.clone(), q.new_zeros(q.shape[2], q.shape[0] * q.shape[1])

    started = []
    monkeypatch.setattr(op, "attention_forward", forward)
    monkeypatch.setattr(gradient, "launch", lambda kernel, *_, **__: started.append(kernel))
    inputs = inputs_of(2, 12)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    sizes = set()
    for index, packing in enumerate([pack(None, 2, 12), *random_packings(100, 12)]):
        sizes.add(len(packing.query_tiles))
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            torch.autograd.grad(compiled(*inputs, packing), inputs)
    assert len(sizes) > 5 and len(started) >= 3 * 101, "every gradient launches its kernels"


def test_triton_never_compiles_anew_either():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.kernels.attention_compilations"],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    # One kernel without a window, and one for all windows; the row sums of gradients see none.
    assert json.loads(run.stdout) == {"forward": 2, "delta": 1, "queries": 2, "keys": 2}


def test_what_does_not_fit_is_named():
    call = partial(attention, packing=packing_of((5,)))
    q, k, v = (draw(1, 5, 3, 64) for _ in range(3))
    with pytest.raises(TypeError, match="float64"):
        call(q.double(), k.double(), v.double())
    with pytest.raises(TypeError, match="float16"):
        call(q, k.half(), v)
    with pytest.raises(ValueError, match="requires q"):
        call(q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="requires q"):
        call(q, k, v[:, :4])
    with pytest.raises(ValueError, match="Sq <= Sk"):
        call(q, k[:, :4], v[:, :4])
    with pytest.raises(ValueError, match="head dimension 60"):
        call(*(x[..., :60] for x in (q, k, v)))
    with pytest.raises(ValueError, match="scale -1"):
        call(q, k, v, scale=-1.0)
    with pytest.raises(ValueError, match="window 0"):
        call(q, k, v, window=0)
    with pytest.raises(RuntimeError, match="bf16 wrongly"):
        call(*(x.bfloat16() for x in (q, k, v)))
