"""The PyTorch backend on an accelerator: the reference rules, tensor by tensor, without waiting for the device.

It is the path where Triton is not installed, and an oracle for the Triton backend on the same device. Factors, rows
and the decision to skip stay on the device as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import capture
from ..clipping.adaptive import unit_factor
from ..gather import in_order
from ..rule import Rule
from ..scaling import UNSCALED
from ..state import Leaf
from . import Executor, Knobs
from .stored import Step, arrays_of, decoded, place_of, stored_update, trust_terms, wide
from .units import joined_norm, unit_grid, unit_norms

__all__ = ["DeviceExecutor"]


class DeviceExecutor(Executor):
    """Steps tensors on an accelerator with PyTorch's own kernels."""

    def __init__(self, leaves: list[Leaf], positions: list[int] | None) -> None:
        super().__init__(leaves, positions)
        self._rules: list[Rule] = []
        self._devices = list(dict.fromkeys(leaf.device for leaf in leaves))
        self._norms: list[Tensor] = []
        self._weights: list[Tensor] = []  # norms of the parameters' units, where those of gradients are of units
        self._factors: list[Any] | None = None
        self._skip: Tensor | None = None

    def prepare(self, rules: list[Rule]) -> None:
        self._rules = rules

    def captures(self) -> bool:
        return any(capture.capturing(device) for device in self._devices)

    def layout(self, ordered: Sequence[bool]) -> None:
        """Each gradient is brought into order where it is read."""

    def measure(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        if knobs.scope != "unit":
            self._norms = [_norm(g, knobs.norm_type) for g in grads]
            return
        self._norms, self._weights = [], []
        for leaf, g in zip(self.leaves, grads, strict=True):
            p = leaf.flat if leaf.flat is not None else in_order(leaf.param.detach(), leaf)
            grid = unit_grid(leaf)
            self._norms.append(unit_norms(in_order(g, leaf), grid))
            self._weights.append(unit_norms(p, grid))

    def decide(self, knobs: Knobs) -> bool:
        self._factors, self._skip = None, None
        main = self.leaves[0].device
        if knobs.may_skip and knobs.scheduled:
            raise ValueError(
                "nonfinite='skip' or fold_grad_scale with a schedule needs the Triton backend on an accelerator: only "
                "there does the schedule see which steps were skipped without waiting for the device; install triton, "
                "or use nonfinite='propagate' and leave fold_grad_scale off"
            )
        if self.captures() and (knobs.scheduled or knobs.max_norm_schedule is not None):
            raise capture.CaptureError(
                "a schedule does not move in a CUDA graph on the PyTorch backend, where the host computes it; install "
                "triton for the Triton backend, or capture a step without a schedule"
            )
        inverse, self._skip = (1.0, None) if knobs.scale is UNSCALED else knobs.scale.on_device(main)
        if knobs.scale is not UNSCALED:
            self._factors = [inverse] * len(self.leaves)
        if knobs.measures:
            self._measured(knobs, inverse)
        clock = knobs.clock(main)
        if self._skip is None:
            clock[0].add_(int(knobs.advance))
        else:
            clock[:2].add_(torch.stack([~self._skip & knobs.advance, self._skip]))
        return False

    def _measured(self, knobs: Knobs, inverse: Any) -> None:
        """What the norms decide."""
        main = self.leaves[0].device
        moved = [norm.to(main) for norm in self._norms]
        if knobs.scope == "unit":
            norm = joined_norm(moved)
            self._factors = [self._of_elements(i, knobs) for i in range(len(self.leaves))]
        else:
            norms = torch.stack(moved)
            norm = _norm(norms, knobs.norm_type) * inverse
        finite, found = torch.isfinite(norm), self._skip
        if knobs.nonfinite == "raise" and not bool(finite if found is None else finite | found):  # to raise is to wait
            raise FloatingPointError(
                f"the gradients hold an inf or NaN (their norm is {float(norm)}), and nonfinite='raise'; "
                "nothing was changed"
            )
        if knobs.scope in ("global", "tensor"):
            assert knobs.clip is not None
            max_norm: Any
            max_norm, eps, _ = knobs.clip_numbers
            if knobs.clip.threshold is not None:
                keep = knobs.advance if found is None else ~found & knobs.advance
                threshold = knobs.clip.threshold(knobs.records.on(main), norm, eps, keep)
                knobs.records.share([main])
                max_norm = torch.clamp(threshold, max=max_norm)
            factors = knobs.clip.factor(norm if knobs.scope == "global" else norms * inverse, max_norm, eps) * inverse
            self._factors = list(factors.expand(len(norms)).unbind())
        if knobs.grad_norm is not None:
            knobs.grad_norm.copy_(norm)
        if knobs.nonfinite == "skip":
            self._skip = ~finite if found is None else ~finite | found

    def _of_elements(self, i: int, knobs: Knobs) -> Tensor:
        """The factor of every element of a leaf, by its unit."""
        leaf = self.leaves[i]
        grid = unit_grid(leaf)
        factors = unit_factor(self._norms[i], self._weights[i], *knobs.records.on(leaf.device).unbind())
        return factors.to(wide(leaf.dtype)).view(1, -1, 1).expand(grid).reshape(-1)

    def apply(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        limit = knobs.clip_numbers[2]
        for i, (leaf, g) in enumerate(zip(self.leaves, grads, strict=True)):
            assert leaf.step is not None
            rule = self._rules[leaf.group]
            p = leaf.flat if leaf.flat is not None else in_order(leaf.param.detach(), leaf)
            step = leaf.step + 1
            values = knobs.scalars[leaf.group].items()
            # float64, as the other backends read them: in bfloat16 1 - lr*weight_decay would be 1.
            scalars = {n: v.to(leaf.device, torch.float64) if isinstance(v, Tensor) else v for n, v in values}
            for s in knobs.driven[leaf.group]:
                held = getattr(s.live, "device_value", None)
                if held is not None:
                    # The value is a multiple of what the device holds, or does not depend on it.
                    none, one = s.at(knobs.t, 0.0), s.at(knobs.t, 1.0)
                    scalars[s.name] = none + (one - none) * held.to(leaf.device, non_blocking=True)
            h = rule.row(step.double(), *[x.double() for x in leaf.carried], **scalars)
            factor = 1.0 if self._factors is None else self._factors[i]
            factor = factor.to(leaf.device) if isinstance(factor, Tensor) else factor
            assert leaf.bank is not None
            storage, arrays, maximize = leaf.bank.storage, arrays_of(leaf, p), knobs.maximize[leaf.group]
            g = in_order(g, leaf)
            if rule.trust is not None:
                w, *state = decoded(storage, arrays)
                terms = trust_terms(rule.trust, w, g, state, h, factor, limit, maximize)
                h = h._replace(trust=rule.trust.ratio(*[_norm(x, 2.0) for x in terms], h))
            todo = Step(rule, h, limit, maximize, step)
            new = stored_update(storage, arrays, g, factor, todo, place_of(leaf))
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
        norm: Tensor = torch.linalg.vector_norm(x)
        return norm
    largest = x.abs().max()
    if norm_type == math.inf:
        return largest
    usable = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    scaled: Tensor = torch.linalg.vector_norm(x / usable, norm_type)
    return usable * scaled
