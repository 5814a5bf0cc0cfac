"""Schedules over a given number of steps: ramps, warm-ups and constants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from . import checks
from .base import Schedule, store
from .program import Kind, Row

__all__ = ["Constant", "Cosine", "Linear", "Polynomial", "Warmup"]

_SHAPES = {"linear": Kind.LINEAR, "cosine": Kind.COSINE, "log": Kind.LOG_RAMP}


def _ramp(kind: Kind, length: int, a: float, b: float, offset: int = 0, p0: float = 0.0) -> list[Row]:
    """A row from a to b; between equal ends it is constant to the last bit."""
    return [Row(0, math.inf, 0, Kind.CONST, a) if a == b else Row(0, length, offset, kind, a, b, p0)]


@final
@dataclass(frozen=True, repr=False)
class Constant(Schedule):
    """A multiple of the base: ``base_lr * factor``.

    torch's ``ConstantLR(factor, total_iters)`` returns to the base after its steps; that is
    ``Constant(factor, steps=total_iters).then(Constant())``.

    Args:
        factor: a finite number >= 0.
        steps: where it ends, in steps, at least 1, so that another schedule can follow; None for no end.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        ``optax.constant_schedule``.

    Example:
        >>> Constant(0.5)(1_000, 0.25)
        0.125
    """

    factor: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        store(
            self,
            factor=checks.number("factor", self.factor),
            steps=None if self.steps is None else checks.steps("steps", self.steps),
        )

    @property
    def length(self) -> int | None:
        """``steps``."""
        return self.steps

    def _rows(self, base_lr: float) -> list[Row]:
        return [Row(0, math.inf, 0, Kind.CONST, base_lr * self.factor)]


@final
@dataclass(frozen=True, repr=False)
class Linear(Schedule):
    """A straight line between two multiples of the base: ``base_lr * (start_factor*(1 - p) + end_factor*p)``.

    ``p = min(t/total_steps, 1)``. torch's ``LinearLR`` is the same but forbids ``start_factor = 0``; HF's linear
    schedule is ``Warmup(w, offset=0).then(Linear(n - w, 1.0, 0.0))``.

    Args:
        total_steps: steps from the start to the end, at least 1.
        start_factor: the multiple at t = 0, a finite number >= 0.
        end_factor: the multiple from t = total_steps on, a finite number >= 0.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        ``torch.optim.lr_scheduler.LinearLR``.

    Example:
        >>> [Linear(4, 1.0, 0.0)(t, 1.0) for t in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    total_steps: int
    start_factor: float
    end_factor: float

    def __post_init__(self) -> None:
        store(
            self,
            total_steps=checks.steps("total_steps", self.total_steps),
            start_factor=checks.number("start_factor", self.start_factor),
            end_factor=checks.number("end_factor", self.end_factor),
        )

    @property
    def length(self) -> int:
        """``total_steps``."""
        return self.total_steps

    def _rows(self, base_lr: float) -> list[Row]:
        return _ramp(Kind.LINEAR, self.total_steps, base_lr * self.start_factor, base_lr * self.end_factor)


@final
@dataclass(frozen=True, repr=False)
class Polynomial(Schedule):
    """Down to a minimum as a power of what remains: ``min_lr + (base_lr - min_lr) * (1 - p)**power``.

    ``p = min(t/total_steps, 1)``. torch's ``PolynomialLR`` has no minimum; Keras' and HF's do. With ``power = 0`` the
    value is the base throughout, since ``0**0`` is 1; torch agrees.

    Args:
        total_steps: steps from the base to the minimum, at least 1.
        power: the exponent, >= 0; 1 is a straight line.
        min_lr: the value from t = total_steps on, in the unit of the base, >= 0.

    Raises:
        TypeError, ValueError: an argument outside its range; on evaluation, a ``min_lr`` above the base.

    Source:
        ``torch.optim.lr_scheduler.PolynomialLR``, ``keras.optimizers.schedules.PolynomialDecay``.

    Example:
        >>> [round(Polynomial(4, power=2)(t, 16.0), 12) for t in range(6)]
        [16.0, 9.0, 4.0, 1.0, 0.0, 0.0]
    """

    total_steps: int
    power: float = 1.0
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        store(
            self,
            total_steps=checks.steps("total_steps", self.total_steps),
            power=checks.number("power", self.power),
            min_lr=checks.number("min_lr", self.min_lr),
        )

    @property
    def length(self) -> int:
        """``total_steps``."""
        return self.total_steps

    def _rows(self, base_lr: float) -> list[Row]:
        checks.minimum(self, self.min_lr, base_lr)
        end = base_lr if self.power == 0 else self.min_lr
        return _ramp(Kind.POLY, self.total_steps, base_lr, end, p0=self.power)


@final
@dataclass(frozen=True, repr=False)
class Cosine(Schedule):
    """Down to a minimum on half a cosine wave: ``min_lr + (base_lr - min_lr) * (1 + cos(pi*p))/2``.

    ``p = min(t/total_steps, 1)``: the minimum is held after the end, as in optax and Keras. torch's
    ``CosineAnnealingLR`` and HF's cosine schedule rise again; ``periodic=True`` does so, with ``p = t/total_steps``.
    Keras' and optax's ``alpha`` is ``min_lr / base_lr``.

    Args:
        total_steps: steps from the base to the minimum, at least 1.
        min_lr: the value at t = total_steps, in the unit of the base, >= 0.
        periodic: go on for ever, down and up again, instead of holding the minimum.

    Raises:
        TypeError, ValueError: an argument outside its range; on evaluation, a ``min_lr`` above the base.

    Source:
        Loshchilov and Hutter 2017, SGDR (arXiv:1608.03983), equation 5 without restarts.

    Example:
        >>> [round(Cosine(4)(t, 1.0), 4) for t in range(6)]
        [1.0, 0.8536, 0.5, 0.1464, 0.0, 0.0]
    """

    total_steps: int
    min_lr: float = 0.0
    periodic: bool = False

    def __post_init__(self) -> None:
        store(
            self,
            total_steps=checks.steps("total_steps", self.total_steps),
            min_lr=checks.number("min_lr", self.min_lr),
            periodic=checks.flag("periodic", self.periodic),
        )

    @property
    def length(self) -> int | None:
        """``total_steps``, or None where it is periodic."""
        return None if self.periodic else self.total_steps

    def _rows(self, base_lr: float) -> list[Row]:
        checks.minimum(self, self.min_lr, base_lr)
        kind = Kind.COSINE_PERIODIC if self.periodic else Kind.COSINE
        return _ramp(kind, self.total_steps, base_lr, self.min_lr)


@final
@dataclass(frozen=True, repr=False)
class Warmup(Schedule):
    """Rise to the base: ``base_lr * (start_factor + (1 - start_factor)*h(p))``, ``p = min((t + offset)/steps, 1)``.

    ``h(p)`` is p for "linear", ``(1 - cos(pi*p))/2`` for "cosine" and ``log(1 + p*steps)/log(1 + steps)`` for "log".

    The first step differs between libraries. ``offset=1`` gives ``base_lr/steps`` at t = 0, as torchtitan and llm.c
    do, and uses no step with lr 0; ``offset=0`` gives ``base_lr*start_factor``, as HF, fairseq and torch's ``LinearLR``
    do. nanoGPT's is ``Warmup(steps + 1)``. DeepSpeed's default warm-up over W steps,
    ``log(t + 1)/log(W)``, is ``Warmup(W - 1, shape="log", offset=0)``.

    Args:
        steps: steps of the warm-up, at least 1; from step ``steps`` on the value is the base.
        start_factor: the multiple of the base at p = 0, a finite number >= 0.
        shape: "linear", "cosine" or "log".
        offset: 0 or 1, added to t.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        Goyal et al. 2017 (arXiv:1706.02677); "log": DeepSpeed, ``WarmupLR``.

    Example:
        >>> [Warmup(4)(t, 1.0) for t in range(6)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
        >>> [Warmup(4, offset=0)(t, 1.0) for t in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    steps: int
    start_factor: float = 0.0
    shape: str = "linear"
    offset: int = 1

    def __post_init__(self) -> None:
        store(
            self,
            steps=checks.steps("steps", self.steps),
            start_factor=checks.number("start_factor", self.start_factor),
            shape=checks.choice("shape", self.shape, tuple(_SHAPES)),
            offset=checks.choice("offset", checks.whole("offset", self.offset), (0, 1)),
        )

    @property
    def length(self) -> int:
        """``steps``."""
        return self.steps

    def _rows(self, base_lr: float) -> list[Row]:
        return _ramp(_SHAPES[self.shape], self.steps, base_lr * self.start_factor, base_lr, self.offset)
