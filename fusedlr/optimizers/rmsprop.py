"""RMSprop, centered or not, with momentum or without: the reference rules and the public class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clipping import Clip
from ..groups import moves_momentum
from ..optimizer import FusedOptimizer, ParamsT, ScheduleArg
from ..precision import Precision
from ..rule import Rule, averaged, averaged_square, decayed, minus, minus_ratio, scaled

__all__ = ["RMSprop"]


class RMSpropHyper(NamedTuple):
    """The row of a tensor: what its elements share in one step."""

    lr: Any
    alpha: Any
    one_minus_alpha: Any
    eps: Any
    weight_decay: Any
    momentum: Any


def rmsprop_row(step: Any, lr: Any, alpha: Any, eps: Any, weight_decay: Any, momentum: Any) -> RMSpropHyper:
    """The numbers of one step; 1-alpha is taken here, in float64."""
    return RMSpropHyper(lr, alpha, 1.0 - alpha, eps, weight_decay, momentum)


def rmsprop(p: Tensor, g: Tensor, square_avg: Tensor, h: RMSpropHyper) -> tuple[Tensor, ...]:
    """p - lr*g / (sqrt(square_avg) + eps)."""
    g = decayed(g, p, h.weight_decay)
    square_avg = averaged_square(square_avg, g, h.alpha, h.one_minus_alpha)
    denom = torch.sqrt(square_avg).add_(h.eps)
    return minus_ratio(p, g, denom, h.lr), square_avg


def rmsprop_momentum(
    p: Tensor, g: Tensor, square_avg: Tensor, momentum_buffer: Tensor, h: RMSpropHyper
) -> tuple[Tensor, ...]:
    """b = momentum*b + g / (sqrt(square_avg) + eps); p - lr*b."""
    g = decayed(g, p, h.weight_decay)
    square_avg = averaged_square(square_avg, g, h.alpha, h.one_minus_alpha)
    denom = torch.sqrt(square_avg).add_(h.eps)
    momentum_buffer = scaled(momentum_buffer, h.momentum).addcdiv_(g, denom)
    return minus(p, momentum_buffer, h.lr), square_avg, momentum_buffer


def rmsprop_centered(
    p: Tensor, g: Tensor, square_avg: Tensor, grad_avg: Tensor, h: RMSpropHyper
) -> tuple[Tensor, ...]:
    """p - lr*g / (sqrt(square_avg - grad_avg^2) + eps)."""
    g = decayed(g, p, h.weight_decay)
    square_avg = averaged_square(square_avg, g, h.alpha, h.one_minus_alpha)
    grad_avg = averaged(grad_avg, g, h.one_minus_alpha)
    denom = torch.addcmul(square_avg, grad_avg, grad_avg, value=-1).sqrt_().add_(h.eps)
    return minus_ratio(p, g, denom, h.lr), square_avg, grad_avg


def rmsprop_centered_momentum(
    p: Tensor, g: Tensor, square_avg: Tensor, momentum_buffer: Tensor, grad_avg: Tensor, h: RMSpropHyper
) -> tuple[Tensor, ...]:
    """b = momentum*b + g / (sqrt(square_avg - grad_avg^2) + eps); p - lr*b."""
    g = decayed(g, p, h.weight_decay)
    square_avg = averaged_square(square_avg, g, h.alpha, h.one_minus_alpha)
    grad_avg = averaged(grad_avg, g, h.one_minus_alpha)
    denom = torch.addcmul(square_avg, grad_avg, grad_avg, value=-1).sqrt_().add_(h.eps)
    momentum_buffer = scaled(momentum_buffer, h.momentum).addcdiv_(g, denom)
    return minus(p, momentum_buffer, h.lr), square_avg, momentum_buffer, grad_avg


_SCALARS = ("lr", "alpha", "eps", "weight_decay", "momentum")
_ALL = ("square_avg", "momentum_buffer", "grad_avg")
# (centered, momentum) -> rule
_RULES = {
    (False, False): Rule(rmsprop, rmsprop_row, RMSpropHyper, _SCALARS, _ALL[:1]),
    (False, True): Rule(rmsprop_momentum, rmsprop_row, RMSpropHyper, _SCALARS, _ALL[:2]),
    (True, False): Rule(rmsprop_centered, rmsprop_row, RMSpropHyper, _SCALARS, _ALL[::2], cancels=True),
    (True, True): Rule(rmsprop_centered_momentum, rmsprop_row, RMSpropHyper, _SCALARS, _ALL, cancels=True),
}


class RMSprop(FusedOptimizer):
    r"""RMSprop, optionally centered and with momentum, in one fused step.

    .. math::
        g &\leftarrow c\,g + \lambda p, \qquad
        v \leftarrow \alpha v + (1-\alpha) g^2, \qquad
        a \leftarrow \alpha a + (1-\alpha) g \\
        d &= \sqrt{v} + \epsilon, \quad \text{or } \sqrt{v - a^2} + \epsilon \text{ when centered} \\
        p &\leftarrow p - \eta_t \, g/d, \quad
        \text{or with momentum } b \leftarrow \mu b + g/d, \; p \leftarrow p - \eta_t b

    where :math:`c` is the clip factor and :math:`\eta_t` the scheduled learning rate.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        one_minus_alpha = 1 - alpha
        # each element, in float32
        g = -c*g if maximize else c*g
        if weight_decay != 0:
            g = g + weight_decay*p
        square_avg = alpha*square_avg + one_minus_alpha*g*g
        variance = square_avg
        if centered:
            grad_avg = grad_avg + one_minus_alpha*(g - grad_avg)
            variance = square_avg - grad_avg*grad_avg
        update = g / (sqrt(variance) + eps)
        if momentum > 0:
            update = momentum_buffer = momentum*momentum_buffer + update
        p = p - lr*update

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        alpha: decay rate :math:`\alpha` of the averages, at least 0.
        eps: added to the denominator; at least 0.
        weight_decay: L2 penalty :math:`\lambda`, added to the gradient; at least 0.
        momentum: momentum factor :math:`\mu`, at least 0.
        centered: divide by the estimated standard deviation of the gradient instead of its root mean square.
        capturable: accepted for compatibility with torch.optim; chooses nothing here.
        foreach: accepted for compatibility with torch.optim; chooses nothing here.
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
        ValueError: for values outside their ranges, as torch.optim.RMSprop does, and for unknown options.
        TypeError: for a ``schedule`` or a ``clip`` of another type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.

    Differs from torch:
        - With a schedule of the momentum the buffer is kept where the momentum passes through 0.
        - As in torch, eps is added behind the root, and where rounding makes the variance of a centered one negative (a
          gradient that stays the same for long) the result is NaN.

    Source:
        Tieleman and Hinton, "Lecture 6.5: RMSprop" (2012); the centered one: Graves, "Generating Sequences With
        Recurrent Neural Networks" (2013); as :class:`torch.optim.RMSprop` has them.

    Example:
        >>> import torch, fusedlr
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fusedlr.RMSprop(model.parameters(), lr=1e-2, momentum=0.9, centered=True, clip=1.0)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    _namesake = torch.optim.RMSprop

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
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
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            capturable=capturable,
            foreach=foreach,
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
        # A scheduled momentum may pass through 0: the buffer stays, and holds the last update then.
        has_momentum = bool(group["momentum"] > 0) or moves_momentum(group["schedule"])
        return _RULES[bool(group["centered"]), has_momentum]
