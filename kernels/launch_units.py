"""The two launches that find the factors of units (rows), beside those of ``launch``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .launch import DTYPES, NUM_WARPS, wide
from .launcher import Launcher
from .units import unit_fold, unit_measure

__all__ = ["launch_unit_fold", "launch_unit_measure", "unit_fold_constants", "unit_measure_constants"]

_unit_measure = Launcher(unit_measure, num_warps=NUM_WARPS, enable_fp_fusion=True)
_unit_fold = Launcher(unit_fold, num_warps=NUM_WARPS, enable_fp_fusion=True)


@functools.cache
def unit_measure_constants(dtype: torch.dtype, grad_dtype: torch.dtype, width: int) -> dict[str, Any]:
    """The compile-time arguments of unit_measure."""
    return {"G": DTYPES[grad_dtype], "P": DTYPES[dtype], "WIDTH": width}


@functools.cache
def unit_fold_constants(dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of unit_fold."""
    return {"WIDE": wide(dtype)}


def launch_unit_measure(
    n_programs: int,
    segments: Tensor,
    units: Tensor,
    pieces: Tensor,
    norms: Tensor,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> None:
    """The norms of the pieces of all units: of gradients into row 0 of ``norms``, of weights into row 1."""
    constants = unit_measure_constants(dtype, grad_dtype, segments.shape[1])
    _unit_measure(n_programs, (segments, units, pieces, norms, norms.shape[1]), constants)


def launch_unit_fold(
    n_programs: int,
    units: Tensor,
    blocks: Tensor,
    norms: Tensor,
    record: Tensor,
    factors: Tensor,
    partials: Tensor,
    first_partial: int,
    dtype: torch.dtype,
) -> None:
    """The factor of each unit, and one partial of the global norm a program into ``partials[:, first_partial:]``."""
    width, offset = norms.shape[1], partials.shape[1]
    arguments = (units, blocks, norms, width, record, factors, partials, first_partial, offset)
    _unit_fold(n_programs, arguments, unit_fold_constants(dtype))
