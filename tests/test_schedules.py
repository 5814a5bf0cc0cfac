"""Schedules on the host: exactness, torch as an oracle, composition, values, errors and pictures."""

from __future__ import annotations

import math
import pickle
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from schedule_cases import CASES, Case, agrees
from torch.optim import lr_scheduler as torch_schedulers

from fusedlr import schedules
from fusedlr.schedules import (
    WSD,
    Chain,
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    ExponentialDecay,
    ForSteps,
    InverseSqrt,
    InverseTimeDecay,
    Linear,
    LinearDecay,
    MultiStepDecay,
    Noam,
    OneCycle,
    Plateau,
    Polynomial,
    PowerDecay,
    Schedule,
    SqrtDecay,
    StepDecay,
    Table,
    TimeDecay,
    Warmup,
    per_epoch,
    product,
)
from fusedlr.schedules.program import Kind, Row, pack, split_rate, value


def by_repr(case: Case) -> str:
    return f"{case.schedule!r}*{case.base}"


@pytest.mark.parametrize("case", CASES, ids=by_repr)
def test_exact_to_a_billion_steps(case: Case) -> None:
    wrong = {
        t: case.schedule(t, case.base) for t in case.times if not agrees(case.schedule(t, case.base), case.exact(t))
    }
    assert not wrong, {t: (got, float(case.exact(t))) for t, got in wrong.items()}


def test_every_schedule_has_a_case() -> None:
    tested = {type(part) for case in CASES for part in getattr(case.schedule, "parts", (case.schedule,))}
    public = {getattr(schedules, name) for name in schedules.__all__}
    others = (Schedule, Chain, Plateau, TimeDecay)  # test_plateau.py and test_time_decay.py hold the last two
    concrete = {c for c in public if isinstance(c, type) and issubclass(c, Schedule) and c not in others}
    assert concrete <= tested
    kinds = {row.kind for case in CASES for row in case.schedule.rows(case.base)}
    assert kinds == set(Kind) - {Kind.LIVE}


# (ours, torch's scheduler for an optimizer), compared for 40 steps.
ORACLES = [
    (StepDecay(7, 0.3), lambda o: torch_schedulers.StepLR(o, 7, 0.3)),
    (MultiStepDecay([3, 8, 8, 20], 0.3), lambda o: torch_schedulers.MultiStepLR(o, [3, 8, 8, 20], 0.3)),
    (ExponentialDecay(0.1), lambda o: torch_schedulers.ExponentialLR(o, 0.9)),
    (Linear(12, 1 / 3, 1.0), lambda o: torch_schedulers.LinearLR(o, 1 / 3, 1.0, 12)),
    (Linear(12, 1.0, 0.0), lambda o: torch_schedulers.LinearLR(o, 1.0, 0.0, 12)),
    (Polynomial(12, 2.0), lambda o: torch_schedulers.PolynomialLR(o, 12, 2.0)),
    (Polynomial(12, 0.0), lambda o: torch_schedulers.PolynomialLR(o, 12, 0.0)),
    (Cosine(9, 0.01, periodic=True), lambda o: torch_schedulers.CosineAnnealingLR(o, 9, 0.01)),
    (Cosine(9, periodic=True), lambda o: torch_schedulers.CosineAnnealingLR(o, 9)),
    (Constant(0.3, steps=6).then(Constant()), lambda o: torch_schedulers.ConstantLR(o, 0.3, 6)),
    (
        Linear(5, 0.1, 1.0).then(Cosine(20, 0.01, periodic=True)),
        lambda o: torch_schedulers.SequentialLR(
            o, [torch_schedulers.LinearLR(o, 0.1, 1.0, 5), torch_schedulers.CosineAnnealingLR(o, 20, 0.01)], [5]
        ),
    ),
    (
        Warmup(5, 0.1, offset=0).then(ExponentialDecay(0.1).for_steps(10)).then(StepDecay(4, 0.5)),
        lambda o: torch_schedulers.SequentialLR(
            o,
            [
                torch_schedulers.LinearLR(o, 0.1, 1.0, 5),
                torch_schedulers.ExponentialLR(o, 0.9),
                torch_schedulers.StepLR(o, 4, 0.5),
            ],
            [5, 15],
        ),
    ),
]


# SequentialLR itself calls its parts' step(0), and torch warns about that.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("schedule, make", ORACLES, ids=[repr(schedule) for schedule, _ in ORACLES])
def test_the_curve_is_torchs(schedule: Schedule, make: Any) -> None:
    base = 0.1
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    oracle = make(optimizer)
    for t in range(40):
        # torch multiplies from step to step, which drifts by some 1e-16 each; and next to zero its 1 + cos(x)
        # cancels, so that about 1e-16 of the base remains there, where the true value is smaller or zero.
        assert schedule(t, base) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15 * base), t
        optimizer.step()
        oracle.step()


def test_the_log_warmup_is_deepspeeds() -> None:
    # deepspeed/runtime/lr_schedules.py, WarmupLR._get_gamma: log(t + 1)/log(warmup_num_steps), then 1.
    deepspeed = [math.log(t + 1) / math.log(100) if t < 100 else 1.0 for t in range(120)]
    ours = Warmup(99, shape="log", offset=0)
    assert [ours(t, 1.0) for t in range(120)] == pytest.approx(deepspeed, rel=1e-15, abs=0)


def test_ends_are_exact() -> None:
    base, low = 0.1, 0.003  # a = b*x + (1 - x)*low must not come out one bit off at the ends
    for schedule in (
        Cosine(10, low),
        Cosine(10, low, periodic=True),
        Polynomial(10, 0.7, low),
        Polynomial(10, 2.0, low),
    ):
        assert (schedule(0, base), schedule(10, base)) == (base, low)
    for shape in ("linear", "cosine", "log"):
        assert Warmup(10, shape=shape)(9, base) == Warmup(10, shape=shape)(10**9, base) == base
        assert Warmup(10, shape=shape, offset=0)(0, base) == 0.0
    assert [LinearDecay(0.1)(t, 1.0) for t in (0, 11, 12, 10**9)] == [1.0, 0.0, 0.0, 0.0]
    # Between its last value and nothing a table interpolates no more: x*0.8 + x*0.2 need not be x.
    assert {Table([0.375], 5, interpolate=True)(t, 1.0) for t in range(20)} == {0.375}


def test_growth_stays_finite() -> None:
    assert math.isfinite(ExponentialDecay(-0.5)(10**9, 0.1))
    assert math.isfinite(StepDecay(1, 2.0)(10**9, 0.1))


@pytest.mark.parametrize("rate", [0.0, 1e-300, 0.1, 1 / 3, 1e-10, 2.0**-20, 12345.678, 1e9])
def test_a_split_rate_is_the_rate_in_short_parts(rate: float) -> None:
    from fractions import Fraction

    parts = split_rate(rate)
    assert sum(map(Fraction, parts)) == Fraction(rate)
    for part in parts:
        assert Fraction(part * (2**31 - 1)) == Fraction(part) * (2**31 - 1)


ALL = [case.schedule for case in CASES]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_a_schedule_is_a_value(schedule: Schedule) -> None:
    again = eval(repr(schedule), vars(schedules))
    assert again == schedule
    assert again is not schedule
    assert hash(again) == hash(schedule)
    assert repr(again) == repr(schedule)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    with pytest.raises(FrozenInstanceError):
        schedule.length_of_life = 1  # type: ignore[attr-defined]


def test_different_schedules_differ() -> None:
    assert len(set(ALL)) == len({repr(schedule) for schedule in ALL})
    assert Cosine(10) != Polynomial(10)
    assert SqrtDecay(0.1) != InverseTimeDecay(0.1)


def test_how_schedules_print() -> None:
    assert repr(Warmup(100).then(Cosine(900, min_lr=0.1))) == "Warmup(100).then(Cosine(900, min_lr=0.1))"
    assert repr(Constant(0.5)) == "Constant(0.5)"
    assert repr(Constant(steps=5)) == "Constant(steps=5)"
    assert (
        repr(Cosine(9).for_steps(3).then(Constant()).for_steps(5))
        == "Cosine(9).for_steps(3).then(Constant()).for_steps(5)"
    )


def test_arguments_become_plain_numbers() -> None:
    given_, plain = Cosine(np.int64(10), min_lr=np.float32(0.5)), Cosine(10, min_lr=0.5)
    assert given_ == plain
    assert repr(given_) == repr(plain)
    assert MultiStepDecay(np.array([1, 2])) == MultiStepDecay([1, 2]) == MultiStepDecay((1, 2))
    assert Table(torch.tensor([1.0, 0.5])) == Table(np.array([1, 0.5])) == Table([1, 0.5])
    assert type(Table([1]).values[0]) is float  # type: ignore[index]


def test_the_order_of_then_does_not_matter() -> None:
    a, b, c = Warmup(3), Constant(steps=4), Cosine(5)
    assert a.then(b).then(c) == a.then(b.then(c))
    assert a.then(b).then(c).length == 12
    assert a.then(Constant()).length is None


def test_lengths() -> None:
    ends = [Warmup(7), Linear(7, 1, 0), Polynomial(7), Cosine(7), Constant(steps=7), Constant().for_steps(7)]
    assert [schedule.length for schedule in ends] == [7] * 6
    assert Table([1, 2], every=3).length == 6
    endless = [Constant(), StepDecay(1), MultiStepDecay([1]), ExponentialDecay(0.1), LinearDecay(0.1), SqrtDecay(0.1)]
    endless += [InverseTimeDecay(0.1), PowerDecay(0.1, 2), Cosine(7, periodic=True)]
    assert [schedule.length for schedule in endless] == [None] * 9


nan, inf = math.nan, math.inf

# (what is built or evaluated, the error, what its message names)
BAD = [
    *(
        (lambda make=make, steps=steps: make(steps), error, f"{name} must be an integer.*{shown}")
        for make, name in [
            (StepDecay, "step_size"),
            (Cosine, "total_steps"),
            (Polynomial, "total_steps"),
            (Warmup, "steps"),
            (lambda n: Linear(n, 1, 0), "total_steps"),
            (lambda n: Constant(steps=n), "steps"),
            (lambda n: Table([1], every=n), "every"),
            (lambda n: ExponentialDecay(0.1, every=n), "every"),
            (lambda n: Constant().for_steps(n), "steps"),
            (lambda n: Constant().plot(n), "steps"),
        ]
        for steps, error, shown in [
            (0, ValueError, "got 0"),
            (-3, ValueError, "got -3"),
            (2**53 + 1, ValueError, "got 9007199254740993"),
            (10.0, TypeError, r"got 10\.0 \(float\)"),
            (True, TypeError, r"got True \(bool\)"),
            ("10", TypeError, r"got '10' \(str\)"),
        ]
    ),
    *(
        (lambda make=make, number=number: make(number), error, f"{name} must be a .*number.*{shown}")
        for make, name in [
            (Constant, "factor"),
            (lambda x: StepDecay(1, x), "gamma"),
            (lambda x: MultiStepDecay([1], x), "gamma"),
            (LinearDecay, "rate"),
            (SqrtDecay, "rate"),
            (InverseTimeDecay, "rate"),
            (lambda x: PowerDecay(x, 1), "rate"),
            (lambda x: PowerDecay(1, x), "exponent"),
            (lambda x: Linear(1, x, 1), "start_factor"),
            (lambda x: Linear(1, 1, x), "end_factor"),
            (lambda x: Polynomial(1, x), "power"),
            (lambda x: Warmup(1, x), "start_factor"),
            (lambda x: ExponentialDecay(0.1, min_lr=x), "min_lr"),
            (lambda x: LinearDecay(0.1, x), "min_lr"),
            (lambda x: Polynomial(1, 1, x), "min_lr"),
            (lambda x: Cosine(1, x), "min_lr"),
            (lambda x: Table([1, x]), r"values\[1\]"),
            (lambda x: Constant()(0, x), "base_lr"),
        ]
        for number, error, shown in [
            (-0.5, ValueError, ">= 0, but got -0.5"),
            (nan, ValueError, "got nan"),
            (inf, ValueError, "got inf"),
            (10**400, ValueError, "got 1000"),
            (True, TypeError, r"got True \(bool\)"),
            ("1", TypeError, r"got '1' \(str\)"),
            (None, TypeError, r"got None \(NoneType\)"),
        ]
    ),
    (lambda: ExponentialDecay(1.0), ValueError, r"rate must be a finite number < 1, but got 1\.0"),
    (lambda: ExponentialDecay(-inf), ValueError, "rate must be a finite number < 1, but got -inf"),
    (lambda: ExponentialDecay(nan), ValueError, "rate .*got nan"),
    (lambda: ExponentialDecay(0.1, staircase=1), TypeError, r"staircase must be True or False, but got 1 \(int\)"),
    (lambda: Cosine(1, periodic="no"), TypeError, "periodic must be True or False, but got 'no'"),
    (lambda: Table([1], interpolate=None), TypeError, "interpolate must be True or False, but got None"),
    (lambda: MultiStepDecay([]), ValueError, r"milestones must hold at least one step, but got \[\]"),
    (lambda: MultiStepDecay([5, 3]), ValueError, r"milestones must be in ascending order, but got \[5, 3\]"),
    (lambda: MultiStepDecay([-1, 3]), ValueError, r"milestones\[0\] must be an integer >= 0.*got -1"),
    (lambda: MultiStepDecay([1, 3.0]), TypeError, r"milestones\[1\] must be an integer, but got 3\.0"),
    (lambda: MultiStepDecay(3), TypeError, "milestones must be a sequence of integers, but got 3"),
    (lambda: MultiStepDecay([1, 2], 1e200), ValueError, r"gamma .*finite, but got 1e\+200"),
    (lambda: Table([]), ValueError, "values must hold at least one number"),
    (lambda: Table(3.0), TypeError, r"values must be a sequence of numbers, but got 3\.0"),
    (lambda: Table([1, 1], every=2**53), ValueError, r"len\(values\)\*every"),
    (
        lambda: Warmup(1, shape="quadratic"),
        ValueError,
        "shape must be one of 'linear', 'cosine', 'log', but got 'quadratic'",
    ),
    (lambda: Warmup(1, offset=2), ValueError, "offset must be one of 0, 1, but got 2"),
    (lambda: Warmup(1, offset=True), TypeError, "offset must be an integer, but got True"),
    (lambda: StepDecay(1).then(Cosine(1)), ValueError, r"StepDecay\(1\) has no end.*for_steps"),
    (lambda: Cosine(9, periodic=True).then(Cosine(1)), ValueError, "no end"),
    (lambda: Warmup(1).then(Constant()).then(Cosine(1)), ValueError, r"Constant\(\) has no end"),
    (lambda: Warmup(1).then(0.1), TypeError, r"then expects a schedule, but got 0\.1 \(float\)"),
    (lambda: Chain(()), ValueError, "at least one schedule"),
    (lambda: ForSteps(3, 1), TypeError, r"schedule must be a schedule, but got 3 \(int\)"),
    (lambda: Constant()(-1, 0.1), ValueError, "t must be an integer >= 0.*got -1"),
    (lambda: Constant()(1.5, 0.1), TypeError, r"t must be an integer, but got 1\.5"),
    (lambda: pack([[Row(3, inf, 0, Kind.CONST, 1.0)]]), ValueError, "starts at 3"),
    *(
        (lambda s=s: s(0, 0.1), ValueError, r"min_lr must be at most base_lr, but got min_lr=0\.2 and base_lr=0\.1 in ")
        for s in (
            Cosine(5, 0.2),
            Cosine(5, 0.2, periodic=True),
            Polynomial(5, 1, 0.2),
            ExponentialDecay(0.1, min_lr=0.2),
            LinearDecay(0.1, 0.2),
            Warmup(5).then(Cosine(5, 0.2)),
            Cosine(5, 0.2).for_steps(2),
        )
    ),
]


@pytest.mark.parametrize("act, error, message", BAD, ids=[f"{i}-{message}" for i, (_, _, message) in enumerate(BAD)])
def test_bad_input(act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


def ending() -> st.SearchStrategy[Schedule]:
    steps = st.integers(1, 40)
    unit = st.floats(0, 1)
    decays = st.sampled_from(["linear", "cosine", "1-sqrt", "exponential"])
    return st.one_of(
        st.builds(Warmup, steps, unit, st.sampled_from(["linear", "cosine", "log"]), st.sampled_from([0, 1])),
        st.builds(Cosine, steps, unit),
        st.builds(Polynomial, steps, st.floats(0, 4), unit),
        st.builds(Linear, steps, unit, unit),
        st.builds(Constant, unit, steps),
        st.builds(Table, st.lists(unit, min_size=1, max_size=5), steps, st.booleans()),
        st.builds(OneCycle, unit, steps, unit, st.sampled_from(["cos", "linear"]), three_phase=st.booleans()),
        st.builds(WSD, steps, steps, steps, decays, st.floats(0.1, 1)),
        endless().flatmap(lambda schedule: steps.map(schedule.for_steps)),
    )


def endless() -> st.SearchStrategy[Schedule]:
    steps = st.integers(1, 40)
    unit = st.floats(0, 1)
    return st.one_of(
        st.builds(StepDecay, steps, st.floats(0, 2)),
        st.builds(MultiStepDecay, st.lists(st.integers(0, 90), min_size=1, max_size=4).map(sorted), unit),
        st.builds(ExponentialDecay, st.floats(-0.1, 0.9), steps, st.booleans(), unit),
        st.builds(LinearDecay, st.floats(0, 0.1), unit),
        st.builds(PowerDecay, unit, st.floats(0, 3)),
        st.builds(Cosine, steps, unit, st.just(True)),
        st.builds(CosineRestarts, steps, st.integers(1, 3), st.floats(0.1, 1), unit),
        st.builds(Cyclic, unit, unit, steps, steps, st.sampled_from(["triangular", "triangular2", "exp_range"])),
        st.builds(InverseSqrt, steps),
        st.builds(Noam, steps, steps),
    )


def composed() -> st.SearchStrategy[Schedule]:
    """Chains, products, epochs and ends within each other."""
    return st.recursive(
        ending(),
        lambda inner: st.one_of(
            st.builds(Schedule.then, inner, inner),
            st.builds(product, inner, inner),
            st.builds(per_epoch, inner, st.integers(1, 5)),
            st.builds(Schedule.for_steps, inner, st.integers(1, 60)),
        ),
        max_leaves=5,
    )


@settings(deadline=None, max_examples=150)
@example([Cosine(7)], WSD(1, 1, 1, "exponential", 0.125), 1)  # exp(log(0.125)) is a digit above it
@given(st.lists(ending(), min_size=1, max_size=4), st.one_of(ending(), endless()), st.integers(0, 300))
def test_a_chain_is_its_parts_on_their_own_clocks(parts: list[Schedule], last: Schedule, t: int) -> None:
    chain = parts[0]
    for part in [*parts[1:], last]:
        chain = chain.then(part)
    start = 0
    expected = last
    for part in parts:
        assert part.length is not None
        if t < start + part.length:
            expected = part
            break
        start += part.length
    got = chain(t, 1.0)
    assert got == expected(t - start, 1.0)
    assert math.isfinite(got)
    assert got >= 0
    assert eval(repr(chain), vars(schedules)) == chain
    assert pickle.loads(pickle.dumps(chain)) == chain
    if chain.length is not None:
        assert chain(chain.length + t, 1.0) == chain(chain.length, 1.0)


@settings(deadline=None, max_examples=100)
@given(st.one_of(ending(), endless()), st.integers(1, 100), st.integers(0, 300))
def test_for_steps_stops_the_clock(schedule: Schedule, steps: int, t: int) -> None:
    assert schedule.for_steps(steps)(t, 1.0) == schedule(min(t, steps), 1.0)


@settings(deadline=None, max_examples=150)
@given(composed(), st.one_of(composed(), endless()), st.integers(1, 9), st.integers(0, 400))
def test_compositions_are_what_they_say(a: Schedule, b: Schedule, n: int, t: int) -> None:
    assert a.length is not None
    both, slow, stopped = product(a, b), per_epoch(b, n), b.for_steps(n)
    assert both(t, 1.5) == pytest.approx(a(t, 1.5) * b(t, 1.5) / 1.5, rel=1e-14, abs=1e-300)
    assert slow(t, 1.5) == b(t // n, 1.5)
    assert stopped(t, 1.5) == b(min(t, n), 1.5)
    assert a.then(b)(t, 1.5) == (a(t, 1.5) if t < a.length else b(t - a.length, 1.5))
    for schedule in (both, slow, stopped, a.then(b)):
        assert eval(repr(schedule), vars(schedules)) == schedule
        assert pickle.loads(pickle.dumps(schedule)) == schedule
        if schedule.length is not None:
            assert schedule(schedule.length + t, 1.5) == schedule(schedule.length, 1.5)


def test_packing() -> None:
    table = Table([0.5, 0.25])
    programs = [Warmup(4).then(table), MultiStepDecay([3, 7]), table, Table([0.125]), Constant()]
    packed = pack([schedule.rows(2.0) for schedule in programs])
    assert packed.rows.dtype == packed.values.dtype == np.float64
    assert packed.first.dtype == packed.count.dtype == np.int64
    assert packed.count.tolist() == [2, 3, 1, 1, 1]
    assert packed.first.tolist() == [0, 2, 5, 6, 7]
    assert packed.values.tolist() == [0.5, 0.25, 0.125]  # the table that two programs share is there once
    assert packed.rows[[1, 5, 6], 8].tolist() == [0.0, 0.0, 2.0]
    assert packed.rows[1, :5].tolist() == [4.0, 2.0, 0.0, float(Kind.TABLE), 2.0]
    empty = pack([])
    assert empty.rows.shape == (0, 11)
    assert empty.first.shape == empty.count.shape == empty.values.shape == (0,)


def test_rows_evaluate_to_the_schedule() -> None:
    schedule = Warmup(5).then(Cosine(10))
    rows = schedule.rows(0.1)
    assert [value(rows, t) for t in range(20)] == [schedule(t, 0.1) for t in range(20)]


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    schedule = Warmup(100).then(Cosine(900, min_lr=0.01))
    try:
        short, long = schedule.plot(1_000, base_lr=0.1), schedule.plot(10**9, base_lr=0.1)
        x, y = short.lines[0].get_data()
        assert list(x) == list(range(1_000))
        assert list(y) == [schedule(t, 0.1) for t in range(1_000)]
        assert short.get_title() == repr(schedule)
        assert long.lines[0].get_xdata()[-1] == 10**9 - 1
        assert len(long.lines[0].get_xdata()) < 10_000
        assert list(schedule.plot(1).lines[0].get_xdata()) == [0]
    finally:
        pyplot.close("all")


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install 'fusedlr\[examples\]'"):
        Constant().plot(10)


def test_schedules_import_neither_matplotlib_nor_torch_nor_triton() -> None:
    import ast
    from pathlib import Path

    allowed = {"numpy", "__future__", *sys.stdlib_module_names}
    assert schedules.__file__ is not None
    for path in Path(schedules.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {
            name.split(".")[0]
            for node in top
            if not (isinstance(node, ast.ImportFrom) and node.level)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert names <= allowed, path
