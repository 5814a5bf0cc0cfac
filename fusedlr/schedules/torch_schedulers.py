"""From torch: the curve of a ``torch.optim.lr_scheduler`` as a schedule."""

from __future__ import annotations

import copy
import warnings
from bisect import bisect_right
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from typing import Any

from . import checks
from .base import Schedule
from .compose import product
from .cycles import CosineRestarts, Cyclic, OneCycle
from .decays import MultiStepDecay, StepDecay
from .ramps import Constant, Cosine, Linear, Polynomial
from .tables import Lambda, Table

__all__ = ["from_torch"]

# In a ChainedScheduler these multiply what the others made; the rest add to it or write over it.
_FACTORS = {"ConstantLR", "LinearLR", "ExponentialLR", "StepLR", "MultiStepLR", "PolynomialLR", "MultiplicativeLR"}


def from_torch(scheduler: Any, total_steps: int | None = None, *, group: int = 0) -> Schedule:
    """The curve of a torch scheduler from its beginning, wherever it stands now; the scheduler is left as it is.

    The closed forms become the schedules of the same form: for example ``CosineAnnealingLR`` becomes a periodic
    ``Cosine``, ``SequentialLR`` a chain and a ``ChainedScheduler`` of schedulers that multiply a product. What is
    made of Python functions (``LambdaLR`` and so all of HF's schedules, ``MultiplicativeLR``, ``CyclicLR`` with a
    ``scale_fn``) is sampled for ``total_steps`` steps and then held. Any other scheduler is sampled by stepping a
    copy; where it drives a momentum, that is left out.

    A curve is in multiples of the group's base, or absolute where torch's is (``eta_min``, ``OneCycleLR``,
    ``CyclicLR``): give the fusedlr group the lr that the scheduler calls ``base_lrs[group]``. Groups with arguments of
    their own need a schedule each. torch multiplies from step to step and drifts, by some 1e-13 after 1e4 steps.

    Args:
        scheduler: an ``LRScheduler``, not a ``ReduceLROnPlateau``.
        total_steps: how many steps are sampled, at least 1; only for what has no closed form.
        group: the param group whose curve it is.

    Raises:
        TypeError: ``scheduler`` is no torch scheduler.
        ValueError: it must be sampled and ``total_steps`` is not given, it is a ``ReduceLROnPlateau``, it has no such
            group, or it takes a value that a schedule cannot have, such as a negative one.

    Source:
        ``torch.optim.lr_scheduler``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=5)
        >>> cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 95)
        >>> from_torch(torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [5]))
        Linear(5, 0.1, 1.0).for_steps(5).then(Cosine(95, periodic=True))
    """
    from torch.optim import lr_scheduler as theirs

    if isinstance(scheduler, theirs.ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau follows a metric and has no curve; use fusedlr.schedules.Plateau and optimizer.report"
        )
    if not isinstance(scheduler, theirs.LRScheduler):
        raise TypeError(
            f"scheduler must be a torch.optim.lr_scheduler.LRScheduler, but got {scheduler!r} "
            f"({type(scheduler).__name__})"
        )
    if type(scheduler).__module__.startswith("fusedlr."):  # it would follow itself
        raise ValueError(
            "the scheduler is the facade of a fusedlr optimizer, which follows that optimizer's own schedule; take "
            "optimizer.param_groups[0]['schedule']"
        )
    groups = len(scheduler.optimizer.param_groups)
    if checks.whole("group", group) >= groups:
        raise ValueError(f"group must be below the number of param groups, {groups}, but got {group!r}")
    return _convert(scheduler, None if total_steps is None else checks.steps("total_steps", total_steps), group)


def _convert(scheduler: Any, total_steps: int | None, group: int) -> Schedule:
    from torch.optim import lr_scheduler as theirs

    # Of the class itself: a subclass may do anything, and is sampled.
    name = type(scheduler).__name__ if type(scheduler).__module__ == theirs.__name__ else ""
    if name == "SequentialLR":
        return _sequence(scheduler, total_steps, group)
    if name == "ChainedScheduler":
        parts = scheduler._schedulers
        if {type(part).__name__ for part in parts} <= _FACTORS:
            return reduce(product, [_convert(part, total_steps, group) for part in parts])
    if name == "MultiplicativeLR":
        return _running_product(scheduler, total_steps, group)
    if name == "LambdaLR":
        return Lambda(scheduler.lr_lambdas[group], _needed(scheduler, total_steps))
    if name == "CyclicLR":
        return _cyclic(scheduler, group) or _replay(scheduler, total_steps, group)
    bounded = name in ("CosineAnnealingLR", "CosineAnnealingWarmRestarts")
    if bounded and scheduler.eta_min > scheduler.base_lrs[group]:  # it rises to a minimum that is a maximum
        return _replay(scheduler, total_steps, group)
    closed: dict[str, Callable[[Any], Schedule]] = {
        "ConstantLR": _constant,
        "LinearLR": lambda s: _linear(s.total_iters, s.start_factor, s.end_factor),
        "ExponentialLR": lambda s: StepDecay(1, s.gamma),
        "StepLR": lambda s: StepDecay(s.step_size, s.gamma),
        "MultiStepLR": _multi_step,
        "PolynomialLR": lambda s: Polynomial(s.total_iters, s.power) if s.total_iters else Constant(),
        "CosineAnnealingLR": lambda s: Cosine(s.T_max, s.eta_min, periodic=True),
        "CosineAnnealingWarmRestarts": lambda s: CosineRestarts(s.T_0, s.T_mult, min_lr=s.eta_min),
        "OneCycleLR": lambda s: _one_cycle(s, s.optimizer.param_groups[group]),
    }
    return closed[name](scheduler) if name in closed else _replay(scheduler, total_steps, group)


def _constant(scheduler: Any) -> Schedule:
    # The factor is taken off when the count of steps comes to total_iters, which for 0 it never does.
    held = Constant(scheduler.factor, scheduler.total_iters or None)
    return held.then(Constant()) if scheduler.total_iters else held


def _multi_step(scheduler: Any) -> Schedule:
    """Milestones that no count of steps comes to change nothing."""
    milestones = sorted(m for m in scheduler.milestones.elements() if m >= 0 and m == int(m))
    return MultiStepDecay(list(map(int, milestones)), scheduler.gamma) if milestones else Constant()


def _linear(total_iters: int, start_factor: float, end_factor: float) -> Schedule:
    return Linear(total_iters, start_factor, end_factor) if total_iters else Constant(start_factor)


def _needed(scheduler: Any, total_steps: int | None) -> int:
    if total_steps is None:
        raise ValueError(
            f"total_steps must be given for a {type(scheduler).__name__} like this one, which is sampled, but got None"
        )
    return total_steps


def _sequence(scheduler: Any, total_steps: int | None, group: int) -> Schedule:
    parts, milestones = scheduler._schedulers, [0, *scheduler._milestones]
    # These go on from where the one before them stopped, or cannot begin anew.
    if any(type(part).__name__ in ("MultiplicativeLR", "ChainedScheduler", "SequentialLR") for part in parts):
        return _replay(scheduler, total_steps, group)
    lengths = [end - start for start, end in pairwise(milestones)]
    left = None if total_steps is None else max(total_steps - milestones[-1], 1)
    chain: Schedule | None = None
    for part, length in zip(parts, [*lengths, None], strict=True):
        if length == 0:  # two equal milestones, or one at 0: this part never runs
            continue
        own = _convert(part, length or left, group)
        own = own if length is None else own.for_steps(length)
        chain = own if chain is None else chain.then(own)
    assert chain is not None  # the last part has no end
    return chain


def _running_product(scheduler: Any, total_steps: int | None, group: int) -> Schedule:
    values = [1.0]
    for t in range(1, _needed(scheduler, total_steps)):
        values.append(values[-1] * scheduler.lr_lambdas[group](t))
    return Lambda(values.__getitem__, len(values))


def _plain(number: float) -> float:
    """A quotient without the noise in its last digit, so that 1/(1/25) is 25."""
    return float(f"{number:.15g}")


def _one_cycle(scheduler: Any, group: dict[str, Any]) -> Schedule:
    phases = scheduler._schedule_phases
    top, low, end = float(group["max_lr"]), float(group["initial_lr"]), float(group["min_lr"])
    momenta = {}
    if scheduler.cycle_momentum:
        momenta = {"base_momentum": group["base_momentum"], "max_momentum": group["max_momentum"]}
    return OneCycle(
        top,
        scheduler.total_steps,
        pct_start=_plain((phases[0]["end_step"] + 1) / scheduler.total_steps),
        anneal=scheduler._anneal_func_type,
        div_factor=_plain(top / low) if low else 25.0,
        final_div_factor=_plain(low / end) if end else 1e4,
        three_phase=len(phases) == 3,
        cycle_momentum=scheduler.cycle_momentum,
        **momenta,
    )


def _cyclic(scheduler: Any, group: int) -> Schedule | None:
    """The cycles, or None where they have a function of their own, step sizes that are no integers, or grow."""
    up = _plain(scheduler.total_size * scheduler.step_ratio)
    down = _plain(scheduler.total_size - up)
    if scheduler._scale_fn_custom is not None or not (up.is_integer() and down.is_integer()):
        return None
    if scheduler.mode == "exp_range" and not 0 < scheduler.gamma <= 1:
        return None
    momenta = {}
    if scheduler.cycle_momentum:
        momenta = {
            "base_momentum": scheduler.base_momentums[group],
            "max_momentum": scheduler.max_momentums[group],
        }
    return Cyclic(
        float(scheduler.base_lrs[group]),
        float(scheduler.max_lrs[group]),
        int(up),
        int(down),
        mode=scheduler.mode,
        gamma=scheduler.gamma,
        cycle_momentum=scheduler.cycle_momentum,
        **momenta,
    )


def _replay(scheduler: Any, total_steps: int | None, group: int) -> Schedule:
    """The values that a copy of the scheduler takes, stepped from its beginning over an optimizer of empty groups."""
    import torch

    n = _needed(scheduler, total_steps)
    real = scheduler.optimizer
    stand_in = torch.optim.SGD([{"params": [torch.zeros(1)]} for _ in real.param_groups], lr=1.0)
    stand_in.defaults.update(real.defaults)
    for mine, theirs in zip(stand_in.param_groups, real.param_groups, strict=True):
        mine.update({name: value for name, value in theirs.items() if name != "params"})
        mine["lr"] = mine["initial_lr"] = float(theirs.get("initial_lr", theirs["lr"]))
    base = stand_in.param_groups[group]["lr"]
    if not base > 0:
        raise ValueError(f"the lr of group {group} must be > 0 for its schedule to be sampled, but got {base!r}")
    twin = copy.deepcopy(scheduler, {id(real): stand_in})
    values = []
    with warnings.catch_warnings():
        # Of a scheduler that is stepped without its optimizer.
        warnings.simplefilter("ignore")
        _rewind(twin)
        for t in range(n):
            values.append(checks.number(f"the lr at step {t}", float(stand_in.param_groups[group]["lr"])) / base)
            if t + 1 < n:
                twin.step()
    return Table(values)


def _rewind(scheduler: Any) -> None:
    """Do again what constructing the scheduler did."""
    parts = getattr(scheduler, "_schedulers", None)
    if parts is None:
        scheduler.last_epoch = -1
        scheduler._initial_step()
        return
    for part in parts:
        _rewind(part)
    if hasattr(scheduler, "_milestones"):
        scheduler.last_epoch = 0
        for group in scheduler.optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        scheduler.recursive_undo()
        parts[bisect_right(scheduler._milestones, 0)]._initial_step()
