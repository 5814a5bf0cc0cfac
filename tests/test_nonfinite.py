"""Gradients with an inf or NaN: propagated as torch does, skipped without a trace, or raised with nothing changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import references
import torch
from torch import Tensor

import fusedlr
from fusedlr import schedules
from fusedlr.clipping import Value

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

CLIPS = {"no-clip": None, "global": 1.0, "tensor": fusedlr.clipping.TensorNorm(1.0), "value": Value(0.5)}
MAKERS: dict[str, Callable[..., fusedlr.FusedOptimizer]] = {
    "sgd": lambda params, **kw: fusedlr.SGD(params, lr=0.1, **kw),
    "sgd-momentum": lambda params, **kw: fusedlr.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, **kw),
    "adam-amsgrad": lambda params, **kw: fusedlr.Adam(params, lr=0.1, amsgrad=True, **kw),
    "adamw": lambda params, **kw: fusedlr.AdamW(params, lr=0.1, **kw),
    "lamb": lambda params, **kw: fusedlr.LAMB(params, lr=0.1, **kw),
    "lars-momentum": lambda params, **kw: fusedlr.LARS(params, lr=0.1, momentum=0.9, trust_coefficient=1.0, **kw),
}


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def make_params(backend: str, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, 4), (17,), (), (1025,)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype).to(device_of(backend))) for s in shapes]


def give(params: list[torch.nn.Parameter], i: int, bad: float | None = None, where: int = 0) -> None:
    """The gradients of step i; ``bad`` goes into one element of the parameter ``where``."""
    generator = torch.Generator().manual_seed(100 + i)
    for k, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        if bad is not None and k == where:
            g.view(-1)[-1] = bad
        p.grad = g.to(p.device)


def snapshot(optimizer: fusedlr.FusedOptimizer) -> list[Any]:
    """Everything a step may change, in bits."""
    # On a GPU the host learns of skipped steps later, and does not wait for the news.
    host_knows = optimizer._device().type == "cpu"
    found: list[Any] = [optimizer.steps_taken if host_knows else None]
    for group in optimizer.param_groups:
        found += [group["lr"], dict(group["fusedlr"]["written"])] if host_knows else []
        for p in group["params"]:
            found.append(p.detach().clone())
            found.append({k: v.clone() for k, v in optimizer.state[p].items()} if p in optimizer.state else None)
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    return bool(a == b)


def test_the_comparison_sees_differences() -> None:
    assert equal([1, {"a": torch.ones(2)}], [1, {"a": torch.ones(2)}])
    assert not equal([1, {"a": torch.ones(2)}], [1, {"a": torch.zeros(2)}])
    assert not equal({"a": 1}, {"b": 1}) and not equal(None, {}) and not equal([1], [1, 2])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", MAKERS)
def test_skip_is_as_if_the_step_had_not_been(backend: str, name: str, clip: str) -> None:
    """Steps 0, bad, 1, bad, bad, 2 leave what steps 0, 1, 2 leave, the schedule included."""
    warmup = schedules.Warmup(3).then(schedules.Cosine(5, min_lr=0.0))
    runs = []
    for plan in ([0, 1, 2], [0, math.nan, 1, math.inf, -math.inf, 2]):
        params = make_params(backend)
        optimizer = MAKERS[name](params, clip=CLIPS[clip], schedule=warmup, nonfinite="skip", backend=backend)
        for i in plan:
            good = isinstance(i, int)
            give(params, i if isinstance(i, int) else 9, None if good else i, where=3)
            before = snapshot(optimizer)
            optimizer.step()
            assert equal(snapshot(optimizer), before) != good
        runs.append(optimizer)
    straight, skipping = runs
    assert equal(snapshot(skipping), snapshot(straight))
    assert int(straight.skipped_steps) == 0 and int(skipping.skipped_steps) == 3
    assert skipping.skipped_steps.dtype == torch.int64 and skipping.skipped_steps.shape == ()
    assert skipping.state_dict()["param_groups"][0]["fusedlr"]["t"] == 3
    assert skipping.steps_taken == 3  # a state_dict is exact, for which it may wait for a GPU
    assert skipping.last_lr == straight.last_lr and skipping.next_lr() == straight.next_lr()
    assert skipping.state_dict()["param_groups"][0]["fusedlr"]["skipped_steps"] == 3


@pytest.mark.parametrize("where", range(4))
def test_one_bad_element_anywhere_skips_all_groups(backend: str, where: int) -> None:
    params = make_params(backend)
    groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:3], "weight_decay": 0.1}, {"params": params[3:]}]
    optimizer = fusedlr.AdamW(groups, lr=0.1, nonfinite="skip", backend=backend)
    give(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    give(params, 1, math.nan, where)
    optimizer.step()
    assert equal(snapshot(optimizer), before) and int(optimizer.skipped_steps) == 1


def test_skipping_agrees_across_dtypes(backend: str) -> None:
    """Buckets of three dtypes decide together: none is stepped."""
    params = [p for d in (torch.float32, torch.bfloat16, torch.float64) for p in make_params(backend, d)]
    optimizer = fusedlr.AdamW(params, lr=0.1, clip=1.0, nonfinite="skip", backend=backend)
    for where in (0, 5, 11):
        give(params, 0)
        optimizer.step()
        before = snapshot(optimizer)
        give(params, 1, math.inf, where)
        optimizer.step()
        assert equal(snapshot(optimizer), before)
    assert int(optimizer.skipped_steps) == 3
    assert optimizer.state_dict()["param_groups"][0]["fusedlr"]["t"] == 3
    assert all(int(optimizer.state[p]["step"]) == 3 for p in params)


def test_a_first_step_that_is_skipped_starts_the_state_at_zero(backend: str) -> None:
    params = make_params(backend)
    optimizer = fusedlr.AdamW(params, lr=0.1, nonfinite="skip", backend=backend)
    values = [p.detach().clone() for p in params]
    give(params, 0, math.nan)
    optimizer.step()
    assert equal([p.detach() for p in params], values)
    for state in optimizer.state.values():
        assert not any(v.any() for v in state.values())
    assert int(optimizer.skipped_steps) == 1
    assert optimizer.state_dict()["param_groups"][0]["fusedlr"]["t"] == 0


@pytest.mark.parametrize("clip", CLIPS)
def test_huge_finite_gradients_are_not_skipped(backend: str, clip: str) -> None:
    params = make_params(backend)
    optimizer = fusedlr.SGD(params, lr=1e-38, clip=CLIPS[clip], nonfinite="skip", backend=backend)
    give(params, 0, 3e38)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 0 and optimizer.steps_taken == 1


@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later-step"])
@pytest.mark.parametrize("name, clip", list(zip(MAKERS, [*CLIPS, "tensor", "value"], strict=True)))
def test_raise_changes_nothing(backend: str, name: str, clip: str, first: bool) -> None:
    params = make_params(backend)
    options = {"schedule": schedules.Cosine(10, min_lr=0.0), "nonfinite": "raise", "backend": backend}
    optimizer = MAKERS[name](params, clip=CLIPS[clip], **options)
    twin_params = make_params(backend)
    twin = MAKERS[name](twin_params, clip=CLIPS[clip], **options)
    if not first:
        for o, ps in ((optimizer, params), (twin, twin_params)):
            give(ps, 0)
            o.step()
    before = snapshot(optimizer)
    saved = optimizer.state_dict()
    for bad in (math.inf, math.nan):
        give(params, 1, bad, where=3)
        grads = [p.grad.clone() for p in params]  # type: ignore[union-attr]
        with pytest.raises(FloatingPointError, match=r"inf or NaN.*nonfinite='raise'.*nothing was changed"):
            optimizer.step()
        assert equal(snapshot(optimizer), before)
        assert equal(optimizer.state_dict(), saved)
        assert not first or optimizer.state_dict()["state"] == {}
        assert all(torch.equal(p.grad.nan_to_num(), g.nan_to_num()) for p, g in zip(params, grads, strict=True))  # type: ignore[union-attr]
    for i in (1, 2):
        for o, ps in ((optimizer, params), (twin, twin_params)):
            give(ps, i)
            o.step()
    assert equal(snapshot(optimizer), snapshot(twin))
    assert int(optimizer.skipped_steps) == 0


@pytest.mark.parametrize("clip", ["no-clip", "global", "value"])
@pytest.mark.parametrize("name", MAKERS)
def test_propagate_is_torchs_behaviour(backend: str, name: str, clip: str) -> None:
    mine, theirs = make_params(backend), make_params("torch")
    optimizer = MAKERS[name](mine, clip=CLIPS[clip], backend=backend)
    torch_class: Any = getattr(type(optimizer), "_namesake", None) or getattr(references, type(optimizer).__name__)
    accepted = ("lr", "momentum", "dampening", "amsgrad", "trust_coefficient")
    reference = torch_class(theirs, **{k: optimizer.defaults[k] for k in accepted if k in optimizer.defaults})
    for i in range(2):
        for params in (mine, theirs):
            give(params, i, math.inf if i == 0 else None, where=0)
            params[2].grad.fill_([math.nan, 1.0][i])  # type: ignore[union-attr]
        if clip == "global":
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        if clip == "value":
            torch.nn.utils.clip_grad_value_(theirs, 0.5)
        optimizer.step()
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        # Two steps of a few float32 roundings each, of terms no larger than the parameter's own size or 1.
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=2e-6, equal_nan=True)
    assert any(a.isnan().any() for a in mine)
    assert optimizer.steps_taken == 2 and int(optimizer.skipped_steps) == 0


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_guards_change_no_bit_of_a_finite_run(backend: str, nonfinite: str) -> None:
    runs = []
    for mode in ("propagate", nonfinite):
        params = make_params(backend)
        optimizer = fusedlr.AdamW(params, lr=0.1, clip=1.0, nonfinite=mode, backend=backend)
        for i in range(3):
            give(params, i)
            optimizer.step()
        runs.append(snapshot(optimizer))
    assert equal(*runs)


def test_the_norm_of_a_skipped_step_is_what_was_measured(backend: str) -> None:
    params = make_params(backend)
    optimizer = fusedlr.SGD(params, lr=0.1, clip=1.0, nonfinite="skip", backend=backend)
    give(params, 0, math.inf)
    optimizer.step()
    assert float(optimizer.last_grad_norm) == math.inf  # type: ignore[arg-type]
