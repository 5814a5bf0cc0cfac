"""The pointer table: how the kernels find a tensor, and the chunk of it that a program is to treat.

A segment is a row of int64: parameter pointer, gradient pointer, numel, one pointer a state slot, and what a storage
format adds (``formats``). The chunk table has a row of two int32 a program: segment, and the number of the chunk within
it. Tensors' rows of numbers are found by the segment's number.
"""

import triton
import triton.language as tl

__all__ = ["GRAD", "HEAD", "NUMEL", "PARAM", "block_of", "chunk_of", "pointer"]

PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
NUMEL = tl.constexpr(2)
HEAD = tl.constexpr(3)  # columns before those of the state slots


@triton.jit
def pointer(address, DTYPE: tl.constexpr):
    """An int64 address as a pointer."""
    return address.to(tl.pointer_type(DTYPE), bitcast=True)


@triton.jit
def block_of(ptr, offset, ALIGNED: tl.constexpr):
    """Where a block starts. Told that it is aligned, the compiler loads 16 bytes at once."""
    block_ptr = ptr + offset
    if ALIGNED:
        block_ptr = tl.multiple_of(block_ptr, 16)
    return block_ptr


@triton.jit
def chunk_of(segments_ptr, chunks_ptr, program, chunk_size, WIDTH: tl.constexpr):
    """(number of the segment, its row in the table, first and one past the last element of the chunk)."""
    segment = tl.load(chunks_ptr + 2 * program)
    row = segments_ptr + segment.to(tl.int64) * WIDTH
    start = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * chunk_size
    numel = tl.load(row + NUMEL)
    stop = tl.minimum(start + chunk_size, numel)
    return segment, row, start, stop
