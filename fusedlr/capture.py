"""CUDA graphs: what a captured step may not do, what a graph needs kept, and how the host follows its replays.

A graph holds addresses, not tensors. The tables of a step are replaced when a later step has other gradients or other
parameters; what a captured step used is therefore kept for as long as the optimizer lives. A table that changes in the
captured step itself is copied from pinned memory that was allocated before, and that nobody writes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .live import Timed

if TYPE_CHECKING:
    from .gather import Plan
    from .optimizer import FusedOptimizer
    from .state import Leaf

__all__ = ["CaptureError", "ReplayedClock", "Spare", "capturing", "check_captured", "check_planned",
           "check_registered", "follow"]  # fmt: skip


class CaptureError(RuntimeError):
    """A step that cannot be captured in a CUDA graph; nothing has changed."""


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, of work on tensors of this device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_planned(leaves: Sequence[Leaf]) -> None:
    """Raise an error where state and tables would have to be made while a graph is captured."""
    if any(capturing(device) for device in dict.fromkeys(leaf.device for leaf in leaves)):
        raise CaptureError(
            "optimizer.step() cannot be captured in a CUDA graph as the first step, or as the first one after other "
            "parameters have gradients, or after a parameter, its state or a param group was replaced: what it would "
            "allocate and fill would be filled again by every replay; take a step like the captured one before the "
            "capture (on a side stream, as torch's notes on CUDA graphs say)"
        )


def check_registered(devices: Iterable[torch.device]) -> None:
    """Raise an error where parameters would be moved while a graph is captured, which makes none of the copies."""
    if any(map(capturing, devices)):
        raise CaptureError(
            "an optimizer cannot be made, and its param groups cannot change, while a CUDA graph is captured: new "
            "parameters are copied into the optimizer's memory, which the graph would only note; make the optimizer, "
            "and take a step with its groups as they are to be, before the capture; nothing has changed"
        )


def check_captured(optimizer: FusedOptimizer, plan: Plan) -> None:
    """Raise an error where the replays of a captured step would not do what the step does."""
    if optimizer._nonfinite == "raise":
        raise CaptureError(
            "a step with nonfinite='raise' looks at the device in the middle, which a CUDA graph cannot; "
            "use nonfinite='skip' and watch skipped_steps"
        )
    if len(plan.executors) > 1:
        raise CaptureError(
            "some parameters lie on the CPU, where the captured step would be taken at once and no replay would ever "
            "take it; give these parameters an optimizer of their own"
        )
    if any(isinstance(s.live, Timed) for scheduled in optimizer._schedules for s in scheduled):
        raise CaptureError(
            "a TimeDecay does not move in a CUDA graph: its time is the host's, which takes no part in a replay; "
            "use InverseTimeDecay, which counts steps"
        )
    missing = [
        leaf.index
        for leaf, is_active in zip(optimizer._leaves, plan.active, strict=True)
        if not is_active and leaf.param.requires_grad
    ]
    if missing:
        raise CaptureError(
            f"{len(missing)} parameters that require gradients have none while a CUDA graph is captured (the first is "
            f"parameter {missing[0]}): no replay would ever step them; give them gradients before the capture "
            "(torch.zeros_like(parameter)), call parameter.requires_grad_(False), or leave them out of the optimizer"
        )


class Spare:
    """Memory from which a table can be copied inside a graph: pinned, allocated before, and used once."""

    __slots__ = ("_memory",)

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def provide(self, like: Tensor, device: torch.device) -> None:
        """Have memory for such a table, outside a capture."""
        if self._memory is None or self._memory.shape != like.shape:
            self._memory = torch.empty_like(like, pin_memory=device.type == "cuda")

    def send(self, table: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(the table on the device in every replay, the memory that must be kept for that)."""
        memory, self._memory = self._memory, None
        if memory is None or memory.shape != table.shape:
            raise CaptureError(
                "a CUDA graph is captured, and a table of the optimizer changed for which no memory was set aside; "
                "take one step like the captured one before each capture"
            )
        memory.copy_(table)
        return torch.empty_like(table, device=device).copy_(memory, non_blocking=True), memory


class ReplayedClock:
    """A device's clock in pinned memory, written by every replay of a captured step and by the eager steps between.

    The host may be many eager steps ahead of what has arrived. So these are counted, here and in the clock's last
    number.
    """

    __slots__ = ("_host", "_launched", "_seen")

    def __init__(self, device: torch.device) -> None:
        # Allocated now: during a capture it could not be.
        self._host = torch.full((3,), -1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._seen = self._host.tolist()
        self._launched = 0

    def record(self, clock: Tensor, captures: bool) -> None:
        """Send the clock here at the end of a step, and of every replay of a step that is captured."""
        if not captures:
            self._launched += 1
            clock[2].fill_(self._launched)
        self._host.copy_(clock, non_blocking=True)

    def news(self) -> int | None:
        """t after all eager steps, if another clock has arrived since this was last asked; never waits.

        Eager steps that have not arrived are taken as not skipped.
        """
        now = self._host.tolist()
        if now == self._seen:
            return None
        self._seen = now
        t, _, counted = now
        return int(t + self._launched - counted)

    def forget(self) -> None:
        """Nothing that has arrived counts any more: the clock was set."""
        self._seen = self._host.tolist()


def follow(optimizer: FusedOptimizer) -> None:
    """Bring the host to where replays of a captured step have brought the device, as far as it has heard.

    Not while another is captured: what is shown in a tensor would be noted, and shown again by every replay.
    """
    if optimizer._replayed is None or not optimizer._captured or capturing(optimizer._device()):
        return
    arrived = optimizer._replayed.news()
    if arrived is None or arrived == optimizer._t:  # or the host has shown that step already
        return
    optimizer._t = max(0, arrived - 1)
    scalars, driven = optimizer._scalars()
    optimizer._t = arrived
    optimizer._show(scalars, driven)
