"""The update rules with a trust ratio, LAMB and LARS: twins of the references in ``fusedlr/optimizers``.

Beside ``update`` and ``row`` they have a ``direction``, of whose norm the trust ratio is made, element by element, and
the ``ratio`` itself, in float64. The ratio is the last number of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import averaged_square, decayed, expm1_log, root

__all__ = ["LAMBHyper", "LARSHyper", "lamb", "lamb_direction", "lamb_ratio", "lamb_row", "lars", "lars_direction",
           "lars_momentum", "lars_ratio", "lars_row"]  # fmt: skip


class LAMBHyper(NamedTuple):
    """The row of a tensor for LAMB."""

    lr: Any
    beta1: Any
    grad_weight: Any
    beta2: Any
    one_minus_beta2: Any
    eps: Any
    weight_decay: Any
    unbias1: Any
    unbias2_sqrt: Any
    trust_clip: Any
    trust: Any


class LARSHyper(NamedTuple):
    """The row of a tensor for LARS."""

    lr: Any
    momentum: Any
    weight_decay: Any
    trust_coefficient: Any
    eps: Any
    one_minus_dampening: Any
    nesterov: Any
    first: Any
    trust: Any


@triton.jit
def make_lamb_hyper(f):
    """The row of a tensor from its numbers."""
    return LAMBHyper(f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], f[9], f[10])


@triton.jit
def make_lars_hyper(f):
    """The row of a tensor from its numbers."""
    return LARSHyper(f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8])


HYPERS: dict[str, tuple[Any, Any]] = {
    "LAMBHyper": (LAMBHyper, make_lamb_hyper),
    "LARSHyper": (LARSHyper, make_lars_hyper),
}


@triton.jit
def lamb_row(step, lr, beta1, beta2, eps, weight_decay, bias_correction, grad_averaging, trust_clip):
    unbias1 = tl.where(bias_correction != 0.0, 1.0 / -expm1_log(step, beta1), 1.0)
    unbias2_sqrt = tl.where(bias_correction != 0.0, tl.sqrt(1.0 / -expm1_log(step, beta2)), 1.0)
    grad_weight = tl.where(grad_averaging != 0.0, 1.0 - beta1, 1.0)
    return (lr, beta1, grad_weight, beta2, 1.0 - beta2, eps, weight_decay, unbias1, unbias2_sqrt, trust_clip,
            step * 0.0 + 1.0)  # fmt: skip


@triton.jit
def lamb_update(p, exp_avg, exp_avg_sq, h):
    """exp_avg*unbias1 / (sqrt(exp_avg_sq)*unbias2_sqrt + eps) + weight_decay*p."""
    denom = root(exp_avg_sq) * h.unbias2_sqrt + h.eps
    return decayed(exp_avg * h.unbias1 / denom, p, h.weight_decay)


@triton.jit
def lamb_moments(g, exp_avg, exp_avg_sq, h):
    """The two running averages after this gradient."""
    exp_avg = exp_avg * h.beta1 + g * h.grad_weight
    return exp_avg, averaged_square(exp_avg_sq, g, h.beta2, h.one_minus_beta2)


@triton.jit
def lamb(p, g, exp_avg, exp_avg_sq, h):
    exp_avg, exp_avg_sq = lamb_moments(g, exp_avg, exp_avg_sq, h)
    return p - h.lr * h.trust * lamb_update(p, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


@triton.jit
def lamb_direction(p, g, exp_avg, exp_avg_sq, h):
    exp_avg, exp_avg_sq = lamb_moments(g, exp_avg, exp_avg_sq, h)
    return lamb_update(p, exp_avg, exp_avg_sq, h)


@triton.jit
def lamb_ratio(p_norm, norm, h):
    nothing = (p_norm == 0.0) | (norm == 0.0)
    ratio = tl.where(nothing, 1.0, p_norm / tl.where(nothing, 1.0, norm))
    return tl.where((h.trust_clip != 0.0) & (ratio > 1.0), 1.0, ratio)


@triton.jit
def lars_row(step, lr, momentum, weight_decay, trust_coefficient, eps, dampening, nesterov):
    first = tl.where((step == 1.0) | (momentum == 0.0), 1.0, 0.0)
    return lr, momentum, weight_decay, trust_coefficient, eps, 1.0 - dampening, nesterov, first, step * 0.0 + 1.0


@triton.jit
def lars(p, g, h):
    return (p - h.lr * h.trust * decayed(g, p, h.weight_decay),)


@triton.jit
def lars_momentum(p, g, momentum_buffer, h):
    g = h.trust * decayed(g, p, h.weight_decay)
    started = momentum_buffer * h.momentum + g * h.one_minus_dampening
    momentum_buffer = tl.where(h.first != 0.0, g, started)
    g = tl.where(h.nesterov != 0.0, g + h.momentum * momentum_buffer, momentum_buffer)
    return p - h.lr * g, momentum_buffer


@triton.jit
def lars_direction(p, g, h):
    return g


@triton.jit
def lars_ratio(p_norm, norm, h):
    nothing = (p_norm == 0.0) | (norm == 0.0)
    whole = tl.where(nothing, 1.0, norm + h.weight_decay * p_norm + h.eps)
    return tl.where(nothing, 1.0, h.trust_coefficient * p_norm / whole)


RULES = {
    "lamb": ("LAMBHyper", "lamb_row"),
    "lars": ("LARSHyper", "lars_row"),
    "lars_momentum": ("LARSHyper", "lars_row"),
}
# What the trust ratio of a rule is made of: (the direction whose norm is needed, the function of the norms).
TRUSTS = {
    "lamb": ("lamb_direction", "lamb_ratio"),
    "lars": ("lars_direction", "lars_ratio"),
    "lars_momentum": ("lars_direction", "lars_ratio"),
}
