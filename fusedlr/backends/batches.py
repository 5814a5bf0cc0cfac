"""What one operator of the CPU backend treats: batches of tensors, and calls cut into rounds that fit into the cache.

A *batch* is one tensor, or small neighbours of one group that lie side by side and are stepped as one from a gathered
gradient. A *call* holds the batches of one group that have taken equally many steps. Its *rounds* are what one operator
call treats: everything at once where the gradients can be read where they lie, else as much as the scratch holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..flat import SMALL
from ..gather import in_order
from ..precision import GROUP
from ..rule import Rule
from ..state import Leaf
from .norms import ROW, rows_of
from .stored import Place, place_of, places_of, wide

__all__ = ["CHUNK", "ROUND", "Batch", "Call", "Round", "calls_of", "norms_of", "pieces"]

# Elements of a clipped piece of a large tensor, and of scratch that is filled before the operator that reads it is
# called: they stay in the last cache. Shorter pieces cost more in calls and in started streams than they save.
CHUNK = ROUND = 1 << 20
# Elements of the longest batch of small tensors.
LONGEST = 1 << 19
# Elements of gathered gradients that are kept from the norm to the update, instead of being gathered again.
KEPT = 1 << 20
# Fewer elements than this are put together by a plain loop of copies, more by what is slower for small tensors.
_PLAIN_CAT = 1 << 15


def pieces(x: Tensor, size: int = CHUNK) -> Sequence[Tensor]:
    """A flat tensor in pieces of at most ``size`` elements."""
    return x.split(size) if x.numel() > size else (x,)


class Batch:
    """One leaf, or small neighbours; ``param`` is None where the only leaf has strides that leave gaps."""

    __slots__ = ("_others", "_padded", "_place", "_runs", "_take_runs", "_targets", "alone", "dtype", "extra",
                 "gathered", "leaves", "norms", "numel", "ordered", "param", "positions", "rows", "scales", "slots",
                 "spans", "storage", "whole")  # fmt: skip

    def __init__(self, positions: list[int], leaves: list[Leaf]) -> None:
        first = leaves[0]
        self.positions = positions
        self.leaves = leaves
        self.alone = len(leaves) == 1
        self.spans = [(leaf.bank_start - first.bank_start, leaf.numel) for leaf in leaves]
        self.numel = sum(self.spans[-1])
        self.ordered = False
        # Of gathered gradients: another than the parameters' is not rounded to a narrow one, and float64 stays: it may
        # need its clip factor to come into the parameters' range.
        kept = first.grad_dtype in (first.dtype, torch.float64)
        self.dtype = first.grad_dtype if kept else wide(first.dtype)
        self.gathered: Tensor | None = None  # where the gradients are kept from the norm to the update ...
        self.whole = self.rows = torch.empty(0)  # ... the same without what fills up its last row, and as rows
        self.norms = torch.empty(0)  # where the norms of the rows go
        self._place: Place | None = None
        assert first.bank is not None
        self.storage = first.bank.storage
        if self.alone:
            self.param, self.slots, self.scales, self.extra = first.flat, first.slots, first.scales, first.extra
            return
        assert first.home is not None
        self.param = first.home.piece[first.home.start : first.home.start + self.numel]
        here = slice(first.bank_start, first.bank_start + self.numel)
        groups = slice(here.start // GROUP, -(-here.stop // GROUP))
        self.slots = tuple(slot[here] for slot in first.bank.slots)
        self.scales = tuple(scale[groups] for scale in first.bank.scales)
        self.extra = None if first.bank.extra is None else first.bank.extra[here]
        self._padded = sum(n for _, n in self.spans) < self.numel
        self._runs = self._find_runs()
        joined = {i for run in self._runs for i in run}
        self._others = [i for i in range(len(leaves)) if i not in joined]
        self._take_runs = [itemgetter(*(positions[i] for i in run)) for run in self._runs]

    def _find_runs(self) -> list[list[int]]:
        """Vectors with no padding between them: their gradients are put together by one operator a run."""
        runs: list[list[int]] = []
        for i, (leaf, (start, n)) in enumerate(zip(self.leaves, self.spans, strict=True)):
            if leaf.param.ndim != 1:
                continue
            run = runs[-1] if runs and runs[-1][-1] == i - 1 else []
            if run and sum(self.spans[run[-1]]) == start and start + n - self.spans[run[0]][0] < _PLAIN_CAT:
                run.append(i)
            else:
                runs.append([i])
        return [run for run in runs if len(run) > 1]

    def keep(self) -> None:
        """Make the memory where the gradients are kept: whole rows, so that one operator finds the norms of all."""
        self.gathered = torch.zeros(rows_of(self.numel) * ROW, dtype=self.dtype, device="cpu")
        self.whole = self.gathered[: self.numel]
        self.rows = self.gathered.view(-1, ROW)
        self._targets = self._targets_in(self.whole)

    def clear(self) -> None:
        """Zeros between the gradients again, where a factor that is not finite has made them NaN."""
        if self.gathered is not None:
            self.gathered.zero_()

    def place(self) -> Place:
        """To which tensors the elements belong; kept where there are several, which are small."""
        if self.alone:
            return place_of(self.leaves[0])
        if self._place is None:
            self._place = places_of(self.leaves, self.spans, self.numel)
        return self._place

    def gradient(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradient of the only leaf, in the order of ``param``."""
        g, leaf = grads[self.positions[0]], self.leaves[0]
        return g.as_strided((self.numel,), (1,)) if self.ordered else in_order(g, leaf)

    def _targets_in(self, out: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Where in ``out`` the gradients of the runs go, and those of the other leaves."""
        runs = [out[self.spans[run[0]][0] : sum(self.spans[run[-1]])] for run in self._runs]
        others = [(self.leaves[i], out[self.spans[i][0] : sum(self.spans[i])]) for i in self._others]
        return runs, [part.as_strided(leaf.shape, leaf.strides) for leaf, part in others]

    def gather(self, grads: Sequence[Tensor], scratch: Tensor) -> Tensor:
        """The gradients of all leaves in the order of ``param``, zeros between them: where they are kept, or here."""
        if self.gathered is not None:
            out, (runs, others) = self.whole, self._targets
        else:
            out = scratch[: self.numel]
            runs, others = self._targets_in(out)
            if self._padded:
                out.zero_()  # others have used it; where gradients are kept, the zeros between them stay
        for take, run in zip(self._take_runs, runs, strict=True):
            torch.cat(take(grads), out=run)
        if others:
            torch._foreach_copy_(others, [grads[self.positions[i]] for i in self._others])
        return out


class Piece(NamedTuple):
    """A part of a batch in a round: elements ``start`` to ``stop``, and a place for their gradient if needed."""

    batch: Batch
    start: int
    stop: int
    scratch: Tensor | None


class Round(NamedTuple):
    """What one operator call treats."""

    params: list[Tensor]
    slots: list[list[Tensor]]
    pieces: list[Piece]
    gathered: bool = False  # whether all gradients are copies, which may be written


class Call:
    """Batches of one group, dtype, dtype of the gradients and count of steps."""

    __slots__ = ("_bytes", "_numbers", "_rounds", "_seen", "_taken", "batches", "converts", "group", "has_gaps",
                 "has_operator", "leaf", "rule")  # fmt: skip

    def __init__(self, rule: Rule, batches: list[Batch]) -> None:
        self.rule = rule
        self.batches = batches
        self.leaf = batches[0].leaves[0]
        self.group = self.leaf.group
        self._numbers = list(_spans([leaf for batch in batches for leaf in batch.leaves]))
        self._bytes = [span.data.cast("B") for span in self._numbers]
        self._seen: list[bytes] = []  # the numbers as they were when they were last known to be ...
        self._taken: list[float] | None = None  # ... these for all leaves
        self._rounds: dict[bool, list[Round]] = {}
        self.has_gaps = any(batch.param is None for batch in batches)
        # Whether the operator needs its gradients in another dtype than they have.
        self.converts = self.leaf.grad_dtype != self.leaf.dtype
        # Whether PyTorch has an operator of its own for this rule and dtype.
        known = rule.aten is not None and self.leaf.dtype in (torch.float32, torch.float64)
        self.has_operator = known and batches[0].storage.plain

    def numbers(self) -> list[float] | None:
        """Steps taken, and what the rule carries, the same for all leaves; None where they have come to differ."""
        if list(map(memoryview.tobytes, self._bytes)) != self._seen:
            self._look()
        return self._taken

    def _look(self) -> None:
        first = self._numbers[0][0]
        self._taken = first.tolist() if all((span == first).all() for span in self._numbers) else None
        self._seen = [span.tobytes() for span in self._bytes]

    def count(self, h: Any) -> None:
        """One step more; the row begins with the new values of what the rule carries."""
        assert self._taken is not None
        step, *carried = self._taken
        new = array("f", (step + 1.0, *(h[: len(carried)] if carried else ())))
        # Equal they were, and equal they become: as bytes, which takes a tenth of the time of arithmetic on arrays.
        self._taken = new.tolist()
        self._seen = [new.tobytes() * len(span) for span in self._numbers]
        for span, now in zip(self._bytes, self._seen, strict=True):
            span[:] = now

    def rounds(self, clipped: bool, scratch: Tensor) -> list[Round]:
        """The rounds, where every gradient is to be scaled or converted, or where none is."""
        if clipped not in self._rounds:
            self._rounds[clipped] = list(_rounds(self.batches, clipped, scratch))
        return self._rounds[clipped]


def _rounds(batches: Sequence[Batch], clipped: bool, scratch: Tensor) -> Iterator[Round]:
    names = len(batches[0].slots)
    current, used = Round([], [[] for _ in range(names)], []), 0

    def finished() -> Round:
        return current._replace(gathered=not any(piece.batch.alone for piece in current.pieces))

    for batch in batches:
        if batch.param is None:
            continue
        size = CHUNK if batch.alone and clipped else batch.numel
        for start in range(0, batch.numel, max(1, size)):
            stop = min(start + size, batch.numel)
            # What is gathered and kept is scaled where it is; all other scaled gradients need a scratch.
            needs = stop - start if (clipped if batch.alone else batch.gathered is None) else 0
            if used + needs > ROUND:
                yield finished()
                current, used = Round([], [[] for _ in range(names)], []), 0
            whole = stop - start == batch.numel
            current.params.append(batch.param if whole else batch.param[start:stop])
            for held, slot in zip(current.slots, batch.slots, strict=True):
                held.append(slot if whole else slot[start:stop])
            current.pieces.append(Piece(batch, start, stop, scratch[used : used + needs] if needs else None))
            used += needs
    if current.pieces:
        yield finished()


def calls_of(leaves: Sequence[Leaf], rules: Sequence[Rule]) -> list[Call]:
    """The batches and calls of the leaves, in the order of the groups, which ``rules`` has one each of."""
    numbers = {id(leaf.bank): list(map(tuple, leaf.bank.numbers.tolist())) for leaf in leaves if leaf.bank is not None}
    taken = [numbers[id(leaf.bank)][leaf.bank_index] for leaf in leaves]
    banks = {key: i for i, key in enumerate(numbers)}

    # Small tensors in the order of their memory; the others, which may overlap, in the order of the parameters.
    def place(i: int) -> tuple[bool, int, int]:
        leaf = leaves[i]
        return (False, banks[id(leaf.bank)], leaf.bank_index) if _may_join(leaf) else (True, 0, i)

    runs: list[list[int]] = []
    for i in sorted(range(len(leaves)), key=place):
        last = runs[-1] if runs else [i]
        if runs and taken[last[-1]] == taken[i] and _continues(leaves[last[0]], leaves[last[-1]], leaves[i]):
            last.append(i)
        else:
            runs.append([i])
    kept = 0
    parts: dict[tuple[Any, ...], list[Batch]] = {}
    for run in runs:
        batch = Batch(run, [leaves[i] for i in run])
        if len(run) > 1 and kept + batch.numel <= KEPT:
            kept += batch.numel
            batch.keep()
        leaf = batch.leaves[0]
        parts.setdefault((leaf.group, leaf.dtype, leaf.grad_dtype, taken[run[0]]), []).append(batch)
    return [Call(rules[key[0]], batches) for key, batches in sorted(parts.items(), key=lambda item: item[0][0])]


def norms_of(batches: Sequence[Batch]) -> list[memoryview]:
    """Give each batch its part of where the norms of rows go: one stretch of memory for each dtype that they have."""
    parts: dict[torch.dtype, list[Batch]] = {}
    for batch in batches:
        dtype = batch.leaves[0].grad_dtype if batch.alone else batch.dtype
        parts.setdefault(wide(dtype), []).append(batch)
    views = []
    for dtype, mine in parts.items():
        norms = torch.zeros(sum(rows_of(batch.numel) for batch in mine), dtype=dtype, device="cpu")
        start = 0
        for batch in mine:
            stop = start + rows_of(batch.numel)
            batch.norms = norms[start:stop]
            start = stop
        views.append(norms.numpy().data)
    return views


def _may_join(leaf: Leaf) -> bool:
    return leaf.home is not None and leaf.numel <= SMALL


def _continues(first: Leaf, last: Leaf, leaf: Leaf) -> bool:
    """Whether a leaf lies behind the last of a run, in parameters and in state, and belongs to the same group."""
    if not (_may_join(last) and _may_join(leaf)):
        return False
    assert first.home is not None and leaf.home is not None
    if leaf.bank is not last.bank or leaf.bank_index != last.bank_index + 1:
        return False
    if (leaf.group, leaf.grad_dtype) != (last.group, last.grad_dtype):
        return False
    if leaf.home.piece is not last.home.piece:  # type: ignore[union-attr]
        return False
    if leaf.home.start - first.home.start != leaf.bank_start - first.bank_start:
        return False
    return leaf.bank_start + leaf.numel - first.bank_start <= LONGEST


def _spans(leaves: Sequence[Leaf]) -> Iterator[np.ndarray[Any, Any]]:
    """The leaves' numbers as few slices of their banks, as arrays over the same memory."""
    places: dict[int, list[int]] = {}
    banks = {}
    for leaf in leaves:
        assert leaf.bank is not None
        banks[id(leaf.bank)] = leaf.bank
        places.setdefault(id(leaf.bank), []).append(leaf.bank_index)
    for key, indices in places.items():
        indices.sort()
        numbers = banks[key].numbers.numpy()
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        for part in np.split(np.array(indices), breaks):
            yield numbers[part[0] : part[-1] + 1]
