"""Storage formats: how a number of the arithmetic becomes one of memory."""

import triton
import triton.language as tl

__all__ = ["nearest", "nearest_interpreted"]


@triton.jit
def nearest(x, DTYPE: tl.constexpr):
    """Rounded to the nearest, ties to even: the hardware's own conversion."""
    return x.to(DTYPE)


@triton.jit
def nearest_interpreted(x, DTYPE: tl.constexpr):
    """``nearest`` in Triton's interpreter, whose own conversion to bfloat16 cuts digits off instead of rounding."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        rounded = tl.where(x == x, bits + 0x7FFF + even, 0x7FC00000)
        y = (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y
