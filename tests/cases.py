"""The case table: every optimizer with its arguments beside torch.optim's, the layouts of tensors, and tolerances.

A row says what an optimizer is; parity, checkpoints and everything else that must hold for all of them run over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fusedlr
from fusedlr import clipping


@dataclass(frozen=True)
class Case:
    """An optimizer of fusedlr, its namesake, and the arguments both take.

    ``state`` are the keys under which torch keeps tensors of the parameter's shape. ``penalty`` says that the weight
    decay is added to the gradient.
    """

    name: str
    fused: type[fusedlr.FusedOptimizer]
    oracle: type[torch.optim.Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: tuple[str, ...] = ()

    @property
    def penalty(self) -> bool:
        decoupled = self.oracle is torch.optim.AdamW or self.kwargs.get("decoupled_weight_decay", False)
        return bool(self.kwargs.get("weight_decay", 0)) and not decoupled

    @property
    def lr(self) -> float:
        return float(self.kwargs["lr"])

    @property
    def sign(self) -> float:
        return -1.0 if self.kwargs.get("maximize") else 1.0

    def make(self, params: Any, **own: Any) -> fusedlr.FusedOptimizer:
        return self.fused(params, **self.kwargs, **own)

    def make_oracle(self, params: Any) -> torch.optim.Optimizer:
        return self.oracle(params, **self.kwargs, foreach=False)

    def __str__(self) -> str:
        return self.name


_BUFFER = ("momentum_buffer",)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_AMSGRAD = (*_MOMENTS, "max_exp_avg_sq")
_LR = 0.01


def _sgd(name: str, state: tuple[str, ...] = _BUFFER, **kwargs: Any) -> Case:
    return Case(f"sgd-{name}", fusedlr.SGD, torch.optim.SGD, {"lr": _LR, **kwargs}, state)


def _adam(name: str, state: tuple[str, ...] = _MOMENTS, **kwargs: Any) -> Case:
    return Case(f"adam-{name}", fusedlr.Adam, torch.optim.Adam, {"lr": _LR, **kwargs}, state)


def _adamw(name: str, state: tuple[str, ...] = _MOMENTS, **kwargs: Any) -> Case:
    return Case(f"adamw-{name}", fusedlr.AdamW, torch.optim.AdamW, {"lr": _LR, **kwargs}, state)


CASES = [
    _sgd("plain", ()),
    _sgd("decay", (), weight_decay=0.01),
    _sgd("maximize", (), maximize=True, weight_decay=0.01),
    _sgd("momentum", momentum=0.9),
    _sgd("dampening", momentum=0.9, dampening=0.5, weight_decay=0.01),
    _sgd("nesterov", momentum=0.8, nesterov=True, weight_decay=0.01),
    _sgd("momentum-maximize", momentum=0.9, maximize=True),
    _adam("default"),
    _adam("decay", weight_decay=0.01),
    _adam("amsgrad", _AMSGRAD, amsgrad=True, weight_decay=0.01),
    _adam("maximize", maximize=True),
    _adam("decoupled", decoupled_weight_decay=True, weight_decay=0.1),
    _adamw("default"),
    _adamw("amsgrad", _AMSGRAD, amsgrad=True),
    _adamw("maximize", maximize=True, weight_decay=0.1),
    _adamw("eps", eps=0.1, betas=(0.5, 0.9)),
    _adamw("no-decay", weight_decay=0.0),
]
BY_NAME = {case.name: case for case in CASES}
# One row for each set of state keys: for what depends on the state alone.
STATEFUL = [BY_NAME[name] for name in ("sgd-plain", "sgd-momentum", "adam-default", "adamw-amsgrad")]

CLIPS: list[Any] = [
    None,
    clipping.GlobalNorm(60.0),
    clipping.GlobalNorm(1e6),
    clipping.GlobalNorm(1.5, norm_type="inf"),
    clipping.GlobalNorm(5e3, norm_type=1),
    clipping.TensorNorm(2.0),
    clipping.TensorNorm(1.5, norm_type=3),
    clipping.Value(0.75),
    clipping.Normalize("tensor"),
    clipping.Normalize("global"),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "triton"]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- layouts: values to a parameter's tensor ---------------------------------------------------------------------

Layout = Callable[[torch.device, torch.dtype], Tensor]


def _values(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Magnitudes in [0.5, 2], both signs: so the decay of a few steps turns no sign."""
    magnitude = 0.5 + 1.5 * torch.rand(tuple(shape), dtype=torch.float64)
    sign = torch.where(torch.rand(tuple(shape)) < 0.5, -1.0, 1.0)
    return (magnitude * sign).to(device, dtype)


def _plain(*shape: int) -> Layout:
    return lambda device, dtype: _values(shape, device, dtype)


def _channels_last(device: torch.device, dtype: torch.dtype) -> Tensor:
    return _values((2, 3, 4, 5), device, dtype).contiguous(memory_format=torch.channels_last)


def _transposed(device: torch.device, dtype: torch.dtype) -> Tensor:
    return _values((33, 17), device, dtype).t()


def _gaps(device: torch.device, dtype: torch.dtype) -> Tensor:
    return _values((9, 14), device, dtype)[:, ::2]


def _slice(device: torch.device, dtype: torch.dtype) -> Tensor:
    return _values((40,), device, dtype)[3:30]


LAYOUTS: dict[str, Layout] = {
    "contiguous": _plain(5, 8),
    "channels_last": _channels_last,
    "0-dim": _plain(),
    "empty": _plain(0, 3),
    "one": _plain(1),
    "seven": _plain(7),
    "1023": _plain(1023),
    "1025": _plain(1025),
    "4097": _plain(4097),
    "transposed": _transposed,
    "gaps": _gaps,
    "slice": _slice,
    "ones": _plain(1, 1, 6, 1),
}
# Beyond the limits up to which the PyTorch backend gathers small tensors (2**16) and steps in one chunk (2**18).
LARGE: dict[str, Layout] = {
    "small": _plain(31),
    "above-2**16": _plain(2**16 + 1),
    "seven": _plain(7),
    "above-2**18": _plain(2**18 + 5),
    "above-2**18-transposed": lambda device, dtype: _values((700, 401), device, dtype).t(),
}
TINY: dict[str, Layout] = {f"tiny-{i}": _plain(1 + i % 5) for i in range(60)}


def make_params(
    layouts: dict[str, Layout], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(make(torch.device(device), dtype)) for name, make in layouts.items()}


def twin_of(p: Tensor, dtype: torch.dtype | None = None) -> torch.nn.Parameter:
    """The same values in a tensor of its own, of the same strides where they leave no gaps."""
    return torch.nn.Parameter(p.detach().to(dtype or p.dtype, copy=True))


def make_gradient(p: Tensor, case: Case, arrangement: int = 0) -> Tensor:
    """A gradient with magnitudes in [0.5, 2], laid out in memory in one of four ways.

    Where a penalty is added to it, it has the sign that the penalty has: a sum that cancels to almost zero would be
    the noise of its last digits, and Adam divides by its magnitude.
    """
    g = _values(p.shape, p.device, p.dtype)
    if case.penalty:
        g = g.abs() * p.detach().sign() * case.sign
    if arrangement == 1 and g.ndim > 1:  # the memory of another order
        return g.transpose(0, -1).contiguous().transpose(0, -1)
    if arrangement == 2:  # a view into a larger buffer, as DDP's buckets give
        buffer = torch.full((g.numel() + 37,), float("nan"), dtype=g.dtype, device=g.device)
        buffer[5 : 5 + g.numel()] = g.reshape(-1)
        return buffer[5 : 5 + g.numel()].view(g.shape)
    if arrangement == 3 and g.ndim > 0 and g.shape[0] > 0 and not case.penalty:  # expanded, as sum().backward() gives
        return g[:1].expand_as(g)
    return torch.empty_like(p).copy_(g)


# ---- the clip, by torch or written out ---------------------------------------------------------------------------


def clip_by_hand(clip: Any, params: Sequence[Tensor]) -> None:
    """Clip the .grad of the parameters in place: by torch.nn.utils where torch has it, else as the formula says."""
    # An empty gradient adds nothing to a norm, and torch refuses the largest magnitude of nothing.
    present = [p for p in params if p.grad is not None and p.numel() > 0]
    grads: list[Tensor] = [p.grad for p in present if p.grad is not None]
    if isinstance(clip, clipping.GlobalNorm):
        torch.nn.utils.clip_grad_norm_(present, clip.max_norm, clip.norm_type, foreach=False)
    elif isinstance(clip, clipping.Value):
        torch.nn.utils.clip_grad_value_(present, clip.limit, foreach=False)
    elif isinstance(clip, clipping.TensorNorm):
        for p in present:
            torch.nn.utils.clip_grad_norm_([p], clip.max_norm, clip.norm_type, foreach=False)
    elif isinstance(clip, clipping.Normalize):
        norms = [g.norm() for g in grads]
        if clip.scope == "global":
            norms = [torch.stack(norms).norm()] * len(norms)
        for g, norm in zip(grads, norms, strict=True):
            g.div_(norm + clip.eps)
    elif clip is not None:
        raise TypeError(f"no reference for {clip!r}")
