"""Checkpoints that others handle: hooks that rewrite them, torch.optim in between, and those that cannot be loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedlr
from fusedlr import schedules

LIBRARIES = [fusedlr, torch.optim]


def stepped(optimizer: torch.optim.Optimizer, steps: int, value: float = 1.0) -> None:
    for i in range(steps):
        for group in optimizer.param_groups:
            for j, p in enumerate(group["params"]):
                p.grad = torch.full_like(p, value * (i + 1) + j)
        optimizer.step()


@pytest.mark.parametrize("library", LIBRARIES, ids=["fusedlr", "torch"])
def test_a_pre_hook_that_loads_by_name(library: Any) -> None:
    """As in torch's documentation of ``register_load_state_dict_pre_hook``."""
    saved_params = {"w": Parameter(torch.ones(2)), "v": Parameter(torch.ones(2))}
    saving = library.AdamW(list(saved_params.items()), lr=0.1)
    saved_params["w"].grad, saved_params["v"].grad = torch.full((2,), 1.0), torch.full((2,), 5.0)
    saving.step()
    params = {"v": Parameter(torch.ones(2)), "w": Parameter(torch.ones(2))}
    loading = library.AdamW(list(params.items()), lr=0.1)

    def by_name(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        names = saved["param_groups"][0]["param_names"]
        wanted = optimizer.param_groups[0]["param_names"]
        return {**saved, "state": {i: saved["state"][names.index(name)] for i, name in enumerate(wanted)}}

    loading.register_load_state_dict_pre_hook(by_name)
    loading.load_state_dict(saving.state_dict())
    torch.testing.assert_close(loading.state[params["w"]]["exp_avg"], torch.full((2,), 0.1))
    torch.testing.assert_close(loading.state[params["v"]]["exp_avg"], torch.full((2,), 0.5))


@pytest.mark.parametrize("library", LIBRARIES, ids=["fusedlr", "torch"])
def test_hooks_that_wrap_and_unwrap_and_finish_the_state(library: Any) -> None:
    p = Parameter(torch.ones(3))
    optimizer = library.Adam([p], lr=0.1)
    stepped(optimizer, 2)
    optimizer.register_state_dict_post_hook(lambda o, saved: {"wrapped": saved})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: saved["wrapped"])
    optimizer.register_load_state_dict_post_hook(lambda o: o.state[p]["exp_avg"].zero_())
    saved = copy.deepcopy(optimizer.state_dict())
    assert set(saved) == {"wrapped"}
    stepped(optimizer, 1)
    optimizer.load_state_dict(saved)
    assert not optimizer.state[p]["exp_avg"].any()
    assert optimizer.state[p]["exp_avg_sq"].all()
    assert float(optimizer.state[p]["step"]) == 2
    before = p.detach().clone()
    p.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before)


def test_a_checkpoint_that_cannot_be_loaded_leaves_no_hook_behind() -> None:
    p = Parameter(torch.ones(3))
    optimizer = fusedlr.Adam([p], lr=0.1)
    for _ in range(2):
        with pytest.raises(ValueError, match="needs the keys"):
            optimizer.load_state_dict({})
    optimizer.state_dict()
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_state_dict_post_hooks


def test_step_hooks_see_the_arguments_of_torch() -> None:
    seen: dict[str, list[Any]] = {}
    for library in LIBRARIES:
        calls = seen.setdefault(library.__name__, [])
        p = Parameter(torch.ones(3))
        optimizer = library.SGD([p], lr=0.1)
        p.grad = torch.ones(3)

        def note(o: Any, args: tuple[Any, ...], kwargs: dict[str, Any], calls: list[Any] = calls) -> None:
            calls.append((len(args), sorted(kwargs)))

        def adds(o: Any, args: Any, kwargs: Any) -> Any:
            return args, {"closure": lambda: 2.5}

        optimizer.register_step_pre_hook(note)
        assert optimizer.step() is None
        assert optimizer.step(lambda: 1.5) == 1.5
        optimizer.register_step_pre_hook(adds)
        assert optimizer.step() == 2.5
    assert seen["fusedlr"] == seen["torch.optim"]


# ---- torch.optim in between ------------------------------------------------------------------------------------------


def test_schedules_of_other_scalars_go_on_from_a_checkpoint_of_torch() -> None:
    theirs, ours = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    oracle = torch.optim.Adam([theirs], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(oracle, 0.1, total_steps=30)
    for _ in range(6):
        stepped(oracle, 1)
        scheduler.step()
    optimizer = fusedlr.Adam([ours], lr=0.1, schedule=schedules.OneCycle(0.1, 30, cycle_momentum=True))
    optimizer.load_state_dict(oracle.state_dict())
    ours.data.copy_(theirs)
    for _ in range(12):
        stepped(oracle, 1)
        stepped(optimizer, 1)
        assert optimizer.param_groups[0]["betas"][0] == pytest.approx(oracle.param_groups[0]["betas"][0], abs=1e-12)
        assert optimizer.last_lr == [pytest.approx(oracle.param_groups[0]["lr"], abs=1e-12)]
        scheduler.step()
    torch.testing.assert_close(ours, theirs)


def test_steps_that_torch_took_in_between_move_the_clock() -> None:
    def schedule() -> dict[str, Any]:
        return {"lr": schedules.Linear(40, 1.0, 0.0), "weight_decay": schedules.Linear(40, 0.0, 1.0)}

    p = Parameter(torch.ones(3))
    first = fusedlr.AdamW([p], lr=0.1, schedule=schedule())
    stepped(first, 5)
    between = torch.optim.AdamW([p], lr=0.1)
    between.load_state_dict(first.state_dict(format="torch"))
    for _ in range(7):
        between.param_groups[0]["lr"] *= 0.9
        stepped(between, 1)
    last = fusedlr.AdamW([p], lr=0.1, schedule=schedule())
    last.load_state_dict(between.state_dict())
    assert last.steps_taken == 12
    stepped(last, 1)
    assert last.last_lr == [pytest.approx(0.1 * (1 - 12 / 40))]
    assert last.steps_taken == 13
    again = fusedlr.AdamW([p], lr=0.1, schedule=schedule())
    again.load_state_dict(last.state_dict())
    assert again.steps_taken == 13


def test_a_first_step_that_was_left_out_is_no_state_to_torch() -> None:
    """torch begins a momentum buffer with the whole first gradient, whatever the dampening."""
    p = Parameter(torch.ones(3))
    optimizer = fusedlr.SGD([p], lr=0.1, momentum=0.9, dampening=0.5, nonfinite="skip")
    p.grad = torch.full((3,), float("nan"))
    optimizer.step()
    oracle = torch.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    oracle.load_state_dict(optimizer.state_dict(format="torch"))
    p.grad = torch.ones(3)
    oracle.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))


# ---- what cannot be loaded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", [{}, None, {"base": {}}, {"base": 3, "written": {}}], ids=str)
def test_marks_that_fusedlr_did_not_write_are_an_error(marks: Any) -> None:
    p = Parameter(torch.ones(3))
    optimizer = fusedlr.AdamW([p], lr=0.1, schedule=schedules.Linear(40, 1.0, 0.0))
    stepped(optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["param_groups"][0]["fusedlr"] = marks
    with pytest.raises(ValueError, match="'base' and 'written' was expected"):
        optimizer.load_state_dict(wrong)
    assert str(optimizer.state_dict()) == str(before)


def test_a_base_below_the_minimum_of_the_schedule_is_an_error_before_anything_is_loaded() -> None:
    p = Parameter(torch.ones(3))
    saved = fusedlr.SGD([p], lr=0.1, schedule=schedules.Cosine(10, min_lr=0.01))
    stepped(saved, 4)
    optimizer = fusedlr.SGD([p], lr=1.0, schedule=schedules.Cosine(10, min_lr=0.5))
    stepped(optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="min_lr must be at most base_lr"):
        optimizer.load_state_dict(saved.state_dict())
    assert str(optimizer.state_dict()) == str(before)
    stepped(optimizer, 1)
    assert optimizer.last_lr == [optimizer.param_groups[0]["lr"]]


def test_the_clock_of_a_checkpoint_counts_steps_that_could_not_be_skipped() -> None:
    p = Parameter(torch.ones(3))
    optimizer = fusedlr.SGD([p], lr=0.1, schedule=schedules.Linear(100, 1.0, 0.0), backend="torch")
    optimizer.fold_grad_scale = True
    assert int(optimizer.skipped_steps) == 0
    stepped(optimizer, 5)
    scaler = torch.amp.GradScaler("cpu")
    p.grad = torch.full((3,), float("inf"))
    scaler.scale(torch.tensor(1.0))
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.state_dict()["param_groups"][0]["fusedlr"]["t"] == 5
    assert (optimizer.steps_taken, int(optimizer.skipped_steps)) == (5, 1)


def test_one_clip_has_one_schedule() -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    groups = [{"params": [x], "schedule": {"max_norm": schedules.Constant(f)}} for x, f in ((p, 0.5), (q, 0.1))]
    with pytest.raises(ValueError, match="must be the same in every param group"):
        fusedlr.SGD(groups, lr=1.0, clip=1.0)
    with pytest.raises(ValueError, match="min_lr must be at most"):
        fusedlr.SGD([p], lr=1.0, clip=1.0, schedule={"max_norm": schedules.Cosine(10, min_lr=2.0)})
