"""Clipping by thresholds that follow the training: AGC by the weights, ZClip and AutoClip by the norms so far.

The references work on float64 tensors of any device and never look at them from the host. Each has a twin of the same
name and arguments in ``kernels/adaptive.py``.

A *record* is one float64 tensor: the numbers named in ``settings``, then what the strategy remembers of the norms.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from .fixed import Clip, clip_factor, positive

__all__ = ["AGC", "AutoClip", "Remembering", "ZClip", "autoclip_threshold", "unit_factor", "zclip_threshold"]

# Norms beyond, which only float64 gradients have, do not enter ZClip's statistics: their squares would leave float64.
_LARGEST = 1e150


def unit_factor(norm: Tensor, weight_norm: Tensor, factor: Any, eps: Any) -> Tensor:
    """min(1, factor*max(weight_norm, eps)/norm), where a NaN gives NaN and a norm of 0 gives 1."""
    ratio = factor * torch.where(weight_norm < eps, eps, weight_norm) / torch.where(norm == 0.0, 1.0, norm)
    return torch.where((ratio >= 1.0) | (norm == 0.0), 1.0, ratio)


def zclip_threshold(record: Tensor, norm: Tensor, eps: Any, keep: Any) -> Tensor:
    """The threshold for a norm, inf where it is no spike. If ``keep``, the smaller of the two enters the record."""
    z, alpha, warmup_steps, count, mean, var = record.clone().unbind()
    warm = count < warmup_steps
    limit = z * (torch.sqrt(var) + eps)
    excess = norm - mean
    spike = ~warm & (excess > limit)
    reduced = mean + z * torch.sqrt(var) * limit / torch.where(spike, excess, 1.0)
    threshold = torch.where(spike, reduced, math.inf)
    entering = torch.where(spike, threshold, norm)
    change = entering - mean
    new_mean = torch.where(warm, mean + change / (count + 1), alpha * mean + (1 - alpha) * entering)
    rest = entering - new_mean
    new_var = torch.where(warm, var + (change * rest - var) / (count + 1), alpha * var + (1 - alpha) * (rest * rest))
    kept = (norm < math.inf) & (entering < _LARGEST) & keep
    record[3:] = torch.where(kept, torch.stack([count + 1, new_mean, new_var]), record[3:])
    return threshold


def autoclip_threshold(record: Tensor, norm: Tensor, eps: Any, keep: Any) -> Tensor:
    """The percentile of the last norms, this one included if it is finite; inf of none. If ``keep``, it is recorded."""
    fraction, history, count = record[:3].clone().unbind()
    norms = record[3:]
    finite = norm < math.inf
    index = torch.arange(len(norms), dtype=record.dtype, device=record.device)
    place = count - torch.floor(count / history) * history
    now = torch.where((index == place) & finite, norm, norms)
    number = torch.minimum(count + finite, history)
    ordered = torch.where(index < number, now, math.inf).sort().values
    at = torch.clamp(number - 1, min=0) * fraction
    low = torch.floor(at)
    a, b = ordered.take(low.long()), ordered.take(torch.minimum(low + 1, history - 1).long())
    rest = at - low
    # As numpy.percentile interpolates; b may be the inf behind the last norm where nothing of it is wanted.
    step = torch.where(rest > 0, b - a, 0.0)
    threshold = torch.where(rest < 0.5, a + step * rest, b - step * (1 - rest))
    norms.copy_(torch.where(finite & keep, now, norms))
    record[2] = count + (finite & keep)
    return threshold


@final
@dataclass(frozen=True, repr=False)
class AGC(Clip):
    r"""Adaptive gradient clipping: bound the gradient of each unit by the norm of its weights.

    .. math:: g_u \leftarrow g_u \cdot \min\left(1, \frac{\lambda \max(\lVert w_u \rVert, \epsilon)}
        {\lVert g_u \rVert}\right)

    The units u of a tensor are its rows, the slices of its first dimension: output units of Linear and convolution
    layers, entries of an embedding. A vector is one unit, and so is a single number.

    Args:
        factor: the bound lambda of the ratio of the norms, > 0.
        eps: the least norm that weights count with, so that weights of 0 can grow; > 0.

    Raises:
        ValueError: for a value outside its range.

    Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization" (2021). An inf or NaN concerns
    the gradient of its own unit alone. timm's ``adaptive_clip_grad`` has the same units, and divides by at least 1e-6.
    optax, haiku's NFNets and the paper's code do too, and find the output units of JAX's layouts: they sum over the
    first dimension of matrices and over all but the last one of convolutions, and treat a matrix with a dimension of 1
    as a vector. NFNets leave out the last linear layer: give it an optimizer of its own.

    Example:
        >>> from fusedlr.clipping import AGC
        >>> AGC(0.02)
        AGC(factor=0.02, eps=0.001)
    """

    factor: float = 0.01  # type: ignore[misc]  # a number here, a function in the others
    eps: float = 1e-3
    scope: ClassVar[str | None] = "unit"
    settings: ClassVar[tuple[str, ...]] = ("factor", "eps")

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", positive("factor", self.factor))
        object.__setattr__(self, "eps", positive("eps", self.eps))

    @property
    def numbers(self) -> tuple[float, float, float]:
        return math.inf, self.eps, math.inf


@dataclass(frozen=True, repr=False)
class Remembering(Clip):
    """A global norm's strategy whose threshold follows the norms of earlier steps; use ZClip or AutoClip."""

    scope: ClassVar[str | None] = "global"
    factor: ClassVar[Any] = staticmethod(clip_factor)

    @abstractmethod
    def packed(self, remembered: Sequence[float]) -> list[float]:
        """The part of a record behind the settings, from what ``unpacked`` gave; of nothing, as at the start."""

    @abstractmethod
    def unpacked(self, record: Sequence[float]) -> list[float]:
        """What is remembered in that part of a record, for a checkpoint."""


@final
@dataclass(frozen=True, repr=False)
class ZClip(Remembering):
    r"""Clip spikes of the global norm: those that lie more than z deviations above the moving mean.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{M}{G + \epsilon}\right), \qquad
        M = \mu + \frac{z^2 \sigma}{\zeta} \text{ where } \zeta = \frac{G - \mu}{\sigma + \epsilon} > z,
        \text{ else } \infty

    Then the mean and the variance take in x, the smaller one of G and M:

    .. math:: \mu \leftarrow \alpha \mu + (1 - \alpha) x, \qquad
        \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha)(x - \mu)^2

    In the first steps nothing is a spike, and mean and variance are those of the norms so far.

    Args:
        z: how many deviations make a spike, > 0.
        alpha: the share of the old mean and variance, at least 0 and below 1.
        warmup_steps: how many norms are collected first, an integer >= 1.
        max_norm: the largest threshold, > 0, also in the first steps (it may be scheduled); None for no other one.
        eps: added to G and to the deviation, >= 0.

    Raises:
        ValueError: for a value outside its range.
        TypeError: for a value of another type.

    Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training" (2025), in the mode of its code's defaults
    (``zscore`` with ``adaptive_scaling``), where max_norm is 1 by default. Mean, variance and count are kept in float64
    on the device, and in the state_dict. A norm that is not finite enters neither, in no mode: "skip" changes nothing,
    "raise" raises, "propagate" clips an inf to the mean (the gradient becomes 0 where it is finite and NaN where not)
    and a NaN to NaN. Norms above 1e150 do not enter either.

    Example:
        >>> from fusedlr.clipping import ZClip
        >>> ZClip(3.0, max_norm=1.0)
        ZClip(z=3.0, alpha=0.97, warmup_steps=25, max_norm=1.0, eps=1e-06)
    """

    z: float = 2.5
    alpha: float = 0.97
    warmup_steps: int = 25
    max_norm: float | None = None
    eps: float = 1e-6
    settings: ClassVar[tuple[str, ...]] = ("z", "alpha", "warmup_steps")
    threshold: ClassVar[Any] = staticmethod(zclip_threshold)

    def __post_init__(self) -> None:
        object.__setattr__(self, "z", positive("z", self.z))
        alpha = positive("alpha", self.alpha, allow_zero=True)
        if alpha >= 1:
            raise ValueError(f"alpha must be >= 0 and < 1, but got {self.alpha!r}")
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "warmup_steps", _count("warmup_steps", self.warmup_steps))
        if self.max_norm is not None:
            object.__setattr__(self, "max_norm", positive("max_norm", self.max_norm, allow_inf=True))
        object.__setattr__(self, "eps", positive("eps", self.eps, allow_zero=True))

    @property
    def numbers(self) -> tuple[float, float, float]:
        return math.inf if self.max_norm is None else self.max_norm, self.eps, math.inf

    def packed(self, remembered: Sequence[float]) -> list[float]:
        if len(remembered) not in (0, 3):
            raise ValueError(f"ZClip remembers a count, a mean and a variance, but got {len(remembered)} numbers")
        return list(remembered) or [0.0, 0.0, 0.0]

    def unpacked(self, record: Sequence[float]) -> list[float]:
        return list(record) if record[0] else []


@final
@dataclass(frozen=True, repr=False)
class AutoClip(Remembering):
    r"""Clip the global norm to a percentile of its own history.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{M}{G + \epsilon}\right), \qquad
        M = \operatorname{percentile}_q(G_{t-n+1}, \dots, G_{t-1}, G)

    Args:
        percentile: q, from 0 (the smallest norm so far) to 100 (no clipping), interpolated as numpy.percentile does.
        history: n, how many norms are remembered, this step's included; an integer >= 1.
        eps: added to G, >= 0.

    Raises:
        ValueError: for a value outside its range.
        TypeError: for a value of another type.

    Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks" (2020), who keep all norms
    and look at them on the host. Here the history lies in float64 on the device, and is in the state_dict; a checkpoint
    with a longer one loads the latest norms. A norm that is not finite is not recorded, in no mode: "skip" changes
    nothing, "raise" raises, "propagate" clips an inf to the percentile of the earlier norms (the gradient becomes 0
    where it is finite and NaN where not) and a NaN to NaN.

    Example:
        >>> from fusedlr.clipping import AutoClip
        >>> AutoClip(25)
        AutoClip(percentile=25.0, history=1000, eps=1e-06)
    """

    percentile: float = 10.0
    history: int = 1000
    eps: float = 1e-6
    settings: ClassVar[tuple[str, ...]] = ("fraction", "history")
    threshold: ClassVar[Any] = staticmethod(autoclip_threshold)

    def __post_init__(self) -> None:
        percentile = positive("percentile", self.percentile, allow_zero=True)
        if percentile > 100:
            raise ValueError(f"percentile must be from 0 to 100, but got {self.percentile!r}")
        object.__setattr__(self, "percentile", percentile)
        object.__setattr__(self, "history", _count("history", self.history))
        object.__setattr__(self, "eps", positive("eps", self.eps, allow_zero=True))

    @property
    def fraction(self) -> float:
        """The percentile as a part of 1."""
        return self.percentile / 100

    @property
    def numbers(self) -> tuple[float, float, float]:
        return math.inf, self.eps, math.inf

    def packed(self, remembered: Sequence[float]) -> list[float]:
        norms = list(remembered)[-self.history :]
        return [float(len(norms)), *norms, *[0.0] * (self.history - len(norms))]

    def unpacked(self, record: Sequence[float]) -> list[float]:
        count, *norms = record
        place = int(count) % self.history
        return norms[: int(count)] if count < self.history else [*norms[place:], *norms[:place]]


def _count(name: str, value: Any) -> int:
    """The value as an integer >= 1, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer >= 1, but got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be an integer >= 1, but got {value!r}")
    return int(value)
