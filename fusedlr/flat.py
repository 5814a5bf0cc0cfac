"""Flat buffers: where parameters live, and one-dimensional views of tensors in the order of their memory.

Parameters move into pieces of a flat buffer, one after the other, each aligned to 16 elements and 128 bytes. A moved
parameter is a view over its slice of the piece with a *storage of its own* (through DLPack): saving, copying or
sharing it takes its own bytes along, never the piece. A piece lives as long as any of its tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

__all__ = ["SMALL", "Home", "aligned", "beginning", "dense_strides", "memory_view", "own_view", "rehome", "spare"]

_ALIGNMENT = 128
_PIECE_BYTES = 256 << 20
_SMALLEST_PIECE_BYTES = 1 << 20

# Tensors of at most so many elements lie side by side, before all others: they can then be stepped as one. To copy the
# gradient of a larger one takes longer than the calls that it saves (2**13 made a model of a million numbers 1.3 times
# as slow).
SMALL = 1 << 16

# The attribute of a storage, which lives as long as its memory, by which another optimizer knows that this is ours. (A
# weak reference to the parameter would forbid torch.utils.swap_tensors.)
_OURS = "_fusedlr_piece"


class Home(NamedTuple):
    """A tensor's place: ``piece[start : start + numel]``."""

    piece: Tensor
    start: int


def aligned(numel: int, dtype: torch.dtype) -> int:
    """numel rounded up to 16 elements and 128 bytes."""
    unit = max(16, _ALIGNMENT // dtype.itemsize)
    return -(-numel // unit) * unit


def beginning(memory: Tensor, numel: int) -> Tensor:
    """The first ``numel`` elements from a multiple of 128 bytes on, of ``spare`` more; a CPU allocates by 64 bytes."""
    start = -memory.data_ptr() % _ALIGNMENT // memory.element_size()
    return memory[start : start + numel]


def spare(dtype: torch.dtype) -> int:
    """Elements that an allocation needs more, to begin where ``beginning`` wants."""
    return _ALIGNMENT // dtype.itemsize


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides that ``torch.empty_like`` gives: the tensor's own where it is dense, else of the same order."""
    return torch.empty_like(tensor, device="meta").stride()


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory, each once (whatever the order of the dimensions)."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def memory_view(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory, as one dimension."""
    return tensor.as_strided((tensor.numel(),), (1,))


def own_view(flat: Tensor, start: int, numel: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """``flat[start : start+numel]`` in the given shape, with a storage of its own over the same memory."""
    return from_dlpack(to_dlpack(flat[start : start + numel])).as_strided(shape, strides)


def rehome(params: Iterable[Tensor]) -> dict[int, Home]:
    """Move the parameters that can be moved safely into flat pieces; their homes by ``id``.

    The pieces are an eighth of the bytes to be moved (at most 256 MiB, at least 1 MiB) and filled tensor by tensor,
    so that a model is never held twice. A tensor as large as a piece already is a buffer of its own and stays.
    """
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        if can_move(p):
            buckets.setdefault((p.device, p.dtype), []).append(p)
    homes: dict[int, Home] = {}
    for bucket in buckets.values():
        for batch in _pieces(bucket):
            _fill(batch, homes)
    return homes


def can_move(p: Tensor) -> bool:
    """Whether nothing else can see the memory of ``p``, so that moving it is unnoticed."""
    data = p.data
    if type(data) is not Tensor or data.layout != torch.strided or data.device.type not in ("cpu", "cuda", "xpu"):
        return False
    if not p.requires_grad or p.is_inference() or not data.is_floating_point():
        return False
    if data.numel() == 0 or not is_dense(data):
        return False
    if data.device.type == "cpu" and (data.is_shared() or (torch.cuda.is_initialized() and data.is_pinned())):
        return False
    if _references(data) > _references(torch.empty(0, device="cpu")):  # somebody holds the storage: all get one object
        return False
    storage = data.untyped_storage()
    if data.storage_offset() != 0 or storage.nbytes() != data.numel() * data.element_size():
        return False
    # Memory that torch cannot resize may belong to somebody else, such as a NumPy array, unless we put it there.
    if not storage.resizable() and not hasattr(storage, _OURS):
        return False
    # p, `data` and `storage` itself hold the storage; one holder more is a view of it somewhere else.
    return torch._C._storage_Use_Count(storage._cdata) <= 3


def _references(tensor: Tensor) -> int:
    return sys.getrefcount(tensor.untyped_storage())


def _pieces(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters that share one piece: the small ones first, each kind in the order given."""
    params = sorted(params, key=lambda p: p.numel() > SMALL)
    itemsize = params[0].element_size()
    total = sum(p.numel() for p in params) * itemsize
    limit = min(_PIECE_BYTES, max(_SMALLEST_PIECE_BYTES, total // 8)) // itemsize
    batch: list[Tensor] = []
    used = 0
    for p in params:
        size = aligned(p.numel(), p.dtype)
        if size > limit:
            continue
        if used + size > limit:
            yield batch
            batch, used = [], 0
        batch.append(p)
        used += size
    if batch:
        yield batch


def _fill(batch: list[Tensor], homes: dict[int, Home]) -> None:
    sizes = [aligned(p.numel(), p.dtype) for p in batch]
    total, dtype = sum(sizes), batch[0].dtype
    piece = beginning(torch.zeros(total + spare(dtype), dtype=dtype, device=batch[0].device), total)
    start = 0
    for p, size in zip(batch, sizes, strict=True):
        data = p.data
        piece[start : start + p.numel()].copy_(memory_view(data))
        p.data = own_view(piece, start, p.numel(), data.shape, data.stride())
        homes[id(p)] = Home(piece, start)
        setattr(p.untyped_storage(), _OURS, True)
        start += size
