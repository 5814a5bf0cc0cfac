"""What only some optimizers have: Lion's NaN, RMSprop's scheduled momentum, RAdam's start, NAdam's skipped steps."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BACKENDS
from references import Lion
from torch import Tensor, nn
from training import CLOSE, assert_same_model, make_model, train

import fusedlr
from fusedlr import schedules


def stepped(optimizer: torch.optim.Optimizer, p: nn.Parameter, *grads: Tensor) -> Tensor:
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
def test_lion_shows_a_nan(backend: str) -> None:
    """torch.sign would make 0 of it: the momentum would be NaN and the weight stand still for ever."""
    p = nn.Parameter(torch.zeros(5))
    optimizer = fusedlr.Lion([p], lr=0.5, backend=backend)
    bad = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -2.0])
    after = stepped(optimizer, p, bad)
    assert after[0].isnan()
    assert after[1:].tolist() == [-0.5, 0.5, 0.0, 0.5]


def test_lion_has_the_papers_defaults() -> None:
    model, other = make_model(), make_model()
    optimizer, oracle = fusedlr.Lion(model.parameters()), Lion(other.parameters())
    for key in ("lr", "betas", "weight_decay", "maximize"):
        assert optimizer.defaults[key] == oracle.defaults[key]
    assert optimizer.defaults["betas"] == (0.9, 0.99) and optimizer.defaults["lr"] == 1e-4


def test_lion_by_hand() -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = fusedlr.Lion([p], lr=0.1, betas=(0.75, 0.5), weight_decay=0.5)
    first, second = torch.tensor([2.0, -1.0, 0.0]).double(), torch.tensor([-4.0, -1.0, 1.0]).double()
    # m = (1, -0.5, 0) after the first step; the second blends 0.75*m + 0.25*g = (-0.25, -0.625, 0.25).
    after = stepped(optimizer, p, first, second)
    wanted = [(1.0 * 0.95 - 0.1) * 0.95 + 0.1, (-2.0 * 0.95 + 0.1) * 0.95 + 0.1, 0.5 * 0.95 * 0.95 - 0.1]
    assert after.tolist() == pytest.approx(wanted, rel=1e-15, abs=0)
    assert optimizer.state[p]["exp_avg"].tolist() == [-1.5, -0.75, 0.5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rmsprops_momentum_may_be_scheduled_through_zero(backend: str, seed: int) -> None:
    model, other = make_model(), make_model()
    other.load_state_dict(model.state_dict())
    momenta = schedules.Table([1.0, 0.5, 0.0, 0.25])
    own = {"schedule": {"momentum": momenta}, "backend": backend}
    optimizer = fusedlr.RMSprop(model.parameters(), lr=0.01, momentum=0.8, **own)  # type: ignore[arg-type]
    oracle = torch.optim.RMSprop(other.parameters(), lr=0.01, momentum=0.8, foreach=False)
    for step in range(4):
        # A momentum that torch takes for one, and that is as good as 0.
        oracle.param_groups[0]["momentum"] = momenta(step, 0.8) or 1e-30
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
    assert_same_model(model, other, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decoupled", [False, True])
def test_radam_goes_with_torch_over_the_step_that_is_rectified_first(decoupled: bool, backend: str, seed: int) -> None:
    model, other = make_model(), make_model()
    other.load_state_dict(model.state_dict())
    kwargs = {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    optimizer = fusedlr.RAdam(model.parameters(), backend=backend, **kwargs)  # type: ignore[arg-type]
    oracle = torch.optim.RAdam(other.parameters(), foreach=False, **kwargs)  # type: ignore[arg-type]
    for step in range(9):
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
        # Ten roundings in each of up to nine steps, of numbers of order 1.
        assert_same_model(model, other, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
def test_a_skipped_step_leaves_the_product_of_nadam(backend: str, seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.NAdam(model.parameters(), lr=0.01, nonfinite="skip", backend=backend)
    train(model, optimizer, range(2))
    before = [(float(s["step"]), float(s["mu_product"])) for s in optimizer.state.values()]
    next(model.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
    optimizer.step()
    assert [(float(s["step"]), float(s["mu_product"])) for s in optimizer.state.values()] == before
    train(model, optimizer, range(2, 3))
    assert all(float(s["mu_product"]) < m for s, (_, m) in zip(optimizer.state.values(), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_adagrad_starts_at_its_value_under_a_schedule_and_a_clip(backend: str) -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = fusedlr.Adagrad(
        [p], lr=1.0, lr_decay=0.5, initial_accumulator_value=9.0, eps=1e-14, schedule=schedules.Constant(0.5), clip=5.0,
        backend=backend,
    )  # fmt: skip
    g = torch.tensor([4.0, 0.0], dtype=torch.float64)
    after = stepped(optimizer, p, g, g)
    # sqrt(9 + 16) = 5, then sqrt(25 + 16); the second lr is 0.5/(1 + 0.5).
    assert after.tolist() == pytest.approx([-0.5 * 4 / 5 - 0.5 / 1.5 * 4 / math.sqrt(41), 0.0], rel=1e-12)
    assert optimizer.state[p]["sum"].tolist() == [41.0, 9.0]
