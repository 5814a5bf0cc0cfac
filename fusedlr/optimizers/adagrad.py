"""Adagrad: the reference rule and the public class."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clipping import Clip
from ..optimizer import FusedOptimizer, ParamsT, ScheduleArg
from ..precision import Precision
from ..rule import Rule, decayed, minus_ratio
from ..state import ensure_state

__all__ = ["Adagrad"]


class AdagradHyper(NamedTuple):
    """The row of a tensor: what its elements share in one step."""

    step_size: Any
    eps: Any
    weight_decay: Any


def adagrad_row(step: Any, lr: Any, lr_decay: Any, weight_decay: Any, eps: Any) -> AdagradHyper:
    """The numbers of one step."""
    return AdagradHyper(lr / (1.0 + (step - 1.0) * lr_decay), eps, weight_decay)


def adagrad(p: Tensor, g: Tensor, sum: Tensor, h: AdagradHyper) -> tuple[Tensor, ...]:
    """p - step_size*g / (sqrt(sum) + eps), with the sum of all squared gradients."""
    g = decayed(g, p, h.weight_decay)
    sum = torch.addcmul(sum, g, g)
    denom = torch.sqrt(sum).add_(h.eps)
    return minus_ratio(p, g, denom, h.step_size), sum


def _aten_adagrad(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Sequence[Sequence[Tensor]],
    step: Tensor,
    scalars: Mapping[str, Any],
    maximize: bool,
    grad_scale: Tensor | None,
) -> None:
    # torch 2.13's operator misreads an expanded gradient; here it gets gradients of one dimension without gaps.
    torch._fused_adagrad_(
        list(params),
        list(grads),
        list(state[0]),
        [step] * len(params),
        lr=scalars["lr"],
        lr_decay=scalars["lr_decay"],
        weight_decay=scalars["weight_decay"],
        eps=scalars["eps"],
        maximize=maximize,
        grad_scale=grad_scale,
    )


_SCALARS = ("lr", "lr_decay", "weight_decay", "eps")
_ADAGRAD = Rule(adagrad, adagrad_row, AdagradHyper, _SCALARS, ("sum",), _aten_adagrad)


@functools.cache
def _starting_at(value: float) -> Rule:
    """The rule whose sums start at a value."""
    return dataclasses.replace(_ADAGRAD, start=(value,))


class Adagrad(FusedOptimizer):
    r"""Adagrad, with the learning-rate schedule, the clipping and the update in one fused step.

    .. math::
        g &\leftarrow c\,g + \lambda p, \qquad
        s \leftarrow s + g^2 \quad (s = \tau \text{ at the start}) \\
        p &\leftarrow p - \frac{\eta_t}{1 + (n-1)\,\delta} \cdot \frac{g}{\sqrt{s} + \epsilon}

    where :math:`c` is the clip factor and :math:`\eta_t` the scheduled learning rate.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        step_size = lr / (1 + (step - 1)*lr_decay)
        # each element, in float32
        g = -c*g if maximize else c*g
        if weight_decay != 0:
            g = g + weight_decay*p
        sum = sum + g*g
        p = p - step_size * g / (sqrt(sum) + eps)

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        lr_decay: decay :math:`\delta` of the learning rate with a tensor's own steps n; at least 0.
        weight_decay: L2 penalty :math:`\lambda`, added to the gradient; at least 0.
        initial_accumulator_value: what :math:`\tau` the sums of squares start at; at least 0.
        eps: added to the denominator; at least 0.
        foreach: accepted for compatibility with torch.optim; chooses nothing here.
        maximize: ascend instead of descend.
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
        ValueError: for values outside their ranges, as torch.optim.Adagrad does, and for unknown options.
        TypeError: for a ``schedule`` or a ``clip`` of another type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.

    Differs from torch:
        - Sparse gradients are an error, and so is ``share_memory()``: the sums lie in flat buffers.
        - As in torch the sums are there from the beginning, at the ``initial_accumulator_value`` of the constructor;
          those of a group that is added later come with its first gradient.
        - ``lr_decay`` and ``schedule`` multiply.

    Source:
        Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization" (2011),
        as :class:`torch.optim.Adagrad` has it.

    Example:
        >>> import torch, fusedlr
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fusedlr.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.1, clip=1.0)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    _namesake = torch.optim.Adagrad

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
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
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            foreach=foreach,
            maximize=maximize,
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
        for bank in ensure_state(self._leaves, [self._rule(group) for group in self.param_groups], self.state):
            bank.settle()
        self._watch_state()

    def _rule(self, group: dict[str, Any]) -> Rule:
        # torch, too, takes the constructor's value for every group.
        return _starting_at(float(self.defaults["initial_accumulator_value"]))

    def share_memory(self) -> None:
        """Not possible here: raises an error that says so.

        Raises:
            NotImplementedError: always. The sums are parts of flat buffers, which another process would copy.
        """
        raise NotImplementedError(
            "fusedlr.Adagrad cannot share its state between processes: it lies in flat buffers that each process has "
            "for itself; use torch.optim.Adagrad for training without locks (Hogwild)"
        )
