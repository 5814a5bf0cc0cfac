"""Leaves and banks: each parameter's record, and the flat buffers that hold the optimizer's state.

A *leaf* is what the optimizer knows of one parameter. A *bank* is one allocation of state for leaves of equal device,
dtype and state keys that got their first gradient in the same step: a flat buffer a slot, laid out as the parameters'
pieces are, and a float32 row of numbers a leaf: its step count, then what its rule carries. ``optimizer.state[p]``
holds views of the bank under torch's keys.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from .flat import SMALL, Home, aligned, dense_strides, is_dense, memory_view, own_view
from .rule import Rule

__all__ = ["Bank", "Leaf", "Mark", "adopt", "adopt_replaced", "check_entry", "ensure_state", "entry_views", "watched"]

# Between the starts of a bank's slots modulo a page. Streams at equal places within their pages compete for the same
# sets of the cache: an update that reads and writes four of them takes 4 to 12 % longer.
_STAGGER_BYTES = 9 * 128


class Leaf:
    """A parameter, where it lies, and where its state lies.

    ``flat`` is the parameter as one dimension in the order of its memory, or None where its strides leave gaps.
    """

    __slots__ = (
        "bank",
        "bank_index",
        "bank_start",
        "carried",
        "device",
        "dtype",
        "flat",
        "grad_dtype",
        "group",
        "home",
        "index",
        "laid",
        "numel",
        "param",
        "ptr",
        "shape",
        "slots",
        "step",
        "strides",
        "view",
    )

    def __init__(self, param: Tensor, index: int, group: int, home: Home | None) -> None:
        self.param = param
        self.index = index
        self.group = group
        self.home = home
        self.bank: Bank | None = None
        self.bank_index = 0
        self.bank_start = 0
        self.laid: tuple[Any, Any] | None = None
        self.slots: tuple[Tensor, ...] = ()
        self.step: Tensor | None = None
        self.carried: tuple[Tensor, ...] = ()
        self.grad_dtype = param.dtype  # of the gradients that the plan was made for
        self.locate()

    def locate(self) -> None:
        """Note where the parameter lies now; somebody may have replaced ``p.data`` since."""
        p = self.param
        self.ptr = p.data_ptr()
        self.shape = p.shape
        self.numel = p.numel()
        self.dtype = p.dtype
        self.device = p.device
        self.view = p.stride()
        self.strides = dense_strides(p)
        self.flat = memory_view(p.detach()) if is_dense(p) else None
        if self.home is not None:
            piece, start = self.home
            here = piece.data_ptr() + start * piece.element_size()
            if (self.ptr, self.device, self.dtype) != (here, piece.device, piece.dtype) or self.flat is None:
                self.home = None

    def moved(self) -> bool:
        """Whether the parameter lies elsewhere, or otherwise, than when it was located."""
        p = self.param
        now = (p.data_ptr(), p.shape, p.stride(), p.dtype, p.device)
        return now != (self.ptr, self.shape, self.view, self.dtype, self.device)

    def fits(self, rule: Rule) -> bool:
        """Whether the leaf's state is where and what the rule needs."""
        bank = self.bank
        if bank is None or self.laid != (self.shape, self.strides):  # state lies in the order of its parameter
            return False
        wanted = (rule.slots, rule.carried, self.device, self.dtype)
        return (bank.names, bank.carried_names, bank.device, bank.dtype) == wanted

    def drop_state(self) -> None:
        """Forget where the state lies."""
        self.bank, self.slots, self.step, self.carried = None, (), None, ()


class Bank:
    """One allocation of state, small tensors first, as the parameters lie in their pieces."""

    __slots__ = ("before", "carried_names", "device", "dtype", "leaves", "names", "numbers", "slots", "start", "steps")

    def __init__(self, rule: Rule, leaves: Sequence[Leaf]) -> None:
        first = leaves[0]
        total = sum(aligned(leaf.numel, leaf.dtype) for leaf in leaves)
        self.names = rule.slots
        self.carried_names = rule.carried
        self.start = rule.start or (0.0,) * len(self.names + self.carried_names)
        self.leaves = sorted(leaves, key=lambda leaf: leaf.numel > SMALL)
        self.device = first.device
        self.dtype = first.dtype
        shifts = [i * _STAGGER_BYTES // first.dtype.itemsize for i in range(1, 1 + len(self.names))]
        self.slots = tuple(
            torch.full((shift + total,), value, dtype=first.dtype, device=first.device)[shift:]
            for shift, value in zip(shifts, self.start, strict=False)
        )
        # float32, as torch keeps both. The kernels find a leaf's carried numbers behind its step.
        shape = (len(leaves), 1 + len(self.carried_names))
        self.numbers = torch.zeros(shape, dtype=torch.float32, device=first.device)
        self.steps = self.numbers[:, 0]
        for i, value in enumerate(self.start[len(self.names) :], start=1):
            self.numbers[:, i].fill_(value)
        self.before: list[Any] = []

    def move_in(self, state: MutableMapping[Tensor, Any]) -> None:
        """Give each leaf its part, with whatever state it had before, and put the views into ``state``."""
        start = 0
        for index, leaf in enumerate(self.leaves):
            entry = state.get(leaf.param) or {}
            self.before.append(state.get(leaf.param))
            leaf.bank, leaf.bank_index, leaf.bank_start = self, index, start
            leaf.laid = (leaf.shape, leaf.strides)
            leaf.slots = tuple(own_view(slot, start, leaf.numel, (leaf.numel,), (1,)) for slot in self.slots)
            width = self.numbers.shape[1]
            leaf.step, *carried = (own_view(self.numbers.view(-1), index * width + i, 1, (), ()) for i in range(width))
            leaf.carried = tuple(carried)
            if entry:
                adopt(leaf, entry)
            state[leaf.param] = {**entry, **entry_views(leaf)}
            start += aligned(leaf.numel, leaf.dtype)

    def move_out(self, state: MutableMapping[Tensor, Any]) -> None:
        """Undo ``move_in``: the step that asked for the state failed before it used it."""
        for leaf, entry in zip(self.leaves, self.before, strict=True):
            leaf.drop_state()
            if entry is None:
                del state[leaf.param]
            else:
                state[leaf.param] = entry


class Mark:
    """Set whenever somebody puts something else into the state that it watches."""

    __slots__ = ("set",)

    def __init__(self) -> None:
        self.set = False


class _Watched(dict[Any, Any]):
    """A dict that sets a mark when its keys or values are replaced; it is copied and pickled as a plain dict."""

    mark: Mark

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return dict, (dict(self),)


class _WatchedState(defaultdict[Tensor, Any]):
    """The same for ``optimizer.state``."""

    mark: Mark

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))


def _marking(cls: type[Any], name: str) -> None:
    method = getattr(cls, name)

    def marks(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.mark.set = True
        return method(self, *args, **kwargs)

    setattr(cls, name, functools.wraps(method)(marks))


for _cls in (_Watched, _WatchedState):
    for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
        _marking(_cls, _name)


def watched(state: MutableMapping[Tensor, Any], mark: Mark) -> MutableMapping[Tensor, Any]:
    """The optimizer's state as dicts that set the mark, which is cleared here.

    Without it, every step would have to look at each of some thousand entries for what somebody may have replaced.
    """
    if not isinstance(state, _WatchedState) or state.mark is not mark:
        entries = state
        state = _WatchedState(dict)
        state.mark = mark
        state.update(entries)
    for param, entry in state.items():
        if isinstance(entry, dict) and (not isinstance(entry, _Watched) or entry.mark is not mark):
            of_entry = _Watched(entry)
            of_entry.mark = mark
            state[param] = of_entry
    mark.set = False
    return state


def entry_views(leaf: Leaf) -> dict[str, Tensor]:
    """The leaf's state under torch's keys, as views of its bank."""
    assert leaf.bank is not None and leaf.step is not None
    slots = zip(leaf.bank.names, leaf.slots, strict=True)
    views = {"step": leaf.step, **dict(zip(leaf.bank.carried_names, leaf.carried, strict=True))}
    return {**views, **{name: slot.as_strided(leaf.shape, leaf.strides) for name, slot in slots}}


def adopt(leaf: Leaf, entry: MutableMapping[str, Any]) -> None:
    """Copy the values of a loaded or replaced state entry into the leaf's bank; what is missing is as at the start.

    The step starts anew where a rule has state and none came (SGD whose momentum was just switched on), and a buffer
    that came without a step has taken one (torch.optim.SGD saves none).
    """
    bank = leaf.bank
    assert bank is not None and leaf.step is not None
    came = False
    for name, slot, start in zip(bank.names, leaf.slots, bank.start, strict=False):
        value = entry.get(name)
        if value is None:
            slot.fill_(start)
            continue
        came = True
        if value.data_ptr() != slot.data_ptr():
            slot.as_strided(leaf.shape, leaf.strides).copy_(value)
    known = bool(came or not bank.names)
    _put(leaf.step, entry.get("step") if known else None, 1.0 if came else 0.0)
    for name, number, start in zip(bank.carried_names, leaf.carried, bank.start[len(bank.names) :], strict=True):
        _put(number, entry.get(name) if known else None, start)


def _put(number: Tensor, value: Any, otherwise: float) -> None:
    """Set one of a leaf's numbers to a loaded value."""
    if not isinstance(value, Tensor):
        number.fill_(otherwise if value is None else float(value))
    elif value.data_ptr() != number.data_ptr():
        number.copy_(value.reshape(()))


def adopt_replaced(leaves: Sequence[Leaf], rules: Sequence[Rule], state: MutableMapping[Tensor, Any]) -> None:
    """Bring replaced state into the banks; a parameter whose state was removed starts anew, as in torch."""
    changed = []
    for leaf in leaves:
        if leaf.bank is None or not leaf.fits(rules[leaf.group]):
            continue
        entry = state.get(leaf.param) or {}
        if any(not _is_view(entry.get(name), view) for name, view in entry_views(leaf).items()):
            check_entry(leaf, entry, rules[leaf.group])
            changed.append((leaf, entry))
    for leaf, entry in changed:
        adopt(leaf, entry)
        state[leaf.param] = {**entry, **entry_views(leaf)}


def _is_view(value: Any, view: Tensor) -> bool:
    """Whether a state entry still is the bank's own memory."""
    return isinstance(value, Tensor) and value.data_ptr() == view.data_ptr() and value.shape == view.shape


def check_entry(leaf: Leaf, entry: Any, rule: Rule) -> None:
    """Raise a ValueError that says what is wrong with a state entry, before anything is changed."""
    where = f"the state of parameter {leaf.index}"
    if not isinstance(entry, MutableMapping):
        keys = ("step", *rule.carried, *rule.slots)
        raise ValueError(f"{where} must be a dict with the keys {keys}, but got {type(entry).__name__}")
    for name in rule.slots:
        value = entry.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != leaf.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{where} has {name!r} of shape {got}, but the parameter has shape {tuple(leaf.shape)}; "
                "load a state_dict that was saved for the same parameters in the same order"
            )
    for name in ("step", *rule.carried):
        value = entry.get(name)
        if value is None or isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            continue
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where} has as {name!r} {got}, but a single number was expected")


def ensure_state(leaves: Sequence[Leaf], rules: Sequence[Rule], state: MutableMapping[Tensor, Any]) -> list[Bank]:
    """Give every leaf the state its group's rule asks for; the banks that were allocated for it.

    Every bank is allocated before any leaf moves in, so that running out of memory changes nothing.
    """
    buckets: dict[tuple[Any, ...], list[Leaf]] = {}
    for leaf in leaves:
        rule = rules[leaf.group]
        if not leaf.fits(rule):
            check_entry(leaf, state.get(leaf.param) or {}, rule)
            buckets.setdefault((leaf.device, leaf.dtype, rule.slots, rule.carried, rule.start), []).append(leaf)
    banks = [Bank(rules[bucket[0].group], bucket) for bucket in buckets.values()]
    for bank in banks:
        bank.move_in(state)
    return banks
