"""TimeDecay with a clock that tests set: exact arithmetic, what counts as training time, and what keeps it."""

from __future__ import annotations

import copy
import pickle
import random
import time
from typing import Any

import pytest
import torch
from cases import BACKENDS
from mpmath import mpf
from training import through_file

import fusedlr
from fusedlr import schedules as s
from fusedlr.schedules.expression import parse


class Clock:
    """Seconds that a test sets."""

    def __init__(self, now: float = 1e6) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def now() -> float:
    """A clock that is pickled by its name."""
    return CLOCK.now


def make(schedule: s.Schedule, backend: str = "torch", **options: Any) -> Any:
    return fusedlr.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.5, schedule=schedule, backend=backend, **options)


def step(optimizer: torch.optim.Optimizer) -> float:
    """Take a step with gradients of one; what the parameter was lowered by."""
    p = optimizer.param_groups[0]["params"][0]
    p.data.zero_()
    p.grad = torch.ones_like(p)
    optimizer.step()
    return -float(p.detach()[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unit, seconds", [("seconds", 1), ("minutes", 60), ("hours", 3600)])
def test_exact(unit: str, seconds: int, backend: str) -> None:
    clock, generator = Clock(), random.Random(1)
    schedule = s.TimeDecay(0.3, unit, clock)
    optimizer = make(schedule, backend)
    begin = clock.now
    for _ in range(12):
        used = step(optimizer)
        elapsed = (mpf(clock.now) - mpf(begin)) / seconds
        exact = mpf(0.5) / (1 + mpf(0.3) * elapsed)
        # 1e6 seconds of float64 hold 1e-10 of a second; the parameter is float32 (6e-8).
        assert abs(optimizer.last_lr[0] - exact) <= 1e-9 * exact
        assert abs(used - exact) <= 1e-6 * exact
        assert abs(schedule(float(elapsed), 0.5) - exact) <= 1e-15 * exact
        clock.now += generator.choice([1e-3, 0.1, 1.0, 100.0, 1e5])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["state_dict", "file", "pickle", "deepcopy"])
def test_a_pause_between_save_and_load_does_not_count(how: str, backend: str) -> None:
    CLOCK.now = 5.0
    optimizer = make(s.TimeDecay(1.0, clock=now), backend)
    CLOCK.now += 1000.0  # before the first step no time passes
    assert step(optimizer) == 0.5
    CLOCK.now += 1.0
    assert step(optimizer) == 0.25
    if how == "pickle":
        data = pickle.dumps(optimizer)
        CLOCK.now += 1000.0
        other = pickle.loads(data)
    elif how == "deepcopy":
        other = copy.deepcopy(optimizer)
        CLOCK.now += 1000.0
    else:
        saved = optimizer.state_dict()
        assert saved["param_groups"][0]["fusedlr"]["live"] == {"lr": {"elapsed": 1.0}}
        CLOCK.now += 1000.0
        other = make(s.TimeDecay(1.0, clock=now), backend)
        other.load_state_dict(through_file(saved) if how == "file" else saved)
    assert step(other) == 0.25
    CLOCK.now += 2.0
    assert step(other) == 0.125


@pytest.mark.parametrize("backend", BACKENDS)
def test_composed(backend: str) -> None:
    clock = Clock(0.0)
    decay = s.TimeDecay(1.0, clock=clock)
    for schedule, expected in [
        (s.Constant(1.0, steps=2).then(decay), [0.5, 0.5, 0.5, 0.25, 0.5 / 3, 0.125]),
        (s.product(s.Linear(4, 1.0, 0.0), decay), [0.5, 0.1875, 0.25 / 3, 0.03125, 0.0, 0.0]),
        (decay.for_steps(2), [0.5, 0.25, 0.5 / 3, 0.5 / 3, 0.5 / 3, 0.5 / 3]),
        (decay.for_steps(2).then(s.Constant(0.5)), [0.5, 0.25, 0.25, 0.25, 0.25, 0.25]),
        (s.per_epoch(s.Constant(0.5, steps=1).then(decay), 2), [0.25, 0.25, 0.5, 0.25, 0.5 / 3, 0.125]),
    ]:
        optimizer = make(schedule, backend)
        used = []
        for _ in expected:
            used.append(step(optimizer))
            clock.now += 1.0
        assert used == pytest.approx(expected, rel=1e-6), schedule


@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_a_plateau_of_another_scalar(backend: str) -> None:
    """One table holds both numbers: sending the one leaves the other as it is."""
    clock = Clock()
    schedule = {"lr": s.TimeDecay(1.0, clock=clock), "weight_decay": s.Plateau(factor=0.5, patience=0)}
    optimizer = make(schedule, backend, weight_decay=0.5)  # type: ignore[arg-type]
    p = optimizer.param_groups[0]["params"][0]
    for t in range(4):
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        decay = 0.5 * 0.5 ** max(t - 1, 0)
        assert float(p.detach()[0]) == pytest.approx(1.0 - 0.5 / (1 + t) * decay, rel=1e-6)
        optimizer.report(1.0)
        clock.now += 1.0


def test_a_group_added_later_loses_no_time() -> None:
    clock = Clock()
    optimizer = make(s.TimeDecay(1.0, clock=clock))
    step(optimizer)
    clock.now += 1.0
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert step(optimizer) == 0.25


def test_a_clock_that_runs_backwards_adds_nothing_and_one_that_gives_no_number_is_an_error() -> None:
    clock = Clock()
    optimizer = make(s.TimeDecay(1.0, clock=clock))
    step(optimizer)
    clock.now -= 10.0
    assert step(optimizer) == 0.5
    clock.now = "noon"  # type: ignore[assignment]
    before = optimizer.state_dict()["param_groups"]
    with pytest.raises(TypeError, match=r"the clock of TimeDecay\(1.0, .*must give finite seconds, but gave 'noon'"):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"] == before


def test_a_hidden_step_does_not_start_the_clock() -> None:
    """torch.distributed.checkpoint creates the state of an optimizer by a step with lr 0."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    clock = Clock()
    model = torch.nn.Linear(2, 2)
    optimizer = fusedlr.Adam(model.parameters(), lr=0.5, schedule=s.TimeDecay(1.0, clock=clock))
    get_optimizer_state_dict(model, optimizer)
    clock.now += 1000.0
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    assert optimizer.last_lr == [0.5]


def test_a_value() -> None:
    schedule = s.TimeDecay(0.1, "hours")
    assert repr(schedule) == "TimeDecay(0.1, unit='hours')"
    assert repr(s.TimeDecay(0.1, clock=time.perf_counter)) == "TimeDecay(0.1, clock=time.perf_counter)"
    for same in (schedule, s.TimeDecay(0.1, clock=time.perf_counter)):
        assert eval(repr(same), {**vars(s), "time": time}) == same == pickle.loads(pickle.dumps(same))
    assert schedule != s.TimeDecay(0.1) != s.TimeDecay(0.1, clock=time.perf_counter)
    assert parse(repr(schedule)) == schedule
    assert parse("Warmup(100).then(Plateau(factor=0.5, min_lr=[0.1, 0.2]))") == s.Warmup(100).then(
        s.Plateau(factor=0.5, min_lr=(0.1, 0.2))
    )
    assert schedule(2.5, 0.5) == 0.4
    assert s.Constant(1.0, steps=1).then(schedule)(100, 0.5) == 0.5
    anonymous = s.TimeDecay(0.1, clock=lambda: 0.0)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(anonymous)


def test_its_picture_is_over_time() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = s.TimeDecay(1.0, "minutes").plot(5)
    try:
        assert axes.get_xlabel() == "minutes"
        assert list(axes.lines[0].get_ydata()) == [1 / (1 + t) for t in range(5)]  # type: ignore[union-attr, arg-type]
    finally:
        pyplot.close("all")
