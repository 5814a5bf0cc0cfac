"""Adam and AdamW, with AMSGrad: the reference rules and the public classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clipping import Clip
from ..optimizer import FusedOptimizer, ParamsT, ScheduleArg
from ..precision import Precision
from ..rule import AtenRule, Rule, decayed, expm1_log, sqrt

__all__ = ["Adam", "AdamW"]


class AdamHyper(NamedTuple):
    """The row of a tensor: what its elements share in one step."""

    decay: Any
    weight_decay: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    eps: Any
    step_size: Any
    bias_correction2_sqrt: Any


def adam_row(step: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any) -> AdamHyper:
    """The numbers of one step; 1-beta is taken here, in float64: in float32, 1-0.999 is 1.3e-5 off."""
    return AdamHyper(
        decay=1.0 - lr * weight_decay,
        weight_decay=weight_decay,
        one_minus_beta1=1.0 - beta1,
        beta2=beta2,
        one_minus_beta2=1.0 - beta2,
        eps=eps,
        step_size=lr / -expm1_log(step, beta1),
        bias_correction2_sqrt=sqrt(-expm1_log(step, beta2)),
    )


def _moments(g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: AdamHyper) -> tuple[Tensor, Tensor]:
    """The two running averages after this gradient.

    With beta1 0 the first is the gradient, however large it was: in g - exp_avg, a small g would be lost.
    """
    exp_avg = exp_avg - exp_avg * h.one_minus_beta1 + g * h.one_minus_beta1
    return exp_avg, exp_avg_sq * h.beta2 + g * g * h.one_minus_beta2


def adam(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: AdamHyper) -> tuple[Tensor, ...]:
    """Adam with the L2 penalty weight_decay*p added to the gradient."""
    g = decayed(g, p, h.weight_decay)
    exp_avg, exp_avg_sq = _moments(g, exp_avg, exp_avg_sq, h)
    denom = torch.sqrt(exp_avg_sq) / h.bias_correction2_sqrt + h.eps
    return p - h.step_size * (exp_avg / denom), exp_avg, exp_avg_sq


def adam_amsgrad(
    p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor, h: AdamHyper
) -> tuple[Tensor, ...]:
    """Adam with the L2 penalty, divided by the root of the largest second moment so far."""
    g = decayed(g, p, h.weight_decay)
    exp_avg, exp_avg_sq = _moments(g, exp_avg, exp_avg_sq, h)
    max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    denom = torch.sqrt(max_exp_avg_sq) / h.bias_correction2_sqrt + h.eps
    return p - h.step_size * (exp_avg / denom), exp_avg, exp_avg_sq, max_exp_avg_sq


def adamw(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: AdamHyper) -> tuple[Tensor, ...]:
    """Adam with decoupled weight decay: p shrinks by lr*weight_decay before the update."""
    p = p * h.decay
    exp_avg, exp_avg_sq = _moments(g, exp_avg, exp_avg_sq, h)
    denom = torch.sqrt(exp_avg_sq) / h.bias_correction2_sqrt + h.eps
    return p - h.step_size * (exp_avg / denom), exp_avg, exp_avg_sq


def adamw_amsgrad(
    p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor, h: AdamHyper
) -> tuple[Tensor, ...]:
    """Adam with decoupled weight decay, divided by the root of the largest second moment so far."""
    p = p * h.decay
    exp_avg, exp_avg_sq = _moments(g, exp_avg, exp_avg_sq, h)
    max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    denom = torch.sqrt(max_exp_avg_sq) / h.bias_correction2_sqrt + h.eps
    return p - h.step_size * (exp_avg / denom), exp_avg, exp_avg_sq, max_exp_avg_sq


def _aten_adam(operator: Any) -> AtenRule:
    def aten(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Sequence[Sequence[Tensor]],
        step: Tensor,
        scalars: Mapping[str, Any],
        maximize: bool,
        grad_scale: Tensor | None,
    ) -> None:
        operator(
            params,
            grads,
            state[0],
            state[1],
            state[2] if len(state) > 2 else [],
            [step] * len(params),
            lr=scalars["lr"],
            beta1=scalars["beta1"],
            beta2=scalars["beta2"],
            weight_decay=scalars["weight_decay"],
            eps=scalars["eps"],
            amsgrad=len(state) > 2,
            maximize=maximize,
            grad_scale=grad_scale,
        )

    return aten


_SCALARS = ("lr", "beta1", "beta2", "eps", "weight_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_AMSGRAD = (*_MOMENTS, "max_exp_avg_sq")
# (decoupled weight decay, amsgrad) -> rule
_RULES = {
    (False, False): Rule(adam, adam_row, AdamHyper, _SCALARS, _MOMENTS, _aten_adam(torch._fused_adam_)),
    (False, True): Rule(adam_amsgrad, adam_row, AdamHyper, _SCALARS, _AMSGRAD, _aten_adam(torch._fused_adam_)),
    (True, False): Rule(adamw, adam_row, AdamHyper, _SCALARS, _MOMENTS, _aten_adam(torch._fused_adamw_)),
    (True, True): Rule(adamw_amsgrad, adam_row, AdamHyper, _SCALARS, _AMSGRAD, _aten_adam(torch._fused_adamw_)),
}


class Adam(FusedOptimizer):
    r"""Adam, with the learning-rate schedule, the clipping and the update in one fused step.

    .. math::
        g &\leftarrow c\,g + \lambda p, \qquad
        m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        p &\leftarrow p - \frac{\eta_t}{1-\beta_1^t} \cdot
        \frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}

    where :math:`c` is the clip factor, :math:`\eta_t` the scheduled learning rate and :math:`t` in powers the count
    of the tensor's own steps, from 1.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        decay = 1 - lr*weight_decay
        one_minus_beta1 = 1 - beta1
        one_minus_beta2 = 1 - beta2
        step_size = lr / (1 - beta1**step)
        bias_correction2_sqrt = sqrt(1 - beta2**step)
        # each element, in float32
        g = -c*g if maximize else c*g
        if decoupled_weight_decay:
            p = decay*p
        elif weight_decay != 0:
            g = g + weight_decay*p
        exp_avg = exp_avg + one_minus_beta1*(g - exp_avg)
        exp_avg_sq = beta2*exp_avg_sq + one_minus_beta2*g*g
        largest = exp_avg_sq
        if amsgrad:
            largest = max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)
        p = p - step_size * exp_avg / (sqrt(largest)/bias_correction2_sqrt + eps)

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        betas: decay rates of the two moments, each in [0, 1); two floats or two one-element tensors.
        eps: added to the denominator; at least 0.
        weight_decay: L2 penalty :math:`\lambda`, added to the gradient; at least 0.
        amsgrad: divide by the root of the largest :math:`v` so far.
        foreach: accepted for compatibility with torch.optim; chooses nothing here.
        maximize: ascend instead of descend.
        capturable: accepted for compatibility with torch.optim; chooses nothing here.
        differentiable: must be False.
        fused: accepted for compatibility with torch.optim; chooses nothing here.
        decoupled_weight_decay: decay as :class:`AdamW` does.
        schedule: a schedule of the learning rate, or a dict of schedules by the name of the scalar.
        clip: a clipping strategy, or a number M for ``clipping.GlobalNorm(M)``.
        nonfinite: what a step does whose gradients hold an inf or NaN: "propagate", "skip" or "raise".
        precision: how weights and state are stored, a :class:`fusedlr.Precision`; None: as torch.optim does.
        flatten: whether parameters are moved into flat buffers.
        backend: "auto", "triton" or "torch".
        norm_group: None.

    Raises:
        ValueError: for values outside their ranges, as torch.optim.Adam does, and for unknown options.
        TypeError: for a ``schedule`` or a ``clip`` of another type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.

    Differs from torch:
        - torch's fused kernel for GPUs takes the betas in float32, where 1 - 0.999 is 1.3e-5 off; here 1 - beta is
          float64, as in torch's other versions, and the bias corrections are taken without cancellation (not in
          PyTorch's CPU operator).
        - On a CPU ``max_exp_avg_sq`` takes no NaN, as in torch with fused=True; averages and parameters do.

    Source:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015); AMSGrad: Reddi et al., "On the Convergence
        of Adam and Beyond" (2018); as :class:`torch.optim.Adam` has them.

    Example:
        >>> import torch, fusedlr
        >>> from fusedlr import schedules
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fusedlr.Adam(model.parameters(), lr=1e-3, schedule=schedules.Cosine(100), clip=1.0)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.last_lr
        [0.001]
    """

    _namesake = torch.optim.Adam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
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
        return _RULES[bool(group["decoupled_weight_decay"]), bool(group["amsgrad"])]


class AdamW(FusedOptimizer):
    r"""AdamW: Adam with decoupled weight decay, with schedule, clipping and update in one fused step.

    .. math::
        p &\leftarrow p\,(1 - \eta_t \lambda), \qquad
        m \leftarrow \beta_1 m + (1-\beta_1)\, c\,g, \qquad
        v \leftarrow \beta_2 v + (1-\beta_2)\, (c\,g)^2 \\
        p &\leftarrow p - \frac{\eta_t}{1-\beta_1^t} \cdot
        \frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}

    where :math:`c` is the clip factor, :math:`\eta_t` the scheduled learning rate and :math:`t` in powers the count
    of the tensor's own steps, from 1.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        decay = 1 - lr*weight_decay
        one_minus_beta1 = 1 - beta1
        one_minus_beta2 = 1 - beta2
        step_size = lr / (1 - beta1**step)
        bias_correction2_sqrt = sqrt(1 - beta2**step)
        # each element, in float32
        g = -c*g if maximize else c*g
        p = decay*p
        exp_avg = exp_avg + one_minus_beta1*(g - exp_avg)
        exp_avg_sq = beta2*exp_avg_sq + one_minus_beta2*g*g
        largest = exp_avg_sq
        if amsgrad:
            largest = max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)
        p = p - step_size * exp_avg / (sqrt(largest)/bias_correction2_sqrt + eps)

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        betas: decay rates of the two moments, each in [0, 1); two floats or two one-element tensors.
        eps: added to the denominator; at least 0.
        weight_decay: decoupled weight decay :math:`\lambda`; at least 0.
        amsgrad: divide by the root of the largest :math:`v` so far.
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
        ValueError: for values outside their ranges, as torch.optim.AdamW does, and for unknown options.
        TypeError: for a ``schedule`` or a ``clip`` of another type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.

    Differs from torch:
        - torch's fused kernel for GPUs takes the betas in float32, where 1 - 0.999 is 1.3e-5 off; here 1 - beta is
          float64, as in torch's other versions, and the bias corrections are taken without cancellation (not in
          PyTorch's CPU operator).
        - On a CPU ``max_exp_avg_sq`` takes no NaN, as in torch with fused=True; averages and parameters do.

    Source:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), as :class:`torch.optim.AdamW` has it.

    Example:
        >>> import torch, fusedlr
        >>> from fusedlr import schedules
        >>> model = torch.nn.Linear(4, 2)
        >>> warmup_cosine = schedules.Warmup(10).then(schedules.Cosine(90, min_lr=3e-5))
        >>> optimizer = fusedlr.AdamW(model.parameters(), lr=3e-4, schedule=warmup_cosine, clip=1.0)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    _namesake = torch.optim.AdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
            amsgrad=amsgrad,
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

    def _rule(self, group: dict[str, Any]) -> Rule:
        # torch's AdamW is its Adam, whose groups may have the flag set otherwise.
        return _RULES[bool(group.get("decoupled_weight_decay", True)), bool(group["amsgrad"])]

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group["decoupled_weight_decay"] = True  # whoever wrote the checkpoint, as in torch
        super().__setstate__(state)
