"""Schedules that are lists of numbers: given ones, or what a function returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import final

from . import checks
from .base import Schedule, store
from .program import Kind, Row

__all__ = ["Lambda", "Table"]

# As many float64 are 80 MB on a device.
_MOST_SAMPLES = 10_000_000


@final
@dataclass(frozen=True, repr=False)
class Table(Schedule):
    """A list of multiples of the base: ``base_lr * values[t // every]``, the last one held.

    With ``interpolate`` the multiple runs in straight lines through ``values[i]`` at ``t = i*every``.

    Args:
        values: the multiples, finite numbers >= 0, at least one; a list, an array or a 1-d tensor.
        every: steps from one value to the next, at least 1.
        interpolate: straight lines between the values instead of stairs.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source:
        DINO's per-iteration schedules; ``optax.linear_interpolate`` style tables with equal distances.

    Example:
        >>> [Table([1.0, 0.5], every=2)(t, 1.0) for t in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.5]
        >>> [Table([1.0, 0.5], every=2, interpolate=True)(t, 1.0) for t in range(5)]
        [1.0, 0.75, 0.5, 0.5, 0.5]
    """

    values: Iterable[float]
    every: int = 1
    interpolate: bool = False

    def __post_init__(self) -> None:
        tolist = getattr(self.values, "tolist", None)
        try:
            given = tuple(tolist() if tolist is not None else self.values)
        except TypeError:
            raise TypeError(f"values must be a sequence of numbers, but got {self.values!r}") from None
        values = tuple(checks.number(f"values[{i}]", multiple) for i, multiple in enumerate(given))
        if not values:
            raise ValueError(f"values must hold at least one number, but got {self.values!r}")
        every = checks.steps("every", self.every)
        checks.steps("len(values)*every", len(values) * every)
        store(self, values=values, every=every, interpolate=checks.flag("interpolate", self.interpolate))

    @property
    def length(self) -> int:
        """``len(values) * every``."""
        return len(tuple(self.values)) * self.every

    def _rows(self, base_lr: float) -> list[Row]:
        values = tuple(self.values)
        return [Row(0, self.length, 0, Kind.TABLE, base_lr, 0.0, float(self.interpolate), self.every, values=values)]


def Lambda(fn: Callable[[int], float], total_steps: int) -> Table:
    """A function of the step, called once for each: ``base_lr * fn(t)``, its last value held.

    The values are taken when it is made, so it is a ``Table``, which is compared, pickled and printed without the
    function. A function that torch's ``LambdaLR`` takes is one that this takes.

    Args:
        fn: gives the multiple of the base at step t, a finite number >= 0.
        total_steps: how many values are taken, from t = 0 on, from 1 to 10 million.

    Raises:
        TypeError: ``fn`` cannot be called or returns no number, or ``total_steps`` is no integer.
        ValueError: ``fn`` returns a negative number, an infinity or NaN, or ``total_steps`` is outside its range.

    Source:
        ``torch.optim.lr_scheduler.LambdaLR``.

    Example:
        >>> Lambda(lambda t: 0.5**t, 4)
        Table((1.0, 0.5, 0.25, 0.125))
        >>> Lambda(lambda t: 0.5**t, 4)(100, 8.0)
        1.0
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of the step, but got {fn!r} ({type(fn).__name__})")
    n = checks.steps("total_steps", total_steps)
    if n > _MOST_SAMPLES:
        raise ValueError(
            f"total_steps must be at most {_MOST_SAMPLES}, as that many values are stored, but got {total_steps!r}; "
            "write the function as a schedule, or let per_epoch count larger steps"
        )
    return Table(tuple(checks.number(f"fn({t})", fn(t)) for t in range(n)))
