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


def _restarts(first: int, mult: int, base: float, decay: float = 1.0, low: float = 0.0) -> Case:
    def exact(t: int) -> Any:
        i, begin, length = 0, 0, first
        if mult == 1:
            i, begin = t // first, t // first * first
        while t >= begin + length:
            i, begin, length = i + 1, begin + length, length * mult
        return mpf(low) + (mpf(base) - mpf(low)) * mpf(decay) ** i * _wave(mpf(t - begin) / length)

    turns, begin, length = [first, 2 * first, 3 * first, 10**9 // first * first], 0, first
    while mult > 1 and begin <= 10**9:
        begin, length = begin + length, length * mult
        turns.append(begin)
    return Case(s.CosineRestarts(first, mult, decay, low), base, exact, tuple(turns))


def _inverse_sqrt(w: int, base: float) -> Case:
    def exact(t: int) -> Any:
        return _lr(base, min(mpf(t + 1) / w, mp.sqrt(mpf(w) / (t + 1))))

    return Case(s.InverseSqrt(w), base, exact, (w - 1, w))


def _noam(d: int, w: int, base: float) -> Case:
    def exact(t: int) -> Any:
        step = mpf(max(t, 1))
        return _lr(base, mpf(d) ** mpf("-0.5") * min(step ** mpf("-0.5"), step * mpf(w) ** mpf("-1.5")))

    return Case(s.Noam(d, w), base, exact, (w,))


def _phases(total: int, pct: float, anneal: str, three: bool, low: Any, top: Any, end: Any) -> Callable[[int], Any]:
    """The phases of torch's OneCycleLR, with the last value held."""
    rise = mpf(pct * total)  # rounded to float64 as in torch: a boundary moves past a step or it does not
    ends = [rise - 1, 2 * rise - 2, mpf(total - 1)] if three else [rise - 1, mpf(total - 1)]
    levels = [(low, top), (top, low), (low, end)] if three else [(low, top), (top, end)]

    def exact(t: int) -> Any:
        t = min(t, total - 1)
        begin = mpf(0)
        for finish, (a, b) in zip(ends, levels, strict=True):
            if t <= finish:
                p = (t - begin) / (finish - begin) if finish > begin else mpf(1)
                return _between(a, b, p) if anneal == "linear" else b + (a - b) * _wave(p)
            begin = finish
        raise AssertionError(t)

    return exact


def _one_cycle(top: float, total: int, pct: float = 0.3, anneal: str = "cos", three: bool = False,
               div: float = 25.0, final: float = 1e4) -> Case:  # fmt: skip
    low = mpf(top) / mpf(div)
    exact = _phases(total, pct, anneal, three, low, mpf(top), low / mpf(final))
    turns = (int(pct * total) - 1, int(pct * total), int(2 * pct * total) - 2, total - 2, total)
    return Case(s.OneCycle(top, total, pct, anneal, div, final, three), 0.1, exact, turns)


def _momentum_of_one_cycle(total: int, pct: float, three: bool) -> Case:
    cycle = s.OneCycle(0.1, total, pct, three_phase=three, cycle_momentum=True, base_momentum=0.6, max_momentum=0.9)
    exact = _phases(total, pct, "cos", three, mpf(0.9), mpf(0.6), mpf(0.9))
    return Case(cycle.momentum_schedule(), 0.5, exact, (int(pct * total), total - 1))


def _triangles(low: float, high: float, up: int, down: int, scale: Callable[[int, int], Any]) -> Callable[[int], Any]:
    def exact(t: int) -> Any:
        i, r = divmod(t, up + down)
        h = mpf(r) / up if r <= up else mpf(up + down - r) / down
        return mpf(low) + (mpf(high) - mpf(low)) * h * scale(t, i)

    return exact


def _cyclic(low: float, high: float, up: int, down: int | None = None, mode: str = "triangular",
            gamma: float = 1.0) -> Case:  # fmt: skip
    scales = {
        "triangular": lambda t, i: mpf(1),
        "triangular2": lambda t, i: mpf(2) ** -i,
        "exp_range": lambda t, i: mpf(gamma) ** t,
    }
    cycle = up + (down or up)
    turns = (up, cycle, cycle + up, 2 * cycle, 10**9 // cycle * cycle)
    exact = _triangles(low, high, up, down or up, scales[mode])
    return Case(s.Cyclic(low, high, up, down, mode, gamma), 0.1, exact, turns)


def _momentum_of_cyclic(up: int, mode: str) -> Case:
    cycle = s.Cyclic(0.1, 0.3, up, mode=mode, cycle_momentum=True, base_momentum=0.5, max_momentum=0.9)
    exact = _triangles(0.9, 0.5, up, up, lambda t, i: mpf(2) ** (-i if mode == "triangular2" else 0))
    return Case(cycle.momentum_schedule(), 0.5, exact, (up, 2 * up))


def _wsd(w: int, stable: int, d: int, decay: str, base: float, low: float) -> Case:
    def exact(t: int) -> Any:
        p = _p(max(t - w - stable, 0), d)
        f = {
            "linear": lambda: 1 - p,
            "cosine": lambda: _wave(p),
            "1-sqrt": lambda: 1 - mp.sqrt(p),
            "exponential": lambda: None,
        }[decay]()
        decayed = mpf(base) * (mpf(low) / mpf(base)) ** p if f is None else _between(low, base, f)
        return _lr(base, mpf(t + 1) / w) if t < w else decayed

    return Case(s.WSD(w, stable, d, decay, low), base, exact, (w - 1, w, w + stable, w + stable + d))


def _product(a: Case, b: Case) -> Case:
    base = a.base

    def exact(t: int) -> Any:
        return a.exact(t) * b.exact(t) / mpf(base) if base else mpf(0)

    return Case(s.product(a.schedule, b.schedule), base, exact, (*a.turns, *b.turns))


def _per_epoch(case: Case, n: int) -> Case:
    turns = tuple(n * turn + d for turn in case.turns for d in (0, n - 1) if n * (turn + 1) < 2**53)
    return Case(s.per_epoch(case.schedule, n), case.base, lambda t: case.exact(t // n), turns)


_ROOTS = Case(s.SqrtDecay(0.3), 0.1, _power(0.1, 0.3, 0.5))
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
    *(_restarts(first, mult, 0.1, decay, low)
      for first, mult in ((1, 1), (10, 1), (1_000_003, 1), (10**9, 1), (1, 2), (1, 3), (7, 2), (123_456, 3))
      for decay, low in ((1.0, 0.0), (0.7, 1e-3), (1 - 1e-9, 0.0))),
    _restarts(10, 2, 0.1, 0.5, 0.1),
    *(_inverse_sqrt(w, 0.1) for w in (1, 2, 4_000, 10**9)),
    *(_noam(512, w, 2.0) for w in (1, 2, 4_000, 10**9)),
    _noam(1, 10, 0.1),
    *(_one_cycle(0.1, total, pct, anneal, three)
      for anneal in ("cos", "linear") for three in (False, True)
      for total, pct in ((101, 0.333), (10, 0.1), (10, 0.0), (10, 0.5), (7, 0.3), (1, 0.3), (10**9, 0.3))),
    _one_cycle(0.1, 10, 1.0),
    _one_cycle(0.1, 10, 0.7, three=True),
    _one_cycle(0.1, 10**9, 0.3, final=1e300),
    _one_cycle(0.1, 10**6, 0.25, div=0.5, final=0.5),
    _one_cycle(0.0, 10),
    *(_momentum_of_one_cycle(total, 0.3, three) for total in (10, 101, 10**9) for three in (False, True)),
    *(_cyclic(0.001, 0.1, up, down, mode, gamma)
      for up, down in ((1, None), (5, 3), (2_000, None), (400_000_000, 500_000_000), (1, 10**9))
      for mode, gamma in (("triangular", 1.0), ("triangular2", 1.0), ("exp_range", 1 - 1e-8), ("exp_range", 0.999))),
    _cyclic(0.0, 0.1, 10**9),
    _cyclic(0.1, 0.0, 3, 4),
    _cyclic(0.1, 0.1, 3, 4),
    *(_momentum_of_cyclic(up, mode) for up in (5, 10**9) for mode in ("triangular", "triangular2")),
    *(_wsd(w, stable, d, decay, 0.1, low)
      for w, stable, d in ((1, 1, 1), (10, 50, 40), (2_000, 10**8, 9 * 10**8), (1, 1, 10**9))
      for decay, low in (("linear", 0.0), ("cosine", 0.0), ("1-sqrt", 0.0), ("1-sqrt", 0.03),
                         ("exponential", 1e-9), ("exponential", 0.1), ("linear", 0.1))),
    _product(_warmup(10, 0.1), _stairs(7, 0.3, 0.1)),
    _product(_cosine(10, 0.0), _linear(5, 1.0, 0.5, 0.0)),
    _product(_product(_warmup(1_000, 0.1), _milestones([500, 10**6], 0.1, 0.1)), _waves(333, 0.1, 1e-3)),
    _joined(_for_steps(_product(_warmup(10, 0.1), _stairs(7, 0.3, 0.1)), 25), _cosine(30, 0.1, 1e-3)),
    _joined(_joined(_warmup(4, 0.1), _for_steps(_product(_cosine(10, 0.1), _ROOTS), 8)),
            _product(_restarts(7, 2, 0.1), _product(_stairs(10, 0.5, 0.1), _linear(50, 1.0, 0.5, 0.1)))),
    _product(_joined(_warmup(10, 0.1), _cosine(90, 0.1)), _for_steps(_stairs(20, 0.5, 0.1), 70)),
    _per_epoch(_stairs(30, 0.1, 0.1), 1_000),
    _per_epoch(_joined(_warmup(5, 0.1), _cosine(85, 0.1, 1e-4)), 11_111_111),
    _per_epoch(_one_cycle(0.1, 101, 0.333), 7),
    _per_epoch(_per_epoch(_cosine(10, 0.1), 3), 5),
    _per_epoch(_joined(_per_epoch(_warmup(4, 0.1), 2), _restarts(3, 2, 0.1, 0.5)), 3),
    _per_epoch(_product(_for_steps(_stairs(2, 0.5, 0.1), 9), _cyclic(0.001, 0.1, 5, 3)), 4),
    _joined(_for_steps(_per_epoch(_stairs(1, 0.5, 0.1), 7), 24), _per_epoch(_table([1.0, 0.3], 2, True, 0.1), 3)),
    _per_epoch(_milestones([3, 2**30], 0.5, 0.1), 2**26),
]  # fmt: skip
