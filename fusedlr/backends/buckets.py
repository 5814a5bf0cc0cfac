"""What one launch of each kernel treats: buckets of leaves, and the tables by which the kernels find them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import capture
from ..gather import in_order
from ..live import Live
from ..precision import Storage
from ..rule import Rule
from ..schedules.program import Kind, pack
from ..state import Leaf
from . import Knobs
from .stored import wide

__all__ = ["Bucket", "on", "waves"]


_NUMBERS = {float, int}


def send(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The array on the device. The pinned source may be let go at once: torch keeps it until the copy has passed."""
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host.clone()
    staged = torch.empty_like(host, pin_memory=True)
    staged.copy_(host)
    return staged.to(device, non_blocking=True)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Sent:
    """An array and its copy on the device, sent again only when it changed."""

    __slots__ = ("_captured", "_device", "_host", "_spare", "tensor")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: np.ndarray[Any, Any] | None = None
        self._spare = capture.Spare()
        self._captured: Tensor | None = None
        self.tensor: Tensor = torch.empty(0)

    def update(self, array: np.ndarray[Any, Any]) -> Tensor:
        if self._host is None or not np.array_equal(self._host, array, equal_nan=array.dtype == np.float64):
            self.send(array)
            self._host = array.copy()
        return self.tensor

    def send(self, array: np.ndarray[Any, Any]) -> Tensor:
        """Send an array that is known to have changed."""
        table = torch.from_numpy(array)
        if capture.capturing(self._device):
            self.tensor, self._captured = self._spare.send(table, self._device)
            return self.tensor
        self._spare.provide(table, self._device)
        if self.tensor.is_cuda:
            # Steps on this stream may not have read the old table yet, which may be another stream's memory.
            self.tensor.record_stream(torch.cuda.current_stream(self._device))
        self.tensor = send(array, self._device)
        return self.tensor

    def hand_over(self) -> list[Any]:
        """The table as a graph has it; the next one is sent anew, whatever it holds."""
        held, self._host, self._captured = [self.tensor, self._captured], None, None
        return held


class Bucket:
    """Leaves of one device, rule, dtype and dtype of the gradients: what one launch of each kernel treats."""

    def __init__(self, leaves: list[Leaf], positions: list[int], rules: list[Rule]) -> None:
        from fusedlr.kernels import launch, launch_trust

        self.leaves = leaves
        self.positions = positions
        self.rule = rules[leaves[0].group]
        self.device = leaves[0].device
        self.here = on(self.device)
        self.dtype = leaves[0].dtype
        self.grad_dtype = leaves[0].grad_dtype
        self.chunk_size = launch.chunk_size_for(sum(leaf.numel for leaf in leaves))
        counts = [-(-leaf.numel // self.chunk_size) for leaf in leaves]
        self.n_chunks = sum(counts)
        first = np.cumsum([0, *counts[:-1]])
        self.first_partial = 0
        order = np.repeat(np.arange(len(leaves)), counts)
        within = np.arange(self.n_chunks) - first[order]
        self._chunk_rows = np.stack([order, within], axis=1).astype(np.int32)
        self.chunks = send(self._chunk_rows, self.device)
        self._firsts = first
        self._counts = np.array(counts)
        self._addresses = np.array([leaf.step.data_ptr() for leaf in leaves])  # type: ignore[union-attr]
        self.storage = leaves[0].storage(self.rule)
        self.choices = {  # the compile-time choices of apply that stay as they are
            "rule_name": self.rule.name,
            "hyper_name": self.rule.hyper.__name__,
            "dtype": self.dtype,
            "grad_dtype": self.grad_dtype,
            "state_dtypes": (self.storage.dtype,) * len(self.rule.slots),
            "storage": (self.storage.state, self.storage.weights, self.rule.unsigned),
        }
        beside = [_beside(leaf, self.storage) for leaf in leaves]
        self._segments = np.zeros((len(leaves), 3 + len(self.rule.slots) + len(beside[0])), dtype=np.int64)
        for row, leaf, more in zip(self._segments, leaves, beside, strict=True):
            row[0] = leaf.ptr if leaf.flat is not None else 0
            row[2] = leaf.numel
            row[3:] = [*(slot.data_ptr() for slot in leaf.slots), *more]
        self._pointers = b""  # to the gradients, as last sent
        self._sent_segments = Sent(self.device)
        self._sent_scalars = Sent(self.device)
        self._sent_pointers = Sent(self.device)
        self._sent_tracks = Sent(self.device)
        self._sent_program = Sent(self.device)
        self._sent_table = Sent(self.device)
        self._programs: tuple[Any, Any] = (None, None)
        # Of the table, and of those that graphs read: what changes between steps, and its version.
        self._cells: list[tuple[Tensor, Live, int]] = []
        self._captured_cells: list[tuple[Tensor, Live, int]] = []
        self._own_scalars = itemgetter(*self.rule.scalars)
        self.decide_choices: dict[str, Any] | None = None  # those of decide, once they are known
        fields = len(self.rule.hyper._fields)
        self.rows = torch.full((len(leaves), fields + 2), float("nan"), dtype=wide(self.dtype), device=self.device)
        self.skip = torch.zeros(1, dtype=torch.int32, device=self.device)
        has_trust = self.rule.trust is not None
        self.trust = launch_trust.trust_partials(self.n_chunks, self.dtype, self.device) if has_trust else None
        self.values = torch.empty(0, dtype=torch.float64, device=self.device)
        self.tensors = torch.empty(0)
        self._norm = torch.empty((), dtype=torch.float32, device=self.device)
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
        self.tensors = send(table, self.device)

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
            seen = pointers.tobytes()
            if seen == self._pointers:
                return self._sent_segments.tensor
            self._pointers = seen
        else:  # parameters whose strides leave gaps are stepped in dense copies
            gapped = [self.leaves[i] for i in self._gapped]
            self._staged = [(leaf, in_order(leaf.param.detach(), leaf)) for leaf in gapped]
            self._segments[self._gapped, 0] = [copy.data_ptr() for _, copy in self._staged]
        self._segments[:, 1] = pointers
        return self._sent_segments.send(self._segments)

    def hand_over(self) -> list[Any]:
        """What a graph holds the addresses of; tables that may change are made anew by the next step."""
        self._pointers, self._given, self._programs = b"", [], (None, None)
        self._captured_cells += self._cells
        self._cells = []
        sent = (self._sent_segments, self._sent_scalars, self._sent_pointers, self._sent_tracks, self._sent_program)
        tables = [table for each in (*sent, self._sent_table) for table in each.hand_over()]
        return [self.chunks, self.tensors, self.rows, self.skip, self.values, self._norm, self._kept_scalars, *tables]

    @property
    def segments(self) -> Tensor:
        """The pointer table on the device, as last gathered."""
        return self._sent_segments.tensor

    def norm_out(self, knobs: Knobs) -> Tensor:
        """Where decide writes the norm: the optimizer's own buffer on its first device."""
        if knobs.grad_norm is not None and knobs.grad_norm.device == self.device:
            return knobs.grad_norm
        return self._norm

    def take_again(self) -> None:
        """Bring the dense copies up to date: tensors that share their memory may have been updated since."""
        for leaf, copy in self._staged:
            copy.as_strided(leaf.shape, leaf.strides).copy_(leaf.param)

    def put_back(self) -> None:
        """Write the dense copies back."""
        for leaf, copy in self._staged:
            leaf.param.copy_(copy.as_strided(leaf.shape, leaf.strides))
        self._staged = []

    def scalars(self, knobs: Knobs, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The groups' scalars, a sign behind each group's, then the clip's and the scale; the tensors among them.

        ``targets`` are the places of those that a schedule drives. They are computed on the device: left out here, they
        keep the table from travelling in every step.
        """
        given: list[Any] = []
        for scalars, maximize in zip(knobs.scalars, knobs.maximize, strict=True):
            given += self._own_scalars(scalars)
            given.append(-1.0 if maximize else 1.0)
        given += knobs.clip_numbers
        given += knobs.scale
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
            if isinstance(value, Tensor) and value.device.type != "cpu" and self.device.type != "cpu":
                addresses[i] = self._address(value.to(self.device, non_blocking=True))
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
        for g, driven in enumerate(knobs.driven):
            for s in driven:
                tracks.append((g * width + self.rule.scalars.index(s.name), (s.schedule, s.base, s.live)))
        if knobs.max_norm_schedule is not None:
            assert knobs.clip is not None
            tracks.append((len(knobs.driven) * width, (knobs.max_norm_schedule, knobs.clip.numbers[0], None)))
        return tracks

    def programs(self, tracks: list[tuple[int, Any]]) -> tuple[Tensor, Tensor, Tensor, int]:
        """The tracks, the rows and the table of values of the schedules, and the largest number of rows."""
        if self._programs[0] != tracks:
            programs = [schedule.rows(base) for _, (schedule, base, _) in tracks]
            packed = pack(programs)
            targets = np.array([target for target, _ in tracks], dtype=np.int64)
            table = np.stack([targets, packed.first, packed.count], axis=1) if tracks else np.zeros((0, 3), np.int64)
            self._sent_tracks.update(np.ascontiguousarray(table, dtype=np.int64))
            self._sent_program.update(np.ascontiguousarray(packed.rows, dtype=np.float64))
            if packed.live.size or self._cells:  # its cells are not what was sent
                self._sent_table = Sent(self.device)
            self._sent_table.update(np.ascontiguousarray(packed.values, dtype=np.float64))
            followed = [
                live
                for rows, (_, (_, _, live)) in zip(programs, tracks, strict=True)
                if any(row.kind == Kind.LIVE for row in rows)
            ]
            cells = [self._sent_table.tensor[place] for place in packed.live]
            self._cells = [(cell, live, -1) for cell, live in zip(cells, followed, strict=True)]
            self._programs = (tracks, int(packed.count.max()) if tracks else 0)
        self.refresh()
        return self._sent_tracks.tensor, self._sent_program.tensor, self._sent_table.tensor, self._programs[1]

    def refresh(self) -> None:
        """Write the numbers that change between steps into the table where it lies: a captured graph reads it there."""
        for cells in (self._cells, self._captured_cells):
            for i, (cell, live, version) in enumerate(cells):
                if live.version != version:
                    live.fill(cell)
                    cells[i] = (cell, live, live.version)


def _beside(leaf: Leaf, storage: Storage) -> list[int]:
    """The columns behind the slots: scales, what completes the weight, and what random bits are made from."""
    columns = [scale.data_ptr() for scale in leaf.scales]
    if leaf.extra is not None:
        columns.append(leaf.extra.data_ptr())
    if storage.noisy:
        assert leaf.step is not None
        columns += [leaf.step.data_ptr(), leaf.key]
    return columns


def waves(leaves: Sequence[Leaf]) -> list[int]:
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
