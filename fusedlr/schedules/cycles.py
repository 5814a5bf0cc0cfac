"""Schedules that rise and fall: warm restarts, one cycle, and many; the last two can cycle the momentum along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from . import checks
from .base import Schedule, store
from .program import Kind, Row, value

__all__ = ["CosineRestarts", "Cyclic", "MomentumCycle", "OneCycle"]

# No clock goes further.
_LAST = 2**53
_ANNEALS = {"cos": Kind.COSINE, "linear": Kind.LINEAR}
_MODES = ("triangular", "triangular2", "exp_range")


@final
@dataclass(frozen=True, repr=False)
class CosineRestarts(Schedule):
    """Half cosine waves one after the other: ``min_lr + (base_lr - min_lr) * decay**i * (1 + cos(pi*r/T))/2``.

    Wave i has ``T = first_cycle * mult**i`` steps, r counts the steps since it began. At every restart, a step that is
    computed in integers, the value is back at ``min_lr + (base_lr - min_lr) * decay**i``. torch's
    ``CosineAnnealingWarmRestarts`` has no decay; timm calls ``mult`` and ``decay`` ``cycle_mul`` and ``cycle_decay``.

    Args:
        first_cycle: steps of the first wave, at least 1.
        mult: how many times longer than its predecessor a wave is, an integer >= 1.
        decay: the height of a wave in terms of its predecessor's, > 0 and <= 1.
        min_lr: where each wave ends, in the unit of the base, >= 0.

    Raises:
        TypeError, ValueError: an argument outside its range; on evaluation, a ``min_lr`` above the base.

    Source:
        Loshchilov and Hutter 2017, SGDR (arXiv:1608.03983), equation 5.

    Example:
        >>> [round(CosineRestarts(2, mult=2, decay=0.5)(t, 1.0), 4) for t in range(8)]
        [1.0, 0.5, 0.5, 0.4268, 0.25, 0.0732, 0.25, 0.2405]
    """

    first_cycle: int
    mult: int = 1
    decay: float = 1.0
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        store(
            self,
            first_cycle=checks.steps("first_cycle", self.first_cycle),
            mult=checks.whole("mult", self.mult, low=1),
            decay=checks.number("decay", self.decay, above=0.0, high=1.0),
            min_lr=checks.number("min_lr", self.min_lr),
        )

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    def _rows(self, base_lr: float) -> list[Row]:
        checks.minimum(self, self.min_lr, base_lr)
        low = self.min_lr
        if low == base_lr:
            return [Row(0, math.inf, 0, Kind.CONST, base_lr)]
        if self.mult == 1:
            return [Row(0, self.first_cycle, 0, Kind.RESTARTS, base_lr, low, math.log(self.decay))]
        # Growing waves are few: a row each, at most 54 of them.
        rows = []
        start, length, height = 0, self.first_cycle, 1.0
        while start <= _LAST:
            rows.append(Row(start, length, 0, Kind.COSINE, base_lr * height + low * (1.0 - height), low))
            start, length, height = start + length, length * self.mult, height * self.decay
        return rows


@final
@dataclass(frozen=True, repr=False)
class OneCycle(Schedule):
    """Up to ``max_lr`` and down to almost nothing: ``low -> max_lr -> end``, the top at ``pct_start*total_steps - 1``.

    ``low = max_lr/div_factor`` and ``end = low/final_div_factor``, reached at the step ``total_steps - 1`` and held.
    Each phase is half a cosine wave or a straight line; with ``three_phase`` the second leads back to ``low`` at
    ``2*pct_start*total_steps - 2`` and a third to ``end``. The base does not matter. torch's ``OneCycleLR`` is the same
    but rises again at t = total_steps, and divides by zero where ``pct_start*total_steps`` is 1: that is ``max_lr``.

    With ``cycle_momentum`` the momentum, or beta1 where the optimizer has no momentum, runs from ``max_momentum`` to
    ``base_momentum`` and back.

    Args:
        max_lr: the top, in the unit of the base, >= 0.
        total_steps: steps from the first to the last, at least 1.
        pct_start: the fraction of the steps that rise, from 0 to 1.
        anneal: "cos" or "linear".
        div_factor: ``max_lr`` over the first value, > 0.
        final_div_factor: the first value over the last, > 0.
        three_phase: come down as one went up, and then further.
        cycle_momentum: drive the momentum or beta1 too.
        base_momentum: the momentum at ``max_lr``, in [0, 1).
        max_momentum: the momentum at the first and last step, in [0, 1).

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        Smith and Topin 2017, super-convergence (arXiv:1708.07120); ``torch.optim.lr_scheduler.OneCycleLR``.

    Example:
        >>> schedule = OneCycle(1.0, 11, pct_start=0.4, anneal="linear", div_factor=10, final_div_factor=10)
        >>> [round(schedule(t, 0.1), 3) for t in (0, 3, 4, 7, 10, 11)]
        [0.1, 0.894, 0.91, 0.46, 0.01, 0.01]
    """

    max_lr: float
    total_steps: int
    pct_start: float = 0.3
    anneal: str = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False
    cycle_momentum: bool = False
    base_momentum: float = 0.85
    max_momentum: float = 0.95

    def __post_init__(self) -> None:
        store(
            self,
            max_lr=checks.number("max_lr", self.max_lr),
            total_steps=checks.steps("total_steps", self.total_steps),
            pct_start=checks.number("pct_start", self.pct_start, high=1.0),
            anneal=checks.choice("anneal", self.anneal, tuple(_ANNEALS)),
            div_factor=checks.number("div_factor", self.div_factor, above=0.0),
            final_div_factor=checks.number("final_div_factor", self.final_div_factor, above=0.0),
            three_phase=checks.flag("three_phase", self.three_phase),
            cycle_momentum=checks.flag("cycle_momentum", self.cycle_momentum),
            base_momentum=checks.number("base_momentum", self.base_momentum, below=1.0),
            max_momentum=checks.number("max_momentum", self.max_momentum, below=1.0),
        )
        if not math.isfinite(self.max_lr / self.div_factor / self.final_div_factor):
            raise ValueError(
                "div_factor and final_div_factor must leave max_lr/div_factor/final_div_factor finite, but got "
                f"{self.div_factor!r} and {self.final_div_factor!r} for max_lr={self.max_lr!r}"
            )

    @property
    def length(self) -> int:
        """``total_steps``."""
        return self.total_steps

    def _rows(self, base_lr: float) -> list[Row]:
        low = self.max_lr / self.div_factor
        return self._phases(low, self.max_lr, low / self.final_div_factor)

    def momentum_rows(self) -> list[Row]:
        """The program of the momentum."""
        return self._phases(self.max_momentum, self.base_momentum, self.max_momentum)

    def momentum_schedule(self) -> Schedule | None:
        """The curve of the momentum, where ``cycle_momentum`` is True."""
        return MomentumCycle(self) if self.cycle_momentum else None

    def _phases(self, low: float, top: float, end: float) -> list[Row]:
        rise = self.pct_start * self.total_steps
        last = self.total_steps - 1
        if self.three_phase:
            phases: Sequence[tuple[float, float, float]] = (
                (rise - 1, low, top),
                (2 * rise - 2, top, low),
                (last, low, end),
            )
        else:
            phases = (rise - 1, low, top), (last, top, end)
        rows: list[Row] = []
        first, begin = 0, 0.0
        for finish, a, b in phases:
            stop = min(math.floor(finish), last)
            if stop >= first:
                # A phase ends where it should to the last bit if its beginning is rounded to the digits of its end.
                begun = (begin + finish) - finish
                moves = a != b and begun < finish
                row = Row(first, finish - begun, first - begun, _ANNEALS[self.anneal], a, b)
                rows.append(row if moves else Row(first, math.inf, 0, Kind.CONST, b))
                first = stop + 1
            begin = finish
        held = Row(last, math.inf, 0, Kind.CONST, value(rows, last))
        return [row for row in rows if row.start < last] + [held]


@final
@dataclass(frozen=True, repr=False)
class Cyclic(Schedule):
    """Triangles between two values: ``base_lr + (max_lr - base_lr) * h * s``, h up to 1 and back to 0, for ever.

    h rises over ``step_size_up`` steps and falls over ``step_size_down``. In cycle i = 0, 1, ... the scale s is 1
    ("triangular"), ``2**-i`` ("triangular2") or ``gamma**t`` ("exp_range"). The base of the group does not matter. With
    ``cycle_momentum`` the momentum, or beta1 where the optimizer has no momentum, runs the other way: from
    ``max_momentum`` to ``base_momentum`` while the learning rate rises.

    Args:
        base_lr: the lower value, in the unit of a learning rate, >= 0.
        max_lr: the upper value, >= 0; below ``base_lr`` the triangles hang down.
        step_size_up: steps of a rise, at least 1.
        step_size_down: steps of a fall, at least 1; None for as many.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: the base of "exp_range", > 0 and <= 1.
        cycle_momentum: drive the momentum or beta1 too.
        base_momentum: the momentum at ``max_lr``, in [0, 1).
        max_momentum: the momentum at ``base_lr``, in [0, 1).

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        Smith 2017, cyclical learning rates (arXiv:1506.01186); ``torch.optim.lr_scheduler.CyclicLR``, whose step sizes
        may be fractional and whose default momenta are 0.8 and 0.9.

    Example:
        >>> [Cyclic(1.0, 3.0, 2, mode="triangular2")(t, 0.1) for t in range(9)]
        [1.0, 2.0, 3.0, 2.0, 1.0, 1.5, 2.0, 1.5, 1.0]
    """

    base_lr: float
    max_lr: float
    step_size_up: int
    step_size_down: int | None = None
    mode: str = "triangular"
    gamma: float = 1.0
    cycle_momentum: bool = False
    base_momentum: float = 0.85
    max_momentum: float = 0.95

    def __post_init__(self) -> None:
        down = self.step_size_down
        store(
            self,
            base_lr=checks.number("base_lr", self.base_lr),
            max_lr=checks.number("max_lr", self.max_lr),
            step_size_up=checks.steps("step_size_up", self.step_size_up),
            step_size_down=None if down is None else checks.steps("step_size_down", down),
            mode=checks.choice("mode", self.mode, _MODES),
            gamma=checks.number("gamma", self.gamma, above=0.0, high=1.0),
            cycle_momentum=checks.flag("cycle_momentum", self.cycle_momentum),
            base_momentum=checks.number("base_momentum", self.base_momentum, below=1.0),
            max_momentum=checks.number("max_momentum", self.max_momentum, below=1.0),
        )
        checks.steps("step_size_up + step_size_down", self._cycle)

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    @property
    def _cycle(self) -> int:
        return self.step_size_up + (self.step_size_down or self.step_size_up)

    def _rows(self, base_lr: float) -> list[Row]:
        return self._triangles(self.base_lr, self.max_lr)

    def momentum_rows(self) -> list[Row]:
        """The program of the momentum."""
        return self._triangles(self.max_momentum, self.base_momentum)

    def momentum_schedule(self) -> Schedule | None:
        """The curve of the momentum, where ``cycle_momentum`` is True."""
        return MomentumCycle(self) if self.cycle_momentum else None

    def _triangles(self, a: float, b: float) -> list[Row]:
        if a == b:
            return [Row(0, math.inf, 0, Kind.CONST, a)]
        scales = {
            "triangular": (0.0, 1),
            "triangular2": (-math.log(2.0), self._cycle),
            "exp_range": (math.log(self.gamma), 1),
        }
        c, every = scales[self.mode]
        return [Row(0, self._cycle, 0, Kind.TRIANGLE, a, b, self.step_size_up, c, every)]


@final
@dataclass(frozen=True, repr=False)
class MomentumCycle(Schedule):
    """The momentum of a cycle: what ``momentum_schedule()`` of ``OneCycle`` and ``Cyclic`` makes, whatever the base.

    Args:
        cycle: the schedule of the learning rate.
    """

    cycle: OneCycle | Cyclic

    def __post_init__(self) -> None:
        if not isinstance(self.cycle, (OneCycle, Cyclic)):
            raise TypeError(f"cycle must be a OneCycle or a Cyclic, but got {self.cycle!r}")
        if not self.cycle.cycle_momentum:
            raise ValueError(f"cycle must be made with cycle_momentum=True, but got {self.cycle!r}")

    @property
    def length(self) -> int | None:
        """That of the cycle."""
        return self.cycle.length

    def _rows(self, base_lr: float) -> list[Row]:
        return self.cycle.momentum_rows()

    def __repr__(self) -> str:
        """The call of ``momentum_schedule``."""
        return f"{self.cycle!r}.momentum_schedule()"
