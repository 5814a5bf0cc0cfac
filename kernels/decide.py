"""decide: one program, in float64, that turns partial sums, clock and hyper-parameters into one row a tensor.

In order: scheduled scalars, norms, the decision to skip, then for each tensor its step count, its clip factor and the
numbers of its rule. Everything comes from device memory, so that a captured step replays with moving values.
"""

import triton
import triton.language as tl

from .measure import EUCLID, LARGEST
from .schedules import schedule_value

__all__ = ["GLOBAL", "NOTHING", "TENSOR", "UNIT", "decide"]

NOTHING = tl.constexpr(0)  # scopes of the norm
GLOBAL = tl.constexpr(1)
TENSOR = tl.constexpr(2)
UNIT = tl.constexpr(3)  # the norm is global, and the factors of the units are made elsewhere

TILE = tl.constexpr(8)  # partials of each of LANES tensors that are read at once
SUMS = tl.constexpr(128)  # partials of all tensors that are: as many for any number of threads, which keeps the sum


@triton.jit
def share(total, scale, top, norm_type):
    """total * (scale/top)**p."""
    # 0, inf and NaN stay what they are, though the power of a scale far from the largest one may be inf or 0.
    used = (scale > 0.0) & (total > 0.0) & (total < float("inf"))
    ratio = tl.where(used, scale, 1.0) / top
    return tl.where(used, total * tl.exp(norm_type * tl.log(ratio)), total)


@triton.jit
def root(total, top, norm_type):
    """top * total**(1/p); 0, inf and NaN stay what they are."""
    usable = (total > 0.0) & (total < float("inf"))
    power = tl.exp(tl.log(tl.where(usable, total, 1.0)) / norm_type)
    return tl.where(usable, top * power, total)


@triton.jit
def global_norm(partials_ptr, n_partials, scale_offset, norm_type, MODE: tl.constexpr):
    """The norm over all partials, added up in their order."""
    lanes = tl.arange(0, SUMS)
    sums = tl.zeros([SUMS], tl.float64)
    if MODE == EUCLID:
        # Four blocks are on their way at once, and are added in their order.
        for offset in range(0, n_partials, 4 * SUMS):
            at = offset + lanes
            a = tl.load(partials_ptr + at, mask=at < n_partials, other=0.0)
            b = tl.load(partials_ptr + at + SUMS, mask=at + SUMS < n_partials, other=0.0)
            c = tl.load(partials_ptr + at + 2 * SUMS, mask=at + 2 * SUMS < n_partials, other=0.0)
            d = tl.load(partials_ptr + at + 3 * SUMS, mask=at + 3 * SUMS < n_partials, other=0.0)
            sums += a
            sums += b
            sums += c
            sums += d
        norm = tl.sqrt(tl.sum(sums))
    else:
        tops = tl.zeros([SUMS], tl.float64)
        nans = tl.zeros([SUMS], tl.int32)
        for offset in range(0, n_partials, SUMS):
            mask = offset + lanes < n_partials
            scale = tl.load(partials_ptr + scale_offset + offset + lanes, mask=mask, other=0.0)
            total = tl.load(partials_ptr + offset + lanes, mask=mask, other=0.0)
            tops = tl.where((scale > tops) & (total != 0.0), scale, tops)
            nans += ((scale != scale) | (total != total)).to(tl.int32)
        top = tl.max(tops)
        if MODE == LARGEST:
            norm = top
        else:
            top = tl.where(top > 0.0, top, 1.0)
            for offset in range(0, n_partials, SUMS):
                mask = offset + lanes < n_partials
                scale = tl.load(partials_ptr + scale_offset + offset + lanes, mask=mask, other=0.0)
                total = tl.load(partials_ptr + offset + lanes, mask=mask, other=0.0)
                sums += share(total, scale, top, norm_type)
            norm = root(tl.sum(sums), top, norm_type)
        norm = tl.where(tl.sum(nans) > 0, float("nan"), norm)
    return norm


@triton.jit
def tensor_norms(partials_ptr, first, count, scale_offset, norm_type, MODE: tl.constexpr, LANES: tl.constexpr):
    """The norm of each of LANES tensors over its own partials."""
    columns = tl.arange(0, TILE)[None, :]
    longest = tl.max(count)
    sums = tl.zeros([LANES], tl.float64)
    tops = tl.zeros([LANES], tl.float64)
    nans = tl.zeros([LANES], tl.int32)
    if MODE != EUCLID:
        for offset in range(0, longest, TILE):
            mask = offset + columns < count[:, None]
            at = first[:, None] + offset + columns
            scale = tl.load(partials_ptr + scale_offset + at, mask=mask, other=0.0)
            total = tl.load(partials_ptr + at, mask=mask, other=0.0)
            nans += tl.sum(((scale != scale) | (total != total)).to(tl.int32), axis=1)
            scale = tl.where((scale == scale) & (total != 0.0), scale, 0.0)
            tops = tl.maximum(tops, tl.max(scale, axis=1))
    if MODE == LARGEST:
        norms = tops
    else:
        safe = tl.where(tops > 0.0, tops, 1.0)
        for offset in range(0, longest, TILE):
            mask = offset + columns < count[:, None]
            at = first[:, None] + offset + columns
            total = tl.load(partials_ptr + at, mask=mask, other=0.0)
            if MODE != EUCLID:
                scale = tl.load(partials_ptr + scale_offset + at, mask=mask, other=0.0)
                total = share(total, scale, safe[:, None], norm_type)
            sums += tl.sum(total, axis=1)
        norms = tl.sqrt(sums) if MODE == EUCLID else root(sums, safe, norm_type)
    return tl.where(nans > 0, float("nan"), norms)


@triton.jit
def current_scalars(
    scalars_ptr, addresses_ptr, values_ptr, n_scalars, tracks_ptr, program_ptr, table_ptr, n_tracks, max_rows, t,
    LANES: tl.constexpr,
):  # fmt: skip
    """Fill ``values``: the host's numbers, with the user's device tensors and the schedules in place of some."""
    lanes = tl.arange(0, LANES)
    for offset in range(0, n_scalars, LANES):
        at = offset + lanes
        mask = at < n_scalars
        value = tl.load(scalars_ptr + at, mask=mask, other=0.0)
        # The address of a tensor; its lowest bit says that the tensor is float64.
        address = tl.load(addresses_ptr + at, mask=mask, other=0)
        single = (address != 0) & ((address & 1) == 0)
        double = (address & 1) == 1
        narrow_ptr = tl.where(single, address, 0).to(tl.pointer_type(tl.float32), bitcast=True)
        wide_ptr = tl.where(double, address - 1, 0).to(tl.pointer_type(tl.float64), bitcast=True)
        value = tl.where(single, tl.load(narrow_ptr, mask=single, other=0.0).to(tl.float64), value)
        value = tl.where(double, tl.load(wide_ptr, mask=double, other=0.0), value)
        tl.store(values_ptr + at, value, mask=mask)
    tl.debug_barrier()
    for offset in range(0, n_tracks, LANES):
        at = offset + lanes
        mask = at < n_tracks
        target = tl.load(tracks_ptr + 3 * at, mask=mask, other=0)
        first = tl.load(tracks_ptr + 3 * at + 1, mask=mask, other=0)
        count = tl.load(tracks_ptr + 3 * at + 2, mask=mask, other=0)
        value = schedule_value(program_ptr, table_ptr, first, count, t, max_rows)
        tl.store(values_ptr + target, value, mask=mask & (count > 0))
    tl.debug_barrier()


def _name(specialization):
    """What a profiler shows: fused_decide_adam_row."""
    return f"fused_decide_{specialization.constants['ROW'].__name__}"


@triton.jit(
    repr=_name,
    do_not_specialize=["n_partials", "scale_offset", "n_tensors", "n_scalars", "n_tracks", "max_rows", "advance"],
)
def decide(
    partials_ptr,
    n_partials,
    scale_offset,
    norm_type,
    tensors_ptr,
    n_tensors,
    scalars_ptr,
    addresses_ptr,
    values_ptr,
    n_scalars,
    tracks_ptr,
    program_ptr,
    table_ptr,
    n_tracks,
    max_rows,
    clock_ptr,
    advance,
    rows_ptr,
    norm_ptr,
    skip_ptr,
    record_ptr,
    ROW: tl.constexpr,
    FACTOR: tl.constexpr,
    THRESHOLD: tl.constexpr,  # what makes max_norm of the norm and the record of earlier ones, or None
    SCOPE: tl.constexpr,
    MODE: tl.constexpr,
    GUARD: tl.constexpr,  # whether a non-finite norm leaves everything as it was
    COUNT: tl.constexpr,  # whether that is counted as a skipped step, as one that a scaler asks for is
    LAST: tl.constexpr,  # whether this is the last bucket of the step, which advances the clock
    SCALARS: tl.constexpr,
    FIELDS: tl.constexpr,
    CARRIED: tl.constexpr,  # how many numbers lie behind a tensor's step, which the row takes and returns first
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
):
    t = tl.load(clock_ptr)
    current_scalars(
        scalars_ptr, addresses_ptr, values_ptr, n_scalars, tracks_ptr, program_ptr, table_ptr, n_tracks, max_rows, t,
        LANES,
    )  # fmt: skip
    # The scalars of the groups, each with its sign behind them, then those of the clip, then those of the gradients.
    max_norm = tl.load(values_ptr + n_scalars - 6)
    eps = tl.load(values_ptr + n_scalars - 5)
    limit = tl.load(values_ptr + n_scalars - 4)
    # What the gradients are divided by: accumulated micro-batches, and the loss scale.
    inverse = 1.0 / (tl.load(values_ptr + n_scalars - 3) * tl.load(values_ptr + n_scalars - 2))
    found = tl.where(tl.load(values_ptr + n_scalars - 1) == 0.0, 0, 1).to(tl.int64)

    skipped = found
    norm = tl.full([], 0.0, tl.float64)
    if SCOPE != NOTHING or GUARD:
        norm = global_norm(partials_ptr, n_partials, scale_offset, norm_type, MODE) * inverse
        if SCOPE != NOTHING:
            tl.store(norm_ptr, norm.to(tl.float32))
        if GUARD:
            finite = (norm == norm) & (norm != float("inf"))
            skipped = tl.where(finite, found, 1)
    # 2 where a scaler has found an inf: nobody is to be told of that by an error.
    tl.store(skip_ptr, (skipped + found).to(tl.int32))
    if THRESHOLD is not None:
        # All buckets see the same record; the last one brings it up to date.
        max_norm = tl.minimum(max_norm, THRESHOLD(record_ptr, norm, eps, (advance != 0) & LAST & (found == 0)))

    lanes = tl.arange(0, LANES)
    for offset in range(0, n_tensors, LANES):
        at = offset + lanes
        mask = at < n_tensors
        group = tl.load(tensors_ptr + 4 * at, mask=mask, other=0)
        step_address = tl.load(tensors_ptr + 4 * at + 1, mask=mask, other=0)
        step_ptr = step_address.to(tl.pointer_type(tl.float32), bitcast=True)
        step = tl.load(step_ptr, mask=mask, other=0.0).to(tl.float64) + 1.0
        arguments = ()
        for i in tl.static_range(CARRIED):
            carried = tl.load(step_ptr + 1 + i, mask=mask, other=0.5).to(tl.float64)
            arguments = arguments + (carried,)  # noqa: RUF005
        for i in tl.static_range(SCALARS):
            scalar = tl.load(values_ptr + group * (SCALARS + 1) + i, mask=mask, other=0.5)
            arguments = arguments + (scalar,)  # noqa: RUF005
        sign = tl.load(values_ptr + group * (SCALARS + 1) + SCALARS, mask=mask, other=1.0)
        factor = tl.zeros([LANES], tl.float64) + inverse
        if SCOPE == GLOBAL:
            factor = factor * FACTOR(norm, max_norm, eps)
        if SCOPE == TENSOR:
            first = tl.load(tensors_ptr + 4 * at + 2, mask=mask, other=0)
            count = tl.load(tensors_ptr + 4 * at + 3, mask=mask, other=0)
            norms = tensor_norms(partials_ptr, first, count, scale_offset, norm_type, MODE, LANES) * inverse
            factor = factor * FACTOR(norms, max_norm, eps)
        numbers = ROW(step, *arguments)
        row_ptr = rows_ptr + at * (FIELDS + 2)
        for i in tl.static_range(FIELDS):
            tl.store(row_ptr + i, numbers[i].to(WIDE), mask=mask)
        tl.store(row_ptr + FIELDS, (factor * sign).to(WIDE), mask=mask)
        tl.store(row_ptr + FIELDS + 1, (limit + tl.zeros([LANES], tl.float64)).to(WIDE), mask=mask)
        for i in tl.static_range(CARRIED):
            kept = tl.where(skipped == 0, numbers[i], arguments[i])
            tl.store(step_ptr + 1 + i, kept.to(tl.float32), mask=mask)
        tl.store(step_ptr, (step - skipped).to(tl.float32), mask=mask)
    if LAST:
        tl.store(clock_ptr, t + advance * (1 - skipped))
        counted = found
        if COUNT:
            counted = skipped
        tl.store(clock_ptr + 1, tl.load(clock_ptr + 1) + counted)
