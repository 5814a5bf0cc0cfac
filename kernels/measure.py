"""measure: one read of the gradients, one partial result a chunk, always in the same order.

A partial is a pair (scale, sum) in float64: the chunk's share of ``sum |g|^p`` is ``scale**p * sum``.
"""

import triton
import triton.language as tl

from .segments import GRAD, block_of, chunk_of, pointer

__all__ = ["EUCLID", "LARGEST", "POWER", "measure"]

EUCLID = tl.constexpr(0)  # p = 2 in float32 or narrower: one pass but for extreme magnitudes
LARGEST = tl.constexpr(1)  # p = inf
POWER = tl.constexpr(2)  # any p, and float64: two passes, the second from the cache

# Squares of float32 leave the range beyond about 1e19 and below 1e-19. A chunk without magnitudes beyond BIG, whose
# plain sum reaches FLOOR, has lost less than 2**-30 of it to squares that became 0: 2**15 of them at most, each below
# 2**-126. In other chunks magnitudes are summed in three classes, the outer two scaled by powers of two before they are
# squared; float64 puts the three sums together without loss.
BIG = tl.constexpr(2.0**50)
SMALL = tl.constexpr(2.0**-50)
SHRINK = tl.constexpr(2.0**-80)
GROW = tl.constexpr(2.0**90)
SHRUNK = tl.constexpr(2.0**160)
GROWN = tl.constexpr(2.0**-180)
FLOOR = tl.constexpr(2.0**-80)


@triton.jit
def add_squares(x, low, middle, high):
    """Add the squares of float32 x to the sums of their classes."""
    size = tl.abs(x)
    is_high = size > BIG
    is_low = size < SMALL
    y = x * tl.where(is_high, SHRINK, tl.where(is_low, GROW, 1.0))
    square = y * y
    low += tl.where(is_low, square, 0.0)
    high += tl.where(is_high, square, 0.0)
    middle += tl.where(is_low | is_high, 0.0, square)
    return low, middle, high


@triton.jit
def end_of_wide(g_ptr, start, stop):
    """Up to where a chunk is read 16 bytes at once: whole sixteens of elements, if the gradient is aligned."""
    aligned = (g_ptr.to(tl.int64, bitcast=True) & 15) == 0
    return tl.where(aligned, start + (stop - start) // 16 * 16, start)


@triton.jit
def wide_block(g_ptr, offset, stop, lanes):
    """The elements from ``offset`` on in float32, 0 behind the last whole sixteen."""
    # Written so that the compiler sees that the mask is the same for all elements of an access.
    left = ((stop - offset) // 16 * 16).to(tl.int32)
    return tl.load(block_of(g_ptr, offset, True) + lanes, mask=lanes < left, other=0.0).to(tl.float32)


@triton.jit
def add_plainly(x, total, top):
    """Add the squares of float32 x, and raise the largest magnitude; a NaN is the largest."""
    size = tl.abs(x)
    least = tl.minimum(size, BIG)  # what is beyond is not used, and must not overflow
    return total + least * least, tl.maximum(top, size, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def plain_sum(g_ptr, start, stop, BLOCK: tl.constexpr):
    """(the sum of squares of a chunk in float32; 0 if all are 0, 1 if none is beyond BIG, else 2)."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    top = tl.zeros([BLOCK], tl.float32)
    full = end_of_wide(g_ptr, start, stop)
    # Two blocks are on their way at once: one for each thread would leave the memory waiting.
    for offset in range(start, full, 2 * BLOCK):
        x = wide_block(g_ptr, offset, stop, lanes)
        y = wide_block(g_ptr, offset + BLOCK, stop, lanes)
        total, top = add_plainly(x, total, top)
        total, top = add_plainly(y, total, top)
    for offset in range(full, stop, BLOCK):
        x = tl.load(g_ptr + offset + lanes, mask=offset + lanes < stop, other=0.0).to(tl.float32)
        total, top = add_plainly(x, total, top)
    kind = tl.where(top <= BIG, tl.where(top > 0.0, 1, 0), 2)
    return tl.sum(total), tl.max(kind)


@triton.jit
def careful_sum(g_ptr, start, stop, BLOCK: tl.constexpr):
    """The sum of squares of a chunk of any magnitudes, in float64."""
    lanes = tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.float32)
    middle = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    full = end_of_wide(g_ptr, start, stop)
    for offset in range(start, full, BLOCK):
        low, middle, high = add_squares(wide_block(g_ptr, offset, stop, lanes), low, middle, high)
    for offset in range(full, stop, BLOCK):
        x = tl.load(g_ptr + offset + lanes, mask=offset + lanes < stop, other=0.0).to(tl.float32)
        low, middle, high = add_squares(x, low, middle, high)
    total = tl.sum(middle).to(tl.float64)
    return total + tl.sum(high).to(tl.float64) * SHRUNK + tl.sum(low).to(tl.float64) * GROWN


@triton.jit
def euclid(g_ptr, start, stop, BLOCK: tl.constexpr):
    """The sum of squares of a chunk, in float64: read once more, carefully, where magnitudes ask for it."""
    plain, kind = plain_sum(g_ptr, start, stop, BLOCK)
    total = plain.to(tl.float64)
    if (kind == 2) | ((kind == 1) & (plain < FLOOR)):
        total = careful_sum(g_ptr, start, stop, BLOCK)
    return total


@triton.jit
def largest(g_ptr, start, stop, BLOCK: tl.constexpr):
    """(the largest magnitude of a chunk in float64, NaN left out; how many NaN there are)."""
    lanes = tl.arange(0, BLOCK)
    top = tl.zeros([BLOCK], tl.float64)
    nans = tl.zeros([BLOCK], tl.int32)
    for offset in range(start, stop, BLOCK):
        x = tl.load(g_ptr + offset + lanes, mask=offset + lanes < stop, other=0.0).to(tl.float64)
        top = tl.where(tl.abs(x) > top, tl.abs(x), top)
        nans += (x != x).to(tl.int32)
    return tl.max(top), tl.sum(nans)


@triton.jit
def power_sum(g_ptr, start, stop, top, norm_type, BLOCK: tl.constexpr):
    """The sum of (|x|/top)**p of a chunk in float64."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for offset in range(start, stop, BLOCK):
        x = tl.load(g_ptr + offset + lanes, mask=offset + lanes < stop, other=0.0).to(tl.float64)
        ratio = tl.abs(x) / top
        positive = ratio > 0.0
        total += tl.where(positive, tl.exp(norm_type * tl.log(tl.where(positive, ratio, 1.0))), 0.0)
    return tl.sum(total)


def _name(specialization):
    """What a profiler shows: fused_measure_fp32."""
    return f"fused_measure_{specialization.constants['G']}"


@triton.jit(repr=_name, do_not_specialize=["chunk_size", "scale_offset", "first_partial"])
def measure(
    segments_ptr,
    chunks_ptr,
    partials_ptr,
    scale_offset,
    first_partial,
    chunk_size,
    norm_type,
    G: tl.constexpr,
    MODE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    _, row, start, stop = chunk_of(segments_ptr, chunks_ptr, program, chunk_size, WIDTH)
    g_ptr = pointer(tl.load(row + GRAD), G)
    out_ptr = partials_ptr + first_partial + program
    if MODE == EUCLID:
        tl.store(out_ptr, euclid(g_ptr, start, stop, BLOCK))
        tl.store(out_ptr + scale_offset, 1.0)
    else:
        top, nans = largest(g_ptr, start, stop, BLOCK)
        top = tl.where(nans > 0, float("nan"), top)
        if MODE == LARGEST:
            tl.store(out_ptr, 1.0)
            tl.store(out_ptr + scale_offset, top)
        else:
            usable = (top > 0.0) & (top < float("inf"))
            divisor = tl.where(usable, top, 1.0)
            total = power_sum(g_ptr, start, stop, divisor, norm_type, BLOCK)
            # 0, inf and NaN are the sum themselves.
            tl.store(out_ptr, tl.where(usable, total, top))
            tl.store(out_ptr + scale_offset, divisor)
