"""Adadelta: the reference rule and the public class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clipping import Clip
from ..optimizer import FusedOptimizer, ParamsT, ScheduleArg
from ..precision import Precision
from ..rule import Rule, averaged_square, decayed, minus

__all__ = ["Adadelta"]


class AdadeltaHyper(NamedTuple):
    """The row of a tensor: what its elements share in one step."""

    lr: Any
    rho: Any
    one_minus_rho: Any
    eps: Any
    weight_decay: Any


def adadelta_row(step: Any, lr: Any, rho: Any, eps: Any, weight_decay: Any) -> AdadeltaHyper:
    """The numbers of one step; 1-rho is taken here, in float64."""
    return AdadeltaHyper(lr, rho, 1.0 - rho, eps, weight_decay)


def adadelta(p: Tensor, g: Tensor, square_avg: Tensor, acc_delta: Tensor, h: AdadeltaHyper) -> tuple[Tensor, ...]:
    """p - lr*delta, with delta = g * sqrt(acc_delta + eps) / sqrt(square_avg + eps)."""
    g = decayed(g, p, h.weight_decay)
    square_avg = averaged_square(square_avg, g, h.rho, h.one_minus_rho)
    delta = (acc_delta + h.eps).sqrt_().div_((square_avg + h.eps).sqrt_()).mul_(g)
    acc_delta = averaged_square(acc_delta, delta, h.rho, h.one_minus_rho)
    return minus(p, delta, h.lr), square_avg, acc_delta


_ADADELTA = Rule(
    adadelta, adadelta_row, AdadeltaHyper, ("lr", "rho", "eps", "weight_decay"), ("square_avg", "acc_delta")
)


class Adadelta(FusedOptimizer):
    r"""Adadelta, with the learning-rate schedule, the clipping and the update in one fused step.

    .. math::
        g &\leftarrow c\,g + \lambda p, \qquad
        v \leftarrow \rho v + (1-\rho) g^2, \qquad
        \delta = \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}}\, g \\
        u &\leftarrow \rho u + (1-\rho)\, \delta^2, \qquad p \leftarrow p - \eta_t\, \delta

    where :math:`c` is the clip factor and :math:`\eta_t` the scheduled learning rate.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        one_minus_rho = 1 - rho
        # each element, in float32
        g = -c*g if maximize else c*g
        if weight_decay != 0:
            g = g + weight_decay*p
        square_avg = rho*square_avg + one_minus_rho*g*g
        delta = g * sqrt(acc_delta + eps) / sqrt(square_avg + eps)
        acc_delta = rho*acc_delta + one_minus_rho*delta*delta
        p = p - lr*delta

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        rho: decay rate :math:`\rho` of both averages, in [0, 1].
        eps: added under both roots; at least 0.
        weight_decay: L2 penalty :math:`\lambda`, added to the gradient; at least 0.
        foreach: accepted for compatibility with torch.optim; chooses nothing here.
        capturable: accepted for compatibility with torch.optim; chooses nothing here.
        maximize: ascend instead of descend.
        differentiable: must be False.
        schedule: a schedule of the learning rate, or a dict of schedules by the name of the scalar.
        clip: a clipping strategy, or a number M for ``clipping.GlobalNorm(M)``.
        nonfinite: what a step does whose gradients hold an inf or NaN: "propagate", "skip" or "raise".
        precision: how weights and state are stored, a :class:`fusedlr.Precision`; None: as torch.optim does.
        flatten: whether parameters are moved into flat buffers.
        backend: "auto", "triton" or "torch".
        norm_group: None.

    Raises:
        ValueError: for values outside their ranges, as torch.optim.Adadelta does, and for unknown options.
        TypeError: for a ``schedule`` or a ``clip`` of another type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.

    Differs from torch:
        - Nothing beyond what all optimizers have.

    Source:
        Zeiler, "ADADELTA: An Adaptive Learning Rate Method" (2012), as :class:`torch.optim.Adadelta` has it.

    Example:
        >>> import torch, fusedlr
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fusedlr.Adadelta(model.parameters(), lr=1.0, rho=0.95, clip=1.0)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    _namesake = torch.optim.Adadelta

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
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
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            capturable=capturable,
            maximize=maximize,
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
        return _ADADELTA
