"""NAdam: the reference rules and the public class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clipping import Clip
from ..optimizer import FusedOptimizer, ParamsT, ScheduleArg
from ..precision import Precision
from ..rule import Rule, averaged, averaged_square, decayed, expm1_log, minus, minus_ratio, scaled

__all__ = ["NAdam"]


class NAdamHyper(NamedTuple):
    """The row of a tensor: what its elements share in one step. ``mu_product`` is carried to the next."""

    mu_product: Any
    decay: Any
    weight_decay: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    eps: Any
    bias_correction2: Any
    grad_size: Any
    avg_size: Any


def nadam_row(
    step: Any, mu_product: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any, momentum_decay: Any
) -> NAdamHyper:
    """The numbers of one step: the update is grad_size*g + avg_size*exp_avg over the root.

    Between steps torch keeps the product of all mu in float32, and so does the bank: that is 6e-8 of the product, which
    is below a half after the first step. Only where beta1 is within 1e-6 of 1 and momentum_decay in the thousands would
    1 - mu_product show it.
    """
    mu = beta1 * (0.5 - 0.5 * expm1_log(step * momentum_decay, 0.96))
    mu_next = beta1 * (0.5 - 0.5 * expm1_log((step + 1.0) * momentum_decay, 0.96))
    mu_product = mu_product * mu
    return NAdamHyper(
        mu_product=mu_product,
        decay=1.0 - lr * weight_decay,
        weight_decay=weight_decay,
        one_minus_beta1=1.0 - beta1,
        beta2=beta2,
        one_minus_beta2=1.0 - beta2,
        eps=eps,
        bias_correction2=-expm1_log(step, beta2),
        grad_size=lr * (1.0 - mu) / (1.0 - mu_product),
        avg_size=lr * mu_next / (1.0 - mu_product * mu_next),
    )


def nadam(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: NAdamHyper) -> tuple[Tensor, ...]:
    """Adam with Nesterov momentum, and the L2 penalty weight_decay*p added to the gradient."""
    g = decayed(g, p, h.weight_decay)
    exp_avg = averaged(exp_avg, g, h.one_minus_beta1)
    exp_avg_sq = averaged_square(exp_avg_sq, g, h.beta2, h.one_minus_beta2)
    denom = (exp_avg_sq / h.bias_correction2).sqrt_().add_(h.eps)
    update = minus(g * h.grad_size, exp_avg, -h.avg_size)
    return minus_ratio(p, update, denom, 1.0), exp_avg, exp_avg_sq


def nadamw(p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, h: NAdamHyper) -> tuple[Tensor, ...]:
    """Adam with Nesterov momentum and decoupled weight decay: p shrinks by lr*weight_decay before the update."""
    exp_avg = averaged(exp_avg, g, h.one_minus_beta1)
    exp_avg_sq = averaged_square(exp_avg_sq, g, h.beta2, h.one_minus_beta2)
    denom = (exp_avg_sq / h.bias_correction2).sqrt_().add_(h.eps)
    update = minus(g * h.grad_size, exp_avg, -h.avg_size)
    return scaled(p, h.decay).addcdiv_(update, denom, value=-1), exp_avg, exp_avg_sq


_SCALARS = ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq")
# decoupled weight decay -> rule
_RULES = {
    decoupled: Rule(
        update, nadam_row, NAdamHyper, _SCALARS, _MOMENTS, carried=("mu_product",), start=(0.0, 0.0, 1.0)
    )
    for decoupled, update in ((False, nadam), (True, nadamw))
}


class NAdam(FusedOptimizer):
    r"""NAdam: Adam with Nesterov momentum, in one fused step.

    .. math::
        g &\leftarrow c\,g + \lambda p, \qquad
        m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        \mu_t &= \beta_1 \left(1 - \tfrac{1}{2}\, 0.96^{t \psi}\right), \qquad \pi_t = \pi_{t-1}\, \mu_t \\
        p &\leftarrow p - \eta_t \left(\frac{1-\mu_t}{1-\pi_t}\, g + \frac{\mu_{t+1}}{1-\pi_t \mu_{t+1}}\, m\right)
        \Big/ \left(\sqrt{v/(1-\beta_2^t)} + \epsilon\right)

    where :math:`c` is the clip factor, :math:`\eta_t` the scheduled learning rate and :math:`t` in powers the count
    of the tensor's own steps, from 1.

    Algorithm:
        # once a tensor, in float64
        step = step + 1
        decay = 1 - lr*weight_decay
        one_minus_beta1 = 1 - beta1
        one_minus_beta2 = 1 - beta2
        bias_correction2 = 1 - beta2**step
        mu = beta1 * (1 - 0.5 * 0.96**(step*momentum_decay))
        mu_next = beta1 * (1 - 0.5 * 0.96**((step + 1)*momentum_decay))
        mu_product = mu_product * mu
        grad_size = lr * (1 - mu) / (1 - mu_product)
        avg_size = lr * mu_next / (1 - mu_product*mu_next)
        # each element, in float32
        g = -c*g if maximize else c*g
        if decoupled_weight_decay:
            p = decay*p
        elif weight_decay != 0:
            g = g + weight_decay*p
        exp_avg = exp_avg + one_minus_beta1*(g - exp_avg)
        exp_avg_sq = beta2*exp_avg_sq + one_minus_beta2*g*g
        p = p - (grad_size*g + avg_size*exp_avg) / (sqrt(exp_avg_sq/bias_correction2) + eps)

    Args:
        params: parameters (any shape; float32, float64, bfloat16, float16) or param groups.
        lr: learning rate, at least 0, a float or a one-element tensor; the base of ``schedule``.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator; at least 0.
        weight_decay: L2 penalty :math:`\lambda`, added to the gradient; at least 0.
        momentum_decay: decay :math:`\psi` of the momentum; at least 0.
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
        ValueError: for values outside their ranges, as torch.optim.NAdam does, and for unknown options.
        TypeError: for a ``schedule`` or a ``clip`` of another type.
        RuntimeError: for ``backend="triton"`` where Triton cannot run.

    Differs from torch:
        - torch rounds ``mu_product`` to float32 before it uses it, this class afterwards: the old product is a float32
          number, the new one float64 until it is stored.

    Source:
        Dozat, "Incorporating Nesterov Momentum into Adam" (2016), with the decay of Loshchilov and Hutter where it is
        decoupled; as :class:`torch.optim.NAdam` has it.

    Example:
        >>> import torch, fusedlr
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fusedlr.NAdam(model.parameters(), weight_decay=0.01, decoupled_weight_decay=True, clip=1.0)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    _namesake = torch.optim.NAdam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            momentum_decay=momentum_decay,
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
