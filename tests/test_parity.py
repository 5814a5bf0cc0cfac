"""Every optimizer against torch.optim: free-running on equal gradients, and step by step in float64.

Two comparisons. *Free*: fusedlr and torch.optim (``foreach=False``) take the same gradients in the same dtype.
*Step by step*: before each step the stored values are taken over in float64 into torch.optim, which steps them; what
fusedlr stores afterwards must be that, rounded once. The second needs no allowance for accumulated error, and holds
bfloat16 and float16, where torch.optim itself rounds after each operation.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    BY_NAME,
    CASES,
    CLIPS,
    DTYPES,
    FEW,
    HUGE,
    LARGE,
    LAYOUTS,
    TINY,
    Case,
    Layout,
    begin_state,
    clip_by_hand,
    dtype_name,
    make_gradient,
    make_params,
    twin_of,
)
from torch import Tensor

import fusedlr
from fusedlr import clipping
from fusedlr.backends.batches import CHUNK, KEPT, LONGEST, ROUND

STEPS = 4


def error_unit(dtype: torch.dtype, case: Case) -> float:
    """The unit of the errors of arithmetic: the spacing of float32, or for float64 what torch's own formula loses."""
    return case.oracle_error if dtype == torch.float64 else torch.finfo(torch.float32).eps


def assert_close(got: Tensor, expected: Tensor, unit: float, scale: float, dtype: torch.dtype, what: str) -> None:
    """|got - expected| <= 4 units of the value and 16 of the update, and half a spacing where the dtype is narrower.

    A step is about ten operations on numbers no larger than the value and the update, each half a unit off.
    """
    expected = expected.to(torch.float64)
    bound = 4 * unit * expected.abs() + 16 * unit * scale
    if dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        bound = bound + info.eps / 2 * expected.abs() + info.smallest_normal * info.eps / 2
    difference = (got.detach().double() - expected).abs()
    wrong = ~(difference <= bound)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements, the first {got[wrong][0]} instead of "
        f"{expected[wrong][0]}, largest difference {difference.max():.3g}"
    )


def is_active(index: int, step: int) -> bool:
    """Each parameter is without a gradient in some step; a few from the beginning."""
    return (index + step) % STEPS != 0


def set_gradients(params: dict[str, torch.nn.Parameter], case: Case, step: int) -> dict[str, Tensor]:
    """Fresh gradients in changing memory arrangements; returns their copies."""
    copies = {}
    for i, (name, p) in enumerate(params.items()):
        p.grad = make_gradient(p, case, (i + step) % 4) if is_active(i, step) else None
        if p.grad is not None:
            copies[name] = p.grad.clone()
    return copies


def assert_gradients_untouched(params: dict[str, torch.nn.Parameter], copies: dict[str, Tensor]) -> None:
    for name, copy in copies.items():
        grad = params[name].grad
        assert grad is not None
        assert torch.equal(grad, copy), f"the gradient of {name} was written"


def own(grad: Tensor) -> Tensor:
    """A copy that torch's in-place clipping may write."""
    return grad.clone(memory_format=torch.contiguous_format)


def state_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    return optimizer.state.get(p, {})


def float64_step(
    case: Case, params: dict[str, torch.nn.Parameter], optimizer: fusedlr.FusedOptimizer, clip: Any
) -> Any:
    """torch.optim in float64, one step on from the stored values: the parameters and the state."""
    twins = {name: twin_of(p, torch.float64) for name, p in params.items()}
    oracle = case.make_oracle(list(twins.values()))
    for name, twin in twins.items():
        p = params[name]
        twin.grad = None if p.grad is None else own(p.grad.double())
        state = state_of(optimizer, p)
        if state.get("step", 0) > 0 or "sum" in case.state:  # Adagrad's is there before the first step
            oracle.state[twin] = {key: state[key].to(torch.float64, copy=True) for key in (*case.state, *case.numbers)}
            if case.oracle is not torch.optim.SGD:
                oracle.state[twin]["step"] = state["step"].clone()
        elif case.numbers and twin.grad is not None:  # torch would begin them in float32
            oracle.state[twin] = {key: torch.zeros_like(twin) for key in case.state}
            oracle.state[twin] |= {key: torch.ones((), dtype=torch.float64) for key in case.numbers}
            oracle.state[twin]["step"] = torch.tensor(0.0)
    clip_by_hand(clip, list(twins.values()))
    oracle.step()
    return twins, oracle


def begin(case: Case, params: dict[str, torch.nn.Parameter], *optimizers: torch.optim.Optimizer) -> None:
    """The state that a case begins with, the same in all optimizers (whose parameters are in the same order)."""
    for i, p in enumerate(params.values()):
        state = begin_state(case, p, p.dtype)
        for optimizer in optimizers if case.begin else ():
            optimizer.state[optimizer.param_groups[0]["params"][i]] = {k: v.clone() for k, v in state.items()}


def check_step_by_step(
    case: Case, layouts: dict[str, Layout], dtype: torch.dtype, device: Any, clip: Any, **own: Any
) -> None:
    params = make_params(layouts, dtype, device)
    optimizer = case.make(list(params.values()), clip=clip, **own)
    begin(case, params, optimizer)
    unit = error_unit(dtype, case)
    for step in range(STEPS - 1 if own["backend"] == "triton" else STEPS):  # the interpreter takes its time
        copies = set_gradients(params, case, step)
        twins, oracle = float64_step(case, params, optimizer, clip)
        before = {name: p.detach().clone() for name, p in params.items()}
        steps = {name: float(state_of(optimizer, p).get("step", 0)) for name, p in params.items()}
        optimizer.step()
        assert_gradients_untouched(params, copies)
        for i, (name, p) in enumerate(params.items()):
            state = state_of(optimizer, p)
            if not is_active(i, step):
                assert torch.equal(p, before[name]), f"{name} has no gradient and was changed"
                assert float(state.get("step", 0)) == steps[name]
                continue
            assert float(state["step"]) == steps[name] + 1
            what = f"{name} in step {step}"
            assert_close(p, twins[name].detach(), unit, case.lr * case.reach, dtype, what)
            assert set(state) == {"step", *case.state, *case.numbers}
            for key in case.numbers:
                # Rounded once, when it is stored.
                expected = float(oracle.state[twins[name]][key])
                assert float(state[key]) == pytest.approx(expected, rel=2.0**-24 + 1e-12), f"{key} of {what}"
            for key in case.state:
                assert state[key].dtype == dtype
                assert state[key].shape == p.shape
                # Moments are made of gradients up to 2 and of their squares; RMSprop's momentum of its updates.
                scale = case.reach if key == "momentum_buffer" and "square_avg" in case.state else 4.0
                assert_close(state[key], oracle.state[twins[name]][key], unit, scale, dtype, f"{key} of {what}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_step_is_the_float64_step_rounded_once(
    case: Case, dtype: torch.dtype, backend: str, seed: int, triton_device: torch.device
) -> None:
    """All layouts side by side; the clip and flattening take turns, so that every optimizer sees several of each."""
    turn = CASES.index(case) + 3 * DTYPES.index(dtype)
    device = triton_device if backend == "triton" else torch.device("cpu")
    clip = CLIPS[turn % len(CLIPS)]
    layouts = LAYOUTS if case.every_layout or backend == "torch" else FEW
    check_step_by_step(case, layouts, dtype, device, clip, backend=backend, flatten=turn % 3 != 0)


@pytest.mark.parametrize("clip", CLIPS, ids=repr)
@pytest.mark.parametrize(
    "name, backend, flatten",
    [
        ("sgd-momentum", "torch", True),
        ("sgd-momentum", "torch", False),
        ("adamw-default", "torch", True),
        ("adamw-default", "torch", False),
        ("adamw-default", "triton", True),
    ],
)
def test_every_clip(name: str, backend: str, flatten: bool, clip: Any, seed: int, triton_device: torch.device) -> None:
    device = triton_device if backend == "triton" else torch.device("cpu")
    check_step_by_step(BY_NAME[name], LAYOUTS, torch.float32, device, clip, backend=backend, flatten=flatten)


@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "in-place"])
@pytest.mark.parametrize(
    "clip", [None, clipping.GlobalNorm(300.0), clipping.TensorNorm(2.0), clipping.Value(0.75)], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("name", ["sgd-nesterov", "adam-amsgrad", "adamw-default", "nadam-decay", "adagrad-default"])
def test_tensors_larger_than_a_chunk(name: str, dtype: torch.dtype, clip: Any, flatten: bool, seed: int) -> None:
    check_step_by_step(BY_NAME[name], LARGE, dtype, "cpu", clip, backend="torch", flatten=flatten)


@pytest.mark.parametrize(
    "name, clip",
    [
        ("adamw-default", None),
        ("adamw-default", clipping.GlobalNorm(5.0)),
        ("adamw-default", clipping.GlobalNorm(5.0, 3.0)),
        ("adagrad-default", clipping.Value(1.0)),
        ("sgd-momentum", clipping.TensorNorm(1.0)),
        ("sgd-nesterov", clipping.GlobalNorm(5.0)),
    ],
    ids=str,
)
def test_models_larger_than_the_scratch(name: str, clip: Any, seed: int) -> None:
    assert max(CHUNK, ROUND, KEPT) < 2**20 + 5 and max(KEPT, 2 * LONGEST) < 22 * 60_000
    check_step_by_step(BY_NAME[name], HUGE, torch.float32, "cpu", clip, backend="torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [None, clipping.GlobalNorm(5.0), clipping.TensorNorm(1.0)], ids=repr)
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-default", "nadam-default"])
def test_many_tiny_tensors(name: str, clip: Any, backend: str, seed: int, triton_device: torch.device) -> None:
    device = triton_device if backend == "triton" else torch.device("cpu")
    layouts = dict(list(TINY.items())[: 20 if backend == "triton" else None])
    check_step_by_step(BY_NAME[name], layouts, torch.float32, device, clip, backend=backend)


@pytest.mark.parametrize(
    "backend, dtype, flatten",
    [
        pytest.param("torch", torch.float32, True, id="torch-float32-flat"),
        pytest.param("torch", torch.float32, False, id="torch-float32-in-place"),
        pytest.param("torch", torch.float64, True, id="torch-float64-flat"),
        pytest.param("triton", torch.float32, True, id="triton-float32-flat"),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_free_running_beside_torch(
    case: Case, backend: str, dtype: torch.dtype, flatten: bool, seed: int, triton_device: torch.device
) -> None:
    """The same gradients in the same dtype: the errors of both may add up over the steps, and no more."""
    clip = (None, clipping.GlobalNorm(20.0), clipping.Value(0.75))[CASES.index(case) % 3]
    device = triton_device if backend == "triton" else torch.device("cpu")
    layouts = {name: layout for name, layout in LAYOUTS.items() if name not in ("4097", "1023")}
    layouts = layouts if case.every_layout or backend == "torch" else FEW
    params = make_params(layouts, dtype, device)
    twins = {name: twin_of(p) for name, p in params.items()}
    optimizer = case.make(list(params.values()), clip=clip, backend=backend, flatten=flatten)
    oracle = case.make_oracle(list(twins.values()))
    begin(case, params, optimizer, oracle)
    for step in range(STEPS):
        set_gradients(params, case, step)
        for name, twin in twins.items():
            grad = params[name].grad
            twin.grad = None if grad is None else own(grad)
        optimizer.step()
        clip_by_hand(clip, list(twins.values()))
        oracle.step()
    # torch rounds the numbers of a tensor to float32 before it uses them, also for a float64 parameter.
    unit = 2 * STEPS * error_unit(torch.float32 if case.numbers else dtype, case)
    for name, p in params.items():
        assert_close(p, twins[name].detach(), unit, case.lr * case.reach, dtype, name)
        state, expected = state_of(optimizer, p), state_of(oracle, twins[name])
        for key in case.state:
            assert_close(state[key], expected[key], unit, 4.0, dtype, f"{key} of {name}")
        for key in ("step", *case.numbers):
            if key in expected:
                assert float(state[key]) == pytest.approx(float(expected[key]), rel=1e-6 if key != "step" else 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("name", ["sgd-momentum", "sgd-nesterov", "adam-default", "adamw-default"])
def test_narrow_dtypes_go_where_torch_goes(
    name: str, dtype: torch.dtype, backend: str, seed: int, triton_device: torch.device
) -> None:
    """torch.optim rounds each operation to the narrow dtype: the paths agree as far as those roundings let them.

    A parameter of magnitude up to 2 is rounded in each of the few operations of each step: 8 spacings of 2 in all.
    """
    case = BY_NAME[name]
    device = triton_device if backend == "triton" else torch.device("cpu")
    params = make_params({"matrix": LAYOUTS["contiguous"], "vector": LAYOUTS["1025"]}, dtype, device)
    twins = {name: twin_of(p) for name, p in params.items()}
    start = {name: p.detach().clone() for name, p in params.items()}
    optimizer, oracle = case.make(list(params.values()), backend=backend), case.make_oracle(list(twins.values()))
    for group in (*optimizer.param_groups, *oracle.param_groups):
        group["lr"] = 0.1  # steps that stand out from the roundings
    for _ in range(STEPS):
        for name, p in params.items():
            p.grad = (p.detach() / 2).clone()  # towards zero: no parameter grows
            twins[name].grad = p.grad.clone()
        optimizer.step()
        oracle.step()
    for name, p in params.items():
        assert float((p.detach() - start[name]).abs().double().min()) > 0, "the steps must stand out to show anything"
        allowed = 8 * 2 * torch.finfo(dtype).eps
        assert float((p - twins[name]).detach().abs().double().max()) <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_parameters_beside_float32_ones(backend: str, seed: int, triton_device: torch.device) -> None:
    """One optimizer, several dtypes, one global norm over all of them."""
    device = triton_device if backend == "triton" else torch.device("cpu")
    case = BY_NAME["adamw-default"]
    params = {dtype_name(dtype): make_params({"x": LAYOUTS["1025"]}, dtype, device)["x"] for dtype in DTYPES}
    optimizer = case.make(list(params.values()), clip=10.0, backend=backend)
    for step in range(STEPS):
        set_gradients(params, case, step)
        present = [p.grad.double().flatten() for p in params.values() if p.grad is not None]
        twins, _ = float64_step(case, params, optimizer, clipping.GlobalNorm(10.0))
        optimizer.step()
        assert optimizer.last_grad_norm is not None
        torch.testing.assert_close(optimizer.last_grad_norm.double(), torch.cat(present).norm(), rtol=1e-6, atol=0)
        for i, (name, p) in enumerate(params.items()):
            if is_active(i, step):
                # The norm of all is as exact as the float32 sums in it, for the float64 parameter too.
                assert_close(p, twins[name].detach(), error_unit(torch.float32, case), 4 * case.lr, p.dtype, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_finite_gradients_are_stepped_alike_under_every_policy(
    nonfinite: str, backend: str, seed: int, triton_device: torch.device
) -> None:
    device = triton_device if backend == "triton" else torch.device("cpu")
    check_step_by_step(
        BY_NAME["adamw-default"], LAYOUTS, torch.float32, device, None, backend=backend, nonfinite=nonfinite
    )


def test_the_same_inputs_give_the_same_bits(seed: int) -> None:
    case = BY_NAME["adamw-default"]
    params = make_params(LAYOUTS, torch.float32)
    copies = [{name: twin_of(p) for name, p in params.items()} for _ in range(2)]
    optimizers = [case.make(list(copy.values()), clip=1.0) for copy in copies]
    for step in range(STEPS):
        set_gradients(params, case, step)
        for copy, optimizer in zip(copies, optimizers, strict=True):
            for name, p in params.items():
                copy[name].grad = None if p.grad is None else p.grad.clone()
            optimizer.step()
    for name in params:
        assert torch.equal(copies[0][name], copies[1][name])
