"""measure: one read of the gradients, one partial result a chunk, always in the same order.

A partial is a pair (scale, sum) in float64: the chunk's share of ``sum |g|^p`` is ``scale**p * sum``.
"""

import triton
import triton.language as tl

from .segments import GRAD, block_of, chunk_of, pointer

__all__ = ["EUCLID", "LARGEST", "POWER", "measure", "measure_chunk"]

EUCLID = tl.constexpr(0)  # p = 2 in float32 or narrower: one pass but for extreme magnitudes
LARGEST = tl.constexpr(1)  # p = inf
POWER = tl.constexpr(2)  # any p, and float64: two passes, the second from the cache

# Squares of float32 leave the range beyond about 1e19 and below 1e-19. A chunk without magnitudes beyond BIG, whose
# plain sum reaches FLOOR, has lost less than 2**-30 of it to squares that became 0: 2**15 of them at most, each below
# 2**-126. Other chunks are summed once more, scaled by a power of two before they are squared. Where magnitudes reach
# beyond BIG, what SHRINK sends below 2**-63 is too small to count; where they do not and the sum is below FLOOR, all
# are at most 2**-40, and GROW brings even the smallest number to a square that float32 has.
BIG = tl.constexpr(2.0**50)
FLOOR = tl.constexpr(2.0**-80)
SHRINK = tl.constexpr(2.0**-80)
GROW = tl.constexpr(2.0**90)
SHRUNK = tl.constexpr(2.0**160)
GROWN = tl.constexpr(2.0**-180)


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
def scaled_sum(g_ptr, start, stop, factor, BLOCK: tl.constexpr):
    """The sum of (factor*x)**2 of a chunk in float32."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    full = end_of_wide(g_ptr, start, stop)
    for offset in range(start, full, BLOCK):
        x = wide_block(g_ptr, offset, stop, lanes) * factor
        total += x * x
    for offset in range(full, stop, BLOCK):
        x = tl.load(g_ptr + offset + lanes, mask=offset + lanes < stop, other=0.0).to(tl.float32) * factor
        total += x * x
    return tl.sum(total)


@triton.jit
def euclid(g_ptr, start, stop, BLOCK: tl.constexpr):
    """The sum of squares of a chunk, in float64: read once more, scaled, where magnitudes ask for it."""
    plain, kind = plain_sum(g_ptr, start, stop, BLOCK)
    total = plain.to(tl.float64)
    if (kind == 2) | ((kind == 1) & (plain < FLOOR)):
        scaled = scaled_sum(g_ptr, start, stop, tl.where(kind == 2, SHRINK, GROW), BLOCK)
        total = scaled.to(tl.float64) * tl.where(kind == 2, SHRUNK, GROWN)
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


@triton.jit
def measure_chunk(
    segments_ptr, chunks_ptr, partials_ptr, scale_offset, first_partial, chunk, chunk_size, norm_type,
    G: tl.constexpr, MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The partial of one chunk."""
    _, row, start, stop = chunk_of(segments_ptr, chunks_ptr, chunk, chunk_size, WIDTH)
    g_ptr = pointer(tl.load(row + GRAD), G)
    out_ptr = partials_ptr + first_partial + chunk
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
    measure_chunk(
        segments_ptr, chunks_ptr, partials_ptr, scale_offset, first_partial, tl.program_id(0), chunk_size, norm_type,
        G, MODE, WIDTH, BLOCK,
    )  # fmt: skip
