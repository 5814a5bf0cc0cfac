"""The PyTorch backend on the CPU: ATen's fused operators, or the reference rules, over cache-sized chunks.

Small tensors of a group lie side by side and are stepped as one from a gathered gradient. Large ones are stepped from
their gradients where those lie; where a gradient must be scaled, it goes piece by piece through a scratch that stays in
the cache. Gradients are never written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..clipping.adaptive import unit_factor
from ..gather import in_order
from ..rule import Rule, overwriting
from ..scaling import UNSCALED
from ..state import Leaf
from . import Executor, Knobs
from .batches import ROUND, Batch, Call, Round, calls_of, norms_of, pieces
from .norms import combine, euclidean, piece_sum, row_norms
from .stored import Arrays, Step, arrays_of, decoded, reference_update, stored_update, trust_terms, wide
from .units import joined_norm, unit_grid, unit_norms

__all__ = ["HostExecutor"]

# Elements that a reference rule treats at once: its temporaries stay in the last cache. Shorter pieces cost more in
# operators than they save (2**16 takes 1.4 to 1.6 times as long on two threads), longer ones leave the cache.
RULE_CHUNK = 1 << 18
# Clip factors below are multiplied into the gradients, not folded: a share of the gradient that is given as 1 less a
# dampening is 1e-16/factor off, and weight_decay divided by them could overflow. In float64 none is folded.
_LEAST_FOLDED = 1e-7
_LARGEST = torch.finfo(torch.float32).max


_NOTHING: tuple[Batch | None, Tensor] = (None, torch.empty(0))


def _trusted(
    rule: Rule, parts: Iterable[Sequence[Tensor]], h: Any, factor: float, limit: float, maximize: bool
) -> Any:
    """The row of a tensor, given in parts (p, g, *slots), with its trust ratio where its rule has one."""
    if rule.trust is None:
        return h
    pairs = [
        [piece_sum(x, 2.0) for x in trust_terms(rule.trust, p, g, slots, h, factor, limit, maximize)]
        for p, g, *slots in parts
    ]
    norms = (combine(own, 2.0) for own in zip(*pairs, strict=True))
    return h._replace(trust=rule.trust.ratio(*norms, h))


class HostExecutor(Executor):
    """Steps tensors on the CPU."""

    def __init__(self, leaves: list[Leaf], positions: list[int] | None) -> None:
        super().__init__(leaves, positions)
        self._rules: list[Rule] = []
        self._calls: list[Call] = []
        self._batches: list[Batch] = []
        self._norms: list[memoryview] = []  # of the rows of all batches, by dtype
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._ordered: Sequence[bool] = ()
        self._pairs: list[list[tuple[float, float]]] = []
        self._norm: float | None = None  # the global norm, where it is known without the pairs
        self._shown: Tensor | None = None  # where it was last shown ...
        self._shown_number: Any = memoryview(b"")  # ... and its memory, which takes a tenth of a tensor's time to fill
        self._divisor = torch.ones((), dtype=torch.float32, device="cpu")  # of gathered gradients, for an operator ...
        self._divisor_number: Any = self._divisor.numpy().data  # ... and its memory
        self._gathered = False  # whether batches hold the gradients of this step
        self._current = _NOTHING  # the batch at work and its gradient
        self._factors: list[float] | None = None
        self._units: dict[int, Tensor] = {}  # by leaf: (gradient, weight) norms of its units, then their factors
        self._skip = False

    def prepare(self, rules: list[Rule]) -> None:
        self._rules = rules
        self._make_calls()

    def _make_calls(self) -> None:
        self._calls = calls_of(self.leaves, self._rules)
        self._batches = [batch for call in self._calls for batch in call.batches]
        self._norms = norms_of(self._batches)
        self._gathered = False
        self._set_order()

    def layout(self, ordered: Sequence[bool]) -> None:
        self._ordered = ordered
        self._set_order()

    def _set_order(self) -> None:
        for batch in self._batches if self._ordered else ():
            batch.ordered = all(self._ordered[i] for i in batch.positions)

    def _scratch_of(self, dtype: torch.dtype) -> Tensor:
        scratch = self._scratch.get(dtype)
        if scratch is None:
            scratch = self._scratch[dtype] = torch.empty(ROUND, dtype=dtype, device="cpu")
        return scratch

    def _gradient(self, batch: Batch, grads: Sequence[Tensor], scratch: Tensor | None = None) -> Tensor:
        """The gradients of a batch in the order of its parameters; gathered ones are a scratch and may be written."""
        if batch.alone:
            return batch.gradient(grads)
        if batch.gathered is not None and self._gathered:
            return batch.whole
        return batch.gather(grads, self._scratch_of(batch.dtype) if scratch is None else scratch)

    # ---- measure and decide ------------------------------------------------------------------------------------

    def measure(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        self._gathered = False
        self._norm = None
        p = knobs.norm_type
        if knobs.scope == "unit":
            self._units = {}
            for batch in self._batches:
                g = self._gradient(batch, grads)
                for i, leaf, (start, n) in zip(batch.positions, batch.leaves, batch.spans, strict=True):
                    w = leaf.flat if leaf.flat is not None else in_order(leaf.param.detach(), leaf)
                    grid = unit_grid(leaf)
                    self._units[i] = torch.stack([unit_norms(g[start : start + n], grid), unit_norms(w, grid)])
            self._norm = joined_norm([norms[0] for norms in self._units.values()]).item()
        elif knobs.scope == "tensor":
            self._pairs = [[] for _ in self.leaves]
            for batch in self._batches:
                g = self._gradient(batch, grads)
                for i, (start, n) in zip(batch.positions, batch.spans, strict=True):
                    self._pairs[i] = [piece_sum(x, p) for x in pieces(g[start : start + n])]
        else:
            self._norm = self._euclidean(grads) if p == 2.0 else None
            if self._norm is None:
                gradients = (self._gradient(batch, grads) for batch in self._batches)
                self._pairs = [[piece_sum(x, p) for g in gradients for x in pieces(g)]]
        self._gathered = True

    def _euclidean(self, grads: Sequence[Tensor]) -> float | None:
        for batch in self._batches:
            g = self._gradient(batch, grads)
            if batch.gathered is None:
                row_norms(g, batch.norms)
            else:
                torch.linalg.vector_norm(batch.rows, dim=1, dtype=batch.norms.dtype, out=batch.norms)
        return euclidean(self._norms)

    def decide(self, knobs: Knobs) -> bool:
        inverse, self._skip = (1.0, False) if knobs.scale is UNSCALED else knobs.scale.on_host()
        self._factors = None if inverse == 1.0 else [inverse]
        if not knobs.measures:
            self._count(knobs, self._skip)
            return self._skip
        norm = self._norm
        if norm is None:
            norm = combine((pair for pairs in self._pairs for pair in pairs), knobs.norm_type)
        norm *= inverse
        if knobs.nonfinite != "propagate" and not self._skip and not math.isfinite(norm):
            if knobs.nonfinite == "raise":
                raise FloatingPointError(
                    f"the gradients hold an inf or NaN (norm {norm}), and nonfinite='raise'; nothing was changed"
                )
            self._skip = True
        scope = None if self._skip else knobs.scope  # a step that is left out changes no statistics
        if scope == "unit":
            self._set_unit_factors(knobs)
        elif scope is not None:
            assert knobs.clip is not None
            max_norm, eps, _ = knobs.clip_numbers
            if knobs.clip.threshold is not None:
                record = knobs.records.on(self.leaves[0].device)
                threshold = knobs.clip.threshold(record, record.new_tensor(norm), eps, knobs.advance)
                max_norm = min(max_norm, threshold.item())
            norms = [norm] if scope == "global" else [combine(p, knobs.norm_type) * inverse for p in self._pairs]
            self._factors = [knobs.clip.factor(n, max_norm, eps) * inverse for n in norms]
        if knobs.grad_norm is not None:
            if knobs.grad_norm is not self._shown:
                self._shown, self._shown_number = knobs.grad_norm, knobs.grad_norm.numpy().data
            # What float32 does not have becomes inf, where fill_ would refuse it: a norm of float64 gradients.
            self._shown_number[()] = norm
        self._count(knobs, self._skip)
        return self._skip

    def _set_unit_factors(self, knobs: Knobs) -> None:
        """The factors of the units of leaves that have some other than 1, in the dtype of the arithmetic."""
        settings = knobs.records.on(self.leaves[0].device).unbind()
        factors = {i: unit_factor(*norms.unbind(), *settings) for i, norms in self._units.items()}
        self._units = {
            i: f.to(wide(self.leaves[i].dtype))
            for i, f in factors.items()
            if (f != 1).any()
        }

    def _count(self, knobs: Knobs, skipped: bool) -> None:
        if knobs.may_skip:
            clock = knobs.clock(self.leaves[0].device)
            # Both, whatever happened: steps before, which could not be skipped, have not moved it.
            clock[0] = knobs.t + (0 if skipped else knobs.advance)
            clock[1] += skipped

    # ---- apply -------------------------------------------------------------------------------------------------

    def apply(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        if self._skip:
            return
        self._current = _NOTHING
        numbers = [call.numbers() for call in self._calls]
        if None in numbers:  # somebody has set those of some tensors
            self._make_calls()
            numbers = [call.numbers() for call in self._calls]
        work = []
        for call, taken in zip(self._calls, numbers, strict=True):
            assert taken is not None
            scalars = {name: float(value) for name, value in knobs.scalars[call.group].items()}
            h = None
            if not call.has_operator or call.has_gaps:
                h = call.rule.row(taken[0] + 1.0, *taken[1:], **scalars)
            work.append((call, taken[0] + 1.0, scalars, h))
        for call, step, scalars, h in work:  # what no rule can take has raised its error
            call.count(h)
            if call.has_operator:
                self._by_operator(call, step, grads, scalars, knobs)
            if h is not None:
                self._by_rule(call, grads, h, knobs)
        # Or not finite in float32, in which 0 times it is NaN too.
        if self._factors is not None and len(self._factors) == 1 and not abs(self._factors[0]) <= _LARGEST:
            for batch in self._batches:
                batch.clear()
        self._gathered = False
        self._current = _NOTHING

    def _factor(self, batch: Batch) -> float:
        """The clip factor of a whole batch: the one for all, or its only leaf's; those of several are ``_scaled``'s."""
        factors = self._factors
        if factors is None:
            return 1.0
        if len(factors) == 1:
            return factors[0]
        return factors[batch.positions[0]] if batch.alone else 1.0

    def _scaled(self, batch: Batch, g: Tensor) -> Tensor:
        """The gradients with each unit by its factor, and gathered ones with each tensor by its own."""
        if self._units:
            return self._scaled_by_units(batch, g)
        if self._factors is None or len(self._factors) == 1 or batch.alone:
            return g
        # The scratch may be scaled in place, but 16-bit gradients in float32, or they would be rounded once more.
        g = g.float() if g.dtype in (torch.bfloat16, torch.float16) else g
        for i, (start, numel) in zip(batch.positions, batch.spans, strict=True):
            g[start : start + numel].mul_(self._factors[i])
        return g

    def _scaled_by_units(self, batch: Batch, g: Tensor) -> Tensor:
        if self._units.keys().isdisjoint(batch.positions):
            return g
        narrow = g.dtype in (torch.bfloat16, torch.float16)
        # As above; and what is not gathered is the gradient itself.
        g = g.float() if narrow else g.clone() if batch.alone else g
        for i, leaf, (start, numel) in zip(batch.positions, batch.leaves, batch.spans, strict=True):
            if i in self._units:
                g[start : start + numel].view(unit_grid(leaf)).mul_(self._units[i].view(1, -1, 1))
        return g

    def _by_operator(
        self, call: Call, step: float, grads: Sequence[Tensor], scalars: dict[str, float], knobs: Knobs
    ) -> None:
        limit = knobs.clip_numbers[2]
        folded = None
        if call.rule.fold is not None and limit == math.inf and self._factors is not None and len(self._factors) == 1:
            (factor,) = self._factors
            if _LEAST_FOLDED < factor < math.inf and factor != 1.0 and call.leaf.dtype == torch.float32:
                folded = call.rule.fold(step, factor, scalars)
        if folded is not None:
            for treated in call.rounds(call.converts, self._scratch_of(call.leaf.dtype)):
                self._treat(call, treated, grads, folded, knobs, limit, folded=True)
            return
        scaled = self._units or (self._factors is not None and self._factors.count(1.0) < len(self._factors))
        clipped = limit != math.inf or bool(scaled)
        divides = self._set_divisor(call, limit)
        for treated in call.rounds(clipped or call.converts, self._scratch_of(call.leaf.dtype)):
            divisor = self._divisor if divides and treated.gathered else None
            self._treat(call, treated, grads, scalars, knobs, limit, divisor=divisor)

    def _set_divisor(self, call: Call, limit: float) -> bool:
        """Whether the operator may divide copies of the gradients by ``_divisor``, which saves a pass over them.

        That rounds as often as a product does. The operators take no divisor but a float32.
        """
        factors = self._factors
        if factors is None or len(factors) != 1 or limit != math.inf or call.leaf.dtype != torch.float32:
            return False
        if call.converts:  # from float64, which may need the factor to fit
            return False
        (factor,) = factors
        if factor == 1.0 or not _LEAST_FOLDED < factor < 1.0 / _LEAST_FOLDED:  # so far from 1, float32 may not have it
            return False
        self._divisor_number[()] = 1.0 / factor
        return True

    def _treat(
        self,
        call: Call,
        treated: Round,
        grads: Sequence[Tensor],
        scalars: dict[str, float],
        knobs: Knobs,
        limit: float,
        folded: bool = False,
        divisor: Tensor | None = None,
    ) -> None:
        """One operator call; the factors of the clip are in scalars or divisor already where they are folded."""
        gradients = []
        for batch, start, stop, scratch in treated.pieces:
            alone = batch.alone
            # A gradient that had to be brought into order is not copied again for each of its rounds.
            if batch is not self._current[0]:
                # Gathered in the scratch where that has its dtype.
                place = scratch if scratch is not None and scratch.dtype == batch.dtype else None
                self._current = batch, self._scaled(batch, self._gradient(batch, grads, place))
            whole = self._current[1]
            g = whole if stop - start == batch.numel else whole[start:stop]
            factor = 1.0 if folded or divisor is not None else self._factor(batch)
            out = scratch if alone else g
            if alone and call.converts and (factor == 1.0 or g.dtype != torch.float64):
                assert scratch is not None
                g = scratch.copy_(g)
            if factor != 1.0:  # float64 becomes narrow afterwards: it may need the factor to fit
                g = torch.mul(g, factor, out=out)
            if limit != math.inf:
                g = torch.clamp(g, -limit, limit, out=out)
            gradients.append(g if alone or g.dtype == call.leaf.dtype else g.to(call.leaf.dtype))
        assert call.rule.aten is not None and call.leaf.step is not None
        call.rule.aten(
            treated.params, gradients, treated.slots, call.leaf.step, scalars, knobs.maximize[call.group], divisor
        )

    def _by_rule(self, call: Call, grads: Sequence[Tensor], h: Any, knobs: Knobs) -> None:
        limit, maximize = knobs.clip_numbers[2], knobs.maximize[call.group]
        assert call.leaf.step is not None
        step = Step(call.rule, h, limit, maximize, call.leaf.step)
        for batch in call.batches:
            if batch.param is None:
                self._in_a_copy(batch, grads, step)
                continue
            if call.has_operator:
                continue
            g = self._scaled(batch, self._gradient(batch, grads))
            factor = self._factor(batch)
            if not batch.storage.plain:
                _step_stored(batch, Arrays(batch.param, batch.slots, batch.scales, batch.extra), g, factor, step)
                continue
            if not batch.alone and factor != 1.0 and g.dtype == wide(batch.param.dtype):
                g, factor = g.mul_(factor), 1.0  # a scratch may be written: one temporary less
            arrays = (batch.param, g, *batch.slots)
            # A trust ratio is a tensor's own; without one, a batch is treated as one tensor.
            alone = call.rule.trust is None or batch.alone
            tensors = [arrays] if alone else [[x[a : a + n] for x in arrays] for a, n in batch.spans]
            for tensor in tensors:
                parts = list(zip(*(pieces(x, RULE_CHUNK) for x in tensor), strict=True))
                row = _trusted(call.rule, parts, h, factor, limit, maximize)
                for p, part, *slots in parts:
                    with overwriting():
                        new = reference_update(call.rule, p, part, slots, row, factor, limit, maximize)
                    for old, value in zip((p, *slots), new, strict=True):
                        if value is not old:
                            old.copy_(value)

    def _in_a_copy(self, batch: Batch, grads: Sequence[Tensor], step: Step) -> None:
        """Step a parameter whose strides leave gaps: by the reference rule, through a dense copy."""
        (leaf,) = batch.leaves
        p = in_order(leaf.param.detach(), leaf)
        g = self._scaled(batch, self._gradient(batch, grads))
        _step_stored(batch, arrays_of(leaf, p), g, self._factor(batch), step)
        leaf.param.copy_(p.as_strided(leaf.shape, leaf.strides))


def _step_stored(batch: Batch, arrays: Arrays, g: Tensor, factor: float, step: Step) -> None:
    """Step arrays in any storage, tensor by tensor where a trust ratio asks for it."""
    rule, h, limit, maximize, _ = step
    place = batch.place()
    alone = rule.trust is None or batch.alone
    for start, n in [(0, batch.numel)] if alone else batch.spans:
        stop = start + n
        parts = [slice(a, min(a + RULE_CHUNK, stop)) for a in range(start, stop, RULE_CHUNK)]
        if rule.trust is not None and parts:
            # One piece after the other: what is decoded stays in the cache.
            read = ((w, g[here], *state) for here in parts for w, *state in [decoded(batch.storage, arrays.part(here))])
            step = step._replace(h=_trusted(rule, read, h, factor, limit, maximize))
        for here in parts:
            part = arrays.part(here)
            new = stored_update(batch.storage, part, g[here], factor, step, place.part(here))
            for old, value in zip(part.flatten(), new, strict=True):
                old.copy_(value)
