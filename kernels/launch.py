"""Launches: grids, constants and block sizes, in one place for the backend, the tests and aot.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adaptive, clipping, formats, rules
from .apply import apply
from .decide import GLOBAL, NOTHING, TENSOR, UNIT, decide
from .launcher import Launcher
from .measure import EUCLID, LARGEST, POWER, measure
from .segments import HEAD
from .step import step

__all__ = ["BLOCK", "DTYPES", "can_launch_step", "chunk_size_for", "launch_apply", "launch_decide", "launch_measure",
           "launch_step", "mode_for"]  # fmt: skip

# Kernels are interpreted or compiled as was decided when they were defined, whatever the environment says now.
INTERPRETED = not isinstance(apply, triton.runtime.JITFunction)
THREADS = 128  # of a program
NUM_WARPS = THREADS // (64 if torch.version.hip else 32)
BLOCK = 8 * THREADS  # 8 elements a thread: 16-byte accesses for float32 and bfloat16 alike
# 4 elements a thread: for float64, whose numbers take two registers each, and for 16-bit parameters beside float32
# state, in 8 and 16 bytes. With 8 elements Triton lays the two out in different ways, and every block goes through
# shared memory to get from one to the other.
HALF_BLOCK = 4 * THREADS
# Rules with so much alive at once that 8 elements a thread would take more than 64 registers.
WIDE_RULES = ("adadelta", "rmsprop_centered_momentum")
TAIL = BLOCK if INTERPRETED else THREADS  # the interpreter pays for each iteration, not for registers
LANES = 128  # tensors that a program of step looks at together
# Those of decide, which is one program for all tensors and waits for one number after the other: the more the faster.
DECIDE_THREADS = 512
DECIDE_WARPS = DECIDE_THREADS // (THREADS // NUM_WARPS)
# The programs of step must all be on the device at once. A bound on registers, which the compiler keeps, says how many
# fit whatever is compiled: 5 times 128 threads with 96 registers in the 65536 of a multiprocessor.
# With 80 the chunk loop of AdamW in float32 goes through local memory.
STEP_REGISTERS = 96
STEP_BLOCKS = 5

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}
# A schedule's value is the same on the host and in decide only if products are rounded before they are added. What that
# moves in step is far below a float32.
_measure = Launcher(measure, num_warps=NUM_WARPS, enable_fp_fusion=True)
_decide = Launcher(decide, num_warps=DECIDE_WARPS, enable_fp_fusion=False)
_apply = Launcher(apply, num_warps=NUM_WARPS, enable_fp_fusion=True)
_step = Launcher(step, num_warps=NUM_WARPS, maxnreg=STEP_REGISTERS, enable_fp_fusion=True, launch_cooperative_grid=True)
_of_step: dict[tuple[int, ...], dict[str, Any]] = {}  # compile-time arguments of step by the ids of its parts'
PLAIN: tuple[str, str, tuple[bool, ...]] = ("plain", "plain", ())
SCOPES = {None: NOTHING.value, "global": GLOBAL.value, "tensor": TENSOR.value, "unit": UNIT.value}


def wide(dtype: torch.dtype) -> Any:
    """The dtype of the arithmetic: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def mode_for(norm_type: float, dtypes: Sequence[torch.dtype]) -> int:
    """How measure sums: the fast way for Euclidean norms of float32 and narrower."""
    if norm_type == math.inf:
        return int(LARGEST.value)
    if norm_type == 2.0 and torch.float64 not in dtypes:
        return int(EUCLID.value)
    return int(POWER.value)


def chunk_size_for(numel: int) -> int:
    """Elements a program treats: enough programs to fill a GPU, and no more than it can schedule cheaply."""
    size = BLOCK
    while size < 32 * BLOCK and numel > size * 4096:
        size *= 2
    return size


@functools.cache
def measure_constants(dtype: torch.dtype, mode: int, width: int) -> dict[str, Any]:
    """The compile-time arguments of measure."""
    return {"G": DTYPES[dtype], "MODE": mode, "WIDTH": width, "BLOCK": BLOCK}


@functools.cache
def decide_constants(
    row_name: str,
    factor_name: str,
    scope: str | None,
    mode: int,
    *,
    guard: bool,
    count: bool,
    last: bool,
    n_row_scalars: int,
    n_fields: int,
    dtype: torch.dtype,
    threshold_name: str | None = None,
) -> dict[str, Any]:
    """The compile-time arguments of decide."""
    return {
        "ROW": getattr(rules, row_name),
        "FACTOR": getattr(clipping, factor_name),
        "THRESHOLD": getattr(adaptive, threshold_name) if threshold_name else None,
        "SCOPE": SCOPES[scope],
        "MODE": mode,
        "GUARD": guard,
        "COUNT": count,
        "LAST": last,
        "SCALARS": n_row_scalars,
        "FIELDS": n_fields,
        "CARRIED": rules.CARRIED.get(row_name, 0),
        "WIDE": wide(dtype),
        "LANES": DECIDE_THREADS,
    }


@functools.cache
def apply_constants(
    rule_name: str,
    hyper_name: str,
    *,
    clamp: bool,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    state_dtypes: tuple[torch.dtype, ...],
    storage: tuple[str, str, tuple[bool, ...]] = PLAIN,
    units: bool = False,
) -> dict[str, Any]:
    """The compile-time arguments of apply; the slots of a rule share one dtype.

    ``storage`` is (kind of the state, kind of the weights, which slots have no sign), as ``formats`` names them.
    """
    if len(set(state_dtypes)) > 1:
        raise ValueError(f"the state of a tensor must have one dtype, but got {list(state_dtypes)}")
    hyper, make_hyper = rules.HYPERS[hyper_name]
    state, weights, _ = storage
    sizes = {d.itemsize for d in (dtype, grad_dtype, *state_dtypes)} | formats.EXTRA_BYTES[weights]
    # Formats that keep so much alive that 8 elements a thread would take more than 64 registers.
    busy = 8 in sizes or rule_name in WIDE_RULES or state in ("noisy", "int8")
    return {
        "UNITS": units,
        "RULE": getattr(rules, rule_name),
        "HYPER": make_hyper,
        "CLIP": clipping.scale_and_clamp if clamp else clipping.scale,
        "ROUND": formats.nearest_interpreted if INTERPRETED else formats.nearest,
        "FIELDS": len(hyper._fields),
        "P": DTYPES[dtype],
        "G": DTYPES[grad_dtype],
        "S": DTYPES[state_dtypes[0] if state_dtypes else dtype],
        "SLOTS": len(state_dtypes),
        "WIDE": wide(dtype),
        "FORMAT": formats.format_of(*storage),
        "WIDTH": int(HEAD.value) + len(state_dtypes) + formats.columns(state, weights, len(state_dtypes)),
        "BLOCK": HALF_BLOCK if busy or len(sizes) > 1 else BLOCK,
        "TAIL": TAIL,
    }


def step_constants(measure: dict[str, Any], decide: dict[str, Any], apply: dict[str, Any]) -> dict[str, Any]:
    """The compile-time arguments of step: those of its parts, whose blocks may differ in size."""
    merged = {"MEASURE_BLOCK": measure["BLOCK"]} | measure | decide | apply | {"LANES": LANES}
    return {name: value for name, value in merged.items() if name not in ("THRESHOLD", "UNITS")}


def launch_measure(
    n_chunks: int,
    segments: Tensor,
    chunks: Tensor,
    partials: Tensor,
    first_partial: int,
    chunk_size: int,
    norm_type: float,
    dtype: torch.dtype,
    mode: int,
) -> None:
    """One partial a chunk into ``partials[:, first_partial:]`` (sums in row 0, scales in row 1)."""
    arguments = (segments, chunks, partials, partials.shape[1], first_partial, chunk_size, norm_type)
    _measure(n_chunks, arguments, measure_constants(dtype, mode, segments.shape[1]))


def launch_decide(
    partials: Tensor,
    n_partials: int,
    norm_type: float,
    tensors: Tensor,
    scalars: Tensor,
    addresses: Tensor,
    values: Tensor,
    tracks: Tensor,
    program: Tensor,
    table: Tensor,
    max_rows: int,
    clock: Tensor,
    advance: int,
    rows: Tensor,
    norm: Tensor,
    skip: Tensor,
    record: Tensor | None = None,
    **choices: Any,
) -> None:
    """One row a tensor into ``rows``, the norm, the decision to skip, and the counts of steps.

    ``choices`` are the arguments of ``decide_constants``.
    """
    arguments = (
        partials,
        n_partials,
        partials.shape[1],
        norm_type,
        tensors,
        tensors.shape[0],
        scalars,
        addresses,
        values,
        scalars.numel(),
        tracks,
        program,
        table,
        tracks.shape[0],
        max_rows,
        clock,
        advance,
        rows,
        norm,
        skip,
        record,
    )
    _decide(1, arguments, decide_constants(n_fields=rows.shape[1] - 2, **choices))


def launch_apply(
    n_chunks: int,
    segments: Tensor,
    chunks: Tensor,
    rows: Tensor,
    skip: Tensor,
    chunk_size: int,
    units: Tensor | None = None,
    factors: Tensor | None = None,
    **choices: Any,
) -> None:
    """One pass over parameters and state; with ``units``, each unit's gradient by its factor.

    ``choices`` are the other arguments of ``apply_constants``.
    """
    constants = apply_constants(units=units is not None, **choices)
    _apply(n_chunks, (segments, chunks, rows, skip, n_chunks, chunk_size, units, factors), constants)


def can_launch_step(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``launch_step`` can stand in for the three launches.

    Not for float64: contracted products in decide are lost in the rounding to a float32 row, but not in a float64 one.
    """
    nvidia = device.type == "cuda" and torch.version.hip is None
    return (INTERPRETED or nvidia) and dtype != torch.float64


@functools.cache
def _programs_at_once(device: torch.device) -> int:
    """How many programs of step fit on a device; the interpreter runs one after the other, and none could wait."""
    if INTERPRETED:
        return 1
    return STEP_BLOCKS * int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch_step(
    barrier: Tensor,
    n_chunks: int,
    segments: Tensor,
    chunks: Tensor,
    chunk_size: int,
    first_partial: int,
    partials: Tensor,
    n_partials: int,
    norm_type: float,
    tensors: Tensor,
    scalars: Tensor,
    addresses: Tensor,
    values: Tensor,
    tracks: Tensor,
    program: Tensor,
    table: Tensor,
    max_rows: int,
    clock: Tensor,
    advance: int,
    rows: Tensor,
    norm: Tensor,
    skip: Tensor,
    *,
    row_name: str,
    factor_name: str,
    scope: str | None,
    mode: int,
    guard: bool,
    count: bool,
    last: bool,
    n_row_scalars: int,
    dtype: torch.dtype,
    rule_name: str,
    hyper_name: str,
    clamp: bool,
    grad_dtype: torch.dtype,
    state_dtypes: tuple[torch.dtype, ...],
    storage: tuple[str, str, tuple[bool, ...]] = PLAIN,
) -> None:
    """The three launches in one; ``barrier`` is one int64 of the bucket, 0 before its first step."""
    parts = (
        measure_constants(grad_dtype, mode, segments.shape[1]),
        decide_constants(
            row_name,
            factor_name,
            scope,
            mode,
            guard=guard,
            count=count,
            last=last,
            n_row_scalars=n_row_scalars,
            n_fields=rows.shape[1] - 2,
            dtype=dtype,
        ),
        apply_constants(
            rule_name,
            hyper_name,
            clamp=clamp,
            dtype=dtype,
            grad_dtype=grad_dtype,
            state_dtypes=state_dtypes,
            storage=storage,
        ),
    )
    arguments = (
        barrier,
        segments,
        chunks,
        n_chunks,
        chunk_size,
        first_partial,
        partials,
        n_partials,
        partials.shape[1],
        norm_type,
        tensors,
        tensors.shape[0],
        scalars,
        addresses,
        values,
        scalars.numel(),
        tracks,
        program,
        table,
        tracks.shape[0],
        max_rows,
        clock,
        advance,
        rows,
        norm,
        skip,
    )
    key = tuple(map(id, parts))  # which are kept, each by its function
    constants = _of_step.get(key) or _of_step.setdefault(key, step_constants(*parts))
    _step(min(n_chunks, _programs_at_once(barrier.device)), arguments, constants)
