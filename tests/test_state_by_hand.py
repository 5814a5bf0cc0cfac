"""What somebody does to groups and state with their own hands, between steps and before checkpoints."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS
from torch import Tensor
from torch.nn import Parameter

import fusedlr
from fusedlr import schedules

NAMES = ["SGD", "Adam", "NAdam", "Adagrad"]
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9, "dampening": 0.5}}


def pair(name: str, backend: str = "torch") -> list[tuple[Any, list[Parameter]]]:
    """The optimizers of torch and fusedlr over three parameters of one shape, after two steps."""
    made = []
    for module, options in ((torch.optim, {"foreach": False}), (fusedlr, {"backend": backend})):
        params = [Parameter(torch.linspace(-1, 1, 6) + i) for i in range(3)]
        optimizer = getattr(module, name)(params, lr=0.1, **OPTIONS.get(name, {}), **options)
        for i in range(2):
            step(optimizer, params, i)
        made.append((optimizer, params))
    return made


def step(optimizer: Any, params: list[Parameter], i: int) -> None:
    generator = torch.Generator().manual_seed(i)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def assert_alike(made: list[tuple[Any, list[Parameter]]]) -> None:
    (theirs, theirs_params), (ours, ours_params) = made
    for p, q in zip(theirs_params, ours_params, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)
        mine = {name: value for name, value in theirs.state[p].items() if isinstance(value, Tensor)}
        for name, value in mine.items():
            torch.testing.assert_close(ours.state[q][name], value, rtol=1e-6, atol=1e-6, msg=name)


def swap(optimizer: Any, params: list[Parameter]) -> None:
    a, b, _ = params
    optimizer.state[a], optimizer.state[b] = optimizer.state[b], optimizer.state[a]


def turn(optimizer: Any, params: list[Parameter]) -> None:
    """Each array goes to the next parameter; the counts stay."""
    entries = [optimizer.state[p] for p in params]
    for name in entries[0]:
        if entries[0][name] is not None and name != "step":
            values = [entry[name] for entry in entries]
            for entry, value in zip(entries, values[1:] + values[:1], strict=True):
                entry[name] = value


def take_over(optimizer: Any, params: list[Parameter]) -> None:
    """A new parameter continues another's state, which continues that of one that leaves."""
    a, b, c = params
    new = Parameter(torch.zeros(6))
    optimizer.param_groups[0]["params"][:] = [b, c, new]
    optimizer.state[new] = optimizer.state.pop(b)
    optimizer.state[b] = optimizer.state.pop(a)
    params[:] = [b, c, new]


def reverse_and_load_live(optimizer: Any, params: list[Parameter]) -> None:
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["params"].reverse()
    optimizer.load_state_dict(saved)


def put_aside(optimizer: Any, params: list[Parameter]) -> None:
    """All state, for two steps with other state."""
    state = optimizer.state
    optimizer.state = defaultdict(dict)
    for i in range(5, 7):
        step(optimizer, params, i)
    optimizer.state = state


def put_one_aside(optimizer: Any, params: list[Parameter]) -> None:
    entry = optimizer.state.pop(params[1])
    for i in range(5, 7):
        step(optimizer, params, i)
    optimizer.state[params[1]] = entry


def load_what_was_put_aside(optimizer: Any, params: list[Parameter]) -> None:
    saved = optimizer.state_dict()
    optimizer.state.clear()
    step(optimizer, params, 5)
    optimizer.load_state_dict(saved)


def hand_to_one_outside(optimizer: Any, params: list[Parameter]) -> None:
    """Which comes back later."""
    a, b, c = params
    optimizer.param_groups[0]["params"] = [a, c]
    optimizer.state[b] = optimizer.state.pop(a)
    step(optimizer, [a, c], 5)
    optimizer.param_groups[0]["params"] = [a, b, c]


CHANGES = [swap, turn, take_over, reverse_and_load_live, put_aside, put_one_aside, load_what_was_put_aside,
           hand_to_one_outside]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_state_goes_from_parameter_to_parameter(name: str, change: Callable[..., None], backend: str) -> None:
    """What is moved are views of memory that the step writes: none may be read after another was written there."""
    made = pair(name, backend)
    for optimizer, params in made:
        change(optimizer, params)
    for i in range(2, 4):
        for optimizer, params in made:
            step(optimizer, params, i)
        assert_alike(made)


@pytest.mark.parametrize("how", ["reversed", "removed", "added", "grown"])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_of_the_groups_as_they_are(name: str, how: str) -> None:
    """With no step between the change and ``state_dict`` or ``load_state_dict``."""
    made = pair(name)
    for optimizer, params in made:
        if how == "reversed":
            optimizer.param_groups[0]["params"].reverse()
        elif how == "removed":
            del optimizer.param_groups[0]["params"][1]
            del optimizer.state[params.pop(1)]
        elif how == "added":
            new = Parameter(torch.zeros(4))
            entry = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "fusedlr")}
            optimizer.param_groups.append({**entry, "params": [new], "lr": 0.01})
            params.append(new)
        else:  # as densification does it
            old = params[1]
            new = Parameter(torch.cat([old.detach(), torch.ones(2)]))
            moved = optimizer.state.pop(old)
            longer = {k: torch.cat([v, torch.zeros(2)]) for k, v in moved.items() if torch.is_tensor(v) and v.ndim}
            optimizer.param_groups[0]["params"][1] = params[1] = new
            optimizer.state[new] = {**moved, **longer}
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(2, 4):
        for optimizer, params in made:
            step(optimizer, params, i)
        assert_alike(made)


def test_other_questions_are_answered_for_the_groups_as_they_are() -> None:
    ((_, _), (optimizer, _)) = pair("Adam")
    new = Parameter(torch.zeros(4))
    optimizer.param_groups.append({"params": [new], "lr": 0.25, "schedule": schedules.Plateau()})
    assert optimizer.next_lr() == [0.1, 0.25]
    assert new in optimizer.full_precision_parameters()
    other = Parameter(torch.zeros(4))
    optimizer.param_groups.append({"params": [other], "lr": 0.5, "schedule": schedules.Plateau(patience=0, factor=0.5)})
    optimizer.report(1.0)
    optimizer.report(1.0)
    assert optimizer.next_lr() == [0.1, 0.25, 0.25]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_parameter_that_is_there_twice_is_an_error(groups: int) -> None:
    """torch warns and steps it twice, from one state with one count."""
    p, other = Parameter(torch.ones(3, 2)), Parameter(torch.ones(1))
    there = pytest.raises(ValueError, match=r"parameters 0 and 2 \(.* are the same one.* list\(dict.fromkeys")
    with pytest.warns(UserWarning, match="duplicate"), there:
        fusedlr.SGD([p, other, p], lr=0.1)
    optimizer = fusedlr.SGD([p, other], lr=0.1)
    if groups == 1:
        optimizer.param_groups[0]["params"].append(p)
    else:
        optimizer.param_groups.append({"params": [p], "lr": 0.2})
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"parameters 0 and 2 \(shape \(3, 2\)\) are the same"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p)) and optimizer.steps_taken == 0


@pytest.mark.parametrize("how", ["load_state_dict", "deepcopy", "amsgrad", "Adagrad"])
def test_what_state_was_made_of_is_let_go(how: str) -> None:
    """A checkpoint that was loaded is not kept beside the state that it became."""
    cls: Any = fusedlr.Adagrad if how == "Adagrad" else fusedlr.Adam
    params = [Parameter(torch.ones(6)) for _ in range(2)]
    optimizer = cls(params, lr=0.1)
    step(optimizer, params, 0)
    if how == "deepcopy":
        optimizer, params = copy.deepcopy((optimizer, params))
    saved = copy.deepcopy(optimizer.state_dict()) if how != "amsgrad" else {"state": dict(optimizer.state)}
    fresh = cls(params, lr=0.1) if how == "load_state_dict" else optimizer
    held = [weakref.ref(value) for entry in saved["state"].values() for value in entry.values()]
    if how == "amsgrad":
        fresh.param_groups[0]["amsgrad"] = True
    else:
        fresh.load_state_dict(saved)
    del saved
    step(fresh, params, 1)
    if how == "load_state_dict":
        optimizer.state.clear()
    gc.collect()
    assert not [value for value in held if value() is not None]


def test_a_parameter_that_left_its_group_is_let_go() -> None:
    params = [Parameter(torch.ones(6)) for _ in range(2)]
    optimizer = fusedlr.Adam(params, lr=0.1)
    step(optimizer, params, 0)
    left = weakref.ref(params[0])
    optimizer.state.pop(params[0])
    del optimizer.param_groups[0]["params"][0], params[0]
    step(optimizer, params, 1)
    gc.collect()
    assert left() is None


def test_dicts_of_the_state_may_be_held() -> None:
    """As wrappers around optimizers hold them, from before the first step on."""
    p = Parameter(torch.ones(3))
    optimizer = fusedlr.Adam([p], lr=0.1)
    state = optimizer.state
    step(optimizer, [p], 0)
    assert state is optimizer.state and float(state[p]["step"]) == 1
    state.clear()
    step(optimizer, [p], 1)
    assert float(optimizer.state[p]["step"]) == 1
    entry = optimizer.state[p]
    for i in range(2, 5):
        entry["exp_avg"] = torch.zeros(3)
        step(optimizer, [p], i)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * p.grad)  # type: ignore[operator]
        assert entry is optimizer.state[p]


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_was_removed_comes_back_with_a_gradient(backend: str) -> None:
    made = pair("Adam", backend)
    for optimizer, (a, b, c) in made:
        optimizer.state.clear()
        a.grad = c.grad = torch.ones(6)
        b.grad = None
        optimizer.step()
        assert set(optimizer.state) == {a, c}
        b.grad = torch.ones(6)
        optimizer.step()
    assert_alike(made)
    (_, _), (ours, (a, b, _)) = made
    assert float(ours.state[a]["step"]) == 2 and float(ours.state[b]["step"]) == 1


def test_keys_of_somebody_elses_are_left_as_they_are(seed: int) -> None:
    """Also tensors without memory of their own, and other names for what the optimizer has."""
    ((_, _), (optimizer, params)) = pair("Adam")
    entry = optimizer.state[params[0]]
    entry["mask"], entry["mine"] = torch.eye(2).to_sparse(), entry["exp_avg"]
    for i in range(2, 4):
        step(optimizer, params, i)
    assert entry["mask"].is_sparse and entry["mine"].data_ptr() == entry["exp_avg"].data_ptr()
    before = entry["exp_avg"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, params, 4)
    now = optimizer.state[params[0]]
    assert now["mask"].is_sparse and not torch.equal(now["exp_avg"], before)


@pytest.mark.parametrize("state", ["param", "int8"])
def test_a_step_that_fails_leaves_state_that_was_put_there_as_it_was(state: str) -> None:
    a, b = Parameter(torch.ones(70)), Parameter(torch.ones(70))
    optimizer = fusedlr.Adam([a, b], lr=0.1, precision=fusedlr.Precision(state=state))
    step(optimizer, [a, b], 0)
    old = optimizer.state[a]
    olds = {name: value.clone() for name, value in old.items()}
    mine = {"step": torch.tensor(1.0), "exp_avg": torch.randn(70), "exp_avg_sq": torch.rand(70)}
    put = dict(mine)
    optimizer.state[a] = mine
    optimizer.state[b] = {**mine, "exp_avg": torch.ones(3)}
    with pytest.raises(ValueError, match="'exp_avg' of shape"):
        step(optimizer, [a, b], 1)
    assert optimizer.state[a] is mine and all(mine[name] is put[name] for name in put)
    assert all(torch.equal(old[name], olds[name]) for name in olds)
    optimizer.state[b] = {}
    step(optimizer, [a, b], 1)
    assert float(optimizer.state[a]["step"]) == 2 and float(optimizer.state[b]["step"]) == 1


def test_a_load_that_torch_refuses_changes_no_group() -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = fusedlr.SGD([p], lr=0.1)
    optimizer.param_groups.append({"params": [q]})
    at = q.data_ptr()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert optimizer.param_groups[1] == {"params": [q]} and q.data_ptr() == at


def test_a_group_with_a_parameter_twice_is_not_added() -> None:
    optimizer = fusedlr.SGD([{"params": []}], lr=0.1)
    p = Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="parameters 0 and 1"):
        optimizer.add_param_group({"params": [p, p]})
    assert len(optimizer.param_groups) == 1


def test_one_dict_of_state_for_two_parameters(seed: int) -> None:
    made = pair("Adam")
    for optimizer, (a, b, _) in made:
        optimizer.state[b] = {key: value.clone() for key, value in optimizer.state[a].items()}
    (_, _), (ours, (a, b, _)) = made
    ours.state[b] = ours.state[a]  # fusedlr's parameters each get state of their own
    for optimizer, params in made:
        step(optimizer, params, 2)
    assert_alike(made)


def test_the_next_scheduler_begins_with_the_loaded_lr() -> None:
    """Where the checkpoint has no initial_lr, as none was taken under a scheduler."""
    started = []
    for module in (torch.optim, fusedlr):
        p = Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        first = module.Adam([p], lr=0.01)
        first.step()
        optimizer = module.Adam([p], lr=0.1)
        torch.optim.lr_scheduler.StepLR(optimizer, 10)
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 1.0)
        started.append((scheduler.base_lrs, optimizer.param_groups[0]["lr"]))
    assert started[0] == started[1] == ([0.01], 0.01)


@pytest.mark.parametrize("format", ["fusedlr", "torch"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_a_checkpoint_after_a_skipped_first_step_starts_anew_in_torch(name: str, format: str) -> None:
    options = OPTIONS.get(name, {})
    p = Parameter(torch.ones(3))
    optimizer = getattr(fusedlr, name)([p], lr=0.1, nonfinite="skip", **options)
    p.grad = torch.full((3,), float("nan"))
    optimizer.step()
    saved = optimizer.state_dict(format=format)
    assert bool(saved["state"]) == (format == "fusedlr")
    assert saved["param_groups"][0]["fusedlr"]["skipped_steps"] == 1
    outcomes = []
    for state in (saved, None):
        q = Parameter(torch.ones(3))
        theirs = getattr(torch.optim, name)([q], lr=0.1, **options)
        if state is not None:
            theirs.load_state_dict(state)
        for i in range(3):
            step(theirs, [q], i)
        outcomes.append(q)
    assert torch.equal(*outcomes)


def test_moments_whose_step_was_set_to_0_are_saved() -> None:
    """As is done to begin the bias correction anew."""
    ((_, _), (optimizer, params)) = pair("Adam")
    for p in params:
        optimizer.state[p]["step"].zero_()
    for format in ("fusedlr", "torch"):
        saved = optimizer.state_dict(format=format)["state"]
        assert torch.equal(saved[1]["exp_avg"], optimizer.state[params[1]]["exp_avg"]) and len(saved) == 3
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[params[1]]["exp_avg"].any()


def test_distributed_checkpoints_after_a_skipped_first_step() -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = torch.nn.Linear(2, 2)
    optimizer = fusedlr.AdamW(model.parameters(), nonfinite="skip")
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    assert "state.weight.exp_avg" in saved
    set_optimizer_state_dict(model, optimizer, saved, options=options)


@pytest.mark.parametrize("flatten", [True, False])
def test_another_view_that_begins_where_the_parameter_does(flatten: bool) -> None:
    base = torch.arange(8.0)
    p = Parameter(base[:4])
    optimizer = fusedlr.Adam([p], lr=0.1, flatten=flatten)
    step(optimizer, [p], 0)
    p.data = base[::2]
    before = base.clone()
    step(optimizer, [p], 1)
    changed = (base != before).tolist()
    assert changed == [True, False] * 4


def test_gradients_that_were_one_object_and_become_lazy_zeros() -> None:
    a, b = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    optimizer = fusedlr.Adam([a, b], lr=0.1, flatten=False)
    a.grad = b.grad = torch.ones(3)
    optimizer.step()
    a.grad = torch._efficientzerotensor((3,))
    b.grad = torch.ones(3)
    optimizer.step()
    assert float(optimizer.state[a]["step"]) == 2 and optimizer.steps_taken == 2
    torch.testing.assert_close(optimizer.state[a]["exp_avg"], torch.full((3,), 0.09))


def test_a_parameter_without_memory_says_so() -> None:
    p = Parameter(torch.ones(3, device="meta"))
    optimizer = fusedlr.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match=r"parameter 0 is on the meta device .*to_empty"):
        optimizer.step()
    assert optimizer.steps_taken == 0
