"""Attention forward for sm_90, second generation: warps that specialise, in Gluon.

The online softmax and the order of work are FlashAttention-3's (Shah et al. 2024, sections 3.1 and
3.2). A block holds three kinds of warps. One producer warp loads tiles of queries, keys and values
by TMA into rings in shared memory; it needs 24 registers. Two consumer warpgroups own 64 query rows
each and hold 240 registers; scores, probabilities and output never leave them. What they do is in
`attention_hopper_warps.py`; here is what starts them. As many blocks are started as there are
multiprocessors, and each goes through its share of all query tiles and heads.

Never run on a GPU yet, and so taken only where a row of tiles/attention_forward.json asks for it:
    {"when": {"hopper": true}, "up_to": {}, "use": {"GENERATION": 2, "STAGES": 2}, "measured": null}
as the first of architecture 90. What was checked: that it compiles for sm_90 as meant (registers,
shared memory, instructions), and its results and its barriers in a model of Gluon on the CPU that
executes these very functions (tests/helpers/kernels/gluon_model.py).
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
    """Whether this generation can compute an attention; all others are the first generation's.

    architecture is a compute capability: the instructions are those of 90 (H100, H200) alone.
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
    """What `attention_forward` returns, of the same arguments: output and logsumexp (H, T).

    q is (B, S, H, D), k and v (B, S, G, D), all fp16 or bf16, with D 64 or 128. scale has to be
    positive: a row's maximum is taken before it is applied. `stages` is how many tiles of keys, and
    how many of values, have room in shared memory.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    heads, groups, tokens = q.shape[2], k.shape[2], q.shape[0] * q.shape[1]
    logsumexp = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    described = (_described(q, QUERIES.value), _described(k, TILE.value), _described(v, TILE.value))
    launch(
        _kernel,
        (programs(q.device),),
        *(out, logsumexp, query_tiles, *described),
        *(len(query_tiles) * heads, tokens, scale * blocks.LOG2_E),
        HEADS=heads,
        GROUP=heads // groups,
        WINDOW=window or 0,
        STAGES=stages,
        num_warps=4,
    )
    return out, logsumexp


def _described(x: Tensor, rows: int) -> TensorDescriptor:
    """How TMA reads blocks of `rows` tokens of one head from x (B, S, heads, D)."""
    x_TC = blocks.flat(x).flatten(1)
    layout = gl.NVMMASharedLayout.get_default_for([rows, x.shape[-1]], _ELEMENTS[x.dtype])
    return TensorDescriptor(
        x_TC, list(x_TC.shape), list(x_TC.stride()), [rows, x.shape[-1]], layout
    )


@gluon.jit
def ring(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """Barriers, one a stage, that are passed when COUNT have arrived."""
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
    fence_async_shared()  # so that TMA, too, finds the barriers made
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
