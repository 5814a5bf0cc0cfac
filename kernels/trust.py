"""trust: the second reduction of a step, for rules whose step depends on norms of parameter and direction.

``trust_norms`` reads what the direction of a step is made of, chunk by chunk, and stores nothing but partial sums;
``trust_ratios`` adds up those of each tensor, in their order, and puts the ratio into the last field of the tensor's
row, where ``apply`` finds it. A partial is as in ``measure``; a chunk has two, its parameters' and its directions'.
"""

import triton
import triton.language as tl

from .apply import arrays_beside, lanes_of
from .clipping import clipped
from .decide import global_norm
from .formats import GROUP, INT8, load_state, load_weight
from .measure import EUCLID, FLOOR, GROW, SHRINK
from .segments import GRAD, HEAD, PARAM, block_of, chunk_of, pointer

__all__ = ["trust_norms", "trust_ratios"]

# A plain sum of squares from FLOOR to HIGH is good: none of its squares overflowed, and those that became 0 are too
# small to count, as in measure. Other chunks are read once more, and scaled before they are squared. A chunk of zeros
# is one of them: to tell it apart, as measure does, would cost instructions that memory leaves no time for.
HIGH = tl.constexpr(2.0**100)
# The same for float64, whose squares leave the range beyond about 1e154 and below 1e-154.
FLOOR_64 = tl.constexpr(2.0**-900)
HIGH_64 = tl.constexpr(2.0**1000)
SHRINK_64 = tl.constexpr(2.0**-600)
GROW_64 = tl.constexpr(2.0**600)


@triton.jit
def add_squares(x, factor, total, ROWS: tl.constexpr):
    """Add the squares of factor*x. Each thread adds up its own: an accumulator for each takes too many registers."""
    x = x * factor
    return total + tl.sum(tl.reshape(x * x, [ROWS, x.numel // ROWS]), axis=1)


@triton.jit
def block_terms(
    p_ptr, g_ptr, state_ptrs, scale_ptrs, extra_ptr, offset, lanes, left, mask, h, grad_scale, limit,
    ALIGNED: tl.constexpr, DIRECTION: tl.constexpr, CLIP: tl.constexpr, ROUND: tl.constexpr, P: tl.constexpr,
    SLOTS: tl.constexpr, WIDE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """The parameters and the directions of one block, 0 where the mask lets nothing through."""
    p = load_weight(p_ptr, extra_ptr, offset, lanes, mask, ALIGNED, ROUND, P, WIDE, FORMAT, 0)
    g = tl.load(block_of(g_ptr, offset, ALIGNED) + lanes, mask=mask, other=0.0)
    state = ()
    for i in tl.static_range(SLOTS):
        x = load_state(state_ptrs[i], scale_ptrs[i], offset, lanes, left, mask, ALIGNED, i, WIDE, FORMAT, 0)
        state = state + (x,)  # noqa: RUF005
    direction = DIRECTION(p, clipped(g, grad_scale, limit, CLIP, WIDE), *state, h)
    # With eps 0 the direction of nothing is 0/0.
    return p, tl.where(mask, direction, 0.0)


@triton.jit
def chunk_sums(
    p_ptr, g_ptr, state_ptrs, scale_ptrs, extra_ptr, start, full, stop, h, grad_scale, limit, p_factor, factor,
    DIRECTION: tl.constexpr, CLIP: tl.constexpr, ROUND: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr,
    WIDE: tl.constexpr, FORMAT: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The sums of squares of the parameters of a chunk and of its directions, each scaled by its factor."""
    p_total = tl.zeros([ROWS], WIDE)
    total = tl.zeros([ROWS], WIDE)
    lanes = lanes_of(BLOCK, FORMAT)
    for offset in range(start, full, BLOCK):
        left = ((stop - offset) // UNIT * UNIT).to(tl.int32)  # as in apply: the mask is the same for all of an access
        p, direction = block_terms(
            p_ptr, g_ptr, state_ptrs, scale_ptrs, extra_ptr, offset, lanes, left, lanes < left, h, grad_scale, limit,
            True, DIRECTION, CLIP, ROUND, P, SLOTS, WIDE, FORMAT,
        )  # fmt: skip
        p_total = add_squares(p, p_factor, p_total, ROWS)
        total = add_squares(direction, factor, total, ROWS)
    few = lanes_of(TAIL, FORMAT)
    for offset in range(full, stop, TAIL):
        p, direction = block_terms(
            p_ptr, g_ptr, state_ptrs, scale_ptrs, extra_ptr, offset, few, (stop - offset).to(tl.int32),
            offset + few < stop, h, grad_scale, limit, False, DIRECTION, CLIP, ROUND, P, SLOTS, WIDE, FORMAT,
        )  # fmt: skip
        p_total = add_squares(p, p_factor, p_total, ROWS)
        total = add_squares(direction, factor, total, ROWS)
    return tl.sum(p_total), tl.sum(total)


@triton.jit
def factor_for(total, WIDE: tl.constexpr):
    """By what a chunk must be multiplied before it is squared; 1 where the plain sum is good."""
    if WIDE == tl.float64:  # noqa: SIM300
        factor = tl.where(total < FLOOR_64, GROW_64, tl.where(total < HIGH_64, 1.0, SHRINK_64))
    else:
        factor = tl.where(total < FLOOR, GROW, tl.where(total < HIGH, 1.0, SHRINK))
    return factor.to(WIDE)


@triton.jit
def store_partial(out_ptr, total, factor, scale_offset, MODE: tl.constexpr):
    """The sum of squares of the numbers themselves: in float64, or beside the scale that it lacks."""
    scale = 1.0 / factor.to(tl.float64)  # a power of two
    if MODE == EUCLID:
        tl.store(out_ptr, total.to(tl.float64) * scale * scale)
    else:
        tl.store(out_ptr, total.to(tl.float64))
        tl.store(out_ptr + scale_offset, scale)


def _norms_name(specialization):
    """What a profiler shows: fused_trust_norms_lamb_direction_fp32."""
    constants = specialization.constants
    return f"fused_trust_norms_{constants['DIRECTION'].__name__}_{constants['P']}"


@triton.jit(repr=_norms_name, do_not_specialize=["chunk_size", "n_chunks", "row_width"])
def trust_norms(
    segments_ptr,
    chunks_ptr,
    rows_ptr,
    row_width,
    skip_ptr,
    sums_ptr,
    n_chunks,
    chunk_size,
    DIRECTION: tl.constexpr,
    HYPER: tl.constexpr,
    CLIP: tl.constexpr,
    FIELDS: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    WIDTH: tl.constexpr,  # of a row of the pointer table
    SLOTS: tl.constexpr,  # of the state, those that the direction takes
    OF_RULE: tl.constexpr,  # all slots of the state
    ROUND: tl.constexpr,
    WIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    MODE: tl.constexpr,
):
    chunk = tl.program_id(0)
    segment, row, start, stop = chunk_of(segments_ptr, chunks_ptr, chunk, chunk_size, WIDTH)
    if tl.load(skip_ptr) == 0:
        numbers_ptr = rows_ptr + segment * row_width
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
        scale_ptrs, extra_ptr, _ = arrays_beside(row, state_ptrs, HEAD + OF_RULE, OF_RULE, P, FORMAT)
        UNIT: tl.constexpr = GROUP if FORMAT % 8 == INT8 else 16
        aligned = ((p_address | g_address) & 15) == 0
        full = tl.where(aligned, start + (stop - start) // UNIT * UNIT, start)

        one = tl.full([], 1.0, WIDE)
        p_total, total = chunk_sums(
            p_ptr, g_ptr, state_ptrs, scale_ptrs, extra_ptr, start, full, stop, h, grad_scale, limit, one, one,
            DIRECTION, CLIP, ROUND, P, SLOTS, WIDE, FORMAT, UNIT, BLOCK, TAIL, ROWS,
        )  # fmt: skip
        p_factor = factor_for(p_total, WIDE)
        factor = factor_for(total, WIDE)
        if (p_factor != 1.0) | (factor != 1.0):
            p_total, total = chunk_sums(
                p_ptr, g_ptr, state_ptrs, scale_ptrs, extra_ptr, start, full, stop, h, grad_scale, limit, p_factor,
                factor, DIRECTION, CLIP, ROUND, P, SLOTS, WIDE, FORMAT, UNIT, BLOCK, TAIL, ROWS,
            )  # fmt: skip
        store_partial(sums_ptr + chunk, p_total, p_factor, 2 * n_chunks, MODE)
        store_partial(sums_ptr + n_chunks + chunk, total, factor, 2 * n_chunks, MODE)


def _ratios_name(specialization):
    """What a profiler shows: fused_trust_ratios_lamb_ratio."""
    return f"fused_trust_ratios_{specialization.constants['RATIO'].__name__}"


@triton.jit(
    repr=_ratios_name, do_not_specialize=["n_chunks", "tensors_width", "first_partial", "row_width"]
)
def trust_ratios(
    sums_ptr,
    n_chunks,
    tensors_ptr,
    tensors_width,
    first_partial,
    rows_ptr,
    row_width,
    skip_ptr,
    RATIO: tl.constexpr,
    HYPER: tl.constexpr,
    FIELDS: tl.constexpr,
    MODE: tl.constexpr,
):
    if tl.load(skip_ptr) == 0:
        # A program a tensor; where its partials are is decide's table.
        tensor_ptr = tensors_ptr + tl.program_id(0) * tensors_width
        first = tl.load(tensor_ptr + 2) - first_partial
        count = tl.load(tensor_ptr + 3).to(tl.int32)
        p_norm = global_norm(sums_ptr + first, count, 2 * n_chunks, 2.0, MODE)
        norm = global_norm(sums_ptr + n_chunks + first, count, 2 * n_chunks, 2.0, MODE)
        numbers_ptr = rows_ptr + tl.program_id(0) * row_width
        fields = ()
        for i in tl.static_range(FIELDS):
            fields = fields + (tl.load(numbers_ptr + i).to(tl.float64),)  # noqa: RUF005
        ratio = RATIO(p_norm, norm, HYPER(fields))
        tl.store(numbers_ptr + FIELDS - 1, ratio.to(rows_ptr.dtype.element_ty))
