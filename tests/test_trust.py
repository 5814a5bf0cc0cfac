"""Trust ratios of LAMB and LARS: beside the papers' references under every clip, by hand, and at the edges of range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import BACKENDS, BY_NAME, CLIPS, FEW, LARGE, TINY
from references import LAMB, LARS
from test_parity import check_step_by_step
from torch import Tensor, nn
from training import CLOSE, assert_same_model, make_model, train

import fusedlr
from fusedlr import clipping, schedules

# Triton's interpreter computes with numpy, which warns of what some tests do on purpose: squares beyond float32.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def stepped(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


@pytest.mark.parametrize("clip", CLIPS, ids=repr)
@pytest.mark.parametrize("name", ["lamb-default", "lars-default"])
def test_every_clip(name: str, clip: Any, backend: str, seed: int, triton_device: torch.device) -> None:
    device = triton_device if backend == "triton" else torch.device("cpu")
    check_step_by_step(BY_NAME[name], FEW, torch.float32, device, clip, backend=backend)


@pytest.mark.parametrize("clip", [None, clipping.TensorNorm(1.0)], ids=repr)
@pytest.mark.parametrize("name", ["lamb-default", "lars-nesterov"])
def test_small_tensors_that_are_stepped_together_have_ratios_of_their_own(
    name: str, clip: Any, backend: str, seed: int, triton_device: torch.device
) -> None:
    device = triton_device if backend == "triton" else torch.device("cpu")
    layouts = dict(list(TINY.items())[: 20 if backend == "triton" else None])
    check_step_by_step(BY_NAME[name], layouts, torch.float32, device, clip, backend=backend)


@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "in-place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lamb-as-it-comes", "lars-default"])
def test_tensors_larger_than_a_chunk(name: str, dtype: torch.dtype, flatten: bool, seed: int) -> None:
    clip = clipping.GlobalNorm(300.0)
    check_step_by_step(BY_NAME[name], LARGE, dtype, "cpu", clip, backend="torch", flatten=flatten)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_by_hand(dtype: torch.dtype, backend: str) -> None:
    """|p| = 5, |g| = 10; LAMB's first update is the sign of the gradient, sqrt(2) long."""
    p, q = (nn.Parameter(torch.tensor([3.0, -4.0], dtype=dtype)) for _ in range(2))
    g = torch.tensor([6.0, 8.0], dtype=dtype)
    stepped(fusedlr.LAMB([p], lr=0.5, eps=0.0, weight_decay=0.0, backend=backend), [p], [g])
    length = 0.5 * 5 / math.sqrt(2)
    assert p.tolist() == pytest.approx([3 - length, -4 - length], rel=1e-6)
    lars = fusedlr.LARS([q], lr=0.5, momentum=0.5, weight_decay=2.0, trust_coefficient=0.1, eps=5.0, backend=backend)
    stepped(lars, [q], [g])
    # 0.1*5/(10 + 2*5 + 5) = 0.02 of (6 + 2*3, 8 - 2*4).
    assert q.tolist() == pytest.approx([3 - 0.5 * 0.02 * 12, -4.0], rel=1e-6)
    assert lars.state[q]["momentum_buffer"].tolist() == pytest.approx([0.24, 0.0], rel=1e-6, abs=1e-7)


def test_the_ratio_is_1_where_a_norm_is_0(backend: str) -> None:
    zero, one, still = (nn.Parameter(torch.full((3,), value)) for value in (0.0, 1.0, 1.0))
    params = [zero, one, still]
    grads = [torch.tensor([2.0, 0.0, -2.0]), torch.zeros(3), torch.zeros(3)]
    stepped(fusedlr.LAMB(params, lr=0.1, weight_decay=0.0, backend=backend), params, grads)
    assert zero.tolist() == pytest.approx([-0.1, 0.0, 0.1], rel=1e-5)  # eps is 1e-6 of the update
    assert one.tolist() == still.tolist() == [1.0] * 3
    with torch.no_grad():
        zero.zero_()
    stepped(fusedlr.LARS(params, lr=0.1, weight_decay=0.5, backend=backend), params, grads)
    assert zero.tolist() == pytest.approx([-0.2, 0.0, 0.2], rel=1e-6)
    assert one.tolist() == pytest.approx([0.95] * 3, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("cls", [fusedlr.LAMB, fusedlr.LARS])
def test_a_non_finite_gradient_shows_and_stays_in_its_tensor(cls: Any, bad: float, backend: str) -> None:
    params = [nn.Parameter(torch.ones(2000)), nn.Parameter(torch.ones(4))]
    grads = [torch.ones(2000), torch.ones(4)]
    grads[0][5] = bad
    stepped(cls(params, lr=0.1, weight_decay=0.1, backend=backend), params, grads)
    assert params[0][5].isnan()
    # A NaN makes the norm NaN, and an inf makes it inf: the others stand still then.
    assert params[0].isnan().all() if math.isnan(bad) or cls is fusedlr.LAMB else (params[0][:5] == 1).all()
    assert params[1].isfinite().all() and (params[1] < 1).all()


# The ratio of the norms is a float32, and must be one.
MAGNITUDES = [(1e20, 1e20), (1e-30, 1e-30), (1e20, 1e-10), (1e-25, 1e10), (1e-44, 1e-44), (1e37, 1.0), (1.0, 1e37)]


@pytest.mark.parametrize("numel", [1, 1500])
@pytest.mark.parametrize("p_size, g_size", MAGNITUDES)
def test_norms_keep_their_range(p_size: float, g_size: float, numel: int, backend: str, seed: int) -> None:
    """Float32 whose squares are no float32: the step is as long as it would be in float64."""
    p = nn.Parameter((1 + torch.rand(numel, dtype=torch.float64)).mul(p_size).float())
    g = (1 + torch.rand(numel, dtype=torch.float64)).mul(g_size).float()
    wide = nn.Parameter(p.detach().double())
    stepped(fusedlr.LARS([p], lr=0.5, trust_coefficient=1.0, eps=0.0, backend=backend), [p], [g])
    stepped(LARS([wide], lr=0.5, trust_coefficient=1.0, eps=0.0), [wide], [g.double()])
    # Sums of 1500 squares are within 1e-6, and the update is as long as the parameter, half of which it may cancel. The
    # smallest float32 is 1.4e-45.
    torch.testing.assert_close(p.detach().double(), wide.detach(), rtol=0, atol=2e-6 * 2 * p_size + 2e-45)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_norms_of_float64_keep_their_range(size: float, backend: str, seed: int) -> None:
    p = nn.Parameter((1 + torch.rand(1500, dtype=torch.float64)) * size)
    before, g = p.detach().clone(), (1 + torch.rand(1500, dtype=torch.float64)) * size
    stepped(fusedlr.LARS([p], lr=0.5, trust_coefficient=0.5, eps=0.0, backend=backend), [p], [g])
    ratio = 0.5 * float((before / size).norm() / (g / size).norm())
    # At least half of the parameter stays; 1500 roundings in each sum, and the logarithms of the kernel's root.
    torch.testing.assert_close(p.detach(), before - 0.5 * ratio * g, rtol=1e-12, atol=0)


@pytest.mark.parametrize("cls, reference", [(fusedlr.LAMB, LAMB), (fusedlr.LARS, LARS)])
def test_a_chunk_of_extreme_numbers_beside_ordinary_ones(cls: Any, reference: Any, backend: str, seed: int) -> None:
    """Chunks that are summed scaled, beside chunks that are not, in one tensor: their sums must fit together."""
    values = torch.randn(4096)
    values[1024:2048] *= 1e18
    values[2048:3072] *= 1e-25
    p, wide = nn.Parameter(values.clone()), nn.Parameter(values.double())
    g = torch.randn(4096) * torch.logspace(-30, 15, 4096)
    stepped(cls([p], lr=0.01, weight_decay=0.1, backend=backend), [p], [g])
    stepped(reference([wide], lr=0.01, weight_decay=0.1), [wide], [g.double()])
    # Ten roundings of numbers no larger than the value and its change, of float32.
    bound = 1e-6 * (wide.detach().abs() + (wide.detach() - values.double()).abs())
    assert ((p.detach().double() - wide.detach()).abs() <= bound).all()


@pytest.mark.parametrize("name", ["lamb-default", "lars-default"])
def test_a_skipped_step_leaves_no_trace_and_the_next_is_as_without(name: str, backend: str, seed: int) -> None:
    model, other = make_model(), make_model()
    other.load_state_dict(model.state_dict())
    optimizer = BY_NAME[name].make(model.parameters(), nonfinite="skip", clip=1.0, backend=backend)
    twin = BY_NAME[name].make(other.parameters(), nonfinite="skip", clip=1.0, backend=backend)
    train(model, optimizer, range(2))
    next(model.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
    optimizer.step()
    train(model, optimizer, range(2, 4))
    train(other, twin, range(4))
    assert_same_model(model, other)
    assert int(optimizer.skipped_steps) == 1


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_scheduled_scalars_reach_the_ratio(name: str, backend: str, seed: int) -> None:
    """The weight decay in the direction of LAMB and in the ratio of LARS, the trust coefficient, the lr, two groups."""
    model, other = make_model(), make_model()
    other.load_state_dict(model.state_dict())
    tables = {"lr": schedules.Table([0.1, 0.2, 0.05]), "weight_decay": schedules.Table([0.5, 0.0, 2.0])}
    if name == "lars":
        tables["trust_coefficient"] = schedules.Table([1.0, 0.1, 0.5])
        tables["momentum"] = schedules.Table([0.5, 0.0, 0.9])
    base = {"lr": 0.1, "weight_decay": 0.5} | ({"momentum": 0.9, "trust_coefficient": 1.0} if name == "lars" else {})
    cls, reference = (fusedlr.LAMB, LAMB) if name == "lamb" else (fusedlr.LARS, LARS)

    def groups(of: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(part.parameters())} for part in (of.first, of.second)]  # type: ignore[union-attr]

    optimizer = cls(groups(model), schedule=tables, backend=backend, **base)  # type: ignore[arg-type]
    oracle = reference(groups(other), **base)  # type: ignore[arg-type]
    for step in range(3):
        for group in oracle.param_groups:
            for key, table in tables.items():
                group[key] = table(step, float(base[key])) or (1e-30 if key == "momentum" else 0.0)
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
        assert_same_model(model, other, **CLOSE)


def test_the_same_inputs_give_the_same_bits(backend: str, seed: int) -> None:
    values, g = torch.randn(5000), torch.randn(5000)
    runs = []
    for _ in range(2):
        p = nn.Parameter(values.clone())
        optimizer = fusedlr.LAMB([p], clip=1.0, backend=backend)
        for _ in range(3):
            stepped(optimizer, [p], [g])
        runs.append(p.detach())
    assert torch.equal(*runs)


LAMB_WRONG = [
    ({"lr": -0.1}, "Invalid learning rate: -0.1"),
    ({"lr": math.nan}, "Invalid learning rate: nan"),
    ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
    ({"betas": (0.9, 0.9, 0.9)}, "betas must be two numbers"),
    ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
]
LARS_WRONG = [
    ({"lr": -0.1}, "Invalid learning rate: -0.1"),
    ({"momentum": -0.1}, "Invalid momentum value: -0.1"),
    ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ({"trust_coefficient": -1.0}, "trust_coefficient must be at least 0, but got -1.0"),
    ({"eps": math.nan}, "eps must be at least 0, but got nan"),
]


@pytest.mark.parametrize(
    "cls, arguments, message",
    [(fusedlr.LAMB, *wrong) for wrong in LAMB_WRONG] + [(fusedlr.LARS, *wrong) for wrong in LARS_WRONG],
    ids=str,
)
def test_bad_arguments(cls: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **arguments})
    optimizer = cls([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], **arguments})


@pytest.mark.parametrize("cls, reference", [(fusedlr.LAMB, LAMB), (fusedlr.LARS, LARS)])
def test_defaults_are_those_of_the_reference(cls: Any, reference: Any) -> None:
    ours = cls([nn.Parameter(torch.ones(1))], lr=0.1).defaults
    theirs = reference([nn.Parameter(torch.ones(1))], lr=0.1).defaults
    assert {key: ours[key] for key in theirs} == theirs


def test_unit_clipping_and_trust_ratios_are_not_combined() -> None:
    with pytest.raises(ValueError, match=r"AGC.*trust ratio of LAMB"):
        fusedlr.LAMB([torch.nn.Parameter(torch.ones(3))], clip=fusedlr.clipping.AGC())
