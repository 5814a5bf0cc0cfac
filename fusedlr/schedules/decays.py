"""Schedules that step or decay without an end of their own; ``for_steps`` gives them one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from . import checks
from .base import Schedule, store
from .program import Kind, Row, split_rate

__all__ = [
    "ExponentialDecay",
    "InverseTimeDecay",
    "LinearDecay",
    "MultiStepDecay",
    "PowerDecay",
    "SqrtDecay",
    "StepDecay",
]


def _const(start: int, a: float) -> Row:
    return Row(start, math.inf, 0, Kind.CONST, a)


def _inverse_power(a: float, rate: float, exponent: float) -> list[Row]:
    if rate == 0 or exponent == 0:
        return [_const(0, a)]
    return [Row(0, math.inf, 0, Kind.INVPOW, a, p0=rate, p1=exponent)]


@final
@dataclass(frozen=True, repr=False)
class StepDecay(Schedule):
    """Multiply by ``gamma`` every ``step_size`` steps: ``base_lr * gamma**(t // step_size)``.

    The step ``t = step_size`` is the first decayed one, as in torch's ``StepLR``, optax and Keras (``staircase``).
    With ``gamma = 0`` the value is 0 from there on.

    Args:
        step_size: steps between two drops, an integer >= 1.
        gamma: the factor of each drop, a finite number >= 0; above 1 it grows.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        ``torch.optim.lr_scheduler.StepLR``.

    Example:
        >>> [StepDecay(2, 0.5)(t, 1.0) for t in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        store(self, step_size=checks.steps("step_size", self.step_size), gamma=checks.number("gamma", self.gamma))

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    def _rows(self, base_lr: float) -> list[Row]:
        if self.gamma == 0:  # it has no logarithm
            return [_const(0, base_lr), _const(self.step_size, 0.0)]
        return [Row(0, math.inf, 0, Kind.STEP, base_lr, p0=math.log(self.gamma), p1=self.step_size)]


@final
@dataclass(frozen=True, repr=False)
class MultiStepDecay(Schedule):
    """Multiply by ``gamma`` at every milestone: ``base_lr * gamma**k``, k the number of milestones <= t.

    A milestone named twice counts twice, as in torch's ``MultiStepLR``; one at 0 counts from the first step on. Keras'
    ``PiecewiseConstantDecay`` changes one step later, timm's ``MultiStepLRScheduler`` one step earlier.

    Args:
        milestones: the first steps after a drop, integers >= 0 in ascending order, at least one.
        gamma: the factor of each drop, a finite number >= 0.

    Raises:
        TypeError, ValueError: an argument outside its range, or a growth beyond float64.

    Source:
        ``torch.optim.lr_scheduler.MultiStepLR``.

    Example:
        >>> [MultiStepDecay([2, 3], 0.5)(t, 1.0) for t in range(5)]
        [1.0, 1.0, 0.5, 0.25, 0.25]
    """

    milestones: Sequence[int]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        try:
            given = tuple(self.milestones)
        except TypeError:
            raise TypeError(f"milestones must be a sequence of integers, but got {self.milestones!r}") from None
        milestones = tuple(checks.whole(f"milestones[{i}]", milestone) for i, milestone in enumerate(given))
        if not milestones:
            raise ValueError(f"milestones must hold at least one step, but got {self.milestones!r}")
        if list(milestones) != sorted(milestones):
            raise ValueError(f"milestones must be in ascending order, but got {self.milestones!r}")
        gamma = checks.number("gamma", self.gamma)
        try:
            math.pow(gamma, len(milestones))
        except OverflowError:
            raise ValueError(
                f"gamma must be small enough for gamma**{len(milestones)} to be finite, but got {self.gamma!r}"
            ) from None
        store(self, milestones=milestones, gamma=gamma)

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    def _rows(self, base_lr: float) -> list[Row]:
        drops = {milestone: count for count, milestone in enumerate(self.milestones, start=1)}
        return [_const(start, base_lr * self.gamma**count) for start, count in ({0: 0} | drops).items()]


@final
@dataclass(frozen=True, repr=False)
class ExponentialDecay(Schedule):
    """Lose the fraction ``rate`` every ``every`` steps: ``max(base_lr * (1 - rate)**(t/every), min_lr)``.

    torch's ``ExponentialLR`` takes ``gamma = 1 - rate``, Keras and optax ``decay_rate = 1 - rate``; a rate keeps the
    digits that ``1 - rate`` loses. torch multiplies step by step and drifts, this is the closed form.

    Args:
        rate: the fraction lost, below 1; a negative one grows.
        every: steps in which that fraction is lost, an integer >= 1.
        staircase: decay only at multiples of ``every``: the exponent is ``t // every``.
        min_lr: the lower limit, in the unit of the base, >= 0.

    Raises:
        TypeError, ValueError: an argument outside its range; on evaluation, a ``min_lr`` above the base.

    Source:
        ``keras.optimizers.schedules.ExponentialDecay``, ``optax.exponential_decay``.

    Example:
        >>> [ExponentialDecay(0.5, min_lr=0.2)(t, 1.0) for t in range(4)]
        [1.0, 0.5, 0.25, 0.2]
    """

    rate: float
    every: int = 1
    staircase: bool = False
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        store(
            self,
            rate=checks.number("rate", self.rate, low=-math.inf, below=1.0),
            every=checks.steps("every", self.every),
            staircase=checks.flag("staircase", self.staircase),
            min_lr=checks.number("min_lr", self.min_lr),
        )

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    def _rows(self, base_lr: float) -> list[Row]:
        checks.minimum(self, self.min_lr, base_lr)
        kind = Kind.STEP if self.staircase else Kind.GEO
        return [Row(0, math.inf, 0, kind, base_lr, self.min_lr, math.log1p(-self.rate), self.every)]


@final
@dataclass(frozen=True, repr=False)
class LinearDecay(Schedule):
    """Lose the amount ``rate`` every step: ``max(base_lr - rate*t, min_lr)``.

    The rate is an amount in the unit of the base, not a fraction of it. ``Linear`` is the line over a known number of
    steps. All digits are kept up to the step before the value reaches its limit, for t < 2**31.

    Args:
        rate: what is subtracted every step, >= 0.
        min_lr: the lower limit, in the unit of the base, >= 0.

    Raises:
        TypeError, ValueError: an argument outside its range; on evaluation, a ``min_lr`` above the base.

    Source:
        DeepSpeed's ``LRRangeTest`` is the same line rising.

    Example:
        >>> [LinearDecay(0.25, min_lr=0.5)(t, 1.0) for t in range(4)]
        [1.0, 0.75, 0.5, 0.5]
    """

    rate: float
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        store(self, rate=checks.number("rate", self.rate), min_lr=checks.number("min_lr", self.min_lr))

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    def _rows(self, base_lr: float) -> list[Row]:
        checks.minimum(self, self.min_lr, base_lr)
        return [Row(0, math.inf, 0, Kind.SLOPE, base_lr, self.min_lr, *split_rate(self.rate))]


@final
@dataclass(frozen=True, repr=False)
class SqrtDecay(Schedule):
    """Decay with the square root of time: ``base_lr / sqrt(1 + rate*t)``.

    Args:
        rate: the reciprocal of the number of steps after which the value is base/sqrt(2), >= 0.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        The step size of online convex optimization, Zinkevich 2003 (ICML).

    Example:
        >>> round(SqrtDecay(0.01)(300, 1.0), 12)
        0.5
    """

    rate: float

    def __post_init__(self) -> None:
        store(self, rate=checks.number("rate", self.rate))

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    def _rows(self, base_lr: float) -> list[Row]:
        return _inverse_power(base_lr, self.rate, 0.5)


@final
@dataclass(frozen=True, repr=False)
class InverseTimeDecay(Schedule):
    """Decay with the reciprocal of time: ``base_lr / (1 + rate*t)``.

    Keras spells the rate ``decay_rate / decay_steps``; torch's ``Adagrad`` has it built in as ``lr_decay``.

    Args:
        rate: the reciprocal of the number of steps after which the value is half the base, >= 0.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        ``keras.optimizers.schedules.InverseTimeDecay``.

    Example:
        >>> round(InverseTimeDecay(0.01)(300, 1.0), 12)
        0.25
    """

    rate: float

    def __post_init__(self) -> None:
        store(self, rate=checks.number("rate", self.rate))

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    def _rows(self, base_lr: float) -> list[Row]:
        return _inverse_power(base_lr, self.rate, 1.0)


@final
@dataclass(frozen=True, repr=False)
class PowerDecay(Schedule):
    """Decay with a power of time: ``base_lr / (1 + rate*t)**exponent``.

    Caffe's "inv" policy. ``SqrtDecay`` and ``InverseTimeDecay`` are the exponents 1/2 and 1; exponent 0 is constant.

    Args:
        rate: the reciprocal of the number of steps after which the value is base/2**exponent, >= 0.
        exponent: the power, >= 0.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        Caffe, ``SGDSolver::GetLearningRate``, policy "inv".

    Example:
        >>> round(PowerDecay(0.01, 2.0)(100, 1.0), 12)
        0.25
    """

    rate: float
    exponent: float

    def __post_init__(self) -> None:
        store(self, rate=checks.number("rate", self.rate), exponent=checks.number("exponent", self.exponent))

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    def _rows(self, base_lr: float) -> list[Row]:
        return _inverse_power(base_lr, self.rate, self.exponent)
