"""What the schedules that are recipes, cycles or made of others say about bad arguments, and how they begin and end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fusedlr import schedules
from fusedlr.schedules import (
    WSD,
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    InverseSqrt,
    Lambda,
    MomentumCycle,
    MultiStepDecay,
    Noam,
    OneCycle,
    Plateau,
    StepDecay,
    Table,
    TimeDecay,
    Warmup,
    per_epoch,
    product,
)

nan, inf = math.nan, math.inf

STEPS: list[tuple[Callable[[Any], Any], str]] = [
    (CosineRestarts, "first_cycle"),
    (lambda n: CosineRestarts(5, n), "mult"),
    (InverseSqrt, "warmup_steps"),
    (lambda n: Noam(n, 5), "d_model"),
    (lambda n: Noam(5, n), "warmup_steps"),
    (lambda n: OneCycle(1.0, n), "total_steps"),
    (lambda n: Cyclic(0.1, 1.0, n), "step_size_up"),
    (lambda n: Cyclic(0.1, 1.0, 5, n), "step_size_down"),
    (lambda n: WSD(n, 1, 1), "warmup_steps"),
    (lambda n: WSD(1, n, 1), "stable_steps"),
    (lambda n: WSD(1, 1, n), "decay_steps"),
    (lambda n: Lambda(lambda t: 1.0, n), "total_steps"),
    (lambda n: per_epoch(Constant(), n), "steps_per_epoch"),
]
# A number, and values outside its range with what the message says is allowed.
NUMBERS: list[tuple[Callable[[Any], Any], str, list[tuple[float, str]]]] = [
    (lambda x: CosineRestarts(5, decay=x), "decay", [(0.0, "> 0 and <= 1"), (-1.0, "> 0 and <= 1"), (1.5, "<= 1")]),
    (lambda x: CosineRestarts(5, min_lr=x), "min_lr", [(-0.1, ">= 0")]),
    (lambda x: OneCycle(x, 5), "max_lr", [(-0.1, ">= 0")]),
    (lambda x: OneCycle(1.0, 5, pct_start=x), "pct_start", [(-0.1, ">= 0 and <= 1"), (1.1, ">= 0 and <= 1")]),
    (lambda x: OneCycle(1.0, 5, div_factor=x), "div_factor", [(0.0, "> 0"), (-2.0, "> 0")]),
    (lambda x: OneCycle(1.0, 5, final_div_factor=x), "final_div_factor", [(0.0, "> 0"), (-2.0, "> 0")]),
    (lambda x: OneCycle(1.0, 5, base_momentum=x), "base_momentum", [(-0.1, ">= 0 and < 1"), (1.0, "< 1")]),
    (lambda x: OneCycle(1.0, 5, max_momentum=x), "max_momentum", [(-0.1, ">= 0 and < 1"), (1.0, "< 1")]),
    (lambda x: Cyclic(x, 1.0, 5), "base_lr", [(-0.1, ">= 0")]),
    (lambda x: Cyclic(0.1, x, 5), "max_lr", [(-0.1, ">= 0")]),
    (lambda x: Cyclic(0.1, 1.0, 5, gamma=x), "gamma", [(0.0, "> 0 and <= 1"), (1.1, "> 0 and <= 1")]),
    (lambda x: Cyclic(0.1, 1.0, 5, base_momentum=x), "base_momentum", [(1.0, ">= 0 and < 1")]),
    (lambda x: Cyclic(0.1, 1.0, 5, max_momentum=x), "max_momentum", [(1.0, ">= 0 and < 1")]),
    (lambda x: WSD(1, 1, 1, min_lr=x), "min_lr", [(-0.1, ">= 0")]),
    (lambda x: WSD(1, 1, 1, "exponential", x), "min_lr", [(0.0, "> 0"), (-0.1, "> 0")]),
    (lambda x: TimeDecay(x), "rate", [(-0.1, ">= 0")]),
    (lambda x: Plateau(factor=x), "factor", [(-0.1, ">= 0 and < 1"), (1.0, "< 1"), (2.0, "< 1")]),
    (lambda x: Plateau(threshold=x), "threshold", [(-0.1, ">= 0")]),
    (lambda x: Plateau(eps=x), "eps", [(-0.1, ">= 0")]),
    (lambda x: Plateau(min_lr=[0.1, x]), r"min_lr\[1\]", [(-0.1, ">= 0")]),
    (lambda x: Lambda(lambda t: x, 3), r"fn\(0\)", [(-0.1, ">= 0")]),
]
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    *(
        (lambda make=make, n=n: make(n), error, f"^{name} must be an integer.*{shown}")
        for make, name in STEPS
        for n, error, shown in [
            (0, ValueError, ">= 1 .*got 0"),
            (-3, ValueError, ">= 1 .*got -3"),
            (2.0, TypeError, r"got 2\.0 \(float\)"),
            (True, TypeError, r"got True \(bool\)"),
            ("10", TypeError, r"got '10' \(str\)"),
        ]
    ),
    *(
        (lambda make=make, x=x: make(x), error, f"^{name} must be a .*number.*{shown}")
        for make, name, outside in NUMBERS
        for x, error, shown in [
            *((x, ValueError, f"{allowed}, but got {x}") for x, allowed in outside),
            (nan, ValueError, "got nan"),
            (inf, ValueError, "got inf"),
            ("1", TypeError, r"got '1' \(str\)"),
            (None, TypeError, r"got None \(NoneType\)"),
        ]
    ),
    (lambda: Plateau(mode="least"), ValueError, "mode must be one of 'min', 'max', but got 'least'"),
    (lambda: Plateau(threshold_mode="square"), ValueError, "threshold_mode must be one of 'rel', 'abs'.*got 'square'"),
    (lambda: Plateau(patience=-1), ValueError, "patience must be an integer >= 0 .*got -1"),
    (lambda: Plateau(patience=1.5), TypeError, r"patience must be an integer, but got 1.5 \(float\)"),
    (lambda: Plateau(cooldown=-1), ValueError, "cooldown must be an integer >= 0 .*got -1"),
    (lambda: Plateau(cooldown=True), TypeError, r"cooldown must be an integer, but got True \(bool\)"),
    (lambda: Plateau(min_lr=-0.1), ValueError, "min_lr must be a finite number >= 0, but got -0.1"),
    (lambda: Plateau(min_lr=nan), ValueError, "min_lr must be a finite number >= 0, but got nan"),
    (lambda: Plateau(min_lr="0"), TypeError, r"min_lr must be a number or a sequence of them, but got '0' \(str\)"),
    (lambda: Plateau(min_lr=None), TypeError, "min_lr must be a number or a sequence of them, but got None"),
    (lambda: Plateau().then(Cosine(9)), ValueError, r"Plateau\(\) has no end"),
    (lambda: TimeDecay(0.1, "days"), ValueError, "unit must be one of 'seconds', 'minutes', 'hours', but got 'days'"),
    (lambda: TimeDecay(0.1, clock=3.0), TypeError, r"clock must be a function that gives seconds.*got 3.0 \(float\)"),
    (lambda: TimeDecay(0.1)(-1.0, 1.0), ValueError, "t must be a finite number >= 0, but got -1.0"),
    (lambda: TimeDecay(0.1)(0, -1.0), ValueError, "base_lr must be a finite number >= 0, but got -1.0"),
    (lambda: TimeDecay(0.1).then(Cosine(9)), ValueError, r"TimeDecay\(0.1\) has no end"),
    (lambda: OneCycle(1.0, 5, anneal="sine"), ValueError, "anneal must be one of 'cos', 'linear', but got 'sine'"),
    (lambda: OneCycle(1.0, 5, three_phase=1), TypeError, "three_phase must be True or False, but got 1"),
    (lambda: OneCycle(1.0, 5, cycle_momentum="yes"), TypeError, "cycle_momentum must be True or False"),
    (lambda: OneCycle(1e300, 5, div_factor=1e-300), ValueError, "div_factor and final_div_factor must leave"),
    (lambda: Cyclic(0.1, 1.0, 5, mode="square"), ValueError, "mode must be one of 'triangular'.*but got 'square'"),
    (lambda: Cyclic(0.1, 1.0, 5, cycle_momentum=0), TypeError, "cycle_momentum must be True or False"),
    (lambda: Cyclic(0.1, 1.0, 2**53), ValueError, r"step_size_up \+ step_size_down must be an integer"),
    (lambda: WSD(1, 1, 1, decay="log"), ValueError, "decay must be one of 'linear', 'cosine', '1-sqrt', 'exponential'"),
    (lambda: WSD(2**53, 1, 1), ValueError, r"warmup_steps \+ stable_steps \+ decay_steps must be"),
    (lambda: Lambda(0.5, 3), TypeError, r"fn must be a function of the step, but got 0\.5 \(float\)"),
    (lambda: Lambda(lambda t: nan if t == 2 else 1.0, 5), ValueError, r"fn\(2\) must be a .*>= 0, but got nan"),
    (lambda: Lambda(lambda t: "0.1", 5), TypeError, r"fn\(0\) must be a number, but got '0.1' \(str\)"),
    (lambda: Lambda(lambda t: None, 5), TypeError, r"fn\(0\) must be a number, but got None"),
    (lambda: Lambda(lambda t: 1.0, 10**9), ValueError, "total_steps must be at most 10000000.*got 1000000000"),
    (lambda: product(Constant(), 3), TypeError, r"b must be a schedule, but got 3 \(int\)"),
    (lambda: product("Cosine(9)", Constant()), TypeError, r"a must be a schedule, but got 'Cosine\(9\)' \(str\)"),
    (lambda: per_epoch(3, 4), TypeError, r"schedule must be a schedule, but got 3 \(int\)"),
    (lambda: per_epoch(Cosine(2**40), 2**14), ValueError, "the length in steps must be an integer.*2"),
    (lambda: product(Constant(), Constant())(0, 1e-320), ValueError, "base_lr must be 0 or large enough"),
    (
        lambda: product(OneCycle(1.0, 5, cycle_momentum=True), Cyclic(0.1, 1.0, 5, cycle_momentum=True)),
        ValueError,
        "only one factor of a product can cycle the momentum",
    ),
    (lambda: MomentumCycle(Cosine(9)), TypeError, r"cycle must be a OneCycle or a Cyclic, but got Cosine\(9\)"),
    (lambda: MomentumCycle(OneCycle(1.0, 5)), ValueError, "cycle must be made with cycle_momentum=True"),
    (lambda: per_epoch(StepDecay(3), 4).then(Cosine(9)), ValueError, r"per_epoch\(StepDecay\(3\), 4\) has no end"),
    (lambda: product(Cosine(9), StepDecay(3)).then(Cosine(9)), ValueError, "has no end"),
    (lambda: CosineRestarts(9).then(Cosine(9)), ValueError, "has no end"),
    *(
        (lambda s=s: s(0, 0.1), ValueError, r"min_lr must be at most base_lr, but got min_lr=0\.2 and base_lr=0\.1 in ")
        for s in (
            CosineRestarts(5, min_lr=0.2),
            WSD(1, 1, 1, min_lr=0.2),
            WSD(1, 1, 1, "exponential", 0.2),
            product(Constant(), Cosine(5, 0.2)),
            per_epoch(Cosine(5, 0.2), 3),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("act, error, message", BAD, ids=[f"{i}-{message}" for i, (_, _, message) in enumerate(BAD)])
def test_bad_input(act: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


def test_lengths() -> None:
    ends = [OneCycle(1.0, 7), WSD(2, 3, 2), Lambda(lambda t: 1.0, 7), product(Cosine(7), Warmup(2))]
    ends += [per_epoch(Cosine(7), 1), product(Warmup(2), Cosine(7))]
    ends += [OneCycle(1.0, 7, cycle_momentum=True).momentum_schedule()]  # type: ignore[list-item]
    assert [schedule.length for schedule in ends] == [7] * 7
    assert per_epoch(Cosine(7), 6).length == 42
    endless = [CosineRestarts(5), InverseSqrt(5), Noam(5, 5), Cyclic(0.1, 1.0, 5), product(Cosine(7), StepDecay(3))]
    endless += [per_epoch(StepDecay(3), 4), Cyclic(0.1, 1.0, 5, cycle_momentum=True).momentum_schedule()]  # type: ignore[list-item]
    assert [schedule.length for schedule in endless] == [None] * 7


def test_ends_are_exact() -> None:
    for decay in ("linear", "cosine", "1-sqrt", "exponential"):
        schedule = WSD(3, 4, 5, decay, 0.003)
        assert [schedule(t, 0.1) for t in (2, 6, 7, 12, 10**9)] == [0.1, 0.1, 0.1, 0.003, 0.003]
    cycle = OneCycle(0.5, 101, 0.333, div_factor=10.0, final_div_factor=100.0)
    assert [cycle(t, 7.0) for t in (0, 100, 101, 10**9)] == [0.05, 0.0005, 0.0005, 0.0005]
    assert OneCycle(0.5, 10, 0.1)(0, 7.0) == 0.5  # where torch divides by zero
    triangles = Cyclic(0.1, 0.7, 3, 4)
    assert {triangles(7 * i, 1.0) for i in range(100)} == {0.1}
    assert {triangles(7 * i + 3, 1.0) for i in range(100)} == {0.7}
    assert {CosineRestarts(7, min_lr=0.003)(7 * i, 0.1) for i in range(100)} == {0.1}
    boundary = 0
    for i in range(33):  # (3**i - 1)/2 steps, which a logarithm misses at 121 = (3**5 - 1)/2
        assert CosineRestarts(1, 3, 0.5)(boundary, 0.1) == 0.1 * 0.5**i
        boundary += 3**i


def test_a_product_is_zero_where_its_base_is() -> None:
    assert [product(OneCycle(1.0, 9), Constant())(t, 0.0) for t in (0, 5, 100)] == [0.0] * 3


def test_a_lambda_is_a_table_that_was_sampled_once() -> None:
    calls: list[int] = []

    def fn(t: int) -> np.float32:
        calls.append(t)
        return np.float32(1 / 2**t)

    schedule = Lambda(fn, 4)
    assert [schedule(t, 2.0) for t in (0, 1, 2, 3, 4, 10**9)] == [2.0, 1.0, 0.5, 0.25, 0.25, 0.25]
    assert calls == [0, 1, 2, 3]
    assert schedule == Table([1.0, 0.5, 0.25, 0.125])
    assert eval(repr(schedule), vars(schedules)) == schedule


def test_rows_that_no_clock_reaches_are_left_out() -> None:
    far = per_epoch(per_epoch(MultiStepDecay([3, 2**40]), 2**20), 2**20)
    assert [row.start for row in far.rows(1.0)] == [0, 3 * 2**40]
    assert far(3 * 2**40 - 1, 1.0) == 1.0
    assert far(2**53, 1.0) == 0.1
    assert per_epoch(per_epoch(StepDecay(1, 0.5), 2**40), 2**40)(2**53, 1.0) == 1.0


def test_the_title_of_a_picture_of_a_long_table_is_short() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    try:
        title = Lambda(lambda t: 1.0, 5_000).plot(100).get_title()
        assert len(title) <= 100
        assert title.startswith("Table((1.0, 1.0,")
        assert title.endswith("1.0))")
    finally:
        pyplot.close("all")
