"""Schedules made of schedules, beside ``then`` and ``for_steps``: products, and clocks that count epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from . import checks
from .base import Schedule, store
from .program import Kind, Row, factors

__all__ = ["PerEpoch", "Product", "per_epoch", "product"]


def product(a: Schedule, b: Schedule) -> Schedule:
    """Two schedules on one clock, multiplied: ``a(t) * b(t) / base_lr``.

    So each is a multiple of the base: a decay on the global clock under a warm-up, as timm's ``warmup_prefix=False``
    does, or what torch's ``ChainedScheduler`` makes of schedulers that multiply. A ``min_lr`` is the minimum of its
    own schedule, not of the product. It ends with the longer of the two; where the base is 0, so is the product.

    Args:
        a: a schedule.
        b: a schedule; more than two are nested.

    Raises:
        TypeError: an argument is no schedule.
        ValueError: both cycle a momentum; on evaluation, a base so small that its reciprocal is not finite.

    Source:
        ``torch.optim.lr_scheduler.ChainedScheduler``.

    Example:
        >>> from fusedlr.schedules import StepDecay, Warmup
        >>> schedule = product(Warmup(4), StepDecay(2, 0.5))
        >>> schedule
        product(Warmup(4), StepDecay(2, gamma=0.5))
        >>> [schedule(t, 8.0) for t in range(6)]
        [2.0, 4.0, 3.0, 4.0, 2.0, 2.0]
    """
    return Product(a, b)


def per_epoch(schedule: Schedule, steps_per_epoch: int) -> Schedule:
    """A schedule whose clock counts epochs: ``schedule(t // steps_per_epoch)``.

    What a torch scheduler gives that is stepped once an epoch. A schedule of n epochs is
    ``n * steps_per_epoch`` steps long.

    Args:
        schedule: a schedule in epochs.
        steps_per_epoch: optimizer steps an epoch, an integer >= 1.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        timm, ``t_in_epochs=True``.

    Example:
        >>> from fusedlr.schedules import StepDecay
        >>> schedule = per_epoch(StepDecay(1, 0.5), 3)
        >>> [schedule(t, 1.0) for t in range(7)]
        [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]
    """
    return PerEpoch(schedule, steps_per_epoch)


@final
@dataclass(frozen=True, repr=False)
class Product(Schedule):
    """Two schedules on one clock, multiplied: what ``product(a, b)`` makes; arguments and errors are those.

    Args:
        a: a schedule.
        b: a schedule.
    """

    a: Schedule
    b: Schedule

    def __post_init__(self) -> None:
        for name, factor in (("a", self.a), ("b", self.b)):
            checks.schedule(name, factor)
        if self.a.momentum_schedule() and self.b.momentum_schedule():
            raise ValueError(f"only one factor of a product can cycle the momentum, but both do: {self!r}")

    @property
    def length(self) -> int | None:
        """That of the longer factor."""
        lengths = [self.a.length, self.b.length]
        return None if None in lengths else max(length for length in lengths if length is not None)

    def _rows(self, base_lr: float) -> list[Row]:
        first, second = self.a._rows(base_lr), self.b._rows(base_lr)
        if base_lr == 0:
            return [Row(0, math.inf, 0, Kind.CONST, 0.0)]
        if math.isinf(1 / base_lr):
            raise ValueError(f"base_lr must be 0 or large enough for 1/base_lr to be finite, but got {base_lr!r}")
        moved = factors(first)
        last = moved + factors(second)
        second = [row._replace(factor=moved + row.factor) for row in second]
        return [*first, *second, Row(0, math.inf, 0, Kind.CONST, 1 / base_lr, factor=last)]

    def momentum_schedule(self) -> Schedule | None:
        """That of the factor that has one."""
        return self.a.momentum_schedule() or self.b.momentum_schedule()

    def __repr__(self) -> str:
        """The call of ``product``."""
        return f"product({self.a!r}, {self.b!r})"


@final
@dataclass(frozen=True, repr=False)
class PerEpoch(Schedule):
    """A schedule whose clock counts epochs: what ``per_epoch(schedule, n)`` makes; arguments and errors are those.

    Args:
        schedule: a schedule in epochs.
        steps_per_epoch: optimizer steps an epoch.
    """

    schedule: Schedule
    steps_per_epoch: int

    def __post_init__(self) -> None:
        checks.schedule("schedule", self.schedule)
        store(self, steps_per_epoch=checks.steps("steps_per_epoch", self.steps_per_epoch))
        if self.length is not None:
            checks.steps("the length in steps", self.length)

    @property
    def length(self) -> int | None:
        """That of the schedule times ``steps_per_epoch``."""
        return None if self.schedule.length is None else self.schedule.length * self.steps_per_epoch

    def _rows(self, base_lr: float) -> list[Row]:
        n = self.steps_per_epoch
        # What lies beyond the last step that there can be, 2**53, would not survive as a float64.
        return [
            row._replace(start=row.start * n, stride=min(row.stride * n, 2**54))
            for row in self.schedule._rows(base_lr)
            if row.start * n <= 2**53
        ]

    def momentum_schedule(self) -> Schedule | None:
        """The momentum cycle of the schedule on the same clock."""
        cycle = self.schedule.momentum_schedule()
        return cycle and PerEpoch(cycle, self.steps_per_epoch)

    def __repr__(self) -> str:
        """The call of ``per_epoch``."""
        return f"per_epoch({self.schedule!r}, {self.steps_per_epoch})"
