"""Leaves and banks: each parameter's record, and the flat buffers that hold the optimizer's state.

A *leaf* is what the optimizer knows of one parameter. A *bank* is one allocation of state for leaves of equal device,
dtype and state keys that got their first gradient in the same step: a flat buffer a slot, laid out as the parameters'
pieces are, and a float32 row of numbers a leaf: its step count, then what its rule carries. A precision adds a buffer
of scales a slot, and one of what completes the weights. ``optimizer.state[p]`` holds views of all under torch's keys.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import MutableMapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from . import codecs
from .conversion import check_stored, put_slot, put_weight
from .flat import SMALL, Home, aligned, beginning, dense_strides, is_dense, memory_view, own_view, spare
from .precision import GROUP, Precision, Storage, storage_of
from .rule import Rule

__all__ = ["Bank", "Leaf", "Mark", "adopt", "check_entry", "drop_replaced", "ensure_state", "entry_of", "set_apart",
           "stored_keys", "watched"]  # fmt: skip

# Between the starts of a bank's slots modulo a page. Streams at equal places within their pages compete for the same
# sets of the cache: an update that reads and writes four of them takes 4 to 12 % longer.
_STAGGER_BYTES = 9 * 128
# The same where slots are so large that they come from memory: streams that are a multiple of 32 MiB apart, or a few
# KiB more, compete for the same banks of the DRAM, and models whose sizes are powers of two would be. Four such streams
# take up to a third longer on one thread and an eighth on two, three up to 7 %.
_FAR_BYTES, _FAR_FROM = 1 << 16, 1 << 23


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
        "extra",
        "flat",
        "grad_dtype",
        "group",
        "home",
        "index",
        "laid",
        "numel",
        "param",
        "precision",
        "ptr",
        "scales",
        "shape",
        "slots",
        "step",
        "strides",
        "view",
    )

    def __init__(self, param: Tensor, index: int, group: int, home: Home | None, precision: Precision) -> None:
        self.param = param
        self.precision = precision
        self.index = index
        self.group = group
        self.home = home
        self.bank: Bank | None = None
        self.bank_index = 0
        self.bank_start = 0
        self.laid: tuple[Any, Any] | None = None
        self.slots: tuple[Tensor, ...] = ()
        self.scales: tuple[Tensor, ...] = ()
        self.extra: Tensor | None = None
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
        wanted = (rule.slots, rule.carried, self.device, self.dtype, self.storage(rule))
        return (bank.names, bank.carried_names, bank.device, bank.dtype, bank.storage) == wanted

    def storage(self, rule: Rule) -> Storage:
        """How the leaf's numbers are to be stored."""
        return storage_of(self.precision, self.dtype, bool(rule.slots))

    @property
    def key(self) -> int:
        """What tells its random bits from those of other tensors."""
        return codecs.tensor_key(self.precision.seed, self.index)

    def drop_state(self) -> None:
        """Forget where the state lies."""
        self.bank, self.slots, self.step, self.carried = None, (), None, ()
        self.scales, self.extra = (), None


class Bank:
    """One allocation of state, small tensors first, as the parameters lie in their pieces."""

    __slots__ = ("before", "carried_names", "device", "dtype", "extra", "leaves", "names", "numbers", "scales", "slots",
                 "start", "steps", "storage", "unsigned")  # fmt: skip

    def __init__(self, rule: Rule, leaves: Sequence[Leaf]) -> None:
        first = leaves[0]
        self.storage = first.storage(rule)
        total = sum(map(self._room, leaves))
        self.names = rule.slots
        self.carried_names = rule.carried
        self.start = rule.start or (0.0,) * len(self.names + self.carried_names)
        self.unsigned = rule.unsigned
        self.leaves = sorted(leaves, key=lambda leaf: leaf.numel > SMALL)
        self.device = first.device
        self.dtype = first.dtype
        dtypes = [self.slot_dtype(i) for i in range(len(self.names))]
        self.slots = tuple(
            self._buffer(total, dtype, i, 0.0 if self.storage.state == "int8" else value)
            for i, (value, dtype) in enumerate(zip(self.start, dtypes, strict=False), start=1)
        )
        quantised = self.names if self.storage.state == "int8" else ()
        self.scales = tuple(torch.zeros(total // GROUP, dtype=torch.float32, device=first.device) for _ in quantised)
        extra = self.storage.extra
        self.extra = self._buffer(total, extra[1], 1 + len(self.names)) if extra is not None else None
        # float32, as torch keeps both. The kernels find a leaf's carried numbers behind its step.
        shape = (len(leaves), 1 + len(self.carried_names))
        self.numbers = torch.zeros(shape, dtype=torch.float32, device=first.device)
        self.steps = self.numbers[:, 0]
        for i, value in enumerate(self.start[len(self.names) :], start=1):
            self.numbers[:, i].fill_(value)
        self.before: list[tuple[Any, dict[str, Any]]] = []  # each leaf's entry, and what was in it

    def slot_dtype(self, i: int) -> torch.dtype:
        """The dtype in which slot ``i`` is stored."""
        return torch.uint8 if self.storage.state == "int8" and self.unsigned[i] else self.storage.dtype

    def _buffer(self, total: int, dtype: torch.dtype, place: int, value: float = 0.0) -> Tensor:
        far = _FAR_BYTES if total * dtype.itemsize >= _FAR_FROM else 0
        shift = place * (_STAGGER_BYTES + far) // dtype.itemsize
        memory = torch.full((spare(dtype) + shift + total,), value, dtype=dtype, device=self.device)
        return beginning(memory, shift + total)[shift:]

    def _room(self, leaf: Leaf) -> int:
        """Elements from the start of a leaf to that of the next: whole groups of 8-bit state."""
        unit = GROUP if self.storage.state == "int8" else 1
        return -(-aligned(leaf.numel, leaf.dtype) // unit) * unit

    def move_in(self, state: MutableMapping[Tensor, Any]) -> None:
        """Give each leaf its part, with whatever state it had before, and put the views into ``state``."""
        start = 0
        holders = Counter(map(id, state.values()))
        for index, leaf in enumerate(self.leaves):
            held = state.get(leaf.param)
            entry = held or {}
            self.before.append((held, dict(entry)))
            leaf.bank, leaf.bank_index, leaf.bank_start = self, index, start
            leaf.laid = (leaf.shape, leaf.strides)
            leaf.slots = tuple(own_view(slot, start, leaf.numel, (leaf.numel,), (1,)) for slot in self.slots)
            groups = -(-leaf.numel // GROUP)
            leaf.scales = tuple(own_view(s, start // GROUP, groups, (groups,), (1,)) for s in self.scales)
            if self.extra is not None:
                leaf.extra = own_view(self.extra, start, leaf.numel, (leaf.numel,), (1,))
            width = self.numbers.shape[1]
            leaf.step, *carried = (own_view(self.numbers.view(-1), index * width + i, 1, (), ()) for i in range(width))
            leaf.carried = tuple(carried)
            if entry or not self.storage.plain:
                adopt(leaf, entry)
            views = entry_of(leaf, entry)
            if held and holders[id(held)] == 1:  # somebody may hold it
                held.clear()
                held.update(views)
            else:
                state[leaf.param] = views
            start += self._room(leaf)

    def move_out(self, state: MutableMapping[Tensor, Any]) -> None:
        """Undo ``move_in``: the step that asked for the state failed before it used it."""
        for leaf, (held, entry) in zip(self.leaves, self.before, strict=True):
            leaf.drop_state()
            if held is None:
                del state[leaf.param]
                continue
            held.clear()
            held.update(entry)
            state[leaf.param] = held


    def settle(self) -> None:
        """The state is in use: no need to keep what it was made of, nor the parameters, which may leave their group."""
        self.leaves, self.before = [], []

    def buffers(self) -> list[Tensor]:
        """All of the bank's memory."""
        return [*self.slots, *self.scales, self.numbers, *([] if self.extra is None else [self.extra])]


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

    def copy(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        return defaultdict(dict, self)

    __copy__ = copy  # type: ignore[assignment]


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
    bank = leaf.bank
    assert bank is not None and leaf.step is not None
    views = {"step": leaf.step, **dict(zip(bank.carried_names, leaf.carried, strict=True))}
    shaped = dict(zip(bank.names, leaf.slots, strict=True))
    extra = bank.storage.extra
    if extra is not None:
        assert leaf.extra is not None
        shaped[extra[0]] = leaf.extra
    views |= {name: flat.as_strided(leaf.shape, leaf.strides) for name, flat in shaped.items()}
    return views | {f"{name}_scale": scale for name, scale in zip(bank.names, leaf.scales, strict=False)}


def stored_keys(slots: Sequence[str]) -> list[str]:
    """The keys that torch.optim does not have: of what a storage keeps beside the slots."""
    return ["master", "param_low", *(f"{name}_scale" for name in slots)]


def entry_of(leaf: Leaf, entry: MutableMapping[str, Any]) -> dict[str, Any]:
    """The entry whose values the leaf has adopted: views of its bank, without what belonged to another storage."""
    assert leaf.bank is not None
    others = stored_keys(leaf.bank.names)
    return {name: value for name, value in entry.items() if name not in others} | entry_views(leaf)


def adopt(leaf: Leaf, entry: MutableMapping[str, Any]) -> None:
    """Copy the values of a loaded or replaced state entry into the leaf's bank; what is missing is as at the start.

    Values in another storage are converted through float32. The step starts anew where a rule has state and none came
    (SGD whose momentum was just switched on), and a buffer that came without a step has taken one (torch.optim.SGD
    saves none).
    """
    bank = leaf.bank
    assert bank is not None and leaf.step is not None
    came = False
    for i, name in enumerate(bank.names):
        value = entry.get(name)
        came = came or value is not None
        put_slot(leaf, i, name, entry)
    if bank.storage.extra is not None:
        put_weight(leaf, entry)
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


def drop_replaced(leaves: Sequence[Leaf], rules: Sequence[Rule], state: MutableMapping[Tensor, Any]) -> None:
    """Forget the state of leaves whose entries are no longer their bank's: it is made anew, from what is there now.

    The bank's memory stays as it is, for whoever has put the old entry aside, or elsewhere.
    """
    for leaf in leaves:
        if leaf.bank is None or not leaf.fits(rules[leaf.group]):
            continue
        entry = state.get(leaf.param)
        views = entry_views(leaf).items()
        if not isinstance(entry, MutableMapping) or any(not _is_view(entry.get(name), view) for name, view in views):
            leaf.drop_state()


def set_apart(leaves: Sequence[Leaf], rules: Sequence[Rule], state: MutableMapping[Tensor, Any]) -> None:
    """Copy what entries have of another leaf's state, or under another key: it would be written before it is read."""
    buffers = [b for bank in {leaf.bank for leaf in leaves if leaf.bank is not None} for b in bank.buffers()]
    spans = [(b.device, b.data_ptr(), b.data_ptr() + b.nbytes) for b in buffers]
    for leaf in leaves:
        rule, entry = rules[leaf.group], state.get(leaf.param) or {}
        own = entry_views(leaf) if leaf.bank is not None else {}
        for name in ("step", *rule.carried, *rule.slots, *stored_keys(rule.slots)):
            value = entry.get(name)
            if not isinstance(value, Tensor) or (name in own and _is_view(value, own[name])):
                continue
            if any(value.device == device and first <= value.data_ptr() < end for device, first, end in spans):
                entry[name] = value.clone()


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
    check_stored(leaf, entry, rule, where)
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
            if leaf.device.type == "meta":
                raise ValueError(
                    f"parameter {leaf.index} is on the meta device and has no memory that a step could write; give the "
                    "model memory (model.to_empty(device=...)) and values first"
                )
            check_entry(leaf, state.get(leaf.param) or {}, rule)
            key = (leaf.device, leaf.dtype, rule.slots, rule.carried, rule.start, leaf.storage(rule))
            buckets.setdefault(key, []).append(leaf)
    banks = [Bank(rules[bucket[0].group], bucket) for bucket in buckets.values()]
    for bank in banks:
        bank.move_in(state)
    return banks
