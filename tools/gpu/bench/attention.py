"""Causal attention: dense, packed documents, windows; forward and backward.

SDPA is measured with one backend forced, since what torch chooses by itself is not the fastest. Its
K and V are not expanded (enable_gqa). FLOPs are those that the documents need (`gpu_bench_work`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megagrow_kernels import reference
from megagrow_kernels.attention import attention
from megagrow_kernels.packing import pack
from tools.gpu.bench import others
from tools.gpu.bench.case import OURS, Case, Place, Result
from tools.gpu.bench.work import attention_work

Contenders = dict[str, Callable[[], Result]]


@dataclass(frozen=True)
class Shape:
    """A batch of rows, all of the same documents."""

    kind: str
    """`dense`, `packed`, `skewed`, `window` or `mha`."""
    batch: int
    documents: tuple[int, ...]
    """Their lengths; they fill a row."""
    heads: int = 32
    groups: int = 8
    head_dim: int = 128
    window: int | None = None

    @property
    def sequence(self) -> int:
        return sum(self.documents)

    @property
    def name(self) -> str:
        window = "" if self.window is None else f", window {self.window}"
        documents = "" if len(self.documents) == 1 else f" in {len(self.documents)} documents"
        heads = f"{self.heads}/{self.groups} heads of {self.head_dim}"
        return f"{self.kind} {self.batch} x {self.sequence}{documents}, {heads}{window}"


SHAPES = (
    Shape("dense", 8, (2048,)),
    Shape("dense", 4, (4096,)),
    Shape("dense", 2, (8192,)),
    Shape("dense", 1, (16384,)),
    Shape("dense", 4, (4096,), heads=32, groups=32, head_dim=64),
    Shape("mha", 4, (4096,), groups=32),
    Shape("packed", 2, (2048,) * 4),
    Shape("skewed", 2, (5120, 256, 1792, 1024)),
    Shape("window", 2, (8192,), window=1024),
)
"""16k tokens each; documents of 2048 tokens on average."""

TINY = {"heads": 2, "groups": 1, "head_dim": 16}
SMOKE_SHAPES = (
    Shape("dense", 1, (16,), **TINY),
    Shape("skewed", 1, (9, 1, 6), **TINY),
    Shape("window", 1, (16,), window=5, **TINY),
)


def cases(place: Place) -> Iterator[Case]:
    """One case for each shape."""
    for shape in SMOKE_SHAPES if place.smoke else SHAPES:
        yield case(place, shape)


def case(place: Place, shape: Shape) -> Case:
    """All that can compute a shape. Who expands K and V or all scores is left out where it could
    not run: the compiled reference holds them for the shortest dense shape only."""
    q = place.draw(shape.batch, shape.sequence, shape.heads, shape.head_dim)
    k, v = (place.draw(*q.shape[:2], shape.groups, shape.head_dim) for _ in range(2))
    ids = document_ids(shape.documents).to(place.device).expand(shape.batch, -1)
    packing = pack(ids.cpu(), shape.batch, shape.sequence).to(place.device)
    contenders: Contenders = {OURS: lambda: attention(q, k, v, packing, window=shape.window)}
    if shape.kind in ("dense", "mha"):
        contenders |= _dense(place, q, k, v)
    if shape.kind in ("packed", "skewed"):
        contenders |= _packed(place, q, k, v, ids, shape.documents)
    if shape.kind == "window":
        contenders |= _windowed(q, k, v, shape.window)
    if shape.kind == "dense" and shape.sequence <= 2048:
        compiled = place.compiled(reference.attention)
        contenders["compile"] = lambda: compiled(q, k, v)
    lengths = shape.documents * shape.batch
    work = attention_work(lengths, shape.heads, shape.head_dim, shape.window)
    features = {"shape": shape.kind, "sequence": shape.sequence, "head_dim": shape.head_dim}
    return Case("attention", shape.name, contenders, (q, k, v), *work, features=features)


def document_ids(lengths: Sequence[int]) -> Tensor:
    """(S,): which document a token is in, counted from 0."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def _dense(place: Place, q: Tensor, k: Tensor, v: Tensor) -> Contenders:
    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH if place.smoke else backend):
                out = F.scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
                )
            return out.transpose(1, 2)

        return call

    made: Contenders = {
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash": sdpa(SDPBackend.FLASH_ATTENTION),
    }
    for name, flash in others.flash_attention("flash_attn_func").items():
        made[name] = _called(flash, q, k, v, causal=True)
    return made


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Contenders:
    assert window is not None
    found = others.flash_attention("flash_attn_func")
    reach = (window - 1, 0)
    return {n: _called(f, q, k, v, causal=True, window_size=reach) for n, f in found.items()}


def _packed(
    place: Place, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, lengths: tuple[int, ...]
) -> Contenders:
    row = ids[0].contiguous()

    def same_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (row[query] == row[key]) & (query >= key)

    sequence = q.shape[1]
    mask = create_block_mask(same_document, None, None, sequence, sequence, device=place.device)
    flex = flex_attention if place.smoke else torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        # It has no backward pass on a CPU.
        inputs = [x.detach() if place.smoke else x for x in (q, k, v)]
        turned = (x.transpose(1, 2) for x in inputs)
        return flex(*turned, block_mask=mask, enable_gqa=True).transpose(1, 2)

    made: Contenders = {"flex": call}
    every = torch.tensor((0, *lengths * q.shape[0]), device=place.device)
    starts = every.cumsum(0).to(torch.int32)
    ends = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    for name, flash in others.flash_attention("flash_attn_varlen_func").items():
        made[name] = _called(flash, *flat, causal=True, **ends, **longest)
    return made


def _called(
    function: Callable[..., Tensor], *arguments: Tensor, **options: object
) -> Callable[[], Tensor]:
    return lambda: function(*arguments, **options)
