"""Warp-specialized attention forward for sm_90 (second generation), in Gluon.

The online softmax and the order of work follow FlashAttention-3 (Shah et al. 2024, sections 3.1 and
3.2). A block holds one producer warp and two consumer warpgroups. The producer loads tiles of
queries, keys and values by TMA into rings in shared memory; it needs 24 registers. Each consumer
warpgroup owns 64 query rows and uses 240 registers; scores, probabilities and output never leave
them. Their code is in `attention_hopper_warps.py`; this module launches it. One block is started
per multiprocessor, and each processes its share of all query tiles and heads.

Not yet run on a GPU, and therefore used only if tiles/attention_forward.json has the row

    {"when": {"hopper": true}, "up_to": {}, "use": {"GENERATION": 2, "STAGES": 2}, "measured": null}

as the first of architecture 90. Two things are verified: compilation for sm_90 (registers, shared
memory, instructions), and the results and barriers in a CPU model of Gluon that executes these
functions (tests/helpers/kernels/gluon_model.py).
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megagrow_kernels import attention_blocks as blocks
from megagrow_kernels.attention_hopper_warps import CONSUMERS, QUERIES, TILE, consume, produce
from megagrow_kernels.launching import launch, programs

_ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def fits(architecture: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Return True if this generation supports the attention; the first one computes the rest.

    architecture is a compute capability: the instructions exist on 90 (H100, H200) only.
    """
    return architecture == 90 and head_dim in (64, 128) and dtype in _ELEMENTS


def attention_hopper_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_tiles: Tensor,
    scale: float,
    window: int | None,
    stages: int = 2,
) -> tuple[Tensor, Tensor]:
    """Return output (B, S, H, D) and logsumexp (H, T), as `attention_forward` does.

    q is (B, S, H, D), k and v are (B, S, G, D), all fp16 or bf16, with D 64 or 128. scale must be
    positive: a row's maximum is taken before scaling. `stages` is the number of key tiles, and of
    value tiles, that shared memory holds.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    heads, groups, tokens = q.shape[2], k.shape[2], q.shape[0] * q.shape[1]
    logsumexp = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    descriptors = (
        _descriptor(q, QUERIES.value),
        _descriptor(k, TILE.value),
        _descriptor(v, TILE.value),
    )
    launch(
        _kernel,
        (programs(q.device),),
        *(out, logsumexp, query_tiles, *descriptors),
        *(len(query_tiles) * heads, tokens, scale * blocks.LOG2_E),
        HEADS=heads,
        GROUP=heads // groups,
        WINDOW=window or 0,
        STAGES=stages,
        num_warps=4,
    )
    return out, logsumexp


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Return a TMA descriptor of blocks of `rows` tokens of one head of x (B, S, heads, D)."""
    x_TC = blocks.flat(x).flatten(1)
    layout = gl.NVMMASharedLayout.get_default_for([rows, x.shape[-1]], _ELEMENTS[x.dtype])
    return TensorDescriptor(
        x_TC, list(x_TC.shape), list(x_TC.stride()), [rows, x.shape[-1]], layout
    )


@gluon.jit
def ring(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """Return one barrier per stage, each passed after COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit(do_not_specialize=["items", "tokens"])
def _kernel(
    out,
    logsumexp,
    tiles,
    q_desc,
    k_desc,
    v_desc,
    items,
    tokens,
    scale,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    WINDOW: gl.constexpr,
    STAGES: gl.constexpr,
):
    WIDTH: gl.constexpr = q_desc.block_type.shape[1]
    q_memory = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, QUERIES, WIDTH], q_desc.layout)
    k_memory = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, WIDTH], k_desc.layout)
    v_memory = gl.allocate_shared_memory(v_desc.dtype, [STAGES, TILE, WIDTH], v_desc.layout)
    memory = (q_memory, k_memory, v_memory)
    full = (ring(CONSUMERS, 1), ring(STAGES, 1), ring(STAGES, 1))
    empty = (ring(CONSUMERS, 1), ring(STAGES, CONSUMERS), ring(STAGES, CONSUMERS))
    order = (ring(CONSUMERS, 1), ring(1, 1).index(0))
    fence_async_shared()  # make the initialized barriers visible to TMA
    inputs = (q_desc, k_desc, v_desc)
    outputs = (out, logsumexp, tokens)
    work = (tiles, items)
    gl.warp_specialize(
        [
            (consume, (outputs, work, scale, memory, full, empty, order, 0, HEADS, WINDOW)),
            (consume, (outputs, work, scale, memory, full, empty, order, 1, HEADS, WINDOW)),
            (produce, (work, inputs, memory, full, empty, HEADS, GROUP, WINDOW)),
        ],
        [4, 1],
        [240, 24],
    )
