"""decide, launched by itself: rows, clip factors, norms, step counts, the clock, and the decision to skip."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from fusedlr.kernels import launch
from kernel_tables import DEVICE, decided
from test_twins import RULES

from fusedlr import schedules
from fusedlr.clipping.fixed import clip_factor, normalize_factor

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

# A few logarithms, powers and roots in float64, each good to an ulp or two; the power of a beta to the 1e6th multiplies
# the error of its logarithm by at most 700, where exp underflows.
RTOL = 1e-12
ADAM, SGD = RULES["adamw"], RULES["sgd_momentum"]
PLAIN = (0.01, 0.9, 0.999, 1e-8, 0.1)


def partials_of(sums: list[float], scales: list[float] | None = None) -> Tensor:
    return torch.tensor([sums, scales or [1.0] * len(sums)], dtype=torch.float64, device=DEVICE)


def expected_rows(rule: object, scalars: list[tuple[float, ...]], steps: list[float], groups: list[int]) -> Tensor:
    rows = [rule.row(int(s) + 1, *scalars[g]) for s, g in zip(steps, groups, strict=True)]  # type: ignore[attr-defined]
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)


def test_adam_rows_for_all_steps_and_betas_in_one_launch() -> None:
    """More tensors than one pass of the program treats, and many groups."""
    steps = [0.0, 1, 2, 9, 99, 999, 9_999, 99_999, 999_999]
    betas = [0.0, 1e-9, 0.5, 0.9, 0.95, 0.999, 0.9999, 0.999999]
    scalars = [(1e-3, b1, b2, 1e-8, wd) for b1, b2 in itertools.product(betas, betas) for wd in (0.0, 0.1, 10.0)]
    taken = [steps[i % len(steps)] for i in range(len(scalars) * len(steps))]
    groups = [i // len(steps) for i in range(len(taken))]
    assert len(scalars) > 128 and len(taken) > launch.DECIDE_THREADS
    out = decided(ADAM, scalars, taken, groups)
    assert torch.allclose(out.rows[:, :-2].cpu(), expected_rows(ADAM, scalars, taken, groups), rtol=RTOL, atol=0)
    assert (out.rows[:, -2] == 1.0).all() and (out.rows[:, -1] == math.inf).all()
    assert out.steps.tolist() == [s + 1 for s in taken]


def test_bias_corrections_against_exact_arithmetic() -> None:
    mpmath = pytest.importorskip("mpmath")
    cases = [(step, beta) for step in (1, 2, 3, 50, 10**6) for beta in (0.9, 0.999, 0.999999)]
    scalars = [(1.0, beta, beta, 0.0, 0.0) for _, beta in cases]
    out = decided(ADAM, scalars, [step - 1 for step, _ in cases], list(range(len(cases))))
    at = ADAM.hyper._fields.index
    with mpmath.workdps(60):
        for row, (step, beta) in zip(out.rows.tolist(), cases, strict=True):
            exact = 1 - mpmath.mpf(beta) ** step
            assert row[at("step_size")] == pytest.approx(float(1 / exact), rel=RTOL)
            assert row[at("bias_correction2_sqrt")] == pytest.approx(float(mpmath.sqrt(exact)), rel=RTOL)


SCALARS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9, "alpha": 0.99,
           "rho": 0.9, "lr_decay": 0.2, "momentum_decay": 4e-3, "dampening": 0.1, "nesterov": 1.0,
           "trust_coefficient": 0.02, "bias_correction": 1.0, "grad_averaging": 1.0, "trust_clip": 0.0}  # fmt: skip


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_row_of_every_rule(name: str) -> None:
    """RAdam's rho is a small difference of numbers of up to 2000 that are good to 1e-15, and 4 is taken from it."""
    rule = RULES[name]
    steps = [0.0, 1, 3, 4, 5, 6, 99, 10_000, 10**6]
    carried = [[2.0 ** -(i + 1) for _ in rule.carried] for i in range(len(steps))]
    scalars = [SCALARS[s] for s in rule.scalars]
    out = decided(rule, [scalars], steps, carried=carried)
    rows = [rule.row(int(s) + 1, *c, *scalars) for s, c in zip(steps, carried, strict=True)]
    wanted = torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)
    rtol = 1e-11 if name.startswith("radam") else RTOL
    torch.testing.assert_close(out.rows[:, :-2].cpu(), wanted, rtol=rtol, atol=0)
    assert torch.equal(out.carried.cpu(), wanted[:, : len(rule.carried)].float())
    assert out.steps.tolist() == [s + 1 for s in steps]


def test_radam_rectifies_from_where_it_should_on() -> None:
    """rho_t against exact arithmetic, also where 2/(1-beta2) is large."""
    mpmath = pytest.importorskip("mpmath")
    rule = RULES["radam"]
    betas = [0.9, 0.99, 0.999, 0.9999, 0.999999, 0.0, 0.5, 0.6]
    cases = [(t, b) for t in (1, 4, 5, 6, 7, 50, 10**6) for b in betas]
    scalars = [(1.0, 0.0, b, 0.0, 0.0) for _, b in cases]
    out = decided(rule, scalars, [t - 1 for t, _ in cases], list(range(len(cases))))
    at = rule.hyper._fields.index
    with mpmath.workdps(60):
        for row, (t, b) in zip(out.rows.tolist(), cases, strict=True):
            power = mpmath.mpf(b) ** t
            inf = 2 / (1 - mpmath.mpf(b)) - 1
            rho = inf - 2 * t * power / (1 - power)
            assert row[at("rectified")] == float(rho > 5)
            ratio = (rho - 4) * (rho - 2) * inf / ((inf - 4) * (inf - 2) * rho) if rho > 5 else 1 / (1 - power)
            exact = float(mpmath.sqrt(ratio * (1 - power)))
            # 1e-16*2/(1-beta2), the rounding of the numbers whose difference rho is, over rho - 4 > 1, a few times.
            assert row[at("step_size")] == pytest.approx(exact, rel=1e-15 / (1 - b) + RTOL)


def test_nadams_numbers_against_exact_arithmetic() -> None:
    mpmath = pytest.importorskip("mpmath")
    rule = RULES["nadam"]
    steps = [1, 2, 5, 100, 10**5]
    out = decided(rule, [(1.0, 0.9, 0.999, 0.0, 0.0, 4e-3)], [s - 1 for s in steps], carried=[[0.25]] * len(steps))
    at = rule.hyper._fields.index
    with mpmath.workdps(60):
        beta1, decay = mpmath.mpf(0.9), mpmath.mpf(4e-3)
        for row, t in zip(out.rows.tolist(), steps, strict=True):
            mu, following = (beta1 * (1 - mpmath.mpf(0.96) ** (n * decay) / 2) for n in (t, t + 1))
            product = mu / 4
            assert row[at("mu_product")] == pytest.approx(float(product), rel=RTOL)
            assert row[at("grad_size")] == pytest.approx(float((1 - mu) / (1 - product)), rel=RTOL)
            assert row[at("avg_size")] == pytest.approx(float(following / (1 - product * following)), rel=RTOL)


@pytest.mark.parametrize("bad", [False, True])
def test_a_skipped_step_keeps_what_tensors_carry(bad: bool) -> None:
    rule, scalars = RULES["nadam"], (0.01, 0.9, 0.999, 1e-8, 0.0, 4e-3)
    out = decided(
        rule, [scalars], [3.0, 8.0], carried=[[0.5], [0.125]], partials=partials_of([1.0, math.nan if bad else 2.0]),
        counts=[1, 1], guard=True, count=True,
    )  # fmt: skip
    new = [float(torch.tensor(rule.row(s, m, *scalars)[0])) for s, m in ((4, 0.5), (9, 0.125))]
    assert out.carried.flatten().tolist() == ([0.5, 0.125] if bad else new)
    assert out.steps.tolist() == ([3.0, 8.0] if bad else [4.0, 9.0])


def test_sgd_rows_and_the_first_step() -> None:
    scalars = [(0.1, 0.9, 0.5, 0.01, 0.0), (0.2, 0.0, 0.0, 0.0, 1.0)]
    taken, groups = [0.0, 1, 5, 0.0], [0, 0, 1, 1]
    out = decided(SGD, scalars, taken, groups)
    assert torch.allclose(out.rows[:, :-2].cpu(), expected_rows(SGD, scalars, taken, groups), rtol=RTOL, atol=0)
    # With a momentum of 0 every step is a first one.
    assert out.rows[:, SGD.hyper._fields.index("first")].tolist() == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_narrow_parameters_are_rounded_once(dtype: torch.dtype) -> None:
    out = decided(ADAM, [PLAIN], [0.0, 41], dtype=dtype)
    assert out.rows.dtype == torch.float32
    exact = decided(ADAM, [PLAIN], [0.0, 41]).rows
    assert torch.equal(out.rows, exact.float())


def test_a_group_that_ascends_has_a_negative_factor() -> None:
    out = decided(ADAM, [PLAIN, PLAIN], [0.0, 0.0, 0.0], [0, 1, 0], signs=[1.0, -1.0], clip=(math.inf, 0.0, 2.5))
    assert out.rows[:, -2].tolist() == [1.0, -1.0, 1.0]
    assert out.rows[:, -1].tolist() == [2.5] * 3


@pytest.mark.parametrize("width", [torch.float32, torch.float64], ids=str)
def test_hyper_parameters_from_tensors(width: torch.dtype) -> None:
    lr, decay = (torch.tensor(x, dtype=width, device=DEVICE) for x in (0.25, 0.75))
    bit = int(width == torch.float64)
    addresses = {(1, 0): lr.data_ptr() | bit, (1, 4): decay.data_ptr() | bit}
    scalars = [PLAIN, (-1.0, 0.9, 0.999, 1e-8, -1.0)]
    out = decided(ADAM, scalars, [4.0] * 2, [0, 1], addresses=addresses)
    meant = [PLAIN, (0.25, 0.9, 0.999, 1e-8, 0.75)]
    assert torch.allclose(out.rows[:, :-2].cpu(), expected_rows(ADAM, meant, [4.0] * 2, [0, 1]), rtol=RTOL, atol=0)


def test_more_groups_than_one_pass_treats_with_tensors_and_schedules_among_them() -> None:
    n = 2 * launch.DECIDE_THREADS + 30  # every other one is scheduled
    lrs = torch.linspace(0.1, 0.2, n, dtype=torch.float64, device=DEVICE)
    addresses = {(g, 0): lrs[g].data_ptr() | 1 for g in range(0, n, 2)}
    cosine = schedules.Cosine(100, min_lr=0.0)
    scheduled = {(g, 0): (cosine, 1.0 + g) for g in range(1, n, 2)}
    out = decided(ADAM, [PLAIN] * n, [6.0] * n, list(range(n)), addresses=addresses, schedules=scheduled, clock=(33, 0))
    meant = [(float(lrs[g]) if g % 2 == 0 else cosine(33, 1.0 + g), *PLAIN[1:]) for g in range(n)]
    torch.testing.assert_close(
        out.rows[:, :-2].cpu(), expected_rows(ADAM, meant, [6.0] * n, list(range(n))), rtol=RTOL, atol=0
    )
    assert out.values[: n * 6 : 6].tolist() == pytest.approx([row[0] for row in meant], rel=1e-14, abs=0)


def test_a_schedule_without_rows_leaves_the_hosts_number() -> None:
    out = decided(ADAM, [PLAIN], [0.0], schedules={})
    assert out.values[0] == PLAIN[0]


NORMS = {
    "ordinary": ([9.0, 16.0], None, 2.0, 0, 5.0),
    "zeros": ([0.0, 0.0], None, 2.0, 0, 0.0),
    "inf": ([1.0, math.inf], None, 2.0, 0, math.inf),
    "nan": ([1.0, math.nan], None, 2.0, 0, math.nan),
    "scaled": ([9.0, 16.0], [1e100, 1e100], 2.0, 2, 5e100),
    "zeros beside tiny": ([0.0, 4.0], [1.0, 1e-200], 2.0, 2, 2e-200),
    "zeros beside small, high p": ([0.0, 1.0], [1.0, 1e-6], 64.0, 2, 1e-6),
    "all zeros": ([0.0, 0.0], [1.0, 1.0], 3.5, 2, 0.0),
    "p inf beside numbers": ([2.0, math.inf], [3.0, 1.0], 3.5, 2, math.inf),
    "p inf beside much": ([math.inf, 1.0], [1.0, 1e30], 64.0, 2, math.inf),
    "p nan": ([2.0, math.nan], [3.0, 1.0], 3.5, 2, math.nan),
    "one": ([3.0, 4.0], [1.0, 2.0], 1.0, 2, 11.0),
    "largest": ([1.0, 1.0], [3.0, 7.0], math.inf, 1, 7.0),
    "largest of zeros": ([1.0, 1.0], [0.0, 0.0], math.inf, 1, 0.0),
    "largest is inf": ([1.0, 1.0], [3.0, math.inf], math.inf, 1, math.inf),
    "largest is nan": ([1.0, 1.0, 1.0], [3.0, math.nan, math.inf], math.inf, 1, math.nan),
}


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_from_partials(name: str, scope: str) -> None:
    sums, scales, norm_type, mode, norm = NORMS[name]
    partials = partials_of(sums, scales)
    counts = [len(sums), 0, 0] if scope == "global" else [len(sums), 0]
    out = decided(
        ADAM, [PLAIN], [0.0] * len(counts), partials=partials, counts=counts, norm_type=norm_type, mode=mode,
        factor="normalize_factor", scope=scope, clip=(math.inf, 1e-300, math.inf),
    )  # fmt: skip
    factor = out.rows[:, -2].tolist()
    wanted = normalize_factor(norm, math.inf, 1e-300)
    assert factor[0] == pytest.approx(wanted, rel=1e-13, abs=0, nan_ok=True)
    assert float(out.norm) == pytest.approx(float(torch.tensor(norm).float()), rel=2.0**-24, nan_ok=True)
    # A tensor without elements has norm 0.
    assert factor[1] == pytest.approx(1e300 if scope == "tensor" else wanted, nan_ok=True)


def test_each_tensor_by_its_own_partials(seed: int) -> None:
    """Tensors of many, few and no partials; more tensors than one pass treats."""
    counts = [100, 0, 1, 16, 17, 15, 33, *[2] * launch.DECIDE_THREADS]
    sums = (torch.rand(sum(counts), dtype=torch.float64) * 9 + 1).tolist()
    parts = torch.tensor(sums, dtype=torch.float64).split(counts)
    out = decided(
        ADAM, [PLAIN], [0.0] * len(counts), partials=partials_of(sums), counts=counts, factor="clip_factor",
        scope="tensor", clip=(3.0, 1e-6, math.inf),
    )  # fmt: skip
    wanted = [clip_factor(float(part.sum().sqrt()), 3.0, 1e-6) for part in parts]
    assert out.rows[:, -2].tolist() == pytest.approx(wanted, rel=1e-14, abs=0)
    assert float(out.norm) == pytest.approx(math.sqrt(math.fsum(sums)), rel=1e-7)


def test_the_global_norm_over_more_partials_than_lanes(seed: int) -> None:
    sums = torch.rand(1000, dtype=torch.float64).tolist()
    out = decided(
        ADAM, [PLAIN], [0.0], partials=partials_of(sums), counts=[1000], factor="clip_factor", scope="global",
        clip=(1.0, 0.0, math.inf),
    )  # fmt: skip
    assert float(out.rows[0, -2]) == pytest.approx(1 / math.sqrt(math.fsum(sums)), rel=1e-14, abs=0)


@pytest.mark.parametrize("norm", [0.5, 1.0 - 1e-6, 1.0, 3.0, math.inf, math.nan])
def test_the_clip_factor_is_the_references(norm: float) -> None:
    out = decided(
        ADAM, [PLAIN], [0.0], partials=partials_of([norm**2]), counts=[1], factor="clip_factor", scope="global",
        clip=(1.0, 1e-6, math.inf),
    )  # fmt: skip
    assert float(out.rows[0, -2]) == pytest.approx(clip_factor(norm, 1.0, 1e-6), rel=1e-15, abs=0, nan_ok=True)
    assert (float(out.rows[0, -2]) == 1.0) == (norm <= 1.0 - 1e-6)


@pytest.mark.parametrize("bad", [None, math.inf, math.nan])
@pytest.mark.parametrize("scope", [None, "global"])
@pytest.mark.parametrize("count", [False, True], ids=["raise", "skip"])
def test_the_guard_holds_steps_and_clock(count: bool, scope: str | None, bad: float | None) -> None:
    out = decided(
        ADAM, [PLAIN], [3.0, 8.0], partials=partials_of([1.0, bad or 2.0]), counts=[1, 1], scope=scope,
        factor="clip_factor" if scope else "no_factor", clip=(1.0, 1e-6, math.inf), clock=(11, 4), guard=True,
        count=count,
    )  # fmt: skip
    skipped = bad is not None
    assert int(out.skip) == skipped
    assert out.steps.tolist() == ([3.0, 8.0] if skipped else [4.0, 9.0])
    assert out.clock.tolist() == [11 if skipped else 12, 4 + (skipped and count)]


@pytest.mark.parametrize("scope", [None, "global", "tensor"])
def test_the_scale_divides_norms_and_multiplies_into_factors(scope: str | None) -> None:
    """3 micro-batches and a loss scale of 2**14; the norms are 5 and 12, and 13 together."""
    inverse = 1 / (3 * 2.0**14)
    out = decided(
        ADAM, [PLAIN, PLAIN], [0.0, 0.0], [0, 1], partials=partials_of([25.0, 144.0]), counts=[1, 1], scope=scope,
        factor="clip_factor" if scope else "no_factor", clip=(1e-4, 1e-6, 0.5), scale=(3.0, 2.0**14, 0.0),
        signs=[1.0, -1.0],
    )  # fmt: skip
    norms = {None: [0.0, 0.0], "global": [13.0, 13.0], "tensor": [5.0, 12.0]}[scope]
    wanted = [clip_factor(norm * inverse, 1e-4, 1e-6) * inverse for norm in norms]
    assert out.rows[:, -2].tolist() == pytest.approx([wanted[0], -wanted[1]], rel=1e-14, abs=0)
    assert out.rows[:, -1].tolist() == [0.5, 0.5]  # the limit is of divided gradients
    if scope:
        assert float(out.norm) == pytest.approx(13 * inverse, rel=2.0**-23)


@pytest.mark.parametrize("found", [0.0, 1.0, 2.0, math.nan])
@pytest.mark.parametrize(("guard", "count"), [(False, False), (True, False), (True, True)], ids=str)
def test_found_inf_skips_whatever_the_guard(guard: bool, count: bool, found: float) -> None:
    skipped = found != 0.0
    out = decided(
        ADAM, [PLAIN], [3.0], partials=partials_of([math.nan if skipped else 1.0]), counts=[1], clock=(11, 4),
        guard=guard, count=count, scale=(1.0, 8.0, found),
    )  # fmt: skip
    assert (int(out.skip) > 1) == skipped, "1 is for what nonfinite='raise' raises"
    assert out.steps.tolist() == [3.0 if skipped else 4.0]
    assert out.clock.tolist() == [11 if skipped else 12, 4 + skipped]


def test_without_a_guard_nothing_is_skipped() -> None:
    out = decided(ADAM, [PLAIN], [3.0], partials=partials_of([math.nan]), counts=[1], scope="global",
                  factor="clip_factor", clip=(1.0, 0.0, math.inf), clock=(5, 2))  # fmt: skip
    assert int(out.skip) == 0
    assert out.clock.tolist() == [6, 2] and out.steps.tolist() == [4.0]
    assert math.isnan(out.rows[0, -2])


def test_only_the_last_bucket_moves_the_clock_and_only_when_told() -> None:
    assert decided(ADAM, [PLAIN], [0.0], clock=(5, 2), last=False).clock.tolist() == [5, 2]
    assert decided(ADAM, [PLAIN], [0.0], clock=(5, 2), advance=0).clock.tolist() == [5, 2]
    assert decided(ADAM, [PLAIN], [0.0], clock=(2**40, 2)).clock.tolist() == [2**40 + 1, 2]


def test_the_norm_is_written_only_where_one_is_asked_for() -> None:
    assert math.isnan(decided(ADAM, [PLAIN], [0.0]).norm)
    assert math.isnan(decided(ADAM, [PLAIN], [0.0], partials=partials_of([4.0]), counts=[1], guard=True).norm)


def test_the_modes_are_what_measure_and_decide_agree_on() -> None:
    assert launch.mode_for(2.0, [torch.float32, torch.bfloat16]) == 0
    assert launch.mode_for(math.inf, [torch.float32]) == 1
    assert launch.mode_for(2.0, [torch.float64]) == launch.mode_for(3.5, [torch.float16]) == 2
