"""A schedule as a program: rows of numbers, the formulas that evaluate them, and the table that travels to a device.

The formulas are written so that none of them loses digits: what remains of a ramp, q, is computed from the integers
``length - u - offset`` and never as ``1 - p``; a cosine is a sine squared; powers are exponentials of logarithms taken
without cancellation; staircases divide integers. ``kernels/schedules.py`` evaluates the same rows on a device: each
formula here has a twin there with the same name, argument names and argument order.

A program is a product of *factors*, and each factor is a sequence of rows, of which one is in force at a time. So every
composition is more rows: a chain moves ``start``, another clock is a larger ``stride``, a product adds factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["NUMBERS", "Kind", "Packed", "Row", "factors", "pack", "value"]


class Kind(IntEnum):
    """What a row computes; the formula is the function of the same name in lower case."""

    CONST = 0
    LINEAR = 1
    COSINE = 2
    POLY = 3
    LOG_RAMP = 4
    GEO = 5
    STEP = 6
    SLOPE = 7
    INVPOW = 8
    TABLE = 9
    COSINE_PERIODIC = 10
    ROOT = 11
    RESTARTS = 12
    TRIANGLE = 13
    LIVE = 14


class Row(NamedTuple):
    """One stretch of one factor of a schedule: in force from step ``start`` until the factor's next row starts.

    Within a row, ``u = (t - start)//stride`` and, for the ramps, ``n = u + offset``, ``p = clamp(n/length, 0, 1)`` and
    ``q = clamp((length - n)/length, 0, 1)``. ``start`` and ``stride`` are whole; ``offset`` and ``length`` may be
    fractional, and ``length`` is infinite where a formula has none. ``a``, ``b`` and ``p0`` to ``p2`` mean what the
    kind's formula says. ``values`` holds the numbers of a TABLE or LIVE row, beginning at index ``p2``.
    The number of a LIVE row changes during its ``length`` and is held from there on.
    """

    start: int
    length: float
    offset: float
    kind: Kind
    a: float
    b: float = 0.0
    p0: float = 0.0
    p1: float = 0.0
    p2: float = 0.0
    stride: int = 1
    factor: int = 0
    values: tuple[float, ...] = ()


# What travels to a device: every field but the values, which are gathered in one table.
NUMBERS = Row._fields[:-1]


@dataclass(frozen=True, eq=False)
class Packed:
    """Programs as arrays: program i is ``rows[first[i] : first[i] + count[i]]``."""

    rows: NDArray[np.float64]
    """[n, 11], the numbers of each ``Row`` in the order of its fields; the rows of a program are ordered by factor."""
    values: NDArray[np.float64]
    """The numbers of all tables; ``p2`` of a TABLE or LIVE row is where its own begin."""
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    live: NDArray[np.int64]
    """Where in ``values`` the number of each LIVE row is, in the order of the rows: what may change between steps."""


def const(a: float) -> float:
    """a."""
    return a


def linear(p: float, q: float, a: float, b: float) -> float:
    """From a to b on a straight line."""
    return a * q + b * p


def cosine(p: float, q: float, a: float, b: float) -> float:
    """From a to b on half a cosine wave; (1 + cos(pi*p))/2 would lose every digit next to its end."""
    down = math.sin(0.5 * math.pi * q)
    up = math.sin(0.5 * math.pi * p)
    return a * (down * down) + b * (up * up)


def poly(q: float, a: float, b: float, power: float) -> float:
    """From a to b as q**power, power > 0."""
    w = math.exp(power * math.log(q)) if q > 0.0 else 0.0
    return a * w + b * (1.0 - w)


def log_ramp(n: float, length: float, a: float, b: float) -> float:
    """From a to b as log(1 + n)/log(1 + length)."""
    h = math.log(1.0 + n) / math.log(1.0 + length)
    return a * (1.0 - h) + b * h


def geo(u: float, a: float, b: float, c: float, every: float) -> float:
    """a*exp(c*u/every), not below b; growth ends at exp(700), near the largest float64."""
    return max(a * math.exp(min(c * u / every, 700.0)), b)


def step(u: int, a: float, b: float, c: float, every: float) -> float:
    """a*exp(c*(u//every)), not below b."""
    return max(a * math.exp(min(c * (u // int(every)), 700.0)), b)


def slope(u: float, a: float, b: float, high: float, middle: float, low: float) -> float:
    """a - rate*u, not below b, for a rate in three parts whose products with u < 2**31 are exact (``split_rate``)."""
    return max(((a - u * high) - u * middle) - u * low, b)


def invpow(u: float, a: float, rate: float, exponent: float) -> float:
    """a/(1 + rate*u)**exponent."""
    return a * math.exp(-exponent * math.log1p(rate * u))


def table(
    u: int, length: float, a: float, interpolate: float, every: float, first: float, values: Sequence[float]
) -> float:
    """a*values[u//every], held at the last value; with ``interpolate`` on the straight line to the next value."""
    width = int(every)
    last = int(length) // width - 1
    i = min(u // width, last)
    here = values[int(first) + i]
    after = values[int(first) + min(i + 1, last)]
    r = u % width if interpolate > 0.0 and i < last else 0
    return a * (here * ((width - r) / every) + after * (r / every))


def cosine_periodic(n: int, length: float, a: float, b: float) -> float:
    """From a to b and back to a, for ever, on cosine waves of period 2*length."""
    period = 2 * int(length)
    r = n % period
    folded = min(r, period - r)
    return cosine(folded / length, (length - folded) / length, a, b)


def root(p: float, q: float, a: float, b: float) -> float:
    """From a to b as 1 - sqrt(p), taken as (1 - p)/(1 + sqrt(p))."""
    w = math.sqrt(p)
    return a * (q / (1.0 + w)) + b * w


def restarts(u: int, length: float, a: float, b: float, c: float) -> float:
    """Half cosine waves of ``length`` steps down to b; wave i begins at b + (a - b)*exp(c*i), c <= 0."""
    i, r = divmod(u, int(length))
    d = math.exp(c * i)
    return cosine(r / length, (length - r) / length, a * d + b * (1.0 - d), b)


def triangle(u: int, length: float, a: float, b: float, up: float, c: float, every: float) -> float:
    """a + (b - a)*h*exp(c*(u//every)); h rises from 0 to 1 in ``up`` steps and falls in the rest of ``length``."""
    r = u % int(length)
    down = length - up
    h = r / up if r < up else (length - r) / down
    g = (up - r) / up if r < up else (r - up) / down
    d = math.exp(c * (u // int(every)))
    return a * (g * d + (1.0 - d)) + b * (h * d)


def live(a: float, b: float, first: float, values: Sequence[float]) -> float:
    """a times a number that somebody else changes between steps, not below b."""
    return max(a * values[int(first)], b)


def factors(rows: Sequence[Row]) -> int:
    """The number of factors of a program."""
    return max(row.factor for row in rows) + 1


def value(rows: Sequence[Row], t: int) -> float:
    """What a program gives at step t >= 0: the product over its factors of the last row with ``start <= t``.

    A factor that has not begun is 1.

    Example:
        >>> value([Row(0, 10, 0, Kind.LINEAR, 0.0, 1.0), Row(10, math.inf, 0, Kind.CONST, 1.0)], 4)
        0.4
    """
    result = 1.0
    for row in {row.factor: row for row in rows if row.start <= t}.values():
        result *= _row_value(row, t)
    return result


def _row_value(row: Row, t: int) -> float:
    """A row in force at step t, evaluated in float64."""
    start, length, offset, kind, a, b, p0, p1, p2, stride, _, values = row
    u = (t - start) // stride
    n = u + offset
    if kind == Kind.CONST:
        return const(a)
    if kind == Kind.GEO:
        return geo(u, a, b, p0, p1)
    if kind == Kind.STEP:
        return step(u, a, b, p0, p1)
    if kind == Kind.SLOPE:
        return slope(u, a, b, p0, p1, p2)
    if kind == Kind.INVPOW:
        return invpow(u, a, p0, p1)
    if kind == Kind.TABLE:
        return table(u, length, a, p0, p1, p2, values)
    if kind == Kind.COSINE_PERIODIC:
        return cosine_periodic(int(n), length, a, b)
    if kind == Kind.RESTARTS:
        return restarts(u, length, a, b, p0)
    if kind == Kind.TRIANGLE:
        return triangle(u, length, a, b, p0, p1, p2)
    if kind == Kind.LIVE:
        return live(a, b, p2, values)
    if kind == Kind.LOG_RAMP:
        return log_ramp(min(n, length), length, a, b)
    p = min(n / length, 1.0)
    q = max((length - n) / length, 0.0)
    if kind == Kind.LINEAR:
        return linear(p, q, a, b)
    if kind == Kind.COSINE:
        return cosine(p, q, a, b)
    if kind == Kind.ROOT:
        return root(p, q, a, b)
    return poly(q, a, b, p0)


def split_rate(rate: float) -> tuple[float, float, float]:
    """``rate`` as a sum of three floats of at most 22 significant bits each.

    Products of such parts with an integer below 2**31 are exact in float64, and differences of nearly equal floats
    are exact too: so ``slope`` keeps all its digits up to its zero crossing, with or without fused multiply-adds.
    """
    parts = []
    for _ in range(2):
        mantissa, exponent = math.frexp(rate)
        parts.append(math.ldexp(math.floor(math.ldexp(mantissa, 22)), exponent - 22))
        rate -= parts[-1]
    return parts[0], parts[1], rate


def pack(programs: Sequence[Sequence[Row]]) -> Packed:
    """The table of several programs that a device evaluates; equal value tables are stored once.

    The number of a LIVE row is never shared, so that each can change by itself.

    Args:
        programs: one program each; an empty one gives a count of 0.

    Raises:
        ValueError: a program whose first row does not start at step 0.

    Example:
        >>> packed = pack([[Row(0, math.inf, 0, Kind.CONST, 0.5)], []])
        >>> packed.rows.shape, packed.first.tolist(), packed.count.tolist()
        ((1, 11), [0, 1], [1, 0])
    """
    rows: list[tuple[float, ...]] = []
    first: list[int] = []
    values: list[float] = []
    live_places: list[int] = []
    places: dict[tuple[float, ...], int] = {}
    for program in programs:
        if program and program[0].start != 0:
            raise ValueError(f"a program must start at step 0, but its first row starts at {program[0].start}")
        first.append(len(rows))
        # A device reads the number of factors from the last row.
        for row in sorted(program, key=lambda row: row.factor):
            place = row.p2
            if row.kind == Kind.LIVE or (row.values and row.values not in places):
                place = len(values)
                values.extend(row.values)
                if row.kind == Kind.LIVE:
                    live_places.append(place)
                else:
                    places[row.values] = place
            elif row.values:
                place = places[row.values]
            moved = row._replace(p2=place)
            rows.append(tuple(float(getattr(moved, name)) for name in NUMBERS))
    return Packed(
        np.array(rows, dtype=np.float64).reshape(len(rows), len(NUMBERS)),
        np.array(values, dtype=np.float64),
        np.array(first, dtype=np.int64),
        np.array([len(program) for program in programs], dtype=np.int64),
        np.array(live_places, dtype=np.int64),
    )
