"""Gradients that are a multiple of what is meant: by what a step divides them, folded into its clip factor.

Two things multiply gradients: gradient accumulation, whose ``.grad`` is a sum over micro-batches, and the loss scale of
``torch.amp.GradScaler``. Both go to ``decide`` as numbers that may lie on the device; neither costs a pass.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

__all__ = ["UNSCALED", "GradScale", "fold_grad_scale", "grad_divisor", "scale_of"]


class GradScale(NamedTuple):
    """What the gradients of one step are divided by, and whether the step is left out; floats, or 0-dim tensors.

    Args:
        divisor: the optimizer's ``grad_divisor``.
        scale: the loss scale that ``GradScaler`` left to the step, 1 where there is none.
        found_inf: not 0 where ``GradScaler`` found an inf or NaN.
    """

    divisor: Any
    scale: Any
    found_inf: Any

    def on_host(self) -> tuple[float, bool]:
        """(what the gradients are multiplied by, whether the step is left out); waits for tensors of a device."""
        product = float(self.divisor) * float(self.scale)
        # A loss scale that was halved too often is 0; a tensor divides by it too.
        return 1.0 / product if product else math.inf, float(self.found_inf) != 0.0

    def on_device(self, device: torch.device) -> tuple[Any, Tensor | None]:
        """The same without a wait: what is a tensor stays one; None where no step is left out."""
        # A number of the host stays there: to send it would be to wait.
        divisor, scale, found_inf = (x.detach().to(device).double() if isinstance(x, Tensor) else x for x in self)
        return 1.0 / (divisor * scale), found_inf != 0.0 if isinstance(found_inf, Tensor) else None


_ONE = 1.0
UNSCALED = GradScale(_ONE, 1.0, 0.0)


def scale_of(optimizer: FusedOptimizer) -> GradScale:
    """The scale of the next step, from ``grad_divisor`` and from what ``GradScaler`` set on the optimizer."""
    # GradScaler multiplies by the attribute that is there: a default of the class would be in its way.
    own, divisor = optimizer.__dict__, optimizer._grad_divisor
    if divisor is _ONE and "found_inf" not in own and "grad_scale" not in own:
        return UNSCALED
    scale, found_inf = own.get("grad_scale"), own.get("found_inf")
    if optimizer.clip is not None and optimizer.clip.scope == "unit":
        raise ValueError(
            f"clip={optimizer.clip!r} compares the norms of weights with those of undivided gradients: it goes with "
            "neither grad_divisor nor fold_grad_scale; divide the loss, or leave unscaling to the scaler"
        )
    if found_inf is not None and not optimizer._may_skip:
        # From now on the clock of the device may be behind the host's; and all gradients must be of one executor.
        optimizer._may_skip = True
        optimizer._plan = None
    return GradScale(divisor, 1.0 if scale is None else scale, 0.0 if found_inf is None else found_inf)


def _get_divisor(optimizer: FusedOptimizer) -> Any:
    return optimizer._grad_divisor


def _set_divisor(optimizer: FusedOptimizer, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                "grad_divisor must be a number > 0 or a floating-point tensor of one element, "
                f"but got a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
            )
        if value.device.type == "cpu":
            _check_divisor(value.item())
        optimizer._grad_divisor = value
        return
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"grad_divisor must be a number > 0 or a tensor of one element, but got {value!r}")
    _check_divisor(value)
    optimizer._grad_divisor = UNSCALED.divisor if value == 1 else float(value)


def _check_divisor(value: Any) -> None:
    if not 0.0 < float(value) < math.inf:
        raise ValueError(f"grad_divisor must be > 0 and finite, but got {value!r}; pass the number of micro-batches")


def _get_fold(optimizer: FusedOptimizer) -> bool:
    return bool(optimizer._step_supports_amp_scaling)


def _set_fold(optimizer: FusedOptimizer, value: bool) -> None:
    optimizer._step_supports_amp_scaling = bool(value)


grad_divisor = property(
    _get_divisor,
    _set_divisor,
    doc="""What the gradients are divided by: k where ``.grad`` is the sum over k micro-batches; 1 at first.

    The norm, the clip and the update are those of the mean, by one multiplication that is part of the clip factor. A
    number, or a floating-point tensor of one element, which each step reads anew (a replayed graph too). It is no part
    of a state_dict.
    """,
)

fold_grad_scale = property(
    _get_fold,
    _set_fold,
    doc="""Whether ``torch.amp.GradScaler`` leaves unscaling and skipping to the step; False at first.

    The scaler then sets ``grad_scale`` and ``found_inf``, tensors on the device. The step folds the one into its clip
    factor, and changes nothing where the other is not 0: nobody waits for the device. This is torch's
    ``_step_supports_amp_scaling``, with which Lightning refuses ``gradient_clip_val`` and Accelerate does not see
    skipped steps.
    """,
)
