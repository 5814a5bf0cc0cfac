"""The case table: every optimizer with its arguments beside torch.optim's, the layouts of tensors, and tolerances.

A row says what an optimizer is; parity, checkpoints and everything else that must hold for all of them run over it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from references import LAMB, LARS, Lion
from torch import Tensor

import fusedlr
from fusedlr import clipping


@dataclass(frozen=True)
class Case:
    """An optimizer of fusedlr, its namesake, and the arguments both take.

    ``state`` are the keys under which torch keeps tensors of the parameter's shape, ``numbers`` those of a single
    number beside ``step``. ``penalty`` says that the weight decay is added to the gradient. ``reach`` is how many times
    the lr an update is at most, for gradients of magnitudes in [0.5, 2]. ``begin`` is how many steps were taken before
    the test, with moments as such gradients leave them. ``oracle_error`` is the relative error of torch's own numbers
    of a step in float64. Rows with ``every_layout`` go through Triton's interpreter in all layouts.
    """

    name: str
    fused: type[fusedlr.FusedOptimizer]
    oracle: type[torch.optim.Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    reach: float = 4.0
    begin: int = 0
    # torch computes 1 - beta2**t directly, 2.2e-16/(1 - 0.999) = 2.2e-13 off at the first step (halved by the root).
    oracle_error: float = 2.2e-13
    every_layout: bool = True

    @property
    def penalty(self) -> bool:
        decoupled = self.oracle in (torch.optim.AdamW, Lion, LAMB) or self.kwargs.get("decoupled_weight_decay", False)
        return bool(self.kwargs.get("weight_decay", 0)) and not decoupled

    @property
    def trust(self) -> bool:
        """Whether a step takes the second reduction."""
        return self.fused in (fusedlr.LAMB, fusedlr.LARS)

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


# The references of what torch.optim does not have.
OWN: dict[str, type[torch.optim.Optimizer]] = {"LAMB": LAMB, "LARS": LARS, "Lion": Lion}
_BUFFER = ("momentum_buffer",)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_AMSGRAD = (*_MOMENTS, "max_exp_avg_sq")
_LR = 0.01


def _sgd(name: str, state: tuple[str, ...] = _BUFFER, **kwargs: Any) -> Case:
    reach = 20.0 if state else 4.0  # momenta of up to ten gradients
    return Case(f"sgd-{name}", fusedlr.SGD, torch.optim.SGD, {"lr": _LR, **kwargs}, state, reach=reach)


def _adam(name: str, state: tuple[str, ...] = _MOMENTS, **kwargs: Any) -> Case:
    return Case(f"adam-{name}", fusedlr.Adam, torch.optim.Adam, {"lr": _LR, **kwargs}, state)


def _adamw(name: str, state: tuple[str, ...] = _MOMENTS, **kwargs: Any) -> Case:
    return Case(f"adamw-{name}", fusedlr.AdamW, torch.optim.AdamW, {"lr": _LR, **kwargs}, state)


def _row(cls: str, name: str, state: tuple[str, ...], kwargs: dict[str, Any], **own: Any) -> Case:
    """A row of a class without a function of its own; the first row of each class goes through every layout."""
    oracle = OWN.get(cls) or getattr(torch.optim, cls)
    own = {"every_layout": name == "default", **own}
    return Case(f"{cls.lower()}-{name}", getattr(fusedlr, cls), oracle, {"lr": _LR, **kwargs}, state, **own)


def _rmsprop(name: str, *more: str, **kwargs: Any) -> Case:
    # g/sqrt(0.01*g^2) in the first step; with momentum up to four such updates (1 + 0.9 + 0.81 + 0.73).
    return _row("RMSprop", name, ("square_avg", *more), kwargs, reach=40.0 if "momentum_buffer" in more else 10.1)


def _radam(name: str, begin: int = 0, **kwargs: Any) -> Case:
    # torch's rho_t is 2*t/(1-beta2**t) less rho_inf: its error, 1e-16/(1-beta2)**2, is divided by rho_t - 4 > 1.
    return _row("RAdam", name, _MOMENTS, kwargs, begin=begin, oracle_error=1e-10)


def _nadam(name: str, **kwargs: Any) -> Case:
    return _row("NAdam", name, _MOMENTS, kwargs, numbers=("mu_product",))


def _lamb(name: str, reach: float = 8.0, **kwargs: Any) -> Case:
    # A tensor moves by lr times its norm, which is at most 2 an element, spread as its update is.
    return _row("LAMB", name, _MOMENTS, kwargs, reach=reach)


def _lars(name: str, state: tuple[str, ...] = _BUFFER, **kwargs: Any) -> Case:
    # With trust_coefficient 1 likewise; momenta of up to ten such updates.
    return _row("LARS", name, state, {"trust_coefficient": 1.0, **kwargs}, reach=40.0)


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
    _rmsprop("default"),
    _rmsprop("decay-maximize", weight_decay=0.01, maximize=True, alpha=0.9),
    _rmsprop("momentum", "momentum_buffer", momentum=0.9),
    _rmsprop("centered", "grad_avg", centered=True, weight_decay=0.01),
    _rmsprop("centered-momentum", "momentum_buffer", "grad_avg", centered=True, momentum=0.9, eps=0.1),
    _row("Adagrad", "default", ("sum",), {}),
    _row("Adagrad", "decays", ("sum",), {"lr_decay": 0.3, "weight_decay": 0.01, "initial_accumulator_value": 0.7}),
    _row("Adagrad", "maximize", ("sum",), {"maximize": True, "eps": 0.1, "lr_decay": 0.1}),
    _row("Adadelta", "default", ("square_avg", "acc_delta"), {"lr": 1.0}, reach=0.1),
    _row("Adadelta", "decay-maximize", ("square_avg", "acc_delta"),
         {"lr": 0.5, "rho": 0.6, "eps": 1e-3, "weight_decay": 0.01, "maximize": True}, reach=0.5),
    _row("Adamax", "default", ("exp_avg", "exp_inf"), {}),
    _row("Adamax", "decay-maximize", ("exp_avg", "exp_inf"),
         {"betas": (0.5, 0.7), "eps": 0.1, "weight_decay": 0.01, "maximize": True}),
    _nadam("default"),
    _nadam("decay", weight_decay=0.01, momentum_decay=0.5, betas=(0.8, 0.9)),
    _nadam("decoupled-maximize", weight_decay=0.1, decoupled_weight_decay=True, maximize=True, eps=0.1),
    _radam("default"),
    _radam("rectified", begin=4),  # the sixth step is the first that is rectified
    _radam("decay", begin=9, weight_decay=0.01, betas=(0.8, 0.9)),
    _radam("decoupled-maximize", begin=20, weight_decay=0.1, decoupled_weight_decay=True, maximize=True, eps=0.1),
    _row("Lion", "default", ("exp_avg",), {}),
    _row("Lion", "decay-maximize", ("exp_avg",), {"weight_decay": 0.1, "maximize": True}),
    _lamb("default"),
    _lamb("no-decay-maximize", weight_decay=0.0, maximize=True, eps=0.1, betas=(0.5, 0.9)),
    _lamb("as-it-comes", bias_correction=False, grad_averaging=False, trust_clip=True, weight_decay=0.3),
    _lars("default", momentum=0.9, weight_decay=0.01),
    _lars("plain", (), trust_coefficient=1e-3),
    _lars("plain-decay-maximize", (), weight_decay=0.3, eps=0.1, maximize=True),
    _lars("dampening", momentum=0.9, dampening=0.5, maximize=True),
    _lars("nesterov", momentum=0.8, nesterov=True, weight_decay=0.1),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
# One row for each set of state keys: for what depends on the state alone.
STATEFUL = [
    BY_NAME[name]
    for name in ("sgd-plain", "sgd-momentum", "adam-default", "adamw-amsgrad", "rmsprop-centered-momentum",
                 "adagrad-decays", "adadelta-default", "adamax-default", "nadam-decay", "lion-default", "lamb-default",
                 "lars-default")
]  # fmt: skip
# Between them 0, 1, 2 and 3 slots, numbers that are carried, and a trust ratio, whose norms read the storage too. A
# rule gets what was decoded, and what it gives is encoded: neither sees the other, so a product of all rules and all
# storages proves no more than these rows in all storages, and the other rows in two that have nothing in common.
STORED = [BY_NAME[name] for name in ("sgd-plain", "sgd-momentum", "nadam-decay", "adamw-amsgrad", "lamb-default")]
FAR_APART = ("exact", "compact")  # float32 state and split weights; codes with scales, and weights rounded at random


def in_storages(cases: Sequence[Case], names: Iterable[str], every: Sequence[Case] = STORED) -> list[tuple[Case, str]]:
    """Cases beside storages: those of ``every`` beside all of ``names``, the others beside the two far apart."""
    return [(case, name) for case, name in itertools.product(cases, names) if case in every or name in FAR_APART]


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
FEW: dict[str, Layout] = {name: LAYOUTS[name] for name in ("channels_last", "0-dim", "empty", "1025", "gaps")}
# Beyond the limits up to which the PyTorch backend gathers small tensors (2**16), and a reference rule steps at once
# (2**18).
LARGE: dict[str, Layout] = {
    "small": _plain(31),
    "above-2**16": _plain(2**16 + 1),
    "seven": _plain(7),
    "above-2**18": _plain(2**18 + 5),
    "above-2**18-transposed": lambda device, dtype: _values((700, 401), device, dtype).t(),
}
# Beyond what an operator takes in one round (2**20 elements of scratch), what is gathered and kept (2**20), and what is
# gathered at once (2**19).
HUGE: dict[str, Layout] = {
    "above-2**20": _plain(2**20 + 5),
    "above-2**20-transposed": lambda device, dtype: _values((1100, 1001), device, dtype).t(),
    **{f"small-{i}": _plain(59_999 + i) for i in range(22)},
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


def begin_state(case: Case, p: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The state of a parameter after ``begin`` steps with gradients of magnitudes in [0.5, 2]."""
    state = {key: _values(p.shape, p.device, dtype) for key in case.state}
    for key in {"exp_avg_sq"} & set(state):
        state[key] = state[key].abs()
    return {"step": torch.tensor(float(case.begin)), **state}


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
