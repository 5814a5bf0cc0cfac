"""Storage formats: how a number of the arithmetic becomes one of memory; twins of ``fusedlr/codecs.py``.

A kernel is told the storage by one constant, FORMAT: the kind of the state, 8 times that of the weights, 64 where
random bits are needed, 128 times a mask of the slots without a sign. Behind the slots' columns of the pointer table
follow one for each array beside them: scales, what completes the weight; then, where random bits are needed, the
address of the step and the key of the tensor.
"""

import triton
import triton.language as tl

from .segments import block_of

__all__ = ["EXTRA_BYTES", "GROUP", "STATES", "WEIGHTS", "belongs", "columns", "decode", "element_bits",
           "encode", "format_of", "group_scales", "load_state", "load_weight", "merge", "murmur", "nearest",
           "nearest_away", "nearest_interpreted", "salted", "split", "step_key", "stochastic", "store_state",
           "store_weight"]  # fmt: skip

STATES = {"plain": 0, "noisy": 1, "int8": 2}
WEIGHTS = {"plain": 0, "noisy": 1, "master": 2, "split16": 3, "split8": 4, "noisy8": 5}
# Bytes of an element of what completes a weight.
EXTRA_BYTES: dict[str, set[int]] = {"plain": set(), "noisy": set(), "master": {4}, "split16": {2}, "split8": {1},
                                    "noisy8": {1}}  # fmt: skip
NOISY = tl.constexpr(1)
INT8 = tl.constexpr(2)
MASTER = tl.constexpr(2)
SPLIT16 = tl.constexpr(3)
NOISY8 = tl.constexpr(5)
GROUP = tl.constexpr(64)

SHIFT = tl.constexpr(20)
# The bits of d, and half a code less these: what rounds to the nearest code.
SIGNED_FIRST = tl.constexpr((127 - 16) << 23)
SIGNED_ROUND = tl.constexpr((1 << 19) - ((127 - 16) << 23))
UNSIGNED_FIRST = tl.constexpr((127 - 32) << 23)
UNSIGNED_ROUND = tl.constexpr((1 << 19) - ((127 - 32) << 23))
SIGN = tl.constexpr(-(1 << 31))
SIGNED_D = tl.constexpr(2.0**-16)
UNSIGNED_D = tl.constexpr(2.0**-32)
SIGNED_TOP = tl.constexpr(0.9375 - 2.0**-16)  # the value of the largest code
UNSIGNED_TOP = tl.constexpr(0.9375)
LEAST = tl.constexpr(2.0**-120)
NAN = tl.constexpr(0x7FC00000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)


def format_of(state: str, weights: str, unsigned: tuple[bool, ...]) -> int:
    """The constant FORMAT."""
    mask = sum(1 << i for i, is_unsigned in enumerate(unsigned) if is_unsigned) if state == "int8" else 0
    return STATES[state] + 8 * WEIGHTS[weights] + 64 * needs_noise(state, weights) + 128 * mask


def needs_noise(state: str, weights: str) -> bool:
    """Whether a step needs random bits."""
    return state == "noisy" or weights in ("noisy", "noisy8")


def columns(state: str, weights: str, slots: int) -> int:
    """How many columns of the pointer table follow those of the slots."""
    extra = weights not in ("plain", "noisy")
    return (slots if state == "int8" else 0) + extra + 2 * needs_noise(state, weights)


@triton.jit
def nearest(x, DTYPE: tl.constexpr):
    """Rounded to the nearest, ties to even: the hardware's own conversion."""
    return x.to(DTYPE)


@triton.jit
def nearest_interpreted(x, DTYPE: tl.constexpr):
    """``nearest`` in Triton's interpreter, whose own conversion to bfloat16 cuts digits off instead of rounding."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        rounded = tl.where(x == x, bits + 0x7FFF + even, 0x7FC00000)
        y = (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def murmur(x):
    """murmur3's finalizer, of uint32."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def step_key(tensor, step):
    """The key of a tensor's step: uint32 from a uint32 key and a float32 step."""
    return murmur(tensor + step.to(tl.int32).to(tl.uint32, bitcast=True) * 0x9E3779B9)


@triton.jit
def element_bits(key, offset, lanes):
    """32 random bits for each element of a block, as uint32; no block straddles a multiple of 2**32."""
    offset = tl.full([], offset, tl.int64)  # in the interpreter it is an int
    high = (offset >> 32).to(tl.uint32) * 0x9E3779B9
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    return murmur((low + lanes.to(tl.uint32)) ^ (key ^ high))


@triton.jit
def salted(noise, ARRAY: tl.constexpr, BITS: tl.constexpr):
    """BITS random bits for an array (0 the weight, then the slots), as int32."""
    if ARRAY == 0:
        r = noise * 0x9E3779B1
    elif ARRAY == 1:
        r = noise * 0x85EBCA77
    elif ARRAY == 2:
        r = noise * 0xC2B2AE3D
    elif ARRAY == 3:
        r = noise * 0x27D4EB2F
    else:
        r = noise * 0x165667B1
    return (r >> (32 - BITS)).to(tl.int32, bitcast=True)


@triton.jit
def bits_of(x):
    """The bit pattern of a float32 as int32, every NaN the same."""
    return tl.where(x == x, x.to(tl.int32, bitcast=True), NAN)


@triton.jit
def as_bfloat16(bits):
    """The upper 16 of 32 bits as a bfloat16."""
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def bits_of_bfloat16(p):
    """A bfloat16 as the upper 16 of 32 bits."""
    return p.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def nearest_away(w):
    """float32 to the nearest bfloat16, ties away from zero."""
    return as_bfloat16(bits_of(w) + 0x8000)


@triton.jit
def stochastic(x, DTYPE: tl.constexpr, noise):
    """float32 rounded to bfloat16 or float16, up or down, with 16 random bits."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        y = as_bfloat16(bits_of(x) + noise)
    else:
        exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
        unit = tl.maximum(exponent, (127 - 14) << 23) - (10 << 23)
        scaled = tl.abs(x) * ((254 << 23) - unit).to(tl.float32, bitcast=True)
        whole = tl.floor(scaled)
        up = tl.where((scaled - whole) * 65536.0 > noise.to(tl.float32), 1.0, 0.0)
        size = (whole + up) * unit.to(tl.float32, bitcast=True)
        sign = x.to(tl.int32, bitcast=True) & SIGN
        y = ((size.to(tl.int32, bitcast=True) & MAGNITUDE) | sign).to(tl.float32, bitcast=True).to(DTYPE)
    return y


@triton.jit
def split(w, BITS: tl.constexpr, half):
    """float32 as (bfloat16, its missing 16 or 8 bits); ``half`` is 0x80, or 8 random bits."""
    whole = bits_of(w)
    if BITS == 16:
        p = as_bfloat16(whole + 0x8000)
        low = (whole - bits_of_bfloat16(p)).to(tl.int16)
    else:
        whole = (whole + half) & -0x100
        p = as_bfloat16(whole + 0x8000)
        low = ((whole - bits_of_bfloat16(p)) >> 8).to(tl.int8)
    return p, low


@triton.jit
def merge(p, low, BITS: tl.constexpr):
    """The float32 that was split; the bits of another weight move p by half its spacing at most, and make no NaN."""
    upper = bits_of_bfloat16(p)
    whole = upper + (low.to(tl.int32) << (16 - BITS))
    fits = ((whole ^ upper) >= 0) & ((whole & MAGNITUDE) <= 0x7F800000)
    return tl.where(fits, whole, upper).to(tl.float32, bitcast=True)


@triton.jit
def belongs(w, p, ROUND: tl.constexpr, P: tl.constexpr):
    """Where p is the float32 w rounded to the nearest; of two that are equally near, either."""
    if P == tl.bfloat16:  # noqa: SIM300
        off = w.to(tl.int32, bitcast=True) - bits_of_bfloat16(p) + 0x8000
        good = (off >= 0) & (off <= 0x10000)
    else:
        good = ROUND(w, P) == p
    return good


@triton.jit
def load_weight(p_ptr, extra_ptr, offset, lanes, mask, ALIGNED: tl.constexpr, ROUND: tl.constexpr, P: tl.constexpr,
                WIDE: tl.constexpr, FORMAT: tl.constexpr, OTHER: tl.constexpr = None):  # fmt: skip
    """The weight of a block in WIDE; what is kept beside p counts only where it still belongs to p.

    OTHER, None or 0, is what masked lanes hold.
    """
    KIND: tl.constexpr = FORMAT // 8 % 8
    p = tl.load(block_of(p_ptr, offset, ALIGNED) + lanes, mask=mask, other=OTHER)
    if KIND < MASTER:
        w = p.to(WIDE)
    else:
        extra = tl.load(block_of(extra_ptr, offset, ALIGNED) + lanes, mask=mask, other=OTHER)
        if KIND == MASTER:
            w = tl.where(belongs(extra, p, ROUND, P), extra, p.to(tl.float32))
        else:
            w = merge(p, extra, 16 if KIND == SPLIT16 else 8)
    return w


@triton.jit
def store_weight(w, p_ptr, extra_ptr, noise, offset, lanes, mask, ALIGNED: tl.constexpr, ROUND: tl.constexpr,
                 P: tl.constexpr, FORMAT: tl.constexpr):  # fmt: skip
    """Store the weight of a block, and what completes it."""
    KIND: tl.constexpr = FORMAT // 8 % 8
    p_ptrs = block_of(p_ptr, offset, ALIGNED) + lanes
    if KIND < MASTER:
        if KIND == NOISY:
            tl.store(p_ptrs, stochastic(w, P, salted(noise, 0, 16)), mask=mask)
        else:
            tl.store(p_ptrs, ROUND(w, P), mask=mask)
    else:
        extra_ptrs = block_of(extra_ptr, offset, ALIGNED) + lanes
        if KIND == MASTER:
            tl.store(p_ptrs, ROUND(w, P), mask=mask)
            tl.store(extra_ptrs, w, mask=mask)
        else:
            half = salted(noise, 0, 8) if KIND == NOISY8 else 0x80
            p, low = split(w, 16 if KIND == SPLIT16 else 8, half)
            tl.store(p_ptrs, p, mask=mask)
            tl.store(extra_ptrs, low, mask=mask)


@triton.jit
def group_scales(x):
    """The largest magnitude of each row; NaN where there is one."""
    return tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def encode(x, UNSIGNED: tl.constexpr):
    """Rows of float32 as (8-bit codes as int8, scales), each to the nearest; what is not 0 stays so without a sign."""
    scales = group_scales(x)
    top = UNSIGNED_TOP if UNSIGNED else SIGNED_TOP
    counts = scales >= LEAST
    # A correctly rounded division would have a slow path, for which amsgrad's registers do not suffice on sm_100.
    inverse = tl.where(counts, top / tl.where(counts, scales, 1.0), 0.0)
    bits = x.to(tl.int32, bitcast=True)
    if UNSIGNED:
        shifted = (tl.abs(x) * inverse + UNSIGNED_D).to(tl.int32, bitcast=True)
        codes = tl.maximum((shifted + UNSIGNED_ROUND) >> SHIFT, tl.minimum(bits, 1))
    else:
        shifted = (tl.abs(x) * inverse + SIGNED_D).to(tl.int32, bitcast=True)
        negative = bits >> 31
        codes = (((shifted + SIGNED_ROUND) >> SHIFT) ^ negative) - negative
    return codes.to(tl.int8), scales


@triton.jit
def decode(codes, scales, UNSIGNED: tl.constexpr):
    """The float32 that rows of 8-bit codes mean."""
    if UNSIGNED:
        wide = codes.to(tl.uint8, bitcast=True).to(tl.int32)
        y = ((wide << SHIFT) + UNSIGNED_FIRST).to(tl.float32, bitcast=True) - UNSIGNED_D
        x = y * (scales * (1.0 / UNSIGNED_TOP))
    else:
        wide = codes.to(tl.int32)
        y = ((tl.abs(wide) << SHIFT) + SIGNED_FIRST).to(tl.float32, bitcast=True) - SIGNED_D
        y = y * (scales * (1.0 / SIGNED_TOP))
        x = (y.to(tl.int32, bitcast=True) ^ (wide & SIGN)).to(tl.float32, bitcast=True)
    return x


@triton.jit
def load_state(slot_ptr, scale_ptr, offset, lanes, left, mask, ALIGNED: tl.constexpr, SLOT: tl.constexpr,
               WIDE: tl.constexpr, FORMAT: tl.constexpr, OTHER: tl.constexpr = None):  # fmt: skip
    """A slot of a block in WIDE. Of 8-bit state a block is whole groups, a row each, but the last of a tensor."""
    loaded = tl.load(block_of(slot_ptr, offset, ALIGNED) + lanes, mask=mask, other=OTHER)
    if FORMAT % 8 == INT8:
        rows = tl.arange(0, lanes.shape[0])[:, None]
        scales = tl.load(scale_ptr + offset // GROUP + rows, mask=rows * GROUP < left, other=OTHER)
        x = decode(loaded, scales, (FORMAT // 128 >> SLOT) % 2)
    else:
        x = loaded.to(WIDE)
    return x


@triton.jit
def store_state(x, slot_ptr, scale_ptr, noise, offset, lanes, left, mask, ALIGNED: tl.constexpr, ROUND: tl.constexpr,
                SLOT: tl.constexpr, S: tl.constexpr, FORMAT: tl.constexpr):  # fmt: skip
    """Store a slot of a block."""
    slot_ptrs = block_of(slot_ptr, offset, ALIGNED) + lanes
    if FORMAT % 8 == INT8:
        rows = tl.arange(0, lanes.shape[0])[:, None]
        if not ALIGNED:  # else groups are whole, or not stored
            x = tl.where(mask, x, 0.0)
        codes, scales = encode(x, (FORMAT // 128 >> SLOT) % 2)
        tl.store(slot_ptrs, codes, mask=mask)
        tl.store(scale_ptr + offset // GROUP + rows, scales, mask=rows * GROUP < left)
    elif FORMAT % 8 == NOISY:
        tl.store(slot_ptrs, stochastic(x, S, salted(noise, 1 + SLOT, 16)), mask=mask)
    else:
        tl.store(slot_ptrs, ROUND(x, S), mask=mask)
