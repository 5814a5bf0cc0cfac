"""The PyTorch backend of accelerators, run on CPU tensors: the same numbers as the CPU's, and never a wait."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from executors import step_by_the_executor_of_devices
from torch.utils._python_dispatch import TorchDispatchMode

import fusedlr
from fusedlr import schedules
from fusedlr.clipping import GlobalNorm, Normalize, TensorNorm, Value

MAKERS: dict[str, Any] = {
    "sgd": lambda params, **kw: fusedlr.SGD(params, lr=0.1, weight_decay=0.1, **kw),
    "sgd-nesterov": lambda params, **kw: fusedlr.SGD(params, lr=0.1, momentum=0.9, nesterov=True, **kw),
    "sgd-dampening": lambda params, **kw: fusedlr.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, **kw),
    "adam": lambda params, **kw: fusedlr.Adam(params, lr=0.1, weight_decay=0.1, **kw),
    "adam-amsgrad": lambda params, **kw: fusedlr.Adam(params, lr=0.1, amsgrad=True, maximize=True, **kw),
    "adamw": lambda params, **kw: fusedlr.AdamW(params, lr=0.1, **kw),
    "rmsprop": lambda params, **kw: fusedlr.RMSprop(params, lr=0.01, centered=True, momentum=0.9, **kw),
    "adagrad": lambda params, **kw: fusedlr.Adagrad(params, lr=0.1, lr_decay=0.1, weight_decay=0.1, **kw),
    "adadelta": lambda params, **kw: fusedlr.Adadelta(params, lr=1.0, weight_decay=0.1, **kw),
    "adamax": lambda params, **kw: fusedlr.Adamax(params, lr=0.1, **kw),
    "nadam": lambda params, **kw: fusedlr.NAdam(params, lr=0.1, **kw),
    "radam": lambda params, **kw: fusedlr.RAdam(params, lr=0.1, betas=(0.5, 0.9), **kw),
    "lion": lambda params, **kw: fusedlr.Lion(params, lr=0.1, weight_decay=0.1, **kw),
    "lamb": lambda params, **kw: fusedlr.LAMB(params, lr=0.1, weight_decay=0.1, **kw),
    "lamb-flags": lambda params, **kw: fusedlr.LAMB(
        params, lr=0.1, bias_correction=False, grad_averaging=False, trust_clip=True, maximize=True, **kw
    ),
    "lars": lambda params, **kw: fusedlr.LARS(params, lr=0.1, weight_decay=0.1, trust_coefficient=1.0, **kw),
    "lars-nesterov": lambda params, **kw: fusedlr.LARS(
        params, lr=0.1, momentum=0.9, nesterov=True, trust_coefficient=0.5, **kw
    ),
}
CLIPS = [None, GlobalNorm(1.0), GlobalNorm(1.0, 3.5), TensorNorm(0.5), TensorNorm(0.5, math.inf), Value(0.3)]
CLIPS += [Normalize("tensor"), Normalize("global")]
# Stored values differ by one rounding where the two executors' float32 results differ by a few ulps (fused operators
# against the reference rule, four steps).
RTOL = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the executor of accelerators."""
    step_by_the_executor_of_devices(monkeypatch)


def make_params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(30, 7), (65,), (), (2, 3, 4)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    params.append(torch.nn.Parameter(torch.randn(6, 8, generator=generator).to(dtype)[:, ::2]))  # strides with gaps
    params.append(torch.nn.Parameter(torch.randn(4, 5, generator=generator).to(dtype).t()))
    return params


def give(params: list[torch.nn.Parameter], i: int, bad: float | None = None) -> None:
    generator = torch.Generator().manual_seed(50 + i)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    if bad is not None:
        params[1].grad.view(-1)[3] = bad  # type: ignore[union-attr]


def train(name: str, dtype: torch.dtype, plan: list[float | None], **options: Any) -> tuple[Any, list[Any]]:
    params = make_params(dtype)
    optimizer = MAKERS[name](params, backend="torch", **options)
    for i, bad in enumerate(plan):
        give(params, i, bad)
        optimizer.step()
    return optimizer, params


def assert_equal_runs(a: Any, b: Any, dtype: torch.dtype) -> None:
    rtol = RTOL[dtype]
    for (one, ps), (two, qs) in ((a, b),):
        for p, q in zip(ps, qs, strict=True):
            # Parameters around one: an update of theirs is off by ulps of the update, not of what is left of p.
            torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=rtol)
            assert one.state[p].keys() == two.state[q].keys()
            for key, value in one.state[p].items():
                torch.testing.assert_close(value, two.state[q][key], rtol=rtol, atol=rtol)
        assert one.last_lr == two.last_lr and one.steps_taken == two.steps_taken


@pytest.mark.parametrize("clip", CLIPS, ids=repr)
@pytest.mark.parametrize("name", MAKERS)
def test_the_same_numbers_as_on_the_host(name: str, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = schedules.Warmup(2).then(schedules.Cosine(4, min_lr=0.0))
    host = train(name, torch.float32, [None] * 4, clip=clip, schedule=schedule)
    step_by_the_executor_of_devices(monkeypatch)
    device = train(name, torch.float32, [None] * 4, clip=clip, schedule=schedule)
    assert_equal_runs(device, host, torch.float32)
    if clip is not None and clip.scope is not None:
        torch.testing.assert_close(device[0].last_grad_norm, host[0].last_grad_norm, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize(
    "name", ["sgd-dampening", "adam-amsgrad", "adamw", "nadam", "radam", "lamb", "lamb-flags", "lars", "lars-nesterov"]
)
def test_all_dtypes(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    host = train(name, dtype, [None] * 4, clip=1.0)
    step_by_the_executor_of_devices(monkeypatch)
    assert_equal_runs(train(name, dtype, [None] * 4, clip=1.0), host, dtype)


def everything(optimizer: Any) -> list[torch.Tensor]:
    """Parameters and state."""
    return [t for p, entry in optimizer.state.items() for t in (p.detach(), *entry.values())]


@pytest.mark.parametrize("clip", [None, GlobalNorm(1.0), TensorNorm(0.5), Value(0.3)], ids=repr)
@pytest.mark.parametrize("name", ["sgd-dampening", "adamw", "nadam", "lamb", "lars-nesterov"])
def test_skip_leaves_no_trace(name: str, clip: Any, as_on_a_device: None) -> None:
    params = make_params()
    optimizer = MAKERS[name](params, backend="torch", clip=clip, nonfinite="skip")
    for i in range(3):
        give(params, i)
        optimizer.step()
        before = [t.clone() for t in everything(optimizer)]
        give(params, i, [math.inf, math.nan, -math.inf][i])
        optimizer.step()
        after = everything(optimizer)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    straight = make_params()
    twin = MAKERS[name](straight, backend="torch", clip=clip, nonfinite="skip")
    for i in range(3):
        give(straight, i)
        twin.step()
    assert all(torch.equal(a, b) for a, b in zip(params, straight, strict=True))
    assert int(optimizer.skipped_steps) == 3 and int(twin.skipped_steps) == 0
    assert optimizer.state_dict()["param_groups"][0]["fusedlr"]["t"] == 3


def test_skip_with_a_schedule_is_an_error_that_changes_nothing(as_on_a_device: None) -> None:
    params = make_params()
    values = [p.detach().clone() for p in params]
    optimizer = MAKERS["adamw"](params, backend="torch", nonfinite="skip", schedule=schedules.Cosine(5, min_lr=0.0))
    give(params, 0)
    with pytest.raises(ValueError, match="needs the Triton backend"):
        optimizer.step()
    assert all(torch.equal(p.detach(), v) for p, v in zip(params, values, strict=True))
    assert optimizer.state_dict()["state"] == {} and optimizer.steps_taken == 0


@pytest.mark.parametrize("clip", [None, GlobalNorm(1.0), Value(0.3)], ids=repr)
def test_raise_changes_nothing(clip: Any, as_on_a_device: None) -> None:
    params = make_params()
    values = [p.detach().clone() for p in params]
    optimizer = MAKERS["adamw"](params, backend="torch", nonfinite="raise", clip=clip)
    give(params, 0, math.nan)
    with pytest.raises(FloatingPointError, match="nothing was changed"):
        optimizer.step()
    assert all(torch.equal(p.detach(), v) for p, v in zip(params, values, strict=True))
    assert optimizer.state_dict()["state"] == {} and optimizer.steps_taken == 0
    give(params, 1)
    optimizer.step()
    assert optimizer.steps_taken == 1


def test_a_non_finite_step_propagates(as_on_a_device: None) -> None:
    params = make_params()
    optimizer = MAKERS["adamw"](params, backend="torch", clip=1.0)
    give(params, 0, math.nan)
    optimizer.step()
    assert all(p.isnan().all() for p in params)  # a NaN norm, as torch's clip_grad_norm_


@pytest.mark.parametrize("value", [1e20, 1e-30, 1e-45])
def test_norms_keep_their_range(value: float, as_on_a_device: None) -> None:
    p = torch.nn.Parameter(torch.zeros(1000))
    p.grad = torch.full((1000,), value)
    for norm_type in (1.0, 2.0, 3.5, 40.0, math.inf):
        optimizer = fusedlr.SGD([p], lr=0.0, clip=GlobalNorm(1.0, norm_type), backend="torch")
        optimizer.step()
        largest = float(p.grad[0])
        wanted = largest * 1000 ** (1 / norm_type)
        norm = float(optimizer.last_grad_norm)  # type: ignore[arg-type]
        assert norm == pytest.approx(wanted, rel=1e-6, abs=1.5e-45)  # the least float32 numbers have few digits


WAITING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}


class NoWait(TorchDispatchMode):
    """Raises where the host would have to wait for the values of a device's tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITING:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> NoWait:
    def reading(*_: Any) -> None:
        raise AssertionError("it waits for the device")

    monkeypatch.setattr(torch.Tensor, "tolist", reading)  # on the CPU it reads memory, and nobody would notice
    monkeypatch.setattr(torch.Tensor, "numpy", reading)
    return NoWait()


READERS = {"float": float, "bool": bool, "int": int, "item": lambda x: x.item(), "tolist": lambda x: x.tolist()}
READERS |= {"nonzero": torch.nonzero, "numpy": lambda x: x.numpy(), "index": lambda x: [1][x.long() * 0]}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_the_watch_sees_waits(read: Any, no_wait: NoWait) -> None:
    x = torch.ones(())
    with no_wait, pytest.raises(AssertionError, match="waits for the device"):
        read(x)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("clip", CLIPS, ids=repr)
@pytest.mark.parametrize("name", MAKERS)
def test_a_step_never_waits(name: str, clip: Any, nonfinite: str, as_on_a_device: None, no_wait: NoWait) -> None:
    params = make_params()
    schedule = schedules.Cosine(4, min_lr=0.0) if nonfinite == "propagate" else None
    optimizer = MAKERS[name](params, backend="torch", clip=clip, nonfinite=nonfinite, schedule=schedule)
    for i in range(3):
        give(params, i)
        with no_wait:  # the first step, which makes state and plan, included
            optimizer.step()
            assert optimizer.last_lr and optimizer.skipped_steps is not None


def test_hyper_parameters_that_are_tensors_are_not_waited_for(as_on_a_device: None, no_wait: NoWait) -> None:
    runs = []
    for lr, decay in ((torch.tensor(0.1), torch.tensor(0.2)), (0.1, 0.2)):
        params = make_params()
        optimizer = fusedlr.SGD(params, lr=lr, momentum=0.9, weight_decay=decay, backend="torch")
        for i in range(2):
            give(params, i)
            with no_wait:
                optimizer.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
@pytest.mark.parametrize("clip", CLIPS, ids=repr)
@pytest.mark.parametrize("name", MAKERS)
def test_a_triton_step_never_waits(
    name: str, clip: Any, scheduled: bool, no_wait: NoWait, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the kernels themselves: those are launched, which is no wait."""
    pytest.importorskip("triton")
    from fusedlr.kernels import launch, launch_trust

    launches = []
    for kernel in ("launch_measure", "launch_decide", "launch_trust", "launch_apply"):
        module = launch_trust if kernel == "launch_trust" else launch
        monkeypatch.setattr(module, kernel, lambda *args, _kernel=kernel, **kwargs: launches.append(_kernel))
    params = make_params()
    schedule = {"lr": schedules.Cosine(4, min_lr=0.0)} if scheduled else None
    optimizer = MAKERS[name](params, backend="triton", clip=clip, schedule=schedule)
    for i in range(3):
        give(params, i)
        with no_wait:
            optimizer.step()
            assert optimizer.last_lr
    assert launches.count("launch_apply") == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lr_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_number_in_a_narrow_tensor_is_computed_with_in_float64(
    lr_dtype: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 - lr*weight_decay is 1 in bfloat16."""
    outcomes = []
    for on_a_device in (True, False):
        with monkeypatch.context() as patched:
            if on_a_device:
                step_by_the_executor_of_devices(patched)
            params = make_params(dtype)
            lr = torch.tensor(0.125, dtype=lr_dtype)
            optimizer = fusedlr.AdamW(params, lr=lr, weight_decay=0.01, backend="torch")
            for _ in range(3):
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer.step()
        outcomes.append([p.detach() for p in params])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=RTOL[dtype], atol=RTOL[dtype])
