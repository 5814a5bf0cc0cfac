"""Schedules on the device: the rows that a host packed, evaluated in float64 by the formulas of the host.

Each formula is the twin of the function with the same name, argument names and argument order in
``fusedlr/schedules/program.py``; the codes of the kinds are the same numbers. Every formula is evaluated on every lane
and the right one is selected, so ``schedule_value`` hands harmless numbers to the formulas that a lane does not want.
"""

import triton
import triton.language as tl

__all__ = ["ROW_WIDTH", "schedule_value"]

CONST = tl.constexpr(0)
LINEAR = tl.constexpr(1)
COSINE = tl.constexpr(2)
POLY = tl.constexpr(3)
LOG_RAMP = tl.constexpr(4)
GEO = tl.constexpr(5)
STEP = tl.constexpr(6)
SLOPE = tl.constexpr(7)
INVPOW = tl.constexpr(8)
TABLE = tl.constexpr(9)
COSINE_PERIODIC = tl.constexpr(10)
ROOT = tl.constexpr(11)
RESTARTS = tl.constexpr(12)
TRIANGLE = tl.constexpr(13)
LIVE = tl.constexpr(14)

# Numbers in a row: start, length, offset, kind, a, b, p0, p1, p2, stride, factor.
ROW_WIDTH = tl.constexpr(11)

HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def const(a):
    return a


@triton.jit
def linear(p, q, a, b):
    return a * q + b * p


@triton.jit
def cosine(p, q, a, b):
    down = tl.sin(q * HALF_PI)
    up = tl.sin(p * HALF_PI)
    return a * (down * down) + b * (up * up)


@triton.jit
def poly(q, a, b, power):
    w = tl.where(q > 0.0, tl.exp(power * tl.log(tl.where(q > 0.0, q, 1.0))), 0.0)
    return a * w + b * (1.0 - w)


@triton.jit
def log_ramp(n, length, a, b):
    h = tl.log(1.0 + n) / tl.log(1.0 + length)
    return a * (1.0 - h) + b * h


@triton.jit
def geo(u, a, b, c, every):
    return tl.maximum(a * tl.exp(tl.minimum(c * u / every, 700.0)), b)


@triton.jit
def step(u, a, b, c, every):
    stairs = (u // every.to(tl.int64)).to(tl.float64)
    return tl.maximum(a * tl.exp(tl.minimum(c * stairs, 700.0)), b)


@triton.jit
def slope(u, a, b, high, middle, low):
    return tl.maximum(((a - u * high) - u * middle) - u * low, b)


@triton.jit
def invpow(u, a, rate, exponent):
    x = rate * u
    y = 1.0 + x
    # log1p without libdevice: the second term gives back what the rounding of 1 + x took.
    return a * tl.exp(-exponent * (tl.log(y) + (x - (y - 1.0)) / y))


@triton.jit
def table(u, length, a, interpolate, every, first, values):
    width = every.to(tl.int64)
    last = length.to(tl.int64) // width - 1
    i = tl.minimum(u // width, last)
    # Lanes of other kinds have a negative `first`: they load nothing, and there may be no values at all.
    start = values + first.to(tl.int64)
    here = tl.load(start + i, mask=first >= 0.0, other=0.0)
    after = tl.load(start + tl.minimum(i + 1, last), mask=first >= 0.0, other=0.0)
    r = tl.where((interpolate > 0.0) & (i < last), u % width, 0)
    return a * (here * ((width - r).to(tl.float64) / every) + after * (r.to(tl.float64) / every))


@triton.jit
def cosine_periodic(n, length, a, b):
    period = 2 * length.to(tl.int64)
    r = n % period
    folded = tl.minimum(r, period - r).to(tl.float64)
    return cosine(folded / length, (length - folded) / length, a, b)


@triton.jit
def root(p, q, a, b):
    w = tl.sqrt(p)
    return a * (q / (1.0 + w)) + b * w


@triton.jit
def restarts(u, length, a, b, c):
    width = length.to(tl.int64)
    d = tl.exp(c * (u // width).to(tl.float64))
    r = (u % width).to(tl.float64)
    return cosine(r / length, (length - r) / length, a * d + b * (1.0 - d), b)


@triton.jit
def triangle(u, length, a, b, up, c, every):
    r = (u % length.to(tl.int64)).to(tl.float64)
    down = length - up
    h = tl.where(r < up, r / up, (length - r) / down)
    g = tl.where(r < up, (up - r) / up, (r - up) / down)
    d = tl.exp(c * (u // every.to(tl.int64)).to(tl.float64))
    return a * (g * d + (1.0 - d)) + b * (h * d)


@triton.jit
def live(a, b, first, values):
    # Lanes of other kinds have a negative `first`: they load nothing.
    return tl.maximum(a * tl.load(values + first.to(tl.int64), mask=first >= 0.0, other=0.0), b)


@triton.jit
def row_value(row, values_ptr, used, t):
    """The rows at ``row``, one a lane, at step t; a lane that is not ``used`` reads nothing."""
    start = tl.load(row + 0, mask=used, other=0.0).to(tl.int64)
    length = tl.load(row + 1, mask=used, other=1.0)
    offset = tl.load(row + 2, mask=used, other=0.0)
    kind = tl.load(row + 3, mask=used, other=0.0).to(tl.int32)
    a = tl.load(row + 4, mask=used, other=0.0)
    b = tl.load(row + 5, mask=used, other=0.0)
    p0 = tl.load(row + 6, mask=used, other=0.0)
    p1 = tl.load(row + 7, mask=used, other=0.0)
    p2 = tl.load(row + 8, mask=used, other=0.0)
    stride = tl.load(row + 9, mask=used, other=1.0).to(tl.int64)

    decays = (kind == GEO) | (kind == STEP)
    is_table = kind == TABLE
    is_invpow = kind == INVPOW
    is_restarts = kind == RESTARTS
    is_triangle = kind == TRIANGLE
    is_periodic = kind == COSINE_PERIODIC
    length = tl.where(length < float("inf"), length, 1.0)
    # Where the formulas divide integers, a fractional length would be cut to 0.
    cycle = tl.where(is_table | is_restarts | is_triangle | is_periodic, length, 1.0)
    every = tl.where(decays | is_table, p1, 1.0)

    u = (t - start) // stride
    x = u.to(tl.float64)
    n = x + offset
    p = tl.minimum(n / length, 1.0)
    q = tl.maximum((length - n) / length, 0.0)

    result = tl.where(kind == CONST, const(a), 0.0)
    result = tl.where(kind == LINEAR, linear(p, q, a, b), result)
    result = tl.where(kind == COSINE, cosine(p, q, a, b), result)
    result = tl.where(kind == POLY, poly(q, a, b, tl.where(kind == POLY, p0, 1.0)), result)
    result = tl.where(kind == LOG_RAMP, log_ramp(tl.minimum(n, length), length, a, b), result)
    c = tl.where(decays, p0, 0.0)
    result = tl.where(kind == GEO, geo(x, a, b, c, every), result)
    result = tl.where(kind == STEP, step(u, a, b, c, every), result)
    result = tl.where(kind == SLOPE, slope(x, a, b, p0, p1, p2), result)
    result = tl.where(is_invpow, invpow(x, a, tl.where(is_invpow, p0, 0.0), tl.where(is_invpow, p1, 0.0)), result)
    result = tl.where(is_table, table(u, cycle, a, p0, every, tl.where(is_table, p2, -1.0), values_ptr), result)
    result = tl.where(is_periodic, cosine_periodic(n.to(tl.int64), cycle, a, b), result)
    result = tl.where(kind == ROOT, root(tl.maximum(p, 0.0), q, a, b), result)
    result = tl.where(is_restarts, restarts(u, cycle, a, b, tl.where(is_restarts, p0, 0.0)), result)
    up = tl.where(is_triangle, p0, 0.5)
    decay = tl.where(is_triangle, p1, 0.0)
    result = tl.where(is_triangle, triangle(u, cycle, a, b, up, decay, tl.where(is_triangle, p2, 1.0)), result)
    result = tl.where(kind == LIVE, live(a, b, tl.where(kind == LIVE, p2, -1.0), values_ptr), result)
    return result


@triton.jit
def schedule_value(rows_ptr, values_ptr, first, count, t, max_rows):
    """The values at step t of the programs ``rows[first : first + count]``, one a lane; 0 where count is 0.

    ``first`` and ``count`` are int64 blocks, ``t`` an int64 scalar or block, ``max_rows`` the largest count; the result
    is a float64 block. Launch without fp fusion, as the host evaluates.
    """
    # Rows are ordered by factor, so that the last one tells how many there are.
    last = tl.load(rows_ptr + (first + count - 1) * ROW_WIDTH + 10, mask=count > 0, other=0.0)
    n_factors = tl.max(last).to(tl.int32) + 1

    result = (count > 0).to(tl.float64)
    for f in range(n_factors):
        chosen = first * 0 - 1
        for i in range(max_rows):
            row = rows_ptr + (first + i) * ROW_WIDTH
            start = tl.load(row, mask=i < count, other=0.0)
            factor = tl.load(row + 10, mask=i < count, other=-1.0)
            chosen = tl.where((factor == f) & (start <= t), i, chosen)
        used = chosen >= 0
        row = rows_ptr + (first + tl.where(used, chosen, 0)) * ROW_WIDTH
        result = result * tl.where(used, row_value(row, values_ptr, used, t), 1.0)
    return result
