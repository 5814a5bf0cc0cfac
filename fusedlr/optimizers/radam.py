"""RAdam: the reference rules and the public class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clipping import Clip
from ..optimizer import FusedOptimizer, ParamsT, ScheduleArg
from ..precision import Precision
from ..rule import Rule, averaged, averaged_square, decayed, expm1_log, minus, minus_ratio, scaled, sqrt, where

__all__ = ["RAdam"]


class RAdamHyper(NamedTuple):
    """The row of a tensor: what its elements share in one step."""

    decay: Any
    weight_decay: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    eps: Any
    step_size: Any
    rectified: Any


def radam_row(step: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any) -> RAdamHyper:
    """The numbers of one step: the step size holds the bias corrections and, above rho 5, the rectification."""
    minus_correction2 = expm1_log(step, beta2)
    rho_inf = (1.0 + beta2) / (1.0 - beta2)
    rho = rho_inf + 2.0 * step * (1.0 + minus_correction2) / minus_correction2
    rectified = rho > 5.0
    # Numbers for which the formula is defined, where its result is not used.
    r, r_inf = where(rectified, rho, 6.0), where(rectified, rho_inf, 6.0)
    rectification = sqrt((r - 4.0) * (r - 2.0) * r_inf / ((r_inf - 4.0) * (r_inf - 2.0) * r))
    return RAdamHyper(
        decay=1.0 - lr * weight_decay,
        weight_decay=weight_decay,
        one_minus_beta1=1.0 - beta1,
        beta2=beta2,
        one_minus_beta2=1.0 - beta2,
        eps=eps,
        step_size=lr / -expm1_log(step, beta1) * where(rectified, rectification * sqrt(-minus_correction2), 1.0),
        rectified=rectified,
    )


def _rectified_step(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: RAdamHyper) -> Tensor:
    """p - step_size*exp_avg, over sqrt(exp_avg_sq) + eps where the variance is known well enough."""
    if isinstance(h.rectified, Tensor):
        denom = torch.where(h.rectified, torch.sqrt(exp_avg_sq) + h.eps, 1.0)
        return minus_ratio(p, exp_avg, denom, h.step_size)
    if not h.rectified:
        return minus(p, exp_avg, h.step_size)
    return minus_ratio(p, exp_avg, torch.sqrt(exp_avg_sq).add_(h.eps), h.step_size)


def radam(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: RAdamHyper) -> tuple[Tensor, ...]:
    """Adam with rectified variance, and the L2 penalty weight_decay*p added to the gradient."""
    g = decayed(g, p, h.weight_decay)
    exp_avg = averaged(exp_avg, g, h.one_minus_beta1)
    exp_avg_sq = averaged_square(exp_avg_sq, g, h.beta2, h.one_minus_beta2)
    return _rectified_step(p, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


def radamw(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: RAdamHyper) -> tuple[Tensor, ...]:
    """Adam with rectified variance and decoupled weight decay: p shrinks by lr*weight_decay before the update."""
    exp_avg = averaged(exp_avg, g, h.one_minus_beta1)
    exp_avg_sq = averaged_square(exp_avg_sq, g, h.beta2, h.one_minus_beta2)
    return _rectified_step(scaled(p, h.decay), exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


_SCALARS = ("lr", "beta1", "beta2", "eps", "weight_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq")
# decoupled weight decay -> rule
_RULES = {
    False: Rule(radam, radam_row, RAdamHyper, _SCALARS, _MOMENTS),
    True: Rule(radamw, radam_row, RAdamHyper, _SCALARS, _MOMENTS),
}


class RAdam(FusedOptimizer):
    r"""RAdam: Adam whose variance is rectified while it is known badly, in one fused step.

    .. math::
        g &\leftarrow c\,g + \lambda p, \qquad
        m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        \rho_\infty &= \frac{2}{1-\beta_2} - 1, \qquad \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1-\beta_2^t}, \qquad
        r_t = \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}} \\
        p &\leftarrow p - \frac{\eta_t}{1-\beta_1^t}\, m \cdot
        \begin{cases} r_t \sqrt{1-\beta_2^t} \,/\, (\sqrt{v} + \epsilon) & \rho_t > 5 \\ 1 & \text{else} \end{cases}

    where :math:`c` is the clip factor, :math:`\eta_t` the scheduled learning rate and :math:`t` in powers the count
    of the tensor's own steps, from 1.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        decay = 1 - lr*weight_decay
        one_minus_beta1 = 1 - beta1
        one_minus_beta2 = 1 - beta2
        step_size = lr / (1 - beta1**step)
        rho_inf = 2/(1 - beta2) - 1
        rho = rho_inf - 2*step * beta2**step / (1 - beta2**step)
        if rho > 5:
            rectification = sqrt((rho - 4)*(rho - 2)*rho_inf / ((rho_inf - 4)*(rho_inf - 2)*rho))
            step_size = step_size * rectification * sqrt(1 - beta2**step)
        # each element, in float32
        g = -c*g if maximize else c*g
        if decoupled_weight_decay:
            p = decay*p
        elif weight_decay != 0:
            g = g + weight_decay*p
        exp_avg = exp_avg + one_minus_beta1*(g - exp_avg)
        exp_avg_sq = beta2*exp_avg_sq + one_minus_beta2*g*g
        denominator = sqrt(exp_avg_sq) + eps if rho > 5 else 1
        p = p - step_size * exp_avg / denominator

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator; at least 0.
        weight_decay: L2 penalty :math:`\lambda`, added to the gradient; at least 0.
        decoupled_weight_decay: shrink p by :math:`1-\eta_t \lambda` instead, as :class:`AdamW` does.
        foreach: accepted for compatibility with torch.optim; chooses nothing here.
        maximize: ascend instead of descend.
        capturable: accepted for compatibility with torch.optim; chooses nothing here.
        differentiable: must be False.
        schedule: a schedule of the learning rate, or a dict of schedules by the name of the scalar.
        clip: a clipping strategy, or a number M for ``clipping.GlobalNorm(M)``.
        nonfinite: what a step does whose gradients hold an inf or NaN: "propagate", "skip" or "raise".
        precision: how weights and state are stored, a :class:`fusedlr.Precision`; None: as torch.optim does.
        flatten: whether parameters are moved into flat buffers.
        backend: "auto", "triton" or "torch".
        norm_group: None.

    Raises:
        ValueError: for values outside their ranges, as torch.optim.RAdam does, and for unknown options.
        TypeError: for a ``schedule`` or a ``clip`` of another type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.

    Differs from torch:
        - :math:`1-\beta_2^t` is taken without cancellation: torch's :math:`\rho_t` is off by
          1e-16/:math:`(1-\beta_2)^2`.

    Source:
        Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond" (2020), with the decay of Loshchilov and
        Hutter where it is decoupled; as :class:`torch.optim.RAdam` has it.

    Example:
        >>> import torch, fusedlr
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fusedlr.RAdam(model.parameters(), weight_decay=0.01, decoupled_weight_decay=True, clip=1.0)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    _namesake = torch.optim.RAdam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
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
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
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
        return _RULES[bool(group["decoupled_weight_decay"])]
