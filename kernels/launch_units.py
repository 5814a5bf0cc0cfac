"""The two launches that find the factors of units (rows), beside those of ``launch``."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import DTYPES, NUM_WARPS, wide
from .units import unit_fold, unit_measure

__all__ = ["launch_unit_fold", "launch_unit_measure"]


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
    unit_measure[(n_programs,)](
        segments,
        units,
        pieces,
        norms,
        norms.shape[1],
        G=DTYPES[grad_dtype],
        P=DTYPES[dtype],
        WIDTH=segments.shape[1],
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


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
    unit_fold[(n_programs,)](
        units,
        blocks,
        norms,
        norms.shape[1],
        record,
        factors,
        partials,
        first_partial,
        partials.shape[1],
        WIDE=wide(dtype),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
