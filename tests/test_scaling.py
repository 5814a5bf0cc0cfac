"""Gradients that are a multiple of what is meant: accumulated micro-batches, and the loss scale of GradScaler."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from cases import BACKENDS
from executors import step_by_the_executor_of_devices
from torch import Tensor

import fusedlr
from fusedlr import schedules
from fusedlr.clipping import GlobalNorm, Normalize, TensorNorm, Value

MAKERS: dict[str, Any] = {
    "sgd": lambda params, **kw: fusedlr.SGD(params, lr=0.1, weight_decay=0.1, **kw),
    "sgd-dampening": lambda params, **kw: fusedlr.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, **kw),
    "sgd-nesterov": lambda params, **kw: fusedlr.SGD(params, lr=0.1, momentum=0.9, nesterov=True, **kw),
    "adam": lambda params, **kw: fusedlr.Adam(params, lr=0.1, weight_decay=0.1, maximize=True, **kw),
    "adamw": lambda params, **kw: fusedlr.AdamW(params, lr=0.1, **kw),
    "adadelta": lambda params, **kw: fusedlr.Adadelta(params, lr=1.0, weight_decay=0.1, **kw),
    "nadam": lambda params, **kw: fusedlr.NAdam(params, lr=0.1, **kw),
    "lion": lambda params, **kw: fusedlr.Lion(params, lr=0.1, weight_decay=0.1, **kw),
}
CLIPS = [None, GlobalNorm(1.0), GlobalNorm(1.0, math.inf), GlobalNorm(1e9), TensorNorm(0.5), TensorNorm(0.5, 3.5)]
CLIPS += [Value(0.3), Normalize("tensor"), Normalize("global")]
# Division by 3 rounds once in the gradients' dtype where fusedlr multiplies by a factor that is rounded once: an ulp or
# two in each gradient, then three steps of some ten roundings, on numbers around one. Narrow dtypes round each
# stored value as well, and a tie may fall either way.
RTOL = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
# Every rule with and without a clip that is different for each tensor, and every clip.
COMBINED = [(name, clip) for name in MAKERS for clip in (None, TensorNorm(0.5))]
COMBINED += [("adamw", clip) for clip in CLIPS if clip not in (None, TensorNorm(0.5))]
EXECUTORS = [*BACKENDS, "device"]


@pytest.fixture(params=EXECUTORS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each executor; "device" is that of accelerators without Triton, on CPU tensors."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the gradients are made on the CPU, where a GPU runs no interpreter")
    if request.param == "device":
        step_by_the_executor_of_devices(monkeypatch)
        return "torch"
    return str(request.param)


def make_params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(30, 7), (65,), (), (1100,)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    params.append(torch.nn.Parameter(torch.randn(6, 8, generator=generator).to(dtype)[:, ::2]))  # strides with gaps
    params.append(torch.nn.Parameter(torch.randn(4, 5, generator=generator).to(dtype).t()))
    return params


def give(params: list[torch.nn.Parameter], i: int, times: float = 1.0, bad: float | None = None) -> None:
    generator = torch.Generator().manual_seed(50 + i)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * times).to(p.dtype)
    if bad is not None:
        params[1].grad.view(-1)[3] = bad  # type: ignore[union-attr]


def everything(optimizer: Any) -> list[Tensor]:
    return [t for p, entry in optimizer.state.items() for t in (p.detach(), *entry.values())]


def assert_close(one: Any, two: Any, dtype: torch.dtype) -> None:
    for a, b in zip(everything(one), everything(two), strict=True):
        torch.testing.assert_close(a, b, rtol=RTOL[dtype], atol=RTOL[dtype])
    if one.last_grad_norm is not None:
        # Sums of float32 squares.
        torch.testing.assert_close(one.last_grad_norm, two.last_grad_norm, rtol=1e-6, atol=0)


# ---- accumulated gradients ---------------------------------------------------------------------------------------


def divided_both_ways(
    name: str, backend: str, dtype: torch.dtype, divisor: Any, **options: Any
) -> tuple[fusedlr.FusedOptimizer, fusedlr.FusedOptimizer]:
    """Steps with ``grad_divisor``, and steps of gradients that were divided before."""
    ours, theirs = make_params(dtype), make_params(dtype)
    folded, plain = (MAKERS[name](params, backend=backend, **options) for params in (ours, theirs))
    folded.grad_divisor = divisor
    for i in range(3):
        for params in (ours, theirs):
            give(params, i, 3.0)
        for p in theirs:
            p.grad.div_(float(divisor))  # type: ignore[union-attr]
        before = [p.grad.clone() for p in ours]  # type: ignore[union-attr]
        folded.step()
        plain.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True)), "gradients are never written"
    return folded, plain


@pytest.mark.parametrize(("name", "clip"), COMBINED, ids=repr)
def test_the_mean_is_folded_into_every_rule_and_clip(name: str, clip: Any, backend: str) -> None:
    assert_close(*divided_both_ways(name, backend, torch.float32, 3, clip=clip), torch.float32)


@pytest.mark.parametrize("clip", [None, GlobalNorm(1.0), TensorNorm(0.5), Value(0.3)], ids=repr)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_the_mean_in_every_dtype(dtype: torch.dtype, clip: Any, backend: str) -> None:
    # To divide a narrow gradient by 3 would round it, and squares of float16 have few digits: 4 is exact.
    divisor = 3 if dtype.itemsize > 2 else 4
    assert_close(*divided_both_ways("adamw", backend, dtype, divisor, clip=clip), dtype)
    assert_close(*divided_both_ways("sgd-dampening", backend, dtype, divisor, clip=clip), dtype)


@pytest.mark.parametrize("clip", CLIPS, ids=repr)
def test_a_power_of_two_changes_no_bit(clip: Any, backend: str) -> None:
    for name in ("adamw", "sgd-nesterov"):
        folded, plain = divided_both_ways(name, backend, torch.float32, 4, clip=clip)
        if backend == "torch" and clip is not None and getattr(clip, "norm_type", 2.0) != math.inf:
            assert_close(folded, plain, torch.float32)  # rows of float32 squares: their sum is scaled as it is rounded
        else:
            assert all(torch.equal(a, b) for a, b in zip(everything(folded), everything(plain), strict=True))


@pytest.mark.parametrize("width", [torch.float32, torch.float64], ids=str)
def test_a_tensor_is_read_by_every_step(width: torch.dtype, backend: str) -> None:
    divisor = torch.tensor(2.0, dtype=width)
    runs = []
    for given in (divisor, None):
        params = make_params()
        optimizer = MAKERS["adamw"](params, clip=1.0, backend=backend)
        for i, k in enumerate((2.0, 4.0, 8.0)):
            give(params, i)
            divisor.fill_(k)
            optimizer.grad_divisor = k if given is None else given
            optimizer.step()
        runs.append(everything(optimizer))
    for a, b in zip(*runs, strict=True):
        # A device multiplies by a factor in float64, a host by the same one rounded.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_micro_batches_of_a_model_are_one_large_batch(backend: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    other = copy.deepcopy(model)
    ours = fusedlr.AdamW(model.parameters(), lr=0.01, clip=0.1, backend=backend)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.01)
    ours.grad_divisor = 4
    for _ in range(3):
        x = torch.randn(4, 8, 6)
        ours.zero_grad()
        for part in x:
            model(part).square().mean().backward()
        ours.step()
        theirs.zero_grad()
        other(x.flatten(0, 1)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        theirs.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        # Adam divides by the root of squares: the roundings of small gradients reach the updates, 0.01 each.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "grad_divisor must be > 0 and finite, but got 0"),
        (-2.0, ValueError, "must be > 0"),
        (math.inf, ValueError, "must be > 0 and finite"),
        (math.nan, ValueError, "must be > 0 and finite"),
        (torch.tensor(0.0), ValueError, "must be > 0"),
        (torch.ones(2), ValueError, r"one element, but got a tensor of shape \(2,\)"),
        (torch.tensor(2), ValueError, "floating-point tensor.*int64"),
        (True, TypeError, "must be a number > 0"),
        ("4", TypeError, "must be a number > 0"),
        (None, TypeError, "must be a number > 0"),
    ],
    ids=repr,
)
def test_divisors_that_make_no_sense(value: Any, error: type[Exception], message: str) -> None:
    optimizer = fusedlr.SGD(make_params(), lr=0.1)
    optimizer.grad_divisor = 2
    with pytest.raises(error, match=message):
        optimizer.grad_divisor = value
    assert optimizer.grad_divisor == 2.0


def test_copies_keep_the_settings_and_checkpoints_do_not() -> None:
    optimizer = fusedlr.SGD(make_params(), lr=0.1)
    assert optimizer.grad_divisor == 1.0 and optimizer.fold_grad_scale is False
    optimizer.grad_divisor, optimizer.fold_grad_scale = 8, True
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.grad_divisor == 8.0 and other.fold_grad_scale
    loaded = fusedlr.SGD(make_params(), lr=0.1)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.grad_divisor == 1.0 and not loaded.fold_grad_scale


# ---- GradScaler --------------------------------------------------------------------------------------------------


def scaled_run(fold: bool, plan: list[float | None], backend: str, name: str = "adamw", **options: Any) -> Any:
    """Steps under a GradScaler of gradients that were scaled by it."""
    params = make_params()
    optimizer = MAKERS[name](params, backend=backend, **options)
    optimizer.fold_grad_scale = fold
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for i, bad in enumerate(plan):
        scale = float(scaler.scale(torch.ones(())))
        give(params, i, scale, bad)
        scaler.step(optimizer)
        scaler.update()
    return optimizer, scaler


BAD: list[float | None] = [None, math.inf, None, None, math.nan, None]


@pytest.mark.parametrize(("name", "clip"), COMBINED, ids=repr)
def test_a_folded_scale_is_an_unscaled_gradient(name: str, clip: Any, backend: str) -> None:
    folded, scaler = scaled_run(True, BAD, backend, name, clip=clip)
    plain, other = scaled_run(False, BAD, backend, name, clip=clip)
    assert_close(folded, plain, torch.float32)
    assert scaler.get_scale() == other.get_scale()
    assert not hasattr(folded, "grad_scale") and not hasattr(folded, "found_inf")
    assert int(folded.skipped_steps) == 2 and int(plain.skipped_steps) == 0  # the scaler never called the other
    marks = folded.state_dict()["param_groups"][0]["fusedlr"]
    assert (marks["t"], marks["skipped_steps"]) == (4, 2)


@pytest.mark.parametrize("clip", [None, GlobalNorm(1.0), Value(0.3)], ids=repr)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_found_inf_leaves_no_trace(nonfinite: str, clip: Any, backend: str) -> None:
    params = make_params()
    optimizer = MAKERS["nadam"](params, backend=backend, clip=clip, nonfinite=nonfinite)
    optimizer.fold_grad_scale = True
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaler.scale(torch.ones(()))
    for i, bad in enumerate([math.nan, None, math.inf]):
        give(params, i, 16.0, bad)
        before = [t.clone() for t in everything(optimizer)] or [p.detach().clone() for p in params]
        scaler.step(optimizer)  # not an error with "raise" either: the scaler has seen it
        scaler.update(16.0)
        after = everything(optimizer) if i else [p.detach() for p in params]
        assert all(map(torch.equal, after, before)) == (bad is not None)
    assert int(optimizer.skipped_steps) == 2
    assert optimizer.state_dict()["param_groups"][0]["fusedlr"]["t"] == 1
    assert [int(optimizer.state[p]["step"]) for p in params] == [1] * len(params)


def test_a_skipped_step_does_not_advance_the_schedule(backend: str, request: pytest.FixtureRequest) -> None:
    schedule = schedules.Warmup(2).then(schedules.Cosine(6, min_lr=0.0))
    if "device" in request.node.name:
        with pytest.raises(ValueError, match="fold_grad_scale with a schedule needs the Triton backend"):
            scaled_run(True, BAD, backend, schedule=schedule)
        return
    folded, _ = scaled_run(True, BAD, backend, schedule=schedule, clip=1.0)
    plain, _ = scaled_run(False, BAD, backend, schedule=schedule, clip=1.0)
    assert_close(folded, plain, torch.float32)
    assert folded.last_lr == plain.last_lr == [schedule(3, 0.1)]
    assert folded.steps_taken == plain.steps_taken == 4


def test_steps_without_a_scaler_after_steps_with_one_keep_the_clock(backend: str) -> None:
    optimizer, _ = scaled_run(True, [None, math.inf], backend)
    params = optimizer.param_groups[0]["params"]
    for i in range(3):
        give(params, i)
        optimizer.step()
    marks = optimizer.state_dict()["param_groups"][0]["fusedlr"]
    assert (marks["t"], marks["skipped_steps"]) == (4, 1)
    assert optimizer.steps_taken == 4


def test_gradients_that_the_user_unscaled_are_not_unscaled_again(backend: str) -> None:
    """torch's protocol: after unscale_() there is no grad_scale, but found_inf there is."""
    outcomes = []
    for fold in (True, False):
        params = make_params()
        optimizer = MAKERS["adamw"](params, backend=backend, clip=0.5)
        optimizer.fold_grad_scale = fold
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for i, bad in enumerate([None, math.inf, None]):
            give(params, i, float(scaler.scale(torch.ones(()))), bad)
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        outcomes.append(everything(optimizer))
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("clip", [None, GlobalNorm(1.0), TensorNorm(0.5), Value(0.3)], ids=repr)
def test_loss_scale_and_micro_batches_together(clip: Any, backend: str) -> None:
    outcomes = []
    for fold in (True, False):
        params = make_params()
        optimizer = MAKERS["adamw"](params, backend=backend, clip=clip)
        optimizer.fold_grad_scale = fold
        optimizer.grad_divisor = 4 if fold else 1
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for i in range(3):
            give(params, i, float(scaler.scale(torch.ones(()))) * (4 if fold else 1))
            scaler.step(optimizer)
            scaler.update()
        outcomes.append(optimizer)
    assert_close(*outcomes, torch.float32)


def test_float16_parameters_train_under_a_scaler_that_would_refuse_to_unscale_them(backend: str) -> None:
    """torch.optim's own: "Attempting to unscale FP16 gradients". Here the scale goes with the float32 arithmetic."""
    outcomes = []
    for scale in (1.0, 256.0):
        params = make_params(torch.float16)
        optimizer = MAKERS["adamw"](params, backend=backend, clip=1.0)
        optimizer.fold_grad_scale = True
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for i in range(3):
            give(params, i, float(scaler.scale(torch.ones(()))))
            scaler.step(optimizer)
            scaler.update()
        outcomes.append(optimizer)
    assert_close(*outcomes, torch.float16)
    assert float(outcomes[1].last_grad_norm) < 100.0  # that of the scaled ones is 256 times as much


@pytest.mark.parametrize("bad", [None, math.inf])
def test_the_ordinary_way_steps_as_torch_does(bad: float | None, backend: str) -> None:
    """Without the switch: unscale_, clip_grad_norm_, and no call of step() where there is an inf."""
    ours, theirs = make_params(), make_params()
    pair = (fusedlr.AdamW(ours, lr=0.1, backend=backend), torch.optim.AdamW(theirs, lr=0.1))
    for optimizer, params in zip(pair, (ours, theirs), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for i in range(3):
            give(params, i, float(scaler.scale(torch.ones(()))), bad if i == 1 else None)
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=5e-6, atol=5e-6)
    assert pair[0].steps_taken == (3 if bad is None else 2)


def test_a_loss_scale_that_vanished_is_no_crash(backend: str) -> None:
    params = make_params()
    optimizer = MAKERS["adamw"](params, backend=backend, nonfinite="skip", clip=1.0)
    before = [p.detach().clone() for p in params]
    give(params, 0)
    optimizer.grad_scale = torch.tensor(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, in the interpreter
        optimizer.step()
    assert int(optimizer.skipped_steps) == 1 and all(map(torch.equal, params, before))


def test_attributes_that_are_set_by_hand_are_honoured(backend: str) -> None:
    """As torch's fused optimizers do, for those who clip through ``grad_scale``."""
    outcomes = []
    for folded in (True, False):
        params = make_params()
        optimizer = MAKERS["adamw"](params, backend=backend)
        give(params, 0, 8.0 if folded else 1.0)
        if folded:
            optimizer.grad_scale = torch.tensor(8.0)
        optimizer.step()
        outcomes.append(everything(optimizer))
    assert all(map(torch.equal, *outcomes))


def test_units_are_not_compared_with_multiples_of_their_gradients() -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    optimizer = fusedlr.AdamW([p], lr=0.1, clip=fusedlr.clipping.AGC())
    optimizer.grad_divisor = 2
    with pytest.raises(ValueError, match=r"AGC.*grad_divisor"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 2)) and not optimizer.state


@pytest.mark.parametrize("clip", [fusedlr.clipping.ZClip(warmup_steps=1), fusedlr.clipping.AutoClip(50)], ids=repr)
def test_a_step_that_a_scaler_leaves_out_changes_no_statistics(clip: Any, backend: str) -> None:
    """Though its own gradients are finite: the inf may be another process's."""
    params = make_params()
    optimizer = fusedlr.AdamW(params, lr=0.1, clip=clip, backend=backend)
    for i in range(2):
        give(params, i)
        optimizer.step()
    before = optimizer.state_dict()["param_groups"][0]["fusedlr"]["clip_statistics"]
    optimizer.found_inf = torch.ones((), device=params[0].device)
    give(params, 2, times=3.0)
    optimizer.step()
    after = optimizer.state_dict()["param_groups"][0]["fusedlr"]["clip_statistics"]
    assert after == before and len(after) > 2
