"""Checks of what schedules are made of; each error names the parameter, what came and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Schedule

__all__ = ["choice", "flag", "minimum", "number", "schedule", "steps", "whole"]

# Beyond this float64 no longer holds every integer.
_LONGEST = 2**53


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "numel") and value.numel() == 1 else value


def number(
    name: str,
    value: Any,
    low: float = 0.0,
    below: float = math.inf,
    above: float = -math.inf,
    high: float = math.inf,
) -> float:
    """``value`` as a finite float in [low, high] and in (above, below); a tensor of one element is its number."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, but got {value!r} ({type(value).__name__})")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or not (low <= result <= high and above < result < below):
        lowest = f" > {above:g}" if above >= low else f" >= {low:g}"
        bounds = [lowest] * math.isfinite(max(low, above))
        bounds += [f" <= {high:g}"] * math.isfinite(high) + [f" < {below:g}"] * math.isfinite(below)
        raise ValueError(f"{name} must be a finite number{' and'.join(bounds)}, but got {value!r}")
    return result


def whole(name: str, value: Any, low: int = 0) -> int:
    """``value`` as an int in [low, 2**53]; a tensor of one element is its number."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, but got {value!r} ({type(value).__name__})")
    result = int(value)
    if not low <= result <= _LONGEST:
        raise ValueError(f"{name} must be an integer >= {low} and <= 2**53, but got {value!r}")
    return result


def steps(name: str, value: Any) -> int:
    """``value`` as a number of steps, at least 1."""
    return whole(name, value, low=1)


def flag(name: str, value: Any) -> bool:
    """``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but got {value!r} ({type(value).__name__})")
    return value


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """``value`` if it is one of ``allowed``."""
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but got {value!r}")
    return value


def schedule(name: str, value: Any) -> Schedule:
    """``value`` if it is a schedule."""
    from .base import Schedule

    if not isinstance(value, Schedule):
        raise TypeError(f"{name} must be a schedule, but got {value!r} ({type(value).__name__})")
    return value


def minimum(schedule: object, min_lr: float, base_lr: float) -> None:
    """Raise if the minimum is above the base, which is known only when the schedule is evaluated."""
    if min_lr > base_lr:
        raise ValueError(
            f"min_lr must be at most base_lr, but got min_lr={min_lr!r} and base_lr={base_lr!r} in {schedule!r}"
        )
