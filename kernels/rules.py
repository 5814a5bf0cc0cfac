"""The update rules: twins of the references in ``fusedlr/optimizers``.

``update`` functions are pure and see blocks of float32 (float64 for float64 parameters); ``row`` functions see one lane
a tensor, in float64. Loads, stores, casts and masks are the skeletons' business. Rules with a trust ratio lie in
``trust_rules.py``, and are found here like the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import trust_rules
from .arithmetic import averaged, averaged_square, decayed, expm1_log, moments, root
from .trust_rules import (
    LAMBHyper,
    LARSHyper,
    lamb,
    lamb_direction,
    lamb_ratio,
    lamb_row,
    lars,
    lars_direction,
    lars_momentum,
    lars_ratio,
    lars_row,
)

__all__ = ["AdadeltaHyper", "AdagradHyper", "AdamHyper", "AdamaxHyper", "LAMBHyper", "LARSHyper", "LionHyper",
           "NAdamHyper", "RAdamHyper", "RMSpropHyper", "SGDHyper", "adadelta", "adadelta_row", "adagrad",
           "adagrad_row", "adam", "adam_amsgrad", "adam_row", "adamax", "adamax_row", "adamw", "adamw_amsgrad",
           "lamb", "lamb_direction", "lamb_ratio", "lamb_row", "lars", "lars_direction", "lars_momentum",
           "lars_ratio", "lars_row", "lion", "lion_row", "nadam", "nadam_row", "nadamw", "radam", "radam_row",
           "radamw", "rmsprop", "rmsprop_centered", "rmsprop_centered_momentum", "rmsprop_momentum", "rmsprop_row",
           "sgd", "sgd_momentum", "sgd_row"]  # fmt: skip


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


class RMSpropHyper(NamedTuple):
    """The row of a tensor for RMSprop."""

    lr: Any
    alpha: Any
    one_minus_alpha: Any
    eps: Any
    weight_decay: Any
    momentum: Any


class AdagradHyper(NamedTuple):
    """The row of a tensor for Adagrad."""

    step_size: Any
    eps: Any
    weight_decay: Any


class AdadeltaHyper(NamedTuple):
    """The row of a tensor for Adadelta."""

    lr: Any
    rho: Any
    one_minus_rho: Any
    eps: Any
    weight_decay: Any


class AdamaxHyper(NamedTuple):
    """The row of a tensor for Adamax."""

    step_size: Any
    one_minus_beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any


class NAdamHyper(NamedTuple):
    """The row of a tensor for NAdam; ``mu_product`` is carried to its next step."""

    mu_product: Any
    decay: Any
    weight_decay: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    eps: Any
    bias_correction2: Any
    grad_size: Any
    avg_size: Any


class RAdamHyper(NamedTuple):
    """The row of a tensor for RAdam."""

    decay: Any
    weight_decay: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    eps: Any
    step_size: Any
    rectified: Any


class LionHyper(NamedTuple):
    """The row of a tensor for Lion."""

    lr: Any
    decay: Any
    beta1: Any
    one_minus_beta1: Any
    one_minus_beta2: Any


# Triton cannot take a class of tuples as a constant, but a function that makes one.
@triton.jit
def make_sgd_hyper(f):
    """The row of a tensor from its numbers."""
    return SGDHyper(f[0], f[1], f[2], f[3], f[4], f[5])


@triton.jit
def make_adam_hyper(f):
    """The row of a tensor from its numbers."""
    return AdamHyper(f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7])


@triton.jit
def make_rmsprop_hyper(f):
    """The row of a tensor from its numbers."""
    return RMSpropHyper(f[0], f[1], f[2], f[3], f[4], f[5])


@triton.jit
def make_adagrad_hyper(f):
    """The row of a tensor from its numbers."""
    return AdagradHyper(f[0], f[1], f[2])


@triton.jit
def make_adadelta_hyper(f):
    """The row of a tensor from its numbers."""
    return AdadeltaHyper(f[0], f[1], f[2], f[3], f[4])


@triton.jit
def make_adamax_hyper(f):
    """The row of a tensor from its numbers."""
    return AdamaxHyper(f[0], f[1], f[2], f[3], f[4])


@triton.jit
def make_nadam_hyper(f):
    """The row of a tensor from its numbers."""
    return NAdamHyper(f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], f[9])


@triton.jit
def make_radam_hyper(f):
    """The row of a tensor from its numbers."""
    return RAdamHyper(f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7])


@triton.jit
def make_lion_hyper(f):
    """The row of a tensor from its numbers."""
    return LionHyper(f[0], f[1], f[2], f[3], f[4])


HYPERS: dict[str, tuple[Any, Any]] = {
    "SGDHyper": (SGDHyper, make_sgd_hyper),
    "AdamHyper": (AdamHyper, make_adam_hyper),
    "RMSpropHyper": (RMSpropHyper, make_rmsprop_hyper),
    "AdagradHyper": (AdagradHyper, make_adagrad_hyper),
    "AdadeltaHyper": (AdadeltaHyper, make_adadelta_hyper),
    "AdamaxHyper": (AdamaxHyper, make_adamax_hyper),
    "NAdamHyper": (NAdamHyper, make_nadam_hyper),
    "RAdamHyper": (RAdamHyper, make_radam_hyper),
    "LionHyper": (LionHyper, make_lion_hyper),
    **trust_rules.HYPERS,
}


@triton.jit
def sgd_row(step, lr, momentum, dampening, weight_decay, nesterov):
    first = tl.where((step == 1.0) | (momentum == 0.0), 1.0, 0.0)
    return lr, weight_decay, momentum, 1.0 - dampening, nesterov, first


@triton.jit
def sgd(p, g, h):
    g = decayed(g, p, h.weight_decay)
    return (p - h.lr * g,)


@triton.jit
def sgd_momentum(p, g, momentum_buffer, h):
    g = decayed(g, p, h.weight_decay)
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
def adam_update(p, exp_avg, second, h):
    """p - step_size * exp_avg / (sqrt(second)/bias_correction2_sqrt + eps)."""
    denom = root(second) / h.bias_correction2_sqrt + h.eps
    return p - h.step_size * (exp_avg / denom)


@triton.jit
def adam(p, g, exp_avg, exp_avg_sq, h):
    g = decayed(g, p, h.weight_decay)
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return adam_update(p, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


@triton.jit
def adam_amsgrad(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, h):
    g = decayed(g, p, h.weight_decay)
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


@triton.jit
def rmsprop_row(step, lr, alpha, eps, weight_decay, momentum):
    return lr, alpha, 1.0 - alpha, eps, weight_decay, momentum


@triton.jit
def rmsprop(p, g, square_avg, h):
    g = decayed(g, p, h.weight_decay)
    square_avg = averaged_square(square_avg, g, h.alpha, h.one_minus_alpha)
    denom = root(square_avg) + h.eps
    return p - h.lr * g / denom, square_avg


@triton.jit
def rmsprop_momentum(p, g, square_avg, momentum_buffer, h):
    g = decayed(g, p, h.weight_decay)
    square_avg = averaged_square(square_avg, g, h.alpha, h.one_minus_alpha)
    denom = root(square_avg) + h.eps
    momentum_buffer = momentum_buffer * h.momentum + g / denom
    return p - h.lr * momentum_buffer, square_avg, momentum_buffer


@triton.jit
def rmsprop_centered(p, g, square_avg, grad_avg, h):
    g = decayed(g, p, h.weight_decay)
    square_avg = averaged_square(square_avg, g, h.alpha, h.one_minus_alpha)
    grad_avg = averaged(grad_avg, g, h.one_minus_alpha)
    denom = root(square_avg - grad_avg * grad_avg) + h.eps
    return p - h.lr * g / denom, square_avg, grad_avg


@triton.jit
def rmsprop_centered_momentum(p, g, square_avg, momentum_buffer, grad_avg, h):
    g = decayed(g, p, h.weight_decay)
    square_avg = averaged_square(square_avg, g, h.alpha, h.one_minus_alpha)
    grad_avg = averaged(grad_avg, g, h.one_minus_alpha)
    denom = root(square_avg - grad_avg * grad_avg) + h.eps
    momentum_buffer = momentum_buffer * h.momentum + g / denom
    return p - h.lr * momentum_buffer, square_avg, momentum_buffer, grad_avg


@triton.jit
def adagrad_row(step, lr, lr_decay, weight_decay, eps):
    return lr / (1.0 + (step - 1.0) * lr_decay), eps, weight_decay


@triton.jit
def adagrad(p, g, sum, h):
    g = decayed(g, p, h.weight_decay)
    sum = sum + g * g
    denom = root(sum) + h.eps
    return p - h.step_size * g / denom, sum


@triton.jit
def adadelta_row(step, lr, rho, eps, weight_decay):
    return lr, rho, 1.0 - rho, eps, weight_decay


@triton.jit
def adadelta(p, g, square_avg, acc_delta, h):
    g = decayed(g, p, h.weight_decay)
    square_avg = averaged_square(square_avg, g, h.rho, h.one_minus_rho)
    delta = root(acc_delta + h.eps) / root(square_avg + h.eps) * g
    acc_delta = averaged_square(acc_delta, delta, h.rho, h.one_minus_rho)
    return p - h.lr * delta, square_avg, acc_delta


@triton.jit
def adamax_row(step, lr, beta1, beta2, eps, weight_decay):
    return lr / -expm1_log(step, beta1), 1.0 - beta1, beta2, eps, weight_decay


@triton.jit
def adamax(p, g, exp_avg, exp_inf, h):
    g = decayed(g, p, h.weight_decay)
    exp_avg = averaged(exp_avg, g, h.one_minus_beta1)
    exp_inf = tl.maximum(exp_inf * h.beta2, tl.abs(g) + h.eps, propagate_nan=tl.PropagateNan.ALL)
    return p - h.step_size * exp_avg / exp_inf, exp_avg, exp_inf


@triton.jit
def nadam_row(step, mu_product, lr, beta1, beta2, eps, weight_decay, momentum_decay):
    base = (step * 0.0 + 96.0) / 100.0  # 0.96 in float64: Triton makes a float32 of the literal
    mu = beta1 * (0.5 - 0.5 * expm1_log(step * momentum_decay, base))
    mu_next = beta1 * (0.5 - 0.5 * expm1_log((step + 1.0) * momentum_decay, base))
    mu_product = mu_product * mu
    decay = 1.0 - lr * weight_decay
    bias_correction2 = -expm1_log(step, beta2)
    grad_size = lr * (1.0 - mu) / (1.0 - mu_product)
    avg_size = lr * mu_next / (1.0 - mu_product * mu_next)
    return (mu_product, decay, weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, eps, bias_correction2, grad_size,
            avg_size)  # fmt: skip


@triton.jit
def nadam_update(p, g, exp_avg, exp_avg_sq, h):
    """p - (grad_size*g + avg_size*exp_avg) / (sqrt(exp_avg_sq/bias_correction2) + eps)."""
    denom = root(exp_avg_sq / h.bias_correction2) + h.eps
    return p - (g * h.grad_size + exp_avg * h.avg_size) / denom


@triton.jit
def nadam(p, g, exp_avg, exp_avg_sq, h):
    g = decayed(g, p, h.weight_decay)
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return nadam_update(p, g, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


@triton.jit
def nadamw(p, g, exp_avg, exp_avg_sq, h):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return nadam_update(p * h.decay, g, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


@triton.jit
def radam_row(step, lr, beta1, beta2, eps, weight_decay):
    minus_correction2 = expm1_log(step, beta2)
    rho_inf = (1.0 + beta2) / (1.0 - beta2)
    rho = rho_inf + 2.0 * step * (1.0 + minus_correction2) / minus_correction2
    rectified = rho > 5.0
    r = tl.where(rectified, rho, 6.0)
    r_inf = tl.where(rectified, rho_inf, 6.0)
    rectification = tl.sqrt((r - 4.0) * (r - 2.0) * r_inf / ((r_inf - 4.0) * (r_inf - 2.0) * r))
    decay = 1.0 - lr * weight_decay
    factor = tl.where(rectified, rectification * tl.sqrt(-minus_correction2), 1.0)
    step_size = lr / -expm1_log(step, beta1) * factor
    rectified = tl.where(rectified, 1.0, 0.0)
    return decay, weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, eps, step_size, rectified


@triton.jit
def rectified_step(p, exp_avg, exp_avg_sq, h):
    """p - step_size*exp_avg, over sqrt(exp_avg_sq) + eps where the variance is known well enough."""
    denom = tl.where(h.rectified != 0.0, root(exp_avg_sq) + h.eps, 1.0)
    return p - h.step_size * exp_avg / denom


@triton.jit
def radam(p, g, exp_avg, exp_avg_sq, h):
    g = decayed(g, p, h.weight_decay)
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return rectified_step(p, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


@triton.jit
def radamw(p, g, exp_avg, exp_avg_sq, h):
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return rectified_step(p * h.decay, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


@triton.jit
def lion_row(step, lr, beta1, beta2, weight_decay):
    return lr, 1.0 - lr * weight_decay, beta1, 1.0 - beta1, 1.0 - beta2


@triton.jit
def lion(p, g, exp_avg, h):
    blend = exp_avg * h.beta1 + g * h.one_minus_beta1
    update = tl.where(blend > 0.0, 1.0, tl.where(blend < 0.0, -1.0, blend))
    return p * h.decay - h.lr * update, averaged(exp_avg, g, h.one_minus_beta2)


# Which row each rule takes: (its NamedTuple, the function that computes it).
RULES = {
    "sgd": ("SGDHyper", "sgd_row"),
    "sgd_momentum": ("SGDHyper", "sgd_row"),
    "adam": ("AdamHyper", "adam_row"),
    "adam_amsgrad": ("AdamHyper", "adam_row"),
    "adamw": ("AdamHyper", "adam_row"),
    "adamw_amsgrad": ("AdamHyper", "adam_row"),
    "rmsprop": ("RMSpropHyper", "rmsprop_row"),
    "rmsprop_momentum": ("RMSpropHyper", "rmsprop_row"),
    "rmsprop_centered": ("RMSpropHyper", "rmsprop_row"),
    "rmsprop_centered_momentum": ("RMSpropHyper", "rmsprop_row"),
    "adagrad": ("AdagradHyper", "adagrad_row"),
    "adadelta": ("AdadeltaHyper", "adadelta_row"),
    "adamax": ("AdamaxHyper", "adamax_row"),
    "nadam": ("NAdamHyper", "nadam_row"),
    "nadamw": ("NAdamHyper", "nadam_row"),
    "radam": ("RAdamHyper", "radam_row"),
    "radamw": ("RAdamHyper", "radam_row"),
    "lion": ("LionHyper", "lion_row"),
    **trust_rules.RULES,
}
# How many of the first numbers of a row are carried: they lie behind the tensor's step, and come back in the next.
CARRIED = {"nadam_row": 1}
