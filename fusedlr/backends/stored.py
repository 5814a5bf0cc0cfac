"""One step of arrays in any storage, by the reference: decode, the rule in float32, encode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import codecs
from ..precision import GROUP, Storage
from ..rule import Rule, Trust
from ..state import Leaf

__all__ = ["Arrays", "Place", "Step", "arrays_of", "decoded", "place_of", "places_of", "reference_update",
           "stored_update", "trust_terms", "wide"]  # fmt: skip


class Arrays(NamedTuple):
    """A flat parameter with its state, or a piece of both that begins at a whole group."""

    p: Tensor
    slots: Sequence[Tensor]
    scales: Sequence[Tensor]
    extra: Tensor | None

    def part(self, here: slice) -> Arrays:
        """A piece that begins at a whole group."""
        groups = slice(here.start // GROUP, -(-here.stop // GROUP))
        extra = None if self.extra is None else self.extra[here]
        return Arrays(self.p[here], [x[here] for x in self.slots], [x[groups] for x in self.scales], extra)

    def flatten(self) -> list[Tensor]:
        """All arrays in the order in which ``stored_update`` gives their new values."""
        state = [a for i, slot in enumerate(self.slots) for a in (slot, *self.scales[i : i + 1])]
        return [self.p, *([] if self.extra is None else [self.extra]), *state]


class Place(NamedTuple):
    """Where elements belong: the int32 keys of their tensors, and their numbers in them.

    Elements of one tensor have one key and follow each other from ``begin``; ``numbers`` are those of several tensors
    that are stepped as one, and ``inside`` is False between these.
    """

    key: Tensor
    begin: int = 0
    numbers: Tensor | None = None
    inside: Tensor | None = None

    def part(self, here: slice) -> Place:
        """The places of a piece."""
        if self.numbers is None or self.inside is None:
            return self._replace(begin=self.begin + here.start)
        return Place(self.key[here], 0, self.numbers[here], self.inside[here])

    def bits(self, taken: Tensor, like: Tensor) -> Tensor:
        """The random bits of as many elements as ``like`` has, in the step that makes ``taken``."""
        numbers = self.numbers
        if numbers is None:
            end = self.begin + like.numel()
            numbers = torch.arange(self.begin, end, dtype=torch.int64, device=like.device)
        return codecs.element_bits(codecs.step_key(self.key, taken), numbers)


class Step(NamedTuple):
    """What a step does to the elements of one group: the rule with its numbers, the clip, the steps taken."""

    rule: Rule
    h: Any
    limit: float
    maximize: bool
    taken: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _inputs(
    p: Tensor, g: Tensor, slots: Sequence[Tensor], factor: Any, limit: float, maximize: bool
) -> list[Tensor]:
    """What a reference rule is given: (p, g, *slots) in float32 (float64 for float64), g after the clip."""
    dtype = wide(p.dtype)
    if g.dtype != torch.float64:  # which may need its factor to come into the range of float32
        g = g.to(dtype)
    if isinstance(factor, Tensor) or factor != 1.0:
        g = g * factor
    if limit != math.inf:
        g = g.clamp(-limit, limit)
    # Asking first takes a tenth of the time of a conversion that is none.
    p, g, *state = [x if x.dtype == dtype else x.to(dtype) for x in (p, g, *slots)]
    return [p, -g if maximize else g, *state]


def reference_update(
    rule: Rule, p: Tensor, g: Tensor, slots: Sequence[Tensor], h: Any, factor: Any, limit: float, maximize: bool
) -> tuple[Tensor, ...]:
    """The reference rule with the clip before it, in float32 (float64 for float64): the new (p, *state), unrounded."""
    return rule.update(*_inputs(p, g, slots, factor, limit, maximize), h)


def trust_terms(
    trust: Trust, p: Tensor, g: Tensor, slots: Sequence[Tensor], h: Any, factor: Any, limit: float, maximize: bool
) -> tuple[Tensor, Tensor]:
    """What the trust ratio takes the norms of: the parameter and its direction, with the clip before it."""
    p, *rest = _inputs(p, g, slots[: len(trust.slots)], factor, limit, maximize)
    return p, trust.direction(p, *rest, h)


def arrays_of(leaf: Leaf, p: Tensor) -> Arrays:
    """The arrays of a leaf, its parameter given as one dimension."""
    return Arrays(p, leaf.slots, leaf.scales, leaf.extra)


def place_of(leaf: Leaf) -> Place:
    """The places of all elements of one leaf."""
    return Place(torch.full((), leaf.key, dtype=torch.int32, device=leaf.device))


def places_of(leaves: Sequence[Leaf], spans: Sequence[tuple[int, int]], numel: int) -> Place:
    """The places of leaves that lie side by side on the CPU, each at its (start, numel)."""
    key = torch.zeros(numel, dtype=torch.int32, device="cpu")
    numbers = torch.zeros(numel, dtype=torch.int64, device="cpu")
    inside = torch.zeros(numel, dtype=torch.bool, device="cpu")
    for leaf, (start, n) in zip(leaves, spans, strict=True):
        key[start : start + n] = leaf.key
        numbers[start : start + n] = torch.arange(n, device="cpu")
        inside[start : start + n] = True
    return Place(key, 0, numbers, inside)


def decoded(storage: Storage, arrays: Arrays) -> list[Tensor]:
    """(weight, *state) in float32, or as they are where they are stored plainly."""
    if storage.plain:
        return [arrays.p, *arrays.slots]
    w = codecs.load_weight(arrays.p, arrays.extra, storage.weights)
    scales = arrays.scales or (None,) * len(arrays.slots)
    return [w, *(codecs.load_state(slot, scale) for slot, scale in zip(arrays.slots, scales, strict=True))]


def stored_update(
    storage: Storage, arrays: Arrays, g: Tensor, factor: Any, step: Step, place: Place
) -> list[Tensor]:
    """The new values of ``arrays.flatten()``, rounded as they are stored, or as copying rounds."""
    rule, h, limit, maximize, taken = step
    if storage.plain:
        return list(reference_update(rule, arrays.p, g, arrays.slots, h, factor, limit, maximize))
    w, *state = decoded(storage, arrays)
    w, *state = reference_update(rule, w, g, state, h, factor, limit, maximize)
    noise = place.bits(taken, w) if storage.noisy else None
    if place.inside is not None and storage.state == "int8":
        state = [torch.where(place.inside, x, 0.0) for x in state]
    out = list(codecs.store_weight(w, arrays.p.dtype, storage.weights, noise))
    for i, (x, unsigned) in enumerate(zip(state, rule.unsigned, strict=True)):
        out += codecs.store_state(x, storage, i, unsigned, noise)
    return out
