"""What every schedule is: a value that emits rows, composes and draws itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, final

from . import checks
from .program import Kind, Row, factors, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Chain", "ForSteps", "Schedule", "shorten", "store"]

# A picture of this many points is as sharp as a screen; a schedule of 1e9 steps is sampled.
_POINTS = 4096


def store(schedule: Schedule, **checked: Any) -> None:
    """Put checked arguments into a frozen schedule: numpy's numbers become Python's, so that equal means equal."""
    for name, argument in checked.items():
        object.__setattr__(schedule, name, argument)


def shorten(text: str, width: int) -> str:
    """The text, its middle left out where it is longer than ``width``: a table may print as a million numbers."""
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[:half]}...{text[-half:]}"


class Schedule(ABC):
    """A rule that gives a value for every step: ``schedule(t, base_lr)``, t the 0-based optimizer step.

    A schedule is a frozen specification: it is compared by value, hashed and pickled, and prints as the code that
    makes it. The base is whatever is scheduled, a learning rate, a weight decay or a momentum.

    A subclass is a frozen dataclass that checks its arguments in ``__post_init__``, says in ``length`` where it ends
    and in ``_rows`` what its program is. Past its end a schedule holds its last value.

    Example:
        >>> from fusedlr.schedules import Cosine, Warmup
        >>> schedule = Warmup(100).then(Cosine(900, min_lr=0.1))
        >>> schedule
        Warmup(100).then(Cosine(900, min_lr=0.1))
        >>> schedule(0, 1.0), schedule(99, 1.0), schedule(100, 1.0), schedule(5_000, 1.0)
        (0.01, 1.0, 1.0, 0.1)
    """

    _axis = "step"

    @property
    @abstractmethod
    def length(self) -> int | None:
        """The number of steps after which another schedule may follow, None for a schedule without an end."""

    @abstractmethod
    def _rows(self, base_lr: float) -> list[Row]:
        """The program for a base that has been checked."""

    def rows(self, base_lr: float) -> list[Row]:
        """The program of this schedule: ``program.value(rows, t)`` evaluates it, ``program.pack`` sends it to a device.

        Args:
            base_lr: what the schedule starts from, a finite number >= 0.

        Raises:
            TypeError: the base is no number.
            ValueError: the base is negative or not finite, or below the schedule's minimum.
        """
        return self._rows(checks.number("base_lr", base_lr))

    def __call__(self, t: int, base_lr: float) -> float:
        """The value at step t, in float64; the errors are those of ``rows`` and of a t that is no integer >= 0."""
        return value(self.rows(base_lr), checks.whole("t", t))

    def then(self, other: Schedule) -> Schedule:
        """This schedule, then another on its own clock: ``a(t)`` for ``t < a.length``, ``b(t - a.length)`` from there.

        Both start from the same base. torch's ``SequentialLR`` and optax's ``join_schedules`` are given the boundaries;
        here they are the lengths.

        Raises:
            TypeError: ``other`` is no schedule.
            ValueError: this schedule has no end; give it one with ``for_steps``.

        Example:
            >>> from fusedlr.schedules import Constant, Linear
            >>> [Constant(steps=2).then(Linear(2, 1.0, 0.0))(t, 8.0) for t in range(6)]
            [8.0, 8.0, 8.0, 4.0, 0.0, 0.0]
        """
        return Chain((self, other))

    def for_steps(self, steps: int) -> Schedule:
        """This schedule for so many steps: ``a(min(t, steps))``, an end that another schedule can follow.

        Raises:
            TypeError, ValueError: ``steps`` is no integer >= 1.

        Example:
            >>> from fusedlr.schedules import Constant, ExponentialDecay
            >>> schedule = ExponentialDecay(0.5).for_steps(2)
            >>> [schedule(t, 1.0) for t in range(4)]
            [1.0, 0.5, 0.25, 0.25]
            >>> schedule.then(Constant(0.1))
            ExponentialDecay(0.5).for_steps(2).then(Constant(0.1))
        """
        return ForSteps(self, steps)

    def momentum_schedule(self) -> Schedule | None:
        """What cycles the momentum (or beta1) along with this learning rate; None where nothing does.

        ``OneCycle`` and ``Cyclic`` have one when made with ``cycle_momentum=True``, and so has what is composed of
        them; elsewhere the momentum keeps its base. An optimizer applies it by itself.
        """
        return None

    def plot(self, steps: int, base_lr: float = 1.0) -> Axes:
        """Draw the first ``steps`` values with matplotlib and return the axes.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError, ValueError: ``steps`` is no integer >= 1, or an error of ``rows``.

        Example:
            >>> from fusedlr.schedules import Cosine
            >>> Cosine(1_000).plot(1_200).get_xlabel()  # doctest: +SKIP
            'step'
        """
        last = checks.steps("steps", steps) - 1
        rows = self.rows(base_lr)
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                "drawing a schedule needs matplotlib, which is not installed; pip install 'fusedlr[examples]'"
            ) from error
        points = min(last, _POINTS)
        times = [last * i // points for i in range(points + 1)] if points else [0]
        _, axes = pyplot.subplots()
        # Time has no rows of its own: what follows it is asked for itself.
        axes.plot(times, [value(rows, t) if self._axis == "step" else self(t, base_lr) for t in times])
        axes.set(title=shorten(repr(self), 100), xlabel=self._axis, ylabel="value")
        return axes

    def __repr__(self) -> str:
        """The code that makes this schedule, without the arguments that have their defaults."""
        words = []
        for i, field in enumerate(fields(self)):  # type: ignore[arg-type]  # every concrete schedule is a dataclass
            argument = getattr(self, field.name)
            if field.default is MISSING:
                words.append(repr(argument))
            elif argument != field.default:
                words.append(repr(argument) if i == 0 else f"{field.name}={argument!r}")
        return f"{type(self).__name__}({', '.join(words)})"


@final
@dataclass(frozen=True, repr=False)
class Chain(Schedule):
    """Schedules one after the other, each on its own clock: what ``a.then(b)`` makes.

    Args:
        parts: the schedules; chains among them are taken apart, so that the order of ``then`` does not matter.

    Raises:
        TypeError: a part is no schedule.
        ValueError: a part before the last has no end, or there is no part.
    """

    parts: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        flat: list[Schedule] = []
        for part in self.parts:
            if not isinstance(part, Schedule):
                raise TypeError(f"then expects a schedule, but got {part!r} ({type(part).__name__})")
            flat.extend(part.parts if isinstance(part, Chain) else (part,))
        if not flat:
            raise ValueError("a chain needs at least one schedule, but got none")
        for before, after in pairwise(flat):
            if before.length is None:
                raise ValueError(
                    f"then needs a schedule that ends, but {before!r} has no end for {after!r} to follow; "
                    "give it one with .for_steps(n)"
                )
        store(self, parts=tuple(flat))

    @property
    def length(self) -> int | None:
        """The sum of the lengths, None if the last part has no end."""
        lengths = [part.length for part in self.parts]
        return None if lengths[-1] is None else sum(length for length in lengths if length is not None)

    def _rows(self, base_lr: float) -> list[Row]:
        rows: list[Row] = []
        start = used = 0
        for i, part in enumerate(self.parts, start=1):
            own = part._rows(base_lr)
            width = factors(own)
            # A row from a part's end on only holds its last value, and there the next part begins.
            end = math.inf if i == len(self.parts) or part.length is None else part.length
            # The factors of earlier parts that this one does not have, or not from its start on, end here.
            begun = {row.factor for row in own if row.start <= 0}
            ended = [factor for factor in range(used) if factor not in begun]
            rows += [Row(start, math.inf, 0, Kind.CONST, 1.0, factor=factor) for factor in ended]
            rows += [row._replace(start=start + row.start) for row in own if row.start < end]
            start, used = start + (part.length or 0), max(used, width)
        return rows

    def momentum_schedule(self) -> Schedule | None:
        """The parts' momentum cycles one after the other; the base for a part that has none."""
        cycles = [part.momentum_schedule() for part in self.parts]
        if not any(cycles):
            return None
        # Imported here, as constants are built on this module.
        from .ramps import Constant

        pairs = zip(cycles, self.parts, strict=True)
        return Chain(tuple(cycle or Constant(steps=part.length) for cycle, part in pairs))

    def __repr__(self) -> str:
        """The parts joined by ``then``."""
        first, *others = map(repr, self.parts)
        return first + "".join(f".then({other})" for other in others)


@final
@dataclass(frozen=True, repr=False)
class ForSteps(Schedule):
    """A schedule whose clock stops after so many steps: what ``a.for_steps(n)`` makes, ``a(min(t, steps))``.

    Args:
        schedule: the schedule to end.
        steps: where it ends, in steps, at least 1; a schedule that ends earlier holds its last value until then.

    Raises:
        TypeError, ValueError: ``schedule`` is no schedule, ``steps`` no integer >= 1.
    """

    schedule: Schedule
    steps: int

    def __post_init__(self) -> None:
        checks.schedule("schedule", self.schedule)
        store(self, steps=checks.steps("steps", self.steps))

    @property
    def length(self) -> int:
        """``steps``."""
        return self.steps

    def _rows(self, base_lr: float) -> list[Row]:
        rows = self.schedule._rows(base_lr)
        kept = [row for row in rows if row.start < self.steps]
        for i, row in enumerate(kept):
            if row.kind == Kind.LIVE:
                kept[i] = row._replace(length=min(row.length, (self.steps - row.start) / row.stride))
        # What follows something else than the steps stays in force, and follows it no longer; the rest holds its value.
        now = {row.factor: row for row in rows if row.start <= self.steps}
        live = {f for f, row in now.items() if row.kind == Kind.LIVE and row.start < self.steps}
        still = [factor for factor in range(factors(rows)) if factor not in live]
        last = value([row for row in rows if row.factor not in live], self.steps)
        held = [Row(self.steps, math.inf, 0, Kind.CONST, last if f == still[0] else 1.0, factor=f) for f in still]
        return kept + held

    def momentum_schedule(self) -> Schedule | None:
        """The momentum cycle of the schedule for as many steps."""
        cycle = self.schedule.momentum_schedule()
        return cycle and cycle.for_steps(self.steps)

    def __repr__(self) -> str:
        """The schedule with ``for_steps``; calls are read from left to right, so a chain needs no brackets."""
        return f"{self.schedule!r}.for_steps({self.steps})"
