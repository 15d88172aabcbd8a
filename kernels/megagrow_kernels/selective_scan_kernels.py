"""Triton kernels of the selective scan; see `selective_scan.py` for the algorithm.

The states of a block of channels are a tile (NUMBERS, CHANNELS): a thread holds all numbers of its
channels, so sums over the state need no communication. The state size is padded to a power of 2;
padding has rate 0 and weight 0. After the last token, a step size of 0 leaves the state unchanged.
Rates are A log2(e), for base-2 exponentials.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
TERMS = tl.constexpr(8)
"""Terms of the series of artanh up to 1/3, to fp32 precision."""


@triton.jit
def _read(pointers, mask):
    return tl.load(pointers, mask, other=0.0).to(tl.float32)


@triton.jit
def _softplus(x):
    """Return log(1 + exp(x)), with log(1 + e) = 2 artanh(e / (2 + e)): accurate for tiny e."""
    small = tl.exp(-tl.abs(x))
    ratio = small / (2.0 + small)
    square = ratio * ratio
    series = tl.zeros_like(x)
    for term in tl.static_range(TERMS):
        series = series * square + 2.0 / (2 * (TERMS - 1 - term) + 1)
    return tl.maximum(x, 0.0) + ratio * series


@triton.jit
def _channels(CHANNELS: tl.constexpr):
    """Return the channels of this program, (1, CHANNELS)."""
    return tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]


@triton.jit
def _rates(A, channel, number, WIDTH: tl.constexpr, STATES: tl.constexpr):
    inside = (channel < WIDTH) & (number < STATES)
    return _read(A + channel * STATES + number, inside) * LOG2_E


@triton.jit
def _state_offsets(chunk, channel, number, WIDTH: tl.constexpr, STATES: tl.constexpr):
    """Return the offsets of a chunk's state in a tensor (B, chunks, N, C)."""
    return (chunk.to(tl.int64) * STATES + number) * WIDTH + channel


@triton.jit
def _step(dt, bias, rate, starts, row, exists, channel, WIDTH: tl.constexpr):
    """Return the input of softplus, the step size and the decay of the state at one token."""
    inside = exists & (channel < WIDTH)
    raw = _read(dt + row * WIDTH + channel, inside) + bias
    delta = tl.where(inside, _softplus(raw), 0.0)
    is_start = tl.load(starts + row, exists, other=0) != 0
    return raw, delta, tl.where(is_start, 0.0, tl.exp2(delta * rate))


@triton.jit
def _advance(
    state,
    x,
    dt,
    B,
    bias,
    rate,
    starts,
    row,
    exists,
    channel,
    number,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
):
    """Return the state after one token, and x of this token."""
    _, delta, decay = _step(dt, bias, rate, starts, row, exists, channel, WIDTH)
    value = _read(x + row * WIDTH + channel, exists & (channel < WIDTH))
    weight = _read(B + row * STATES + number, exists & (number < STATES))
    return state * decay + delta * value * weight, value


@triton.jit(do_not_specialize=["length", "chunks"])
def _summary_kernel(
    source,
    dt,
    A,
    weights,
    dt_bias,
    starts,
    local,
    product,
    length,
    chunks,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    NUMBERS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Scan a chunk that starts from 0: its last state, and the product of its decays.

    Forward, source is x and weights are B. In reverse, source is dy and weights are C, and the last
    state is the gradient of the state before the chunk.
    """
    channel, number = _channels(CHANNELS), tl.arange(0, NUMBERS)[:, None]
    rate = _rates(A, channel, number, WIDTH, STATES)
    bias = _read(dt_bias + channel, channel < WIDTH)
    state, decays = tl.zeros_like(rate), tl.full(rate.shape, 1.0, tl.float32)
    first = tl.program_id(1) * CHUNK
    count = tl.minimum(CHUNK, length - first)
    for index in range(0, count):
        token = first + (count - 1 - index if REVERSE else index)
        row = tl.program_id(2).to(tl.int64) * length + token
        _, delta, decay = _step(dt, bias, rate, starts, row, token < length, channel, WIDTH)
        value = _read(source + row * WIDTH + channel, channel < WIDTH)
        weight = _read(weights + row * STATES + number, number < STATES)
        if REVERSE:
            state = (state + value * weight) * decay
        else:
            state = state * decay + delta * value * weight
        decays *= decay
    at = tl.program_id(2) * chunks + tl.program_id(1)
    offsets = _state_offsets(at, channel, number, WIDTH, STATES)
    inside = (channel < WIDTH) & (number < STATES)
    tl.store(local + offsets, state, inside)
    tl.store(product + offsets, decays, inside)


@triton.jit(do_not_specialize=["chunks"])
def _carry_kernel(
    local, product, chunks, REVERSE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Replace the last state of each chunk by the state that enters it, of SIZE numbers."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < SIZE
    carry = tl.zeros((BLOCK,), tl.float32)
    for index in range(0, chunks):
        chunk = chunks - 1 - index if REVERSE else index
        at = (tl.program_id(1) * chunks + chunk).to(tl.int64) * SIZE + offset
        state, decay = _read(local + at, inside), _read(product + at, inside)
        tl.store(local + at, carry, inside)
        carry = carry * decay + state


@triton.jit(do_not_specialize=["length", "chunks"])
def _output_kernel(
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    starts,
    entering,
    y,
    length,
    chunks,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    NUMBERS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel, number = _channels(CHANNELS), tl.arange(0, NUMBERS)[:, None]
    rate = _rates(A, channel, number, WIDTH, STATES)
    bias = _read(dt_bias + channel, channel < WIDTH)
    skip = _read(D + channel, channel < WIDTH)
    at = tl.program_id(2) * chunks + tl.program_id(1)
    offsets = _state_offsets(at, channel, number, WIDTH, STATES)
    state = _read(entering + offsets, (channel < WIDTH) & (number < STATES))
    first = tl.program_id(1) * CHUNK
    for token in range(first, tl.minimum(first + CHUNK, length)):
        row, exists = tl.program_id(2).to(tl.int64) * length + token, token < length
        place = (bias, rate, starts, row, exists, channel, number)
        state, value = _advance(state, x, dt, B, *place, WIDTH, STATES)
        weight = _read(C + row * STATES + number, number < STATES)
        out = skip * value + tl.sum(state * weight, 0, keep_dims=True)
        tl.store(y + row * WIDTH + channel, out.to(y.dtype.element_ty), channel < WIDTH)


@triton.jit(do_not_specialize=["length", "chunks"])
def _gradient_kernel(
    dy,
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    starts,
    entering,
    upstream,
    scratch,
    dx,
    ddt,
    dA,
    dB,
    dC,
    dD,
    dbias,
    length,
    chunks,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    NUMBERS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Compute the gradients of every program_id(1)-th chunk; see `selective_scan_backward`.

    entering and upstream are the states before the chunks and the gradients of those after them.
    scratch holds the states of one chunk at every STEPS-th token; the states between them are
    recomputed in registers.
    """
    channel, number = _channels(CHANNELS), tl.arange(0, NUMBERS)[:, None]
    of_channel, of_number = channel < WIDTH, number < STATES
    rate = _rates(A, channel, number, WIDTH, STATES)
    bias = _read(dt_bias + channel, of_channel)
    skip = _read(D + channel, of_channel)
    batch, share = tl.program_id(2), tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    program = (share * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    place = scratch + (program * (CHUNK // STEPS) * NUMBERS + number) * CHANNELS
    place += tl.arange(0, CHANNELS)[None, :]
    index = tl.arange(0, STEPS)[:, None, None]
    sum_A, sum_D, sum_bias = tl.zeros_like(rate), tl.zeros_like(bias), tl.zeros_like(bias)
    for chunk in range(tl.program_id(1), chunks, tl.num_programs(1)):
        parts = tl.cdiv(tl.minimum(CHUNK, length - chunk * CHUNK), STEPS)
        offsets = _state_offsets(batch * chunks + chunk, channel, number, WIDTH, STATES)
        state = _read(entering + offsets, of_channel & of_number)
        for part in range(0, parts):
            tl.store(place + part * (NUMBERS * CHANNELS), state)
            for step in tl.static_range(STEPS):
                token = chunk * CHUNK + part * STEPS + step
                row, exists = batch.to(tl.int64) * length + token, token < length
                at = (bias, rate, starts, row, exists, channel, number)
                state, _ = _advance(state, x, dt, B, *at, WIDTH, STATES)
        tl.debug_barrier()
        gradient = _read(upstream + offsets, of_channel & of_number)
        for back in range(0, parts):
            part = parts - 1 - back
            state = tl.load(place + part * (NUMBERS * CHANNELS))
            kept = tl.zeros((STEPS, NUMBERS, CHANNELS), tl.float32)
            for step in tl.static_range(STEPS):
                kept = tl.where(index == step, state[None, :, :], kept)
                token = chunk * CHUNK + part * STEPS + step
                row, exists = batch.to(tl.int64) * length + token, token < length
                at = (bias, rate, starts, row, exists, channel, number)
                state, _ = _advance(state, x, dt, B, *at, WIDTH, STATES)
            for later in tl.static_range(STEPS):
                token = chunk * CHUNK + part * STEPS + (STEPS - 1 - later)
                row, exists = batch.to(tl.int64) * length + token, token < length
                raw, delta, decay = _step(dt, bias, rate, starts, row, exists, channel, WIDTH)
                at, inside = row * WIDTH + channel, exists & of_channel
                value, slope = _read(x + at, inside), _read(dy + at, inside)
                into = _read(B + row * STATES + number, exists & of_number)
                out_of = _read(C + row * STATES + number, exists & of_number)
                before = tl.sum(tl.where(index == STEPS - 1 - later, kept, 0.0), 0)
                remaining, entered = decay * before, delta * value
                gradient += out_of * slope
                of_input = tl.sum(gradient * into, 0, keep_dims=True)
                of_decay = tl.sum(gradient * rate * remaining, 0, keep_dims=True)
                of_delta = LN_2 * of_decay + value * of_input
                of_raw = tl.where(inside, of_delta * tl.sigmoid(raw), 0.0)
                of_x = delta * of_input + skip * slope
                tl.store(dx + at, of_x.to(dx.dtype.element_ty), inside)
                tl.store(ddt + at, of_raw.to(ddt.dtype.element_ty), inside)
                at = tl.program_id(0).to(tl.int64) * tl.num_programs(2) * length + row
                of_B = tl.sum(gradient * entered, 1, keep_dims=True)
                of_C = tl.sum((remaining + entered * into) * slope, 1, keep_dims=True)
                tl.store(dB + at * STATES + number, of_B, exists & of_number)
                tl.store(dC + at * STATES + number, of_C, exists & of_number)
                sum_A += gradient * (delta * remaining)
                sum_D += slope * value
                sum_bias += of_raw
                gradient *= decay
        tl.debug_barrier()
    at = share.to(tl.int64) * WIDTH + channel
    tl.store(dA + at * STATES + number, sum_A, of_channel & of_number)
    tl.store(dD + at, sum_D, of_channel)
    tl.store(dbias + at, sum_bias, of_channel)
