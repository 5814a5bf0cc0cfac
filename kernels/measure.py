"""measure: one read of the gradients, one partial result a chunk, always in the same order.

A partial is a pair (scale, sum) in float64: the chunk's share of ``sum |g|^p`` is ``scale**p * sum``.
"""

import triton
import triton.language as tl

from .segments import GRAD, block_of, chunk_of, pointer

__all__ = ["EUCLID", "LARGEST", "POWER", "measure", "measure_chunk"]

EUCLID = tl.constexpr(0)  # p = 2 in float32 or narrower: one pass
LARGEST = tl.constexpr(1)  # p = inf
POWER = tl.constexpr(2)  # any p, and float64: two passes, the second from the cache

# Squares of float32 leave the range beyond about 1e19 and below 1e-19. So magnitudes are summed in three classes, the
# outer two scaled by powers of two before they are squared; float64 puts the three sums together without loss.
BIG = tl.constexpr(2.0**50)
SMALL = tl.constexpr(2.0**-50)
SHRINK = tl.constexpr(2.0**-80)
GROW = tl.constexpr(2.0**90)
SHRUNK = tl.constexpr(2.0**160)
GROWN = tl.constexpr(2.0**-180)


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
def euclid(g_ptr, start, stop, BLOCK: tl.constexpr):
    """The sum of squares of a chunk, in float64."""
    lanes = tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.float32)
    middle = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    # Full blocks without a mask vectorise; what is left, and gradients that are not aligned, go with one.
    aligned = (g_ptr.to(tl.int64, bitcast=True) & 15) == 0
    full = tl.where(aligned, start + (stop - start) // BLOCK * BLOCK, start)
    for offset in range(start, full, BLOCK):
        x = tl.load(block_of(g_ptr, offset, True) + lanes).to(tl.float32)
        low, middle, high = add_squares(x, low, middle, high)
    for offset in range(full, stop, BLOCK):
        x = tl.load(g_ptr + offset + lanes, mask=offset + lanes < stop, other=0.0).to(tl.float32)
        low, middle, high = add_squares(x, low, middle, high)
    total = tl.sum(middle).to(tl.float64)
    return total + tl.sum(high).to(tl.float64) * SHRUNK + tl.sum(low).to(tl.float64) * GROWN


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
