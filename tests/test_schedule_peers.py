"""The table of docs/schedules.md: each expression of ours against the formula of their library, from its source."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import pytest

from fusedlr import schedules

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "schedules.md").read_text(encoding="utf-8")
# What the letters of the table stand for: b the base, w the warm-up, n the length, and whatever a row needs.
b, w, n, m, k, g, r, f, c, d = 0.1, 7, 39, 0.013, 1.7, 0.8, 0.2, 0.3, 4, 11
s = 23
milestones = [5, 12, 30]
Curve = Callable[[int], float]
pi, cos = math.pi, math.cos


def _rows() -> dict[str, str]:
    rows: dict[str, str] = {}
    library = ""
    for line in PAGE.split("## From other libraries")[1].splitlines():
        if line.startswith("### "):
            library = line[4:]
        elif found := re.match(r"\| `(.*?)` \| `(.*?)` \|", line):
            rows[f"{library}: {found[1]}"] = found[2]
    return rows


ROWS = _rows()


def warm(after: Curve, begin: float = 0.0) -> Curve:
    """A straight line from ``begin`` to b over w steps, then ``after``, which sees t - w."""
    return lambda t: begin + t * (b - begin) / w if t < w else after(t - w)


# transformers/optimization.py; its lambdas return multiples of the base.


def hf_cosine(low: float = 0.0, offset: int = 0) -> Curve:
    def factor(u: int) -> float:
        wave = 0.5 * (1.0 + cos(pi * 0.5 * 2.0 * (u + offset) / max(1, n - w)))
        return b * max(0.0, wave * (1 - low / b) + low / b)

    return factor


def hf_restarts(u: int) -> float:
    progress = u / max(1, n - w)
    return 0.0 if progress >= 1.0 else b * max(0.0, 0.5 * (1.0 + cos(pi * ((c * progress) % 1.0))))


def hf_polynomial(t: int) -> float:
    if t < w:
        return b * t / max(1, w)
    if t > n:
        return m
    return (b - m) * (1 - (t - w) / (n - w)) ** k + m


def hf_cycles(u: int) -> float:
    return b * max(0.0, 0.5 * (1.0 + cos(pi * float(c) * 2.0 * (u / max(1, n - w)))))


def hf_wsd(warmup: Curve, decay: Curve) -> Curve:
    def factor(t: int) -> float:
        if t < w:
            return b * max(0.0, warmup(t / max(1, w)) * (1.0 - r) + r)
        if t < w + s:
            return b
        if t < w + s + d:
            return b * max(0.0, decay((t - w - s) / max(1, d)) * (1.0 - r) + r)
        return b * r

    return factor


def half_down(p: float) -> float:
    return 0.5 * (1.0 + cos(pi * p))


# timm/scheduler/*.py; values, not multiples.


def timm_cosine(u: int) -> float:
    return m + 0.5 * (b - m) * (1 + cos(pi * u / n)) if u < n else m


def timm_global_clock(t: int) -> float:
    if t < w:
        return f * b + t * (b - f * b) / w
    return 0.5 * b * (1 + cos(pi * t / n)) if t < n else 0.0


def timm_cycles(t: int) -> float:
    # The index by bisection: timm's own floor(log(...)) is one off at some restarts.
    i = bisect_right([n, 3 * n, 7 * n], t)
    if i >= 3:
        return 0.0
    begin, length = (2**i - 1) * n, 2**i * n
    return 0.5 * b * g**i * (1 + cos(pi * (t - begin) / length))


def timm_tanh(t: int) -> float:
    if t >= n:
        return 0.0
    tr = t / n
    return 0.5 * b * (1 - math.tanh(-7 * (1 - tr) + 3 * tr))


# optax/schedules/_schedule.py, with init_value, peak_value and so on in terms of b.


def optax_polynomial(t: int, begin: int, steps: int, power: float, init: float, end: float) -> float:
    count = min(max(t - begin, 0), steps)
    return (init - end) * (1 - count / steps) ** power + end


def optax_cosine(t: int, steps: int, alpha: float) -> float:
    decay = 0.5 * (1 + cos(pi * min(t, steps) / steps))
    return b * ((1 - alpha) * decay + alpha)


def optax_piecewise_constant(t: int) -> float:
    value = b
    for threshold, scale in {7: g, 19: r}.items():
        value = value if t < threshold else scale * value
    return value


def optax_interpolate(boundaries: dict[int, float], init: float, cosine: bool) -> Curve:
    bounds, values = [0, *boundaries], [init]
    for scale in boundaries.values():
        values.append(values[-1] * scale)

    def value(t: int) -> float:
        for i in range(len(boundaries)):
            if bounds[i] <= t < bounds[i + 1]:
                pct = (t - bounds[i]) / (bounds[i + 1] - bounds[i])
                if cosine:
                    return values[i + 1] + (values[i] - values[i + 1]) / 2.0 * (cos(pi * pct) + 1)
                return (values[i + 1] - values[i]) * pct + values[i]
        return values[-1]

    return value


def optax_sgdr(t: int) -> float:
    if t < n:
        return warm(lambda u: optax_cosine(u, n - w, 0.0))(t)
    return warm(lambda u: optax_cosine(u, 2 * n - w, 0.0))(t - n)


FORMULAS: dict[str, Curve] = {
    "transformers: constant": lambda t: b,
    "transformers: constant_with_warmup (w)": lambda t: b * t / max(1.0, w) if t < w else b,
    "transformers: linear (w, n)": warm(lambda u: b * max(0.0, (n - w - u) / max(1, n - w))),
    "transformers: cosine (w, n)": warm(hf_cosine()),
    "transformers: cosine (w, n, num_cycles=c)": warm(hf_cycles),
    "transformers: cosine_with_restarts (w, n, num_cycles=c)": warm(hf_restarts),
    "transformers: polynomial (w, n, lr_end=m, power=k)": hf_polynomial,
    "transformers: inverse_sqrt (w, timescale=s)": warm(lambda u: b / math.sqrt((u + w + (s - w)) / s)),
    "transformers: inverse_sqrt (0)": lambda t: b / math.sqrt((t + 10_000) / 10_000),
    "transformers: cosine_with_min_lr (w, n, min_lr=m)": warm(hf_cosine(m)),
    "transformers: cosine_with_min_lr (w, n, min_lr_rate=r)": warm(hf_cosine(r * b)),
    "transformers: cosine_warmup_with_min_lr (w, n, min_lr=m)": lambda t: (
        b * (t + 1.0) / max(1.0, w) if t < w else hf_cosine(m, 1)(t - w)
    ),
    "transformers: cosine_warmup_with_min_lr (w, n, min_lr=m, warmup_lr_rate=r)": lambda t: (
        b * (r + (1.0 - r) * t / max(1, w - 1)) if t < w else hf_cosine(m, 1)(t - w)
    ),
    "transformers: warmup_stable_decay (w, s, d, min_lr_ratio=r)": hf_wsd(lambda p: p, half_down),
    'transformers: warmup_stable_decay (w, s, d, warmup_type="cosine", decay_type="linear", min_lr_ratio=r)': hf_wsd(
        lambda p: 0.5 * (1.0 - cos(pi * p)), lambda p: 1.0 - p
    ),
    'transformers: warmup_stable_decay (w, s, d, decay_type="1-sqrt", min_lr_ratio=r)': hf_wsd(
        lambda p: p, lambda p: 1.0 - math.sqrt(p)
    ),
    'transformers: warmup_stable_decay (w, s, d, warmup_type="1-sqrt", min_lr_ratio=r)': hf_wsd(
        lambda p: 1.0 - math.sqrt(1.0 - p), half_down
    ),
    "timm: CosineLRScheduler (n, lr_min=m, warmup_t=w, warmup_lr_init=f*b, warmup_prefix=True)": warm(
        timm_cosine, f * b
    ),
    "timm: CosineLRScheduler (n, warmup_t=w, warmup_lr_init=f*b)": timm_global_clock,
    "timm: CosineLRScheduler (n, cycle_mul=2, cycle_decay=g, cycle_limit=3)": timm_cycles,
    "timm: CosineLRScheduler (n, k_decay=k)": lambda t: 0.5 * b * (1 + cos(pi * t**k / n**k)) if t < n else 0.0,
    "timm: StepLRScheduler (n, g, warmup_t=w)": warm(lambda u: b * g ** (u // n)),
    "timm: MultiStepLRScheduler (milestones, g)": lambda t: b * g ** bisect_right(milestones, t + 1),
    "timm: PolyLRScheduler (n, power=k, lr_min=m)": lambda t: m + (b - m) * (1 - t / n) ** k if t < n else m,
    "timm: PolyLRScheduler (n, power=2, k_decay=k)": lambda t: b * (1 - t**k / n**k) ** 2 if t < n else 0.0,
    "timm: TanhLRScheduler (n, lb=-7, ub=3)": timm_tanh,
    "timm: t_in_epochs=True": lambda t: 0.5 * b * (1 + cos(pi * (t // s) / n)) if t // s < n else 0.0,
    "optax: constant_schedule": lambda t: b,
    "optax: linear_schedule (b, r*b, n)": lambda t: optax_polynomial(t, 0, n, 1, b, r * b),
    "optax: polynomial_schedule (b, m, k, n, transition_begin=w)": lambda t: optax_polynomial(t, w, n, k, b, m),
    "optax: exponential_decay (b, n, g, end_value=m)": lambda t: max(b * g ** (t / n), m),
    "optax: exponential_decay (b, n, g, staircase=True)": lambda t: b * g ** math.floor(t / n),
    "optax: exponential_decay (b, n, g, transition_begin=w)": lambda t: b * g ** (max(t - w, 0) / n),
    "optax: cosine_decay_schedule (b, n, alpha=r, exponent=k)": lambda t: (
        b * ((1 - r) * (0.5 * (1 + cos(pi * min(t, n) / n))) ** k + r)
    ),
    "optax: cosine_decay_schedule (b, n, alpha=r)": lambda t: optax_cosine(t, n, r),
    "optax: piecewise_constant_schedule (b, {7: g, 19: r})": optax_piecewise_constant,
    'optax: piecewise_interpolate_schedule ("linear", b, {7: g, 19: r})': optax_interpolate({7: g, 19: r}, b, False),
    'optax: piecewise_interpolate_schedule ("cosine", b, {7: g, 19: r})': optax_interpolate({7: g, 19: r}, b, True),
    "optax: warmup_constant_schedule (f*b, b, w)": lambda t: optax_polynomial(t, 0, w, 1, f * b, b),
    "optax: warmup_cosine_decay_schedule (f*b, b, w, n, end_value=m)": warm(
        lambda u: optax_cosine(u, n - w, m / b), f * b
    ),
    "optax: warmup_exponential_decay_schedule (f*b, b, w, n, g)": warm(lambda u: b * g ** (u / n), f * b),
    "optax: cosine_onecycle_schedule (n, b)": optax_interpolate({int(0.3 * n): 25.0, n: 1 / 25e4}, b / 25, True),
    "optax: linear_onecycle_schedule (n, b)": optax_interpolate(
        {int(0.3 * n): 25.0, int(0.85 * n): 1 / 25, n: 1 / 1e4}, b / 25, False
    ),
    "optax: sgdr_schedule (of two warmup_cosine_decay)": optax_sgdr,
    "optax: join_schedules ([x, y], [w])": lambda t: b * g**t if t < w else optax_cosine(t - w, n, 0.0),
}


def test_every_row_has_a_formula() -> None:
    assert set(ROWS) == set(FORMULAS)


@pytest.mark.parametrize("row", FORMULAS)
def test_ours_is_theirs(row: str) -> None:
    letters = dict(b=b, w=w, n=n, m=m, k=k, g=g, r=r, f=f, c=c, d=d, s=s, milestones=milestones)
    schedule = eval(ROWS[row], {**vars(schedules), "math": math, **letters})
    times = [*range(400), 5 * n * s]
    # Their 1 + cos(x) leaves 1e-16 of the base where the true value is smaller or zero.
    assert [schedule(t, b) for t in times] == pytest.approx([FORMULAS[row](t) for t in times], rel=1e-12, abs=1e-16)
