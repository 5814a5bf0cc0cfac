"""A small model with gradients that depend on the step alone, and what tests compare of two trainings."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from fusedlr import schedules

COSINE = schedules.Warmup(3).then(schedules.Cosine(20, min_lr=1e-4))


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    layers = OrderedDict(first=nn.Linear(5, 4), act=nn.Tanh(), second=nn.Linear(4, 3))
    return nn.Sequential(layers).to(dtype)


def split_groups(model: nn.Module, **second: Any) -> list[dict[str, Any]]:
    return [{"params": list(model.first.parameters())}, {"params": list(model.second.parameters()), **second}]


def gradients(model: nn.Module, step: int) -> None:
    """The gradients of a step: the same for the same step, whatever the model holds."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        optimizer.step()


def assert_same_model(a: nn.Module, b: nn.Module, rtol: float = 0.0, atol: float = 0.0) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left["state"].keys() == right["state"].keys()
    for index, entry in left["state"].items():
        assert entry.keys() == right["state"][index].keys()
        for key, value in entry.items():
            assert torch.equal(value, right["state"][index][key]), f"{key} of parameter {index}"
    assert left["param_groups"] == right["param_groups"]


def through_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Two float32 trainings by different operators: a few units in the last place of numbers of order 1, over six steps.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
