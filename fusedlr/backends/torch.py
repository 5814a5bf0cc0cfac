"""The PyTorch backend on the CPU: ATen's fused operators, or the reference rules, over cache-sized chunks.

Small neighbouring tensors are stepped together: their gradients are gathered into a scratch of one chunk, their
parameters and state lie side by side already. A large tensor is stepped chunk by chunk straight from its gradient;
where the clip factor is not 1, the scaled chunk goes through a scratch that stays in the cache. Gradients are never
written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gather import in_order
from ..rule import Rule
from ..state import Bank, Leaf
from . import Executor, Knobs
from .norms import combine, euclidean, piece_sum

__all__ = ["HostExecutor", "reference_update"]

# Elements of a piece of a large tensor, and of the largest tensor whose gradient is gathered.
CHUNK = 1 << 18
SMALL = 1 << 13
# Elements of clipped gradients that are made before the operator that reads them is called: they stay in the cache.
ROUND = 1 << 19
# Elements of gathered gradients that are kept from the norm to the update, instead of gathered again.
KEPT = 1 << 19

_flatten = torch._C._nn.flatten_dense_tensors


def reference_update(
    rule: Rule, p: Tensor, g: Tensor, slots: Sequence[Tensor], h: Any, factor: Any, limit: float, maximize: bool
) -> tuple[Tensor, ...]:
    """The reference rule with the clip before it, in float32 (float64 for float64): the new (p, *state), unrounded."""
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    g = g.to(wide)
    if isinstance(factor, Tensor) or factor != 1.0:
        g = g * factor
    if limit != math.inf:
        g = g.clamp(-limit, limit)
    return rule.update(p.to(wide), -g if maximize else g, *[slot.to(wide) for slot in slots], h)


def pieces(x: Tensor) -> Sequence[Tensor]:
    """A flat tensor in pieces of CHUNK."""
    return x.split(CHUNK) if x.numel() > CHUNK else (x,)


def split(p: Tensor, slots: Sequence[Tensor]) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """A flat parameter and its state, piece by piece."""
    params = pieces(p)
    return list(zip(params, zip(*map(pieces, slots), strict=True) if slots else [()] * len(params), strict=True))


class Batch:
    """Leaves that are stepped together: one tensor, or small neighbours of one group whose gradients are gathered."""

    __slots__ = ("chunks", "first", "leaves", "numel", "ordered", "pads", "param", "plain", "slots", "spans")

    def __init__(self, first: int, leaves: list[Leaf]) -> None:
        self.first = first
        self.leaves = leaves
        origin = leaves[0].bank_start
        self.spans = [(leaf.bank_start - origin, leaf.numel) for leaf in leaves]
        self.numel = self.spans[-1][0] + self.spans[-1][1]
        home, bank = leaves[0].home, leaves[0].bank
        if len(leaves) == 1:
            self.param, self.slots = leaves[0].flat, leaves[0].slots
        else:
            assert home is not None and bank is not None
            self.param = home.piece[home.start : home.start + self.numel]
            self.slots = tuple(slot[origin : origin + self.numel] for slot in bank.slots)
        self.chunks = split(self.param, self.slots) if self.param is not None else []
        # What follows each gradient up to where the next one starts.
        starts = [start for start, _ in self.spans[1:]]
        gaps = [stop - start - numel for (start, numel), stop in zip(self.spans, starts, strict=False)]
        self.pads = [torch.zeros(gap, dtype=leaves[0].dtype) if gap else None for gap in gaps]
        # Contiguous parameters are gathered from whatever strides their gradients have.
        self.plain = all(leaf.param.is_contiguous() for leaf in leaves)
        self.ordered = False

    def gradient(self, grads: Sequence[Tensor]) -> Tensor:
        """The gradients in the order of ``param``: a fresh scratch, or a view of the only gradient."""
        if len(self.leaves) == 1:
            g = grads[self.first]
            return g.as_strided((self.numel,), (1,)) if self.ordered else in_order(g, self.leaves[0])
        mine: list[Tensor] = list(grads[self.first : self.first + len(self.leaves)])
        if not self.plain:
            mine = [in_order(g, leaf) for g, leaf in zip(mine, self.leaves, strict=True)]
        if any(pad is not None for pad in self.pads):
            padded = [mine[0]]
            for pad, g in zip(self.pads, mine[1:], strict=True):
                padded += [g] if pad is None else [pad, g]
            mine = padded
        return _flatten(mine)


class HostExecutor(Executor):
    """Steps tensors on the CPU."""

    def __init__(self, leaves: list[Leaf], positions: list[int] | None) -> None:
        super().__init__(leaves, positions)
        self._rules: list[Rule] = []
        self._batches: list[Batch] = []
        self._banks: list[Bank] = []
        self._step_spans: list[Tensor] = []
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._ordered: Sequence[bool] = ()
        self._pairs: list[list[tuple[float, float]]] = []
        self._kept: dict[int, Tensor] = {}
        self._factors: list[float] | None = None
        self._skip = False

    def prepare(self, rules: list[Rule]) -> None:
        self._rules = rules
        self._banks = list({id(leaf.bank): leaf.bank for leaf in self.leaves if leaf.bank is not None}.values())
        self._step_spans = list(_step_spans(self.leaves))
        self._make_batches()

    def _make_batches(self) -> None:
        steps = self._steps()
        runs: list[list[Leaf]] = []
        for leaf in self.leaves:
            if runs and _continues(runs[-1], leaf, self._rules, steps):
                runs[-1].append(leaf)
            else:
                runs.append([leaf])
        self._batches, first = [], 0
        for run in runs:
            self._batches.append(Batch(first, run))
            first += len(run)
        self._set_order()

    def layout(self, ordered: Sequence[bool]) -> None:
        self._ordered = ordered
        self._set_order()

    def _set_order(self) -> None:
        for batch in self._batches:
            stop = batch.first + len(batch.leaves)
            batch.ordered = bool(self._ordered) and all(self._ordered[batch.first : stop])

    def _steps(self) -> dict[int, list[tuple[float, ...]]]:
        """The numbers of the leaves, bank by bank: steps taken, and what the rule carries."""
        return {id(bank): list(map(tuple, bank.numbers.tolist())) for bank in self._banks}

    # ---- measure and decide ------------------------------------------------------------------------------------

    def measure(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        self._pairs, self._kept = [], {}
        p = knobs.norm_type
        if knobs.scope == "tensor":
            for batch in self._batches:
                g = batch.gradient(grads)
                self._pairs += [[piece_sum(x, p) for x in pieces(g[start : start + n])] for start, n in batch.spans]
            return
        total = euclidean(self._gathered(grads, keep=True)) if p == 2.0 else None
        if total is None:
            total_pairs = [piece_sum(x, p) for g in self._gathered(grads, keep=False) for x in pieces(g)]
        else:
            total_pairs = [(1.0, total)]
        self._pairs = [total_pairs]

    def _gathered(self, grads: Sequence[Tensor], keep: bool) -> Iterator[Tensor]:
        """The gradients batch by batch; the first gathered ones are kept for the update."""
        kept = 0
        for i, batch in enumerate(self._batches):
            g = batch.gradient(grads)
            if keep and len(batch.leaves) > 1:
                kept += batch.numel
                if kept <= KEPT:
                    self._kept[i] = g
            yield g

    def decide(self, knobs: Knobs) -> bool:
        self._factors, self._skip = None, False
        if not knobs.measures:
            self._count(knobs, skipped=False)
            return False
        norm = combine((pair for pairs in self._pairs for pair in pairs), knobs.norm_type)
        if knobs.nonfinite != "propagate" and not math.isfinite(norm):
            if knobs.nonfinite == "raise":
                raise FloatingPointError(
                    f"the gradients hold an inf or NaN (norm {norm}), and nonfinite='raise'; nothing was changed"
                )
            self._skip = True
        elif knobs.scope is not None:
            assert knobs.clip is not None and knobs.clip.factor is not None
            max_norm, eps, _ = knobs.clip_numbers
            norms = [norm] if knobs.scope == "global" else [combine(p, knobs.norm_type) for p in self._pairs]
            self._factors = [knobs.clip.factor(n, max_norm, eps) for n in norms]
        if knobs.grad_norm is not None:
            knobs.grad_norm.fill_(norm)
        self._count(knobs, self._skip)
        return self._skip

    def _count(self, knobs: Knobs, skipped: bool) -> None:
        if knobs.nonfinite == "skip":
            clock = knobs.clock(self.leaves[0].device)
            clock[int(skipped)] += 1 if skipped else int(knobs.advance)

    # ---- apply -------------------------------------------------------------------------------------------------

    def apply(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        if self._skip:
            return
        steps = self._steps()
        if any(len(set(values)) > 1 for values in steps.values()) and not self._equal_steps(steps):
            self._make_batches()
            self._kept = {}
        for span in self._step_spans:
            span.add_(1)
        limit = knobs.clip_numbers[2]
        scalars = [{k: float(v) for k, v in values.items()} for values in knobs.scalars]
        rows: dict[tuple[float, ...], Any] = {}
        calls = _Calls(self._rules, scalars, knobs.maximize, limit, self._scratch)
        position = 0
        for i, batch in enumerate(self._batches):
            leaf = batch.leaves[0]
            rule, group = self._rules[leaf.group], leaf.group
            taken, *carried = steps[id(leaf.bank)][leaf.bank_index]
            step = taken + 1
            factors = self._factors_of(position, len(batch.leaves))
            position += len(batch.leaves)
            g = self._kept.pop(i, None)
            if g is None:
                g = batch.gradient(grads)
            if len(factors) > 1:
                # Each tensor by its own norm: the gathered gradients are a scratch and may be scaled in place, 16-bit
                # ones in float32, or they would be rounded once more.
                g = g.float() if g.dtype in (torch.bfloat16, torch.float16) else g
                for (start, numel), f in zip(batch.spans, factors, strict=True):
                    g[start : start + numel].mul_(f)
                factors = [1.0]
            dense = None if batch.param is not None else in_order(leaf.param.detach(), leaf)
            chunks = batch.chunks if dense is None else split(dense, batch.slots)
            aten = rule.aten is not None and leaf.dtype in (torch.float32, torch.float64)
            key = (group, step, *carried)
            if not aten and key not in rows:
                rows[key] = rule.row(step, *carried, **scalars[group])
            if carried:
                assert leaf.bank is not None and not aten
                mine = slice(leaf.bank_index, leaf.bank_index + len(batch.leaves))
                leaf.bank.numbers[mine, 1:] = torch.tensor(rows[key][: len(carried)], dtype=torch.float32)
            if aten:
                clipped = factors[0] != 1.0 or limit != math.inf
                if not clipped and dense is None:
                    calls.add(leaf, step, batch.param, g, batch.slots, 1.0)
                else:
                    for (p, slots), gc in zip(chunks, pieces(g), strict=True):
                        calls.add(leaf, step, p, gc, slots, factors[0])
            else:
                h = rows[key]
                for (p, slots), gc in zip(chunks, pieces(g), strict=True):
                    new = reference_update(rule, p, gc, slots, h, factors[0], limit, knobs.maximize[group])
                    for old, value in zip((p, *slots), new, strict=True):
                        old.copy_(value)
            if dense is not None:  # the parameter's strides leave gaps: it is stepped in a dense copy
                calls.flush()
                leaf.param.copy_(dense.as_strided(leaf.shape, leaf.strides))
        calls.flush()

    def _factors_of(self, position: int, count: int) -> list[float]:
        """The clip factor of a batch, or those of its leaves where each tensor has its own."""
        if self._factors is None:
            return [1.0]
        return self._factors if len(self._factors) == 1 else self._factors[position : position + count]

    def _equal_steps(self, steps: dict[int, list[tuple[float, ...]]]) -> bool:
        """Whether the leaves of every batch still have taken equally many steps, and carry the same."""
        return all(
            len({steps[id(leaf.bank)][leaf.bank_index] for leaf in batch.leaves}) == 1 for batch in self._batches
        )


class _Calls:
    """Calls of ATen's operators in the making: the tensors of one group and step go into one call."""

    __slots__ = ("_clipped", "_limit", "_lists", "_maximize", "_rules", "_scalars", "_scratch", "_used")

    def __init__(
        self,
        rules: list[Rule],
        scalars: list[dict[str, float]],
        maximize: list[bool],
        limit: float,
        scratch: dict[torch.dtype, Tensor],
    ) -> None:
        self._rules = rules
        self._scalars = scalars
        self._maximize = maximize
        self._limit = limit
        self._scratch = scratch
        self._used = 0
        self._lists: dict[tuple[int, float], _Lists] = {}
        self._clipped = 0

    def add(
        self, leaf: Leaf, step: float, p: Tensor | None, g: Tensor, slots: Sequence[Tensor], factor: float
    ) -> None:
        """Put a piece into the call of its group and step."""
        assert p is not None
        if factor != 1.0 or self._limit != math.inf:
            if self._clipped + g.numel() > ROUND:
                self.flush()
            self._clipped += g.numel()
        lists = self._lists.get((leaf.group, step))
        if lists is None:
            lists = self._lists[leaf.group, step] = _Lists(leaf, [], [], [], [])
        lists.params.append(p)
        lists.grads.append(g)
        lists.slots.append(slots)
        lists.factors.append(factor)

    def flush(self) -> None:
        """Clip and make the calls; the scratch is free again."""
        for (group, _), lists in self._lists.items():
            aten = self._rules[group].aten
            assert aten is not None and lists.leaf.step is not None
            grads = [self._clip(g, f) for g, f in zip(lists.grads, lists.factors, strict=True)]
            state = [list(slot) for slot in zip(*lists.slots, strict=True)]
            aten(lists.params, grads, state, lists.leaf.step, self._scalars[group], self._maximize[group])
        self._lists.clear()
        self._clipped = 0
        self._used = 0

    def _clip(self, g: Tensor, factor: float) -> Tensor:
        """The clipped piece, in the scratch: gradients are never written."""
        if factor == 1.0 and self._limit == math.inf:
            return g
        scratch = self._scratch.get(g.dtype)
        if scratch is None:
            scratch = self._scratch[g.dtype] = torch.empty(ROUND, dtype=g.dtype)
        start = self._used
        self._used += g.numel()
        out = scratch[start : self._used]
        g = torch.mul(g, factor, out=out) if factor != 1.0 else g
        return g if self._limit == math.inf else torch.clamp(g, -self._limit, self._limit, out=out)


class _Lists(NamedTuple):
    leaf: Leaf
    params: list[Tensor]
    grads: list[Tensor]
    slots: list[Sequence[Tensor]]
    factors: list[float]


def _continues(run: list[Leaf], leaf: Leaf, rules: list[Rule], steps: dict[int, list[tuple[float, ...]]]) -> bool:
    """Whether a leaf lies next to the last of a run, in parameters and in state, and is stepped by the same numbers."""
    last = run[-1]
    if last.home is None or leaf.home is None or last.numel > SMALL or leaf.numel > SMALL:
        return False
    bank = leaf.bank
    if bank is None or bank is not last.bank or leaf.bank_index != last.bank_index + 1 or leaf.group != last.group:
        return False
    if leaf.home.piece is not last.home.piece:
        return False
    if leaf.home.start - run[0].home.start != leaf.bank_start - run[0].bank_start:  # type: ignore[union-attr]
        return False
    taken = steps[id(bank)]
    if taken[leaf.bank_index] != taken[last.bank_index]:
        return False
    return leaf.bank_start + leaf.numel - run[0].bank_start <= CHUNK


def _step_spans(leaves: Sequence[Leaf]) -> Iterator[Tensor]:
    """The leaves' step counts as few slices of their banks."""
    start = 0
    for i, leaf in enumerate(leaves):
        after = leaves[i + 1] if i + 1 < len(leaves) else None
        if after is None or after.bank is not leaf.bank or after.bank_index != leaf.bank_index + 1:
            assert leaf.bank is not None
            yield leaf.bank.steps[leaves[start].bank_index : leaf.bank_index + 1]
            start = i + 1
