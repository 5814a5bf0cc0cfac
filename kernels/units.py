"""Units: the norms and factors of the rows of tensors, for clipping by the weights.

In memory a dense tensor is a grid [outer, size, stride] whose second index is the unit: ``stride`` is that of the
tensor's first dimension and ``size`` its length, whatever the order of the others. A program of ``unit_measure`` takes
some neighbouring units and a piece of each, and writes the two norms of each piece; one of ``unit_fold`` joins the
pieces of some units. Everything is added up in float64 and in a fixed order.
"""

import triton
import triton.language as tl

from .adaptive import unit_factor
from .segments import GRAD, PARAM, pointer

__all__ = ["FEW", "FEW_UNITS", "MANY_UNITS", "TABLE", "factors_of", "unit_fold", "unit_measure"]

# The columns of the table of units, of which each segment has a row. A piece of a unit is a box: a range of the fast
# axis, over which a block extends, times a range of the slow one; the two are what is left of the grid besides units.
STRIDE = tl.constexpr(0)
SIZE = tl.constexpr(1)
FIRST = tl.constexpr(2)  # the first unit among those of the bucket
PARTIAL = tl.constexpr(3)  # the first pair of norms; a piece has as many of them as there are units
PIECES = tl.constexpr(4)
SHAPE = tl.constexpr(5)  # how a block is laid out: 0 for [1, 1024], 1 for [32, 32], 2 for [1024, 1]
FAST = tl.constexpr(6)  # distance in memory, length, and length of a piece
SLOW = tl.constexpr(9)
TABLE = tl.constexpr(12)

# Units of up to FEW pieces are joined MANY_UNITS at a time, one piece after the other; others FEW_UNITS at a time.
FEW = tl.constexpr(8)
FEW_UNITS = tl.constexpr(8)
MANY_UNITS = tl.constexpr(1024)


@triton.jit
def piece_norms(
    start_ptr, first, unit_stride, size, fast_stride, fast_stop, slow_stride, slow_stop, X: tl.constexpr,
    UNITS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The norms of a box of elements for each of UNITS units; ``start_ptr`` is the corner of the box in unit 0."""
    units = first + tl.arange(0, UNITS)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    corner_ptr = start_ptr + units.to(tl.int64) * unit_stride
    divisor = tl.zeros([UNITS, 1], tl.float64) + 1.0
    if tl.float64 == X:
        # Squares of float64 may leave its range: everything is divided by the largest magnitude of its unit first.
        tops = tl.zeros([UNITS, LANES], tl.float64)
        for slow in range(slow_stop):
            for fast in range(0, fast_stop, LANES):
                mask = (units < size) & (fast + lanes < fast_stop)
                at = slow * slow_stride + (fast + lanes).to(tl.int64) * fast_stride
                x = tl.abs(tl.load(corner_ptr + at, mask=mask, other=0.0))
                tops = tl.where(x > tops, x, tops)
        top = tl.max(tops, axis=1)[:, None]
        divisor = tl.where((top > 0.0) & (top < float("inf")), top, 1.0)
    sums = tl.zeros([UNITS, LANES], tl.float64)
    for slow in range(slow_stop):
        for fast in range(0, fast_stop, LANES):
            mask = (units < size) & (fast + lanes < fast_stop)
            at = slow * slow_stride + (fast + lanes).to(tl.int64) * fast_stride
            x = tl.load(corner_ptr + at, mask=mask, other=0.0).to(tl.float64)
            if tl.float64 == X:
                x = x / divisor
            sums += x * x
    return tl.sum(divisor, axis=1) * tl.sqrt(tl.sum(sums, axis=1))


@triton.jit
def measure_pieces(
    segment_ptr, unit_ptr, block, piece, out_ptr, weights_offset, G: tl.constexpr, P: tl.constexpr,
    UNITS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The norms of one piece of UNITS units, of the gradient and of the weights."""
    unit_stride = tl.load(unit_ptr + STRIDE)
    size = tl.load(unit_ptr + SIZE)
    fast_stride = tl.load(unit_ptr + FAST)
    fast_length = tl.load(unit_ptr + FAST + 1)
    fast_piece = tl.load(unit_ptr + FAST + 2)
    slow_stride = tl.load(unit_ptr + SLOW)
    slow_length = tl.load(unit_ptr + SLOW + 1)
    slow_piece = tl.load(unit_ptr + SLOW + 2)
    in_a_row = (fast_length + fast_piece - 1) // fast_piece
    fast = piece % in_a_row * fast_piece
    slow = piece // in_a_row * slow_piece
    start = fast * fast_stride + slow * slow_stride
    fast_stop = tl.minimum(fast_length - fast, fast_piece).to(tl.int32)
    slow_stop = tl.minimum(slow_length - slow, slow_piece).to(tl.int32)
    first = block * UNITS
    units = first + tl.arange(0, UNITS)
    out_ptr += tl.load(unit_ptr + PARTIAL) + piece * size + units
    for array in tl.static_range(2):
        start_ptr = pointer(tl.load(segment_ptr + (GRAD if array == 0 else PARAM)), G if array == 0 else P) + start
        norms = piece_norms(
            start_ptr, first, unit_stride, size, fast_stride, fast_stop, slow_stride, slow_stop,
            G if array == 0 else P, UNITS, LANES,
        )  # fmt: skip
        tl.store(out_ptr + array * weights_offset, norms, mask=units < size)


def _measure_name(specialization):
    """What a profiler shows: fused_unit_measure_fp32."""
    return f"fused_unit_measure_{specialization.constants['G']}"


@triton.jit(repr=_measure_name, do_not_specialize=["weights_offset"])
def unit_measure(
    segments_ptr,
    units_ptr,
    pieces_ptr,
    norms_ptr,
    weights_offset,
    G: tl.constexpr,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One piece of some units; a row of ``pieces`` is (segment, block of units, number of the piece)."""
    row_ptr = pieces_ptr + 3 * tl.program_id(0)
    segment = tl.load(row_ptr).to(tl.int64)
    block = tl.load(row_ptr + 1)
    piece = tl.load(row_ptr + 2).to(tl.int64)
    unit_ptr = units_ptr + segment * TABLE
    segment_ptr = segments_ptr + segment * WIDTH
    shape = tl.load(unit_ptr + SHAPE)
    if shape == 0:
        measure_pieces(segment_ptr, unit_ptr, block, piece, norms_ptr, weights_offset, G, P, 1, 1024)
    elif shape == 1:
        measure_pieces(segment_ptr, unit_ptr, block, piece, norms_ptr, weights_offset, G, P, 32, 32)
    else:
        measure_pieces(segment_ptr, unit_ptr, block, piece, norms_ptr, weights_offset, G, P, 1024, 1)


@triton.jit
def joined(norms_ptr, units, size, pieces, UNITS: tl.constexpr, LANES: tl.constexpr):
    """The norm of each of UNITS units, of the norms of its pieces."""
    lanes = tl.arange(0, LANES)[None, :]
    tops = tl.zeros([UNITS, LANES], tl.float64)
    for offset in range(0, pieces, LANES):
        mask = (units[:, None] < size) & (offset + lanes < pieces)
        x = tl.load(norms_ptr + (offset + lanes) * size + units[:, None], mask=mask, other=0.0)
        tops = tl.where(x > tops, x, tops)
    top = tl.max(tops, axis=1)
    divisor = tl.where((top > 0.0) & (top < float("inf")), top, 1.0)
    sums = tl.zeros([UNITS, LANES], tl.float64)
    for offset in range(0, pieces, LANES):
        mask = (units[:, None] < size) & (offset + lanes < pieces)
        x = tl.load(norms_ptr + (offset + lanes) * size + units[:, None], mask=mask, other=0.0) / divisor[:, None]
        sums += x * x
    return divisor * tl.sqrt(tl.sum(sums, axis=1))


@triton.jit
def fold_units(
    unit_ptr, block, norms_ptr, weights_offset, record_ptr, factors_ptr, out_ptr, scale_offset, WIDE: tl.constexpr,
    UNITS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The factors of UNITS units, and their share of the global norm as a pair (sum, scale)."""
    size = tl.load(unit_ptr + SIZE)
    pieces = tl.load(unit_ptr + PIECES)
    units = block * UNITS + tl.arange(0, UNITS)
    first_ptr = norms_ptr + tl.load(unit_ptr + PARTIAL)
    norms = joined(first_ptr, units, size, pieces, UNITS, LANES)
    weights = joined(first_ptr + weights_offset, units, size, pieces, UNITS, LANES)
    factors = unit_factor(norms, weights, tl.load(record_ptr), tl.load(record_ptr + 1))
    tl.store(factors_ptr + tl.load(unit_ptr + FIRST) + units, factors.to(WIDE), mask=units < size)
    top = tl.max(norms)
    divisor = tl.where((top > 0.0) & (top < float("inf")), top, 1.0)
    ratios = norms / divisor
    tl.store(out_ptr, tl.sum(ratios * ratios))
    tl.store(out_ptr + scale_offset, divisor)


@triton.jit(do_not_specialize=["weights_offset", "first_partial", "scale_offset"])
def unit_fold(
    units_ptr,
    blocks_ptr,
    norms_ptr,
    weights_offset,
    record_ptr,
    factors_ptr,
    partials_ptr,
    first_partial,
    scale_offset,
    WIDE: tl.constexpr,
):
    """Some units of one segment; a row of ``blocks`` is (segment, block of units)."""
    program = tl.program_id(0)
    unit_ptr = units_ptr + tl.load(blocks_ptr + 2 * program).to(tl.int64) * TABLE
    block = tl.load(blocks_ptr + 2 * program + 1)
    out_ptr = partials_ptr + first_partial + program
    if tl.load(unit_ptr + PIECES) <= FEW:
        fold_units(
            unit_ptr, block, norms_ptr, weights_offset, record_ptr, factors_ptr, out_ptr, scale_offset, WIDE,
            MANY_UNITS, 1,
        )  # fmt: skip
    else:
        fold_units(
            unit_ptr, block, norms_ptr, weights_offset, record_ptr, factors_ptr, out_ptr, scale_offset, WIDE,
            FEW_UNITS, 128,
        )  # fmt: skip


@triton.jit
def factors_of(units_ptr, factors_ptr, segment, offset, lanes, mask):
    """The factors of a block of elements, which begins at ``offset`` in the memory of its tensor."""
    unit_ptr = units_ptr + segment.to(tl.int64) * TABLE
    stride = tl.load(unit_ptr + STRIDE)
    size = tl.load(unit_ptr + SIZE)
    run = offset // stride
    within = offset - run * stride
    # Elements are told apart in 32 bits. In longer runs only the distance from the end of the run counts.
    excess = tl.maximum(stride - (1 << 30), 0)
    short = (stride - excess).to(tl.int32)
    step = (tl.maximum(within - excess, 0).to(tl.int32) + lanes) // short
    unit = ((run % size).to(tl.int32) + step) % size.to(tl.int32)
    return tl.load(factors_ptr + tl.load(unit_ptr + FIRST) + unit, mask=mask, other=1.0)
