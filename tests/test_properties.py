"""Whatever the shapes, dtypes, memory formats, groups and missing gradients: the same as torch.optim."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedlr
from fusedlr.backends.norms import combine, piece_sum
from fusedlr.clipping import GlobalNorm, TensorNorm, Value

SHAPES = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([(1023,), (1025,), (33, 65)]),
)
FORMATS = st.sampled_from(["contiguous", "channels_last", "transposed", "gaps", "part of a buffer"])
DTYPES = st.sampled_from([torch.float32, torch.float64])

DECAYS = st.sampled_from([0.0, 0.1])


def divides_by_a_difference(optimizer: Any) -> bool:
    """Whether the step is divided by |g + weight_decay * p| alone.

    Where that sum cancels, its rounding errors are the step's: torch's float32 is 2.5e-4 off its float64 then.
    """
    name, kwargs = optimizer
    coupled = name == "Adam" or not kwargs.get("decoupled_weight_decay", True)
    return coupled and kwargs["betas"][1] == 0.0 and kwargs["weight_decay"] != 0.0


# Where a gradient and the decay of its weight cancel, what is left is rounding. With the default of 1e-8 its size
# would not matter, and the update be as wrong as its sign.
EPS = st.just(0.01)
OPTIMIZERS = st.one_of(
    st.tuples(
        st.just("SGD"),
        st.fixed_dictionaries(
            {"momentum": st.sampled_from([0.0, 0.9]), "weight_decay": DECAYS, "maximize": st.booleans()}
        ),
    ),
    st.tuples(
        st.sampled_from(["Adam", "AdamW"]),
        st.fixed_dictionaries(
            {
                "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)]),
                "eps": EPS,
                "weight_decay": DECAYS,
                "amsgrad": st.booleans(),
                "maximize": st.booleans(),
            }
        ),
    ),
    st.tuples(
        st.just("RMSprop"),
        st.fixed_dictionaries(
            {"momentum": st.sampled_from([0.0, 0.9]), "weight_decay": DECAYS, "maximize": st.booleans(), "eps": EPS}
        ),
    ),
    st.tuples(
        st.just("Adagrad"),
        st.fixed_dictionaries(
            {
                "lr_decay": DECAYS,
                "initial_accumulator_value": DECAYS,
                "weight_decay": DECAYS,
                "maximize": st.booleans(),
                "eps": EPS,
            }
        ),
    ),
    st.tuples(
        st.sampled_from(["Adadelta", "Adamax"]),
        st.fixed_dictionaries({"weight_decay": DECAYS, "maximize": st.booleans(), "eps": EPS}),
    ),
    st.tuples(
        st.sampled_from(["NAdam", "RAdam"]),
        st.fixed_dictionaries(
            {
                "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)]),
                "eps": EPS,
                "weight_decay": DECAYS,
                "decoupled_weight_decay": st.booleans(),
                "maximize": st.booleans(),
            }
        ),
    ),
).filter(lambda optimizer: not divides_by_a_difference(optimizer))
CLIPS = st.sampled_from([None, GlobalNorm(0.5), GlobalNorm(0.5, 1.0), GlobalNorm(0.2, math.inf), Value(0.3)])


def lay_out(values: Tensor, how: str) -> Tensor:
    """The values in memory as asked, where their shape allows it."""
    if how == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if how == "transposed" and values.dim() >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "gaps" and values.dim() >= 1:
        return torch.stack([values, values], dim=-1)[..., 0]
    if how == "part of a buffer":
        return torch.cat([values.new_zeros(3), values.reshape(-1)])[3:].view(values.shape)
    return values.clone()


# A tensor: shape, how the parameter lies, how its gradients lie, and in which steps it has none.
TENSORS = st.tuples(SHAPES, FORMATS, FORMATS, st.sets(st.integers(0, 3), max_size=3))


def steps_are_torchs(
    backend: str, tensors: list[Any], optimizer: Any, clip: Any, dtype: torch.dtype, options: Any, seed: int
) -> None:
    name, kwargs = optimizer
    steps, n_groups, flatten = options
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator, dtype=dtype) for shape, *_ in tensors]
    mine = [torch.nn.Parameter(lay_out(v, how)) for v, (_, how, *_) in zip(values, tensors, strict=True)]
    theirs = [torch.nn.Parameter(v.clone()) for v in values]

    def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        used = min(n_groups, len(params))
        return [{"params": params[i::used], "lr": 0.05 * (i + 1)} for i in range(used)]

    ours = getattr(fusedlr, name)(groups(mine), clip=clip, flatten=flatten, backend=backend, **kwargs)
    oracle = getattr(torch.optim, name)(groups(theirs), foreach=False, **kwargs)
    for step in range(steps):
        for p, q, (shape, _, how, absent) in zip(mine, theirs, tensors, strict=True):
            g = None if step in absent else torch.randn(shape, generator=generator, dtype=dtype)
            p.grad = None if g is None else lay_out(g, how)
            q.grad = None if g is None else g.clone()
        with_gradient = [q for q in theirs if q.grad is not None and q.numel()]
        if isinstance(clip, GlobalNorm) and with_gradient:
            torch.nn.utils.clip_grad_norm_(with_gradient, clip.max_norm, clip.norm_type)
        if isinstance(clip, Value) and with_gradient:
            torch.nn.utils.clip_grad_value_(with_gradient, clip.limit)
        ours.step()
        oracle.step()
    # Values of a few units after at most four steps of some ten roundings each. Adam divides by the root of a sum of
    # squares, and SGD's steps grow with the gradient: neither makes an error larger than its own update. The clip
    # factor brings the error of a float32 norm of up to some thousand elements.
    # torch rounds NAdam's mu_product to float32 before it uses it.
    rtol = 1e-11 if dtype == torch.float64 and name != "NAdam" else 2e-5
    for p, q, (_, how, _, absent) in zip(mine, theirs, tensors, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=rtol)
        assert p.stride() == lay_out(q.detach(), how).stride() or p.numel() == 0
        state, wanted = ours.state.get(p, {}), oracle.state.get(q, {})
        # State comes with the first gradient, as in torch, but for Adagrad, whose sums are there from the beginning.
        assert bool(state) == (name == "Adagrad" or not set(range(steps)) <= absent)
        for key, value in wanted.items():
            if value is not None:
                torch.testing.assert_close(state[key], value, rtol=rtol, atol=rtol)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(TENSORS, min_size=1, max_size=8), OPTIMIZERS, CLIPS, DTYPES,
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.booleans()), st.integers(0, 2**31),
)  # fmt: skip
def test_the_torch_backend_is_torch_optim(
    tensors: list[Any], optimizer: Any, clip: Any, dtype: torch.dtype, options: Any, seed: int
) -> None:
    steps_are_torchs("torch", tensors, optimizer, clip, dtype, options, seed)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(TENSORS, min_size=1, max_size=4), OPTIMIZERS, CLIPS, DTYPES,
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.booleans()), st.integers(0, 2**31),
)  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are compiled, and test_gpu.py runs them")
def test_the_triton_backend_is_torch_optim(
    tensors: list[Any], optimizer: Any, clip: Any, dtype: torch.dtype, options: Any, seed: int
) -> None:
    pytest.importorskip("triton")
    steps_are_torchs("triton", tensors, optimizer, clip, dtype, options, seed)


MAGNITUDES = st.one_of(
    st.just(0.0),
    st.floats(-(2.0**127), 2.0**127, width=32),
    st.builds(lambda m, e: m * 10.0**e, st.floats(-9, 9), st.integers(-44, 37)),
)
NORM_TYPES = st.sampled_from([1.0, 2.0, 2.5, 3.5, 64.0, math.inf])


def exact_norm(values: list[float], norm_type: float) -> float:
    if norm_type == math.inf:
        return max((abs(v) for v in values), default=0.0)
    with mpmath.workdps(40):
        return float(mpmath.fsum(mpmath.mpf(abs(v)) ** norm_type for v in values) ** (1 / mpmath.mpf(norm_type)))


def pieces_of(values: list[float], cuts: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[float]]:
    """The values cut into pieces, and as the dtype holds them."""
    x = torch.tensor(values, dtype=dtype)
    bounds = [0, *sorted(c % (len(values) + 1) for c in cuts), len(values)]
    return [x[a:b] for a, b in itertools.pairwise(bounds)], x.double().tolist()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(MAGNITUDES, max_size=40), st.lists(st.integers(0, 100), max_size=4), NORM_TYPES,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_norms_of_any_magnitudes(values: list[float], cuts: list[int], norm_type: float, dtype: torch.dtype) -> None:
    pieces, held = pieces_of(values, cuts, dtype)
    norm = combine([piece_sum(piece, norm_type) for piece in pieces], norm_type)
    # Forty float32 squares, added in any order, and the root of their sum; other norms are summed in float64. Sums of
    # squares of float32 above 1e-24 leave out squares below 1e-45: less than one part in 1e19.
    assert norm == pytest.approx(exact_norm(held, norm_type), rel=41 * 2.0**-24, abs=0)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.builds(lambda m, e: m * 10.0**e, st.floats(-9, 9), st.integers(-300, 300)), max_size=20),
    st.lists(st.integers(0, 100), max_size=3), NORM_TYPES,
)  # fmt: skip
def test_norms_over_the_whole_range_of_float64(values: list[float], cuts: list[int], norm_type: float) -> None:
    pieces, held = pieces_of(values, cuts, torch.float64)
    norm = combine([piece_sum(piece, norm_type) for piece in pieces], norm_type)
    assert norm == pytest.approx(exact_norm(held, norm_type), rel=1e-12, abs=0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(MAGNITUDES, min_size=1, max_size=30), st.integers(0, 29), st.sampled_from([math.inf, -math.inf, math.nan]),
    st.lists(st.integers(0, 100), max_size=4), NORM_TYPES,
)  # fmt: skip
def test_a_norm_is_non_finite_only_if_an_element_is(
    values: list[float], at: int, bad: float, cuts: list[int], norm_type: float
) -> None:
    for dtype in (torch.float32, torch.float64):
        pieces, _ = pieces_of(values, cuts, dtype)
        assert math.isfinite(combine([piece_sum(piece, norm_type) for piece in pieces], norm_type))
        spoiled, _ = pieces_of([*values[: at % len(values)], bad, *values], cuts, dtype)
        norm = combine([piece_sum(piece, norm_type) for piece in spoiled], norm_type)
        assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


@settings(deadline=None, max_examples=12)
@given(st.lists(st.lists(MAGNITUDES, min_size=1, max_size=12), min_size=1, max_size=4), NORM_TYPES)
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
def test_the_kernels_measure_the_same_norms(lists: list[list[float]], norm_type: float) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    params = [torch.nn.Parameter(torch.zeros(len(values), device=device)) for values in lists]
    for p, values in zip(params, lists, strict=True):
        p.grad = torch.tensor(values, device=device)
    for clip in (GlobalNorm(1.0, norm_type), TensorNorm(1.0, norm_type)):
        optimizer = fusedlr.SGD(params, lr=0.0, clip=clip, backend="triton")
        optimizer.step()
        held = [v for p in params for v in p.grad.double().tolist()]  # type: ignore[union-attr]
        wanted = exact_norm(held, norm_type)
        rtol = 41 * 2.0**-24 + 2.0**-23
        if wanted < 3.4e38:  # it is reported in float32
            assert float(optimizer.last_grad_norm) == pytest.approx(wanted, rel=rtol, abs=2e-45)  # type: ignore[arg-type]
