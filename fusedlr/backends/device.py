"""The PyTorch backend on an accelerator: the reference rules, tensor by tensor, without waiting for the device.

It is the path where Triton is not installed, and an oracle for the Triton backend on the same device. Factors, rows
and the decision to skip stay on the device as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..gather import in_order
from ..rule import Rule
from ..state import Leaf
from . import Executor, Knobs
from .stored import Step, arrays_of, place_of, stored_update

__all__ = ["DeviceExecutor"]


class DeviceExecutor(Executor):
    """Steps tensors on an accelerator with PyTorch's own kernels."""

    def __init__(self, leaves: list[Leaf], positions: list[int] | None) -> None:
        super().__init__(leaves, positions)
        self._rules: list[Rule] = []
        self._norms: list[Tensor] = []
        self._factors: list[Tensor] | None = None
        self._skip: Tensor | None = None

    def prepare(self, rules: list[Rule]) -> None:
        self._rules = rules

    def layout(self, ordered: Sequence[bool]) -> None:
        """Each gradient is brought into order where it is read."""

    def measure(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        self._norms = [_norm(g, knobs.norm_type) for g in grads]

    def decide(self, knobs: Knobs) -> bool:
        self._factors, self._skip = None, None
        if not knobs.measures:
            return False
        if knobs.nonfinite == "skip" and any(knobs.schedules):
            raise ValueError(
                "nonfinite='skip' with a schedule needs the Triton backend on an accelerator: only there does the "
                "schedule see which steps were skipped without waiting for the device; install triton, or use "
                "nonfinite='propagate'"
            )
        main = self.leaves[0].device
        norms = torch.stack([norm.to(main) for norm in self._norms])
        norm = _norm(norms, knobs.norm_type)
        if knobs.scope is not None:
            assert knobs.clip is not None and knobs.clip.factor is not None
            max_norm, eps, _ = knobs.clip_numbers
            factors = knobs.clip.factor(norm if knobs.scope == "global" else norms, max_norm, eps)
            self._factors = list(factors.expand(len(norms)).unbind())
        if knobs.nonfinite == "raise" and not bool(torch.isfinite(norm)):  # to raise is to wait, as documented
            raise FloatingPointError(
                f"the gradients hold an inf or NaN (their norm is {float(norm)}), and nonfinite='raise'; "
                "nothing was changed"
            )
        if knobs.grad_norm is not None:
            knobs.grad_norm.copy_(norm)
        if knobs.nonfinite == "skip":
            self._skip = ~torch.isfinite(norm)
            taken = torch.stack([~self._skip & knobs.advance, self._skip])
            knobs.clock(main).add_(taken)
        return False

    def apply(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        limit = knobs.clip_numbers[2]
        for i, (leaf, g) in enumerate(zip(self.leaves, grads, strict=True)):
            assert leaf.step is not None
            rule = self._rules[leaf.group]
            p = leaf.flat if leaf.flat is not None else in_order(leaf.param.detach(), leaf)
            step = leaf.step + 1
            values = knobs.scalars[leaf.group].items()
            scalars = {name: v.to(leaf.device) if isinstance(v, Tensor) else v for name, v in values}
            h = rule.row(step.double(), *[x.double() for x in leaf.carried], **scalars)
            factor = 1.0 if self._factors is None else self._factors[i].to(leaf.device)
            assert leaf.bank is not None
            todo = Step(rule, h, limit, knobs.maximize[leaf.group], step)
            arrays = arrays_of(leaf, p)
            new = stored_update(leaf.bank.storage, arrays, in_order(g, leaf), factor, todo, place_of(leaf))
            numbers = (step, *h[: len(leaf.carried)])
            for old, value in zip((leaf.step, *leaf.carried, *arrays.flatten()), (*numbers, *new), strict=True):
                if self._skip is not None:
                    value = torch.where(self._skip.to(leaf.device), old.to(value.dtype), value)
                old.copy_(value)
            if leaf.flat is None:
                leaf.param.copy_(p.as_strided(leaf.shape, leaf.strides))


def _norm(x: Tensor, norm_type: float) -> Tensor:
    """The p-norm in float64; divided by the largest magnitude first, where powers of it could leave the range."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device)
    narrow = x.dtype != torch.float64
    x = x.double().flatten()
    if norm_type == 2.0 and narrow:
        return torch.as_tensor(x.norm(2.0))
    largest = x.abs().max()
    if norm_type == math.inf:
        return largest
    usable = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    return usable * torch.as_tensor((x / usable).norm(norm_type))
