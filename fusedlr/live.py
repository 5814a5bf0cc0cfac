"""The numbers of schedules that follow something else than the steps, kept between steps and sent where they are used.

A scalar with a ``Plateau`` or a ``TimeDecay`` has a dict in ``group["fusedlr"]["live"]``, so that it travels with every
kind of checkpoint. It is empty until something has happened. A Plateau's holds plain numbers until the first report
and 0-dim float64 tensors from then on: a report is a few operations on them, on the device of the parameters, and
nobody waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .schedules import Plateau, Schedule, TimeDecay
from .schedules.live import UNITS, live_part
from .schedules.program import Kind, Row

if TYPE_CHECKING:
    from .groups import Scheduled
    from .optimizer import FusedOptimizer

__all__ = ["Live", "Metered", "Timed", "carry", "check_lowest", "make_live", "plain", "report", "tick", "timed",
           "window"]  # fmt: skip

_MARK = "live"


def window(rows: Sequence[Row]) -> tuple[float, float]:
    """The first and the last step of the LIVE row of a program; none where it has no such row."""
    for row in rows:
        if row.kind == Kind.LIVE:
            after = [other.start for other in rows if other.factor == row.factor and other.start > row.start]
            return row.start, min([row.start + row.length * row.stride, *after])
    return math.inf, -math.inf


class Live:
    """What the LIVE row of one scalar of one group multiplies by."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        self.version = 0
        """Grows whenever the number changes."""

    def number(self, initial: float) -> float:
        """The number as far as the host knows; ``initial`` before anything has happened."""
        raise NotImplementedError

    def fill(self, cell: Tensor) -> None:
        """Write the number into a cell of a table on a device, which holds the initial one."""
        raise NotImplementedError


class Timed(Live):
    """The elapsed time of a TimeDecay."""

    def __init__(self, state: dict[str, Any], schedule: TimeDecay) -> None:
        super().__init__(state)
        if state.keys() != {"elapsed"}:
            state.clear()
        self.schedule = schedule
        self._since: float | None = None

    def tick(self) -> None:
        """Count the time since the last step; the first step starts the clock."""
        now = self.schedule.clock()
        if isinstance(now, bool) or not isinstance(now, Real) or not math.isfinite(now):
            raise TypeError(f"the clock of {self.schedule!r} must give finite seconds, but gave {now!r}")
        now = float(now)
        passed = 0.0 if self._since is None else max(now - self._since, 0.0)
        self.state["elapsed"] = self.state.get("elapsed", 0.0) + passed / UNITS[self.schedule.unit]
        self._since = now
        self.version += 1

    def number(self, initial: float) -> float:
        return self.schedule.factor(self.state["elapsed"]) if self.state else initial

    def fill(self, cell: Tensor) -> None:
        if self.state:
            cell.fill_(self.number(1.0))


class Metered(Live):
    """The state machine of a Plateau."""

    def __init__(self, state: dict[str, Any], schedule: Plateau, lowest: float) -> None:
        super().__init__(state)
        if state.keys() != {"best", "bad", "cooldown", "value"}:
            state.clear()
        self.schedule = schedule
        self.lowest = lowest
        self._known: float | None = None
        self._event: Any = None
        self._host = torch.empty(0)
        self._behind = False

    @property
    def device_value(self) -> Tensor | None:
        """The value where an accelerator holds it, None where the host knows it."""
        value = self.state.get("value")
        return value if isinstance(value, Tensor) and value.device.type != "cpu" else None

    def advance(self, metric: Tensor, counts: Any, initial: float) -> None:
        """One report, as ``ReduceLROnPlateau.step``: a metric on the state's device, and whether it counts."""
        schedule, device = self.schedule, metric.device
        if not self.state:
            worst = math.inf if schedule.mode == "min" else -math.inf
            self.state.update(best=worst, bad=0.0, cooldown=0.0, value=initial)
        if not isinstance(self.state["value"], Tensor):
            self._known = self.state["value"]  # until something arrives from the device
        for name, number in self.state.items():
            if not isinstance(number, Tensor) or number.device != device:
                # Filled on the device: a copy from ordinary memory would wait for it.
                self.state[name] = torch.full((), float(number), dtype=torch.float64, device=device)
        best, bad, cooldown, value = (self.state[name] for name in ("best", "bad", "cooldown", "value"))
        better = self._is_better(metric, best)
        cooling = cooldown > 0
        bad_now = (bad + 1).masked_fill(better | cooling, 0.0)
        cooldown_now = cooldown - cooling.double()
        reduce = bad_now > schedule.patience
        lowered = (value * schedule.factor).clamp(min=self.lowest)
        new = {
            "best": torch.where(better, metric, best),
            "bad": bad_now.masked_fill(reduce, 0.0),
            "cooldown": cooldown_now.masked_fill(reduce, float(schedule.cooldown)),
            "value": torch.where(reduce & (value - lowered > schedule.eps), lowered, value),
        }
        for name, number in new.items():
            old = self.state[name]
            old.copy_(number if counts is True else torch.where(counts, number, old))
        self.version += 1
        self._post()

    def _is_better(self, metric: Tensor, best: Tensor) -> Tensor:
        threshold, relative = self.schedule.threshold, self.schedule.threshold_mode == "rel"
        if self.schedule.mode == "min":
            return metric < (best * (1.0 - threshold) if relative else best - threshold)
        return metric > (best * (threshold + 1.0) if relative else best + threshold)

    def number(self, initial: float) -> float:
        value = self.state.get("value", initial)
        if self.device_value is None:
            return float(value)
        self._poll()
        return initial if self._known is None else self._known

    def fill(self, cell: Tensor) -> None:
        value = self.state.get("value")
        if isinstance(value, Tensor):
            cell.copy_(value, non_blocking=True)
        elif value is not None:
            cell.fill_(value)

    def settle(self) -> None:
        """Make the state plain numbers; where a device holds it, this waits for it."""
        self.state.update(plain(self.state))
        self._event = None

    def _post(self) -> None:
        """Send the value to the host, unless a copy is still on its way or a graph is being captured."""
        value = self.device_value
        if value is None or value.device.type != "cuda":
            return
        self._behind = self._event is not None or torch.cuda.is_current_stream_capturing()
        if not self._behind:
            with torch.cuda.device(value.device):
                self._host = torch.empty((), dtype=torch.float64, device="cpu", pin_memory=True)
                self._host.copy_(value, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()

    def _poll(self) -> None:
        # An event must not be asked while a graph is captured.
        if self._event is None or torch.cuda.is_current_stream_capturing() or not self._event.query():
            return
        self._event = None
        self._known = float(self._host)
        if self._behind:
            self._post()


def check_lowest(schedule: Schedule, group: int, groups: int | None) -> None:
    """Raise a ValueError where a Plateau's ``min_lr`` does not have a number a group (``groups``: None if not all are
    there yet)."""
    part = live_part(schedule)
    if isinstance(part, Plateau):
        part.lowest(group)
        if groups is not None and isinstance(part.min_lr, tuple) and len(part.min_lr) != groups:
            raise ValueError(f"min_lr must have a number for each of {groups} param groups, but got {part.min_lr!r}")


def make_live(marks: dict[str, Any], name: str, schedule: Schedule, group: int) -> Live | None:
    """What a scalar's schedule follows beside the steps, its state taken from the marks of the group."""
    part = live_part(schedule)
    if part is None:
        return None
    state = marks.setdefault(_MARK, {}).setdefault(name, {})
    return Timed(state, part) if isinstance(part, TimeDecay) else Metered(state, part, part.lowest(group))


def carry(before: Iterable[Iterable[Scheduled]], after: Iterable[Iterable[Scheduled]]) -> None:
    """Scalars that are bound anew to the same state go on with the clocks and copies they had."""
    old = {id(s.live.state): s.live for scheduled in before for s in scheduled if s.live is not None}
    for s in (s for scheduled in after for s in scheduled if s.live is not None):
        same = old.get(id(s.live.state))  # type: ignore[union-attr]
        if same is not None and same.schedule == s.live.schedule:  # type: ignore[attr-defined, union-attr]
            s.live = same


def timed(schedules: Iterable[Iterable[Scheduled]]) -> list[tuple[Scheduled, Timed]]:
    """The scalars that follow a TimeDecay, and its clocks."""
    return [(s, s.live) for scheduled in schedules for s in scheduled if isinstance(s.live, Timed)]


def tick(scalars: Iterable[tuple[Scheduled, Timed]], t: int) -> None:
    """Let the clocks run of all TimeDecays that are in force at step t."""
    for scheduled, clock in scalars:
        first, last = window(scheduled.rows)
        if first <= t <= last:
            clock.tick()


def plain(state: dict[str, Any]) -> dict[str, float]:
    """A state as plain numbers, for a checkpoint."""
    return {name: float(number) for name, number in state.items()}


def report(optimizer: FusedOptimizer, metric: Any) -> None:
    """``FusedOptimizer.report``."""
    metered = [
        (s, s.live) for scheduled in optimizer._schedules for s in scheduled if isinstance(s.live, Metered)
    ]
    if not metered:
        raise ValueError(
            "report(metric) needs a schedules.Plateau, but no scalar of this optimizer follows one; pass for example "
            "schedule=fusedlr.schedules.Plateau()"
        )
    kinds = {leaf.device.type for leaf in optimizer._leaves}
    if "cpu" in kinds and len(kinds) > 1:
        raise ValueError(
            f"a Plateau needs all parameters on one kind of device, but they are on {sorted(kinds)}: the CPU would "
            "have to wait for the GPU; use one optimizer for the parameters of each"
        )
    device = optimizer._device()
    number = _on(metric, device)
    t: Any = optimizer._t
    on_triton = optimizer._backend.for_device(device.type) == "triton"
    if device.type != "cpu" and (on_triton or optimizer._nonfinite == "skip"):
        t = optimizer._clock(device)[0]  # only the device knows which steps were skipped, or replayed from a graph
    for s, live in metered:
        first, last = window(s.rows)
        counts: Any = (t >= first) & (t <= last)
        if counts is not False:
            live.advance(number, counts, s.base)
    executors = [] if optimizer._plan is None else optimizer._plan.executors
    for executor in [*executors, *(captured for captured, _ in optimizer._captured if captured not in executors)]:
        executor.refresh()


def _on(metric: Any, device: torch.device) -> Tensor:
    """A metric as a 0-dim float64 tensor on a device."""
    if isinstance(metric, Tensor):
        if metric.numel() != 1 or metric.is_complex() or metric.dtype == torch.bool:
            raise TypeError(
                f"metric must be a number or a tensor of one real number, but got a tensor of shape "
                f"{tuple(metric.shape)} and dtype {metric.dtype}"
            )
        if metric.device.type != "cpu" and device.type != "cpu":
            return metric.detach().reshape(()).to(device, torch.float64, non_blocking=True)
        metric = metric.item()
    if isinstance(metric, bool) or not isinstance(metric, Real):
        raise TypeError(f"metric must be a number or a 0-dim tensor, but got {metric!r} ({type(metric).__name__})")
    return torch.full((), float(metric), dtype=torch.float64, device=device)
