"""One row a schedule: what it is, and the same curve in exact arithmetic, written without fusedlr's code.

``exact`` computes with mpmath at 50 digits on the same float64 arguments. ``turns`` are the steps where the curve
changes its formula or comes close to zero; they are tested together with their neighbours.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpmath import mp, mpf

from fusedlr import schedules as s

mp.dps = 50

# Formulas lose at most a few units in the last place (2.2e-16) times the size of an exponent (below 745); 1e-12 holds
# with room, and is a million times below the promised 1e-6.
RELATIVE = 1e-12
# Below this float64 has fewer digits (subnormal numbers begin at 2.2e-308, and products pass through them).
SMALLEST = 1e-290


@dataclass(frozen=True)
class Case:
    schedule: s.Schedule
    base: float
    exact: Callable[[int], Any]
    turns: tuple[int, ...] = ()

    @property
    def times(self) -> list[int]:
        around = {turn + d for turn in self.turns for d in (-1, 0, 1)}
        return sorted({0, 1, 2, 3, 17, 1_000, 1_000_003, 10**9 - 1, 10**9, 10**9 + 1} | {t for t in around if t >= 0})


def agrees(got: float, exact: Any) -> bool:
    return bool(abs(mpf(got) - exact) <= RELATIVE * abs(exact) + (SMALLEST if exact else 0))


def _p(t: int, length: int) -> Any:
    return min(mpf(t) / length, mpf(1))


def _between(a: float, b: float, p: Any) -> Any:
    return mpf(a) + (mpf(b) - mpf(a)) * p


def _wave(p: Any) -> Any:
    return (1 + mp.cospi(p)) / 2


def _lr(base: float, fraction: Any) -> Any:
    return mpf(base) * fraction


def _power(base: float, rate: float, exponent: float) -> Callable[[int], Any]:
    return lambda t: mpf(base) / (1 + mpf(rate) * t) ** mpf(exponent)


def _exponential(
    base: float, rate: float, every: int = 1, stairs: bool = False, low: float = 0.0
) -> Callable[[int], Any]:
    return lambda t: max(mpf(base) * (1 - mpf(rate)) ** (mpf(t // every) if stairs else mpf(t) / every), mpf(low))


def _slope(base: float, rate: float, low: float = 0.0) -> Case:
    crossing = int((mpf(base) - mpf(low)) / mpf(rate))
    return Case(
        s.LinearDecay(rate, low), base, lambda t: max(mpf(base) - mpf(rate) * t, mpf(low)), (crossing, crossing + 1)
    )


def _cosine(steps: int, base: float, low: float = 0.0) -> Case:
    return Case(s.Cosine(steps, low), base, lambda t: _between(low, base, _wave(_p(t, steps))), (steps // 2, steps))


def _waves(steps: int, base: float, low: float = 0.0) -> Case:
    turns = (steps, 2 * steps, 3 * steps, 4 * steps, 10**9 // steps * steps)
    return Case(s.Cosine(steps, low, periodic=True), base, lambda t: _between(low, base, _wave(mpf(t) / steps)), turns)


def _poly(steps: int, power: float, base: float, low: float = 0.0) -> Case:
    def exact(t: int) -> Any:
        left = mpf(max(steps - t, 0)) / steps
        return _between(low, base, left ** mpf(power) if power else mpf(1))

    return Case(s.Polynomial(steps, power, low), base, exact, (steps,))


def _linear(steps: int, start: float, end: float, base: float) -> Case:
    def exact(t: int) -> Any:
        return _lr(base, _between(start, end, _p(t, steps)))

    return Case(s.Linear(steps, start, end), base, exact, (steps,))


def _warmup(steps: int, base: float, start: float = 0.0, shape: str = "linear", offset: int = 1) -> Case:
    def exact(t: int) -> Any:
        n = min(t + offset, steps)
        h = {
            "linear": lambda: mpf(n) / steps,
            "cosine": lambda: 1 - _wave(mpf(n) / steps),
            "log": lambda: mp.log(1 + n) / mp.log(1 + steps),
        }[shape]()
        return _lr(base, _between(start, 1.0, h))

    return Case(s.Warmup(steps, start, shape, offset), base, exact, (steps - 1, steps))


def _table(values: list[float], every: int, interpolate: bool, base: float) -> Case:
    def exact(t: int) -> Any:
        position = min(mpf(t) / every, mpf(len(values) - 1))
        i = int(position)
        after = values[min(i + 1, len(values) - 1)]
        return _lr(base, _between(values[i], after, position - i if interpolate else 0))

    turns = tuple(every * i for i in range(1, len(values) + 1))
    return Case(s.Table(values, every, interpolate), base, exact, turns)


def _milestones(steps: list[int], gamma: float, base: float) -> Case:
    return Case(
        s.MultiStepDecay(steps, gamma), base, lambda t: _lr(base, mpf(gamma) ** bisect_right(steps, t)), tuple(steps)
    )


def _stairs(size: int, gamma: float, base: float) -> Case:
    return Case(
        s.StepDecay(size, gamma),
        base,
        lambda t: _lr(base, mpf(gamma) ** (t // size)),
        (size, 2 * size, 10**9 // size * size),
    )


def _joined(first: Case, second: Case) -> Case:
    end = first.schedule.length
    assert end is not None
    return Case(
        first.schedule.then(second.schedule),
        first.base,
        lambda t: first.exact(t) if t < end else second.exact(t - end),
        (*first.turns, end, *(end + turn for turn in second.turns)),
    )


def _for_steps(case: Case, steps: int) -> Case:
    return Case(case.schedule.for_steps(steps), case.base, lambda t: case.exact(min(t, steps)), (*case.turns, steps))


_CONSTANT = Case(s.Constant(0.3), 0.1, lambda t: _lr(0.1, mpf(0.3)))

CASES = [
    _CONSTANT,
    Case(s.Constant(0.0, steps=5), 0.1, lambda t: mpf(0), (5,)),
    _stairs(1, 1 - 1e-9, 0.1),
    _stairs(30, 0.1, 0.1),
    _stairs(7, 1.0, 0.1),
    _stairs(3, 0.0, 0.1),
    _stairs(333_333_333, 1.5, 3e-4),
    _milestones([2, 5, 5, 999_999_999], 0.3, 0.1),
    _milestones([0, 4], 0.0, 0.1),
    Case(s.ExponentialDecay(1e-8), 0.1, _exponential(0.1, 1e-8)),
    Case(s.ExponentialDecay(1e-8, 7, True, 2e-3), 0.1, _exponential(0.1, 1e-8, 7, True, 2e-3), (7, 14, 999_999_994)),
    Case(s.ExponentialDecay(0.04, 1_000, min_lr=1e-4), 0.1, _exponential(0.1, 0.04, 1_000, False, 1e-4), (169_219,)),
    Case(s.ExponentialDecay(0.5), 0.1, _exponential(0.1, 0.5)),
    Case(s.ExponentialDecay(0.0), 0.1, _exponential(0.1, 0.0)),
    Case(s.ExponentialDecay(-1e-9), 0.1, _exponential(0.1, -1e-9)),
    _slope(0.1, 1e-10),
    _slope(0.1, 0.1 / 999_999_937),
    _slope(3e-4, 1e-9, 1e-5),
    _slope(1.0, 2.0**-29),
    Case(s.LinearDecay(0.0), 0.1, lambda t: mpf(0.1)),
    Case(s.SqrtDecay(1e-3), 0.1, _power(0.1, 1e-3, 0.5)),
    Case(s.InverseTimeDecay(0.1), 0.1, _power(0.1, 0.1, 1.0)),
    Case(s.InverseTimeDecay(0.0), 0.1, _power(0.1, 0.0, 1.0)),
    Case(s.PowerDecay(0.3, 0.51), 0.1, _power(0.1, 0.3, 0.51)),
    Case(s.PowerDecay(1e-9, 1e6), 0.1, _power(0.1, 1e-9, 1e6), (1_000,)),
    Case(s.PowerDecay(0.3, 0.0), 0.1, _power(0.1, 0.3, 0.0)),
    _linear(10, 1 / 3, 1.0, 0.1),
    _linear(10**9, 1.0, 0.0, 0.1),
    _linear(1, 0.0, 2.0, 0.1),
    _linear(10, 0.7, 0.7, 0.1),
    _poly(10, 1.0, 0.1),
    _poly(10**9, 2.0, 0.1),
    _poly(1_000_003, 0.5, 0.1, 1e-3),
    _poly(10, 0.0, 0.1, 1e-3),
    _poly(10, 3.0, 0.1, 0.1),
    _cosine(10, 0.1),
    _cosine(10**9, 0.1),
    _cosine(1_000_003, 0.1, 1e-3),
    _cosine(1, 0.1),
    _cosine(10, 0.1, 0.1),
    _cosine(10, 0.0),
    _waves(10, 0.1),
    _waves(7, 0.1, 1e-3),
    _waves(10**9, 0.1),
    _waves(1, 0.1, 1e-3),
    *(_warmup(w, 0.1, start, shape, offset)
      for shape in ("linear", "cosine", "log")
      for w, start, offset in ((1, 0.0, 0), (1, 0.0, 1), (10, 0.1, 1), (10**9, 0.0, 0), (10, 1.0, 1))),
    _table([1.0, 0.3, 0.0, 0.7], 1, False, 0.1),
    _table([1.0, 0.3, 0.0, 0.7], 333_333_333, False, 0.1),
    _table([1.0, 0.3, 0.0, 0.7], 3, True, 0.1),
    _table([0.3], 5, True, 0.1),
    _joined(_warmup(2_000, 0.1), _cosine(98_000, 0.1, 1e-3)),
    _joined(_joined(_warmup(10, 0.1), _for_steps(_stairs(3, 0.5, 0.1), 10)), _table([1.0, 0.5], 5, True, 0.1)),
    _joined(_for_steps(_milestones([5, 20], 0.5, 0.1), 10), _waves(10, 0.1)),
    _joined(_joined(_for_steps(_CONSTANT, 1), _poly(999_999_998, 2.0, 0.1)), _slope(0.1, 1e-3)),
    _for_steps(_joined(_warmup(10, 0.1, offset=0), _cosine(90, 0.1)), 50),
    _for_steps(_cosine(10, 0.1), 20),
]  # fmt: skip
