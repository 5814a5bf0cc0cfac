"""Units, the rows of tensors: where their elements lie in memory, their norms, and the kernels' tables of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..state import Leaf
from .buckets import Bucket, send

__all__ = ["UnitTables", "joined_norm", "unit_grid", "unit_norms"]


def unit_grid(leaf: Leaf) -> tuple[int, int, int]:
    """A tensor's memory as a grid (outer, units, stride): element i belongs to unit ``i // stride % units``."""
    if len(leaf.shape) < 2 or leaf.shape[0] == 1 or leaf.numel == 0:
        return 1, int(leaf.numel > 0), leaf.numel
    units, stride = leaf.shape[0], leaf.strides[0]
    return leaf.numel // (units * stride), units, stride


def unit_norms(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The norm of each unit in float64; ``x`` is one dimension in the order of memory."""
    elements = x.view(grid)
    if x.numel() == 0 or x.dtype != torch.float64:
        norms: Tensor = torch.linalg.vector_norm(elements, dim=(0, 2), dtype=torch.float64)
        return norms
    # Squares of float64 may leave its range.
    top = elements.abs().amax(dim=(0, 2))
    divisor = torch.where((top > 0) & torch.isfinite(top), top, 1.0)
    norms = torch.linalg.vector_norm(elements / divisor.view(1, -1, 1), dim=(0, 2))
    return divisor * norms


class UnitTables:
    """What the kernels know of the units of a bucket, and where they put norms and factors."""

    def __init__(self, bucket: Bucket, first_partial: int) -> None:
        rows, pieces, blocks = [], [], []
        units = partials = 0
        for segment, leaf in enumerate(bucket.leaves):
            grid = unit_grid(leaf)
            _, size, stride = grid
            shape, fast, slow = _boxes(*grid)
            count = (-(-fast[1] // fast[2])) * (-(-slow[1] // slow[2])) if size else 0
            rows.append((stride, size, units, partials, count, shape, *fast, *slow))
            pieces.append(_grid_rows(segment, -(-size // (1, 32, 1024)[shape]), count))
            at_once = MANY_UNITS if count <= FEW else FEW_UNITS
            blocks.append(_grid_rows(segment, -(-size // at_once), 1)[:, :2])
            units += size
            partials += size * count
        table = np.array(rows, dtype=np.int64)
        all_pieces, all_blocks = np.concatenate(pieces), np.concatenate(blocks)
        self.n_programs, self.n_blocks = len(all_pieces), len(all_blocks)
        self.first_partial = first_partial
        self.table = send(table, bucket.device)
        self.pieces = send(all_pieces, bucket.device)
        self.blocks = send(np.ascontiguousarray(all_blocks), bucket.device)
        # NaN until measured: what no program wrote would show.
        self.norms = torch.full((2, max(1, partials)), float("nan"), dtype=torch.float64, device=bucket.device)
        self.factors = torch.full((max(1, units),), float("nan"), dtype=bucket.rows.dtype, device=bucket.device)


# As kernels/units.py has them, which is imported only where Triton is used; a test compares.
FEW, FEW_UNITS, MANY_UNITS = 8, 8, 1024

Axis = tuple[int, int, int]  # distance in memory, length, length of a piece


def _boxes(outer: int, units: int, stride: int) -> tuple[int, Axis, Axis]:
    """(shape of a block, its fast axis, its slow axis): pieces that suit units of many and of few elements.

    A block is [1, 1024], [32, 32] or [1024, 1] units times elements of the fast axis.
    """
    within, across = (1, stride), (units * stride, outer)
    if stride >= 1024:
        return 0, (*within, 8192), (*across, max(1, 8192 // stride))
    if stride >= 32:
        return 1, (*within, stride), (*across, 1024 // stride)
    if units >= 128:
        return 2, (*within, max(1, stride)), (*across, 64 // max(1, stride))
    # Few units of short runs, such as a transposed matrix with few rows: their elements lie across.
    return 1, (*across, 1024), (*within, max(1, stride))


def _grid_rows(segment: int, blocks: int, pieces: int) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """(segment, block, piece) for every block and piece."""
    block, piece = np.divmod(np.arange(blocks * pieces), max(1, pieces))
    return np.stack([np.full(blocks * pieces, segment), block, piece], axis=1).astype(np.int32)


def joined_norm(norms: Sequence[Tensor]) -> Tensor:
    """The norm of all units together, in float64."""
    each = torch.cat([norm.reshape(-1) for norm in norms])
    return unit_norms(each, (1, 1, len(each)))[0] if len(each) else each.new_zeros(())
