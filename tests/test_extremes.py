"""Numbers at the edges: averages that start anew, squares beyond the range, norms far above the clip, one bad step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import BACKENDS
from executors import backend_of, executor  # noqa: F401  # a fixture
from torch.nn import Parameter

import fusedlr
from fusedlr import clipping, schedules

# Triton's interpreter computes with numpy, which warns of what these tests do on purpose: numbers beyond float32.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

LARGE, SMALL = 1e8, 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax"])
def test_an_average_forgets_what_its_beta_says(name: str, beta: float, dtype: torch.dtype, backend: str) -> None:
    """beta 0 is usual for GANs: the average then is the gradient, however large the one before was."""
    p = Parameter(torch.ones(33, dtype=dtype))
    optimizer = getattr(fusedlr, name)([p], lr=1e-3, betas=(beta, 0.9), backend=backend)
    exact, steps = 0.0, [LARGE, *[SMALL] * (12 if backend == "torch" else 2)]
    for g in steps:
        p.grad = torch.full_like(p, g)
        optimizer.step()
        exact = beta * exact + (1 - beta) * float(p.grad[0])
    eps = torch.finfo(dtype).eps
    # Each step rounds once, relative to what it replaces, of which the share of the large one goes down as beta**n.
    bound = sum(eps * max(LARGE * beta**n, SMALL) * beta ** (len(steps) - 1 - n) for n in range(len(steps)))
    got = optimizer.state[p]["exp_avg"].double()
    assert (got - exact).abs().max() <= 2 * bound + eps * exact
    if beta == 0.0:
        torch.testing.assert_close(got, torch.full_like(got, exact), rtol=eps, atol=0)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "LAMB"])
def test_squares_that_leave_the_range_where_their_averages_do_not(name: str) -> None:
    """As in torch; the kernels multiply in another order, and their squares become inf from 1.8e19 on, not 5.8e20."""
    p = Parameter(torch.zeros(33))
    optimizer = getattr(fusedlr, name)([p], lr=1.0, weight_decay=0.0, backend="torch")
    p.grad = torch.full_like(p, 1e20)
    optimizer.step()
    (key,) = optimizer.state[p].keys() & {"exp_avg_sq", "square_avg"}
    torch.testing.assert_close(optimizer.state[p][key], torch.full((33,), 1e38 if name == "RMSprop" else 1e37))
    assert p.isfinite().all()
    assert name == "NAdam" or p.all()  # NAdam divides the average by 1 - beta2**step, as torch does: that is too large


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [clipping.GlobalNorm(1.0), clipping.GlobalNorm(1.0, norm_type=3.0),
                                  clipping.Normalize("global"), clipping.TensorNorm(1.0)], ids=repr)  # fmt: skip
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop"])
def test_one_bad_step_is_forgotten_with_the_weights_it_spoilt(name: str, bad: float, clip: Any, backend: str) -> None:
    """Tensors lie side by side with room between them: nothing of a bad step may stay there."""
    params = [Parameter(torch.ones(shape)) for shape in ((5,), (3, 3), (7,))]
    optimizer = getattr(fusedlr, name)(params, lr=0.1, clip=clip, backend=backend)

    def step(value: float) -> float:
        for p in params:
            p.grad = torch.full_like(p, 2.0)
        params[1].grad[0, 0] = value  # type: ignore[index]
        optimizer.step()
        return float(optimizer.last_grad_norm)  # type: ignore[arg-type]

    norm = step(2.0)
    step(bad)
    with torch.no_grad():
        for p in params:
            p.fill_(1.0)
            for key, value in optimizer.state[p].items():
                if key != "step":
                    value.zero_()
    assert step(2.0) == norm
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e1, 1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_gradients_far_above_the_clip_keep_their_digits(
    dampening: float, size: float, dtype: torch.dtype, backend: str, seed: int
) -> None:
    ours = Parameter(torch.randn(50, dtype=dtype))
    exact = ours.detach().double()
    optimizer = fusedlr.SGD([ours], lr=0.1, momentum=0.9, dampening=dampening, clip=1.0, backend=backend)
    buffer = torch.zeros(50, dtype=torch.float64)
    for step in range(4):
        ours.grad = torch.randn(50, dtype=dtype) * size
        g = ours.grad.double()
        g = g / (g.norm() + 1e-6)
        buffer = g if step == 0 else 0.9 * buffer + (1 - dampening) * g
        exact = exact - 0.1 * buffer
        optimizer.step()
    eps = torch.finfo(dtype).eps  # of weights about 1; the norm of float32 gradients is known to 4e-6
    torch.testing.assert_close(ours.detach().double(), exact, rtol=8 * eps, atol=8 * eps + (0 if eps < 1e-9 else 2e-6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-5, 1e1, 1e5, 1e9, 1e18])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad", "SGD"])
def test_gradients_of_small_tensors_come_into_state_by_their_factor(
    name: str, size: float, backend: str, seed: int
) -> None:
    """Small tensors lie side by side and may be scaled by the operator that steps them, but not by every factor."""
    params = [Parameter(torch.zeros(n)) for n in (3, 50, 7)]
    own = {"momentum": 0.9, "nesterov": True} if name == "SGD" else {}
    clip = clipping.Normalize("global", eps=0.0)
    optimizer = getattr(fusedlr, name)(params, lr=0.1, clip=clip, backend=backend, **own)
    given = [torch.randn(p.shape) * size for p in params]
    norm = torch.cat(given).double().norm()
    for p, g in zip(params, given, strict=True):
        p.grad = g.clone()
    optimizer.step()
    key, share, power = {"Adagrad": ("sum", 1.0, 2), "SGD": ("momentum_buffer", 1.0, 1)}.get(name, ("exp_avg", 0.1, 1))
    for p, g in zip(params, given, strict=True):
        assert p.grad is not None and torch.equal(p.grad, g)
        exact = share * (g.double() / norm) ** power
        # The norm, the factor, and twice what is made of them are rounded; a square doubles that.
        torch.testing.assert_close(optimizer.state[p][key].double(), exact, rtol=power * 1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["Lion", "Adam", "RMSprop"])
def test_a_factor_beyond_float32_is_forgotten_with_its_step(name: str, backend: str) -> None:
    """It makes inf of gradients and NaN of the zeros between small ones, where nothing may be left of it."""
    params = [Parameter(torch.zeros(n)) for n in (3, 50, 7)]
    clip = clipping.Normalize("global", eps=0.0)
    optimizer = getattr(fusedlr, name)(params, lr=0.01, clip=clip, nonfinite="skip", backend=backend)
    norms = []
    for size in (1.0, 1e-42, 1.0):
        for p in params:
            p.grad = torch.full_like(p, size)
        optimizer.step()
        norms.append(float(optimizer.last_grad_norm))  # type: ignore[arg-type]
    assert norms[0] == norms[2] == pytest.approx(math.sqrt(60), rel=1e-6, abs=0)
    assert int(optimizer.skipped_steps) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_overlap_with_gaps_take_the_updates_of_both(backend: str) -> None:
    memory = torch.zeros(3, 4)
    p, q = Parameter(memory[:, 0:2]), Parameter(memory[:, 1:3])
    optimizer = fusedlr.SGD([p, q], lr=1.0, backend=backend, clip=1e9)
    p.grad, q.grad = torch.ones(3, 2), torch.full((3, 2), 10.0)
    optimizer.step()
    torch.testing.assert_close(memory, torch.tensor([[-1.0, -11.0, -10.0, 0.0]] * 3))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have their parameter's dtype here")
@pytest.mark.parametrize("shape", [(3,), (70_000,)])
def test_float64_gradients_are_clipped_before_they_are_narrowed(shape: tuple[int, ...]) -> None:
    for clip, expected in ((1.0, 1 - 1 / math.sqrt(shape[0])), (clipping.Value(1.0), 0.0)):
        p, other = Parameter(torch.ones(shape)), Parameter(torch.ones(4))
        p.grad_dtype = torch.float64  # type: ignore[attr-defined]
        p.grad = torch.full(shape, 1e200, dtype=torch.float64)
        optimizer = fusedlr.SGD([p, other], lr=1.0, clip=clip, nonfinite="skip", backend="torch")
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full(shape, expected))
        assert int(optimizer.skipped_steps) == 0


@pytest.mark.skipif(not hasattr(Parameter, "grad_dtype"), reason="this torch refuses gradients of another dtype")
@pytest.mark.parametrize("cls", [fusedlr.SGD, fusedlr.LARS])
@pytest.mark.parametrize("clip", [clipping.GlobalNorm(1.0), clipping.TensorNorm(1.0), clipping.Value(0.5)], ids=str)
def test_float64_gradients_beyond_float32_are_clipped_first(
    clip: Any, cls: Any, executor: str  # noqa: F811
) -> None:
    """Their factor is a float32 on Triton: of 5e-40, a subnormal, it has five digits."""
    outcomes = []
    for dtype in (torch.float32, torch.float64):
        p = Parameter(torch.ones(4, dtype=dtype))
        p.grad_dtype = torch.float64  # type: ignore[attr-defined]
        p.grad = torch.full((4,), 1e39, dtype=torch.float64)
        optimizer = cls([p], lr=1.0, clip=clip, nonfinite="skip", backend=backend_of(executor))
        optimizer.step()
        assert int(optimizer.skipped_steps) == 0
        outcomes.append(p.detach().double())
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-5)
    if cls is fusedlr.SGD:
        torch.testing.assert_close(outcomes[1], torch.full((4,), 0.5, dtype=torch.float64), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_of_a_small_power_may_leave_the_range(backend: str) -> None:
    p = Parameter(torch.ones(5_000))
    optimizer = fusedlr.SGD([p], lr=1.0, clip=clipping.GlobalNorm(1.0, norm_type=0.01), backend=backend)
    p.grad = torch.ones(5_000)
    optimizer.step()
    assert optimizer.last_grad_norm == math.inf
    torch.testing.assert_close(p.detach(), torch.ones(5_000))


def test_factors_of_a_product_end_with_their_part() -> None:
    """Also where the next part has a factor of its own that begins later."""
    first = schedules.product(schedules.Warmup(2), schedules.Linear(4, 1.0, 0.5)).for_steps(2)
    late = schedules.product(schedules.StepDecay(5, 0.5), schedules.Constant())
    inner = schedules.Constant(steps=3).then(late)
    for second in (inner.for_steps(8), schedules.per_epoch(inner, 1), schedules.product(inner, schedules.Constant())):
        chain = first.then(second)
        for t in range(14):
            expected = first(t, 1.0) if t < 2 else second(t - 2, 1.0)
            assert chain(t, 1.0) == pytest.approx(expected, rel=1e-15, abs=0), (second, t)
