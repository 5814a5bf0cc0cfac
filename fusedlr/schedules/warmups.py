"""Whole recipes that begin with a warm-up: the inverse square root, Noam's, and warm-up, stable, decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from . import checks
from .base import Schedule, store
from .program import Kind, Row

__all__ = ["WSD", "InverseSqrt", "Noam"]

_DECAYS = {"linear": Kind.LINEAR, "cosine": Kind.COSINE, "1-sqrt": Kind.ROOT, "exponential": Kind.GEO}


@final
@dataclass(frozen=True, repr=False)
class InverseSqrt(Schedule):
    """Warm up, then decay with the square root of time: ``base_lr * min((t + 1)/W, sqrt(W/(t + 1)))``.

    ``W = warmup_steps``; the base is reached at t = W - 1. fairseq's and HF's are the same with t for t + 1, after a
    warm-up from 0: ``Warmup(W, offset=0).then(SqrtDecay(1/W))``.

    Args:
        warmup_steps: W, at least 1.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        fairseq, ``InverseSquareRootSchedule``.

    Example:
        >>> [round(InverseSqrt(4)(t, 1.0), 12) for t in (0, 1, 2, 3, 15, 63)]
        [0.25, 0.5, 0.75, 1.0, 0.5, 0.25]
    """

    warmup_steps: int

    def __post_init__(self) -> None:
        store(self, warmup_steps=checks.steps("warmup_steps", self.warmup_steps))

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    def _rows(self, base_lr: float) -> list[Row]:
        w = self.warmup_steps
        rise = [Row(0, w, 1, Kind.LINEAR, 0.0, base_lr)] if w > 1 else []
        # With u = t - (W - 1), W/(t + 1) is 1/(1 + u/W).
        return [*rise, Row(w - 1, math.inf, 0, Kind.INVPOW, base_lr, p0=1 / w, p1=0.5)]


@final
@dataclass(frozen=True, repr=False)
class Noam(Schedule):
    """The transformer's schedule: ``base_lr * d_model**-0.5 * min(s**-0.5, s * W**-1.5)``, ``s = max(t, 1)``.

    ``W = warmup_steps``. The top, ``base_lr/sqrt(d_model*W)``, is reached at t = W; steps are counted from 1 in the
    paper, so that t = 0 would be undefined, and takes the value of t = 1.

    Args:
        d_model: the width of the model, an integer >= 1.
        warmup_steps: W, at least 1.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        Vaswani et al. 2017 (arXiv:1706.03762), equation 3.

    Example:
        >>> [round(Noam(16, 4)(t, 1.0), 12) for t in (0, 1, 2, 4, 16, 64)]
        [0.03125, 0.03125, 0.0625, 0.125, 0.0625, 0.03125]
    """

    d_model: int
    warmup_steps: int

    def __post_init__(self) -> None:
        store(
            self,
            d_model=checks.whole("d_model", self.d_model, low=1),
            warmup_steps=checks.steps("warmup_steps", self.warmup_steps),
        )

    @property
    def length(self) -> None:
        """None: it has no end of its own."""
        return None

    def _rows(self, base_lr: float) -> list[Row]:
        w = self.warmup_steps
        top = base_lr / (math.sqrt(self.d_model) * math.sqrt(w))
        first = Row(0, math.inf, 0, Kind.CONST, top / w)
        rise = [Row(1, w, 1, Kind.LINEAR, 0.0, top)] if w > 1 else []
        return [first, *rise, Row(w, math.inf, 0, Kind.INVPOW, top, p0=1 / w, p1=0.5)]


@final
@dataclass(frozen=True, repr=False)
class WSD(Schedule):
    """Warm up, stay, decay: ``base_lr*(t + 1)/W``, then ``base_lr``, then from it to ``min_lr`` over the last steps.

    With p the fraction of the decay that is done, the value is ``min_lr + (base_lr - min_lr)*f``, where f is ``1 - p``
    ("linear"), ``(1 + cos(pi*p))/2`` ("cosine") or ``1 - sqrt(p)`` ("1-sqrt"), or it is
    ``base_lr * (min_lr/base_lr)**p`` ("exponential"). The minimum is held. Another start of the warm-up, or none, is
    written with ``then``: ``Constant(steps=n).then(Linear(d, 1.0, 0.0))``.

    Args:
        warmup_steps: W, at least 1.
        stable_steps: steps at the base, at least 1.
        decay_steps: steps from the base to the minimum, at least 1.
        decay: "linear", "cosine", "1-sqrt" or "exponential".
        min_lr: the last value, in the unit of the base, >= 0, and > 0 for "exponential".

    Raises:
        TypeError, ValueError: an argument outside its range; on evaluation, a ``min_lr`` above the base.

    Source:
        Hu et al. 2024, MiniCPM (arXiv:2404.06395); "1-sqrt": Hägele et al. 2024 (arXiv:2405.18392).

    Example:
        >>> [WSD(2, 3, 4)(t, 1.0) for t in range(11)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    warmup_steps: int
    stable_steps: int
    decay_steps: int
    decay: str = "linear"
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        exponential = self.decay == "exponential"
        store(
            self,
            warmup_steps=checks.steps("warmup_steps", self.warmup_steps),
            stable_steps=checks.steps("stable_steps", self.stable_steps),
            decay_steps=checks.steps("decay_steps", self.decay_steps),
            decay=checks.choice("decay", self.decay, tuple(_DECAYS)),
            min_lr=checks.number("min_lr", self.min_lr, above=0.0 if exponential else -math.inf),
        )
        checks.steps("warmup_steps + stable_steps + decay_steps", self.length)

    @property
    def length(self) -> int:
        """``warmup_steps + stable_steps + decay_steps``."""
        return self.warmup_steps + self.stable_steps + self.decay_steps

    def _rows(self, base_lr: float) -> list[Row]:
        checks.minimum(self, self.min_lr, base_lr)
        rows = [
            Row(0, self.warmup_steps, 1, Kind.LINEAR, 0.0, base_lr),
            Row(self.warmup_steps, math.inf, 0, Kind.CONST, base_lr),
        ]
        if self.min_lr == base_lr:
            return rows
        kind, start = _DECAYS[self.decay], self.warmup_steps + self.stable_steps
        if kind == Kind.GEO:
            c = math.log(self.min_lr / base_lr)
            # The last value is a row of its own: the exponential of a logarithm may end a digit above it.
            last = Row(start + self.decay_steps, math.inf, 0, Kind.CONST, self.min_lr)
            return [*rows, Row(start, math.inf, 0, kind, base_lr, self.min_lr, c, self.decay_steps), last]
        return [*rows, Row(start, self.decay_steps, 0, kind, base_lr, self.min_lr)]
