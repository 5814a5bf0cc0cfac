"""Schedules of every scalar, as a step uses them: beta2, and momenta that cycle with the lr, on both backends."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import BACKENDS
from training import CLOSE, assert_same_model, gradients, make_model, split_groups, train

import fusedlr
from fusedlr import schedules as s

MOVED = {
    "lr": s.product(s.Warmup(3), s.StepDecay(4, 0.5)),
    "weight_decay": s.per_epoch(s.Linear(3, 1.0, 0.0), 2),
    "beta1": s.CosineRestarts(3, min_lr=0.5),
    "beta2": s.Linear(6, 0.9, 1.0),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_scalars_of_adamw_move(backend: str, seed: int) -> None:
    steps = 9
    model = make_model()
    other = copy.deepcopy(model)
    second = {"lr": 0.02, "schedule": {"beta2": s.Cosine(5, min_lr=0.5), "lr": s.Cyclic(0.01, 0.1, 2, 3)}}
    optimizer = fusedlr.AdamW(
        split_groups(model, **second), lr=0.1, weight_decay=0.3, schedule=MOVED, clip=2.0, backend=backend
    )
    oracle = torch.optim.AdamW(split_groups(other), lr=0.1, weight_decay=0.3)
    for t in range(steps):
        for group, moved, base in zip(oracle.param_groups, (MOVED, second["schedule"]), (0.1, 0.02), strict=True):
            values = {name: schedule(t, {"lr": base, "weight_decay": 0.3, "beta1": 0.9, "beta2": 0.999}[name])
                      for name, schedule in moved.items()}  # fmt: skip
            group["lr"] = values["lr"]
            group["weight_decay"] = values.get("weight_decay", 0.3)
            # torch's bias correction 1 - beta**t takes the beta of the step, as ours does.
            group["betas"] = (values.get("beta1", 0.9), values["beta2"])
        gradients(model, t)
        gradients(other, t)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 2.0)
        optimizer.step()
        oracle.step()
        for ours, theirs in zip(optimizer.param_groups, oracle.param_groups, strict=True):
            assert ours["betas"] == pytest.approx(theirs["betas"], rel=1e-15, abs=0)
            for name in ("lr", "weight_decay"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-15, abs=0)
    assert_same_model(model, other, **CLOSE)


CYCLES = {
    "one": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, 12, base_momentum=0.6, max_momentum=0.9),
    "many": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.3, 3, base_momentum=0.6, max_momentum=0.9),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_the_momentum_cycles_as_in_torch(name: str, cycle: str, backend: str, seed: int) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    arguments: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    oracle = getattr(torch.optim, name)(other.parameters(), lr=0.1, **arguments)
    scheduler = CYCLES[cycle](oracle)
    optimizer = getattr(fusedlr, name)(
        model.parameters(), lr=0.1, schedule=s.from_torch(scheduler), backend=backend, **arguments
    )
    for t in range(10):
        train(model, optimizer, range(t, t + 1))
        train(other, oracle, range(t, t + 1))
        for key in ("lr", "momentum" if name == "SGD" else "betas"):
            assert optimizer.param_groups[0][key] == pytest.approx(oracle.param_groups[0][key], rel=1e-12), (t, key)
        scheduler.step()
    assert_same_model(model, other, **CLOSE)


def test_a_cycle_inside_a_dict_or_a_chain_drives_the_momentum_too() -> None:
    cycle = s.OneCycle(0.3, 10, cycle_momentum=True)
    p = torch.nn.Parameter(torch.ones(2))
    for schedule in ({"lr": cycle, "weight_decay": s.Constant()}, s.Warmup(1).then(cycle), cycle.for_steps(5)):
        optimizer = fusedlr.AdamW([p], lr=0.1, betas=(0.7, 0.99), schedule=schedule)
        seen = []
        for _ in range(4):
            p.grad = torch.ones(2)
            optimizer.step()
            seen.append(optimizer.param_groups[0]["betas"][0])
        start = [0.7] if isinstance(schedule, s.Chain) else []  # the warm-up leaves beta1 at its base
        expected = start + [cycle.momentum_schedule()(t, 1.0) for t in range(4)]  # type: ignore[union-attr]
        assert seen == pytest.approx(expected[:4], rel=1e-15, abs=0)


def test_what_composes_a_cycle_composes_its_momentum() -> None:
    cycle = s.Cyclic(0.1, 0.3, 2, cycle_momentum=True)
    momentum = cycle.momentum_schedule()
    assert momentum is not None
    assert s.per_epoch(cycle, 3).momentum_schedule() == s.per_epoch(momentum, 3)
    assert s.product(s.Warmup(3), cycle).momentum_schedule() == momentum
    assert s.product(cycle, s.Warmup(3)).momentum_schedule() == momentum
    chain = cycle.for_steps(7).then(s.Cosine(5))
    assert chain.momentum_schedule() == momentum.for_steps(7).then(s.Constant(steps=5))
    assert s.Cyclic(0.1, 0.3, 2).momentum_schedule() is None
    assert s.Warmup(3).then(s.Cosine(3)).momentum_schedule() is None


@pytest.mark.parametrize(
    "schedule, message",
    [
        (
            {"lr": s.OneCycle(0.3, 10, cycle_momentum=True), "momentum": s.Constant()},
            r"schedule\['momentum'\] and cycle_momentum=True of schedule\['lr'\] both drive momentum",
        ),
        ({"beta2": s.Constant()}, "unknown scalar 'beta2'"),
        ({"nesterov": s.Constant()}, "unknown scalar 'nesterov'"),
    ],
)
def test_two_alternatives_are_refused(schedule: Any, message: str) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        fusedlr.SGD([p], lr=0.1, momentum=0.9, schedule=schedule)


def test_a_cycle_needs_a_momentum() -> None:
    from fusedlr.groups import as_schedules

    with pytest.raises(ValueError, match="needs an optimizer with a momentum or beta1, but this one has"):
        as_schedules(s.OneCycle(0.3, 10, cycle_momentum=True), ("lr", "weight_decay"), None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_a_beta_of_1_or_more_is_refused_before_anything_changes(name: str, backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = fusedlr.AdamW([p], betas=(0.5, 0.5), schedule={name: s.Table([1.0, 1.9, 2.0])}, backend=backend)
    for _ in range(2):
        p.grad = torch.ones(5)
        optimizer.step()
    before = copy.deepcopy([p.detach(), optimizer.state[p], optimizer.steps_taken, optimizer.param_groups[0]["betas"]])
    p.grad = torch.ones(5)
    with pytest.raises(ValueError, match=rf"schedule\['{name}'\] gives 1\.0 at step 2, but a beta must be in \[0, 1\)"):
        optimizer.step()
    after = [p.detach(), optimizer.state[p], optimizer.steps_taken, optimizer.param_groups[0]["betas"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_beta_that_no_step_takes_is_nobodys_error() -> None:
    """Behind the last step, and in a group without gradients."""
    p, idle = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [p], "schedule": {"beta2": s.Linear(10, 1.0, 2.0)}},
              {"params": [idle], "schedule": {"beta1": s.Table([1.0, 2.0])}}]  # fmt: skip
    optimizer = fusedlr.AdamW(groups, lr=0.1, betas=(0.5, 0.5))
    for _ in range(10):
        p.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.param_groups[0]["betas"][1] == pytest.approx(0.95, rel=1e-15, abs=0)
    assert optimizer.next_lr() == optimizer.last_lr == optimizer.lr_scheduler().get_last_lr() == [0.1, 0.1]
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"gives 1\.0 at step 10"):
        optimizer.step()
