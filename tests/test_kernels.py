"""measure, apply and the storage formats, launched by themselves on hand-made tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from fusedlr.kernels import launch  # noqa: E402
from kernel_tables import DEVICE, Guarded, applied, measured  # noqa: E402
from test_twins import RULES  # noqa: E402

# Triton's interpreter computes with numpy, which warns of what these tests do on purpose: inf - inf, 0*inf.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

SIZES = [1, 1023, 1024, 1025, 3000]
NARROW = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*NARROW, torch.float64]

# A sum of n positive float32 terms: one rounding for each square, at most 22 additions deep within a block (numpy sums
# 128 terms in 8 lanes, then in pairs; a GPU sums less deep), one more for each further block of the chunk.
EUCLID_RTOL = (1 + 22 + 4) * 2.0**-24
# Any other norm is summed in float64; its exponent p travels as float32, where 3.5 is exact.
POWER_RTOL = 1e-12


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def combined(sums: Tensor, scales: Tensor, norm_type: float) -> float:
    """The norm that partials mean, in float64."""
    if norm_type == math.inf:
        return float(scales.max())
    top = float(scales.max())
    return top * float((sums * (scales / top) ** norm_type).sum()) ** (1 / norm_type)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0, 3.5])
def test_partials_are_the_norms_of_the_chunks(norm_type: float, dtype: torch.dtype, numel: int, seed: int) -> None:
    around = Guarded(torch.randn(numel).to(dtype))
    around.whole[around.whole == -123.0] = math.nan  # whoever reads outside the gradient gets a NaN
    g = around.inside
    sums, scales = measured([g], norm_type)
    assert len(sums) == -(-numel // 1024)
    for i, chunk in enumerate(g.double().split(1024)):
        expected = float(torch.linalg.vector_norm(chunk, norm_type))
        got = combined(sums[i : i + 1], scales[i : i + 1], norm_type)
        rtol = EUCLID_RTOL if launch.mode_for(norm_type, [dtype]) == 0 else POWER_RTOL
        assert got == pytest.approx(expected, rel=rtol, abs=0)


@pytest.mark.parametrize("chunk_size", [1024, 2048, 4096])
def test_several_tensors_and_chunks(chunk_size: int, seed: int) -> None:
    grads = [torch.randn(n, device=DEVICE) for n in (5000, 1, 4096, 17)]
    sums, scales = measured(grads, chunk_size=chunk_size)
    expected = [float(c.double().square().sum()) for g in grads for c in g.split(chunk_size)]
    torch.testing.assert_close(sums.cpu(), torch.tensor(expected).double(), rtol=EUCLID_RTOL, atol=0)
    assert (scales == 1).all()


@pytest.mark.parametrize("offset", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", NARROW, ids=short)
def test_gradients_at_odd_addresses(dtype: torch.dtype, offset: int, seed: int) -> None:
    around = Guarded(torch.randn(2500).to(dtype), offset)
    assert around.inside.data_ptr() % 16 != 0
    aligned = around.inside.clone()
    sums, _ = measured([around.inside])
    torch.testing.assert_close(sums, measured([aligned])[0], rtol=EUCLID_RTOL, atol=0)


EXTREMES = {
    "1e20": [1e20, -3e20],
    "1e-30": [1e-30, 2e-30],
    "1e-45": [1e-45, 3e-45, -1e-45],
    "largest float32": [3.4028234e38] * 40,
    "big and small": [1e20, 1.0, 1e-30, 1e-45],
    "small and ordinary": [1e-30, 1e-3, -1e-20],
    "at the largest that is summed plainly": [2.0**50, 2.0**-50],
    "just beyond it": [2.0**50 * (1 + 2**-23), 2.0**50, 2.0**-50],
    "at the smallest plain sum": [2.0**-40],
    "just below it": [2.0**-40 * (1 - 2**-24), 2.0**-126],
    "only small ones": [2.0**-51, 1e-40],
    "zeros": [0.0, -0.0],
}


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0, 3.5, 40.0])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_magnitudes_keep_their_norm(name: str, norm_type: float) -> None:
    g = torch.zeros(1100)
    g[: len(EXTREMES[name])] = torch.tensor(EXTREMES[name])
    wide = g.double()
    top = float(wide.abs().max())
    expected = top * float(torch.linalg.vector_norm(wide / (top or 1.0), norm_type))
    sums, scales = measured([g.to(DEVICE)], norm_type)
    # The second chunk is all zeros, and must not spoil the first.
    used = sums > 0
    got = combined(sums[used], scales[used], norm_type) if used.any() else 0.0
    if norm_type == math.inf:
        got = float(scales.max())
    assert got == pytest.approx(expected, rel=EUCLID_RTOL if norm_type == 2.0 else POWER_RTOL, abs=0)


@pytest.mark.parametrize("numel", [7, 4096])
def test_a_norm_keeps_its_digits_at_every_magnitude(numel: int, seed: int) -> None:
    """From the smallest number of float32 to the largest, in steps of 2**5, each mixed with what is much smaller."""
    for exponent in range(-149, 128, 5):
        g = (1.0 + torch.rand(numel, dtype=torch.float64)) * 2.0 ** (exponent - 1)
        g[::3] *= 2.0**-40
        g = g.float().to(DEVICE)
        sums, scales = measured([g], chunk_size=4096)
        expected = float(torch.linalg.vector_norm(g.double()))
        assert combined(sums, scales, 2.0) == pytest.approx(expected, rel=EUCLID_RTOL, abs=0), exponent


def test_fp16_and_bf16_norms_that_their_own_dtype_could_not_hold() -> None:
    least = 1e-37 if launch.INTERPRETED else 1e-40  # the interpreter makes 0 of bfloat16's subnormal numbers
    for dtype, value in ((torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float16, 6e-8), (torch.bfloat16, least)):
        g = torch.full((2000,), value, dtype=dtype, device=DEVICE)
        sums, scales = measured([g])
        assert combined(sums, scales, 2.0) == pytest.approx(float(g[0]) * math.sqrt(2000), rel=EUCLID_RTOL, abs=0)


@pytest.mark.parametrize("numel", [5, 1024, 2100])
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0, 3.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_non_finite_if_and_only_if_an_element_is(dtype: torch.dtype, norm_type: float, numel: int) -> None:
    for bad in (math.inf, -math.inf, math.nan):
        g = torch.full((numel,), torch.finfo(dtype).max / 2, dtype=dtype, device=DEVICE)
        sums, scales = measured([g], norm_type)
        assert sums.isfinite().all() and scales.isfinite().all()
        g[numel - 1] = bad
        sums, scales = measured([g], norm_type)
        seen = (scales if norm_type == math.inf else sums)[-1]
        assert math.isnan(seen) if math.isnan(bad) else seen == math.inf
        assert sums[:-1].isfinite().all() and scales[:-1].isfinite().all()


@pytest.mark.parametrize("norm_type", [2.0, 3.5, math.inf])
def test_a_nan_beside_an_inf_is_a_nan(norm_type: float) -> None:
    g = torch.ones(1500, device=DEVICE)
    g[3], g[4] = math.inf, math.nan
    sums, scales = measured([g], norm_type)
    assert math.isnan((scales if norm_type == math.inf else sums)[0])


def test_measuring_again_gives_the_same_bits(seed: int) -> None:
    g = torch.randn(3000, device=DEVICE) * torch.logspace(-30, 20, 3000, device=DEVICE)
    for norm_type in (2.0, 3.5):
        first = torch.stack(measured([g], norm_type))
        assert all(torch.equal(torch.stack(measured([g], norm_type)), first) for _ in range(2))


def hyper(name: str, step: int) -> Any:
    """A row with every number in use."""
    rule = RULES[name]
    scalars = {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.3, "nesterov": 0.0}
    scalars |= {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "alpha": 0.9, "rho": 0.9, "lr_decay": 0.1}
    scalars |= {"momentum_decay": 0.3, "mu_product": 0.4, "trust_coefficient": 0.5, "bias_correction": 1.0}
    scalars |= {"grad_averaging": 1.0, "trust_clip": 0.0}
    return rule.row(step, *(scalars[s] for s in (*rule.carried, *rule.scalars)))


def state_for(name: str, numel: int, dtype: torch.dtype) -> list[Tensor]:
    signed = {"momentum_buffer", "exp_avg"}  # the gradient's average as 0: its square is never above the squares'
    return [
        torch.randn(numel).mul(1 if s in signed else 0).add(0 if s in signed or s == "grad_avg" else 1).to(dtype)
        for s in RULES[name].slots
    ]


def reference(
    name: str, h: Any, p: Tensor, g: Tensor, state: list[Tensor], factor: float, limit: float
) -> list[Tensor]:
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    g = (g.to(wide) * factor).clamp(-limit, limit)
    return list(RULES[name].update(p.to(wide), g, *(s.to(wide) for s in state), h))


# The kernel and the reference do the same operations in the same order. The interpreter rounds each of them, as PyTorch
# does, whose square root on the CPU alone is an ulp off for some numbers: one ulp in the root, one in the quotient.
# A GPU fuses products into sums, which moves each of the at most eight roundings by half an ulp of the largest term.
# So do PyTorch's own fused operators (lerp, addcmul, addcdiv) in the references of all rules but these.
ULPS = 2 if launch.INTERPRETED else 8
UNFUSED = ("sgd", "sgd_momentum", "adam", "adam_amsgrad", "adamw", "adamw_amsgrad")


def assert_same(got: Tensor, expected: Tensor, terms: Tensor, *, exact: bool) -> None:
    """Equal within ULPS of the largest term (``expected`` in the arithmetic's dtype), then rounded to nearest.

    Without a square root on the way (``exact``), the interpreter gives the same bits.
    """
    eps = torch.finfo(expected.dtype).eps
    slack = (
        (0 if exact and launch.INTERPRETED else ULPS)
        * eps
        * torch.maximum(expected.abs(), terms.to(expected.dtype).abs())
    )
    low, high = (expected - slack).to(got.dtype), (expected + slack).to(got.dtype)
    wrong = ~(((low <= got) & (got <= high)) | (got.isnan() & expected.isnan()))
    assert not wrong.any(), (got[wrong][:4], expected[wrong][:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("name", sorted(RULES))
def test_apply_is_the_reference_rule(name: str, step: int, dtype: torch.dtype, seed: int) -> None:
    h = hyper(name, step)
    arrays = [[torch.randn(n).to(dtype), *state_for(name, n, dtype)] for n in (1025, 1, 2048)]
    grads = [torch.randn(a[0].numel()).to(dtype) for a in arrays]
    on_device = [g.to(DEVICE) for g in grads]
    placed = applied(RULES[name], h, arrays, on_device, factor=-0.75, limit=0.9)
    for tensors, g, held, sent in zip(arrays, grads, placed, on_device, strict=True):
        p, *state = tensors
        new = reference(name, h, p, g, state, -0.75, 0.9)
        for i, (old, value, out) in enumerate(zip(tensors, new, held, strict=True)):
            exact = name in UNFUSED and (i > 0 or name.startswith("sgd"))
            assert_same(out.inside.cpu(), value, old.abs() + g.abs() + p.abs(), exact=exact)
            assert out.untouched_around()
        assert torch.equal(sent.cpu(), g)


@pytest.mark.parametrize("numel", [1, 127, 128, 1023, 1024, 1025, 2049])
@pytest.mark.parametrize("offset", [1, 3, 64], ids=lambda n: f"parameter+{n}")
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned-gradient", "gradient+1"])
def test_apply_at_odd_sizes_and_addresses(numel: int, offset: int, shift: int, seed: int) -> None:
    h = hyper("adamw", 3)
    arrays = [torch.randn(numel), *state_for("adamw", numel, torch.float32)]
    around = torch.full((numel + 2,), math.nan, device=DEVICE)
    g = around[shift : shift + numel]
    g.copy_(torch.randn(numel))
    (held,) = applied(RULES["adamw"], h, [arrays], [g], offset=offset)
    new = reference("adamw", h, arrays[0], g.cpu(), arrays[1:], 1.0, math.inf)
    for i, (old, value, out) in enumerate(zip(arrays, new, held, strict=True)):
        assert_same(out.inside.cpu(), value, old.abs() + g.cpu().abs(), exact=i > 0)
        assert out.untouched_around()


def test_apply_does_nothing_when_the_step_is_skipped(seed: int) -> None:
    arrays = [torch.randn(1500), *state_for("adam", 1500, torch.float32)]
    (held,) = applied(RULES["adam"], hyper("adam", 1), [arrays], [torch.full((1500,), math.nan, device=DEVICE)], skip=1)
    assert all(torch.equal(out.inside.cpu(), a) and out.untouched_around() for out, a in zip(held, arrays, strict=True))


@pytest.mark.parametrize("name", sorted(RULES))
def test_non_finite_gradients_propagate_as_in_the_reference(name: str) -> None:
    g = torch.tensor([math.inf, -math.inf, math.nan, 1.0, 0.0])
    for limit in (math.inf, 1.0):
        arrays = [torch.ones(5), *[torch.zeros(5) for _ in RULES[name].slots]]
        (held,) = applied(RULES[name], hyper(name, 1), [arrays], [g.to(DEVICE)], limit=limit)
        new = reference(name, hyper(name, 1), arrays[0], g, arrays[1:], 1.0, limit)
        for value, out in zip(new, held, strict=True):
            # Adadelta's delta is a ratio of two roots, of which it keeps the square.
            ulps = ULPS + (4 if name == "adadelta" else 0)
            torch.testing.assert_close(out.inside.cpu(), value, rtol=ulps * 2.0**-23, atol=0, equal_nan=True)


def test_applying_again_to_equal_inputs_gives_the_same_bits(seed: int) -> None:
    arrays = [torch.randn(2500), *state_for("adamw", 2500, torch.float32)]
    g = torch.randn(2500, device=DEVICE)
    runs = [applied(RULES["adamw"], hyper("adamw", 2), [arrays], [g])[0] for _ in range(3)]
    assert all(torch.equal(a.inside, b.inside) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@triton.jit
def convert(x_ptr, y_ptr, ROUND: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, ROUND(tl.load(x_ptr + at), DTYPE))


def awkward_numbers() -> Tensor:
    """Float32 numbers of all kinds: random bit patterns, every bfloat16 tie, fp16 ties and subnormals, inf, NaN."""
    bits = torch.randint(-(2**31), 2**31, (1 << 14,), dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(1 << 16, dtype=torch.int64) * 65536 + 0x8000).sub(2**31).to(torch.int32)
    around = torch.cat([ties - 1, ties + 1])[:: 1 << 3]
    halves = torch.linspace(-7e4, 7e4, 1 << 12)
    tiny = torch.arange(-2048, 2048, dtype=torch.float32) * 2.0**-26
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.9, 65520.0, 1e-45, 3.4028234e38])
    numbers = torch.cat([*(b.view(torch.float32) for b in (bits, ties, around)), halves, tiny, special])
    return torch.nn.functional.pad(numbers, (0, -len(numbers) % 4096))


@pytest.mark.parametrize("dtype", NARROW, ids=short)
def test_storage_rounds_to_nearest_even_as_torch_does(dtype: torch.dtype, seed: int) -> None:
    chosen = launch.apply_constants("sgd", "SGDHyper", clamp=False, dtype=dtype, grad_dtype=dtype, state_dtypes=())[
        "ROUND"
    ]
    x = awkward_numbers().to(DEVICE)
    y = torch.zeros(len(x), dtype=dtype, device=DEVICE)
    convert[(len(x) // 4096,)](x, y, ROUND=chosen, DTYPE=launch.DTYPES[dtype], BLOCK=4096)
    expected = x.to(dtype)
    nan = expected.isnan()
    assert torch.equal(y.isnan(), nan)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(y[~nan].view(bits), expected[~nan].view(bits))  # the sign of zero included
