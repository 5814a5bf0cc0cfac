"""A torch LRScheduler over an optimizer that schedules itself, for frameworks that insist on one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer

__all__ = ["FusedLRScheduler"]


class FusedLRScheduler(LRScheduler):
    """An ``LRScheduler`` whose ``step()`` only counts: the lr is the optimizer's own business.

    ``get_last_lr()`` is torch's: the lr of the last optimizer step, and after the facade's own ``step()`` the lr of
    the next one.

    Example:
        >>> import torch, fusedlr
        >>> from fusedlr import schedules
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fusedlr.SGD([p], lr=0.1, schedule=schedules.Linear(10, 1.0, 0.0))
        >>> scheduler = optimizer.lr_scheduler()
        >>> p.grad = torch.ones(2)
        >>> optimizer.step()
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.09000000000000001]
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        # LRScheduler.__init__ would write group["lr"], which here would be an override of the schedule.
        self.optimizer = optimizer
        self.base_lrs = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self.last_epoch = 0
        self._step_count = 1
        # The clock at the last ``step()``: the beginning counts as one, but not where steps were taken before.
        self._clock = -1 if optimizer.steps_taken else 0

    @property  # type: ignore[override]
    def _last_lr(self) -> list[float]:
        """Where torch's own schedulers keep it, and some frameworks look."""
        return self.get_last_lr()

    @_last_lr.setter
    def _last_lr(self, lrs: Any) -> None:
        """torch's SequentialLR writes it; the optimizer knows."""

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The lr of the next optimizer step."""
        return self._fused().next_lr()

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The lr of the last optimizer step until ``step()`` is called, then the next one's."""
        optimizer = self._fused()
        return optimizer.next_lr() if self._clock == optimizer.steps_taken else optimizer.last_lr

    def step(self, epoch: int | None = None) -> None:
        """Count one step of the scheduler."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._step_count += 1
        self._clock = self._fused().steps_taken

    def state_dict(self) -> dict[str, Any]:
        """The counters; the clock itself is in the optimizer's state_dict."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters."""
        self.__dict__.update(state_dict)

    def _fused(self) -> FusedOptimizer:
        optimizer: FusedOptimizer = self.optimizer  # type: ignore[assignment]
        return optimizer
