"""The Triton backend: builds the tables the kernels read, and launches measure, decide and apply.

Per device: the clock, the partial sums, the clip's record. Per bucket (leaves of one device, rule, dtype and dtype of
the gradients): the tables of pointers and chunks, the scalars of the groups, the schedules' programs, the rows. A table
travels to the device only when the host sees that it changed. On CPU tensors the same code runs in Triton's
interpreter.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import capture
from ..rule import Rule
from ..state import Leaf
from . import Executor, Knobs
from .buckets import Bucket, on, waves
from .units import UnitTables

__all__ = ["TritonExecutor"]


class _ClockMirror:
    """The device's clock on the host, by copies that arrive when they do: nobody waits for them."""

    __slots__ = ("_event", "_host", "_since")

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = torch.empty(0)
        self._since = 0

    def post(self, clock: Tensor) -> None:
        """Send a copy after a step, unless one is still on its way or a graph is being captured."""
        if self._event is not None:
            self._since += 1
        elif not torch.cuda.is_current_stream_capturing():
            self._host = torch.empty(3, dtype=torch.int64, device="cpu", pin_memory=True)
            self._host.copy_(clock, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            self._since = 0

    def poll(self) -> int | None:
        """The clock if a copy has arrived, the steps launched since taken as not skipped."""
        # An event must not be asked while a graph is captured.
        if self._event is None or torch.cuda.is_current_stream_capturing() or not self._event.query():
            return None
        self._event = None
        return int(self._host[0]) + self._since


def _clamps(knobs: Knobs) -> bool:
    """Whether apply bounds each element of the gradients."""
    return knobs.clip_numbers[2] != float("inf")


class TritonExecutor(Executor):
    """Steps tensors in three launches a bucket, four where units have factors, five where there are trust ratios."""

    def __init__(self, leaves: list[Leaf], positions: list[int] | None) -> None:
        from fusedlr.kernels import launch, launch_trust, launch_units

        super().__init__(leaves, positions)
        self._launch = launch
        self._launch_units = launch_units
        self._launch_trust = launch_trust
        self._buckets: list[Bucket] = []
        self._partials: dict[torch.device, Tensor] = {}
        self._n_partials = 0
        self._units: list[UnitTables] = []  # of the buckets, once their units are measured
        self._mode = 0  # how partials are added up ...
        self._modes: list[int] = []  # ... and made, of each bucket; once a norm is measured
        self._capturable: torch.device | None = None  # what a CUDA graph may be captured on
        self._mirror = _ClockMirror()
        self._barrier: Tensor | None = None  # of the whole step in one launch; None where it takes three

    def prepare(self, rules: list[Rule]) -> None:
        keys: dict[tuple[Any, ...], list[int]] = {}
        for i, (leaf, wave) in enumerate(zip(self.leaves, waves(self.leaves), strict=True)):
            key = (wave, str(leaf.device), leaf.dtype, leaf.grad_dtype, rules[leaf.group].name)
            keys.setdefault(key, []).append(i)
        by_wave = sorted(keys.items(), key=lambda item: int(item[0][0]))
        self._buckets = [Bucket([self.leaves[i] for i in at], at, rules) for _, at in by_wave]
        for bucket in self._buckets:
            bucket.place(self._n_partials)
            self._n_partials += bucket.n_chunks
        # NaN until measured: a partial that no program wrote would show.
        self._partials = {
            device: torch.full((2, max(1, self._n_partials)), float("nan"), dtype=torch.float64, device=device)
            for device in dict.fromkeys(bucket.device for bucket in self._buckets)
        }
        self._barrier = self._barrier_if_asked()
        self._capturable = next((device for device in self._partials if device.type == "cuda"), None)

    def _barrier_if_asked(self) -> Tensor | None:
        """``FUSEDLR_ONE_LAUNCH=1`` asks for one launch a step, where one bucket is all there is."""
        (bucket, *others) = self._buckets
        asked = os.environ.get("FUSEDLR_ONE_LAUNCH", "0") not in ("", "0")
        special = bucket.trust is not None or not bucket.storage.plain
        if not asked or others or not bucket.n_chunks or special:
            return None
        if not self._launch.can_launch_step(bucket.device, bucket.dtype):
            return None
        return torch.zeros(1, dtype=torch.int64, device=bucket.device)

    def layout(self, ordered: Sequence[bool]) -> None:
        for bucket in self._buckets:
            bucket.layout(ordered)

    def measure(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        if knobs.scope == "unit":
            self._measure_units(grads, knobs)
            return
        in_one = self._in_one(knobs)
        if not self._modes:
            dtypes = [bucket.grad_dtype for bucket in self._buckets]
            self._mode = self._launch.mode_for(knobs.norm_type, dtypes)
            # A narrow bucket beside a float64 one is measured the fast way too; its scales are 1.
            self._modes = [self._launch.mode_for(knobs.norm_type, [dtype]) for dtype in dtypes]
        for bucket, mode in zip(self._buckets, self._modes, strict=True):
            segments = bucket.gather(grads)
            if bucket.n_chunks and not in_one:
                with bucket.here:
                    self._launch.launch_measure(
                        bucket.n_chunks,
                        segments,
                        bucket.chunks,
                        self._partials[bucket.device],
                        bucket.first_partial,
                        bucket.chunk_size,
                        knobs.norm_type,
                        bucket.grad_dtype,
                        mode,
                    )
        if len(self._partials) > 1:
            self._share([(bucket.first_partial, bucket.n_chunks) for bucket in self._buckets])

    def _measure_units(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        """The norms and factors of the units, and as partials what the units add to the global norm."""
        if not self._units:
            self._n_partials = 0
            for bucket in self._buckets:
                self._units.append(UnitTables(bucket, self._n_partials))
                self._n_partials += self._units[-1].n_blocks
            self._partials = {
                device: torch.full((2, max(1, self._n_partials)), float("nan"), dtype=torch.float64, device=device)
                for device in self._partials
            }
        self._mode = self._launch.mode_for(2.0, [torch.float64])  # partials with a scale
        for bucket, units in zip(self._buckets, self._units, strict=True):
            segments = bucket.gather(grads)
            if not units.n_programs:
                continue
            with bucket.here:
                self._launch_units.launch_unit_measure(
                    units.n_programs,
                    segments,
                    units.table,
                    units.pieces,
                    units.norms,
                    bucket.dtype,
                    bucket.grad_dtype,
                )
                self._launch_units.launch_unit_fold(
                    units.n_blocks,
                    units.table,
                    units.blocks,
                    units.norms,
                    knobs.records.on(bucket.device),
                    units.factors,
                    self._partials[bucket.device],
                    units.first_partial,
                    bucket.dtype,
                )
        if len(self._partials) > 1:
            self._share([(units.first_partial, units.n_blocks) for units in self._units])

    def _share(self, spans: Sequence[tuple[int, int]]) -> None:
        """Copy the buckets' partials to all devices: every device decides by itself, from the partials of all."""
        for bucket, (first, count) in zip(self._buckets, spans, strict=True):
            for device, partials in self._partials.items():
                if device != bucket.device:
                    span = slice(first, first + count)
                    partials[:, span].copy_(self._partials[bucket.device][:, span], non_blocking=True)

    def _in_one(self, knobs: Knobs) -> bool:
        """Whether this step takes one launch: not where the host looks between deciding and applying.

        Nor for clips that need a record: their kernels are apart, to leave the one launch as small as it is.
        """
        if self._barrier is None or knobs.nonfinite == "raise":
            return False
        return knobs.clip is None or not knobs.clip.settings

    def _decide_arguments(self, bucket: Bucket, knobs: Knobs) -> tuple[list[Any], dict[str, Any]]:
        """What decide reads and writes for a bucket, and its compile-time choices."""
        driven = bucket.tracks_of(knobs)
        scalars, addresses = bucket.scalars(knobs, [target for target, _ in driven])
        tracks, program, table, max_rows = bucket.programs(driven)
        arguments = [
            self._partials[bucket.device],
            self._n_partials,
            knobs.norm_type,
            bucket.tensors,
            scalars,
            addresses,
            bucket.values,
            tracks,
            program,
            table,
            max_rows,
            knobs.clock(bucket.device),
            int(knobs.advance),
            bucket.rows,
            bucket.norm_out(knobs),
            bucket.skip,
        ]
        if bucket.decide_choices is None:
            bucket.decide_choices = self._decide_choices(bucket, knobs)
        if "threshold_name" in bucket.decide_choices:
            arguments.append(knobs.records.on(bucket.device))
        return arguments, bucket.decide_choices

    def _decide_choices(self, bucket: Bucket, knobs: Knobs) -> dict[str, Any]:
        """The compile-time choices of decide; those of the clip and the policies are the same in all steps."""
        last = {each.device: each for each in self._buckets}
        choices = {
            "row_name": bucket.rule.row.__name__,
            "factor_name": getattr(knobs.clip.factor, "__name__", "no_factor") if knobs.clip else "no_factor",
            "scope": knobs.scope,
            "mode": self._mode,
            "guard": knobs.nonfinite != "propagate",
            "count": knobs.nonfinite == "skip",
            "last": last[bucket.device] is bucket,
            "n_row_scalars": len(bucket.rule.scalars),
            "dtype": bucket.dtype,
        }
        if knobs.clip is not None and knobs.clip.threshold is not None:
            choices["threshold_name"] = knobs.clip.threshold.__name__
        return choices

    def _step(self, knobs: Knobs) -> None:
        """Measure, decide and apply the only bucket, whose gradients are gathered, in one launch."""
        assert self._barrier is not None
        (bucket,) = self._buckets
        arguments, choices = self._decide_arguments(bucket, knobs)
        choices = choices | bucket.choices | {"clamp": _clamps(knobs)}
        with bucket.here:
            self._launch.launch_step(
                self._barrier,
                bucket.n_chunks,
                bucket.segments,
                bucket.chunks,
                bucket.chunk_size,
                bucket.first_partial,
                *arguments,
                **choices,
            )

    def decide(self, knobs: Knobs) -> bool:
        if self._in_one(knobs):
            if knobs.measures:  # else the gradients are not gathered before apply
                self._step(knobs)
        else:
            for bucket in self._buckets:
                arguments, choices = self._decide_arguments(bucket, knobs)
                with bucket.here:
                    self._launch.launch_decide(*arguments, **choices)
            knobs.records.share(self._partials)
        if knobs.nonfinite == "raise" and int(self._buckets[0].skip) == 1:  # to raise is to wait for the device
            raise FloatingPointError("the gradients hold an inf or NaN, and nonfinite='raise'; nothing was changed")
        if not knobs.may_skip:
            return False
        device = self._buckets[0].device
        if device.type == "cpu":
            return bool(self._buckets[0].skip)
        if device.type == "cuda":
            with on(device):
                self._mirror.post(knobs.clock(device))
        return False

    def captures(self) -> bool:
        return self._capturable is not None and capture.capturing(self._capturable)

    def hand_over(self) -> list[Any]:
        tables = [table for bucket in self._buckets for table in bucket.hand_over()]
        trusts = [bucket.trust for bucket in self._buckets]
        return [*super().hand_over(), *self._partials.values(), self._barrier, *trusts, self._units, *tables]

    def arrived_clock(self) -> int | None:
        return self._mirror.poll()

    def refresh(self) -> None:
        for bucket in self._buckets:
            bucket.refresh()

    def apply(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        clamp, in_one = _clamps(knobs), self._in_one(knobs)
        for bucket, units in itertools.zip_longest(self._buckets, self._units):
            segments = bucket.segments if knobs.measures else bucket.gather(grads)
            if in_one:
                if not knobs.measures:
                    self._step(knobs)
            elif bucket.n_chunks:
                where = (bucket.n_chunks, segments, bucket.chunks, bucket.rows, bucket.skip, bucket.chunk_size)
                with bucket.here:
                    if knobs.measures:
                        bucket.take_again()
                    if bucket.trust is not None:
                        own = (bucket.trust, bucket.tensors, bucket.first_partial)
                        self._launch_trust.launch_trust(*where, *own, clamp=clamp, **bucket.choices)
                    of_units = (units.table, units.factors) if units is not None else ()
                    self._launch.launch_apply(*where, *of_units, clamp=clamp, **bucket.choices)
            bucket.put_back()
