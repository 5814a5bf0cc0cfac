"""Checkpoints: what state_dict() adds to torch's, how it comes back, and how an optimizer is copied and pickled.

torch's distributed checkpoints keep nothing but ``state`` and ``param_groups``, and rebuild a group from the keys the
live group has. So fusedlr's own data, all of it plain, lives in every group under the key ``fusedlr``: the clock ``t``,
the skipped steps, the marks of what fusedlr wrote, and (in the first group alone) what the clip remembers of the norms.
Schedules and clipping come from the code that builds the optimizer, not from a checkpoint, which holds their ``repr``
for the reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .conversion import full_slot, full_weight
from .groups import GROUP_KEY, as_schedules, read
from .live import Metered, plain
from .precision import Precision, check_precision
from .registration import bind_groups, refresh, register
from .schedules import Schedule
from .state import Bank, adopt, check_entry, ensure_state, entry_of, set_apart, stored_keys

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

__all__ = ["begin", "full_precision", "is_hidden_step", "own_state", "restore", "revive", "save",
           "steps_brought", "take_own_state"]  # fmt: skip

# What the code that builds an optimizer gives. precision is in a group where somebody has put it there.
_CODE_KEYS = ("schedule", "clip", "norm_group", "precision")
_OWN = "_fusedlr"


def sync_clock(optimizer: FusedOptimizer) -> tuple[int, int]:
    """(t, skipped steps); where a device may have skipped steps, or replayed them from a graph, this waits for it."""
    if not (optimizer._may_skip or optimizer._captured) or not optimizer._clocks:
        return optimizer._t, optimizer._skipped_before
    t, skipped, _ = next(iter(optimizer._clocks.values())).tolist()
    optimizer._t = t
    return t, skipped


def save(optimizer: FusedOptimizer, state_dict: dict[str, Any], format: str) -> dict[str, Any]:
    """torch's state_dict with fusedlr's data as plain data; in the format "torch", with torch's state alone."""
    if format not in ("fusedlr", "torch"):
        raise ValueError(f"format must be 'fusedlr' or 'torch', but got {format!r}")
    t, skipped = sync_clock(optimizer)
    statistics = optimizer._records.save()
    steps = _largest_step(optimizer)
    state = state_dict["state"]
    state_dict["state"] = {key: dict(entry) if isinstance(entry, dict) else entry for key, entry in state.items()}
    for group in state_dict["param_groups"]:
        marks = group[GROUP_KEY]
        group[GROUP_KEY] = {
            "t": t,
            "skipped_steps": skipped,
            "steps": steps,
            # Once is enough: AutoClip may remember thousands of norms.
            "clip_statistics": statistics if group is state_dict["param_groups"][0] else [],
            "base": dict(marks["base"]),
            "written": dict(marks["written"]),
            **_live(marks),
        }
        if optimizer._precision != Precision():
            group[GROUP_KEY]["seed"] = optimizer._precision.seed
        group.update({key: repr(group[key]) for key in _CODE_KEYS if group.get(key) is not None})
    _leave_out(optimizer, state_dict, format)
    return state_dict if format == "fusedlr" else _as_torch(optimizer, state_dict)


def _leave_out(optimizer: FusedOptimizer, state_dict: dict[str, Any], format: str) -> None:
    """Leave out what torch would misread where the first step was skipped: torch has no state then.

    In our own format that is the buffer alone, for which torch's SGD would dampen the first gradient.
    """
    state, leaves = state_dict["state"], iter(optimizer._leaves)
    steps = {id(bank): bank.steps.tolist() for bank in _banks(optimizer)}
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        rule = optimizer._rule(group)
        for key, leaf in zip(saved["params"], leaves, strict=False):
            entry = state.get(key)
            if rule.start or not entry or leaf.bank is None or steps[id(leaf.bank)][leaf.bank_index]:
                continue
            if entry.get("step") is None or float(entry["step"]) or any(_holds(entry.get(name)) for name in rule.slots):
                continue  # somebody has put it there
            if format == "torch":
                del state[key]
            elif group.get("dampening"):
                entry.pop("momentum_buffer", None)


def _holds(slot: Any) -> bool:
    return isinstance(slot, Tensor) and bool(slot.any())


def _live(marks: Mapping[str, Any]) -> dict[str, Any]:
    """The state of what a group's schedules follow beside the steps, where they follow something."""
    return {"live": {name: plain(state) for name, state in marks["live"].items()}} if "live" in marks else {}


def begin(optimizer: Any, state_dict: Mapping[str, Any]) -> None:
    """Check a checkpoint that is about to be loaded, and remember it as it is: torch hands on what it has cast."""
    groups = state_dict.get("param_groups")
    if groups is None or _sizes(optimizer.param_groups) == _sizes(groups):  # else torch is about to refuse it
        refresh(optimizer)
        check(optimizer, state_dict)
    optimizer._loading = state_dict


def _sizes(groups: Any) -> list[int]:
    return [len(group.get("params", ())) for group in groups]


def check(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise a ValueError where a checkpoint cannot be loaded, before anything is changed."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"a state_dict needs the keys 'state' and 'param_groups', but got {sorted(state_dict)}")
    for i, saved in enumerate(state_dict["param_groups"]):
        marks = saved.get(GROUP_KEY, {"base": {}, "written": {}})
        if not isinstance(marks, Mapping) or not all(isinstance(marks.get(k), Mapping) for k in ("base", "written")):
            raise ValueError(
                f"param group {i} of the state_dict has {marks!r} under {GROUP_KEY!r}, but a dict with the keys 'base' "
                "and 'written' was expected, as fusedlr saves it; without that key, the group is read as torch.optim's"
            )
        for name in ("t", "skipped_steps", "steps"):
            count = marks.get(name, 0)
            if isinstance(count, bool) or not hasattr(count, "__index__") or not 0 <= index(count) < 2**62:
                raise ValueError(
                    f"param group {i} of the state_dict has {name}={count!r} under {GROUP_KEY!r}, but a count of steps "
                    "was expected, an integer >= 0; the checkpoint is damaged"
                )
    optimizer._records.check(_statistics(state_dict))
    leaves = iter(optimizer._leaves)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        # The saved flags will rule, and with them other state may be needed.
        flags = {key: value for key, value in saved.items() if key not in _CODE_KEYS}
        rule = optimizer._rule({**group, **flags})
        schedules = as_schedules(group["schedule"], rule.scalars, optimizer._clip)
        _check_bases(schedules, {**group, **flags}, group[GROUP_KEY])
        for key, leaf in zip(saved["params"], leaves, strict=False):
            check_precision(optimizer._precision, leaf.dtype, rule)
            if key in state_dict["state"]:
                check_entry(leaf, state_dict["state"][key], rule)


def _check_bases(schedules: Mapping[str, Schedule], group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise a ValueError where a schedule cannot begin with what a loaded group begins with."""
    bases = {**own["base"], **group[GROUP_KEY]["base"], "lr": group.get("initial_lr")}
    for name, schedule in schedules.items():
        if bases.get(name) is not None:
            schedule.rows(float(bases[name]))


def _statistics(state_dict: Mapping[str, Any]) -> Any:
    """What the clip remembered, from the group that has it."""
    found = (group.get(GROUP_KEY, {}).get("clip_statistics") for group in state_dict["param_groups"])
    return next((statistics for statistics in found if statistics), [])


def restore(optimizer: FusedOptimizer, groups_before: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """After torch's load_state_dict: own keys back, the clock, and the loaded state into the flat buffers."""
    stepped = _steps_elsewhere(optimizer, state_dict)
    saved: Mapping[str, Any] = {}
    for group, before in zip(optimizer.param_groups, groups_before, strict=True):
        for key in _CODE_KEYS:
            group.pop(key, None)
        group["clip"] = optimizer._clip
        for key, value in before.items():
            # A checkpoint of torch.optim has none of fusedlr's keys. It has an initial_lr only under a scheduler, and
            # where there is none here either, the next one begins with the loaded lr.
            if key not in group and (key != "initial_lr" or "lr" in before[GROUP_KEY]["base"]):
                group[key] = value
        marks = group[GROUP_KEY]
        if "t" in marks:
            saved = marks
        group[GROUP_KEY] = {"base": dict(marks["base"]), "written": dict(marks["written"]), **_live(marks)}
        if marks is before[GROUP_KEY] or stepped:
            # What torch used last is not somebody's override.
            written = group[GROUP_KEY]["written"]
            written.update({name: float(value) for name, value in read(group, *written).items()})
    _uncast(optimizer, state_dict)
    if "seed" in saved:
        use_precision(optimizer, replace(optimizer._precision, seed=int(saved["seed"])))
    _take_in(optimizer)
    optimizer._t = int(saved["t"]) + stepped if "t" in saved else _largest_step(optimizer)
    optimizer._last_lr = []
    optimizer._skipped_before = int(saved.get("skipped_steps", 0))
    for clock in optimizer._clocks.values():
        clock[:2].copy_(clock.new_tensor([optimizer._t, optimizer._skipped_before]))
    if optimizer._replayed is not None:
        optimizer._replayed.forget()
    optimizer._records.load(_statistics(state_dict))
    bind_groups(optimizer)


def _uncast(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """State as it was saved: torch's loader casts it to the parameter's dtype, integers and carried numbers too."""
    leaves = iter(optimizer._leaves)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        rule = optimizer._rule(group)
        names = (*rule.carried, *rule.slots, *stored_keys(rule.slots))
        for key, leaf in zip(saved["params"], leaves, strict=False):
            entry = state_dict["state"].get(key, {})
            for name in names:
                if name in entry:
                    optimizer.state[leaf.param][name] = entry[name]


def _as_torch(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with torch's keys alone in its state, in numbers that torch.optim can step."""
    leaves = iter(optimizer._leaves)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        rule = optimizer._rule(group)
        own = stored_keys(rule.slots)
        for key, _ in zip(saved["params"], leaves, strict=False):
            entry = state_dict["state"].get(key, {})
            numbers = {name: full_slot(entry, name) for name in rule.slots if entry.get(name) is not None}
            if entry:
                kept = {name: value for name, value in entry.items() if name not in own}
                state_dict["state"][key] = kept | numbers
    return state_dict


def full_precision(optimizer: FusedOptimizer) -> dict[Tensor, Tensor]:
    """The float32 weight of every parameter, in the order of the groups."""
    return {leaf.param: full_weight(leaf.param, optimizer.state.get(leaf.param) or {}) for leaf in optimizer._leaves}


def use_precision(optimizer: FusedOptimizer, precision: Precision) -> None:
    """Store what comes in this precision from now on."""
    optimizer._precision = precision
    for leaf in optimizer._leaves:
        leaf.precision = precision


def _take_in(optimizer: FusedOptimizer) -> None:
    """Copy loaded state into the banks, which keep their addresses where they exist."""
    rules = [optimizer._rule(group) for group in optimizer.param_groups]
    set_apart(optimizer._leaves, rules, optimizer.state)
    new = []
    for leaf in optimizer._leaves:
        entry = optimizer.state.get(leaf.param) or {}
        if leaf.fits(rules[leaf.group]) and entry:
            adopt(leaf, entry)
            optimizer.state[leaf.param] = entry_of(leaf, entry)
        else:
            leaf.drop_state()
            if entry:
                new.append(leaf)
            else:
                optimizer.state.pop(leaf.param, None)
    for bank in ensure_state(new, rules, optimizer.state):
        bank.settle()
    optimizer._plan = None
    optimizer._watch_state()


def _largest_step(optimizer: FusedOptimizer) -> int:
    return _largest(_banks(optimizer))


def _banks(optimizer: FusedOptimizer) -> set[Bank]:
    return {leaf.bank for leaf in optimizer._leaves if leaf.bank is not None}


def _largest(banks: Iterable[Bank]) -> int:
    return max((int(bank.steps.max().item()) for bank in banks), default=0)


def steps_brought(new: Sequence[Bank]) -> int:
    """The largest step of state that somebody had put beside the parameters, as torch's ZeRO loads it.

    Where no step was taken here, that is where the clock begins, as with a checkpoint of torch's.
    """
    return _largest(bank for bank in new if any(entry for _, entry in bank.before))


def _steps_elsewhere(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> int:
    """Steps that torch.optim has taken since fusedlr saved the state: torch keeps the keys of others as they were."""
    marks: Mapping[str, Any] = next((group.get(GROUP_KEY, {}) for group in state_dict["param_groups"]), {})
    if "steps" not in marks:
        return 0
    entries = [entry for entry in state_dict["state"].values() if isinstance(entry, Mapping)]
    steps = [entry["step"] for entry in entries if entry.get("step") is not None]
    # A state_dict that was not copied goes on counting with whoever made it, who may have been this optimizer.
    mine = {leaf.step.data_ptr() for leaf in optimizer._leaves if leaf.step is not None}
    is_live = any(isinstance(step, Tensor) and step.data_ptr() in mine for step in steps)
    own = max(0, sync_clock(optimizer)[0] - int(marks["t"])) if is_live else 0
    return max(0, int(max(map(float, steps), default=0.0)) - int(marks["steps"]) - own)


def is_hidden_step(optimizer: FusedOptimizer, banks: Sequence[Bank]) -> bool:
    """Whether this is the first step ever, with every lr 0, and those that have a schedule overridden.

    torch.distributed.checkpoint creates an optimizer's state by such a step; the clock does not count it. Without
    any schedule it cannot be told from a warm-up of the user's own that begins at 0, and nothing reads the clock.
    """
    if optimizer._t or not banks:
        return False
    lrs = [s for scheduled in optimizer._schedules for s in scheduled if s.name == "lr"]
    if not lrs or not all(s.overridden() for s in lrs):
        return False
    values = [group["lr"] for group in optimizer.param_groups]
    return not any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in values) and not any(values)


def own_state(optimizer: FusedOptimizer) -> dict[str, Any]:
    """What copying and pickling must keep beside torch's defaults, state and param groups."""
    t, skipped = sync_clock(optimizer)
    for s in (s for scheduled in optimizer._schedules for s in scheduled):
        if isinstance(s.live, Metered):
            s.live.settle()
    own = {
        "clip": optimizer._clip,
        "precision": optimizer._precision,
        "nonfinite": optimizer._nonfinite,
        "flatten": optimizer._flatten,
        "backend": optimizer._backend,
        "grad_divisor": optimizer._grad_divisor,
        "fold_grad_scale": optimizer._step_supports_amp_scaling,
        "t": t,
        "skipped": skipped,
        "statistics": optimizer._records.save(),
        "last_lr": [lr.clone() if isinstance(lr, Tensor) else lr for lr in optimizer._last_lr],
    }
    return {_OWN: own}


def take_own_state(state: dict[str, Any]) -> dict[str, Any] | None:
    """Take what ``own_state`` made out of a pickled dict; None where torch's load_state_dict calls."""
    own: dict[str, Any] | None = state.pop(_OWN, None)
    return own


def revive(optimizer: FusedOptimizer, own: Mapping[str, Any]) -> None:
    """Rebuild a copied or unpickled optimizer around its own parameters."""
    optimizer._clip = own["clip"]
    optimizer._precision = own["precision"]
    optimizer._nonfinite = own["nonfinite"]
    optimizer._flatten = own["flatten"]
    optimizer._backend = own["backend"]
    optimizer.grad_divisor = own["grad_divisor"]
    optimizer.fold_grad_scale = own["fold_grad_scale"]
    optimizer._reset()
    optimizer._t = own["t"]
    optimizer._skipped_before = own["skipped"]
    optimizer._last_lr = own["last_lr"]
    optimizer._records.load(own["statistics"])
    register(optimizer)
    _take_in(optimizer)
