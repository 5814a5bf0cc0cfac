"""apply: the one pass that updates parameters and state.

The skeleton finds its chunk, loads, casts, clips, calls the rule, casts and stores; the rule sees numbers only. What
varies from step to step (the rows, the decision to skip) is read from device memory.
"""

import triton
import triton.language as tl

from .clipping import clipped
from .formats import (
    GROUP,
    INT8,
    MASTER,
    SPLIT16,
    element_bits,
    load_state,
    load_weight,
    step_key,
    store_state,
    store_weight,
)
from .segments import GRAD, HEAD, PARAM, block_of, chunk_of, pointer
from .units import factors_of

__all__ = ["apply", "apply_chunk", "arrays_beside", "lanes_of"]


@triton.jit
def lanes_of(BLOCK: tl.constexpr, FORMAT: tl.constexpr):
    """The elements of a block; of 8-bit state a row for each group that shares a scale."""
    if FORMAT % 8 == INT8:
        lanes = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        lanes = tl.arange(0, BLOCK)
    return lanes


@triton.jit
def update_block(
    p_ptr, g_ptr, state_ptrs, scale_ptrs, extra_ptr, key, offset, lanes, left, mask, h, grad_scale, limit,
    ALIGNED: tl.constexpr, RULE: tl.constexpr, CLIP: tl.constexpr, ROUND: tl.constexpr, P: tl.constexpr,
    S: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """One block: everything is loaded before anything is stored."""
    p = load_weight(p_ptr, extra_ptr, offset, lanes, mask, ALIGNED, ROUND, P, WIDE, FORMAT)
    g = tl.load(block_of(g_ptr, offset, ALIGNED) + lanes, mask=mask)
    state = ()
    for i in tl.static_range(SLOTS):
        x = load_state(state_ptrs[i], scale_ptrs[i], offset, lanes, left, mask, ALIGNED, i, WIDE, FORMAT)
        state = state + (x,)  # noqa: RUF005
    new = RULE(p, clipped(g, grad_scale, limit, CLIP, WIDE), *state, h)
    noise = key
    if FORMAT // 64 % 2:
        noise = element_bits(key, offset, lanes)
    store_weight(new[0], p_ptr, extra_ptr, noise, offset, lanes, mask, ALIGNED, ROUND, P, FORMAT)
    for i in tl.static_range(SLOTS):
        store_state(
            new[i + 1], state_ptrs[i], scale_ptrs[i], noise, offset, lanes, left, mask, ALIGNED, ROUND, i, S, FORMAT
        )


@triton.jit
def arrays_beside(row, state_ptrs, HEAD_AND_SLOTS: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr,
                  FORMAT: tl.constexpr):  # fmt: skip
    """(a pointer to scales for every slot, to what completes the weight, the key of this step).

    What a format does not have is any pointer of the right shape, or 0: nobody reads it.
    """
    SCALES: tl.constexpr = SLOTS if FORMAT % 8 == INT8 else 0
    KIND: tl.constexpr = FORMAT // 8 % 8
    scale_ptrs = state_ptrs
    if SCALES > 0:
        scale_ptrs = ()
        for i in tl.static_range(SCALES):
            scale_ptrs = scale_ptrs + (pointer(tl.load(row + HEAD_AND_SLOTS + i), tl.float32),)  # noqa: RUF005
    if KIND >= MASTER:
        EXTRA: tl.constexpr = tl.float32 if KIND == MASTER else tl.int16 if KIND == SPLIT16 else tl.int8
        extra_ptr = pointer(tl.load(row + HEAD_AND_SLOTS + SCALES), EXTRA)
    else:
        extra_ptr = pointer(tl.load(row + PARAM), P)
    key = tl.full([], 0, tl.uint32)
    if FORMAT // 64 % 2:
        AT: tl.constexpr = HEAD_AND_SLOTS + SCALES + (1 if KIND >= MASTER else 0)
        step = tl.load(pointer(tl.load(row + AT), tl.float32))
        key = step_key(tl.load(row + AT + 1).to(tl.uint32), step)
    return scale_ptrs, extra_ptr, key


@triton.jit
def apply_chunk(
    segments_ptr, chunks_ptr, rows_ptr, skip, chunk, chunk_size, units_ptr, factors_ptr, UNITS: tl.constexpr,
    RULE: tl.constexpr, HYPER: tl.constexpr, CLIP: tl.constexpr, ROUND: tl.constexpr, FIELDS: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr, FORMAT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Update one chunk by its tensor's row, unless the step is skipped.

    What leads to the data is asked for before the decision to skip has arrived: one wait less.
    """
    segment, row, start, stop = chunk_of(segments_ptr, chunks_ptr, chunk, chunk_size, WIDTH)
    if skip == 0:
        numbers_ptr = rows_ptr + segment * (FIELDS + 2)
        fields = ()
        for i in tl.static_range(FIELDS):
            fields = fields + (tl.load(numbers_ptr + i),)  # noqa: RUF005
        h = HYPER(fields)
        grad_scale = tl.load(numbers_ptr + FIELDS)
        limit = tl.load(numbers_ptr + FIELDS + 1)

        p_address = tl.load(row + PARAM)
        g_address = tl.load(row + GRAD)
        p_ptr = pointer(p_address, P)
        g_ptr = pointer(g_address, G)
        state_ptrs = ()
        for i in tl.static_range(SLOTS):
            state_ptrs = state_ptrs + (pointer(tl.load(row + HEAD + i), S),)  # noqa: RUF005
        scale_ptrs, extra_ptr, key = arrays_beside(row, state_ptrs, HEAD + SLOTS, SLOTS, P, FORMAT)

        lanes = lanes_of(BLOCK, FORMAT)
        # Aligned tensors go in 16-byte accesses, as far as there are 16 elements (or whole groups of 8-bit state): the
        # mask is the same for all of an access. The rest, and tensors that somebody placed at odd addresses, go one by
        # one. State is always aligned.
        UNIT: tl.constexpr = GROUP if FORMAT % 8 == INT8 else 16
        aligned = ((p_address | g_address) & 15) == 0
        full = tl.where(aligned, start + (stop - start) // UNIT * UNIT, start)
        for offset in range(start, full, BLOCK):
            # Written so that the compiler sees the multiple of 16.
            left = ((stop - offset) // UNIT * UNIT).to(tl.int32)
            mask = lanes < left
            scales = grad_scale
            if UNITS:
                scales = grad_scale * factors_of(units_ptr, factors_ptr, segment, offset, lanes, mask)
            update_block(
                p_ptr, g_ptr, state_ptrs, scale_ptrs, extra_ptr, key, offset, lanes, left, mask, h, scales, limit,
                True, RULE, CLIP, ROUND, P, S, SLOTS, WIDE, FORMAT,
            )  # fmt: skip
        # One element a thread: eight addresses of each array would cost more registers than the loop above needs.
        few = lanes_of(TAIL, FORMAT)
        for offset in range(full, stop, TAIL):
            within = offset + few < stop
            single = grad_scale
            if UNITS:
                single = grad_scale * factors_of(units_ptr, factors_ptr, segment, offset, few, within)
            update_block(
                p_ptr, g_ptr, state_ptrs, scale_ptrs, extra_ptr, key, offset, few, (stop - offset).to(tl.int32),
                within, h, single, limit, False, RULE, CLIP, ROUND, P, S, SLOTS, WIDE, FORMAT,
            )  # fmt: skip


def _name(specialization):
    """What a profiler shows: fused_apply_adamw_fp32."""
    constants = specialization.constants
    return f"fused_apply_{constants['RULE'].__name__}_{constants['P']}"


@triton.jit(repr=_name, do_not_specialize=["chunk_size", "n_chunks"])
def apply(
    segments_ptr,
    chunks_ptr,
    rows_ptr,
    skip_ptr,
    n_chunks,
    chunk_size,
    units_ptr,
    factors_ptr,
    UNITS: tl.constexpr,  # whether the units of a tensor have factors of their own
    RULE: tl.constexpr,
    HYPER: tl.constexpr,
    CLIP: tl.constexpr,
    ROUND: tl.constexpr,
    FIELDS: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    # Backward, so that the gradients measured last, still in the L2 cache, are read first.
    chunk = n_chunks - 1 - tl.program_id(0)
    apply_chunk(
        segments_ptr, chunks_ptr, rows_ptr, tl.load(skip_ptr), chunk, chunk_size, units_ptr, factors_ptr, UNITS,
        RULE, HYPER, CLIP, ROUND, FIELDS, P, G, S, SLOTS, WIDE, FORMAT, WIDTH, BLOCK, TAIL,
    )  # fmt: skip
