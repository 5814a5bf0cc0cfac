"""The storage formats as bits: what they keep, what they round, and that both backends write the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fusedlr import codecs
from fusedlr.precision import GROUP

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 3.4e38, -3.39e38, 1e-45, -1e-40, 1.17e-38, 65504.0]
SALT = 0


def any_bits(n: int = 200_000) -> Tensor:
    """Float32 of every kind: random bit patterns, the special ones, and exact ties between two bfloat16."""
    bits = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64).to(torch.int32)
    ties = (bits[:1000] & -0x10000) | 0x8000
    return torch.cat([bits, ties, torch.tensor(SPECIAL).view(torch.int32)]).view(torch.float32)


def noise(n: int, step: float = 1.0, seed: int = 3, tensor: int = 5) -> Tensor:
    key = torch.tensor(codecs.tensor_key(seed, tensor), dtype=torch.int32)
    return codecs.element_bits(codecs.step_key(key, torch.tensor(step)), torch.arange(n))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# ---- split weights ---------------------------------------------------------------------------------------------------


def test_sixteen_bits_give_the_float32_back(seed: int) -> None:
    w = any_bits()
    p, low = codecs.split(w, 16)
    whole = codecs.merge(p, low)
    number = ~w.isnan()
    assert same_bits(whole[number], w[number]) and whole[~number].isnan().all()
    assert p.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(p.isnan(), w.isnan())
    # The nearest bfloat16, ties away from zero: beside torch's own conversion it differs in ties alone.
    differs = (p != w.bfloat16()) & number
    assert (w.view(torch.int32)[differs] & 0xFFFF == 0x8000).all() and differs.any()


def test_eight_bits_round_to_twenty_four(seed: int) -> None:
    w = any_bits()
    p, low = codecs.split(w, 8)
    whole = codecs.merge(p, low)
    ordinary = (w.abs() > 1.2e-38) & (w.abs() < 3.3e38)
    error = ((whole.double() - w.double()).abs() / w.double().abs())[ordinary]
    assert 0.99 * 2.0**-16 < error.max() <= 2.0**-16  # half of the last of 15 bits behind the point
    again = codecs.split(whole, 8)
    assert torch.equal(again[1], low) and torch.equal(again[0].view(torch.int16), p.view(torch.int16))


@pytest.mark.parametrize("bits", [16, 8])
def test_bits_of_another_weight_move_a_parameter_by_half_its_spacing_at_most(bits: int, seed: int) -> None:
    _, low = codecs.split(any_bits(), bits)
    # A parameter that somebody else has written: every bfloat16 there is, zeros and infinities beside any bits.
    p = torch.randint(-(2**15), 2**15, low.shape).to(torch.int16).view(torch.bfloat16)
    p[:2000], p[2000:4000], p[4000:6000] = 0.0, -0.0, math.inf
    whole = codecs.merge(p, low)
    assert torch.equal(whole.isnan(), p.isnan())
    finite = whole.isfinite() & p.isfinite()
    spacing = torch.clamp(p.float().abs() * 2.0**-7, min=2.0**-133).double()
    assert ((whole.double() - p.double()).abs()[finite] <= spacing[finite] / 2).all()
    assert (whole.sign() * p.sign() >= 0)[finite].all()


def test_missing_bits_are_those_of_the_nearest_bfloat16(seed: int) -> None:
    w = torch.randn(10_000)
    w[:99] = (w[:99].view(torch.int32) & -0x10000 | 0x8000).view(torch.float32)  # half-way between two
    p = codecs.nearest_away(w)
    assert same_bits(codecs.merge(p, codecs.missing(w, p, 16)), w)
    # One that was rounded to even, beside which a half does not quite fit; and one that is yet to be loaded, as a cast.
    even = w.bfloat16()
    assert torch.equal(codecs.missing(w, torch.zeros_like(p), 16), codecs.missing(w, even, 16))
    assert (even != p).any()
    beside = codecs.merge(even, codecs.missing(w, even, 16))
    assert torch.equal(beside[99:], w[99:]) and ((beside - w).abs() <= w.abs() * 2.0**-23).all()
    rounded = codecs.merge(p, codecs.missing(w, p, 8))
    # A weight almost half-way to the next bfloat16 cannot be rounded up to it: a whole of the last bits there.
    assert ((rounded - w).abs() <= w.abs() * 2.0**-15).all()


def test_a_master_copy_counts_only_where_it_rounds_to_the_parameter() -> None:
    half = 1.0 + 2.0**-8
    master = torch.tensor([1.001, 1.001, half, half, half, math.nan, 0.0, -3.4e38])
    p = torch.tensor([1.0, 2.0, 1.0, 1.0 + 2.0**-7, 1.0 - 2.0**-8, 3.0, 5.0, -math.inf], dtype=torch.bfloat16)
    expected = [float(master[0]), 2.0, half, half, 1.0 - 2.0**-8, 3.0, 5.0, float(master[-1])]
    assert codecs.load_weight(p, master, "master").tolist() == expected
    narrow = torch.tensor([1.0, 2.0], dtype=torch.float16)
    assert codecs.load_weight(narrow, torch.tensor([1.0001, 1.0001]), "master").tolist()[1] == 2.0
    assert float(codecs.load_weight(narrow, torch.tensor([1.0001, 1.0001]), "master")[0]) > 1.0


# ---- stochastic rounding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-5, 3e-7])  # float16 has subnormals below 6e-5
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, size: float, seed: int) -> None:
    n = 1 << 18
    x = torch.rand(8, dtype=torch.float64).mul(size).float()
    rounded = codecs.stochastic(x[:, None].expand(8, n).reshape(-1), dtype, codecs.salted(noise(8 * n), SALT, 16))
    rounded = rounded.view(8, n).double()
    below = torch.minimum(x.to(dtype).double(), rounded.amin(1))
    spacing = (rounded.amax(1) - rounded.amin(1)).clamp_min(1e-30)
    assert ((rounded - below[:, None]).remainder(spacing[:, None]) == 0).all(), "more than two neighbours"
    # The mean of n roundings, each off by half a spacing at most in quadratic mean: six deviations. 16 random bits
    # resolve a spacing to 2**-16.
    allowed = spacing * (6 * 0.5 / math.sqrt(n) + 2.0**-16)
    assert ((rounded.mean(1) - x.double()).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_needs_no_rounding_is_not_rounded(dtype: torch.dtype, seed: int) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = bits.view(dtype)
    rounded = codecs.stochastic(x.float(), dtype, codecs.salted(noise(len(x)), SALT, 16))
    assert torch.equal(rounded[~x.isnan()].view(torch.int16), bits[~x.isnan()]) and rounded[x.isnan()].isnan().all()


def test_eight_missing_bits_are_rounded_without_bias() -> None:
    n = 1 << 18
    w = torch.full((n,), 1.0 + 77 * 2.0**-23)  # 77/256 of the way to the next weight of 24 bits
    p, low = codecs.split(w, 8, codecs.salted(noise(n), SALT, 8))
    up = codecs.merge(p, low).double().sub(1.0).div(2.0**-15)
    assert set(up.tolist()) == {0.0, 1.0}
    assert abs(float(up.mean()) - 77 / 256) < 6 * 0.5 / math.sqrt(n)


def test_random_bits_are_uniform_and_unrelated() -> None:
    """Between arrays, steps, tensors and neighbours: correlations of 2**18 pairs are within six deviations of 0."""
    n = 1 << 18
    base = noise(n)
    streams = [codecs.salted(base, i, 16) for i in range(5)]
    streams += [codecs.salted(noise(n, step=2.0), 0, 16), codecs.salted(noise(n, tensor=6), 0, 16)]
    streams += [codecs.salted(noise(n, seed=4), 0, 16), streams[0].roll(1)]
    x = torch.stack(streams).double().div(65536).sub(0.5)
    assert (x.mean(1).abs() < 6 * math.sqrt(1 / 12 / n)).all()
    assert torch.allclose(x.var(1), torch.tensor(1 / 12).double(), rtol=0.02)
    related = torch.corrcoef(x) - torch.eye(len(x))
    assert related.abs().max() < 6 / math.sqrt(n)


def test_the_bits_are_those_of_the_specification() -> None:
    """murmur3's published finalizer, and keys that never change: a checkpoint continues with the same noise."""

    def murmur(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16

    key = codecs.tensor_key(7, 3) & 0xFFFFFFFF
    key = murmur((key + 12 * 0x9E3779B9) & 0xFFFFFFFF)
    tensor = torch.tensor(codecs.tensor_key(7, 3), dtype=torch.int32)
    index = torch.tensor([0, 1, 12345, 2**31 + 5, 2**33 + 9])
    got = codecs.element_bits(codecs.step_key(tensor, torch.tensor(12.0)), index)
    expected = [murmur((i & 0xFFFFFFFF) ^ key ^ ((i >> 32) * 0x9E3779B9 & 0xFFFFFFFF)) for i in index.tolist()]
    assert [g & 0xFFFFFFFF for g in got.tolist()] == expected
    keys = {codecs.tensor_key(seed, i) for seed in (0, 1, 2**70) for i in range(1000)}
    assert len(keys) > 2990  # 3000 of 2**32


# ---- 8-bit state -----------------------------------------------------------------------------------------------------


def spread(n: int, unsigned: bool) -> Tensor:
    """Magnitudes over some decades within each group, as moments have them."""
    x = torch.randn(n) * torch.exp(2 * torch.randn(n)) * 1e-4
    return x.square() if unsigned else x


@pytest.mark.parametrize("n", [1, 63, 64, 65, 5000])
@pytest.mark.parametrize("unsigned", [False, True])
def test_eight_bits_keep_three_digits_of_the_mantissa(unsigned: bool, n: int, seed: int) -> None:
    x = spread(n, unsigned)
    codes, scales = codecs.encode(x, unsigned)
    assert codes.dtype == (torch.uint8 if unsigned else torch.int8) and scales.shape == (-(-n // GROUP),)
    largest = scales.repeat_interleave(GROUP)[:n].double()
    error = (codecs.decode(codes, scales).double() - x.double()).abs()
    # Half of the last of three bits, of x and of where the linear part begins (2**-16 or 2**-32 of 16/15 the largest).
    d = largest * (2.0**-32 if unsigned else 2.0**-16) / 0.9375
    # What is not 0 stays so without a sign: as the smallest code, an eighth of d, up to the rounding of the scale.
    least = d / 8 * (1 + 2.0**-22) if unsigned else torch.zeros(n)
    assert (error <= torch.maximum((x.double().abs() + d) * 2.0**-4 * (1 + 1e-5), least)).all()
    top = x.abs() == scales.repeat_interleave(GROUP)[:n]
    assert (error[top] <= largest[top] * 2.0**-22).all(), "the largest of a group is exact but for its last bits"
    again, scales_again = codecs.encode(codecs.decode(codes, scales), unsigned)
    assert torch.equal(again, codes)
    torch.testing.assert_close(scales_again, scales, rtol=2.0**-22, atol=0)


def test_zeros_and_signs_stay(seed: int) -> None:
    x = spread(640, False)
    x[::3] = 0.0
    codes, scales = codecs.encode(x, False)
    assert (codes[::3] == 0).all() and (codes * x.sign() >= 0).all() and (codes != -128).all()
    square, scales = codecs.encode(x.square(), True)
    assert (square[::3] == 0).all()
    tiny = torch.zeros(64)
    tiny[:2] = torch.tensor([1.0, 1e-30])
    assert codecs.encode(tiny, True)[0][1] == 1, "a second moment that is not 0 must not be divided by as 0"
    codes, scales = codecs.encode(torch.zeros(100), True)
    assert not codes.any() and not codecs.decode(codes, scales).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_with_something_non_finite_shows_it(bad: float) -> None:
    x = torch.ones(128)
    x[70] = bad
    back = codecs.decode(*codecs.encode(x, False))
    assert not back[70].isfinite()
    torch.testing.assert_close(back[:64], x[:64])


# ---- twins -----------------------------------------------------------------------------------------------------------

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from fusedlr.kernels import formats, launch  # noqa: E402
from kernel_tables import DEVICE  # noqa: E402

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="compiled, a product and a sum are rounded as one")


@triton.jit
def _run_codes(x_ptr, codes_ptr, scales_ptr, back_ptr, UNSIGNED: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    lanes = rows * 64 + tl.arange(0, 64)[None, :]
    codes, scales = formats.encode(tl.load(x_ptr + lanes), UNSIGNED)
    tl.store(codes_ptr + lanes, codes)
    tl.store(scales_ptr + rows, scales)
    tl.store(back_ptr + lanes, formats.decode(codes, scales, UNSIGNED))


@triton.jit
def _run_bits(x_ptr, bits_ptr, p16_ptr, low16_ptr, p8_ptr, low8_ptr, whole_ptr, bf16_ptr, fp16_ptr, tensor, step,
              offset, N: tl.constexpr):  # fmt: skip
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes)
    key = formats.step_key(tl.full([], tensor, tl.int64).to(tl.uint32), tl.full([], step, tl.float32))
    noise = formats.element_bits(key, offset, lanes)
    tl.store(bits_ptr + lanes, noise.to(tl.int32, bitcast=True))
    p, low = formats.split(x, 16, 0)
    tl.store(p16_ptr + lanes, p)
    tl.store(low16_ptr + lanes, low)
    p, low = formats.split(x, 8, formats.salted(noise, 0, 8))
    tl.store(p8_ptr + lanes, p)
    tl.store(low8_ptr + lanes, low)
    tl.store(whole_ptr + lanes, formats.merge(p, low, 8))
    tl.store(bf16_ptr + lanes, formats.stochastic(x, tl.bfloat16, formats.salted(noise, 1, 16)))
    tl.store(fp16_ptr + lanes, formats.stochastic(x, tl.float16, formats.salted(noise, 2, 16)))


@interpreted
@pytest.mark.parametrize("unsigned", [False, True])
def test_both_backends_write_the_same_codes(unsigned: bool, seed: int) -> None:
    x = spread(4096, unsigned).to(DEVICE)
    x[::7] = 0.0
    # A third of them within two float32 of the middle between two codes, where one rounding more decides.
    chosen, scales = codecs.encode(x, unsigned)
    first = codecs.UNSIGNED_D if unsigned else codecs.SIGNED_D
    top = codecs.UNSIGNED_TOP if unsigned else codecs.SIGNED_TOP
    lower = (chosen.int().abs() << codecs.SHIFT) + codecs.HALF + torch.tensor(first).view(torch.int32)
    middle = (lower.view(torch.float32) - first).double() * scales.repeat_interleave(64).double() / top
    jitter = torch.randint(-2, 3, (4096,), dtype=torch.int32, device=DEVICE)
    middle = (middle.float().view(torch.int32) + jitter).view(torch.float32)
    between = (x != 0.0) & (x.abs() < scales.repeat_interleave(64) / 2) & (torch.rand(4096, device=DEVICE) < 0.4)
    x = torch.where(between, torch.copysign(middle, x), x)
    codes = torch.empty(4096, dtype=torch.int8, device=DEVICE)
    scales, back = torch.empty(64, device=DEVICE), torch.empty(4096, device=DEVICE)
    _run_codes[(1,)](x, codes, scales, back, unsigned, 64)
    expected, expected_scales = codecs.encode(x, unsigned)
    assert torch.equal(codes, expected.view(torch.int8)) and torch.equal(scales, expected_scales)
    assert same_bits(back, codecs.decode(expected, expected_scales))


@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
@pytest.mark.parametrize("offset", [0, 4096, 2**33 + 1024])
def test_both_backends_write_the_same_bits(offset: int, seed: int) -> None:
    n = 1 << 16
    x = any_bits(n)[-n:].to(DEVICE)
    dtypes = [torch.int32, torch.bfloat16, torch.int16, torch.bfloat16, torch.int8, torch.float32, torch.bfloat16]
    bits, p16, low16, p8, low8, whole, bf16 = (torch.empty(n, dtype=d, device=DEVICE) for d in dtypes)
    fp16 = torch.empty(n, dtype=torch.float16, device=DEVICE)
    tensor = codecs.tensor_key(11, 4)
    _run_bits[(1,)](x, bits, p16, low16, p8, low8, whole, bf16, fp16, tensor, 21.0, offset, n)
    key = codecs.step_key(torch.tensor(tensor, dtype=torch.int32), torch.tensor(21.0)).to(DEVICE)
    random = codecs.element_bits(key, offset + torch.arange(n, device=DEVICE))
    assert torch.equal(bits, random)
    expected = [*codecs.split(x, 16), *codecs.split(x, 8, codecs.salted(random, 0, 8))]
    expected.append(codecs.merge(expected[2], expected[3]))
    expected += [codecs.stochastic(x, d, codecs.salted(random, i, 16)) for i, d in ((1, bf16.dtype), (2, fp16.dtype))]
    for got, wanted in zip((p16, low16, p8, low8, whole, bf16, fp16), expected, strict=True):
        if got.dtype.is_floating_point:
            assert torch.equal(got.isnan(), wanted.isnan())
            got, wanted = got.nan_to_num(0.0, 1e30, -1e30), wanted.nan_to_num(0.0, 1e30, -1e30)
        assert torch.equal(got, wanted)
