"""Learning rates: torch's schedulers on fusedlr, schedules inside the step, outside writes, and the facade."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS, BY_NAME, clip_by_hand
from executors import backend_of, executor  # noqa: F401  # a fixture
from torch import nn
from torch.optim import lr_scheduler
from training import CLOSE, COSINE, assert_same_model, gradients, make_model, split_groups, train

import fusedlr
from fusedlr import clipping, schedules

STEPS = 8

# With eps=0 the interpreter divides 0 by 0 in lanes that are masked off.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

# ---- torch's schedulers ------------------------------------------------------------------------------------------

Make = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Make] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: t / 4),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.7)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
}


@pytest.mark.parametrize("lr", [0.05, "tensor"], ids=["float", "tensor"])
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-default"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_torchs_schedulers_work_as_with_torch(scheduler: str, name: str, lr: Any, seed: int) -> None:
    case = BY_NAME[name]
    model = make_model()
    other = copy.deepcopy(model)

    def build(kind: Any, m: nn.Module, **own: Any) -> Any:
        kwargs = {**case.kwargs, "lr": torch.tensor(0.05) if lr == "tensor" else lr}
        optimizer = kind(split_groups(m, weight_decay=0.1), **kwargs, **own)
        return optimizer, SCHEDULERS[scheduler](optimizer)

    (optimizer, ours), (oracle, theirs) = build(case.fused, model), build(case.oracle, other, foreach=False)
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
        for s in (ours, theirs):
            s.step(1.0) if scheduler == "ReduceLROnPlateau" else s.step()
        for group, expected in zip(optimizer.param_groups, oracle.param_groups, strict=True):
            assert float(group["lr"]) == float(expected["lr"])
            assert group.get("momentum") == expected.get("momentum")
            assert group.get("betas") == expected.get("betas")
    assert ours.get_last_lr() == theirs.get_last_lr()
    assert_same_model(model, other, **CLOSE)


def test_a_torch_scheduler_overrides_a_schedule(seed: int) -> None:
    """Both at once is no sensible program; the write from outside rules, as for every other write."""
    model = make_model()
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1, schedule=schedules.Constant())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        assert optimizer.last_lr == [0.1 * 0.5**step]
        scheduler.step()


# ---- group["lr"] -------------------------------------------------------------------------------------------------


def number(value: float, kind: str) -> Any:
    return torch.tensor(value, dtype=torch.float64) if kind == "tensor" else value


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_group_shows_the_lr_of_the_last_step(backend: str, kind: str, seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.SGD(split_groups(model), lr=number(0.1, kind), schedule=COSINE, backend=backend)
    assert optimizer.last_lr == [0.1, 0.1]
    for step in range(5):
        assert optimizer.next_lr() == [COSINE(step, 0.1)] * 2
        train(model, optimizer, range(step, step + 1))
        assert optimizer.last_lr == [COSINE(step, 0.1)] * 2
        assert [float(group["lr"]) for group in optimizer.param_groups] == [COSINE(step, 0.1)] * 2
        assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert optimizer.steps_taken == 5


def test_initial_lr_is_set_only_where_there_is_a_schedule(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.SGD(split_groups(model, schedule=COSINE), lr=0.1)
    assert "initial_lr" not in optimizer.param_groups[0]
    assert optimizer.param_groups[1]["initial_lr"] == 0.1


@pytest.mark.parametrize("kind", ["float", "tensor", "replaced tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outside_write_rules_until_it_is_set_back(backend: str, kind: str, seed: int) -> None:
    model = make_model()
    lr = number(0.1, "tensor" if "tensor" in kind else kind)
    optimizer = fusedlr.SGD(model.parameters(), lr=lr, schedule=COSINE, backend=backend)
    group = optimizer.param_groups[0]

    def write(value: float) -> None:
        if kind == "tensor":
            group["lr"].fill_(value)
        else:
            group["lr"] = number(value, kind.split()[-1])

    before = model.first.weight.detach().clone()
    write(0.7)  # before the first step
    train(model, optimizer, range(1))
    assert optimizer.last_lr == [0.7]
    grad = model.first.weight.grad
    torch.testing.assert_close(model.first.weight.detach(), before - 0.7 * grad, rtol=1e-6, atol=1e-6)
    train(model, optimizer, range(1, 2))
    assert optimizer.last_lr == [0.7], "an override lasts"
    write(0.1)  # what fusedlr last wrote: the base, at construction
    train(model, optimizer, range(2, 3))
    assert optimizer.last_lr == [COSINE(2, 0.1)], "the schedule went on counting"
    shown = float(group["lr"])
    write(0.0)
    train(model, optimizer, range(3, 4))
    assert optimizer.last_lr == [0.0]
    write(shown)
    train(model, optimizer, range(4, 5))
    assert optimizer.last_lr == [COSINE(4, 0.1)]


def test_a_first_step_at_lr_0_counts_where_the_schedule_says_so(seed: int) -> None:
    model = make_model()
    warmup = schedules.Warmup(4, offset=0)
    optimizer = fusedlr.Adam(model.parameters(), lr=0.1, schedule=warmup)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(1))
    assert optimizer.last_lr == [0.0]
    assert optimizer.steps_taken == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    train(model, optimizer, range(1, 2))
    assert optimizer.last_lr == [0.025]


def test_the_tensor_given_to_all_groups_is_scheduled_in_each(seed: int) -> None:
    """torch hands the same tensor to every group; each must show the lr of its own schedule."""
    model = make_model()
    lr = torch.tensor(0.1, dtype=torch.float64)
    groups = split_groups(model, schedule=schedules.Constant(0.5))
    optimizer = fusedlr.SGD(groups, lr=lr, schedule=COSINE)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        assert optimizer.last_lr == [COSINE(step, 0.1), 0.05]


def test_a_changed_base_rules_from_the_next_step(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1, schedule=COSINE)
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["initial_lr"] = 0.4
    train(model, optimizer, range(2, 3))
    assert optimizer.last_lr == [COSINE(2, 0.4)]


# ---- schedules in the step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-default"])
def test_a_schedule_is_the_lr_set_by_hand(name: str, backend: str, seed: int) -> None:
    case = BY_NAME[name]
    model = make_model()
    other = copy.deepcopy(model)
    decay = schedules.ExponentialDecay(0.2)
    optimizer = case.fused(
        split_groups(model, lr=0.05, schedule=decay), **case.kwargs, schedule=COSINE, backend=backend
    )
    oracle = case.oracle(split_groups(other, lr=0.05), **case.kwargs, foreach=False)
    for step in range(STEPS):
        oracle.param_groups[0]["lr"] = COSINE(step, case.lr)
        oracle.param_groups[1]["lr"] = decay(step, 0.05)
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
    assert_same_model(model, other, **CLOSE)


RISE = schedules.Linear(4, 0.0, 1.0)
FALL = schedules.Linear(6, 1.0, 0.25)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name, scheduled",
    [
        ("adamw-default", {"lr": COSINE, "weight_decay": FALL}),
        ("adamw-default", {"beta1": FALL}),
        ("adamw-default", {"beta2": FALL, "eps": RISE}),
        ("adam-decay", {"weight_decay": RISE}),
        ("sgd-momentum", {"momentum": FALL, "lr": FALL}),
        ("sgd-momentum", {"momentum": RISE}),
        ("sgd-dampening", {"dampening": FALL, "weight_decay": RISE}),
        ("adamw-default", {"lr": COSINE, "max_norm": FALL}),
        ("sgd-plain", {"max_norm": FALL}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_other_scalars_are_scheduled(name: str, scheduled: dict[str, Any], backend: str, seed: int) -> None:
    """The same as the values set by hand before each step of torch.optim.

    A momentum that passes through 0 keeps its buffer; torch would make none, so there it passes through 1e-30.
    """
    case = BY_NAME[name]
    kwargs = {**case.kwargs, "eps": 0.01} if "adam" in name else case.kwargs
    clip = clipping.GlobalNorm(2.0) if "max_norm" in scheduled else None
    model = make_model()
    other = copy.deepcopy(model)
    optimizer = case.fused(model.parameters(), **kwargs, schedule=scheduled, clip=clip, backend=backend)
    oracle = case.oracle(other.parameters(), **kwargs, foreach=False)
    group = oracle.param_groups[0]
    base = dict(group)
    for step in range(6):
        gradients(other, step)
        betas = list(base.get("betas", ()))
        for scalar, schedule in scheduled.items():
            if scalar == "max_norm":
                clip_by_hand(clipping.GlobalNorm(schedule(step, 2.0)), list(other.parameters()))
            elif scalar in ("beta1", "beta2"):
                betas[int(scalar[-1]) - 1] = schedule(step, base["betas"][int(scalar[-1]) - 1])
                group["betas"] = tuple(betas)
            else:
                group[scalar] = schedule(step, base[scalar]) or (1e-30 if scalar == "momentum" else 0.0)
        oracle.step()
        train(model, optimizer, range(step, step + 1))
        for scalar in set(scheduled) - {"max_norm", "beta1", "beta2"}:
            assert optimizer.param_groups[0][scalar] == pytest.approx(group[scalar], rel=0, abs=1e-30)
        if "betas" in group:
            assert optimizer.param_groups[0]["betas"] == group["betas"]
    assert_same_model(model, other, **CLOSE)


@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("cls", [fusedlr.SGD, fusedlr.LARS])
def test_a_step_with_a_momentum_of_0_has_no_dampening(cls: Any, clip: float | None, executor: str) -> None:  # noqa: F811
    """It is that of an optimizer without momentum, as in torch; the buffer then holds the gradient."""
    p = torch.nn.Parameter(torch.ones(5))
    options = {"lr": 0.1, "clip": clip, "backend": backend_of(executor)}
    schedule = {"momentum": schedules.Table([1.0, 0.0])}
    optimizer = cls([p], momentum=0.9, dampening=0.5, schedule=schedule, **options)
    p.grad = torch.linspace(0.5, 1.5, 5)
    optimizer.step()
    if cls is fusedlr.SGD:
        optimizer.state[p]["momentum_buffer"][0] = torch.inf  # of which 0 times is nothing
    q = torch.nn.Parameter(p.detach().clone())
    before = p.detach().clone()
    p.grad = q.grad = torch.linspace(2.0, 1.0, 5)
    optimizer.step()
    cls([q], **options).step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], (before - p.detach()) / 0.1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [fusedlr.SGD, fusedlr.RMSprop])
def test_a_momentum_in_a_tensor(cls: Any) -> None:
    outcomes = []
    for momentum in (0.9, torch.tensor(0.9)):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = cls([p], lr=0.1, momentum=momentum)
        for _ in range(2):
            p.grad = torch.ones(3)
            optimizer.step()
        outcomes.append(p.detach())
    torch.testing.assert_close(*outcomes)


def test_an_override_of_another_scalar(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), weight_decay=0.4, schedule={"weight_decay": FALL})
    group = optimizer.param_groups[0]
    train(model, optimizer, range(2))
    shown = group["weight_decay"]
    assert shown == FALL(1, 0.4)
    group["weight_decay"] = 0.9
    train(model, optimizer, range(2, 3))
    assert group["weight_decay"] == 0.9
    group["weight_decay"] = shown
    train(model, optimizer, range(3, 4))
    assert group["weight_decay"] == FALL(3, 0.4)


# ---- the facade --------------------------------------------------------------------------------------------------


def test_the_facade_is_a_scheduler_that_only_counts(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, schedule=COSINE)
    scheduler = optimizer.lr_scheduler()
    assert isinstance(scheduler, lr_scheduler.LRScheduler)
    assert scheduler.optimizer is optimizer
    assert scheduler.get_last_lr() == [COSINE(0, 0.1)]
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        assert scheduler.get_last_lr() == [COSINE(step, 0.1)] == optimizer.last_lr
        scheduler.step()
        assert scheduler.get_last_lr() == [COSINE(step + 1, 0.1)]
        assert scheduler.last_epoch == step + 1
    for _ in range(3):
        scheduler.step()
    assert optimizer.next_lr() == [COSINE(5, 0.1)], "step() of the facade moves no clock"


def test_a_facade_that_comes_later_shows_the_lr_of_the_last_step(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, schedule=COSINE)
    train(model, optimizer, range(3))
    scheduler = optimizer.lr_scheduler()
    assert scheduler.get_last_lr() == scheduler._last_lr == [COSINE(2, 0.1)]
    scheduler.step()
    assert scheduler.get_last_lr() == scheduler._last_lr == [COSINE(3, 0.1)]


def test_torchs_sequential_scheduler_may_hold_the_facade(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, schedule=COSINE)
    facade = optimizer.lr_scheduler()
    facade._last_lr = [7.0]  # as torch's schedulers do to one another at a handover
    train(model, optimizer, range(2))
    assert facade._last_lr == optimizer.last_lr == [COSINE(1, 0.1)]


def test_the_facade_goes_through_a_checkpoint(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, schedule=COSINE)
    scheduler = optimizer.lr_scheduler()
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    loaded = fusedlr.AdamW(make_model().parameters(), lr=0.1, schedule=COSINE)
    other = loaded.lr_scheduler()
    loaded.load_state_dict(optimizer.state_dict())
    other.load_state_dict(scheduler.state_dict())
    assert other.get_last_lr() == scheduler.get_last_lr() == [COSINE(3, 0.1)]
    assert other.last_epoch == 3


def test_the_facade_without_a_schedule_shows_the_groups_lr(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1)
    scheduler = optimizer.lr_scheduler()
    train(model, optimizer, range(1))
    scheduler.step()
    assert scheduler.get_last_lr() == [0.1]
    assert "initial_lr" not in optimizer.param_groups[0]
