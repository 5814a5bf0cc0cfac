"""Norms on the PyTorch backend, kept in range and combined in float64.

A piece of a gradient contributes a pair (scale, sum): its share of ``sum |g|^p`` is ``scale**p * sum``. In the
ordinary case scale is 1. Where squares would overflow or vanish (1e20 and 1e-30 in float32) the piece is divided by
its largest magnitude first, so that a norm is non-finite only if an element is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["combine", "euclidean", "piece_sum"]

# Sums of squares of float32 between these are as exact as float32 is: no square among them overflowed, and the squares
# that fell below 1e-45 are too small to matter.
_LEAST, _MOST = 1e-24, 1e38
# The same for many rows at once: what a row can lose is then below 1e-12 of the whole.
_LEAST_TOTAL = 1e-20
ROW = 4096


def piece_sum(x: Tensor, norm_type: float) -> tuple[float, float]:
    """(scale, sum) of a one-dimensional piece on the CPU, short enough for float32 to accumulate (2**18 elements)."""
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    if norm_type == 2.0:
        total = torch.dot(x, x).item()
        if (_LEAST < total < _MOST) or (total == 0.0 and not x.any()):
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


def euclidean(flats: Iterable[Tensor]) -> float | None:
    """The sum of squares of float32 or float64 gradients in one pass, or None where it must be found more carefully.

    Rows of 4096 elements are accumulated in the gradients' dtype (rounding: 1e-7 of a row's norm in float32), the rows
    in float64.
    """
    norms = []
    for x in flats:
        if x.dtype not in (torch.float32, torch.float64):
            return None
        whole = x.numel() // ROW * ROW
        if whole:
            norms.append(torch.linalg.vector_norm((x if whole == x.numel() else x[:whole]).view(-1, ROW), dim=1))
        if whole < x.numel():
            norms.append(torch.linalg.vector_norm(x[whole:] if whole else x).view(1))
    if not norms:
        return 0.0
    each = torch.cat(norms).double()
    total = torch.dot(each, each).item()
    return total if _LEAST_TOTAL < total < math.inf else None


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
    return top * (math.sqrt(total) if norm_type == 2.0 else total ** (1.0 / norm_type))
