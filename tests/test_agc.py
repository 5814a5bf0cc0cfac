"""AGC on every executor against a float64 reference written in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from executors import backend_of, executor, place_of, sgd
from torch import Tensor, nn

import fusedlr
from fusedlr.clipping import AGC

# Triton's interpreter computes with numpy, which warns of what these tests do on purpose: 0/0, inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

__all__ = ["executor"]  # the fixture

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# What the stored parameter rounds to, in relative terms.
STORED = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make(layout: str, executor: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    shapes: dict[str, tuple[int, ...]] = {
        "matrix": (5, 8), "wide": (3, 1500), "long rows": (2, 20_001), "narrow": (1300, 3), "column": (7, 1),
        "row": (1, 7), "vector": (40,), "long vector": (9001,), "number": (), "empty": (0, 3), "no columns": (3, 0),
        "conv": (4, 3, 5, 2), "middle": (6, 100, 7),
    }  # fmt: skip
    of_memory: dict[str, Callable[[], Tensor]] = {
        "transposed": lambda: torch.randn(33, 170).t(),
        "transposed, few rows": lambda: torch.randn(1700, 3).t(),
        "channels_last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "units in the middle": lambda: torch.randn(9, 70, 40).transpose(0, 1),
        "short runs in the middle": lambda: torch.randn(9, 200, 5).transpose(0, 1),
        "long runs in the middle": lambda: torch.randn(3, 4, 1025).transpose(0, 1),
        "gaps": lambda: torch.randn(9, 14)[:, ::2],
    }
    x = torch.randn(shapes[layout]) if layout in shapes else of_memory[layout]()
    strided = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=place_of(executor))
    return strided.copy_(x * scale)


LAYOUTS = ["matrix", "wide", "long rows", "narrow", "column", "row", "vector", "long vector", "number", "empty",
           "no columns", "conv", "middle", "transposed", "transposed, few rows", "channels_last",
           "units in the middle", "short runs in the middle", "long runs in the middle", "gaps"]  # fmt: skip


def norms_of_units(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Shaped so that it multiplies x: one norm a row, or one of a vector or number; scaled to keep its range."""
    if x.size == 0:
        return np.zeros(1)
    axes = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    top = np.abs(x).max()
    top = top if 0 < top < np.inf else 1.0
    return top * np.sqrt(((x / top) ** 2).sum(axis=axes, keepdims=x.ndim > 0))


def agc_by_hand(w: Tensor, g: Tensor, factor: float, eps: float) -> np.ndarray[Any, Any]:
    w64, g64 = (x.detach().cpu().double().numpy() for x in (w, g))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = factor * np.maximum(norms_of_units(w64), eps) / norms_of_units(g64)
    return g64 * np.where(np.isnan(ratio) & (norms_of_units(g64) == 0), 1.0, np.minimum(ratio, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agc_of_every_layout(executor: str, dtype: torch.dtype, seed: int) -> None:
    """Some units of each tensor are clipped and some are not; gradients also come in another order of memory."""
    params = [nn.Parameter(make(layout, executor, dtype)) for layout in LAYOUTS]
    groups = [{"params": params[:3]}, {"params": params[3:], "maximize": True}]
    clip = AGC(0.05, 0.01)
    optimizer = fusedlr.SGD(groups, lr=1.0, clip=clip, backend=backend_of(executor))  # type: ignore[arg-type]
    for step in range(2):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            g = torch.randn(p.shape).to(p) * (0.3 if i % 2 else 0.02)
            if p.ndim:
                g[::2] *= 0.1
            p.grad = g.transpose(0, -1).contiguous().transpose(0, -1) if step and p.ndim > 1 else g
        sent = [p.grad.clone() for p in params if p.grad is not None]
        optimizer.step()
        # The factor in the arithmetic's precision, a product with it, and one rounding to storage.
        rtol = STORED[dtype] + (1e-14 if dtype == torch.float64 else 3 * 2.0**-24)
        for i, (p, w, g) in enumerate(zip(params, before, sent, strict=True)):
            assert p.grad is not None and torch.equal(p.grad, g)  # never written
            exact = torch.from_numpy(np.asarray(agc_by_hand(w, g, clip.factor, clip.eps)))
            wanted = w.cpu().double() + (1 if i >= 3 else -1) * exact
            torch.testing.assert_close(p.detach().cpu().double(), wanted, rtol=rtol, atol=rtol, msg=LAYOUTS[i])
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in sent))
        assert float(optimizer.last_grad_norm) == pytest.approx(norm, rel=1e-6)  # type: ignore[arg-type]


def test_agc_clips_what_it_must_exactly(executor: str) -> None:
    """From zero weights a parameter becomes minus its clipped gradient; a unit within its bound keeps every bit."""
    p = nn.Parameter(torch.zeros(3, 4, device=place_of(executor)))
    p.grad = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1e-7, 3e-7, 0.0, 0.0], [0.0] * 4], device=p.device)
    sgd([p], AGC(0.5, 0.02), executor).step()
    assert torch.equal(p[1:], -p.grad[1:])
    assert p[0].tolist() == pytest.approx([-3 / 500, -4 / 500, 0.0, 0.0], rel=3 * 2.0**-24)


@pytest.mark.parametrize("size", [1e20, 1e-30, 1e-44])
def test_agc_keeps_its_range(executor: str, size: float) -> None:
    """Magnitudes whose squares leave float32."""
    p = nn.Parameter(torch.full((2, 1030), size, device=place_of(executor)))
    p.grad = torch.full_like(p, size)
    optimizer = sgd([p], AGC(0.25, 1e-200), executor)
    held = float(p.detach()[0, 0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.75 * held), rtol=2.0**-22, atol=2e-45)
    norm = held * math.sqrt(2060)
    assert float(optimizer.last_grad_norm) == pytest.approx(norm, rel=1e-6, abs=2e-45)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_agc_keeps_the_range_of_float64(executor: str, size: float) -> None:
    p = nn.Parameter(torch.full((2, 1030), size, dtype=torch.float64, device=place_of(executor)))
    p.grad = torch.full_like(p, size)
    sgd([p], AGC(0.25, 1e-300), executor).step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.75 * size), rtol=1e-14, atol=0)


def test_agc_of_several_dtypes_and_missing_gradients(executor: str, seed: int) -> None:
    params = [nn.Parameter(torch.randn(4, 300, device=place_of(executor)).to(d)) for d in DTYPES]
    idle = nn.Parameter(torch.ones(5, device=place_of(executor)))
    optimizer = sgd([*params, idle], AGC(0.1), executor)
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape).to(p)
        optimizer.step()
        squares = 0.0
        for p, w in zip(params, before, strict=True):
            assert p.grad is not None
            exact = w.cpu().double() - torch.from_numpy(agc_by_hand(w, p.grad, 0.1, 1e-3))
            rtol = STORED[p.dtype] + (1e-14 if p.dtype == torch.float64 else 3 * 2.0**-24)
            torch.testing.assert_close(p.detach().cpu().double(), exact, rtol=rtol, atol=rtol)
            squares += float(p.grad.double().square().sum())
        assert float(optimizer.last_grad_norm) == pytest.approx(math.sqrt(squares), rel=1e-6)  # type: ignore[arg-type]
    assert torch.equal(idle, torch.ones_like(idle))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_element_concerns_its_own_unit(executor: str, bad: float) -> None:
    p = nn.Parameter(torch.ones(3, 2, device=place_of(executor)))
    p.grad = torch.ones_like(p)
    p.grad[1, 0] = bad
    optimizer = sgd([p], AGC(0.5), executor)
    optimizer.step()
    rows = p.detach().tolist()
    # Weights of norm sqrt(2), bound to half of it.
    assert rows[0] == rows[2] == pytest.approx([0.5, 0.5], rel=3 * 2.0**-24)
    assert math.isnan(rows[1][0]) and (math.isnan(rows[1][1]) if math.isnan(bad) else rows[1][1] == 1.0)
    assert not math.isfinite(optimizer.last_grad_norm)  # type: ignore[arg-type]
