"""Schedules that follow something else than the steps: a metric, or the time that training takes.

Their rows are ``LIVE``: each multiplies by a number that changes between steps. ``fusedlr.live`` keeps that number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, final

from . import checks
from .base import Schedule, store
from .program import Kind, Row

__all__ = ["UNITS", "Plateau", "TimeDecay", "live_part"]

UNITS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}


@final
@dataclass(frozen=True, repr=False)
class TimeDecay(Schedule):
    """Inverse decay with the time that training has taken: ``base_lr / (1 + rate * T)``, T in ``unit``.

    The clock starts with the first step, whether or not somebody overrides the lr, and T is known as of each step. T is
    in the state_dict; the time between saving and loading does not count. On the host ``schedule(t, base_lr)`` takes t
    as the elapsed time; inside ``then``, ``product``, ``per_epoch`` and ``for_steps`` t is a step, and T is 0 without
    an optimizer. A step that follows it cannot be captured in a CUDA graph.

    Args:
        rate: the decay a unit of time, a finite number >= 0.
        unit: "seconds", "minutes" or "hours".
        clock: a function without arguments that gives seconds and does not run backwards. It is pickled by name, so an
            optimizer or a schedule whose clock is a lambda cannot be pickled; its state_dict can.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        ``InverseTimeDecay`` on another clock.

    Example:
        >>> TimeDecay(0.5, "hours")(2.0, 1.0)
        0.5
    """

    rate: float
    unit: str = "seconds"
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        unit = checks.choice("unit", self.unit, tuple(UNITS))
        if not callable(self.clock):
            raise TypeError(
                f"clock must be a function that gives seconds, but got {self.clock!r} ({type(self.clock).__name__})"
            )
        store(self, rate=checks.number("rate", self.rate), unit=unit)

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    @property
    def _axis(self) -> str:  # type: ignore[override]
        return self.unit

    def _rows(self, base_lr: float) -> list[Row]:
        return [Row(0, math.inf, 0, Kind.LIVE, base_lr, values=(1.0,))]

    def __call__(self, t: float, base_lr: float) -> float:
        """The value at an elapsed time t >= 0 in ``unit``."""
        return checks.number("base_lr", base_lr) * self.factor(checks.number("t", t))

    def factor(self, elapsed: float) -> float:
        """1/(1 + rate*elapsed), for an elapsed time in ``unit``."""
        return 1.0 / (1.0 + self.rate * elapsed)

    def __repr__(self) -> str:
        """The code that makes it; a clock is written as its module and name."""
        words = [repr(self.rate)] + [f"unit={self.unit!r}"] * (self.unit != "seconds")
        if self.clock is not time.monotonic:
            names = getattr(self.clock, "__module__", None), getattr(self.clock, "__qualname__", None)
            words.append(f"clock={'.'.join(names) if all(names) else repr(self.clock)}")  # type: ignore[arg-type]
        return f"TimeDecay({', '.join(words)})"


@final
@dataclass(frozen=True, repr=False)
class Plateau(Schedule):
    """Multiply by ``factor`` where a metric has stopped improving: torch's ``ReduceLROnPlateau``, on the device.

    ``optimizer.report(metric)`` takes the place of ``scheduler.step(metric)``, and does not wait for a GPU. After more
    than ``patience`` reports in a row without an improvement the value becomes ``max(value * factor, min_lr)``, if that
    lowers it by more than ``eps``; then ``cooldown`` reports pass before bad ones count again. A NaN is never an
    improvement. Each param group and scheduled scalar has its own state, which is in the state_dict. Reports made
    before this schedule has begun, as in ``Warmup(100).then(Plateau())``, or after it has ended, do not count. On the
    host, where nobody reports, the schedule is its base. ``last_lr`` shows the last value that has arrived from a GPU.

    Args:
        mode: "min" where the metric should fall, "max" where it should rise.
        factor: what the value is multiplied by, a number >= 0 and < 1.
        patience: reports without an improvement that are tolerated, an integer >= 0.
        threshold: how much better than the best an improvement is, a finite number >= 0.
        threshold_mode: "rel", ``best * (1 - threshold)`` ("max": ``1 + threshold``), or "abs", ``best - threshold``
            (``best + threshold``).
        cooldown: reports after a reduction during which bad ones do not count, an integer >= 0.
        min_lr: a number >= 0 below which the value is never reduced, or a sequence of them, one a param group.
        eps: a reduction by this much or less is left out, a finite number >= 0.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        ``torch.optim.lr_scheduler.ReduceLROnPlateau``.

    Example:
        >>> import torch, fusedlr
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fusedlr.SGD([p], lr=0.5, schedule=Plateau(factor=0.5, patience=0))
        >>> for loss in (3.0, 2.0, 2.5):
        ...     p.grad = torch.ones(2)
        ...     optimizer.step()
        ...     optimizer.report(loss)
        >>> optimizer.last_lr, optimizer.next_lr()
        ([0.5], [0.25])
    """

    mode: str = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0
    min_lr: float | Sequence[float] = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        min_lr: Any = self.min_lr
        if isinstance(min_lr, Real):
            min_lr = checks.number("min_lr", min_lr)
        elif isinstance(min_lr, Sequence) and not isinstance(min_lr, str):
            min_lr = tuple(checks.number(f"min_lr[{i}]", low) for i, low in enumerate(min_lr))
        else:
            raise TypeError(
                f"min_lr must be a number or a sequence of them, but got {min_lr!r} ({type(min_lr).__name__})"
            )
        store(
            self,
            mode=checks.choice("mode", self.mode, ("min", "max")),
            factor=checks.number("factor", self.factor, below=1.0),
            patience=checks.whole("patience", self.patience),
            threshold=checks.number("threshold", self.threshold),
            threshold_mode=checks.choice("threshold_mode", self.threshold_mode, ("rel", "abs")),
            cooldown=checks.whole("cooldown", self.cooldown),
            min_lr=min_lr,
            eps=checks.number("eps", self.eps),
        )

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    def _rows(self, base_lr: float) -> list[Row]:
        return [Row(0, math.inf, 0, Kind.LIVE, 1.0, values=(base_lr,))]

    def lowest(self, group: int) -> float:
        """The minimum of a param group.

        Raises:
            ValueError: ``min_lr`` has none for it.
        """
        if not isinstance(self.min_lr, tuple):
            return float(self.min_lr)  # type: ignore[arg-type]
        if group >= len(self.min_lr):
            raise ValueError(
                f"min_lr must have a number for every param group, but got {len(self.min_lr)} for param group {group} "
                f"in {self!r}; pass one number, or as many as there are groups"
            )
        return float(self.min_lr[group])


def live_part(schedule: Schedule) -> Plateau | TimeDecay | None:
    """The Plateau or TimeDecay that a schedule is made of, None where there is none.

    Raises:
        ValueError: there are two.
    """
    found = _live_parts(schedule)
    if len(found) > 1:
        raise ValueError(
            f"a scalar can follow one Plateau or TimeDecay, but got {len(found)} in {schedule!r}; keep one of them"
        )
    return found[0] if found else None


def _live_parts(schedule: Schedule) -> list[Plateau | TimeDecay]:
    if isinstance(schedule, (Plateau, TimeDecay)):
        return [schedule]
    arguments = [getattr(schedule, field.name) for field in fields(schedule)]  # type: ignore[arg-type]
    inside = [part for a in arguments for part in (a if isinstance(a, tuple) else (a,)) if isinstance(part, Schedule)]
    return [live for part in inside for live in _live_parts(part)]
