"""Clipping: each strategy on both backends against torch.nn.utils and against float64."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from executors import backend_of, executor, place_of  # noqa: F401  # a fixture
from torch import Tensor

import fusedlr
from fusedlr import clipping, schedules
from fusedlr.clipping import AGC, AutoClip, Clip, GlobalNorm, Normalize, TensorNorm, Value, ZClip

# Triton's interpreter computes with numpy, which warns of what these tests do on purpose: inf - inf, 0*inf.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(40, 30), (7,), (), (1500,), (0,), (3, 5, 2)]
# Norms: sums of at most 2**18 positive float32 squares, 27 roundings deep (see test_kernels.py), halved by the root.
NORM_RTOL = 2e-6
# What the stored parameter rounds to, in relative terms; the update itself is a product of two or three numbers.
STORED = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def sgd(grads: list[Tensor], clip: Any, backend: str, **options: Any) -> tuple[fusedlr.SGD, list[Tensor]]:
    """SGD with lr 1 over parameters of value 0: after a step a parameter is minus its clipped gradient."""
    device = device_of(backend)
    params = [torch.nn.Parameter(torch.zeros_like(g, device=device)) for g in grads]
    optimizer = fusedlr.SGD(params, lr=1.0, clip=clip, backend=backend, **options)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(device).clone()
    return optimizer, params


def clipped(grads: list[Tensor], clip: Any, backend: str) -> tuple[list[Tensor], fusedlr.SGD]:
    optimizer, params = sgd(grads, clip, backend)
    sent = [p.grad.clone() for p in params]  # type: ignore[union-attr]
    optimizer.step()
    for p, g in zip(params, sent, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad.nan_to_num(), g.nan_to_num())  # never written
    return [-p.detach().cpu() for p in params], optimizer


def random_grads(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def norm64(grads: list[Tensor], norm_type: float) -> float:
    return float(torch.linalg.vector_norm(torch.cat([g.double().reshape(-1) for g in grads]), norm_type))


def assert_clipped(got: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """One rounding to storage beside the error of the norm and of the factor in the arithmetic's float32."""
    arithmetic = 1e-12 if dtype == torch.float64 else NORM_RTOL
    for a, b in zip(got, exact, strict=True):
        # Half a step of the subnormals, where float16 has no relative precision left.
        floor = float(torch.finfo(dtype).smallest_normal) * STORED[dtype]
        torch.testing.assert_close(a.double(), b.double(), rtol=STORED[dtype] + arithmetic, atol=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_global_norm(backend: str, norm_type: float, dtype: torch.dtype, max_norm: float, seed: int) -> None:
    grads = random_grads(dtype)
    got, optimizer = clipped(grads, GlobalNorm(max_norm, norm_type), backend)
    norm = norm64(grads, norm_type)
    factor = min(1.0, max_norm / (norm + 1e-6))
    assert_clipped(got, [g.double() * factor for g in grads], dtype)
    assert optimizer.last_grad_norm is not None
    assert float(optimizer.last_grad_norm) == pytest.approx(norm, rel=NORM_RTOL)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
def test_global_norm_is_torchs(backend: str, norm_type: float, seed: int) -> None:
    grads = [g for g in random_grads() if g.numel()]  # torch's inf-norm of nothing is an error
    got, optimizer = clipped(grads, GlobalNorm(0.7, norm_type), backend)
    theirs = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(theirs, grads, strict=True):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7, norm_type)
    # torch sums 1-norms in float32 without a bound on the depth better than sqrt of their number.
    for a, p in zip(got, theirs, strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(optimizer.last_grad_norm, norm, rtol=1e-5, atol=0, check_device=False)


def test_a_number_is_a_global_norm(backend: str, seed: int) -> None:
    grads = random_grads()
    a, b = (clipped(grads, clip, backend)[0] for clip in (0.5, GlobalNorm(0.5)))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
def test_tensor_norm(backend: str, norm_type: float, dtype: torch.dtype, seed: int) -> None:
    """Keras's clipnorm, with eps added to the norm; some tensors are clipped and some are not."""
    grads = random_grads(dtype)
    grads[1] = grads[1] * 1e-2
    got, optimizer = clipped(grads, TensorNorm(1.5, norm_type), backend)
    norms = [norm64([g], norm_type) if g.numel() else 0.0 for g in grads]
    factors = [min(1.0, 1.5 / (n + 1e-6)) for n in norms]
    assert factors[1] == 1.0 and factors[0] < 1.0
    assert_clipped(got, [g.double() * f for g, f in zip(grads, factors, strict=True)], dtype)
    assert float(optimizer.last_grad_norm) == pytest.approx(norm64(grads, norm_type), rel=NORM_RTOL)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_normalize(backend: str, scope: str, dtype: torch.dtype, seed: int) -> None:
    grads = random_grads(dtype)
    got, optimizer = clipped(grads, Normalize(scope), backend)
    norms = [norm64([g] if scope == "tensor" else grads, 2.0) if g.numel() else 0.0 for g in grads]
    assert_clipped(got, [g.double() / (n + 1e-6) for g, n in zip(grads, norms, strict=True)], dtype)
    assert float(optimizer.last_grad_norm) == pytest.approx(norm64(grads, 2.0), rel=NORM_RTOL)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_is_torchs(backend: str, dtype: torch.dtype, seed: int) -> None:
    grads = random_grads(dtype)
    got, optimizer = clipped(grads, Value(0.5), backend)
    theirs = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(theirs, grads, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_value_(theirs, 0.5)
    assert all(torch.equal(a, p.grad) for a, p in zip(got, theirs, strict=True))
    assert optimizer.last_grad_norm is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
def test_non_finite_gradients_give_what_torch_gives(backend: str, norm_type: float, value: float) -> None:
    grads = [torch.tensor([1.0, value, -2.0, 0.0]), torch.ones(2000)]
    got, optimizer = clipped(grads, GlobalNorm(1.0, norm_type), backend)
    theirs = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(theirs, grads, strict=True):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type)
    for a, p in zip(got, theirs, strict=True):
        torch.testing.assert_close(a, p.grad, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(optimizer.last_grad_norm, norm, equal_nan=True, check_device=False)


def test_value_leaves_a_nan_and_bounds_an_inf(backend: str) -> None:
    (got,), _ = clipped([torch.tensor([math.nan, math.inf, -math.inf, 0.1])], Value(0.25), backend)
    torch.testing.assert_close(got, torch.tensor([math.nan, 0.25, -0.25, 0.1]), rtol=0, atol=0, equal_nan=True)


MEASURING = [GlobalNorm(1.0), GlobalNorm(1.0, math.inf), TensorNorm(1.0), Normalize("tensor"), Normalize("global")]


@pytest.mark.parametrize("clip", MEASURING, ids=repr)
def test_gradients_of_zero_stay_zero(backend: str, clip: Clip) -> None:
    got, optimizer = clipped([torch.zeros(1500), torch.zeros(())], clip, backend)
    assert all(not a.any() for a in got)
    assert float(optimizer.last_grad_norm) == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("norm_type", [1.0, 3.5, 64.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zeros_beside_small_gradients(backend: str, dtype: torch.dtype, norm_type: float) -> None:
    """A tensor of zeros must not disturb the norm of others, whatever the power does to ratios of magnitudes."""
    small = 1e-200 if dtype == torch.float64 else 1e-30
    grads = [torch.zeros(5, dtype=dtype), torch.full((3,), small, dtype=dtype)]
    got, _ = clipped(grads, GlobalNorm(1.0, norm_type), backend)
    assert_clipped(got, grads, dtype)
    (a, b), _ = clipped(grads, GlobalNorm(small, norm_type, eps=0.0), backend)
    assert not a.any()
    # The quotient of a float32 as wide as 1e-30 is off by the two roundings of its float32 factor.
    torch.testing.assert_close(b, grads[1] * 3 ** (-1 / norm_type), rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", [GlobalNorm(1e9), TensorNorm(1e9), Value(1e9), GlobalNorm(math.inf)], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_clip_that_does_nothing_changes_no_bit(backend: str, clip: Clip, dtype: torch.dtype, seed: int) -> None:
    grads = random_grads(dtype)
    device = device_of(backend)
    runs = []
    for c in (None, clip):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s).to(dtype).to(device)) for s in SHAPES]
        optimizer = fusedlr.AdamW(params, lr=0.01, clip=c, backend=backend)
        for _ in range(2):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(device).clone()
            optimizer.step()
        runs.append([p.detach().clone() for p in params] + [s for p in params for s in optimizer.state[p].values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype,value,numel", [(torch.float16, 300.0, 60_000), (torch.bfloat16, 0.1, 60_000)], ids=str)
def test_narrow_norms_are_right_where_their_own_dtype_is_not(dtype: torch.dtype, value: float, numel: int) -> None:
    """float16: torch's norm overflows, and clipping silently zeroes the gradients; bfloat16: it is 0.3 % wrong."""
    grads = [torch.full((numel,), value, dtype=dtype), torch.full((numel,), value, dtype=dtype)]
    theirs = torch.nn.utils.get_total_norm(grads)
    norm = norm64(grads, 2.0)
    for backend in BACKENDS:
        _, optimizer = clipped(grads, 1.0, backend)
        # The CPU's dot product adds 2**18 numbers in some 32 lanes: equal numbers, whose roundings all go one way, may
        # be 2**13 half ulps off in the sum, half of that in its root.
        rtol = 2.0**-12 if backend == "torch" else NORM_RTOL
        assert float(optimizer.last_grad_norm) == pytest.approx(norm, rel=rtol)  # type: ignore[arg-type]
    assert abs(float(theirs) - norm) > 1e-3 * norm


@pytest.mark.parametrize("value", [1e20, 1e-30, 1e-45])
def test_norms_of_extreme_float32(backend: str, value: float) -> None:
    grads = [torch.full((1030,), value), torch.full((3,), value)]
    got, optimizer = clipped(grads, Normalize("global", eps=0.0), backend)
    norm = norm64(grads, 2.0)
    assert float(optimizer.last_grad_norm) == pytest.approx(norm, rel=NORM_RTOL, abs=2e-45)  # type: ignore[arg-type]
    if 1 / norm < 3e38:  # else the factor itself leaves float32
        torch.testing.assert_close(got[0].double(), grads[0].double() / norm, rtol=NORM_RTOL, atol=0)


def test_last_grad_norm_is_one_float32_tensor_that_each_step_rewrites(backend: str) -> None:
    optimizer, (p,) = sgd([torch.tensor([3.0, 4.0])], 1.0, backend)
    norm = optimizer.last_grad_norm
    assert norm is not None and norm.isnan()
    assert norm.dtype == torch.float32 and norm.shape == () and norm.device == p.device
    optimizer.step()
    assert optimizer.last_grad_norm is norm and float(norm) == 5.0
    p.grad = torch.tensor([6.0, 8.0], device=p.device)
    optimizer.step()
    assert optimizer.last_grad_norm is norm and float(norm) == 10.0


@pytest.mark.parametrize("clip", [None, Value(1.0)])
def test_no_norm_where_none_is_measured(backend: str, clip: Clip | None) -> None:
    optimizer, _ = sgd([torch.ones(3)], clip, backend)
    assert optimizer.last_grad_norm is None
    optimizer.step()
    assert optimizer.last_grad_norm is None


def test_maximize_ascends_with_the_clipped_gradient(backend: str) -> None:
    for clip, wanted in ((GlobalNorm(1.0, eps=0.0), [0.6, -0.8]), (Value(3.5), [3.0, -3.5])):
        optimizer, (p,) = sgd([torch.tensor([3.0, -4.0])], clip, backend, maximize=True)
        optimizer.step()
        assert p.tolist() == pytest.approx(wanted, rel=NORM_RTOL)


STRATEGIES = [*MEASURING, GlobalNorm(2, 1, 0), TensorNorm(0.5, math.inf), Value(0.25)]


@pytest.mark.parametrize("clip", STRATEGIES, ids=repr)
def test_strategies_are_values(clip: Clip) -> None:
    names = {cls.__name__: cls for cls in (GlobalNorm, TensorNorm, Value, Normalize)}
    assert eval(repr(clip), {**names, "inf": math.inf}) == clip
    for twin in (pickle.loads(pickle.dumps(clip)), copy.deepcopy(clip)):
        assert twin == clip and hash(twin) == hash(clip)
    assert [other for other in STRATEGIES if other == clip] == [clip]
    assert clip != 1.0
    with pytest.raises(AttributeError):
        clip.eps = 3  # type: ignore[attr-defined]


def test_the_word_inf_is_a_norm_type() -> None:
    assert GlobalNorm(1.0, "inf") == GlobalNorm(1.0, math.inf)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: GlobalNorm(0.0), ValueError, "max_norm must be > 0"),
        (lambda: GlobalNorm(-1.0), ValueError, "max_norm must be > 0"),
        (lambda: GlobalNorm(math.nan), ValueError, "max_norm must be > 0"),
        (lambda: GlobalNorm("1"), TypeError, "max_norm must be a number"),
        (lambda: GlobalNorm(True), TypeError, "max_norm must be a number"),
        (lambda: GlobalNorm(None), TypeError, "max_norm must be a number"),
        (lambda: GlobalNorm(1.0, 0.0), ValueError, "norm_type must be > 0"),
        (lambda: GlobalNorm(1.0, -2), ValueError, "norm_type must be > 0"),
        (lambda: GlobalNorm(1.0, 2, -1e-6), ValueError, "eps must be >= 0"),
        (lambda: GlobalNorm(1.0, 2, math.inf), ValueError, "eps must be >= 0 and finite"),
        (lambda: TensorNorm(0), ValueError, "max_norm must be > 0"),
        (lambda: TensorNorm(1, "2"), TypeError, "norm_type must be a number"),
        (lambda: Value(0.0), ValueError, "limit must be > 0"),
        (lambda: Value(-math.inf), ValueError, "limit must be > 0"),
        (lambda: Normalize("row"), ValueError, "'tensor' or 'global', but got 'row'"),
        (lambda: Normalize(eps=-1), ValueError, "eps must be >= 0"),
    ],
)
def test_bad_numbers_are_errors_that_name_them(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


NO_CLIPS = [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), (True, TypeError), ("1.0", TypeError)]


@pytest.mark.parametrize("clip, error", [*NO_CLIPS, (GlobalNorm, TypeError), ([1.0], TypeError)], ids=repr)
def test_what_is_no_clip(clip: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="clip"):
        fusedlr.SGD([torch.nn.Parameter(torch.ones(2))], clip=clip)


WITHOUT_EPS = [GlobalNorm(1.0, eps=0), TensorNorm(1, eps=0), GlobalNorm(1, "inf", eps=0), Normalize("tensor", eps=0),
               Normalize("global", eps=0), AutoClip(eps=0), ZClip(eps=0)]  # fmt: skip


@pytest.mark.parametrize("clip", WITHOUT_EPS, ids=str)
def test_gradients_of_zeros_without_eps_stay_zeros(clip: Clip, backend: str) -> None:
    out, _ = clipped([torch.zeros(5), torch.zeros(3)], clip, backend)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in out)


def test_a_threshold_of_0_leaves_zeros(executor: str) -> None:  # noqa: F811
    """Neither is 0/0 one, where a schedule brings max_norm to 0."""
    p = torch.nn.Parameter(torch.ones(3, device=place_of(executor)))
    options = {"backend": backend_of(executor), "schedule": {"max_norm": schedules.Linear(2, 1.0, 0.0)}}
    optimizer = fusedlr.SGD([p], lr=0.1, clip=GlobalNorm(1.0, eps=0.0), **options)
    for g in (1.0, 1.0, 0.0):
        before = p.detach().clone()
        p.grad = torch.full_like(p, g)
        optimizer.step()
    assert torch.equal(p, before)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, before)


INFINITE = [GlobalNorm(math.inf), GlobalNorm(1.0, "inf"), TensorNorm(1, math.inf, 0.5), Value(math.inf),
            ZClip(max_norm=math.inf), AutoClip(5, 7), Normalize("global"), AGC()]  # fmt: skip


@pytest.mark.parametrize("clip", INFINITE, ids=repr)
def test_a_clip_prints_as_the_code_that_makes_it(clip: Clip) -> None:
    assert eval(repr(clip), {name: getattr(clipping, name) for name in clipping.__all__}) == clip


def test_numbers_of_other_libraries_are_numbers() -> None:
    """And tensors of one element."""
    assert AutoClip(10, np.int64(5)) == AutoClip(10, 5) and ZClip(warmup_steps=np.int64(5)) == ZClip(warmup_steps=5)
    assert fusedlr.Precision(seed=np.int64(5)) == fusedlr.Precision(seed=5)
    optimizer = fusedlr.SGD([torch.nn.Parameter(torch.ones(2))], clip=torch.tensor(0.5))
    assert optimizer.clip == GlobalNorm(0.5)
    assert schedules.MultiStepDecay(torch.tensor([1, 2])) == schedules.MultiStepDecay([1, 2])
    assert schedules.Cosine(torch.tensor(9), min_lr=torch.tensor(0.5)) == schedules.Cosine(9, min_lr=0.5)
    for wrong in (torch.tensor(True), torch.tensor([1.0, 2.0])):
        with pytest.raises(TypeError, match="total_steps"):
            schedules.Cosine(wrong)
