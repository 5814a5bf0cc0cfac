"""Checkpoints: interchange with torch.optim, what is wrong with one, and torch's distributed format."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import BACKENDS, BY_NAME, CASES, STATEFUL, Case
from torch import Tensor, nn
from training import CLOSE, COSINE, assert_same_model, assert_same_state, gradients, make_model, through_file, train

import fusedlr


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_checkpoint_of_torch_continues_here(case: Case, backend: str, seed: int) -> None:
    model = make_model()
    oracle = case.make_oracle(model.parameters())
    train(model, oracle, range(3))
    other = copy.deepcopy(model)
    optimizer = case.make(other.parameters(), backend=backend)
    optimizer.load_state_dict(through_file(oracle.state_dict()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key in (*case.state, *case.numbers):
            assert torch.equal(optimizer.state[q][key], oracle.state[p][key])
    train(model, oracle, range(3, 6))
    train(other, optimizer, range(3, 6))
    assert_same_model(model, other, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_checkpoint_continues_in_torch(case: Case, backend: str, seed: int) -> None:
    model = make_model()
    optimizer = case.make(model.parameters(), backend=backend)
    train(model, optimizer, range(3))
    other = copy.deepcopy(model)
    oracle = case.make_oracle(other.parameters())
    oracle.load_state_dict(through_file(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(other, oracle, range(3, 6))
    assert_same_model(model, other, **CLOSE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saving_and_loading_changes_no_bit(case: Case, seed: int) -> None:
    model = make_model()
    optimizer = case.make(model.parameters(), schedule=COSINE, clip=1.0)
    train(model, optimizer, range(3))
    other = copy.deepcopy(model)
    loaded = case.make(other.parameters(), schedule=COSINE, clip=1.0)
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    assert_same_state(optimizer, loaded)
    train(model, optimizer, range(3, 6))
    train(other, loaded, range(3, 6))
    assert loaded.last_lr == optimizer.last_lr
    assert_same_model(model, other)
    assert_same_state(optimizer, loaded)


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_torch_has_all_of_its_own_keys(case: Case, seed: int) -> None:
    model, other = make_model(), make_model()
    optimizer, oracle = case.make(model.parameters()), case.make_oracle(other.parameters())
    train(model, optimizer, range(2))
    train(other, oracle, range(2))
    ours, torchs = optimizer.state_dict(), oracle.state_dict()
    for group, expected in zip(ours["param_groups"], torchs["param_groups"], strict=True):
        assert set(expected) <= set(group)
    for index, entry in torchs["state"].items():
        for key, value in entry.items():
            if value is not None:
                assert ours["state"][index][key].shape == value.shape
                assert ours["state"][index][key].dtype == value.dtype


# ---- the clock and the schedule ----------------------------------------------------------------------------------


def test_the_clock_comes_from_the_largest_step_of_torch(seed: int) -> None:
    model = make_model()
    oracle = torch.optim.Adam(model.parameters(), lr=0.1)
    for step in range(7):
        gradients(model, step)
        if step % 2:
            model.first.weight.grad = None
        oracle.step()
    optimizer = fusedlr.Adam(model.parameters(), lr=0.1, schedule=COSINE)
    optimizer.load_state_dict(oracle.state_dict())
    assert optimizer.steps_taken == 7
    assert float(optimizer.state[model.first.weight]["step"]) == 4
    gradients(model, 7)
    optimizer.step()
    assert optimizer.last_lr == [COSINE(7, 0.1)]


def test_the_clock_comes_from_fusedlrs_own_checkpoint(seed: int) -> None:
    """A parameter group added late has taken fewer steps than the clock shows; the clock is kept nevertheless."""
    model = make_model()
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1, schedule=COSINE)
    train(model, optimizer, range(5))
    optimizer.state.clear()
    loaded = fusedlr.SGD(make_model().parameters(), lr=0.1, schedule=COSINE)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.steps_taken == 5
    assert loaded.next_lr() == [COSINE(5, 0.1)]


def test_an_sgd_checkpoint_of_torch_without_momentum_starts_at_zero(seed: int) -> None:
    model = make_model()
    oracle = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, oracle, range(4))
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1, schedule=COSINE)
    optimizer.load_state_dict(oracle.state_dict())
    assert optimizer.steps_taken == 0, "torch's SGD keeps no count"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_momentum_buffer_that_is_none_starts_with_the_gradient(backend: str, seed: int) -> None:
    """torch.optim.SGD saves None for a parameter that has had no gradient yet, and no step."""
    model = make_model()
    case = BY_NAME["sgd-dampening"]
    oracle = case.make_oracle(model.parameters())
    train(model, oracle, range(1))
    saved = oracle.state_dict()
    saved["state"][0]["momentum_buffer"] = None
    other = copy.deepcopy(model)
    oracle.load_state_dict(copy.deepcopy(saved))
    optimizer = case.make(other.parameters(), backend=backend)
    optimizer.load_state_dict(saved)
    train(model, oracle, range(1, 4))
    train(other, optimizer, range(1, 4))
    assert_same_model(model, other, **CLOSE)


def test_loading_keeps_the_schedule_the_clip_and_the_backend(seed: int) -> None:
    model = make_model()
    plain = fusedlr.AdamW(model.parameters(), lr=0.1)
    train(model, plain, range(4))
    optimizer = fusedlr.AdamW(make_model().parameters(), lr=0.1, schedule=COSINE, clip=0.5, backend="torch")
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.param_groups[0]
    assert group["schedule"] == COSINE
    assert optimizer.clip == fusedlr.clipping.GlobalNorm(0.5)
    assert "backend: torch for cpu tensors (as asked)" in repr(optimizer)
    assert optimizer.next_lr() == [COSINE(4, 0.1)]


def test_a_checkpoint_without_a_schedule_keeps_its_lr_here(seed: int) -> None:
    model = make_model()
    scheduled = fusedlr.AdamW(model.parameters(), lr=0.1, schedule=COSINE)
    train(model, scheduled, range(4))
    plain = fusedlr.AdamW(make_model().parameters(), lr=0.7)
    plain.load_state_dict(scheduled.state_dict())
    assert plain.next_lr() == [COSINE(3, 0.1)]


def test_an_override_lasts_through_a_checkpoint_and_ends_when_it_is_set_back(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, schedule=COSINE)
    train(model, optimizer, range(2))
    written = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.033
    train(model, optimizer, range(2, 3))
    loaded = fusedlr.AdamW(model.parameters(), lr=0.1, schedule=COSINE)
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    train(model, loaded, range(3, 4))
    assert loaded.last_lr == [0.033]
    loaded.param_groups[0]["lr"] = written
    train(model, loaded, range(4, 5))
    assert loaded.last_lr == [COSINE(4, 0.1)]


@pytest.mark.parametrize("kind", ["fusedlr", "torch"])
def test_an_lr_tensor_goes_through_a_checkpoint(kind: str, seed: int) -> None:
    model = make_model()
    make = fusedlr.Adam if kind == "fusedlr" else torch.optim.Adam
    source = make(model.parameters(), lr=torch.tensor(0.1))
    train(model, source, range(3))
    other = copy.deepcopy(model)
    loaded = fusedlr.Adam(other.parameters(), lr=torch.tensor(0.5), schedule=COSINE)
    loaded.load_state_dict(through_file(source.state_dict()))
    assert isinstance(loaded.param_groups[0]["lr"], Tensor)
    train(other, loaded, range(3, 4))
    base = loaded.param_groups[0]["initial_lr"]
    # The lr in a group is float32 there.
    assert loaded.last_lr == pytest.approx([COSINE(3, base)], rel=1e-12)
    assert float(loaded.param_groups[0]["lr"]) == pytest.approx(COSINE(3, base), rel=1e-7)


def test_skipped_steps_are_in_the_state_dict(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, schedule=COSINE, nonfinite="skip")
    train(model, optimizer, range(2))
    for step in range(2, 5):
        gradients(model, step)
        model.second.bias.grad[1] = float("nan")
        optimizer.step()
    train(model, optimizer, range(5, 6))
    loaded = fusedlr.AdamW(make_model().parameters(), lr=0.1, schedule=COSINE, nonfinite="skip")
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    assert int(loaded.skipped_steps) == 3
    assert loaded.skipped_steps.dtype == torch.int64
    assert loaded.steps_taken == 3
    train(model, loaded, range(6, 7))
    assert int(loaded.skipped_steps) == 3
    assert loaded.last_lr == [COSINE(3, 0.1)]


# ---- loading ----------------------------------------------------------------------------------------------------


def test_load_state_dict_by_keyword(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.Adam(model.parameters())
    train(model, optimizer, range(2))
    loaded = fusedlr.Adam(make_model().parameters())
    loaded.load_state_dict(state_dict=optimizer.state_dict())
    assert_same_state(optimizer, loaded)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_what_was_loaded_is_not_shared(case: Case, fresh: bool, seed: int) -> None:
    model, other = make_model(), make_model()
    optimizer, loaded = case.make(model.parameters()), case.make(other.parameters())
    train(model, optimizer, range(2))
    if not fresh:
        train(other, loaded, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    reference = copy.deepcopy(saved)
    loaded.load_state_dict(saved)
    train(other, loaded, range(2, 4))
    for index, entry in reference["state"].items():
        for key, value in entry.items():
            assert torch.equal(saved["state"][index][key], value), f"{key} was written through the loaded dict"
    assert saved["param_groups"] == reference["param_groups"]


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_loading_goes_back_as_well(case: Case, seed: int) -> None:
    """Loading an empty checkpoint into a trained optimizer makes it new."""
    model = make_model()
    optimizer = case.make(model.parameters(), schedule=COSINE)
    empty = copy.deepcopy(optimizer.state_dict())
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3))
    after = copy.deepcopy(model.state_dict())
    optimizer.load_state_dict(empty)
    model.load_state_dict(start)
    assert optimizer.steps_taken == 0
    assert optimizer.state_dict()["state"].keys() == empty["state"].keys()
    train(model, optimizer, range(3))
    for key, value in model.state_dict().items():
        assert torch.equal(value, after[key]), key


CLOCKS: dict[str, tuple[str, Any]] = {
    "a clock of text": ("t", "3"), "a clock before 0": ("t", -5), "a clock between steps": ("t", 2.7),
    "a clock of truth": ("t", True), "a clock of nothing": ("t", None), "a clock of skips": ("skipped_steps", -1),
}  # fmt: skip


def wrong(state_dict: dict[str, Any], how: str) -> dict[str, Any]:
    state_dict = copy.deepcopy(state_dict)
    if how == "more groups":
        state_dict["param_groups"].append(copy.deepcopy(state_dict["param_groups"][0]))
    elif how == "fewer parameters":
        state_dict["param_groups"][0]["params"].pop()
    elif how == "another shape":
        entry = state_dict["state"][1]
        entry["exp_avg"] = torch.zeros(3, 9)
    elif how == "a step that is none":
        state_dict["state"][2]["step"] = "many"
    elif how == "no param_groups":
        del state_dict["param_groups"]
    elif how == "a state that is none":
        state_dict["state"][0] = 7
    elif how.startswith("a clock"):
        name, value = CLOCKS[how]
        state_dict["param_groups"][-1]["fusedlr"][name] = value
    elif how == "hyper-parameters of another shape":
        state_dict["param_groups"][0]["amsgrad"] = True
        state_dict["state"][3]["max_exp_avg_sq"] = torch.zeros(2, 2)
    return state_dict


@pytest.mark.parametrize(
    "how, expected",
    [
        ("more groups", "number of parameter groups|different number"),
        ("fewer parameters", "size of optimizer's group"),
        ("another shape", r"'exp_avg' of shape \(3, 9\), but the parameter has shape \(4,\); load"),
        ("a step that is none", "parameter 2 has as 'step' str, but a single number was expected"),
        ("no param_groups", "needs the keys 'state' and 'param_groups', but got"),
        ("a state that is none", "the state of parameter 0 must be a dict"),
        *((how, f"{name}={value!r} under 'fusedlr', but a count of steps") for how, (name, value) in CLOCKS.items()),
        (
            "hyper-parameters of another shape",
            r"'max_exp_avg_sq' of shape \(2, 2\), but the parameter has shape \(3,\)",
        ),
    ],
)
def test_a_wrong_checkpoint_changes_nothing(how: str, expected: str, seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.Adam(model.parameters(), lr=0.1, schedule=COSINE)
    train(model, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    params = copy.deepcopy(model.state_dict())
    group = optimizer.param_groups[0]
    with pytest.raises(ValueError, match=expected):
        optimizer.load_state_dict(wrong(before, how))
    assert optimizer.param_groups[0] is group
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for index, entry in before["state"].items():
        assert all(torch.equal(after["state"][index][key], value) for key, value in entry.items())
    train(model, optimizer, range(3, 4))
    reference = make_model()
    reference.load_state_dict(params)
    other = fusedlr.Adam(reference.parameters(), lr=0.1, schedule=COSINE)
    other.load_state_dict(before)
    train(reference, other, range(3, 4))
    assert_same_model(model, reference)


def test_state_dict_hooks_and_load_hooks_run(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.Adam(model.parameters())
    train(model, optimizer, range(1))
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "mark": 5})
    saved = optimizer.state_dict()
    assert saved["mark"] == 5
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("after loading"))
    optimizer.load_state_dict(saved)
    assert calls == ["before saving", "before loading", "after loading"]
    train(model, optimizer, range(1, 2))


# ---- torch.distributed.checkpoint -------------------------------------------------------------------------------


def distributed_state(model: nn.Module, optimizer: Any, flatten: bool) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flatten))


def set_distributed_state(model: nn.Module, optimizer: Any, state: dict[str, Any], flatten: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    set_optimizer_state_dict(model, optimizer, state, options=options)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_torchs_distributed_checkpoint_brings_everything_back(case: Case, flatten: bool, seed: int) -> None:
    model = make_model()
    optimizer = case.make(model.parameters(), schedule=COSINE, clip=1.0)
    train(model, optimizer, range(3))
    state = copy.deepcopy(distributed_state(model, optimizer, flatten))
    assert optimizer.steps_taken == 3
    other = copy.deepcopy(model)
    loaded = case.make(other.parameters(), schedule=COSINE, clip=1.0)
    set_distributed_state(other, loaded, state, flatten)
    assert loaded.steps_taken == 3
    assert loaded.next_lr() == optimizer.next_lr()
    train(model, optimizer, range(3, 6))
    train(other, loaded, range(3, 6))
    assert_same_model(model, other)
    assert loaded.last_lr == optimizer.last_lr == [COSINE(5, case.lr)]


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("groups", ["all scheduled", "one scheduled"])
@pytest.mark.parametrize("name", ["sgd-plain", "sgd-momentum", "adamw-default"])
def test_the_hidden_step_leaves_the_clock_and_the_parameters(name: str, groups: str, number: Any, seed: int) -> None:
    """torch's loader makes an optimizer's state by a step with zero gradients and every lr replaced by 0."""
    model = make_model()
    start = copy.deepcopy(model.state_dict())
    first = {"params": model.first.parameters(), "lr": number(0.1)}
    second = {"params": model.second.parameters(), "lr": number(0.1)}
    if groups == "one scheduled":
        second["schedule"] = None
    optimizer = BY_NAME[name].fused([first, second], schedule=COSINE)
    state = distributed_state(model, optimizer, False)
    assert state["state"], "the hidden step did not take place"
    assert optimizer.steps_taken == 0
    assert optimizer.next_lr()[0] == pytest.approx(COSINE(0, 0.1), rel=1e-7)
    for key, value in model.state_dict().items():
        assert torch.equal(value, start[key]), key
    for p in model.parameters():
        for key, value in optimizer.state[p].items():
            assert key == "step" or not value.any(), f"{key} must be zero after zero gradients"
    train(model, optimizer, range(1))
    assert optimizer.steps_taken == 1
    assert optimizer.last_lr[0] == pytest.approx(COSINE(0, 0.1), rel=1e-7)


def test_sgd_without_momentum_takes_no_hidden_step_at_each_save(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1, schedule=COSINE)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        distributed_state(model, optimizer, True)
    assert optimizer.steps_taken == 2
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert [float(entry["step"]) for entry in after["state"].values()] == [2.0] * 4


def test_a_first_step_with_lr_0_of_ones_own_counts(seed: int) -> None:
    """Without a schedule a warm-up of torch's that begins at 0 is a step like any other."""
    model = make_model()
    optimizer = fusedlr.Adam(model.parameters(), lr=0.0)
    train(model, optimizer, range(1))
    assert optimizer.steps_taken == 1
    assert float(optimizer.state[model.first.weight]["step"]) == 1
