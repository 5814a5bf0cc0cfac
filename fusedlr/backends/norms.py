"""Norms on the PyTorch backend, kept in range and combined in float64.

A piece of a gradient contributes a pair (scale, sum): its share of ``sum |g|^p`` is ``scale**p * sum``. In the
ordinary case scale is 1. Where squares would overflow or vanish (1e200 and 1e-200 in float64) the piece is divided by
its largest magnitude first, so that a norm is non-finite only if an element is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

__all__ = ["ROW", "combine", "euclidean", "piece_sum", "row_norms", "rows_of"]

# Elements whose squares are accumulated in the gradients' dtype, float32 at least (rounding: up to 4e-6 of a row's
# norm where all are equal, 1e-7 to 6e-7 where they are random).
ROW = 4096
# Above this, a finite norm of many rows is as exact as its rows: no square overflowed, and what the rows lost to
# squares below 1e-45 is less than 1e-12 of the whole.
_LEAST = 1e-10
# So many norms are put together faster by Python than by another operator.
_FEW = 256
_LEAST_WIDE, _MOST_WIDE = 1e-280, 1e300


def piece_sum(x: Tensor, norm_type: float) -> tuple[float, float]:
    """(scale, sum) of a one-dimensional piece on the CPU."""
    narrow = x.dtype != torch.float64
    if norm_type == 2.0:
        x = x.double()
        total = torch.dot(x, x).item()
        # The squares of float32 numbers never leave the range of float64.
        if narrow or (_LEAST_WIDE < total < _MOST_WIDE):
            return 1.0, total
    if x.numel() == 0:
        return 1.0, 0.0
    largest = torch.linalg.vector_norm(x, math.inf).item()
    if norm_type == math.inf:
        return largest, 1.0
    if largest == 0.0 or not math.isfinite(largest):
        return 1.0, largest  # 0, inf or NaN: the sum itself
    ratios = (x.double() / largest).abs_()
    return largest, (torch.dot(ratios, ratios) if norm_type == 2.0 else ratios.pow_(norm_type).sum()).item()


def rows_of(numel: int) -> int:
    """The number of rows, the last of which may be shorter."""
    return -(-numel // ROW)


def row_norms(x: Tensor, out: Tensor) -> None:
    """The Euclidean norms of the rows of a flat gradient, all threads at work, and of what is left at its end."""
    whole, left = divmod(x.numel(), ROW)
    if whole:
        rows = (x[: whole * ROW] if left else x).view(-1, ROW)
        torch.linalg.vector_norm(rows, dim=1, dtype=out.dtype, out=out[:whole] if left else out)
    if left:
        torch.linalg.vector_norm(x[whole * ROW :] if whole else x, dtype=out.dtype, out=out[whole])


def euclidean(norms: Sequence[memoryview]) -> float | None:
    """The norm of row norms, or None where it must be found more carefully."""
    if sum(map(len, norms)) <= _FEW:
        norm = math.hypot(*chain.from_iterable(map(memoryview.tolist, norms)))
    else:
        each = (torch.from_numpy(np.asarray(x)) for x in norms)
        norm = math.hypot(*(torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in each))
    return norm if _LEAST < norm < math.inf else None


def combine(pairs: Iterable[tuple[float, float]], norm_type: float) -> float:
    """The norm that the pieces make together; inf or NaN only if a piece is."""
    # Pieces of nothing or of zeros say nothing; their scale 1 may be so far above the others that its power overflows.
    pairs = [pair for pair in pairs if pair[1] != 0.0]
    if any(math.isnan(scale) or math.isnan(total) for scale, total in pairs):
        return math.nan
    top = max((scale for scale, _ in pairs), default=0.0)
    if norm_type == math.inf or top == 0.0:
        return top
    if any(total == math.inf for _, total in pairs):
        return math.inf
    total = math.fsum(total * (scale / top) ** norm_type for scale, total in pairs)
    try:
        return top * (math.sqrt(total) if norm_type == 2.0 else total ** (1.0 / norm_type))
    except OverflowError:  # a small p
        return math.inf
