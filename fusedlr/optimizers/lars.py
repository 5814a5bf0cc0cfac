"""LARS: the reference rules and the public class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clipping import Clip
from ..groups import moves_momentum
from ..optimizer import FusedOptimizer, ParamsT, ScheduleArg
from ..precision import Precision
from ..rule import Rule, Trust, decayed, where

__all__ = ["LARS"]


class LARSHyper(NamedTuple):
    """The row of a tensor: what its elements share in one step; ``trust`` is 1 until the norms are known."""

    lr: Any
    momentum: Any
    weight_decay: Any
    trust_coefficient: Any
    eps: Any
    one_minus_dampening: Any
    nesterov: Any
    first: Any
    trust: Any


def lars_row(
    step: Any,
    lr: Any,
    momentum: Any,
    weight_decay: Any,
    trust_coefficient: Any,
    eps: Any,
    dampening: Any,
    nesterov: Any,
) -> LARSHyper:
    """The numbers of one step; ``first`` marks those in which the buffer becomes the adapted gradient itself."""
    first = (step == 1) | (momentum == 0)
    return LARSHyper(lr, momentum, weight_decay, trust_coefficient, eps, 1.0 - dampening, nesterov, first, 1.0)


def lars(p: Tensor, g: Tensor, h: LARSHyper) -> tuple[Tensor, ...]:
    """p - lr*trust*(g + weight_decay*p)."""
    return (p - h.lr * h.trust * decayed(g, p, h.weight_decay),)


def lars_momentum(p: Tensor, g: Tensor, momentum_buffer: Tensor, h: LARSHyper) -> tuple[Tensor, ...]:
    """d = trust*(g + weight_decay*p); b = momentum*b + (1-dampening)*d, b = d in the first step; p - lr*(d + momentum*b
    if nesterov else b)."""
    g = h.trust * decayed(g, p, h.weight_decay)
    started = momentum_buffer * h.momentum + g * h.one_minus_dampening
    momentum_buffer = torch.where(torch.as_tensor(h.first, device=g.device), g, started)
    if h.nesterov != 0:
        g = g + h.momentum * momentum_buffer
    else:
        g = momentum_buffer
    return p - h.lr * g, momentum_buffer


def lars_direction(p: Tensor, g: Tensor, h: LARSHyper) -> Tensor:
    """The gradient after the clip, without the weight decay."""
    return g


def lars_ratio(p_norm: Any, norm: Any, h: LARSHyper) -> Any:
    """trust_coefficient*p_norm / (norm + weight_decay*p_norm + eps), 1 where either norm is 0."""
    nothing = (p_norm == 0) | (norm == 0)
    whole = where(nothing, 1.0, norm + h.weight_decay * p_norm + h.eps)
    return where(nothing, 1.0, h.trust_coefficient * p_norm / whole)


_SCALARS = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "dampening", "nesterov")
_TRUST = Trust(lars_direction, lars_ratio)
_PLAIN = Rule(lars, lars_row, LARSHyper, _SCALARS, (), trust=_TRUST)
_MOMENTUM = Rule(lars_momentum, lars_row, LARSHyper, _SCALARS, ("momentum_buffer",), trust=_TRUST)


class LARS(FusedOptimizer):
    r"""LARS: gradient descent whose rate is each tensor's own, by the norms of weight and gradient, in one fused step.

    .. math::
        d &= \frac{\kappa \lVert p \rVert}{\lVert c\,g \rVert + \lambda \lVert p \rVert + \epsilon}\,
        (c\,g + \lambda p), \qquad
        b \leftarrow \mu b + (1-\tau) d \quad (b \leftarrow d \text{ in the first step}) \\
        p &\leftarrow p - \eta_t \,(d + \mu b \text{ with nesterov, else } b)

    where :math:`c` is the clip factor, :math:`\eta_t` the scheduled learning rate and :math:`\lVert\cdot\rVert` a
    tensor's Euclidean norm; the ratio is 1 where either norm is 0.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        one_minus_dampening = 1 - dampening
        # each element, in float32
        g = -c*g if maximize else c*g
        # once a tensor, in float64
        trust = 1
        if norm(p) != 0 and norm(g) != 0:
            trust = trust_coefficient*norm(p) / (norm(g) + weight_decay*norm(p) + eps)
        # each element, in float32
        if weight_decay != 0:
            g = g + weight_decay*p
        g = trust*g
        if momentum != 0:
            momentum_buffer = g if step == 1 else momentum*momentum_buffer + one_minus_dampening*g
            g = g + momentum*momentum_buffer if nesterov else momentum_buffer
        p = p - lr*g

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        momentum: momentum factor :math:`\mu`; at least 0.
        weight_decay: L2 penalty :math:`\lambda`; at least 0.
        trust_coefficient: :math:`\kappa`, how far a tensor moves at lr 1, as a part of its norm; at least 0.
        eps: added to the norms in the denominator; at least 0.
        dampening: dampening :math:`\tau` of the momentum.
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
        ValueError: for values outside their ranges, in the words of torch.optim, and for unknown options.
        TypeError: for a ``schedule`` or a ``clip`` of another type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.

    Differs from torch:
        - torch.optim has no such class; arguments that are torch's elsewhere mean the same here.
        - Where the paper multiplies by the lr before the momentum, the buffer holds no lr here, as in torch.optim.SGD,
          timm and torchlars: the same at a constant lr.
        - Every tensor is adapted; timm's Lars (but for ``always_adapt``) leaves tensors without weight decay at ratio
          1.
        - A NaN in a gradient makes the whole tensor NaN.

    Source:
        You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks" (2017), algorithm 1.

    Example:
        >>> import torch, fusedlr
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fusedlr.LARS(model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-4)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        weight_decay: float | Tensor = 0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        dampening: float = 0,
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
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
            dampening=dampening,
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

    @classmethod
    def _validated(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        # The arguments that SGD has too are checked by torch, in its words.
        shared = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "differentiable",
                  "fused")  # fmt: skip
        torch.optim.SGD([torch.zeros(1)], **{name: values[name] for name in shared})
        for name in ("trust_coefficient", "eps"):
            if not values[name] >= 0.0:  # NaN included
                raise ValueError(f"{name} must be at least 0, but got {values[name]!r}")
        return dict(values)

    def _rule(self, group: dict[str, Any]) -> Rule:
        # A scheduled momentum may pass through 0: the buffer stays, and holds the adapted gradient then.
        return _MOMENTUM if group["momentum"] != 0 or moves_momentum(group["schedule"]) else _PLAIN
