"""Benchmark of causal attention: dense, packed documents, windows; forward and backward.

SDPA is measured with one backend forced, since torch's default choice is not the fastest. K and V
are not expanded (enable_gqa). FLOPs are those required by the documents (`work.py`).
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
from megagrow_kernels.attention_hopper import fits
from megagrow_kernels.launching import architecture
from megagrow_kernels.packing import pack
from tools.gpu.bench import baselines
from tools.gpu.bench.case import OURS, BenchmarkCase, DeviceSetup, Result
from tools.gpu.bench.work import attention_work
from tools.gpu.kernel_cases import override_tiles

Implementations = dict[str, Callable[[], Result]]


@dataclass(frozen=True)
class AttentionShape:
    """A batch of rows with the same document lengths."""

    kind: str
    """`dense`, `packed`, `skewed`, `window` or `mha`."""
    batch: int
    documents: tuple[int, ...]
    """Document lengths in tokens; they fill a row."""
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
    AttentionShape("dense", 8, (2048,)),
    AttentionShape("dense", 4, (4096,)),
    AttentionShape("dense", 2, (8192,)),
    AttentionShape("dense", 1, (16384,)),
    AttentionShape("dense", 4, (4096,), heads=32, groups=32, head_dim=64),
    AttentionShape("mha", 4, (4096,), groups=32),
    AttentionShape("packed", 2, (2048,) * 4),
    AttentionShape("skewed", 2, (5120, 256, 1792, 1024)),
    AttentionShape("window", 2, (8192,), window=1024),
)
"""Benchmark shapes: 16k tokens each, with documents of 2048 tokens on average."""

TINY = {"heads": 2, "groups": 1, "head_dim": 16}
SMOKE_SHAPES = (
    AttentionShape("dense", 1, (16,), **TINY),
    AttentionShape("skewed", 1, (9, 1, 6), **TINY),
    AttentionShape("window", 1, (16,), window=5, **TINY),
)


def cases(setup: DeviceSetup) -> Iterator[BenchmarkCase]:
    """Yield one case per shape."""
    for shape in SMOKE_SHAPES if setup.smoke else SHAPES:
        yield case(setup, shape)


def case(setup: DeviceSetup, shape: AttentionShape) -> BenchmarkCase:
    """Return a shape with all implementations that support it.

    Implementations that expand K and V or materialize all scores are omitted where they do not fit:
    the compiled reference runs only for the shortest dense shape.
    """
    q = setup.draw(shape.batch, shape.sequence, shape.heads, shape.head_dim)
    k, v = (setup.draw(*q.shape[:2], shape.groups, shape.head_dim) for _ in range(2))
    ids = document_ids(shape.documents).to(setup.device).expand(shape.batch, -1)
    packing = pack(ids.cpu(), shape.batch, shape.sequence).to(setup.device)
    implementations: Implementations = {
        OURS: lambda: attention(q, k, v, packing, window=shape.window)
    }
    if fits(architecture(setup.device), shape.head_dim, setup.dtype):
        implementations |= _generations(implementations[OURS], architecture(setup.device))
    if shape.kind in ("dense", "mha"):
        implementations |= _dense(setup, q, k, v)
    if shape.kind in ("packed", "skewed"):
        implementations |= _packed(setup, q, k, v, ids, shape.documents)
    if shape.kind == "window":
        implementations |= _windowed(q, k, v, shape.window)
    if shape.kind == "dense" and shape.sequence <= 2048:
        compiled = setup.compile(reference.attention)
        implementations["compile"] = lambda: compiled(q, k, v)
    lengths = shape.documents * shape.batch
    work = attention_work(lengths, shape.heads, shape.head_dim, shape.window)
    features = {"shape": shape.kind, "sequence": shape.sequence, "head_dim": shape.head_dim}
    return BenchmarkCase(
        "attention", shape.name, implementations, (q, k, v), *work, features=features
    )


def document_ids(lengths: Sequence[int]) -> Tensor:
    """Return the document index of each token, (S,)."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def _generations(call: Callable[[], Result], capability: int) -> Implementations:
    """Return attention with the warp-specialized forward, by its number of stages."""

    def specialized(stages: int) -> Callable[[], Result]:
        def run() -> Result:
            use = {"GENERATION": 2, "STAGES": stages}
            with override_tiles(capability, {"attention_forward": use}):
                return call()

        return run

    return {f"warp-specialized, {stages} stages": specialized(stages) for stages in (1, 2)}


def _dense(setup: DeviceSetup, q: Tensor, k: Tensor, v: Tensor) -> Implementations:
    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH if setup.smoke else backend):
                out = F.scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
                )
            return out.transpose(1, 2)

        return call

    calls: Implementations = {
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash": sdpa(SDPBackend.FLASH_ATTENTION),
    }
    for name, flash in baselines.flash_attention("flash_attn_func").items():
        calls[name] = _bind(flash, q, k, v, causal=True)
    return calls


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Implementations:
    assert window is not None
    functions = baselines.flash_attention("flash_attn_func")
    window_size = (window - 1, 0)
    return {
        n: _bind(f, q, k, v, causal=True, window_size=window_size) for n, f in functions.items()
    }


def _packed(
    setup: DeviceSetup, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, lengths: tuple[int, ...]
) -> Implementations:
    row = ids[0].contiguous()

    def same_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (row[query] == row[key]) & (query >= key)

    sequence = q.shape[1]
    mask = create_block_mask(same_document, None, None, sequence, sequence, device=setup.device)
    flex = flex_attention if setup.smoke else torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        # flex_attention has no backward pass on a CPU.
        inputs = [x.detach() if setup.smoke else x for x in (q, k, v)]
        transposed = (x.transpose(1, 2) for x in inputs)
        return flex(*transposed, block_mask=mask, enable_gqa=True).transpose(1, 2)

    calls: Implementations = {"flex": call}
    lengths_by_row = torch.tensor((0, *lengths * q.shape[0]), device=setup.device)
    starts = lengths_by_row.cumsum(0).to(torch.int32)
    ends = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    for name, flash in baselines.flash_attention("flash_attn_varlen_func").items():
        calls[name] = _bind(flash, *flat, causal=True, **ends, **longest)
    return calls


def _bind(
    function: Callable[..., Tensor], *arguments: Tensor, **options: object
) -> Callable[[], Tensor]:
    return lambda: function(*arguments, **options)
