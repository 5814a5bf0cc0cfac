"""Optimizers that torch.optim does not have, written from their papers as torch.optim writes its own."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["LAMB", "LARS", "Lion"]


class Lion(torch.optim.Optimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), algorithm 2, operation by operation."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2) = float(group["lr"]), group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                g, m = (-p.grad if group["maximize"] else p.grad), state["exp_avg"]
                state["step"] += 1
                update = (beta1 * m + (1 - beta1) * g).sign()
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * update)
                m.copy_(beta2 * m + (1 - beta2) * g)


class LAMB(torch.optim.Optimizer):
    """You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (2020), algorithm 2.

    phi is the identity. The three flags that implementations add are written as apex and timm have them.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        trust_clip: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        flags = dict(bias_correction=bias_correction, grad_averaging=grad_averaging, trust_clip=trust_clip)
        numbers = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, {**numbers, **flags})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(x, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(x, memory_format=torch.preserve_format)
                g, m, v = (-x.grad if group["maximize"] else x.grad), state["exp_avg"], state["exp_avg_sq"]
                state["step"] += 1
                t = int(state["step"])
                m.copy_(beta1 * m + ((1 - beta1) if group["grad_averaging"] else 1.0) * g)
                v.copy_(beta2 * v + (1 - beta2) * g**2)
                m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t)) if group["bias_correction"] else (m, v)
                r = m_hat / (v_hat.sqrt() + group["eps"])
                u = r + group["weight_decay"] * x
                trust = _quotient(x.norm(), u.norm())
                x.sub_(group["lr"] * (min(trust, 1.0) if group["trust_clip"] else trust) * u)


class LARS(torch.optim.Optimizer):
    """You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks" (2017), algorithm 1.

    The lr multiplies the velocity instead of what is added to it; dampening, Nesterov's momentum and the first step are
    torch.optim.SGD's.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        weight_decay: float = 0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        dampening: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        more = dict(trust_coefficient=trust_coefficient, eps=eps, dampening=dampening, nesterov=nesterov)
        super().__init__(
            params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, maximize=maximize, **more)
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            momentum, decay = group["momentum"], group["weight_decay"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = -w.grad if group["maximize"] else w.grad
                rate = _quotient(
                    group["trust_coefficient"] * w.norm(), g.norm(), decay * w.norm() + group["eps"]
                )
                d = rate * (g + decay * w)
                if momentum != 0:
                    state = self.state[w]
                    if "momentum_buffer" in state:
                        state["momentum_buffer"].mul_(momentum).add_((1 - group["dampening"]) * d)
                    else:
                        state["momentum_buffer"] = d.clone()
                    v = state["momentum_buffer"]
                    d = d + momentum * v if group["nesterov"] else v
                w.sub_(group["lr"] * d)


def _quotient(above: Any, norm: Any, more: Any = 0.0) -> float:
    """above / (norm + more), and 1 where the norm of the weight or that of the update is 0."""
    return float(above / (norm + more)) if above != 0 and norm != 0 else 1.0
