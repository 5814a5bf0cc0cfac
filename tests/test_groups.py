"""Param groups, closures, hooks and the names of things: as a user of torch.optim expects."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from cases import BACKENDS, clip_by_hand
from torch import Tensor
from torch.profiler import profile
from training import CLOSE, COSINE, assert_same_model, gradients, make_model, split_groups, train

import fusedlr
from fusedlr import clipping

STEPS = 8


# ---- param groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "second",
    [
        {"lr": 0.3},
        {"weight_decay": 0.5},
        {"betas": (0.5, 0.6)},
        {"eps": 0.1},
        {"amsgrad": True},
        {"maximize": True},
        {"lr": torch.tensor(0.3), "weight_decay": 0.0},
    ],
    ids=lambda second: "-".join(second),
)
def test_groups_have_hyper_parameters_of_their_own(second: dict[str, Any], backend: str, seed: int) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    optimizer = fusedlr.AdamW(split_groups(model, **second), lr=0.01, backend=backend, clip=1.0)
    oracle = torch.optim.AdamW(split_groups(other, **second), lr=0.01, foreach=False)
    for step in range(STEPS):
        gradients(model, step)
        gradients(other, step)
        clip_by_hand(clipping.GlobalNorm(1.0), list(other.parameters()))
        optimizer.step()
        oracle.step()
    assert_same_model(model, other, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hyper_parameters_changed_between_steps_rule(backend: str, seed: int) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    optimizer = fusedlr.Adam(model.parameters(), lr=0.01, backend=backend)
    oracle = torch.optim.Adam(other.parameters(), lr=0.01, foreach=False)
    changes = {
        1: ("lr", 0.1),
        2: ("betas", (0.7, 0.8)),
        3: ("weight_decay", 0.3),
        4: ("maximize", True),
        5: ("eps", 0.01),
    }
    for step in range(7):
        for o in (optimizer, oracle):
            if step in changes:
                o.param_groups[0][changes[step][0]] = changes[step][1]
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
    assert_same_model(model, other, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_switched_on_and_off(backend: str, seed: int) -> None:
    """torch makes the buffer when momentum is first seen, keeps it while it is off, and goes on with it."""
    model = make_model()
    other = copy.deepcopy(model)
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1, backend=backend)
    oracle = torch.optim.SGD(other.parameters(), lr=0.1, foreach=False)
    for step, momentum in enumerate([0.0, 0.9, 0.9, 0.0, 0.0, 0.8]):
        for o in (optimizer, oracle):
            o.param_groups[0]["momentum"] = momentum
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
    assert_same_model(model, other, **CLOSE)


def test_named_parameters(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.Adam(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    train(model, optimizer, range(1))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == optimizer.param_groups[0]["param_names"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_added_later_shares_the_clock(backend: str, seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.first.parameters(), lr=0.1, schedule=COSINE, backend=backend)
    train(model, optimizer, range(3))
    optimizer.add_param_group({"params": model.second.parameters(), "lr": 0.5})
    train(model, optimizer, range(3, 4))
    assert optimizer.last_lr == [COSINE(3, 0.1), COSINE(3, 0.5)]
    assert float(optimizer.state[model.first.weight]["step"]) == 4
    assert float(optimizer.state[model.second.weight]["step"]) == 1


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.first.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optimizer.add_param_group({"params": model.second.parameters(), "lr": -1.0})
    with pytest.raises(TypeError, match="schedule must be a schedule"):
        optimizer.add_param_group({"params": list(model.second.parameters()), "schedule": 3})
    assert len(optimizer.param_groups) == 1
    before = copy.deepcopy(model.second.state_dict())
    train(model, optimizer, range(2))
    assert all(torch.equal(value, before[key]) for key, value in model.second.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_put_into_and_taken_out_of_a_group(backend: str, seed: int) -> None:
    """Some fine-tuning scripts edit group["params"] by hand."""
    model = make_model()
    other = copy.deepcopy(model)
    optimizer = fusedlr.Adam(model.first.parameters(), lr=0.1, backend=backend)
    oracle = torch.optim.Adam(other.first.parameters(), lr=0.1, foreach=False)
    for step in range(6):
        for m, o in ((model, optimizer), (other, oracle)):
            if step == 2:
                o.param_groups[0]["params"].append(m.second.weight)
            if step == 4:
                o.param_groups[0]["params"] = [m.first.bias, m.second.weight]
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
    assert_same_model(model, other, **CLOSE)


# ---- closures, hooks, gradients set to zero, names ---------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closure_computes_the_loss_and_the_gradients(backend: str, seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1, backend=backend)
    x = torch.randn(6, 5)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert optimizer.step() is None


def test_a_step_without_any_gradient_is_none(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.Adam(model.parameters(), schedule=COSINE, clip=1.0)
    assert optimizer.step(lambda: 3.5) == 3.5
    assert optimizer.steps_taken == 0
    assert not optimizer.state


def test_step_hooks_run_around_the_step(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1)
    seen: list[Any] = []
    before = model.first.weight.detach().clone()
    first = optimizer.register_step_pre_hook(
        lambda o, args, kwargs: seen.append(torch.equal(model.first.weight, before))
    )
    second = optimizer.register_step_post_hook(
        lambda o, args, kwargs: seen.append(torch.equal(model.first.weight, before))
    )
    train(model, optimizer, range(1))
    assert seen == [True, False]
    first.remove()
    second.remove()
    train(model, optimizer, range(1, 2))
    assert len(seen) == 2


def test_a_pre_hook_may_change_the_gradients(seed: int) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1)
    oracle = torch.optim.SGD(other.parameters(), lr=0.1)

    def double(o: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for p in o.param_groups[0]["params"]:
            p.grad = p.grad * 2

    optimizer.register_step_pre_hook(double)
    oracle.register_step_pre_hook(double)
    train(model, optimizer, range(3))
    train(other, oracle, range(3))
    assert_same_model(model, other, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool, backend: str, seed: int) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, clip=0.5, backend=backend)
    oracle = torch.optim.AdamW(other.parameters(), lr=0.1)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for m in (model, other):
            m(x).square().sum().backward()
        clip_by_hand(clipping.GlobalNorm(0.5), list(other.parameters()))
        optimizer.step()
        oracle.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        oracle.zero_grad(set_to_none=set_to_none)
        for p in model.parameters():
            assert p.grad is None if set_to_none else not p.grad.any()
    # The two models differ by roundings, so the gradients they compute do as well.
    assert_same_model(model, other, rtol=2e-5, atol=2e-5)


def test_the_profiler_shows_the_step_by_torchs_name(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own warnings differ from version to version
        with profile() as recorded:
            train(model, optimizer, range(1))
            optimizer.zero_grad()
    names = {event.key for event in recorded.key_averages()}
    assert "Optimizer.step#AdamW.step" in names
    assert "Optimizer.zero_grad#AdamW.zero_grad" in names


@pytest.mark.parametrize("backend", BACKENDS)
def test_repr_names_the_backend_and_the_clip(backend: str, seed: int) -> None:
    optimizer = fusedlr.AdamW(make_model().parameters(), lr=0.1, backend=backend, clip=2.0, schedule=COSINE)
    shown = repr(optimizer)
    assert shown.startswith("AdamW (")
    assert f"backend: {backend} for cpu tensors (as asked)" in shown
    assert "GlobalNorm(max_norm=2.0" in shown
    assert repr(COSINE) in shown
    assert "(by default)" in repr(fusedlr.SGD(make_model().parameters(), lr=0.1))


def test_last_grad_norm_is_the_norm_before_clipping(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, clip=0.25)
    assert math.isnan(float(optimizer.last_grad_norm))
    for step in range(2):
        train(model, optimizer, range(step, step + 1))
        expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()
        assert optimizer.last_grad_norm.dtype == torch.float32
        assert optimizer.last_grad_norm.ndim == 0
        torch.testing.assert_close(optimizer.last_grad_norm.double(), expected, rtol=3e-7, atol=0)
    assert fusedlr.AdamW(model.parameters(), clip=clipping.Value(1.0)).last_grad_norm is None
