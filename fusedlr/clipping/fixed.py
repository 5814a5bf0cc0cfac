"""Clipping by fixed thresholds, and what all strategies have.

A strategy says which norm it needs (``norm_type`` and ``scope``) and turns it into the factor that multiplies the
gradient; ``Value`` needs no norm and bounds each element instead. The factor has a twin of the same name in
``kernels/clipping.py``. Gradients are never written: the factor is applied where the update reads them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, final

import torch
from torch import Tensor

__all__ = ["Clip", "GlobalNorm", "Normalize", "TensorNorm", "Value", "as_clip", "clip_factor", "normalize_factor",
           "positive"]  # fmt: skip


def clip_factor(norm: Any, max_norm: Any, eps: Any) -> Any:
    """min(1, max_norm/(norm + eps)) for a float or a tensor, 1 for a norm of 0 without eps: zeros stay zeros.

    A NaN norm gives NaN, as in torch's clip_grad_norm_.
    """
    whole = norm + eps
    if isinstance(whole, Tensor):
        return torch.where(whole == 0.0, 1.0, torch.clamp(max_norm / whole, max=1.0))
    return 1.0 if whole == 0.0 or max_norm / whole >= 1.0 else max_norm / whole


def normalize_factor(norm: Any, max_norm: Any, eps: Any) -> Any:
    """1/(norm + eps) for a float or a tensor, 1 where that is 1/0: zeros stay zeros; ``max_norm`` is not used."""
    whole = norm + eps
    if isinstance(whole, Tensor):
        return torch.where(whole == 0.0, 1.0, 1.0 / whole)
    return 1.0 if whole == 0.0 else 1.0 / whole


@dataclass(frozen=True, repr=False)
class Clip(ABC):
    """What all clipping strategies have; use one of the classes below."""

    scope: ClassVar[str | None] = None  # "global", "tensor", "unit", or None where no norm is measured
    factor: ClassVar[Any] = None
    settings: ClassVar[tuple[str, ...]] = ()  # names of the numbers that the device needs beside ``numbers``
    threshold: ClassVar[Any] = None  # what makes max_norm of the norms so far; None where it is fixed

    def __repr__(self) -> str:
        """The code that makes it; an infinity has no name of its own in Python."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        parts = [f"{name}={value!r}" if value != math.inf else f"{name}=float('inf')" for name, value in shown.items()]
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    @abstractmethod
    def numbers(self) -> tuple[float, float, float]:
        """(max_norm, eps, limit): what the strategy brings to the device; ``limit`` is inf where none is."""


def positive(name: str, value: Any, *, allow_inf: bool = False, allow_zero: bool = False) -> float:
    """The value as a float, or a ValueError that names it and the range."""
    bounds = f"{'>= 0' if allow_zero else '> 0'}{'' if allow_inf else ' and finite'}"
    if isinstance(value, (bool, str)) or (not isinstance(value, (int, float)) and not hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number {bounds}, but got {value!r}")
    number = float(value)
    inside = number >= 0 if allow_zero else number > 0
    if not inside or (math.isinf(number) and not allow_inf):
        raise ValueError(f"{name} must be {bounds}, but got {value!r}; use clip=None for no clipping")
    return number


def _norm_type(value: Any) -> float:
    if isinstance(value, str) and value == "inf":
        return math.inf
    return positive("norm_type", value, allow_inf=True)


@dataclass(frozen=True, repr=False)
class _Threshold(Clip):
    """A bound of a norm, of whatever the scope says; use GlobalNorm or TensorNorm."""

    max_norm: float
    norm_type: float = 2.0
    eps: float = 1e-6
    factor: ClassVar[Any] = staticmethod(clip_factor)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", positive("max_norm", self.max_norm, allow_inf=True))
        object.__setattr__(self, "norm_type", _norm_type(self.norm_type))
        object.__setattr__(self, "eps", positive("eps", self.eps, allow_zero=True))

    @property
    def numbers(self) -> tuple[float, float, float]:
        return self.max_norm, self.eps, math.inf


@final
@dataclass(frozen=True, repr=False)
class GlobalNorm(_Threshold):
    r"""Scale all gradients by one factor so that their joint norm is at most ``max_norm``.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{M}{G + \epsilon}\right), \qquad
        G = \Big(\sum_i |g_i|^p\Big)^{1/p}

    Args:
        max_norm: the threshold M, > 0.
        norm_type: p, > 0; ``inf`` (or "inf") for the largest magnitude.
        eps: added to G, >= 0.

    Raises:
        ValueError: for a value outside its range.
        TypeError: for a value that is no number.

    This is :func:`torch.nn.utils.clip_grad_norm_`, after Pascanu et al., "On the difficulty of training recurrent
    neural networks" (2013); the norm is accumulated in float32 or wider whatever the dtype of the gradients.
    optax and llm.c leave out eps.

    Example:
        >>> from fusedlr.clipping import GlobalNorm
        >>> GlobalNorm(1.0)
        GlobalNorm(max_norm=1.0, norm_type=2.0, eps=1e-06)
    """

    scope: ClassVar[str | None] = "global"


@final
@dataclass(frozen=True, repr=False)
class TensorNorm(_Threshold):
    r"""Scale each tensor's gradient so that its own norm is at most ``max_norm``.

    .. math:: g \leftarrow g \cdot \min\left(1, \frac{M}{n + \epsilon}\right), \qquad
        n = \Big(\sum_{i \in \text{tensor}} |g_i|^p\Big)^{1/p}

    Args:
        max_norm: the threshold M, > 0.
        norm_type: p, > 0; ``inf`` (or "inf") for the largest magnitude.
        eps: added to n, >= 0.

    Raises:
        ValueError: for a value outside its range.
        TypeError: for a value that is no number.

    Keras calls it ``clipnorm`` (there without eps).

    Example:
        >>> from fusedlr.clipping import TensorNorm
        >>> TensorNorm(0.5).max_norm
        0.5
    """

    scope: ClassVar[str | None] = "tensor"


@final
@dataclass(frozen=True, repr=False)
class Value(Clip):
    r"""Bound every element of the gradients.

    .. math:: g \leftarrow \min(\max(g, -v), v)

    Args:
        limit: the bound v, > 0.

    Raises:
        ValueError: for a limit that is not > 0.
        TypeError: for a limit that is no number.

    This is :func:`torch.nn.utils.clip_grad_value_`. It measures no norm; a NaN stays NaN.

    Example:
        >>> from fusedlr.clipping import Value
        >>> Value(0.5)
        Value(limit=0.5)
    """

    limit: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", positive("limit", self.limit, allow_inf=True))

    @property
    def numbers(self) -> tuple[float, float, float]:
        return math.inf, 0.0, self.limit


@final
@dataclass(frozen=True, repr=False)
class Normalize(Clip):
    r"""Divide the gradients by their norm, each tensor by its own or all by the global one.

    .. math:: g \leftarrow \frac{g}{n + \epsilon} \quad\text{or}\quad g \leftarrow \frac{g}{G + \epsilon}

    Args:
        scope: "tensor" or "global".
        eps: added to the (Euclidean) norm, >= 0; a gradient of zeros stays one, with 0 too.

    Raises:
        ValueError: for another scope or a negative eps.
        TypeError: for an eps that is no number.

    ``Normalize("global")`` is optax's ``normalize_by_update_norm``.

    Example:
        >>> from fusedlr.clipping import Normalize
        >>> Normalize("global")
        Normalize(scope='global', eps=1e-06)
    """

    scope: str = "tensor"  # type: ignore[misc]  # a field here, a constant in the others
    eps: float = 1e-6
    norm_type: float = field(default=2.0, init=False, repr=False)
    factor: ClassVar[Any] = staticmethod(normalize_factor)

    def __post_init__(self) -> None:
        if self.scope not in ("tensor", "global"):
            raise ValueError(f"scope must be 'tensor' or 'global', but got {self.scope!r}")
        object.__setattr__(self, "eps", positive("eps", self.eps, allow_zero=True))

    @property
    def numbers(self) -> tuple[float, float, float]:
        return math.inf, self.eps, math.inf


def as_clip(clip: Clip | float | None) -> Clip | None:
    """The strategy meant by the argument ``clip``: a number M stands for ``GlobalNorm(M)``."""
    if clip is None or isinstance(clip, Clip):
        return clip
    number = isinstance(clip, Real) or (isinstance(clip, Tensor) and clip.numel() == 1)  # NumPy's numbers among them
    if isinstance(clip, bool) or not number:
        raise TypeError(
            f"clip must be a strategy of fusedlr.clipping, a number > 0 or None, but got {clip!r} "
            f"({type(clip).__name__}); pass for example clip=fusedlr.clipping.GlobalNorm(1.0)"
        )
    return GlobalNorm(positive("clip", float(clip), allow_inf=True))
