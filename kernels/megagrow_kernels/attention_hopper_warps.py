"""Warps of the Hopper attention: one producer, two consumers, and the barriers between them.

Keys are visited from the diagonal backwards, so only the first tile needs the causal mask, and
every row sees itself first: no maximum is infinite. Two things overlap with a consumer's softmax:
its own product with V of the previous key tile, which is still running, and the other consumer's
matmuls, since the consumers alternate in starting theirs.

Every wait and arrival at a barrier counts key tiles (or query tiles) since the start of the
program, over all of its query tiles: tile n uses stage n mod STAGES for the (n div STAGES)th time,
and the parity of that number is the phase of the mbarrier.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from megagrow_kernels import packing

QUERIES = gl.constexpr(64)
"""Query rows of a consumer: the rows of one warpgroup matmul instruction."""
TILE = gl.constexpr(packing.TILE)
"""Query rows of a tile, for both consumers, and keys of a tile. They are equal, so that the causal
mask cuts only one tile of keys.
"""
CONSUMERS = gl.constexpr(2)

load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""Triton 3.6 has only the longer name, 3.9 the shorter."""


@gluon.constexpr_function
def matmul_layout(columns: int) -> gl.NVMMADistributedLayout:
    """Return the register layout of 64 rows of an fp32 accumulator in a warpgroup."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


@gluon.constexpr_function
def store_layout(columns: int) -> gl.BlockedLayout:
    """Return the layout of 64 rows for global stores: 16 bytes per thread, adjacent full rows."""
    across = columns // 8
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def place_in_round(number):
    """Return the program's place in a round; rounds alternate in direction: work is sorted."""
    program = gl.program_id(0)
    return gl.where(number % 2 == 0, program, gl.num_programs(0) - 1 - program)


@gluon.jit
def items_of_program(items):
    """Return the number of `items` (a query tile of one head each) that this program processes."""
    rounds = items // gl.num_programs(0)
    left = items % gl.num_programs(0)
    return gl.where(place_in_round(rounds) < left, rounds + 1, rounds)


@gluon.jit
def item(number, tiles, HEADS: gl.constexpr, WINDOW: gl.constexpr):
    """Return item `number` of this program.

    The item is (head, first query, end of its document, number of key tiles, number of key tiles
    after the first that need no mask).
    """
    index = number * gl.num_programs(0) + place_in_round(number)
    tile = index // HEADS
    first = gl.load(tiles + 3 * tile)
    start = gl.load(tiles + 3 * tile + 1)
    end = gl.load(tiles + 3 * tile + 2)
    if WINDOW:
        lowest = gl.maximum(start, first - WINDOW + 1)
        blocks = (first - lowest + TILE - 1) // TILE + 1
        plain = gl.minimum(blocks, max(WINDOW // TILE, 1)) - 1
    else:
        blocks = (first - start) // TILE + 1
        plain = blocks - 1
    return index % HEADS, first, end, blocks, plain


@gluon.jit
def produce(
    work,
    inputs,
    memory,
    full,
    empty,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Run the producer: fill shared memory, as far ahead of the consumers as the rings allow."""
    tiles, items = work
    q_desc, k_desc, v_desc = inputs
    q_memory, k_memory, v_memory = memory
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    STAGES: gl.constexpr = k_memory.shape[0]
    WIDTH: gl.constexpr = q_desc.block_type.shape[1]
    count = 0
    for number in range(items_of_program(items)):
        head, first, _, blocks, _ = item(number, tiles, HEADS, WINDOW)
        for part in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(part), (number & 1) ^ 1)
            mbarrier.expect(q_full.index(part), q_desc.block_type.nbytes)
            load_tile(
                q_desc,
                [first + part * QUERIES, head * WIDTH],
                q_full.index(part),
                q_memory.index(part),
            )
        for block in range(blocks):
            stage = count % STAGES
            parity = (count // STAGES & 1) ^ 1
            where = [first - block * TILE, head // GROUP * WIDTH]
            mbarrier.wait(k_empty.index(stage), parity)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            load_tile(k_desc, where, k_full.index(stage), k_memory.index(stage))
            mbarrier.wait(v_empty.index(stage), parity)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            load_tile(v_desc, where, v_full.index(stage), v_memory.index(stage))
            count += 1


@gluon.jit
def start_scores(queries, k_memory, k_full, turn, count, PART: gl.constexpr):
    """Wait for a tile of keys and for this consumer's turn, then start Q K^T asynchronously."""
    STAGES: gl.constexpr = k_memory.shape[0]
    stage = count % STAGES
    layout: gl.constexpr = matmul_layout(TILE)
    mbarrier.wait(k_full.index(stage), count // STAGES & 1)
    mbarrier.wait(turn.index(PART), (count & 1) ^ (1 - PART))
    return warpgroup_mma(
        queries,
        k_memory.index(stage).permute((1, 0)),
        gl.zeros([QUERIES, TILE], gl.float32, layout),
        use_acc=False,
        is_async=True,
    )


@gluon.jit
def mask_scores(scores, block, PART: gl.constexpr, WINDOW: gl.constexpr):
    """Set masked scores to minus infinity; `block` 0 is the tile on the diagonal."""
    layout: gl.constexpr = matmul_layout(TILE)
    query = PART * QUERIES + gl.arange(0, QUERIES, gl.SliceLayout(1, layout))
    key = gl.arange(0, TILE, gl.SliceLayout(0, layout)) - block * TILE
    distance = gl.expand_dims(query, 1) - gl.expand_dims(key, 0)
    seen = distance >= 0
    if WINDOW:
        seen = seen & (distance < WINDOW)
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def softmax_step(scores, maximum, total, scale):
    """Compute one step of the online softmax, in base 2.

    Returns unnormalized probabilities, the scaled row maximum and the sum so far, and the factor by
    which earlier sums shrink.
    """
    higher = gl.maximum(maximum, gl.max(scores, axis=1) * scale)
    chances = gl.exp2(scores * scale - gl.expand_dims(higher, 1))
    shrink = gl.exp2(maximum - higher)
    return chances, higher, total * shrink + gl.sum(chances, axis=1), shrink


@gluon.jit
def as_operand(chances, V_TYPE: gl.constexpr, WIDTH: gl.constexpr):
    """Return rounded probabilities in the register layout of a matmul operand with V."""
    layout: gl.constexpr = gl.DotOperandLayout(0, matmul_layout(WIDTH), 2)
    return gl.convert_layout(chances.to(V_TYPE), layout)


@gluon.jit
def attend(
    state,
    queries,
    memory,
    full,
    empty,
    turn,
    scale,
    count,
    block,
    PART: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Process key tile `count`, any but the first of its queries.

    Its scores are computed concurrently with the product of the previous tile with V; its softmax
    overlaps with the latter. WINDOW is 0 if no key of the tile is masked.
    """
    output, chances, maximum, total = state
    k_memory, v_memory = memory
    k_full, v_full = full
    k_empty, v_empty = empty
    STAGES: gl.constexpr = k_memory.shape[0]
    WIDTH: gl.constexpr = v_memory.shape[2]
    before = count - 1
    scores = start_scores(queries, k_memory, k_full, turn, count, PART)
    mbarrier.wait(v_full.index(before % STAGES), before // STAGES & 1)
    output = warpgroup_mma(chances, v_memory.index(before % STAGES), output, is_async=True)
    mbarrier.arrive(turn.index(1 - PART))
    scores = warpgroup_mma_wait(1, (scores,))
    mbarrier.arrive(k_empty.index(count % STAGES))
    if WINDOW:
        scores = mask_scores(scores, block, PART, WINDOW)
    later, maximum, total, shrink = softmax_step(scores, maximum, total, scale)
    later = as_operand(later, v_memory.dtype, WIDTH)
    # Already waited for. The assembler moves a matmul wait up, before arithmetic that does not
    # depend on it, but not past this branch: the softmax stays before the wait.
    mbarrier.wait(v_full.index(before % STAGES), before // STAGES & 1)
    # The matmul reads the previous tile's probabilities from registers until this point.
    output, chances = warpgroup_mma_wait(0, (output, chances))
    mbarrier.arrive(v_empty.index(before % STAGES))
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, matmul_layout(WIDTH)))
    output = output * gl.expand_dims(shrink, 1)
    return output, later, maximum, total


@gluon.jit
def clear_values(v_memory, v_full, clean, count, rows):
    """Zero the rows of value tile `count` from `rows` on, which belong to the next document.

    Their probabilities are zero, but zero times infinity or NaN is not.
    """
    STAGES: gl.constexpr = v_memory.shape[0]
    SLICE: gl.constexpr = 32
    layout: gl.constexpr = store_layout(v_memory.shape[2])
    if rows < TILE:
        mbarrier.wait(v_full.index(count % STAGES), count // STAGES & 1)
        for i in gl.static_range(TILE // SLICE):
            part = v_memory.index(count % STAGES).slice(i * SLICE, SLICE)
            row = i * SLICE + gl.arange(0, SLICE, gl.SliceLayout(1, layout))
            part.store(gl.where(gl.expand_dims(row < rows, 1), part.load(layout), 0.0))
        fence_async_shared()
        mbarrier.arrive(clean)


@gluon.jit
def store_rows(
    out, logsumexp, output, maximum, total, head, first, end, tokens, HEADS: gl.constexpr
):
    """Store rows first..first+64 of one head that belong to the document."""
    WIDTH: gl.constexpr = output.shape[1]
    layout: gl.constexpr = store_layout(WIDTH)
    here: gl.constexpr = gl.SliceLayout(1, matmul_layout(TILE))
    row = first + gl.arange(0, QUERIES, here)
    gl.store(logsumexp + head.to(gl.int64) * tokens + row, maximum + gl.log2(total), row < end)
    total = gl.convert_layout(total, gl.SliceLayout(1, matmul_layout(WIDTH)))
    rounded = (output / gl.expand_dims(total, 1)).to(out.dtype.element_ty)
    row = gl.expand_dims(first + gl.arange(0, QUERIES, gl.SliceLayout(1, layout)), 1)
    column = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)), 0)
    where = out + row.to(gl.int64) * (HEADS * WIDTH) + (head * WIDTH + column)
    gl.store(where, gl.convert_layout(rounded, layout), row < end)


@gluon.jit
def consume(
    outputs,
    work,
    scale,
    memory,
    full,
    empty,
    order,
    PART: gl.constexpr,
    HEADS: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Run a consumer: the attention of its 64 rows of each query tile, over all its keys."""
    out, logsumexp, tokens = outputs
    tiles, items = work
    turn, clean = order
    q_memory, k_memory, v_memory = memory
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    kv_memory, kv_full, kv_empty = (k_memory, v_memory), (k_full, v_full), (k_empty, v_empty)
    STAGES: gl.constexpr = k_memory.shape[0]
    WIDTH: gl.constexpr = v_memory.shape[2]
    queries = q_memory.index(PART)
    count = 0
    cleared = 0
    for number in range(items_of_program(items)):
        head, first, end, blocks, plain = item(number, tiles, HEADS, WINDOW)
        if PART == 1:
            clear_values(v_memory, v_full, clean, count, end - first)
        mbarrier.wait(q_full.index(PART), number & 1)
        scores = start_scores(queries, k_memory, k_full, turn, count, PART)
        mbarrier.arrive(turn.index(1 - PART))
        scores = warpgroup_mma_wait(0, (scores,))
        mbarrier.arrive(k_empty.index(count % STAGES))
        scores = mask_scores(scores, 0, PART, WINDOW)
        rows: gl.constexpr = gl.SliceLayout(1, matmul_layout(TILE))
        maximum = gl.full([QUERIES], float("-inf"), gl.float32, rows)
        total = gl.zeros([QUERIES], gl.float32, rows)
        chances, maximum, total, _ = softmax_step(scores, maximum, total, scale)
        chances = as_operand(chances, v_memory.dtype, WIDTH)
        output = gl.zeros([QUERIES, WIDTH], gl.float32, matmul_layout(WIDTH))
        state = (output, chances, maximum, total)
        if end < first + TILE:
            mbarrier.wait(clean, cleared & 1)
            cleared += 1
        count += 1
        for block in range(1, plain + 1):
            state = attend(
                state, queries, kv_memory, kv_full, kv_empty, turn, scale, count, block, PART, 0
            )
            count += 1
        if WINDOW:
            for block in range(plain + 1, blocks):
                state = attend(
                    state,
                    queries,
                    kv_memory,
                    kv_full,
                    kv_empty,
                    turn,
                    scale,
                    count,
                    block,
                    PART,
                    WINDOW,
                )
                count += 1
        mbarrier.arrive(q_empty.index(PART))
        output, chances, maximum, total = state
        last = count - 1
        mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
        output = warpgroup_mma(chances, v_memory.index(last % STAGES), output, is_async=True)
        output, chances = warpgroup_mma_wait(0, (output, chances))
        mbarrier.arrive(v_empty.index(last % STAGES))
        store_rows(
            out, logsumexp, output, maximum, total, head, first + PART * QUERIES, end, tokens, HEADS
        )
