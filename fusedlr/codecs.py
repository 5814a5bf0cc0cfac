"""The storage formats as bits: the references of ``kernels/formats.py``, one function beside its twin of the same name.

Every format is made of integer operations on the bits of a float32, so that equal numbers give equal bits on every
device. For 8-bit state comes a division a group, whose last bits are a GPU's own: a number within 1e-6 of itself of the
middle between two codes may get the other one there.

*Random bits*: ``murmur(element ^ key)`` with murmur3's finalizer; the key is murmur of the tensor's key and its step.
Each array of a parameter multiplies the 32 bits by an odd constant of its own and takes the upper ones.

*Split weights*: a float32 is the bfloat16 nearest to it, ties away from zero, and a signed difference of the bit
patterns, which then fits 16 bits exactly. Eight bits hold the difference after the float32 was rounded to 24 bits.

*8-bit state*: codes of a float with 3 bits of mantissa, over the largest magnitude of a group of 64: with a sign 16
binades, without 32, the lowest of them linear down to 0. The constant d below is where the linear part begins:
``code(y) = bits(y + d) - bits(d)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .precision import GROUP, Storage

__all__ = ["belongs", "decode", "element_bits", "encode", "group_scales", "load_state", "load_weight", "merge",
           "missing", "murmur", "nearest_away", "other_bits", "salted", "split", "step_key", "stochastic",
           "store_state", "store_weight", "tensor_key"]  # fmt: skip

_GOLDEN = 0x9E3779B9
# Odd constants, one for the weight and one for each slot.
SALTS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)

SHIFT = 20  # bits of a float32 that a code lacks: 3 of its 23 remain
HALF = 1 << 19
SIGNED_D, UNSIGNED_D = 2.0**-16, 2.0**-32
# The value of the largest code, 127 or 255, before it is scaled; 2**-32 less is the same float32.
SIGNED_TOP, UNSIGNED_TOP = 0.9375 - 2.0**-16, 0.9375
# Groups below count as zero: the reciprocal must stay in range.
LEAST = 2.0**-120
NAN = 0x7FC00000


def _bits(x: float) -> int:
    """The bit pattern of a power of two below 1 as a float32."""
    return (127 + round(math.log2(x))) << 23


def _signed(constant: int) -> int:
    """A constant of 32 bits as an int32, in which torch multiplies with wrap-around."""
    return constant - (1 << 32) if constant >= 1 << 31 else constant


def _shifted(x: Tensor, bits: int) -> Tensor:
    """int32 shifted right as unsigned."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def murmur(x: Tensor) -> Tensor:
    """murmur3's finalizer: a bijection of 32 bits in which every input bit moves every output bit."""
    x = x ^ _shifted(x, 16)
    x = x * _signed(0x85EBCA6B)
    x = x ^ _shifted(x, 13)
    x = x * _signed(0xC2B2AE35)
    return x ^ _shifted(x, 16)


def tensor_key(seed: int, index: int) -> int:
    """32 bits for one tensor of an optimizer (splitmix64 of seed and index), as an int32."""
    mask = (1 << 64) - 1
    x = seed & mask
    for part in (seed >> 64, index):
        x = (x + part + 1) * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        x ^= x >> 31
    return _signed(x >> 32)


def step_key(tensor: Tensor, step: Tensor) -> Tensor:
    """The key of a tensor's step: int32 from an int32 key and a float32 step."""
    return murmur(tensor + step.to(torch.int32) * _signed(_GOLDEN))


def element_bits(key: Tensor, index: Tensor) -> Tensor:
    """32 random bits for each element, as int32; ``index`` is the int64 number of an element in its tensor."""
    high = (index >> 32).to(torch.int32) * _signed(_GOLDEN)
    return murmur((index & 0xFFFFFFFF).to(torch.int32) ^ (key ^ high))


def salted(noise: Tensor, array: int, bits: int) -> Tensor:
    """``bits`` random bits for array ``array`` (0 the weight, then the slots)."""
    return _shifted(noise * _signed(SALTS[array]), 32 - bits)


def bits_of(x: Tensor) -> Tensor:
    """The bit pattern of a float32 as int32, every NaN the same."""
    return torch.where(x.isnan(), NAN, x.view(torch.int32))


def _as_bfloat16(bits: Tensor) -> Tensor:
    """The upper 16 of 32 bits as a bfloat16."""
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _bits_of_bfloat16(p: Tensor) -> Tensor:
    return p.view(torch.int16).to(torch.int32) << 16


def nearest_away(w: Tensor) -> Tensor:
    """float32 to the nearest bfloat16, ties away from zero."""
    return _as_bfloat16(bits_of(w) + 0x8000)


def stochastic(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """float32 rounded to bfloat16 or float16, up or down, with 16 random bits: expectation x in the range of dtype."""
    if dtype == torch.bfloat16:
        return _as_bfloat16(bits_of(x) + noise)
    # In units of the last place, which for float16 is 2**-24 at least: exact powers of two.
    unit = (x.view(torch.int32) & 0x7F800000).clamp_min((127 - 14) << 23) - (10 << 23)
    scaled = x.abs() * ((254 << 23) - unit).view(torch.float32)
    whole = torch.floor(scaled)
    up = torch.where((scaled - whole) * 65536.0 > noise.to(torch.float32), 1.0, 0.0)
    return torch.copysign((whole + up) * unit.view(torch.float32), x).to(dtype)


def split(w: Tensor, bits: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float32 as (bfloat16, its missing 16 or 8 bits); with noise, 8 random bits, stochastically rounded to 24 bits."""
    whole = bits_of(w)
    if bits == 16:
        p = _as_bfloat16(whole + 0x8000)
        return p, (whole - _bits_of_bfloat16(p)).to(torch.int16)
    whole = (whole + (0x80 if noise is None else noise)) & -0x100
    p = _as_bfloat16(whole + 0x8000)
    return p, ((whole - _bits_of_bfloat16(p)) >> 8).to(torch.int8)


def merge(p: Tensor, low: Tensor) -> Tensor:
    """The float32 that was split; the bits of another weight move p by half its spacing at most, and make no NaN."""
    upper = _bits_of_bfloat16(p)
    whole = upper + (low.to(torch.int32) << 8 if low.dtype == torch.int8 else low.to(torch.int32))
    fits = ((whole ^ upper) >= 0) & ((whole & 0x7FFFFFFF) <= 0x7F800000)
    return torch.where(fits, whole, upper).view(torch.float32)


def belongs(w: Tensor, p: Tensor) -> Tensor:
    """Where p is the float32 w rounded to the nearest; of two that are equally near, either."""
    if p.dtype != torch.bfloat16:
        return w.to(p.dtype) == p
    off = w.view(torch.int32) - _bits_of_bfloat16(p) + 0x8000
    return (off >= 0) & (off <= 0x10000)


def missing(w: Tensor, p: Tensor, bits: int) -> Tensor:
    """The missing bits of w beside p, or beside its own nearest bfloat16 where p is none: it may be loaded later.

    Of two that are equally near, a cast has taken the even one. Above that, the bits end one float32 below w.
    """
    whole = bits_of(w)
    even = _as_bfloat16(whole + 0x7FFF + ((whole >> 16) & 1))
    upper = torch.where(belongs(w, p), _bits_of_bfloat16(p), _bits_of_bfloat16(even))
    low = (whole - upper).clamp_max(0x7FFF)
    return other_bits(low.to(torch.int16), bits)


def other_bits(low: Tensor, bits: int) -> Tensor:
    """16 missing bits rounded to 8, or 8 of them as 16, whatever they are missing from."""
    if low.dtype == torch.int8:
        return low if bits == 8 else low.to(torch.int16) << 8
    return low if bits == 16 else ((low.to(torch.int32) + 0x80) >> 8).clamp_max(127).to(torch.int8)


def load_weight(p: Tensor, extra: Tensor | None, weights: str) -> Tensor:
    """The float32 weight: what is kept beside p counts only where it still belongs to p."""
    if weights == "master":
        assert extra is not None
        return torch.where(belongs(extra, p), extra, p.to(torch.float32))
    return p.to(torch.float32) if extra is None else merge(p, extra)


def store_weight(w: Tensor, dtype: torch.dtype, weights: str, noise: Tensor | None) -> tuple[Tensor, ...]:
    """(parameter, what is kept beside it, if anything)."""
    if weights == "master":
        return w.to(dtype), w
    if weights == "split16":
        return split(w, 16)
    if weights in ("split8", "noisy8"):
        return split(w, 8, None if noise is None or weights == "split8" else salted(noise, 0, 8))
    if weights == "noisy":
        assert noise is not None
        return (stochastic(w, dtype, salted(noise, 0, 16)),)
    return (w.to(dtype),)


def group_scales(x: Tensor) -> Tensor:
    """The largest magnitude of each group of a flat float32; NaN where there is one."""
    magnitudes = x.view(torch.int32) & 0x7FFFFFFF
    padding = -x.numel() % GROUP
    if padding:
        magnitudes = torch.nn.functional.pad(magnitudes, (0, padding))
    return magnitudes.view(-1, GROUP).amax(dim=1).view(torch.float32)


def _spread(per_group: Tensor, numel: int) -> Tensor:
    return per_group.repeat_interleave(GROUP)[:numel]


def encode(x: Tensor, unsigned: bool) -> tuple[Tensor, Tensor]:
    """A flat float32 as (8-bit codes, scales), each to the nearest; what is not 0 stays so without a sign."""
    d, top = (UNSIGNED_D, UNSIGNED_TOP) if unsigned else (SIGNED_D, SIGNED_TOP)
    scales = group_scales(x)
    # A tensor on both sides: a number over a tensor is torch's reciprocal times the number, which rounds twice.
    inverse = torch.where(scales >= LEAST, scales.new_full((), top) / scales, 0.0)
    bits = x.view(torch.int32)
    shifted = (x.abs() * _spread(inverse, x.numel()) + d).view(torch.int32)
    codes = (shifted + (HALF - _bits(d))) >> SHIFT
    if unsigned:
        return torch.maximum(codes, bits.clamp_max(1)).to(torch.uint8), scales
    negative = bits >> 31
    return ((codes ^ negative) - negative).to(torch.int8), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 that flat 8-bit codes mean."""
    unsigned = codes.dtype == torch.uint8
    d, top = (UNSIGNED_D, UNSIGNED_TOP) if unsigned else (SIGNED_D, SIGNED_TOP)
    wide = codes.to(torch.int32)
    y = ((wide.abs() << SHIFT) + _bits(d)).view(torch.float32) - d
    y = y * _spread(scales * (1.0 / top), codes.numel())
    return y if unsigned else (y.view(torch.int32) ^ (wide & -(1 << 31))).view(torch.float32)


def load_state(slot: Tensor, scales: Tensor | None) -> Tensor:
    """A flat slot in float32."""
    return slot.to(torch.float32) if scales is None else decode(slot, scales)


def store_state(x: Tensor, storage: Storage, number: int, unsigned: bool, noise: Tensor | None) -> tuple[Tensor, ...]:
    """A flat slot of float32 as it is stored: (numbers,) or (codes, scales); ``number`` is the slot's."""
    if storage.state == "int8":
        return encode(x, unsigned)
    if storage.state == "noisy":
        assert noise is not None
        return (stochastic(x, storage.dtype, salted(noise, 1 + number, 16)),)
    return (x.to(storage.dtype),)
