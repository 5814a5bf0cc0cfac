"""Lion: the reference rule and the public class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clipping import Clip
from ..optimizer import FusedOptimizer, ParamsT, ScheduleArg
from ..precision import Precision
from ..rule import Rule, averaged, minus, scaled

__all__ = ["Lion"]


class LionHyper(NamedTuple):
    """The row of a tensor: what its elements share in one step."""

    lr: Any
    decay: Any
    beta1: Any
    one_minus_beta1: Any
    one_minus_beta2: Any


def lion_row(step: Any, lr: Any, beta1: Any, beta2: Any, weight_decay: Any) -> LionHyper:
    """The numbers of one step; 1-beta is taken here, in float64."""
    return LionHyper(lr, 1.0 - lr * weight_decay, beta1, 1.0 - beta1, 1.0 - beta2)


def lion(p: Tensor, g: Tensor, exp_avg: Tensor, h: LionHyper) -> tuple[Tensor, ...]:
    """p*decay - lr*sign(beta1*exp_avg + (1-beta1)*g); then exp_avg moves by (1-beta2)*(g - exp_avg)."""
    # Each product is rounded, as in the kernel: a fused one could turn the sign where the two nearly cancel.
    blend = (exp_avg * h.beta1).add_(g * h.one_minus_beta1)
    # torch.sign makes 0 of a NaN, and the weight would stand still from then on without anybody noticing.
    update = torch.where(blend.isnan(), blend, torch.sign(blend))
    exp_avg = averaged(exp_avg, g, h.one_minus_beta2)
    return minus(scaled(p, h.decay), update, h.lr), exp_avg


_LION = Rule(lion, lion_row, LionHyper, ("lr", "beta1", "beta2", "weight_decay"), ("exp_avg",))


class Lion(FusedOptimizer):
    r"""Lion: the sign of a momentum, with decoupled weight decay, in one fused step.

    .. math::
        u &= \operatorname{sign}(\beta_1 m + (1-\beta_1)\, c\,g), \qquad
        p \leftarrow p\,(1 - \eta_t \lambda) - \eta_t u, \qquad
        m \leftarrow \beta_2 m + (1-\beta_2)\, c\,g

    where :math:`c` is the clip factor and :math:`\eta_t` the scheduled learning rate.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        decay = 1 - lr*weight_decay
        one_minus_beta1 = 1 - beta1
        one_minus_beta2 = 1 - beta2
        # each element, in float32
        g = -c*g if maximize else c*g
        update = sign(beta1*exp_avg + one_minus_beta1*g)
        exp_avg = exp_avg + one_minus_beta2*(g - exp_avg)
        p = decay*p - lr*update

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        betas: weights of the momentum in the update and in its own average, each in [0, 1).
        weight_decay: decoupled weight decay :math:`\lambda`; at least 0.
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
        - A gradient that is NaN gives a parameter that is NaN. ``torch.sign`` makes 0 of it, and the weight would stand
          still without anybody noticing.
        - Every element moves by the lr itself, so the paper advises a lr 3 to 10 times below AdamW's and a weight decay
          as much above.

    Source:
        Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), algorithm 2.

    Example:
        >>> import torch, fusedlr
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fusedlr.Lion(model.parameters(), lr=1e-4, weight_decay=0.1, clip=1.0)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
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
            weight_decay=weight_decay,
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
        torch.optim.AdamW([torch.zeros(1)], **{name: values[name] for name in ("lr", "betas", "weight_decay")})
        return dict(values)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _LION
