"""Parameters and state that somebody replaces, moves, shares or clears between two steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from training import CLOSE, COSINE, assert_same_model, make_model, train

import fusedlr


def replace_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 1.5


def replace_one(model: nn.Module) -> None:
    model.first.bias.data = torch.full((4,), 0.25)


def transpose_in_memory(model: nn.Module) -> None:
    model.first.weight.data = model.first.weight.data.t().contiguous().t()


def leave_gaps(model: nn.Module) -> None:
    wide = torch.zeros(4, 10)
    wide[:, ::2] = model.first.weight.data
    model.first.weight.data = wide[:, ::2]


def share(model: nn.Module) -> None:
    model.share_memory()


def from_vector(model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()) * 0.5, model.parameters())


def written_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)


def load(model: nn.Module) -> None:
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()})


def one_buffer(model: nn.Module) -> None:
    """What frameworks with flat parameters of their own do."""
    buffer = torch.zeros(100)
    at = 3
    for p in model.parameters():
        buffer[at : at + p.numel()] = p.data.reshape(-1)
        p.data = buffer[at : at + p.numel()].view(p.shape)
        at += p.numel()


CHANGES: list[Callable[[nn.Module], None]] = [
    replace_data,
    replace_one,
    transpose_in_memory,
    leave_gaps,
    share,
    from_vector,
    written_in_place,
    load,
    one_buffer,
]


@pytest.mark.parametrize("when", [0, 2], ids=["before the first step", "later"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_parameters_that_move_are_found(
    change: Callable[[nn.Module], None], backend: str, when: int, seed: int
) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.01, backend=backend)
    oracle = torch.optim.AdamW(other.parameters(), lr=0.01, foreach=False)
    for step in range(4):
        if step == when:
            change(model)
            change(other)
            places = [p.data_ptr() for p in model.parameters()]
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
        if step >= when:
            assert [p.data_ptr() for p in model.parameters()] == places, "moved a second time"
    assert_same_model(model, other, **CLOSE)


@pytest.mark.parametrize("when", [0, 2], ids=["before the first step", "later"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_model_may_change_its_dtype(name: str, backend: str, when: int, seed: int) -> None:
    """The state follows the parameters, as far as the new dtype holds it (here: all of it)."""
    model = make_model()
    other = copy.deepcopy(model)
    kwargs = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(fusedlr, name)(model.parameters(), lr=0.01, backend=backend, **kwargs)
    oracle = getattr(torch.optim, name)(other.parameters(), lr=0.01, foreach=False, **kwargs)
    for step in range(4):
        if step == when:
            model.double()
            other.double()
            oracle.load_state_dict(oracle.state_dict())  # casts the state, which torch's Adam does not do by itself
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
    for p in model.parameters():
        assert p.dtype == torch.float64
        for key, value in optimizer.state[p].items():
            assert key == "step" or value.dtype == torch.float64
    assert_same_model(model, other, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_view_of_the_same_memory_is_noticed(backend: str, seed: int) -> None:
    """No pointer changes, but the gradients that autograd makes now lie as the turned parameter does."""
    p = nn.Parameter(torch.randn(6, 6))
    q = nn.Parameter(p.detach().clone())
    optimizer = fusedlr.AdamW([p], lr=0.05, backend=backend)
    oracle = torch.optim.AdamW([q], lr=0.05, foreach=False)
    for step in range(4):
        if step == 2:
            p.data = p.data.t()
            q.data = q.data.t()
        g = torch.randn(6, 6)
        p.grad = torch.empty_like(p).copy_(g)
        q.grad = torch.empty_like(q).copy_(g)
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(p, q, **CLOSE)


def test_another_shape_without_its_state_is_an_error(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, range(2))
    model.first.weight.data = model.first.weight.data.view(5, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'exp_avg' of shape \(4, 5\), but the parameter has shape \(5, 4\)"):
        train(model, optimizer, range(2, 3))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert optimizer.steps_taken == 2
    optimizer.state[model.first.weight] = {}
    train(model, optimizer, range(2, 3))
    assert float(optimizer.state[model.first.weight]["step"]) == 1


def test_load_state_dict_with_assign_leaves_the_optimizer_with_the_old_parameters(seed: int) -> None:
    """assign=True puts other Parameter objects into the model, of which no optimizer of torch knows either."""
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, range(1))
    held = optimizer.param_groups[0]["params"]
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    assert not any(p is q for p, q in zip(model.parameters(), held, strict=True))
    before = copy.deepcopy(model.state_dict())
    for p in held:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fresh = fusedlr.AdamW(model.parameters(), lr=0.1)
    train(model, fresh, range(1))
    assert not any(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_optimizer_made_before_assigned_weights_are_moved(seed: int) -> None:
    """assign=True, then the optimizer: the weights come from a file's tensors and are stepped all the same."""
    source = make_model()
    weights = {key: value.clone() for key, value in source.state_dict().items()}
    model = make_model()
    model.load_state_dict(weights, assign=True)
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1)
    oracle = torch.optim.SGD(source.parameters(), lr=0.1)
    train(model, optimizer, range(3))
    train(source, oracle, range(3))
    assert_same_model(model, source, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_requires_grad_switched_between_steps(backend: str, seed: int) -> None:
    model = make_model()
    model.first.weight.requires_grad_(False)
    other = copy.deepcopy(model)
    optimizer = fusedlr.Adam(model.parameters(), lr=0.05, backend=backend)
    oracle = torch.optim.Adam(other.parameters(), lr=0.05, foreach=False)
    x = torch.randn(7, 5)
    for step in range(6):
        for m, o in ((model, optimizer), (other, oracle)):
            m.first.weight.requires_grad_(step in (2, 3, 5))
            m.second.bias.requires_grad_(step != 3)
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
    assert_same_model(model, other, rtol=2e-5, atol=2e-5)  # gradients come from models that differ by roundings
    assert float(optimizer.state[model.first.weight]["step"]) == 3
    assert float(optimizer.state[model.second.bias]["step"]) == 5


# ---- state -------------------------------------------------------------------------------------------------------


def clear_all(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def clear_one(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model.first.weight] = {}


def delete_one(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[model.second.weight]


def new_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    from collections import defaultdict

    optimizer.state = defaultdict(dict)


def replace_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As Lightning moves state to a device."""
    for p, entry in optimizer.state.items():
        optimizer.state[p] = {key: value.clone() for key, value in entry.items()}


def replace_a_moment(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Tensor surgery, as when tokens or Gaussians are added: the moments of some rows start anew."""
    entry = optimizer.state[model.first.weight]
    moment = entry["exp_avg"].clone()
    moment[1:3] = 0
    entry["exp_avg"] = moment


def write_a_moment(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model.first.weight]["exp_avg_sq"].mul_(4)
    optimizer.state[model.first.bias]["step"].fill_(40)


STATE_CHANGES: list[Any] = [
    clear_all,
    clear_one,
    delete_one,
    new_dict,
    replace_tensors,
    replace_a_moment,
    write_a_moment,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", STATE_CHANGES, ids=lambda change: change.__name__)
def test_state_changed_from_outside_is_taken_as_torch_takes_it(change: Any, backend: str, seed: int) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.01, backend=backend, schedule=COSINE)
    oracle = torch.optim.AdamW(other.parameters(), lr=0.01, foreach=False)
    for step in range(6):
        if step == 3:
            change(model, optimizer)
            change(other, oracle)
        oracle.param_groups[0]["lr"] = COSINE(step, 0.01)
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
    assert_same_model(model, other, **CLOSE)
    assert optimizer.steps_taken == 6, "the clock of the schedule is not part of the state of a parameter"
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert float(optimizer.state[p]["step"]) == float(oracle.state[q]["step"])


def test_a_key_of_somebody_elses_stays(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(1))
    optimizer.state[model.first.weight]["ema"] = torch.ones(3)
    train(model, optimizer, range(1, 3))
    assert torch.equal(optimizer.state[model.first.weight]["ema"], torch.ones(3))
    assert "ema" in optimizer.state_dict()["state"][0]


def test_a_parameter_cut_shorter_with_its_state(seed: int) -> None:
    """Pruning rows: a shorter parameter takes the place of the old one, with its part of the state."""
    model = make_model()
    other = copy.deepcopy(model)
    optimizer = fusedlr.Adam(model.parameters(), lr=0.05)
    oracle = torch.optim.Adam(other.parameters(), lr=0.05, foreach=False)
    for step in range(4):
        if step == 2:
            for m, o in ((model, optimizer), (other, oracle)):
                old = m.second.weight
                entry = o.state.pop(old)
                m.second.weight = nn.Parameter(old.detach()[:2].clone())
                m.second.bias.data = m.second.bias.data[:2].clone()
                kept = {key: value if key == "step" else value[:2].clone() for key, value in entry.items()}
                o.state[m.second.weight] = kept
                bias = o.state[m.second.bias]
                o.state[m.second.bias] = {k: v if k == "step" else v[:2].clone() for k, v in bias.items()}
                params = o.param_groups[0]["params"]
                params[[p is old for p in params].index(True)] = m.second.weight
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
    assert_same_model(model, other, **CLOSE)
