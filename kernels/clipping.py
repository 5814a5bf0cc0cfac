"""Clipping: twins of the factors in ``fusedlr/clipping/fixed.py``, and what the skeleton does to each element."""

import triton
import triton.language as tl

__all__ = ["clip_factor", "clipped", "no_factor", "normalize_factor", "scale", "scale_and_clamp"]


@triton.jit
def clip_factor(norm, max_norm, eps):
    """min(1, max_norm/(norm + eps)), 1 where that is 0/0: zeros stay zeros. NaN stays NaN."""
    whole = norm + eps
    factor = max_norm / whole
    return tl.where((whole == 0.0) | (factor >= 1.0), 1.0, factor)


@triton.jit
def normalize_factor(norm, max_norm, eps):
    """1/(norm + eps), 1 where that is 1/0: zeros stay zeros."""
    whole = norm + eps
    return tl.where(whole == 0.0, 1.0, 1.0 / whole)


@triton.jit
def no_factor(norm, max_norm, eps):
    """1: for strategies without a norm."""
    return norm * 0.0 + 1.0


@triton.jit
def clipped(g, grad_scale, limit, CLIP: tl.constexpr, WIDE: tl.constexpr):
    """The element as the rule takes it; a float64 may need its factor to come into the range of WIDE."""
    if g.dtype == tl.float64:
        g = CLIP(g, grad_scale.to(tl.float64), limit.to(tl.float64)).to(WIDE)
    else:
        g = CLIP(g.to(WIDE), grad_scale, limit)
    return g


@triton.jit
def scale(g, grad_scale, limit):
    """The element times its tensor's factor (negative where the group ascends)."""
    return g * grad_scale


@triton.jit
def scale_and_clamp(g, grad_scale, limit):
    """The scaled element within [-limit, limit]; a NaN stays NaN."""
    g = g * grad_scale
    return tl.where(g > limit, limit, tl.where(g < -limit, -limit, g))
