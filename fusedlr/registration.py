"""Registration: what an optimizer notes of its param groups and their parameters before it steps them.

``param_groups`` is an open list of open dicts: frameworks move parameters between groups, and replace groups and lists.
So every step asks whether the groups are those that it knows (``is_current``), and takes note of them again if not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any

from . import capture, live
from .clipping.fixed import as_clip
from .flat import rehome
from .groups import GROUP_KEY, as_schedules, check_parameters, own_tensors, scheduled_scalars
from .precision import Precision
from .schedules import Schedule
from .state import Leaf

if TYPE_CHECKING:
    from torch import Tensor

    from .optimizer import FusedOptimizer

__all__ = ["bind_groups", "check_group", "prepare_group", "refresh", "register"]

_params = itemgetter("params")
_schedule = itemgetter("schedule")


def check_group(optimizer: FusedOptimizer, group: Mapping[str, Any]) -> None:
    """Raise an error for a param group that cannot be stepped as asked."""
    _check_shared(optimizer, group)
    if group.get("differentiable"):
        raise ValueError("differentiable=True is not possible here; use the optimizer of torch.optim")
    given = {k: v for k, v in {**optimizer.defaults, **group}.items() if k in optimizer.defaults}
    optimizer._checked(given)


def _check_shared(optimizer: FusedOptimizer, group: Mapping[str, Any]) -> None:
    """Raise an error for a param group with another value of what is one for the optimizer."""
    _check_clip(optimizer, group)
    nonfinite = group.get("nonfinite", optimizer._nonfinite)
    if nonfinite != optimizer._nonfinite:
        raise _another("nonfinite", nonfinite, optimizer._nonfinite)
    own = optimizer._precision
    precision = group.get("precision", own) or Precision()
    # The optimizer's seed is that of the checkpoint that was loaded.
    if not isinstance(precision, Precision) or replace(precision, seed=own.seed) != own:
        raise _another("precision", precision, own)


def _check_clip(optimizer: FusedOptimizer, group: Mapping[str, Any]) -> None:
    """The same for what a step looks at."""
    clip = as_clip(group.get("clip", optimizer._clip))
    if clip != optimizer._clip:
        raise _another("clip", clip, optimizer._clip)
    if group.get("norm_group") is not None:
        raise ValueError(f"norm_group must be None in this version of fusedlr, but got {group['norm_group']!r}")


def _another(name: str, value: Any, own: Any) -> ValueError:
    return ValueError(
        f"a param group has {name}={value!r}, but the optimizer has {name}={own!r}: {name} is one for the optimizer; "
        "pass it to the constructor only"
    )


def prepare_group(optimizer: FusedOptimizer, index: int) -> None:
    """Give a checked group what fusedlr keeps in it."""
    _check_once([p for group in optimizer.param_groups for p in group["params"]])
    group = optimizer.param_groups[index]
    rule = optimizer._rule(group)
    check_parameters(group["params"], rule, optimizer._precision, optimizer._clip, type(optimizer).__name__)
    group["clip"] = optimizer._clip
    marks = group.setdefault(GROUP_KEY, {})
    marks.setdefault("base", {})
    marks.setdefault("written", {})
    schedules = as_schedules(group["schedule"], rule.scalars, optimizer._clip)
    scheduled_scalars(group, schedules, index)


def is_current(optimizer: FusedOptimizer) -> bool:
    """Whether the groups, what is in them and their parameters are those that were registered."""
    groups = optimizer.param_groups
    lists = list(map(_params, groups))
    if list(map(len, lists)) != optimizer._sizes:
        return False
    return all(map(is_, chain(groups, *_objects(groups), *lists), optimizer._registered))


def refresh(optimizer: FusedOptimizer) -> None:
    """Take note of what somebody has done to the groups by hand, if anything."""
    if not is_current(optimizer):
        register(optimizer)


def _objects(groups: Sequence[dict[str, Any]]) -> tuple[Iterator[Any], ...]:
    """What a step takes from the groups as objects; what it takes as numbers it reads anew."""
    return map(_schedule, groups), map(dict.get, groups, repeat("clip")), map(dict.get, groups, repeat("norm_group"))


def register(optimizer: FusedOptimizer) -> None:
    """Take note of all groups and parameters; move into flat buffers those that are new and can be moved."""
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    capture.check_registered(dict.fromkeys(p.device for p in params))
    _check_once(params)
    for i, group in enumerate(groups):
        if GROUP_KEY not in group:  # somebody has put it there by hand
            check_group(optimizer, group)
            for name, value in optimizer.defaults.items():
                group.setdefault(name, value)
            prepare_group(optimizer, i)
        elif any(group[GROUP_KEY] is marks for marks in optimizer._marks):
            _check_clip(optimizer, group)
        else:  # somebody has put a checkpoint there, whose clip is that of another run
            group["clip"] = optimizer._clip
    known = {id(leaf.param): leaf for leaf in optimizer._leaves}
    homes = rehome(p for p in params if id(p) not in known) if optimizer._flatten else {}
    leaves: list[Leaf] = []
    for g, group in enumerate(groups):
        for p in group["params"]:
            leaf = known.get(id(p)) or Leaf(p, 0, g, homes.get(id(p)), optimizer._precision)
            leaf.index, leaf.group = len(leaves), g
            leaves.append(leaf)
    optimizer._leaves = leaves
    optimizer._params = params
    optimizer._plan = None
    bind_groups(optimizer)
    optimizer._sizes = [len(group["params"]) for group in groups]


def _check_once(params: Sequence[Tensor]) -> None:
    """Raise an error for a parameter that is there twice: it would have to be stepped twice, from one state."""
    first: dict[int, int] = {}
    for i, p in enumerate(params):
        if first.setdefault(id(p), i) != i:
            raise ValueError(
                f"parameters {first[id(p)]} and {i} (shape {tuple(p.shape)}) are the same one, which torch.optim would "
                "step twice in every step; give each parameter once: list(dict.fromkeys(parameters))"
            )


def bind_groups(optimizer: FusedOptimizer) -> None:
    """Bind the schedules to the group dicts, which loading a checkpoint replaces."""
    groups = optimizer.param_groups
    given = [as_schedules(group["schedule"], optimizer._rule(group).scalars, optimizer._clip) for group in groups]
    max_norm = _max_norm_schedule(optimizer, given)
    own_tensors(groups, given, optimizer.defaults)
    before, n = optimizer._schedules, len(groups)
    schedules = [scheduled_scalars(group, given[i], i, n) for i, group in enumerate(groups)]
    live.carry(before, schedules)
    optimizer._schedules = schedules
    optimizer._max_norm_schedule = max_norm
    optimizer._timed = live.timed(schedules)
    optimizer._marks = [group[GROUP_KEY] for group in groups]
    optimizer._registered = [*groups, *chain(*_objects(groups)), *optimizer._params]


def _max_norm_schedule(optimizer: FusedOptimizer, given: Sequence[Mapping[str, Schedule]]) -> Schedule | None:
    """What drives the clip's max_norm: one schedule, as there is one clip."""
    found = [schedules["max_norm"] for schedules in given if "max_norm" in schedules]
    if not found:
        return None
    first, *others = found
    if any(other != first for other in others):
        raise ValueError(
            f"schedule['max_norm'] must be the same in every param group that has one, as the clip is one for the "
            f"optimizer, but got {list(dict.fromkeys(map(repr, found)))}; pass it to the constructor only"
        )
    assert optimizer._clip is not None
    first.rows(optimizer._clip.numbers[0])  # one that it cannot drive is an error now, not at the first step
    return first
