"""Gradients in another dtype than their parameters, where the user told torch that they may have it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from test_scaling import MAKERS, RTOL, backend, everything, make_params  # noqa: F401  (backend is a fixture)

import fusedlr
from fusedlr.clipping import GlobalNorm, TensorNorm, Value

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype and refuses such gradients"
)
PAIRS = [pair for pair in itertools.product(RTOL, RTOL) if pair[0] != pair[1]]
CLIPS = [None, GlobalNorm(1.0), GlobalNorm(1.0, math.inf), TensorNorm(0.5), Value(0.3)]


def give(params: list[torch.nn.Parameter], i: int, dtype: torch.dtype | None) -> None:
    """Gradients that every dtype has: small multiples of 1/8."""
    generator = torch.Generator().manual_seed(50 + i)
    for p in params:
        g = torch.randint(-15, 16, p.shape, generator=generator) / 8
        if dtype is not None:
            p.grad_dtype = None
        p.grad = g.to(dtype or p.dtype)


def run(name: str, backend: str, dtype: torch.dtype, grad_dtype: torch.dtype | None, **options: Any) -> Any:  # noqa: F811
    params = make_params(dtype)
    optimizer = MAKERS[name](params, backend=backend, **options)
    for i in range(3):
        give(params, i, grad_dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("clip", CLIPS, ids=repr)
@pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS, ids=str)
def test_a_gradient_is_its_value_whatever_its_dtype(
    dtype: torch.dtype, grad_dtype: torch.dtype, clip: Any, backend: str  # noqa: F811
) -> None:  # fmt: skip
    for name in ("adamw", "sgd-dampening"):
        ours = run(name, backend, dtype, grad_dtype, clip=clip)
        same = run(name, backend, dtype, None, clip=clip)
        # Norms of float64 gradients are summed another way than narrow ones: an ulp of float32 in the clip factor.
        rtol = max(RTOL[dtype], 1e-6 if clip is not None else 0.0)
        for a, b in zip(everything(ours), everything(same), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
        if clip is None:
            assert all(map(torch.equal, everything(ours), everything(same)))


@pytest.mark.parametrize("numel", [40, 9000], ids=["gathered", "alone"])
def test_float32_gradients_of_bfloat16_parameters_are_not_rounded(numel: int, backend: str) -> None:  # noqa: F811
    """1 - (1 + 2**-11) is -2**-11; the gradient in bfloat16 would be 1, and the difference 0."""
    params = [torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = fusedlr.SGD(params, lr=1.0, backend=backend)
    for p in params:
        p.grad_dtype = torch.float32
        p.grad = torch.full(p.shape, 1 + 2.0**-11)
    optimizer.step()
    assert all(torch.equal(p, torch.full_like(p, -(2.0**-11))) for p in params)


@pytest.mark.parametrize("clip", [None, GlobalNorm(1.0)], ids=repr)
def test_dtypes_that_change_from_step_to_step(clip: Any, backend: str) -> None:  # noqa: F811
    outcomes = []
    for dtypes in ([torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.float32], [None] * 5):
        params = make_params()
        optimizer = MAKERS["adamw"](params, backend=backend, clip=clip)
        for i, dtype in enumerate(dtypes):
            give(params, i, dtype)
            optimizer.step()
        outcomes.append(everything(optimizer))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the norm of the float64 step


def test_some_gradients_in_another_dtype(backend: str) -> None:  # noqa: F811
    outcomes = []
    for mixed in (True, False):
        params = make_params()
        optimizer = MAKERS["adamw"](params, backend=backend, clip=TensorNorm(0.5))
        for i in range(3):
            give(params, i, None)
            if mixed:
                for p in params[::2]:
                    p.grad_dtype = None
                    p.grad = p.grad.bfloat16()
            optimizer.step()
        outcomes.append(everything(optimizer))
    assert all(map(torch.equal, *outcomes))


def test_a_dtype_that_nobody_asked_for_is_an_error(backend: str) -> None:  # noqa: F811
    params = make_params()
    optimizer = MAKERS["adamw"](params, backend=backend)
    give(params, 0, None)
    params[0].data = params[0].data.double()
    with pytest.raises(ValueError, match=r"has dtype torch.float32; cast the gradient.*or say by parameter.grad_dtype"):
        optimizer.step()
