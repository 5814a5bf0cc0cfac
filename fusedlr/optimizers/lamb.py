"""LAMB: the reference rule and the public class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clipping import Clip
from ..optimizer import FusedOptimizer, ParamsT, ScheduleArg
from ..precision import Precision
from ..rule import Rule, Trust, averaged_square, decayed, expm1_log, minus, sqrt, where

__all__ = ["LAMB"]


class LAMBHyper(NamedTuple):
    """The row of a tensor: what its elements share in one step; ``trust`` is 1 until the norms are known."""

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


def lamb_row(
    step: Any,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    weight_decay: Any,
    bias_correction: Any,
    grad_averaging: Any,
    trust_clip: Any,
) -> LAMBHyper:
    """The numbers of one step; 1-beta and the bias corrections are taken here, in float64."""
    unbias1 = where(bias_correction != 0, 1.0 / -expm1_log(step, beta1), 1.0)
    unbias2_sqrt = where(bias_correction != 0, sqrt(1.0 / -expm1_log(step, beta2)), 1.0)
    grad_weight = where(grad_averaging != 0, 1.0 - beta1, 1.0)
    return LAMBHyper(
        lr, beta1, grad_weight, beta2, 1.0 - beta2, eps, weight_decay, unbias1, unbias2_sqrt, trust_clip, 1.0
    )


def _moments(g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: LAMBHyper) -> tuple[Tensor, Tensor]:
    """The two running averages after this gradient."""
    exp_avg = exp_avg * h.beta1 + g * h.grad_weight
    return exp_avg, averaged_square(exp_avg_sq, g, h.beta2, h.one_minus_beta2)


def _update(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: LAMBHyper) -> Tensor:
    """exp_avg*unbias1 / (sqrt(exp_avg_sq)*unbias2_sqrt + eps) + weight_decay*p."""
    denom = torch.sqrt(exp_avg_sq) * h.unbias2_sqrt + h.eps
    return decayed(exp_avg * h.unbias1 / denom, p, h.weight_decay)


def lamb(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: LAMBHyper) -> tuple[Tensor, ...]:
    """p - lr*trust*u, where u is Adam's update of the new averages with weight_decay*p added."""
    exp_avg, exp_avg_sq = _moments(g, exp_avg, exp_avg_sq, h)
    return minus(p, _update(p, exp_avg, exp_avg_sq, h), h.lr * h.trust), exp_avg, exp_avg_sq


def lamb_direction(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: LAMBHyper) -> Tensor:
    """The u of this step, whose norm is compared with the parameter's."""
    return _update(p, *_moments(g, exp_avg, exp_avg_sq, h), h)


def lamb_ratio(p_norm: Any, norm: Any, h: LAMBHyper) -> Any:
    """p_norm/norm, 1 where either is 0, and with trust_clip at most 1."""
    nothing = (p_norm == 0) | (norm == 0)
    ratio = where(nothing, 1.0, p_norm / where(nothing, 1.0, norm))
    return where((h.trust_clip != 0) & (ratio > 1.0), 1.0, ratio)


_SCALARS = ("lr", "beta1", "beta2", "eps", "weight_decay", "bias_correction", "grad_averaging", "trust_clip")
_SLOTS = ("exp_avg", "exp_avg_sq")
_LAMB = Rule(lamb, lamb_row, LAMBHyper, _SCALARS, _SLOTS, trust=Trust(lamb_direction, lamb_ratio, _SLOTS))


class LAMB(FusedOptimizer):
    r"""LAMB: Adam's update with weight decay, of each tensor as long as the tensor itself, in one fused step.

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1)\, c\,g, \qquad v \leftarrow \beta_2 v + (1-\beta_2)\,(c\,g)^2 \\
        u &= \frac{m / (1-\beta_1^k)}{\sqrt{v / (1-\beta_2^k)} + \epsilon} + \lambda p, \qquad
        p \leftarrow p - \eta_t \,\frac{\lVert p \rVert}{\lVert u \rVert}\, u

    where :math:`c` is the clip factor, :math:`\eta_t` the scheduled learning rate, :math:`k` the count of the tensor's
    own steps and :math:`\lVert\cdot\rVert` a tensor's Euclidean norm; the ratio is 1 where either norm is 0.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        grad_weight = 1 - beta1 if grad_averaging else 1
        one_minus_beta2 = 1 - beta2
        bias_correction1 = 1 - beta1**step if bias_correction else 1
        bias_correction2_sqrt = sqrt(1 - beta2**step) if bias_correction else 1
        # each element, in float32
        g = -c*g if maximize else c*g
        exp_avg = beta1*exp_avg + grad_weight*g
        exp_avg_sq = beta2*exp_avg_sq + one_minus_beta2*g*g
        u = exp_avg / (bias_correction1 * (sqrt(exp_avg_sq)/bias_correction2_sqrt + eps))
        if weight_decay != 0:
            u = u + weight_decay*p
        # once a tensor, in float64
        trust = norm(p) / norm(u) if norm(p) != 0 and norm(u) != 0 else 1
        if trust_clip:
            trust = min(trust, 1)
        # each element, in float32
        p = p - lr*trust*u

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        betas: decay rates of the two running averages, each in [0, 1).
        eps: added to the root; at least 0.
        weight_decay: decay :math:`\lambda`, within the trust ratio; at least 0.
        bias_correction: whether the averages are divided by :math:`1-\beta^k`.
        grad_averaging: whether the gradient enters :math:`m` with the weight :math:`1-\beta_1`, or with 1.
        trust_clip: whether the ratio is at most 1.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility with torch.optim; chooses nothing here.
        capturable: accepted for compatibility with torch.optim; chooses nothing here.
        differentiable: must be False.
        fused: accepted for compatibility with torch.optim; chooses nothing here.
        schedule: a schedule of the learning rate, or a dict of schedules by the name of the scalar.
        clip: a clipping strategy, or a number M for ``clipping.GlobalNorm(M)``.
        nonfinite: what a step does whose gradients hold an inf or NaN: "propagate", "skip" or "raise".
        precision: how weights and state are stored, a :class:`fusedlr.Precision`; None: as torch.optim does.
        flatten: whether parameters are moved into flat buffers.
        backend: "auto", "triton" or "torch".
        norm_group: None.

    Raises:
        ValueError: for values outside their ranges, in the words of torch.optim, and for unknown options.
        TypeError: for a ``schedule`` or a ``clip`` of another type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.

    Differs from torch:
        - torch.optim has no such class; arguments that are torch's elsewhere mean the same here.
        - As in the paper every tensor is adapted, also without weight decay; apex's FusedLAMB (but for ``use_nvlamb``)
          and timm's Lamb (but for ``always_adapt``) leave tensors without weight decay at ratio 1. Their
          ``max_grad_norm`` is ``clip`` here, and is not set by default.
        - A NaN in a gradient makes the whole tensor NaN.

    Source:
        You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (2020), algorithm 2, with
        :math:`\phi(z) = z`.

    Example:
        >>> import torch, fusedlr
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fusedlr.LAMB(model.parameters(), lr=2e-3, weight_decay=0.01, clip=1.0)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        trust_clip: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        schedule: ScheduleArg = None,
        clip: Clip | float | None = None,
        nonfinite: str = "propagate",
        precision: Precision | None = None,
        flatten: bool = True,
        backend: str = "auto",
        norm_group: None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            grad_averaging=grad_averaging,
            trust_clip=trust_clip,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(
            params,
            defaults,
            schedule=schedule,
            clip=clip,
            nonfinite=nonfinite,
            precision=precision,
            flatten=flatten,
            backend=backend,
            norm_group=norm_group,
        )

    @classmethod
    def _validated(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        # AdamW has all of these, and torch checks them in its words.
        torch.optim.AdamW([torch.zeros(1)], **{name: values[name] for name in ("lr", "betas", "eps", "weight_decay")})
        return dict(values)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _LAMB
