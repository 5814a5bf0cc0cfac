"""Hand-made tables for launching the kernels one by one, as the Triton backend makes them for whole steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fusedlr.kernels import launch
from torch import Tensor

from fusedlr.rule import Rule
from fusedlr.schedules import Schedule
from fusedlr.schedules.program import pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def int64(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE)


def chunk_table(numels: Sequence[int], chunk_size: int) -> Tensor:
    """(segment, number of the chunk within it) for every program."""
    rows = [(s, c) for s, numel in enumerate(numels) for c in range(-(-numel // chunk_size))]
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE).reshape(-1, 2)


def measured(
    grads: Sequence[Tensor], norm_type: float = 2.0, chunk_size: int = 1024, before: int = 3, after: int = 2
) -> tuple[Tensor, Tensor]:
    """(sums, scales) of the chunks; the partials around them were NaN and must still be."""
    dtype = grads[0].dtype
    segments = int64([(0, g.data_ptr(), g.numel()) for g in grads])
    chunks = chunk_table([g.numel() for g in grads], chunk_size)
    n = len(chunks)
    partials = torch.full((2, before + n + after), math.nan, dtype=torch.float64, device=DEVICE)
    mode = launch.mode_for(norm_type, [dtype])
    launch.launch_measure(n, segments, chunks, partials, before, chunk_size, norm_type, dtype, mode)
    assert partials[:, :before].isnan().all() and partials[:, before + n :].isnan().all()
    return partials[0, before : before + n], partials[1, before : before + n]


@dataclass
class Decided:
    """What decide wrote."""

    rows: Tensor
    norm: Tensor
    skip: Tensor
    clock: Tensor
    steps: Tensor
    carried: Tensor
    values: Tensor


def decided(
    rule: Rule,
    scalars: Sequence[Sequence[float]],
    steps: Sequence[float],
    groups: Sequence[int] | None = None,
    *,
    partials: Tensor | None = None,
    counts: Sequence[int] | None = None,
    norm_type: float = 2.0,
    mode: int | None = None,
    factor: str = "no_factor",
    scope: str | None = None,
    clip: tuple[float, float, float] = (math.inf, 0.0, math.inf),
    scale: tuple[float, float, float] = (1.0, 1.0, 0.0),
    signs: Sequence[float] | None = None,
    addresses: dict[tuple[int, int], int] | None = None,
    schedules: dict[tuple[int, int], tuple[Schedule, float]] | None = None,
    clock: tuple[int, int] = (0, 0),
    advance: int = 1,
    guard: bool = False,
    count: bool = False,
    last: bool = True,
    dtype: torch.dtype = torch.float64,
    carried: Sequence[Sequence[float]] = (),
) -> Decided:
    """Launch decide for tensors of the given steps; ``scalars`` is a row a group, ``counts`` partials a tensor, and
    ``carried`` the numbers behind each tensor's step."""
    n, width = len(steps), len(rule.scalars) + 1
    groups = [0] * n if groups is None else groups
    signs = [1.0] * len(scalars) if signs is None else signs
    if partials is None:
        partials = torch.zeros(2, 1, dtype=torch.float64, device=DEVICE)
        counts = [0] * n
    assert counts is not None
    firsts = np.cumsum([0, *counts[:-1]])
    numbers_of = [(x, *more) for x, more in zip(steps, carried or [()] * n, strict=True)]
    step = torch.tensor(numbers_of, dtype=torch.float32, device=DEVICE)
    tensors = int64([(g, step[i].data_ptr(), int(firsts[i]), counts[i]) for i, g in enumerate(groups)])
    numbers = [x for row, sign in zip(scalars, signs, strict=True) for x in (*row, sign)] + [*clip, *scale]
    pointers = [0] * len(numbers)
    for (g, i), address in (addresses or {}).items():
        pointers[g * width + i] = address
    tracks = [(g * width + i, schedule.rows(base)) for (g, i), (schedule, base) in (schedules or {}).items()]
    packed = pack([rows for _, rows in tracks])
    track_table = [
        (target, *span) for (target, _), span in zip(tracks, zip(packed.first, packed.count, strict=True), strict=True)
    ]
    fields = len(rule.hyper._fields)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = Decided(
        rows=torch.full((n + 1, fields + 2), math.nan, dtype=wide, device=DEVICE),
        norm=torch.full((), math.nan, device=DEVICE),
        skip=torch.full((1,), -7, dtype=torch.int32, device=DEVICE),
        clock=int64(clock),
        steps=step[:, 0],
        carried=step[:, 1:],
        values=torch.full((len(numbers),), math.nan, dtype=torch.float64, device=DEVICE),
    )
    launch.launch_decide(
        partials,
        sum(counts),
        norm_type,
        tensors,
        torch.tensor(numbers, dtype=torch.float64, device=DEVICE),
        int64(pointers),
        out.values,
        int64(track_table).reshape(-1, 3),
        torch.from_numpy(packed.rows).to(DEVICE),
        torch.from_numpy(packed.values).to(DEVICE),
        int(packed.count.max()) if tracks else 0,
        out.clock,
        advance,
        out.rows[:n],
        out.norm,
        out.skip,
        row_name=rule.row.__name__,
        factor_name=factor,
        scope=scope,
        mode=launch.mode_for(norm_type, [torch.float32]) if mode is None else mode,
        guard=guard,
        count=count,
        last=last,
        n_row_scalars=len(rule.scalars),
        dtype=dtype,
    )
    assert out.rows[n].isnan().all(), "decide wrote behind the last row"
    out.rows = out.rows[:n]
    return out


class Guarded:
    """A one-dimensional tensor in the middle of a larger one, whose rest must stay as it is."""

    def __init__(self, values: Tensor, offset: int = 64) -> None:
        self.start, self.numel = offset, values.numel()
        self.whole = torch.full((values.numel() + 2 * offset + 128,), -123.0, dtype=values.dtype, device=DEVICE)
        self.inside = self.whole[offset : offset + values.numel()]
        self.inside.copy_(values)

    def untouched_around(self) -> bool:
        outside = torch.cat([self.whole[: self.start], self.whole[self.start + self.numel :]])
        return bool((outside == -123.0).all())


def applied(
    rule: Rule,
    h: Any,
    arrays: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    *,
    factor: float = 1.0,
    limit: float = math.inf,
    skip: int = 0,
    chunk_size: int = 1024,
    offset: int = 64,
) -> list[list[Guarded]]:
    """Launch apply on copies of ``arrays`` (parameter, then state, for every segment) inside guard zones."""
    dtype = arrays[0][0].dtype
    # State is always aligned; the parameter lies where the test wants it.
    placed = [[Guarded(a, offset if i == 0 else 64) for i, a in enumerate(tensors)] for tensors in arrays]
    segments = int64(
        [
            (p.inside.data_ptr(), g.data_ptr(), g.numel(), *(s.inside.data_ptr() for s in state))
            for (p, *state), g in zip(placed, grads, strict=True)
        ]
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = torch.tensor([[float(x) for x in h] + [factor, limit]] * len(grads), dtype=wide, device=DEVICE)
    chunks = chunk_table([g.numel() for g in grads], chunk_size)
    launch.launch_apply(
        len(chunks),
        segments,
        chunks,
        rows,
        torch.tensor([skip], dtype=torch.int32, device=DEVICE),
        chunk_size,
        rule_name=rule.name,
        hyper_name=rule.hyper.__name__,
        clamp=limit != math.inf,
        dtype=dtype,
        grad_dtype=grads[0].dtype,
        state_dtypes=tuple(state.dtype for state in arrays[0][1:]),
    )
    return placed
