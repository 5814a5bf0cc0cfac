"""The PyTorch backend on the CPU: ATen's fused operators, or the reference rules, over cache-sized chunks.

Small neighbouring tensors are stepped together: their gradients are gathered into a scratch of one chunk, their
parameters and state lie side by side already. A large tensor is stepped chunk by chunk straight from its gradient;
where the clip factor is not 1, the scaled chunk goes through a scratch that stays in the cache. Gradients are never
written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..gather import in_order
from ..rule import Rule
from ..state import Bank, Leaf
from . import Executor, Knobs
from .norms import combine, piece_sum

__all__ = ["HostExecutor", "reference_update"]

# Elements of a chunk (float32 AdamW: 4 MiB of parameter, gradient and moments), and of the largest tensor gathered.
CHUNK = 1 << 18
SMALL = 1 << 16

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


class Batch:
    """Leaves that are stepped together: one tensor, or small neighbours of one group whose gradients are gathered."""

    __slots__ = ("first", "leaves", "numel", "ordered", "pads", "param", "plain", "slots", "spans")

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

    def writable(self, g: Tensor) -> bool:
        """Whether a gradient from ``gradient`` is a scratch."""
        return len(self.leaves) > 1 or not self.ordered


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

    def _steps(self) -> dict[int, list[float]]:
        return {id(bank): bank.steps.tolist() for bank in self._banks}

    # ---- measure and decide ------------------------------------------------------------------------------------

    def measure(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        each_tensor = knobs.scope == "tensor"
        self._pairs, self._kept = [], {}
        for i, batch in enumerate(self._batches):
            g = batch.gradient(grads)
            spans = batch.spans if each_tensor else [(0, batch.numel)]
            for start, numel in spans:
                pieces = g[start : start + numel].split(CHUNK) if numel != g.numel() or numel > CHUNK else (g,)
                self._pairs.append([piece_sum(piece, knobs.norm_type) for piece in pieces])
            if len(batch.leaves) > 1 and len(self._batches) == 1:
                self._kept[i] = g  # a model of small tensors is gathered once, for the norm and the update

    def decide(self, knobs: Knobs) -> bool:
        self._factors, self._skip = None, False
        if not knobs.measures:
            self._count(knobs, skipped=False)
            return False
        norm = combine((pair for pairs in self._pairs for pair in pairs), knobs.norm_type)
        if knobs.nonfinite != "propagate" and not math.isfinite(norm):
            if knobs.nonfinite == "raise":
                raise FloatingPointError(
                    f"the gradients hold an inf or NaN (their norm is {norm}), and nonfinite='raise'; nothing was changed"
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
        for span in self._step_spans:
            span.add_(1)
        limit = knobs.clip_numbers[2]
        scalars = [{k: float(v) for k, v in values.items()} for values in knobs.scalars]
        rows: dict[tuple[int, float], Any] = {}
        whole: dict[tuple[int, float], tuple[Tensor, list[Tensor], list[Tensor], list[tuple[Tensor, ...]]]] = {}
        leaf_at = 0
        for i, batch in enumerate(self._batches):
            leaf = batch.leaves[0]
            rule, group = self._rules[leaf.group], leaf.group
            step = steps[id(leaf.bank)][leaf.bank_index] + 1
            factors = self._factors_of(batch, leaf_at)
            leaf_at += len(batch.leaves)
            aten = rule.aten is not None and leaf.dtype in (torch.float32, torch.float64)
            p = batch.param if batch.param is not None else in_order(leaf.param.detach(), leaf)
            g = self._kept.pop(i, None)
            g = batch.gradient(grads) if g is None else g
            if aten and limit == math.inf and all(f == 1.0 for f in factors):
                assert leaf.step is not None
                key = (group, step)
                if key not in whole:
                    whole[key] = (leaf.step, [], [], [])
                whole[key][1].append(p)
                whole[key][2].append(g)
                whole[key][3].append(batch.slots)
                if batch.param is None:  # stepped in a dense copy, which must be written back right away
                    self._flush(whole.pop(key), rule, scalars[group], knobs.maximize[group])
                    leaf.param.copy_(p.as_strided(leaf.shape, leaf.strides))
                elif len(batch.leaves) > 1:  # let go of the scratch before the next is gathered
                    self._flush(whole.pop(key), rule, scalars[group], knobs.maximize[group])
                continue
            if not aten and (group, step) not in rows:
                rows[group, step] = rule.row(step, **scalars[group])
            h = None if aten else rows[group, step]
            self._update(batch, p, g, factors, limit, h, rule, scalars[group], knobs.maximize[group])
            if batch.param is None:
                leaf.param.copy_(p.as_strided(leaf.shape, leaf.strides))
        for (group, _), lists in whole.items():
            self._flush(lists, self._rules[group], scalars[group], knobs.maximize[group])

    def _factors_of(self, batch: Batch, leaf_at: int) -> list[float]:
        if self._factors is None:
            return [1.0]
        if len(self._factors) == 1:
            return self._factors
        return self._factors[leaf_at : leaf_at + len(batch.leaves)]

    def _flush(
        self,
        lists: tuple[Tensor, list[Tensor], list[Tensor], list[tuple[Tensor, ...]]],
        rule: Rule,
        scalars: Mapping[str, Any],
        maximize: bool,
    ) -> None:
        """One call of ATen's operator for the tensors whose gradients it may read as they are."""
        step, params, grads, slots = lists
        assert rule.aten is not None
        rule.aten(params, grads, [list(slot) for slot in zip(*slots, strict=True)], step, scalars, maximize)

    def _update(
        self,
        batch: Batch,
        p: Tensor,
        g: Tensor,
        factors: list[float],
        limit: float,
        h: Any,
        rule: Rule,
        scalars: Mapping[str, Any],
        maximize: bool,
    ) -> None:
        """Clip and step one batch, chunk by chunk."""
        factor = factors[0]
        if len(factors) > 1:
            # Each tensor by its own norm: the gathered gradients are a scratch and may be scaled in place.
            for (start, numel), f in zip(batch.spans, factors, strict=True):
                if f != 1.0:
                    g[start : start + numel].mul_(f)
            factor = 1.0
        step = batch.leaves[0].step
        assert step is not None
        slot_chunks = [slot.split(CHUNK) for slot in batch.slots]
        for i, (pc, gc) in enumerate(zip(p.split(CHUNK), g.split(CHUNK), strict=True)):
            slots = [chunks[i] for chunks in slot_chunks]
            if rule.aten is not None and h is None:
                gc = self._clipped(gc, factor, limit, batch.writable(g))
                rule.aten([pc], [gc], [[slot] for slot in slots], step, scalars, maximize)
            else:
                new = reference_update(rule, pc, gc, slots, h, factor, limit, maximize)
                for old, value in zip((pc, *slots), new, strict=True):
                    old.copy_(value)

    def _clipped(self, g: Tensor, factor: float, limit: float, writable: bool) -> Tensor:
        """The clipped chunk, in a scratch: gradients are never written."""
        if factor == 1.0 and limit == math.inf:
            return g
        if not writable:
            if g.dtype not in self._scratch:
                self._scratch[g.dtype] = torch.empty(CHUNK, dtype=g.dtype)
            out = self._scratch[g.dtype][: g.numel()]
        else:
            out = g
        if factor != 1.0:
            g = torch.mul(g, factor, out=out)
        return g if limit == math.inf else torch.clamp(g, -limit, limit, out=out)

    def _equal_steps(self, steps: dict[int, list[float]]) -> bool:
        """Whether the leaves of every batch still have taken equally many steps."""
        return all(
            len({steps[id(leaf.bank)][leaf.bank_index] for leaf in batch.leaves}) == 1 for batch in self._batches
        )


def _continues(run: list[Leaf], leaf: Leaf, rules: list[Rule], steps: dict[int, list[float]]) -> bool:
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
    return taken[leaf.bank_index] == taken[last.bank_index] and leaf.bank_start + leaf.numel - run[0].bank_start <= CHUNK


def _step_spans(leaves: Sequence[Leaf]) -> Iterator[Tensor]:
    """The leaves' step counts as few slices of their banks."""
    start = 0
    for i, leaf in enumerate(leaves):
        after = leaves[i + 1] if i + 1 < len(leaves) else None
        if after is None or after.bank is not leaf.bank or after.bank_index != leaf.bank_index + 1:
            assert leaf.bank is not None
            yield leaf.bank.steps[leaves[start].bank_index : leaf.bank_index + 1]
            start = i + 1
