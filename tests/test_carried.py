"""Numbers that a tensor carries beside its step (NAdam's mu_product), and state that is there from the beginning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import BACKENDS
from torch import nn
from training import CLOSE, assert_same_model, make_model, through_file, train

import fusedlr


@pytest.mark.parametrize("source", ["torch", "fusedlr"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_carried_number_keeps_its_digits(source: str, dtype: torch.dtype, seed: int) -> None:
    """torch's loader would cast it to the dtype of the parameter."""
    model = make_model(dtype)
    trained: Any = (torch.optim if source == "torch" else fusedlr).NAdam(model.parameters(), lr=0.01)
    train(model, trained, range(3))
    wanted = [trained.state[p]["mu_product"].clone() for p in model.parameters()]
    other = copy.deepcopy(model)
    loaded = fusedlr.NAdam(other.parameters(), lr=0.01)
    for _ in range(2):  # into nothing, and into state that is there
        loaded.load_state_dict(through_file(trained.state_dict()))
        for p, value in zip(other.parameters(), wanted, strict=True):
            got = loaded.state[p]["mu_product"]
            assert got.dtype == torch.float32 and got.shape == () and torch.equal(got, value)
            assert float(got) != float(got.to(dtype)), "a number that the cast would not show"
        train(other, loaded, range(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_carry_different_numbers_are_stepped_by_their_own(backend: str, seed: int) -> None:
    """Equal step counts, and another mu_product each, as a moving beta1 and missing gradients leave them."""
    model = make_model()
    optimizer = fusedlr.NAdam(model.parameters(), lr=0.01, backend=backend)
    oracle_model = copy.deepcopy(model)
    oracle = torch.optim.NAdam(oracle_model.parameters(), lr=0.01, foreach=False)
    train(model, optimizer, range(2))
    train(oracle_model, oracle, range(2))
    for i, (p, q) in enumerate(zip(model.parameters(), oracle_model.parameters(), strict=True)):
        optimizer.state[p]["mu_product"] = torch.tensor(0.1 + 0.2 * i)
        oracle.state[q]["mu_product"] = torch.tensor(0.1 + 0.2 * i)
    train(model, optimizer, range(2, 5))
    train(oracle_model, oracle, range(2, 5))
    assert_same_model(model, oracle_model, **CLOSE)
    for p, q in zip(model.parameters(), oracle_model.parameters(), strict=True):
        value = float(oracle.state[q]["mu_product"])
        assert float(optimizer.state[p]["mu_product"]) == pytest.approx(value, rel=1e-6)


def test_a_carried_number_must_be_one_number(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.NAdam(model.parameters())
    train(model, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["mu_product"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"parameter 1 has as 'mu_product' a tensor of shape \(2,\), but a single"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adagrads_sums_are_there_before_the_first_step(backend: str, seed: int) -> None:
    model = make_model()
    groups = [{"params": [p]} for p in model.parameters()]
    # As in torch, the constructor's value is that of every group.
    groups[0]["initial_accumulator_value"] = 5.0  # type: ignore[assignment]
    other = copy.deepcopy(model)
    theirs = [{**group, "params": [q]} for group, q in zip(groups, other.parameters(), strict=True)]
    optimizer = fusedlr.Adagrad(groups, initial_accumulator_value=0.25, backend=backend)
    oracle = torch.optim.Adagrad(theirs, initial_accumulator_value=0.25, foreach=False)
    late, twin = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late]})
    oracle.add_param_group({"params": [twin]})
    for _ in range(2):
        for p, q in zip([*model.parameters(), late], [*other.parameters(), twin], strict=True):
            ours, torchs = optimizer.state.get(p, {}), oracle.state.get(q, {})
            assert ours.keys() == torchs.keys()
            for key, value in torchs.items():
                torch.testing.assert_close(ours[key], value, **CLOSE)
        for n, (p, q) in enumerate(zip([*model.parameters(), late], [*other.parameters(), twin], strict=True)):
            p.grad = torch.full_like(p, 0.5 + n)
            q.grad = p.grad.clone()
        optimizer.step()
        oracle.step()
    assert_same_model(model, other, **CLOSE)
    torch.testing.assert_close(late, twin, **CLOSE)
    optimizer.state.clear()  # a parameter whose state was removed starts anew
    optimizer.step()
    assert all(bool((optimizer.state[p]["sum"] == 0.25 + p.grad**2).all()) for p in model.parameters())


def test_adagrad_cannot_share_its_memory() -> None:
    with pytest.raises(NotImplementedError, match=r"use torch.optim.Adagrad for training without locks"):
        fusedlr.Adagrad(make_model().parameters()).share_memory()
