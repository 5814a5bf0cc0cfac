"""The update rules: twins of the references in ``fusedlr/optimizers``.

``update`` functions are pure and see blocks of float32 (float64 for float64 parameters); ``row`` functions see one lane
a tensor, in float64. Loads, stores, casts and masks are the skeletons' business.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["AdamHyper", "SGDHyper", "adam", "adam_amsgrad", "adam_row", "adamw", "adamw_amsgrad", "sgd", "sgd_momentum",
           "sgd_row"]  # fmt: skip


class SGDHyper(NamedTuple):
    """The row of a tensor for SGD."""

    lr: Any
    weight_decay: Any
    momentum: Any
    one_minus_dampening: Any
    nesterov: Any
    first: Any


class AdamHyper(NamedTuple):
    """The row of a tensor for Adam and AdamW."""

    decay: Any
    weight_decay: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    eps: Any
    step_size: Any
    bias_correction2_sqrt: Any


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


# Triton cannot take a class of tuples as a constant, but a function that makes one.
@triton.jit
def make_sgd_hyper(f):
    """The row of a tensor from its numbers."""
    return SGDHyper(f[0], f[1], f[2], f[3], f[4], f[5])


@triton.jit
def make_adam_hyper(f):
    """The row of a tensor from its numbers."""
    return AdamHyper(f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7])


HYPERS: dict[str, tuple[Any, Any]] = {"SGDHyper": (SGDHyper, make_sgd_hyper), "AdamHyper": (AdamHyper, make_adam_hyper)}


@triton.jit
def sgd_row(step, lr, momentum, dampening, weight_decay, nesterov):
    return lr, weight_decay, momentum, 1.0 - dampening, nesterov, tl.where(step == 1.0, 1.0, 0.0)


@triton.jit
def sgd(p, g, h):
    g = tl.where(h.weight_decay != 0.0, g + h.weight_decay * p, g)
    return (p - h.lr * g,)


@triton.jit
def sgd_momentum(p, g, momentum_buffer, h):
    g = tl.where(h.weight_decay != 0.0, g + h.weight_decay * p, g)
    started = momentum_buffer * h.momentum + g * h.one_minus_dampening
    momentum_buffer = tl.where(h.first != 0.0, g, started)
    g = tl.where(h.nesterov != 0.0, g + h.momentum * momentum_buffer, momentum_buffer)
    return p - h.lr * g, momentum_buffer


@triton.jit
def adam_row(step, lr, beta1, beta2, eps, weight_decay):
    decay = 1.0 - lr * weight_decay
    step_size = lr / -expm1_log(step, beta1)
    bias_correction2_sqrt = tl.sqrt(-expm1_log(step, beta2))
    return decay, weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, eps, step_size, bias_correction2_sqrt


@triton.jit
def moments(g, exp_avg, exp_avg_sq, h):
    """The two running averages after this gradient."""
    return exp_avg + (g - exp_avg) * h.one_minus_beta1, exp_avg_sq * h.beta2 + g * g * h.one_minus_beta2


@triton.jit
def adam_update(p, exp_avg, second, h):
    """p - step_size * exp_avg / (sqrt(second)/bias_correction2_sqrt + eps)."""
    # tl.sqrt is approximate and flushes denormals; with eps 0 that would divide by zero where torch does not.
    root = tl.sqrt_rn(second) if p.dtype == tl.float32 else tl.sqrt(second)
    denom = root / h.bias_correction2_sqrt + h.eps
    return p - h.step_size * (exp_avg / denom)


@triton.jit
def adam(p, g, exp_avg, exp_avg_sq, h):
    g = tl.where(h.weight_decay != 0.0, g + h.weight_decay * p, g)
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return adam_update(p, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


@triton.jit
def adam_amsgrad(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, h):
    g = tl.where(h.weight_decay != 0.0, g + h.weight_decay * p, g)
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    return adam_update(p, exp_avg, max_exp_avg_sq, h), exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def adamw(p, g, exp_avg, exp_avg_sq, h):
    p = p * h.decay
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return adam_update(p, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


@triton.jit
def adamw_amsgrad(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, h):
    p = p * h.decay
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    return adam_update(p, exp_avg, max_exp_avg_sq, h), exp_avg, exp_avg_sq, max_exp_avg_sq


# Which row each rule takes: (its NamedTuple, the function that computes it).
RULES = {
    "sgd": ("SGDHyper", "sgd_row"),
    "sgd_momentum": ("SGDHyper", "sgd_row"),
    "adam": ("AdamHyper", "adam_row"),
    "adam_amsgrad": ("AdamHyper", "adam_row"),
    "adamw": ("AdamHyper", "adam_row"),
    "adamw_amsgrad": ("AdamHyper", "adam_row"),
}
