"""Small functions that several update rules share; those of ``fusedlr/rule.py`` have the same names there."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["averaged", "averaged_square", "decayed", "expm1_log", "moments", "root"]


@triton.jit
def expm1_log(count, base):
    """base**count - 1 in float64: a series near 0, since the interpreter has no expm1."""
    safe = tl.where(base > 0.0, base, 0.5)
    x = count * tl.log(safe)
    near = tl.where(x > -0.1, x, -0.1)
    series = 1.0 + near / 11.0
    series = 1.0 + near / 10.0 * series
    series = 1.0 + near / 9.0 * series
    series = 1.0 + near / 8.0 * series
    series = 1.0 + near / 7.0 * series
    series = 1.0 + near / 6.0 * series
    series = 1.0 + near / 5.0 * series
    series = 1.0 + near / 4.0 * series
    series = 1.0 + near / 3.0 * series
    series = 1.0 + near / 2.0 * series
    # Beyond -700 the power is 0 in float64; the bound keeps exp from underflowing.
    power = tl.exp(tl.where(x > -700.0, x, -700.0))
    return tl.where(base > 0.0, tl.where(x > -0.1, near * series, power - 1.0), -1.0)


@triton.jit
def root(x):
    """The square root, rounded to nearest."""
    # tl.sqrt is approximate and flushes denormals; with eps 0 that would divide by zero where torch does not.
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def decayed(g, p, weight_decay):
    """g + weight_decay*p; without decay nothing is added, not 0*p."""
    return tl.where(weight_decay != 0.0, g + weight_decay * p, g)


@triton.jit
def averaged(avg, x, weight):
    """avg + (x-avg)*weight, so that with weight 1 it is x, however large avg was: two FMAs, and no sum of both."""
    return avg - avg * weight + x * weight


@triton.jit
def averaged_square(avg, g, decay, weight):
    """avg*decay + g*g*weight."""
    return avg * decay + g * g * weight


@triton.jit
def moments(g, exp_avg, exp_avg_sq, h):
    """The two running averages after this gradient."""
    return averaged(exp_avg, g, h.one_minus_beta1), averaged_square(exp_avg_sq, g, h.beta2, h.one_minus_beta2)
