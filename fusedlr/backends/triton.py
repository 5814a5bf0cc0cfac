"""The Triton backend: builds the tables the kernels read, and launches measure, decide and apply.

Per device: the clock, the partial sums, the scalars of the groups, the schedules' programs. Per bucket (leaves of one
device, dtype and rule): the pointer table, the chunk table, the rows. A table travels to the device only when the host
sees that it changed. On CPU tensors the same code runs in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..gather import in_order
from ..rule import Rule
from ..schedules.program import pack
from ..state import Leaf
from . import Executor, Knobs

__all__ = ["TritonExecutor"]


_NUMBERS = {float, int}


def _send(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The array on the device. The pinned source may be let go at once: torch keeps it until the copy has passed."""
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host.clone()
    staged = torch.empty_like(host, pin_memory=True)
    staged.copy_(host)
    return staged.to(device, non_blocking=True)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Sent:
    """An array and its copy on the device, sent again only when it changed."""

    __slots__ = ("_device", "_host", "tensor")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: np.ndarray[Any, Any] | None = None
        self.tensor: Tensor = torch.empty(0)

    def update(self, array: np.ndarray[Any, Any]) -> Tensor:
        if self._host is None or not np.array_equal(self._host, array, equal_nan=array.dtype == np.float64):
            self.send(array)
            self._host = array.copy()
        return self.tensor

    def send(self, array: np.ndarray[Any, Any]) -> Tensor:
        """Send an array that is known to have changed."""
        self.tensor = _send(array, self._device)
        return self.tensor


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
            self._host = torch.empty(2, dtype=torch.int64, pin_memory=True)
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


class Bucket:
    """Leaves of one device, dtype and rule: what one launch of each kernel treats."""

    def __init__(self, leaves: list[Leaf], positions: list[int], rules: list[Rule]) -> None:
        from fusedlr.kernels import launch

        self.leaves = leaves
        self.positions = positions
        self.rule = rules[leaves[0].group]
        self.device = leaves[0].device
        self.here = _on(self.device)
        self.dtype = leaves[0].dtype
        self.chunk_size = launch.chunk_size_for(sum(leaf.numel for leaf in leaves))
        counts = [-(-leaf.numel // self.chunk_size) for leaf in leaves]
        self.n_chunks = sum(counts)
        first = np.cumsum([0, *counts[:-1]])
        self.first_partial = 0
        order = np.repeat(np.arange(len(leaves)), counts)
        within = np.arange(self.n_chunks) - first[order]
        self._chunk_rows = np.stack([order, within], axis=1).astype(np.int32)
        self.chunks = _send(self._chunk_rows, self.device)
        self._firsts = first
        self._counts = np.array(counts)
        self._addresses = np.array([leaf.step.data_ptr() for leaf in leaves])  # type: ignore[union-attr]
        self._segments = np.zeros((len(leaves), 3 + len(self.rule.slots)), dtype=np.int64)
        for row, leaf in zip(self._segments, leaves, strict=True):
            row[0] = leaf.ptr if leaf.flat is not None else 0
            row[2] = leaf.numel
            row[3:] = [slot.data_ptr() for slot in leaf.slots]
        self._sent_segments = _Sent(self.device)
        self._sent_scalars = _Sent(self.device)
        self._sent_pointers = _Sent(self.device)
        self._sent_tracks = _Sent(self.device)
        self._sent_program = _Sent(self.device)
        self._sent_table = _Sent(self.device)
        self._programs: tuple[Any, Any] = (None, None)
        fields = len(self.rule.hyper._fields)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.rows = torch.full((len(leaves), fields + 2), float("nan"), dtype=wide, device=self.device)
        self.skip = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.values = torch.empty(0, dtype=torch.float64, device=self.device)
        self.tensors = torch.empty(0)
        self._norm = torch.empty((), device=self.device)
        self._keep: Sequence[Tensor] = ()
        self._kept_scalars: list[Tensor] = []
        self._staged: list[tuple[Leaf, Tensor]] = []
        self._ordered: Sequence[bool] = ()
        self._in_order = False
        self._all = False  # whether all gradients of the executor are this bucket's, in their order
        self._gapped = [i for i, leaf in enumerate(leaves) if leaf.flat is None]
        self._given: list[Any] = []

    def place(self, first_partial: int) -> None:
        """Where this bucket's partials start among those of its device."""
        self.first_partial = first_partial
        table = np.stack(
            [
                np.array([leaf.group for leaf in self.leaves]),
                self._addresses,
                self._firsts + first_partial,
                self._counts,
            ],
            axis=1,
        ).astype(np.int64)
        self.tensors = _send(table, self.device)

    def layout(self, ordered: Sequence[bool]) -> None:
        self._ordered = [ordered[i] for i in self.positions]
        self._in_order = all(self._ordered)
        self._all = len(ordered) == len(self.positions)

    def gather(self, grads: Sequence[Tensor]) -> Tensor:
        """The pointer table for these gradients; only those that lie in another order are copied."""
        mine = grads if self._all else [grads[i] for i in self.positions]
        if not self._in_order:
            mine = [
                g if ordered else in_order(g, leaf)
                for g, leaf, ordered in zip(mine, self.leaves, self._ordered, strict=True)
            ]
        # Held until the next step: the kernels read them after this method returns.
        self._keep = mine
        pointers = np.fromiter(map(Tensor.data_ptr, mine), np.int64, len(mine))
        if not self._gapped:
            if np.array_equal(pointers, self._segments[:, 1]):
                return self._sent_segments.tensor
        else:  # parameters whose strides leave gaps are stepped in dense copies
            gapped = [self.leaves[i] for i in self._gapped]
            self._staged = [(leaf, in_order(leaf.param.detach(), leaf)) for leaf in gapped]
            self._segments[self._gapped, 0] = [copy.data_ptr() for _, copy in self._staged]
        self._segments[:, 1] = pointers
        return self._sent_segments.send(self._segments)

    @property
    def segments(self) -> Tensor:
        """The pointer table on the device, as last gathered."""
        return self._sent_segments.tensor

    def norm_out(self, knobs: Knobs) -> Tensor:
        """Where decide writes the norm: the optimizer's own buffer on its first device."""
        if knobs.grad_norm is not None and knobs.grad_norm.device == self.device:
            return knobs.grad_norm
        return self._norm

    def put_back(self) -> None:
        """Write the dense copies back."""
        for leaf, copy in self._staged:
            leaf.param.copy_(copy.as_strided(leaf.shape, leaf.strides))
        self._staged = []

    def scalars(self, knobs: Knobs, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The groups' scalars, a sign behind each group's and the clip's numbers last; the tensors among them.

        ``targets`` are the places of those that a schedule drives. They are computed on the device: left out here, they
        keep the table from travelling in every step.
        """
        names = self.rule.scalars
        given: list[Any] = []
        for scalars, maximize in zip(knobs.scalars, knobs.maximize, strict=True):
            given += [scalars.get(name, 0.0) for name in names]
            given.append(-1.0 if maximize else 1.0)
        given += knobs.clip_numbers
        for target in targets:
            given[target] = 0.0
        # Tensors may have been written in place; numbers that are equal need no second look.
        has_tensors = not _NUMBERS.issuperset(map(type, given))
        if not has_tensors and given == self._given:
            return self._sent_scalars.tensor, self._sent_pointers.tensor
        self._given = [] if has_tensors else given
        values, addresses = np.zeros(len(given)), np.zeros(len(given), dtype=np.int64)
        self._kept_scalars = []
        for i, value in enumerate(given):
            if isinstance(value, Tensor) and value.device == self.device and self.device.type != "cpu":
                addresses[i] = self._address(value)
            else:
                values[i] = float(value)
        if self.values.numel() != values.size:
            self.values = torch.empty(values.size, dtype=torch.float64, device=self.device)
        return self._sent_scalars.update(values), self._sent_pointers.update(addresses)

    def _address(self, value: Tensor) -> int:
        if value.dtype not in (torch.float32, torch.float64):
            value = value.double()
        self._kept_scalars.append(value)
        return value.data_ptr() | int(value.dtype == torch.float64)

    def tracks_of(self, knobs: Knobs) -> list[tuple[int, Any]]:
        """(place in the scalars, key of the program) of every scalar that a schedule drives in this step."""
        width = len(self.rule.scalars) + 1
        tracks = []
        for g, scheduled in enumerate(knobs.schedules):
            for s in scheduled:
                if s.name in self.rule.scalars and not s.overridden():
                    tracks.append((g * width + self.rule.scalars.index(s.name), (s.schedule, s.base)))
        if knobs.max_norm_schedule is not None:
            assert knobs.clip is not None
            tracks.append((len(knobs.schedules) * width, (knobs.max_norm_schedule, knobs.clip.numbers[0])))
        return tracks

    def programs(self, tracks: list[tuple[int, Any]]) -> tuple[Tensor, Tensor, Tensor, int]:
        """The tracks, the rows and the table of values of the schedules, and the largest number of rows."""
        if self._programs[0] != tracks:
            packed = pack([schedule.rows(base) for _, (schedule, base) in tracks])
            targets = np.array([target for target, _ in tracks], dtype=np.int64)
            table = np.stack([targets, packed.first, packed.count], axis=1) if tracks else np.zeros((0, 3), np.int64)
            self._sent_tracks.update(np.ascontiguousarray(table, dtype=np.int64))
            self._sent_program.update(np.ascontiguousarray(packed.rows, dtype=np.float64))
            self._sent_table.update(np.ascontiguousarray(packed.values, dtype=np.float64))
            self._programs = (tracks, int(packed.count.max()) if tracks else 0)
        return self._sent_tracks.tensor, self._sent_program.tensor, self._sent_table.tensor, self._programs[1]


def _waves(leaves: Sequence[Leaf]) -> list[int]:
    """Which wave of launches treats each leaf: one after those of all earlier leaves whose memory it overlaps.

    Parameters that share memory are stepped in their order, as torch.optim does; programs of one launch would race.
    """
    spans = [_span(leaf) for leaf in leaves]
    waves = [0] * len(leaves)
    neighbours: list[int] = []  # leaves that hang together by overlaps: hardly ever more than one
    end: tuple[str, int] = ("", 0)
    for i in sorted(
        (i for i, leaf in enumerate(leaves) if leaf.numel), key=lambda i: (str(leaves[i].device), spans[i])
    ):
        device = str(leaves[i].device)
        if device != end[0] or spans[i][0] >= end[1]:
            _order(neighbours, spans, waves)
            neighbours, end = [], (device, 0)
        neighbours.append(i)
        end = device, max(end[1], spans[i][1])
    _order(neighbours, spans, waves)
    return waves


def _span(leaf: Leaf) -> tuple[int, int]:
    """The first address of a leaf's parameter and the one behind its last."""
    extent = 1 + sum((n - 1) * s for n, s in zip(leaf.shape, leaf.param.stride(), strict=True))
    return leaf.ptr, leaf.ptr + extent * leaf.dtype.itemsize


def _order(neighbours: list[int], spans: Sequence[tuple[int, int]], waves: list[int]) -> None:
    """Set the waves of leaves on one device that may overlap."""
    neighbours = sorted(neighbours)
    for at, i in enumerate(neighbours[1:], start=1):
        overlapped = [waves[j] for j in neighbours[:at] if spans[j][0] < spans[i][1] and spans[i][0] < spans[j][1]]
        waves[i] = max(overlapped, default=-1) + 1


class TritonExecutor(Executor):
    """Steps tensors with the three kernels: at most three launches a bucket."""

    def __init__(self, leaves: list[Leaf], positions: list[int] | None) -> None:
        from fusedlr.kernels import launch

        super().__init__(leaves, positions)
        self._launch = launch
        self._buckets: list[Bucket] = []
        self._partials: dict[torch.device, Tensor] = {}
        self._n_partials = 0
        self._mode = 0
        self._mirror = _ClockMirror()
        self._barrier: Tensor | None = None  # of the whole step in one launch; None where it takes three

    def prepare(self, rules: list[Rule]) -> None:
        keys: dict[tuple[Any, ...], list[int]] = {}
        for i, (leaf, wave) in enumerate(zip(self.leaves, _waves(self.leaves), strict=True)):
            keys.setdefault((wave, str(leaf.device), leaf.dtype, rules[leaf.group].name), []).append(i)
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

    def _barrier_if_asked(self) -> Tensor | None:
        """``FUSEDLR_ONE_LAUNCH=1`` asks for one launch a step, where one bucket is all there is."""
        (bucket, *others) = self._buckets
        asked = os.environ.get("FUSEDLR_ONE_LAUNCH", "0") not in ("", "0")
        if not asked or others or not bucket.n_chunks or not self._launch.can_launch_step(bucket.device, bucket.dtype):
            return None
        return torch.zeros(1, dtype=torch.int64, device=bucket.device)

    def layout(self, ordered: Sequence[bool]) -> None:
        for bucket in self._buckets:
            bucket.layout(ordered)

    def measure(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        self._mode = self._launch.mode_for(knobs.norm_type, [bucket.dtype for bucket in self._buckets])
        for bucket in self._buckets:
            segments = bucket.gather(grads)
            if bucket.n_chunks and not self._in_one(knobs):
                # A narrow bucket beside a float64 one is measured the fast way too; its scales are 1.
                mode = self._launch.mode_for(knobs.norm_type, [bucket.dtype])
                with bucket.here:
                    self._launch.launch_measure(
                        bucket.n_chunks,
                        segments,
                        bucket.chunks,
                        self._partials[bucket.device],
                        bucket.first_partial,
                        bucket.chunk_size,
                        knobs.norm_type,
                        bucket.dtype,
                        mode,
                    )
        for bucket in self._buckets:  # every device decides by itself, from the partials of all
            for device, partials in self._partials.items():
                if device != bucket.device:
                    span = slice(bucket.first_partial, bucket.first_partial + bucket.n_chunks)
                    partials[:, span].copy_(self._partials[bucket.device][:, span], non_blocking=True)

    def _in_one(self, knobs: Knobs) -> bool:
        """Whether this step takes one launch: not where the host looks between deciding and applying."""
        return self._barrier is not None and knobs.nonfinite != "raise"

    def _decide_arguments(self, bucket: Bucket, knobs: Knobs) -> tuple[list[Any], dict[str, Any]]:
        """What decide reads and writes for a bucket, and its compile-time choices."""
        driven = bucket.tracks_of(knobs)
        scalars, addresses = bucket.scalars(knobs, [target for target, _ in driven])
        tracks, program, table, max_rows = bucket.programs(driven)
        last = {each.device: each for each in self._buckets}
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
        return arguments, choices

    def _apply_choices(self, bucket: Bucket, knobs: Knobs) -> dict[str, Any]:
        """The compile-time choices of apply for a bucket."""
        return {
            "rule_name": bucket.rule.name,
            "hyper_name": bucket.rule.hyper.__name__,
            "clamp": knobs.clip_numbers[2] != float("inf"),
            "dtype": bucket.dtype,
            "grad_dtype": bucket.dtype,
            "state_dtypes": tuple(slot.dtype for slot in bucket.leaves[0].slots),
        }

    def _step(self, knobs: Knobs) -> None:
        """Measure, decide and apply the only bucket, whose gradients are gathered, in one launch."""
        assert self._barrier is not None
        (bucket,) = self._buckets
        arguments, choices = self._decide_arguments(bucket, knobs)
        choices |= self._apply_choices(bucket, knobs)
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
        if knobs.nonfinite == "raise" and int(self._buckets[0].skip):  # to raise is to wait for the device
            raise FloatingPointError("the gradients hold an inf or NaN, and nonfinite='raise'; nothing was changed")
        if knobs.nonfinite != "skip":
            return False
        device = self._buckets[0].device
        if device.type == "cpu":
            return bool(self._buckets[0].skip)
        if device.type == "cuda":
            with _on(device):
                self._mirror.post(knobs.clock(device))
        return False

    def arrived_clock(self) -> int | None:
        return self._mirror.poll()

    def apply(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        for bucket in self._buckets:
            segments = bucket.segments if knobs.measures else bucket.gather(grads)
            if self._in_one(knobs):
                if not knobs.measures:
                    self._step(knobs)
            elif bucket.n_chunks:
                with bucket.here:
                    self._launch.launch_apply(
                        bucket.n_chunks,
                        segments,
                        bucket.chunks,
                        bucket.rows,
                        bucket.skip,
                        bucket.chunk_size,
                        **self._apply_choices(bucket, knobs),
                    )
            bucket.put_back()
