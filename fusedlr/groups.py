"""The hyper-parameters of the param groups: reading them, scheduling them, and respecting outside writes.

A scheduled scalar has three values: its *base* (``initial_lr`` for the lr), what fusedlr last *wrote* into the group,
and what stands there now. Where the last two differ somebody else wrote: that value rules until it is set back.
The marks are kept as plain data in ``group["fusedlr"]``, so that they travel with every kind of checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from .clipping import Clip
from .live import check_lowest, make_live
from .precision import Precision, check_precision
from .rule import Rule
from .schedules import Schedule
from .schedules.live import live_part
from .schedules.program import Kind, Row
from .schedules.program import value as value_at

__all__ = [
    "GROUP_KEY",
    "ScheduleArg",
    "Scheduled",
    "as_schedules",
    "check_parameters",
    "moves_momentum",
    "own_tensors",
    "read",
    "scalars_at",
    "scheduled_scalars",
    "write",
]

GROUP_KEY = "fusedlr"
ScheduleArg = Schedule | Mapping[str, Schedule] | None

_BETAS = {"beta1": 0, "beta2": 1}
_FLAGS = ("nesterov",)  # numbers to a rule, but yes or no to its user
# Steps whose scheduled values are found at once: after a backward pass, a formula's code is in no cache, and one value
# takes 17 us; 16 at once take 37.
AHEAD = 16


def read(group: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Scalars of a group by name, each a number, or a tensor where the user gave one."""
    scalars = {}
    for name in names:
        value = group["betas"][_BETAS[name]] if name in _BETAS else group[name]
        scalars[name] = value if type(value) is float else _number(name, value)
    return scalars


def _number(name: str, value: Any) -> Any:
    """A scalar that is no float: a tensor as it is, else what converts to a number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} of a param group must be a number, or a tensor that holds one, but is {value!r} "
            f"({type(value).__name__}); nothing was changed"
        ) from None


def write(group: dict[str, Any], name: str, value: float) -> None:
    """Set a scalar of a group; a tensor is filled in place, as torch's schedulers do."""
    if name in _BETAS:
        betas = list(group["betas"])
        betas[_BETAS[name]] = value
        group["betas"] = tuple(betas)
    elif isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def check_parameters(
    params: Sequence[Tensor], rule: Rule, precision: Precision, clip: Clip | None, optimizer: str
) -> None:
    """Raise a ValueError for a parameter that cannot be stepped as asked."""
    for p in params:
        if is_lazy(p):
            raise ValueError(
                f"a parameter of a lazy module has no shape yet ({type(p).__name__}), and cannot be laid out; run the "
                "model once, then build the optimizer"
            )
        if p.is_complex():
            raise ValueError(
                f"complex parameters are not supported, but got one of dtype {p.dtype} and shape {tuple(p.shape)}; "
                "use torch.view_as_real(parameter), or torch.optim for it"
            )
        check_precision(precision, p.dtype, rule)
    if clip is not None and clip.scope == "unit" and rule.trust is not None:
        raise ValueError(
            f"clip={clip!r} and the trust ratio of {optimizer} both scale by the norms of weights, and are not "
            "combined; use a clip of the gradients alone, such as clipping.GlobalNorm"
        )


def as_schedules(schedule: Any, names: tuple[str, ...], clip: Clip | None) -> dict[str, Schedule]:
    """The argument ``schedule`` as a dict by scalar; errors name what can be scheduled.

    A schedule of the lr that cycles the momentum (``OneCycle(..., cycle_momentum=True)``) adds that of the momentum, or
    of beta1 where there is no momentum.
    """
    names = tuple(name for name in names if name not in _FLAGS)
    if schedule is None:
        return {}
    if isinstance(schedule, Schedule):
        return _with_momentum({"lr": schedule}, names)
    if not isinstance(schedule, Mapping):
        raise TypeError(
            f"schedule must be a schedule of fusedlr.schedules, a dict of them or None, but got {schedule!r} "
            f"({type(schedule).__name__}); pass for example schedule=fusedlr.schedules.Cosine(1000)"
        )
    for name, value in schedule.items():
        if name not in (*names, "max_norm"):
            known = sorted({*names, "max_norm"})
            raise ValueError(f"schedule has the unknown scalar {name!r}; expected one of {known}")
        if not isinstance(value, Schedule):
            raise TypeError(
                f"schedule[{name!r}] must be a schedule of fusedlr.schedules, "
                f"but got {value!r} ({type(value).__name__})"
            )
    if "max_norm" in schedule and not math.isfinite(getattr(clip, "max_norm", None) or math.inf):
        raise ValueError(
            f"schedule['max_norm'] needs a clip with a finite max_norm, such as clip=1.0, but clip is {clip!r}"
        )
    if "max_norm" in schedule and live_part(schedule["max_norm"]) is not None:
        raise ValueError(
            f"schedule['max_norm'] cannot follow a metric or the time, but got {schedule['max_norm']!r}; "
            "use a schedule of the steps"
        )
    return _with_momentum(dict(schedule), names)


def moves_momentum(schedule: Any) -> bool:
    """Whether a group's schedule drives the momentum, by name or along with the lr."""
    if isinstance(schedule, Mapping):
        return "momentum" in schedule or moves_momentum(schedule.get("lr"))
    return isinstance(schedule, Schedule) and schedule.momentum_schedule() is not None


def _with_momentum(schedules: dict[str, Schedule], names: tuple[str, ...]) -> dict[str, Schedule]:
    cycle = schedules["lr"].momentum_schedule() if "lr" in schedules else None
    if cycle is None:
        return schedules
    name = next((name for name in ("momentum", "beta1") if name in names), None)
    if name is None:
        raise ValueError(
            f"cycle_momentum=True needs an optimizer with a momentum or beta1, but this one has {sorted(names)}; "
            "leave cycle_momentum out"
        )
    if name in schedules:
        raise ValueError(
            f"schedule[{name!r}] and cycle_momentum=True of schedule['lr'] both drive {name}, but only one can; "
            f"got {schedules[name]!r} and {schedules['lr']!r}"
        )
    return {**schedules, name: cycle}


class Scheduled:
    """One scheduled scalar of one group."""

    __slots__ = ("_first", "_rows", "_rows_base", "_shown", "_values", "_version", "group", "live", "name", "schedule")

    def __init__(self, group: dict[str, Any], name: str, schedule: Schedule, index: int) -> None:
        self.group = group
        self.name = name
        self.schedule = schedule
        self._shown: Tensor | None = None
        self._version = 0
        self._rows: list[Row] = []
        self._rows_base: float | None = None
        self._values: list[float] = []  # of steps ``_first`` and following
        self._first = 0
        current = read(group, name)[name]
        marks = group[GROUP_KEY]
        if name == "lr":
            group.setdefault("initial_lr", float(current))
        else:
            marks["base"].setdefault(name, float(current))
        marks["written"].setdefault(name, float(current))
        if isinstance(current, Tensor) and not _differs(current, marks["written"][name]):
            self._shown, self._version = current, current._version
        self.live = make_live(marks, name, schedule, index)
        self.at(0)  # a base below the schedule's minimum is an error now, not at the first step

    @property
    def base(self) -> float:
        """The value the schedule starts from."""
        return float(self.group["initial_lr"] if self.name == "lr" else self.group[GROUP_KEY]["base"][self.name])

    @property
    def rows(self) -> list[Row]:
        """The program; it is made again only when the base changes."""
        base = self.base
        if base != self._rows_base:
            self._rows, self._rows_base, self._values = self.schedule.rows(base), base, []
        return self._rows

    def overridden(self) -> bool:
        """Whether somebody else wrote the scalar since fusedlr did."""
        return self.overridden_by(read(self.group, self.name)[self.name])

    def overridden_by(self, current: Any) -> bool:
        """Whether this, which stands in the group, is not what fusedlr wrote last."""
        if isinstance(current, Tensor) and current.device.type != "cpu":
            # Its version counts the writes; to look at the value would be to wait for the device.
            return current is not self._shown or current._version != self._version
        return _differs(current, self.group[GROUP_KEY]["written"][self.name])

    def at(self, t: int, number: float | None = None) -> float:
        """The scheduled value at step t; ``number`` takes the place of the one that it follows beside the steps."""
        if self.live is None:
            i = t - self._first
            if not 0 <= i < len(self._values) or self.base != self._rows_base:
                rows = self.rows
                self._values, self._first, i = [value_at(rows, t + k) for k in range(AHEAD)], t, 0
            return self._values[i]
        rows = self.rows
        if number is None:
            number = self.live.number(next((row.values[0] for row in rows if row.kind == Kind.LIVE), 0.0))
        return value_at([row._replace(values=(number,)) if row.kind == Kind.LIVE else row for row in rows], t)

    def check(self, value: float, t: int) -> None:
        """Refuse to take step t with a value that no rule can take.

        Raises:
            ValueError: for a beta outside [0, 1), with which averages grow and bias corrections change their sign.
        """
        if self.name in _BETAS and not 0.0 <= value < 1.0:
            raise ValueError(
                f"schedule[{self.name!r}] gives {value} at step {t}, but a beta must be in [0, 1); lower the base "
                f"({self.base}) or bound the schedule {self.schedule!r}"
            )

    def show(self, used: float) -> None:
        """Write the value that a step used into the group."""
        group, name = self.group, self.name
        write(group, name, used)
        group[GROUP_KEY]["written"][name] = used
        current = group.get(name)  # betas have become numbers
        if isinstance(current, Tensor):
            self._shown, self._version = current, current._version


def _differs(current: Any, written: float) -> bool:
    """Whether a scalar is not what was written; a tensor rounds what is written into it."""
    if isinstance(current, Tensor):
        return bool(current.item() != current.new_tensor(written).item())
    return bool(current != written)


def own_tensors(
    groups: Sequence[dict[str, Any]], schedules: Sequence[Mapping[str, Schedule]], defaults: dict[str, Any]
) -> None:
    """Give each group its own tensor of a scheduled scalar: torch hands one default tensor to all groups."""
    for group, names in zip(groups, schedules, strict=True):
        for name in names:
            tensor = group.get(name)
            if not isinstance(tensor, Tensor):
                continue
            if any(other.get(name) is tensor for other in groups if other is not group):
                group[name] = tensor.clone()
            elif name in defaults and defaults[name] is tensor:
                defaults[name] = tensor.clone()  # what a group added later begins with


def scheduled_scalars(
    group: dict[str, Any], schedules: Mapping[str, Schedule], index: int, groups: int | None = None
) -> list[Scheduled]:
    """The scheduled scalars of group ``index`` of so many (``max_norm`` belongs to the clip, not to a group)."""
    own = {name: s for name, s in schedules.items() if name != "max_norm"}
    for schedule in own.values():
        check_lowest(schedule, index, groups)
    return [Scheduled(group, name, s, index) for name, s in own.items()]


def scalars_at(
    t: int,
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    schedules: Sequence[Sequence[Scheduled]],
) -> tuple[list[dict[str, Any]], list[list[Scheduled]]]:
    """The hyper-parameters of step t, one dict a group, and which of each group's a schedule drives.

    The groups themselves are not changed.
    """
    values, driven = [], []
    for group, wanted, scheduled in zip(groups, names, schedules, strict=True):
        scalars = read(group, *wanted)
        mine = [s for s in scheduled if not s.overridden_by(scalars[s.name])]
        for s in mine:
            scalars[s.name] = s.at(t)
        values.append(scalars)
        driven.append(mine)
    return values, driven
