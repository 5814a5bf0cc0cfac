"""The tables of docs/clipping.md: each argument of ours against the formula of their library, from its source."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fusedlr
from fusedlr import clipping

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "clipping.md").read_text(encoding="utf-8")
# What the letters of the tables stand for; M is below all norms of the gradients but that of zeros.
M, v, r, p, e = 0.7, 0.3, 0.01, 3.0, 0.05
Formula = Callable[[list[Tensor], list[Tensor]], list[Tensor]]  # of gradients and weights


def _rows() -> dict[str, str]:
    rows: dict[str, str] = {}
    library = ""
    for line in PAGE.split("## From other libraries")[1].splitlines():
        if line.startswith("### "):
            library = line[4:]
        elif found := re.match(r"\| `(.*?)` \| `(.*?)` \|", line):
            rows[f"{library}: {found[1]}"] = found[2]
    return rows


ROWS = _rows()


def with_torch(clip: Callable[[list[Tensor]], object]) -> Formula:
    """What a function of torch.nn.utils makes of .grad."""

    def formula(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        for w, g in zip(weights, grads, strict=True):
            w.grad = g.clone()
        clip(weights)
        return [w.grad for w in weights if w.grad is not None]

    return formula


def joint(grads: list[Tensor]) -> Tensor:
    return torch.stack([g.square().sum() for g in grads]).sum().sqrt()


def keras_clipnorm(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    return [g * M / torch.clamp(g.square().sum().sqrt(), min=M) for g in grads]


def keras_global(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    norm = joint(grads)
    return [g * (M * torch.clamp(1.0 / norm, max=1.0 / M) + (norm - norm)) for g in grads]


def clamped(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    return [g.clamp(-v, v) for g in grads]


def optax_global(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    norm = joint(grads)
    return [g if norm < M else g / norm * M for g in grads]


def optax_normalize(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    return [g / (joint(grads) + e) for g in grads]


def by_units(g: Tensor, w: Tensor, dims: tuple[int, ...]) -> Tensor:
    """NFNets' formula, over the dimensions of a unit."""
    most = r * w.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-3)
    norm = g.square().sum(dims, keepdim=True).sqrt()
    return torch.where(norm < most, g, g * (most / norm.clamp(min=1e-6)))


def units_of_torch(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    dims = [tuple(range(1, g.ndim)) if g.ndim > 1 else tuple(range(g.ndim)) for g in grads]
    return [by_units(g, w.detach(), d) for g, w, d in zip(grads, weights, dims, strict=True)]


def units_of_jax(grads: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """optax sums over the first dimension of a matrix, which is the transposed one of torch's Linear."""
    flipped = [(g.t(), w.detach().t()) if g.ndim == 2 else (g, w.detach()) for g, w in zip(grads, weights, strict=True)]
    clipped = [by_units(g, w, (0,)) for g, w in flipped]
    return [g.t() if g.ndim == 2 else g for g in clipped]


norm_of_torch = with_torch(lambda params: torch.nn.utils.clip_grad_norm_(params, M))
value_of_torch = with_torch(lambda params: torch.nn.utils.clip_grad_value_(params, v))
THEIRS: dict[str, Formula] = {
    "torch: clip_grad_norm_(params, M)": norm_of_torch,
    "torch: clip_grad_norm_(params, M, norm_type=p)": with_torch(
        lambda params: torch.nn.utils.clip_grad_norm_(params, M, norm_type=p)
    ),
    "torch: clip_grad_norm_(params, M, error_if_nonfinite=True)": norm_of_torch,
    "torch: clip_grad_value_(params, v)": value_of_torch,
    "Keras: clipnorm=M": keras_clipnorm,
    "Keras: global_clipnorm=M": keras_global,
    "Keras: clipvalue=v": clamped,
    "optax: clip(v)": clamped,
    "optax: clip_by_global_norm(M)": optax_global,
    "optax: normalize_by_update_norm(eps=e)": optax_normalize,
    "optax: adaptive_grad_clip(r)": units_of_jax,
    'timm: clip_mode="norm", clip_grad=M': norm_of_torch,
    'timm: clip_mode="value", clip_grad=v': value_of_torch,
    'timm: clip_mode="agc", clip_grad=r': units_of_torch,
}


def test_every_row_has_a_formula() -> None:
    assert set(ROWS) == set(THEIRS)


@pytest.mark.parametrize("size", [1.0, 0.01, 0.0], ids=["large", "small", "zero"])
@pytest.mark.parametrize("name", ROWS)
def test_theirs_is_ours(name: str, size: float) -> None:
    """By the step of an SGD whose lr is 1, in float64: what the parameters lose is the clipped gradient."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 5), (7,), ()]
    weights = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    grads = [size * torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    for param, g in zip(params, grads, strict=True):
        param.grad = g.clone()
    letters = {"M": M, "v": v, "r": r, "p": p, "e": e}
    optimizer = fusedlr.SGD(params, lr=1.0, clip=eval(ROWS[name], {**vars(clipping), **letters}))
    optimizer.step()
    expected = THEIRS[name](grads, [w.clone().requires_grad_() for w in weights])
    for w, param, g in zip(weights, params, expected, strict=True):
        # The subtraction from weights around 1 rounds at 2e-16, the norms at a few of that.
        torch.testing.assert_close(w - param.detach(), g, rtol=1e-14, atol=2e-15)


def test_nonfinite_raise_is_error_if_nonfinite() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.tensor([1.0, float("inf")])
    with pytest.raises(RuntimeError):
        torch.nn.utils.clip_grad_norm_([param], M, error_if_nonfinite=True)
    with pytest.raises(FloatingPointError):
        fusedlr.SGD([param], lr=1.0, clip=M, nonfinite="raise").step()
