"""Checks that every generation of the attention forward must pass.

    python -m tests.helpers.kernels.attention_generations GENERATION

runs them on a GPU, in a separate process. The exit code is NOT_HERE if the GPU does not support the
generation.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from megagrow_kernels import reference
from megagrow_kernels.accuracy import poisoned
from megagrow_kernels.attention_forward import attention_forward
from megagrow_kernels.attention_hopper import attention_hopper_forward, fits
from megagrow_kernels.launching import architecture
from megagrow_kernels.packing import pack
from tests.helpers.kernels.accuracy import close, draw
from tests.helpers.kernels.documents import Rows, ids_of, ranges_of

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, float, int | None], tuple[Tensor, Tensor]]
FORWARDS: dict[int, Forward] = {1: attention_forward, 2: attention_hopper_forward}
NOT_HERE = 75
SCALE = 0.2

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
LARGE: dict[str, tuple[Rows, tuple[int, int, int], int | None]] = {
    "4096 tokens": (((4096,), (1000, 3, 2077, 1016)), (16, 4, 128), None),
    "4096 tokens, 64": (((4096,), (1000, 3, 2077, 1016)), (16, 16, 64), None),
    "4096 tokens, window": (((4096,), (1000, 3, 2077, 1016)), (16, 4, 128), 700),
}


def inputs_of(rows: Rows, heads: int, groups: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    batch, sequence = ids_of(rows).shape
    shapes = [(batch, sequence, count, width) for count in (heads, groups, groups)]
    return [draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def compute(
    forward: Forward, inputs: list[Tensor], rows: Rows, window: int | None = None, on: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return output and logsumexp, with SCALE, computed on a device."""
    ids = ids_of(rows)
    tiles = pack(ids, *ids.shape).query_tiles.to(on)
    with poisoned():
        out, logsumexp = forward(*(x.to(on) for x in inputs), tiles, SCALE, window)
    return out, logsumexp


def logsumexp_of(q: Tensor, k: Tensor, ids: Tensor, window: int | None) -> Tensor:
    """Return the log-sum-exp of the scores, (H, T), to base 2, in fp64 or fp32."""
    q, k = (x if x.dtype == torch.float64 else x.float() for x in (q, k))
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bshd,bthd->hbst", q, k) * SCALE
    seen = reference.attention_mask(ids, window).transpose(0, 1)
    scores = scores.masked_fill(~seen, float("-inf"))
    return scores.logsumexp(-1).flatten(1) / torch.tensor(2.0, dtype=q.dtype).log()


def accurate(
    forward: Forward,
    case: tuple[Rows, tuple[int, int, int], int | None],
    dtype: torch.dtype,
    on: str = "cpu",
) -> None:
    """Check that output and logsumexp are as accurate as their precision allows."""
    rows, sizes, window = case
    ids, inputs = ids_of(rows).to(on), [x.to(on) for x in inputs_of(rows, *sizes, dtype)]
    out, logsumexp = compute(forward, inputs, rows, window, on)
    wide = [x.double() for x in inputs]
    exact, twin = (reference.attention(*x, ids, SCALE, window) for x in (wide, inputs))
    close(out, exact, twin, "output")
    exact, twin = (logsumexp_of(*x[:2], ids, window) for x in (wide, inputs))
    one = torch.ones_like(exact)[..., None]  # a logarithm: its absolute error counts
    close(*(x[..., None] for x in (logsumexp, exact, twin)), "logsumexp", one)


def isolated(forward: Forward, dtype: torch.dtype, on: str = "cpu") -> None:
    """Check that a document gives the same bits alone, packed, and packed with NaN."""
    rows = ((130, 271, 9),)
    inputs = inputs_of(rows, 2, 1, 64, dtype)
    packed = compute(forward, inputs, rows, on=on)
    for _, where in ranges_of(rows):
        alone = [x[:, where] for x in inputs]
        out, logsumexp = compute(forward, alone, ((alone[0].shape[1],),), on=on)
        broken = [torch.full_like(x, float("nan")) for x in inputs]
        for to, kept in zip(broken, alone, strict=True):
            to[:, where] = kept
        for actual in (packed, compute(forward, broken, rows, on=on)):
            assert torch.equal(actual[0][:, where], out)
            assert torch.equal(actual[1][:, where], logsumexp)


def causal(forward: Forward, dtype: torch.dtype, on: str = "cpu") -> None:
    """Check that later tokens change no earlier bit, and that repetitions are bitwise equal."""
    rows, until = ((300,),), 77
    inputs = inputs_of(rows, 1, 1, 64, dtype)
    before = compute(forward, inputs, rows, on=on)
    for one, other in zip(compute(forward, inputs, rows, on=on), before, strict=True):
        assert torch.equal(one, other)
    for x in inputs:
        x[:, until:] = 100.0
    out, logsumexp = compute(forward, inputs, rows, on=on)
    assert torch.equal(out[:, :until], before[0][:, :until])
    assert torch.equal(logsumexp[:, :until], before[1][:, :until])


def main() -> None:
    """Run all checks on a GPU."""
    generation = int(sys.argv[1])
    if generation == 2 and not fits(architecture(torch.device("cuda")), 64, torch.bfloat16):
        sys.exit(NOT_HERE)
    for dtype in (torch.bfloat16, torch.float16):
        for case in (*CASES.values(), *LARGE.values()):
            accurate(FORWARDS[generation], case, dtype, "cuda")
        isolated(FORWARDS[generation], dtype, "cuda")
        causal(FORWARDS[generation], dtype, "cuda")


if __name__ == "__main__":
    main()
