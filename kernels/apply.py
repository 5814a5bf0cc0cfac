"""apply: the one pass that updates parameters and state.

The skeleton finds its chunk, loads, casts, clips, calls the rule, casts and stores; the rule sees numbers only. What
varies from step to step (the rows, the decision to skip) is read from device memory.
"""

import triton
import triton.language as tl

from .segments import GRAD, HEAD, PARAM, block_of, chunk_of, pointer
from .units import factors_of

__all__ = ["apply", "apply_chunk"]


@triton.jit
def update_block(
    p_ptr, g_ptr, state_ptrs, offset, lanes, mask, h, grad_scale, limit, ALIGNED: tl.constexpr,
    RULE: tl.constexpr, CLIP: tl.constexpr, ROUND: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block: everything is loaded before anything is stored."""
    p_ptrs = block_of(p_ptr, offset, ALIGNED) + lanes
    p = tl.load(p_ptrs, mask=mask).to(WIDE)
    g = tl.load(block_of(g_ptr, offset, ALIGNED) + lanes, mask=mask).to(WIDE)
    state = ()
    for i in tl.static_range(SLOTS):
        loaded = tl.load(block_of(state_ptrs[i], offset, ALIGNED) + lanes, mask=mask)
        state = state + (loaded.to(WIDE),)  # noqa: RUF005
    new = RULE(p, CLIP(g, grad_scale, limit), *state, h)
    tl.store(p_ptrs, ROUND(new[0], P), mask=mask)
    for i in tl.static_range(SLOTS):
        tl.store(block_of(state_ptrs[i], offset, ALIGNED) + lanes, ROUND(new[i + 1], S), mask=mask)


@triton.jit
def apply_chunk(
    segments_ptr, chunks_ptr, rows_ptr, skip, chunk, chunk_size, units_ptr, factors_ptr, UNITS: tl.constexpr,
    RULE: tl.constexpr, HYPER: tl.constexpr, CLIP: tl.constexpr, ROUND: tl.constexpr, FIELDS: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Update one chunk by its tensor's row, unless the step is skipped.

    What leads to the data is asked for before the decision to skip has arrived: one wait less.
    """
    segment, row, start, stop = chunk_of(segments_ptr, chunks_ptr, chunk, chunk_size, HEAD + SLOTS)
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

        lanes = tl.arange(0, BLOCK)
        # Aligned tensors go in 16-byte accesses, as far as there are 16 elements: the mask is the same for all of an
        # access. The rest, and tensors that somebody placed at odd addresses, go one by one. State is always aligned.
        aligned = ((p_address | g_address) & 15) == 0
        full = tl.where(aligned, start + (stop - start) // 16 * 16, start)
        for offset in range(start, full, BLOCK):
            # Written so that the compiler sees the multiple of 16.
            left = ((stop - offset) // 16 * 16).to(tl.int32)
            mask = lanes < left
            scales = grad_scale
            if UNITS:
                scales = grad_scale * factors_of(units_ptr, factors_ptr, segment, offset, lanes, mask)
            update_block(
                p_ptr, g_ptr, state_ptrs, offset, lanes, mask, h, scales, limit, True,
                RULE, CLIP, ROUND, P, S, SLOTS, WIDE,
            )  # fmt: skip
        # One element a thread: eight addresses of each array would cost more registers than the loop above needs.
        few = tl.arange(0, TAIL)
        for offset in range(full, stop, TAIL):
            within = offset + few < stop
            single = grad_scale
            if UNITS:
                single = grad_scale * factors_of(units_ptr, factors_ptr, segment, offset, few, within)
            update_block(
                p_ptr, g_ptr, state_ptrs, offset, few, within, h, single, limit, False,
                RULE, CLIP, ROUND, P, S, SLOTS, WIDE,
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
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    # Backward, so that the gradients measured last, still in the L2 cache, are read first.
    chunk = n_chunks - 1 - tl.program_id(0)
    apply_chunk(
        segments_ptr, chunks_ptr, rows_ptr, tl.load(skip_ptr), chunk, chunk_size, units_ptr, factors_ptr, UNITS,
        RULE, HYPER, CLIP, ROUND, FIELDS, P, G, S, SLOTS, WIDE, BLOCK, TAIL,
    )  # fmt: skip
