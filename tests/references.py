"""Optimizers that torch.optim does not have, written from their papers as torch.optim writes its own."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Lion"]


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
