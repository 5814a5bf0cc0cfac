"""Copies, pickles, and the files of models whose parameters live in flat buffers."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import STATEFUL, Case
from torch import nn
from training import COSINE, assert_same_model, make_model, train

import fusedlr

# ---- copies and pickles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_a_copy_of_model_and_optimizer_continues_identically(case: Case, steps: int, how: str, seed: int) -> None:
    model = make_model()
    optimizer = case.make(model.parameters(), schedule=COSINE, clip=0.7, nonfinite="skip")
    train(model, optimizer, range(steps))
    if how == "deepcopy":
        other, copied = copy.deepcopy((model, optimizer))
    else:
        other, copied = pickle.loads(pickle.dumps((model, optimizer)))
    assert type(copied) is type(optimizer)
    assert copied.clip == optimizer.clip
    assert copied.steps_taken == steps
    assert copied.last_lr == optimizer.last_lr
    assert all(p is q for p, q in zip(copied.param_groups[0]["params"], other.parameters(), strict=True))
    before = copy.deepcopy(model.state_dict())
    train(other, copied, range(steps, steps + 3))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"stepping the copy changed {key} of the original"
    train(model, optimizer, range(steps, steps + 3))
    # Unpickled parameters stay where they are, and a vectorised loop rounds its last elements by other instructions:
    # half a unit in the last place for each of a few operations of three steps.
    close = {"rtol": 3e-6, "atol": 3e-7} if how == "pickle" else {}
    assert_same_model(model, other, **close)
    assert copied.last_lr == optimizer.last_lr


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own(case: Case, seed: int) -> None:
    model = make_model()
    optimizer = case.make(model.parameters(), schedule=COSINE)
    train(model, optimizer, range(2))
    before = copy.deepcopy(model.state_dict())
    copied = copy.deepcopy(optimizer)
    assert copied.steps_taken == 2
    for p, q in zip(model.parameters(), copied.param_groups[0]["params"], strict=True):
        q.grad = torch.ones_like(p)
    copied.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), copied.param_groups[0]["params"], strict=True))


def test_a_copy_of_the_model_alone_is_not_stepped(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1)
    other = copy.deepcopy(model)
    train(model, optimizer, range(2))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert not torch.equal(p, q)


# ---- files of the model ------------------------------------------------------------------------------------------


def file_size(value: Any) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def test_a_saved_submodule_does_not_drag_the_flat_buffer_along(seed: int) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    plain = copy.deepcopy(model)
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    assert file_size(model[3].state_dict()) == file_size(plain[3].state_dict())
    assert file_size(model.state_dict()) == file_size(plain.state_dict())
    assert file_size(model[0].bias) == file_size(plain[0].bias)
    one = optimizer.state[model[0].bias]["exp_avg"]
    assert file_size(one) == file_size(torch.zeros(64)), "a moment drags its bank along"


def test_an_optimizers_file_is_not_larger_than_torchs(seed: int) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    plain = copy.deepcopy(model)
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, schedule=COSINE)
    oracle = torch.optim.AdamW(plain.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    train(plain, oracle, range(2))
    own_data = 4096  # fusedlr's keys in the group, and torch.save's alignment of the records behind them
    assert file_size(optimizer.state_dict()) <= file_size(oracle.state_dict()) + own_data


def test_safetensors_saves_and_loads_the_model(tmp_path: Path, seed: int) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    other = make_model()
    other_optimizer = fusedlr.AdamW(other.parameters(), lr=0.1)
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert_same_model(model, other)
    other_optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    train(other, other_optimizer, range(2, 4))
    assert_same_model(model, other)


def test_a_model_file_loads_with_weights_only(tmp_path: Path, seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, schedule=COSINE, clip=1.0)
    train(model, optimizer, range(2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert loaded["optimizer"]["param_groups"][0]["schedule"] == repr(COSINE)
    other = make_model()
    other.load_state_dict(loaded["model"])
    assert_same_model(model, other)
