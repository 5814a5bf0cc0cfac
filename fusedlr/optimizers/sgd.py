"""Stochastic gradient descent with momentum: the reference rules and the public class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clipping import Clip
from ..groups import moves_momentum
from ..optimizer import FusedOptimizer, ParamsT, ScheduleArg
from ..precision import Precision
from ..rule import Rule, decayed

__all__ = ["SGD"]


class SGDHyper(NamedTuple):
    """The row of a tensor: what its elements share in one step."""

    lr: Any
    weight_decay: Any
    momentum: Any
    one_minus_dampening: Any
    nesterov: Any
    first: Any


def sgd_row(step: Any, lr: Any, momentum: Any, dampening: Any, weight_decay: Any, nesterov: Any) -> SGDHyper:
    """The numbers of one step; ``first`` marks those in which the buffer becomes the gradient itself."""
    return SGDHyper(lr, weight_decay, momentum, 1.0 - dampening, nesterov, (step == 1) | (momentum == 0))


def sgd(p: Tensor, g: Tensor, h: SGDHyper) -> tuple[Tensor, ...]:
    """p - lr*(g + weight_decay*p)."""
    g = decayed(g, p, h.weight_decay)
    return (p - h.lr * g,)


def sgd_momentum(p: Tensor, g: Tensor, momentum_buffer: Tensor, h: SGDHyper) -> tuple[Tensor, ...]:
    """b = momentum*b + (1-dampening)*g, b = g in the first step; p - lr*(g + momentum*b if nesterov else b)."""
    g = decayed(g, p, h.weight_decay)
    started = momentum_buffer * h.momentum + g * h.one_minus_dampening
    momentum_buffer = torch.where(torch.as_tensor(h.first, device=g.device), g, started)
    if h.nesterov != 0:
        g = g + h.momentum * momentum_buffer
    else:
        g = momentum_buffer
    return p - h.lr * g, momentum_buffer


_SMALLEST = torch.finfo(torch.float32).tiny


def _aten_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Sequence[Sequence[Tensor]],
    step: Tensor,
    scalars: Mapping[str, Any],
    maximize: bool,
    grad_scale: Tensor | None,
) -> None:
    torch._fused_sgd_(
        list(params),
        list(grads),
        list(state[0]) if state else [],
        weight_decay=scalars["weight_decay"],
        # ATen refuses a buffer with momentum 0, through which a schedule may pass: it is filled as in the first step.
        momentum=scalars["momentum"] or (_SMALLEST if state else 0.0),
        lr=scalars["lr"],
        dampening=scalars["dampening"],
        nesterov=bool(scalars["nesterov"]),
        maximize=maximize,
        is_first_step=step.item() == 1 or scalars["momentum"] == 0,
        grad_scale=grad_scale,
    )


def _fold(step: float, factor: float, scalars: dict[str, float]) -> dict[str, float]:
    """c*g + weight_decay*p is c*(g + weight_decay/c*p), and the rule is linear in it."""
    return {**scalars, "lr": scalars["lr"] * factor, "weight_decay": scalars["weight_decay"] / factor}


def _fold_momentum(step: float, factor: float, scalars: dict[str, float]) -> dict[str, float] | None:
    """The same, with c in the share of the gradient in the buffer; Nesterov's has two, and one made anew none."""
    if step == 1.0 or scalars["nesterov"] or scalars["momentum"] == 0:
        return None
    dampening = 1.0 - (1.0 - scalars["dampening"]) * factor
    return {**scalars, "dampening": dampening, "weight_decay": scalars["weight_decay"] / factor}


_SCALARS = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
_PLAIN = Rule(sgd, sgd_row, SGDHyper, _SCALARS, (), _aten_sgd, fold=_fold)
_MOMENTUM = Rule(sgd_momentum, sgd_row, SGDHyper, _SCALARS, ("momentum_buffer",), _aten_sgd, fold=_fold_momentum)


class SGD(FusedOptimizer):
    r"""Stochastic gradient descent, optionally with (Nesterov) momentum, in one fused step.

    .. math::
        g &\leftarrow c\,g + \lambda p, \qquad
        b \leftarrow \mu b + (1-\tau) g \quad (b \leftarrow g \text{ in the first step}) \\
        p &\leftarrow p - \eta_t \,(g + \mu b \text{ with nesterov, else } b)

    where :math:`c` is the clip factor and :math:`\eta_t` the scheduled learning rate.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        one_minus_dampening = 1 - dampening
        # each element, in float32
        g = -c*g if maximize else c*g
        if weight_decay != 0:
            g = g + weight_decay*p
        if momentum != 0:
            momentum_buffer = g if step == 1 else momentum*momentum_buffer + one_minus_dampening*g
            g = g + momentum*momentum_buffer if nesterov else momentum_buffer
        p = p - lr*g

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        momentum: momentum factor :math:`\mu`; at least 0.
        dampening: dampening :math:`\tau` of the momentum.
        weight_decay: L2 penalty :math:`\lambda`, added to the gradient; at least 0.
        nesterov: Nesterov momentum; needs a momentum and no dampening.
        maximize: ascend instead of descend.
        foreach: accepted for compatibility with torch.optim; chooses nothing here.
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
        ValueError: for values outside their ranges, as torch.optim.SGD does, and for unknown options.
        TypeError: for a ``schedule`` or a ``clip`` of another type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.

    Differs from torch:
        - The state holds ``step`` too: the first step is the one in which it becomes 1. torch tells it by the missing
          buffer.
        - With a schedule of the momentum the buffer is kept where the momentum passes through 0, and holds the gradient
          then.
        - On the CPU, where the rule is linear in the gradient, the clip factor is folded into lr, weight_decay and
          dampening.

    Source:
        Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013), as
        :class:`torch.optim.SGD` has it.

    Example:
        >>> import torch, fusedlr
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fusedlr.SGD(model.parameters(), lr=0.1, momentum=0.9, clip=1.0)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    _namesake = torch.optim.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
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

    def _rule(self, group: dict[str, Any]) -> Rule:
        # A scheduled momentum may pass through 0: the buffer stays, and holds the gradient then.
        return _MOMENTUM if group["momentum"] != 0 or moves_momentum(group["schedule"]) else _PLAIN
