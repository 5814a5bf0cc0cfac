"""step: measure, decide and apply in one launch, for one bucket.

As many programs as fit on the device at once (a cooperative launch holds that) share out the chunks. Each measures its
own, then arrives at a barrier; the last to arrive decides and releases the others; each then applies its own, backward.
Partials and their order are those of the three launches, and so are all results.

The barrier is one int64 that only grows: by one for each arrival and by one for the release, so that every launch finds
a multiple of n_programs + 1 and nothing has to be reset, in a replayed graph neither.
"""

import triton
import triton.language as tl

from .apply import apply_chunk
from .decide import NOTHING, decide
from .measure import measure_chunk

__all__ = ["apply_share", "arrive", "measure_share", "release", "step", "wait"]


@triton.jit
def arrive(barrier_ptr, n_programs):
    """(the count that means released, whether all others have arrived before).

    What the threads of this program wrote is visible to whoever sees the arrival, and the last one sees all of it: the
    threads meet before one of them adds with release and acquire order, and again before the result is used.
    """
    tl.debug_barrier()
    ticket = tl.atomic_add(barrier_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    place = ticket % (n_programs + 1)
    return ticket - place + n_programs + 1, place == n_programs - 1


@triton.jit
def release(barrier_ptr):
    """Let the waiting programs go on; they see what this program wrote and saw."""
    tl.debug_barrier()
    tl.atomic_add(barrier_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(barrier_ptr, released):
    """Come back when the barrier has been released."""
    while tl.atomic_add(barrier_ptr, 0, sem="acquire", scope="gpu") < released:
        pass
    tl.debug_barrier()


@triton.jit
def measure_share(
    program, n_programs, segments_ptr, chunks_ptr, partials_ptr, scale_offset, first_partial, n_chunks, chunk_size,
    norm_type, G: tl.constexpr, MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Measure the chunks of one program: every n_programs-th."""
    for chunk in range(program, n_chunks, n_programs):
        measure_chunk(
            segments_ptr, chunks_ptr, partials_ptr, scale_offset, first_partial, chunk, chunk_size, norm_type,
            G, MODE, WIDTH, BLOCK,
        )  # fmt: skip


@triton.jit
def apply_share(
    program, n_programs, segments_ptr, chunks_ptr, rows_ptr, skip, n_chunks, chunk_size,
    RULE: tl.constexpr, HYPER: tl.constexpr, CLIP: tl.constexpr, ROUND: tl.constexpr, FIELDS: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr, FORMAT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Apply the chunks of one program, the one that it measured last first: it is still in the cache."""
    last = program + (n_chunks - 1 - program) // n_programs * n_programs
    for back in range(0, last + 1, n_programs):
        apply_chunk(
            segments_ptr, chunks_ptr, rows_ptr, skip, last - back, chunk_size, None, None, False,
            RULE, HYPER, CLIP, ROUND, FIELDS, P, G, S, SLOTS, WIDE, FORMAT, WIDTH, BLOCK, TAIL,
        )  # fmt: skip


def _name(specialization):
    """What a profiler shows: fused_step_adamw_fp32."""
    constants = specialization.constants
    return f"fused_step_{constants['RULE'].__name__}_{constants['P']}"


@triton.jit(
    repr=_name,
    do_not_specialize=["first_partial", "n_chunks", "chunk_size", "n_partials", "scale_offset", "n_tensors",
                       "n_scalars", "n_tracks", "max_rows", "advance"],
)  # fmt: skip
def step(
    barrier_ptr,
    segments_ptr,
    chunks_ptr,
    n_chunks,
    chunk_size,
    first_partial,
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
    ROW: tl.constexpr,
    FACTOR: tl.constexpr,
    SCOPE: tl.constexpr,
    MODE: tl.constexpr,
    GUARD: tl.constexpr,
    COUNT: tl.constexpr,
    LAST: tl.constexpr,
    SCALARS: tl.constexpr,
    CARRIED: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    MEASURE_BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    HYPER: tl.constexpr,
    CLIP: tl.constexpr,
    ROUND: tl.constexpr,
    FIELDS: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    if SCOPE != NOTHING or GUARD:
        measure_share(
            program, n_programs, segments_ptr, chunks_ptr, partials_ptr, scale_offset, first_partial, n_chunks,
            chunk_size, norm_type, G, MODE, WIDTH, MEASURE_BLOCK,
        )  # fmt: skip
    released, is_last = arrive(barrier_ptr, n_programs)
    if is_last:
        decide(
            partials_ptr, n_partials, scale_offset, norm_type, tensors_ptr, n_tensors, scalars_ptr, addresses_ptr,
            values_ptr, n_scalars, tracks_ptr, program_ptr, table_ptr, n_tracks, max_rows, clock_ptr, advance,
            rows_ptr, norm_ptr, skip_ptr, None, ROW, FACTOR, None, SCOPE, MODE, GUARD, COUNT, LAST, SCALARS, FIELDS,
            CARRIED, WIDE, LANES,
        )  # fmt: skip
        release(barrier_ptr)
    wait(barrier_ptr, released)
    apply_share(
        program, n_programs, segments_ptr, chunks_ptr, rows_ptr, tl.load(skip_ptr), n_chunks, chunk_size,
        RULE, HYPER, CLIP, ROUND, FIELDS, P, G, S, SLOTS, WIDE, FORMAT, WIDTH, BLOCK, TAIL,
    )  # fmt: skip
