"""from_torch: every scheduler of torch.optim as the same curve, held against the scheduler itself, stepped."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as theirs

import fusedlr
from fusedlr import schedules as s
from fusedlr.schedules import Schedule, from_torch
from fusedlr.schedules.program import value

BASE = 0.1
# SequentialLR calls its parts with an epoch, and tests step schedulers without their optimizer.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
]


def optimizer(*groups: float) -> torch.optim.Optimizer:
    params = [{"params": [torch.zeros(1)], "lr": lr} for lr in groups or (BASE,)]
    return torch.optim.SGD(params, lr=BASE, momentum=0.9)


Make = Callable[[torch.optim.Optimizer], Any]


def sequence(*parts: Make, at: list[int]) -> Make:
    return lambda o: theirs.SequentialLR(o, [part(o) for part in parts], at)


def chained(*parts: Make) -> Make:
    return lambda o: theirs.ChainedScheduler([part(o) for part in parts], o)


LINEAR: Make = lambda o: theirs.LinearLR(o, 0.1, 1.0, 5)  # noqa: E731
COSINE: Make = lambda o: theirs.CosineAnnealingLR(o, 20, 0.01)  # noqa: E731

CLOSED: dict[str, tuple[Make, Schedule]] = {
    "constant": (lambda o: theirs.ConstantLR(o, 0.3, 6), s.Constant(0.3, steps=6).then(s.Constant())),
    "linear": (lambda o: theirs.LinearLR(o, 1 / 3, 0.0, 12), s.Linear(12, 1 / 3, 0.0)),
    "exponential": (lambda o: theirs.ExponentialLR(o, 0.97), s.StepDecay(1, 0.97)),
    "step": (lambda o: theirs.StepLR(o, 7, 0.3), s.StepDecay(7, 0.3)),
    "multistep": (lambda o: theirs.MultiStepLR(o, [3, 8, 8, 40], 0.3), s.MultiStepDecay([3, 8, 8, 40], 0.3)),
    "multistep0": (lambda o: theirs.MultiStepLR(o, [0, 9], 0.3), s.MultiStepDecay([0, 9], 0.3)),
    "polynomial": (lambda o: theirs.PolynomialLR(o, 90, 2.0), s.Polynomial(90, 2.0)),
    "cosine": (COSINE, s.Cosine(20, 0.01, periodic=True)),
    "restarts": (lambda o: theirs.CosineAnnealingWarmRestarts(o, 7, 2, 0.01), s.CosineRestarts(7, 2, min_lr=0.01)),
    "restarts1": (lambda o: theirs.CosineAnnealingWarmRestarts(o, 7), s.CosineRestarts(7)),
    "cyclic": (
        lambda o: theirs.CyclicLR(o, 0.01, 0.3, 7, 5, cycle_momentum=False),
        s.Cyclic(0.01, 0.3, 7, 5),
    ),
    "constant0": (lambda o: theirs.ConstantLR(o, 0.3, 0), s.Constant(0.3)),
    "linear0": (lambda o: theirs.LinearLR(o, 0.3, 0.9, 0), s.Constant(0.3)),
    "multistep-none": (lambda o: theirs.MultiStepLR(o, [], 0.3), s.Constant()),
    "multistep-before": (lambda o: theirs.MultiStepLR(o, [-1, 5], 0.3), s.MultiStepDecay([5], 0.3)),
    "polynomial0": (lambda o: theirs.PolynomialLR(o, 0), s.Constant()),
    "cyclic2": (
        lambda o: theirs.CyclicLR(o, 0.01, 0.3, 7, mode="triangular2", cycle_momentum=False),
        s.Cyclic(0.01, 0.3, 7, 7, mode="triangular2"),
    ),
    "cyclic-exp": (
        lambda o: theirs.CyclicLR(o, 0.01, 0.3, 7, mode="exp_range", gamma=0.99),
        s.Cyclic(0.01, 0.3, 7, 7, "exp_range", 0.99, True, 0.8, 0.9),
    ),
    "sequential": (
        sequence(LINEAR, COSINE, lambda o: theirs.ExponentialLR(o, 0.9), at=[5, 25]),
        s.Linear(5, 0.1, 1.0).for_steps(5)
        .then(s.Cosine(20, 0.01, periodic=True).for_steps(20))
        .then(s.StepDecay(1, 0.9)),
    ),
    "sequential-restarts": (
        sequence(LINEAR, lambda o: theirs.CosineAnnealingWarmRestarts(o, 7, 2), at=[5]),
        s.Linear(5, 0.1, 1.0).for_steps(5).then(s.CosineRestarts(7, 2)),
    ),
    "chained": (
        chained(LINEAR, lambda o: theirs.ExponentialLR(o, 0.97), lambda o: theirs.StepLR(o, 20, 0.5)),
        s.product(s.product(s.Linear(5, 0.1, 1.0), s.StepDecay(1, 0.97)), s.StepDecay(20, 0.5)),
    ),
    "chained-ends": (
        chained(lambda o: theirs.ConstantLR(o, 0.3, 6), lambda o: theirs.PolynomialLR(o, 50, 0.5)),
        s.product(s.Constant(0.3, steps=6).then(s.Constant()), s.Polynomial(50, 0.5)),
    ),
}  # fmt: skip

# What is sampled: with total_steps only.
SAMPLED: dict[str, Make] = {
    "lambda": lambda o: theirs.LambdaLR(o, lambda t: 0.9 ** math.sqrt(t)),
    "multiplicative": lambda o: theirs.MultiplicativeLR(o, lambda t: 1 - 1 / (t + 1)),
    "cyclic-scale": lambda o: theirs.CyclicLR(o, 0.01, 0.3, 7, scale_fn=lambda i: 1 / i, scale_mode="cycle"),
    "cyclic-iterations": lambda o: theirs.CyclicLR(
        o, 0.01, 0.3, 7, scale_fn=lambda t: 0.99**t, scale_mode="iterations", cycle_momentum=False
    ),
    "cyclic-fraction": lambda o: theirs.CyclicLR(o, 0.01, 0.3, 2.5, 3.25),
    "cyclic-grows": lambda o: theirs.CyclicLR(o, 0.01, 0.3, 7, mode="exp_range", gamma=1.01, cycle_momentum=False),
    "cosine-rises": lambda o: theirs.CosineAnnealingLR(o, 20, eta_min=0.5),
    "restarts-rise": lambda o: theirs.CosineAnnealingWarmRestarts(o, 5, 1, 0.3),
    "lambda-tensor": lambda o: theirs.LambdaLR(o, lambda t: torch.tensor(0.5, dtype=torch.float64) ** t),
    "chained-cosine": chained(LINEAR, COSINE),
    "chained-over": chained(
        lambda o: theirs.ExponentialLR(o, 0.97), lambda o: theirs.LambdaLR(o, lambda t: 1 / (t + 1))
    ),
    "sequential-lambda": sequence(LINEAR, lambda o: theirs.LambdaLR(o, lambda t: 1 / (t + 1)), at=[5]),
    "sequential-multiplicative": sequence(LINEAR, lambda o: theirs.MultiplicativeLR(o, lambda t: 0.9), at=[5]),
    "sequential-chained": sequence(chained(LINEAR, COSINE), COSINE, at=[11]),
    "nested": sequence(sequence(LINEAR, COSINE, at=[5]), LINEAR, at=[30]),
}  # fmt: skip


def oracle(make: Make, steps: int, o: torch.optim.Optimizer | None = None) -> tuple[Any, list[float]]:
    """A scheduler that has gone so many steps, and the lr that it gave before each."""
    o = o or optimizer()
    scheduler = make(o)
    lrs = []
    for _ in range(steps):
        lrs.append(float(o.param_groups[0]["lr"]))
        o.step()
        scheduler.step()
    return scheduler, lrs


def curve(schedule: Schedule, base: float, steps: int) -> list[float]:
    rows = schedule.rows(base)
    return [value(rows, t) for t in range(steps)]


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name: str) -> None:
    make, expected = CLOSED[name]
    scheduler, lrs = oracle(make, 500)
    got = from_torch(scheduler)
    assert got == expected
    base = scheduler.base_lrs[0] if hasattr(scheduler, "base_lrs") else BASE
    # torch multiplies 500 times, each rounding by 1e-16, and next to zero its 1 + cos(x) leaves 1e-16 of the base;
    # CosineAnnealingLR goes on from what it left there.
    assert curve(got, base, 500) == pytest.approx(lrs, rel=3e-12, abs=3e-15 * max(lrs))


ONE_CYCLES = [
    {"total_steps": 101, "pct_start": 0.333},
    {"total_steps": 100, "anneal_strategy": "linear"},
    {"total_steps": 60, "three_phase": True, "div_factor": 7.0, "final_div_factor": 30.0},
    {"total_steps": 60, "three_phase": True, "pct_start": 0.7, "anneal_strategy": "linear"},
    {"total_steps": 60, "pct_start": 0.0},
    {"epochs": 5, "steps_per_epoch": 7, "cycle_momentum": True, "base_momentum": 0.5, "max_momentum": 0.9},
    {"total_steps": 101, "pct_start": 1 / 3, "cycle_momentum": True, "three_phase": True},
]


@pytest.mark.parametrize("arguments", ONE_CYCLES, ids=str)
def test_one_cycle_and_its_momentum(arguments: dict[str, Any]) -> None:
    arguments = {"cycle_momentum": False} | arguments
    o = optimizer()
    scheduler = theirs.OneCycleLR(o, 0.7, **arguments)
    schedule = from_torch(scheduler)
    assert schedule.cycle_momentum == arguments["cycle_momentum"]
    total = scheduler.total_steps
    for t in range(total):
        # Near the end torch's 1 + cos(x) is off by 1e-16 of the top.
        assert schedule(t, 123.0) == pytest.approx(o.param_groups[0]["lr"], rel=1e-12, abs=1e-16), t
        if schedule.cycle_momentum:
            assert schedule.momentum_schedule()(t, 0.3) == pytest.approx(o.param_groups[0]["momentum"], rel=1e-12), t
        o.step()
        if t + 1 < total:
            scheduler.step()
    assert schedule(10 * total, 1.0) == schedule(total - 1, 1.0)  # torch raises there


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_the_momentum_of_cyclic(mode: str) -> None:
    o = optimizer()
    scheduler = theirs.CyclicLR(o, 0.01, 0.3, 7, 4, mode, 0.98, base_momentum=0.5, max_momentum=0.9)
    momentum = from_torch(scheduler).momentum_schedule()
    assert momentum is not None
    for t in range(200):
        assert momentum(t, 0.3) == pytest.approx(o.param_groups[0]["momentum"], rel=1e-12), t
        o.step()
        scheduler.step()


@pytest.mark.parametrize("name", SAMPLED)
def test_what_has_no_closed_form_is_sampled(name: str) -> None:
    scheduler, lrs = oracle(SAMPLED[name], 60)
    with pytest.raises(ValueError, match="total_steps must be given"):
        from_torch(scheduler)
    schedule = from_torch(scheduler, 60)
    base = scheduler.base_lrs[0] if hasattr(scheduler, "base_lrs") else BASE
    assert curve(schedule, base, 60) == pytest.approx(lrs, rel=1e-13, abs=1e-18)
    assert schedule(10**6, base) == schedule(59, base)


def test_a_part_of_a_sequence_that_ends_needs_no_total() -> None:
    make = sequence(lambda o: theirs.LambdaLR(o, lambda t: (t + 1) / 5), COSINE, at=[5])
    scheduler, lrs = oracle(make, 50)
    assert curve(from_torch(scheduler), BASE, 50) == pytest.approx(lrs, rel=1e-12, abs=1e-16)


def test_a_scheduler_of_ones_own_is_sampled() -> None:
    class Square(theirs.LRScheduler):
        def get_lr(self) -> list[Any]:
            return [base / (1 + self.last_epoch) ** 2 for base in self.base_lrs]

    scheduler, lrs = oracle(Square, 30)
    assert curve(from_torch(scheduler, 30), BASE, 30) == pytest.approx(lrs, rel=1e-14)

    class Halved(theirs.StepLR):  # a subclass is not taken for its parent
        def get_lr(self) -> list[Any]:
            return [base / 2 for base in self.base_lrs]

    assert from_torch(Halved(optimizer(), 3), 5) == s.Table([0.5] * 5)


def test_the_scheduler_is_left_as_it_is() -> None:
    o = optimizer()
    scheduler = chained(LINEAR, COSINE)(o)
    for _ in range(7):
        o.step()
        scheduler.step()
    before, groups = copy.deepcopy(scheduler.state_dict()), copy.deepcopy(o.state_dict()["param_groups"])
    schedule = from_torch(scheduler, 40)
    assert scheduler.state_dict() == before
    assert o.state_dict()["param_groups"] == groups
    assert from_torch(chained(LINEAR, COSINE)(optimizer()), 40) == schedule


def test_groups() -> None:
    o = optimizer(0.1, 0.5)
    scheduler = theirs.LambdaLR(o, [lambda t: 1.0, lambda t: 1 / (t + 1)])
    assert from_torch(scheduler, 3, group=1) == s.Table([1.0, 0.5, 1 / 3])
    assert from_torch(scheduler, 3) == s.Table([1.0] * 3)
    cycles = theirs.OneCycleLR(optimizer(0.1, 0.1), [0.3, 0.6], 10, cycle_momentum=False)
    assert [from_torch(cycles, group=g).max_lr for g in (0, 1)] == [0.3, 0.6]
    assert from_torch(chained(LINEAR, COSINE)(optimizer(0.1, 0.5)), 30, group=1)(10, 0.5) > 0.2


def plateau() -> Any:
    return theirs.ReduceLROnPlateau(optimizer())


def nan_lambda() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs.LambdaLR(optimizer(), lambda t: math.nan)


@pytest.mark.parametrize(
    "act, error, message",
    [
        (lambda: from_torch(plateau()), ValueError, "use fusedlr.schedules.Plateau"),
        (lambda: from_torch(s.Constant()), TypeError, r"scheduler must be a torch.*got Constant\(\)"),
        (lambda: from_torch(COSINE(optimizer()), 0), ValueError, "total_steps must be an integer >= 1"),
        (lambda: from_torch(COSINE(optimizer()), 9.5), TypeError, "total_steps must be an integer"),
        (lambda: from_torch(COSINE(optimizer()), group=1), ValueError, "group must be below the number.* 1, but got 1"),
        (lambda: from_torch(nan_lambda(), 3), ValueError, r"fn\(0\) must be a finite number >= 0, but got nan"),
        (
            lambda: from_torch(theirs.LambdaLR(optimizer(), lambda t: 1 - t), 5),
            ValueError,
            r"fn\(2\) must be a finite number >= 0, but got -1",
        ),
        (
            lambda: from_torch(chained(LINEAR, COSINE)(optimizer(0.0)), 5),
            ValueError,
            "the lr of group 0 must be > 0 .*got 0.0",
        ),
    ],
)
def test_bad_input(act: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


def test_every_scheduler_of_torch_is_covered() -> None:
    known = {type(CLOSED[name][0](optimizer())).__name__ for name in CLOSED}
    known |= {type(make(optimizer())).__name__ for make in SAMPLED.values()}
    known |= {"OneCycleLR", "ReduceLROnPlateau", "LRScheduler", "_LRScheduler"}
    public = {
        name for name, cls in vars(theirs).items() if isinstance(cls, type) and issubclass(cls, theirs.LRScheduler)
    }
    assert public <= known


def test_the_facade_of_our_own_optimizer_is_no_curve() -> None:
    ours = fusedlr.SGD([torch.zeros(1)], lr=BASE, schedule=s.Cosine(9))
    with pytest.raises(ValueError, match=r"facade of a fusedlr optimizer.*\['schedule'\]"):
        from_torch(ours.lr_scheduler(), 5)
    assert from_torch(theirs.StepLR(fusedlr.SGD([torch.zeros(1)], lr=BASE), 3)) == s.StepDecay(3, 0.1)
