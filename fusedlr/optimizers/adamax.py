"""Adamax: the reference rule and the public class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clipping import Clip
from ..optimizer import FusedOptimizer, ParamsT, ScheduleArg
from ..precision import Precision
from ..rule import Rule, averaged, decayed, expm1_log, minus_ratio, scaled

__all__ = ["Adamax"]


class AdamaxHyper(NamedTuple):
    """The row of a tensor: what its elements share in one step."""

    step_size: Any
    one_minus_beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any


def adamax_row(step: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any) -> AdamaxHyper:
    """The numbers of one step; 1-beta1 and its power are taken here, in float64 and without cancellation."""
    return AdamaxHyper(lr / -expm1_log(step, beta1), 1.0 - beta1, beta2, eps, weight_decay)


def adamax(p: Tensor, g: Tensor, exp_avg: Tensor, exp_inf: Tensor, h: AdamaxHyper) -> tuple[Tensor, ...]:
    """p - step_size * exp_avg / exp_inf, with exp_inf = max(beta2*exp_inf, |g| + eps)."""
    g = decayed(g, p, h.weight_decay)
    exp_avg = averaged(exp_avg, g, h.one_minus_beta1)
    exp_inf = scaled(exp_inf, h.beta2)
    exp_inf = torch.maximum(exp_inf, g.abs().add_(h.eps), out=exp_inf)
    return minus_ratio(p, exp_avg, exp_inf, h.step_size), exp_avg, exp_inf


_ADAMAX = Rule(
    adamax, adamax_row, AdamaxHyper, ("lr", "beta1", "beta2", "eps", "weight_decay"), ("exp_avg", "exp_inf")
)


class Adamax(FusedOptimizer):
    r"""Adamax, the variant of Adam by the infinity norm, in one fused step.

    .. math::
        g &\leftarrow c\,g + \lambda p, \qquad
        m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad
        u \leftarrow \max(\beta_2 u,\; |g| + \epsilon) \\
        p &\leftarrow p - \frac{\eta_t}{1-\beta_1^t} \cdot \frac{m}{u}

    where :math:`c` is the clip factor, :math:`\eta_t` the scheduled learning rate and :math:`t` in powers the count
    of the tensor's own steps, from 1.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        one_minus_beta1 = 1 - beta1
        step_size = lr / (1 - beta1**step)
        # each element, in float32
        g = -c*g if maximize else c*g
        if weight_decay != 0:
            g = g + weight_decay*p
        exp_avg = exp_avg + one_minus_beta1*(g - exp_avg)
        exp_inf = max(beta2*exp_inf, abs(g) + eps)
        p = p - step_size * exp_avg / exp_inf

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        betas: decay rates of the average and of the norm, each in [0, 1).
        eps: added to the magnitude of the gradient; at least 0.
        weight_decay: L2 penalty :math:`\lambda`, added to the gradient; at least 0.
        foreach: accepted for compatibility with torch.optim; chooses nothing here.
        maximize: ascend instead of descend.
        differentiable: must be False.
        capturable: accepted for compatibility with torch.optim; chooses nothing here.
        schedule: a schedule of the learning rate, or a dict of schedules by the name of the scalar.
        clip: a clipping strategy, or a number M for ``clipping.GlobalNorm(M)``.
        nonfinite: what a step does whose gradients hold an inf or NaN: "propagate", "skip" or "raise".
        precision: how weights and state are stored, a :class:`fusedlr.Precision`; None: as torch.optim does.
        flatten: whether parameters are moved into flat buffers.
        backend: "auto", "triton" or "torch".
        norm_group: None.

    Raises:
        ValueError: for values outside their ranges, as torch.optim.Adamax does, and for unknown options.
        TypeError: for a ``schedule`` or a ``clip`` of another type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.

    Differs from torch:
        - The power of beta1 is taken without cancellation; torch computes 1 - beta1**step directly.

    Source:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015), section 7, as :class:`torch.optim.Adamax`
        has it.

    Example:
        >>> import torch, fusedlr
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fusedlr.Adamax(model.parameters(), lr=2e-3, clip=1.0)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    _namesake = torch.optim.Adamax

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
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
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
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

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _ADAMAX
