"""Bad input: the error says what was expected, what came and what to do, and nothing has changed."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusedlr
from fusedlr import backends, schedules
from fusedlr.gather import check_gradients
from fusedlr.state import Leaf

NAMES = ("SGD", "Adam", "AdamW")
MORE = ("RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam")


def param(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape))


def snapshot(optimizer: fusedlr.FusedOptimizer) -> dict[str, Any]:
    """Everything a failing step must leave as it was."""
    groups = [{k: v for k, v in g.items() if k not in ("params", "schedule", "clip")} for g in optimizer.param_groups]
    params = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    state = [{k: v.clone() for k, v in entry.items()} for entry in optimizer.state.values()]
    counts = (optimizer.steps_taken, int(optimizer.skipped_steps), optimizer.last_lr)
    return copy.deepcopy({"groups": groups, "params": params, "state": state, "counts": counts})


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


# ---- the constructor -----------------------------------------------------------------------------------------------

TORCHS_OWN: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"lr": -0.1}) for name in NAMES + MORE],
    *[(name, {"weight_decay": -1.0}) for name in NAMES + MORE],
    *[(name, {"lr": torch.ones(2)}) for name in NAMES + MORE],
    *[(name, {"eps": -1e-8}) for name in MORE],
    *[(name, {"betas": betas}) for name in ("Adamax", "NAdam", "RAdam") for betas in ((1.0, 0.9), (0.9, 1.0))],
    ("RMSprop", {"alpha": -0.1}),
    ("RMSprop", {"momentum": -0.1}),
    ("Adagrad", {"lr_decay": -0.1}),
    ("Adagrad", {"initial_accumulator_value": -0.1}),
    ("Adagrad", {"foreach": True, "fused": True}),
    ("Adadelta", {"rho": 1.5}),
    ("NAdam", {"momentum_decay": -1.0}),
    *[(name, {"foreach": True, "fused": True}) for name in NAMES],
    *[(name, {"betas": betas}) for name in ("Adam", "AdamW") for betas in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9))],
    ("Adam", {"eps": -1e-8}),
    ("Adam", {"lr": torch.tensor(0.1), "foreach": True}),
    ("AdamW", {"betas": (0.9, torch.tensor(0.9))}),
    ("SGD", {"momentum": -0.5}),
    ("SGD", {"nesterov": True}),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
]


@pytest.mark.parametrize(("name", "arguments"), TORCHS_OWN, ids=lambda x: re.sub(r"\s+", "", str(x)))
def test_what_torch_refuses_is_refused_with_its_words(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011  # whatever torch raises
        getattr(torch.optim, name)([param(2)], **arguments)
    with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))):
        getattr(fusedlr, name)([param(2)], **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -0.1},
        {"lr": torch.ones(2)},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"weight_decay": -1.0},
    ],
    ids=str,
)
def test_lion_refuses_what_adamw_refuses_in_the_same_words(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as theirs:  # noqa: PT011  # torch's words are what is compared
        torch.optim.AdamW([param(2)], **arguments)
    with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
        fusedlr.Lion([param(2)], **arguments)
    optimizer = fusedlr.Lion([param(2)])
    with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
        optimizer.add_param_group({"params": [param(3)], **arguments})


@pytest.mark.parametrize("betas", [(0.9,), 0.9, (0.9, 0.99, 0.5)])
def test_what_torch_finds_first_is_said_first(betas: Any) -> None:
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        fusedlr.Adam([param(2)], lr=-1, betas=betas)


@pytest.mark.parametrize("betas", [(0.9, 0.99, 0.5), (0.9,), 0.9])
@pytest.mark.parametrize("cls", [fusedlr.Lion, fusedlr.LAMB, fusedlr.Adam, fusedlr.NAdam])
def test_there_are_two_betas(cls: Any, betas: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"betas must be two numbers, but got {betas!r}")):
        cls([param(2)], betas=betas)
    optimizer = cls([param(2)])
    with pytest.raises(ValueError, match=re.escape(f"betas must be two numbers, but got {betas!r}")):
        optimizer.add_param_group({"params": [param(3)], "betas": betas})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", NAMES + MORE)
def test_arguments_are_torchs_in_its_order_and_with_its_defaults(name: str) -> None:
    theirs = list(inspect.signature(getattr(torch.optim, name)).parameters.values())
    ours = list(inspect.signature(getattr(fusedlr, name)).parameters.values())[: len(theirs)]
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("params", [[], torch.zeros(2), [torch.zeros(2)[0], "x"]], ids=["none", "tensor", "string"])
def test_what_torch_says_of_parameters(name: str, params: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        getattr(torch.optim, name)(params)
    with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))):
        getattr(fusedlr, name)(params)


OWN: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"clip": 0.0}, ValueError, "clip must be > 0, but got 0.0"),
    ({"clip": -1}, ValueError, "clip must be > 0, but got -1"),
    ({"clip": float("nan")}, ValueError, "clip must be > 0"),
    ({"clip": "1.0"}, TypeError, "clip must be a strategy of fusedlr.clipping, a number > 0 or None, but got '1.0'"),
    ({"schedule": 0.1}, TypeError, "schedule must be a schedule of fusedlr.schedules, a dict of them or None, but got"),
    ({"schedule": {"lr": 0.1}}, TypeError, "schedule['lr'] must be a schedule of fusedlr.schedules, but got 0.1"),
    ({"schedule": {"rate": schedules.Constant()}}, ValueError, "schedule has the unknown scalar 'rate'; expected one"),
    ({"schedule": {"max_norm": schedules.Constant()}}, ValueError, "schedule['max_norm'] needs a clip with a finite"),
    ({"schedule": {"max_norm": schedules.Constant()}, "clip": math.inf}, ValueError, "needs a clip with a finite"),
    ({"schedule": schedules.Cosine(9, min_lr=5.0)}, ValueError, "min_lr"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of ('propagate', 'skip', 'raise'), but got 'ignore'"),
    ({"backend": "cuda"}, ValueError, "backend must be one of ('auto', 'triton', 'torch'), but got 'cuda'"),
    ({"differentiable": True}, ValueError, "differentiable=True is not possible here"),
    ({"precision": "fp32"}, TypeError, "precision must be a fusedlr.Precision or None, but got 'fp32' (str)"),
    ({"norm_group": "world"}, ValueError, "norm_group must be None in this version of fusedlr, but got 'world'"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("arguments", "error", "message"), OWN, ids=str)
def test_own_arguments(name: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    p = param(3)
    before = p.data_ptr()
    with pytest.raises(error, match=re.escape(message)):
        getattr(fusedlr, name)([p], **arguments)
    assert p.data_ptr() == before, "the parameter was moved by a constructor that failed"


def test_complex_parameters_are_named() -> None:
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"complex parameters are not supported, but got .* torch\.complex64"):
        fusedlr.Adam([p])


@pytest.mark.parametrize("group", [{"lr": -1.0}, {"clip": 2.0}, {"betas": (0.9, 2.0)}, {"schedule": 3}], ids=str)
def test_a_bad_group_is_not_added(group: dict[str, Any]) -> None:
    optimizer = fusedlr.AdamW([param(2)], clip=1.0)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError)):
        optimizer.add_param_group({"params": [param(3)], **group})
    assert len(optimizer.param_groups) == 1
    assert_same(snapshot(optimizer), before)
    fusedlr.AdamW([param(3)], clip=1.0)  # the same without what was wrong is right


# ---- the backend ---------------------------------------------------------------------------------------------------


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    with pytest.raises(RuntimeError, match="backend='triton', but Triton is not installed; install triton or use"):
        fusedlr.Adam([param(2)], backend="triton")
    assert "no Triton is installed" in repr(fusedlr.Adam([param(2)]))


def test_triton_without_gpu_and_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no GPU here and the Triton interpreter is off; use backend='torch'"):
        fusedlr.Adam([param(2)], backend="triton")


def test_triton_for_a_tensor_on_the_cpu_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    p = param(2)
    optimizer = fusedlr.Adam([p], backend="triton")
    p.grad = torch.ones(2)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="backend='triton' cannot step parameter 0 on cpu: move it to a GPU"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_the_environment_overrides_auto_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLR_BACKEND", "gpu")
    with pytest.raises(ValueError, match="the environment variable FUSEDLR_BACKEND must be one of"):
        fusedlr.Adam([param(2)])
    assert "torch for cpu tensors (as asked)" in repr(fusedlr.Adam([param(2)], backend="torch"))


# ---- the step ------------------------------------------------------------------------------------------------------


def with_shape(p: torch.nn.Parameter) -> None:
    p.grad = torch.zeros_like(p)
    p.grad.data = torch.zeros(3, 2)


def with_dtype(p: torch.nn.Parameter) -> None:
    p.grad = torch.zeros_like(p)
    p.grad.data = torch.zeros(2, 3, dtype=torch.float64)


def with_moved_parameter(p: torch.nn.Parameter) -> None:
    p.grad = torch.zeros_like(p)
    p.data = p.data.double()


def sparse(p: torch.nn.Parameter) -> None:
    p.grad = torch.zeros(2, 3).to_sparse()


BAD_GRADIENTS: list[tuple[Callable[[torch.nn.Parameter], None], str]] = [
    (with_shape, r"the gradient of parameter 1 \(shape \(2, 3\).*has shape \(3, 2\); a gradient must have the shape"),
    (with_dtype, r"the gradient of parameter 1.*has dtype torch.float64; cast the gradient"),
    (sparse, r"the gradient of parameter 1.*is sparse.*sparse gradients are not supported; use"),
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(("spoil", "message"), BAD_GRADIENTS, ids=lambda x: getattr(x, "__name__", ""))
def test_gradients_that_do_not_fit(
    spoil: Callable[[torch.nn.Parameter], None],
    message: str,
    steps_before: int,
    backend: str,
    triton_device: torch.device,
) -> None:
    if backend == "triton" and triton_device.type != "cpu":
        pytest.skip("the gradients are made on the CPU, where a GPU runs no interpreter")
    good, bad = param(5), param(2, 3)
    optimizer = fusedlr.AdamW([good, bad], schedule=schedules.Linear(9, 1.0, 0.0), clip=1.0, backend=backend)
    for _ in range(steps_before):
        good.grad, bad.grad = torch.randn(5), torch.randn(2, 3)
        optimizer.step()
    good.grad = torch.randn(5)
    spoil(bad)
    before = snapshot(optimizer)
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    bad.grad = torch.randn(2, 3)
    optimizer.step()
    assert optimizer.steps_taken == steps_before + 1


def test_a_gradient_that_stayed_behind() -> None:
    p = param(2, 3)
    optimizer = fusedlr.SGD([p], lr=0.1)
    with_moved_parameter(p)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 \(shape \(2, 3\), torch.float64, cpu\) has dtype torch.float32"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_a_gradient_on_another_device() -> None:
    """autograd and p.grad refuse one themselves; with a GPU p.data can still be moved away from its gradient."""
    leaf = Leaf(param(2, 3), 0, 0, None, fusedlr.Precision())
    with pytest.raises(ValueError, match="lies on meta; move the gradient to the device of its parameter"):
        check_gradients([leaf], [torch.zeros(2, 3, device="meta")])


def test_a_closure_that_raises_changes_nothing() -> None:
    p = param(4)
    optimizer = fusedlr.Adam([p], schedule=schedules.Constant(0.5))
    p.grad = torch.ones(4)
    optimizer.step()
    before = snapshot(optimizer)

    def closure() -> float:
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        optimizer.step(closure)
    assert_same(snapshot(optimizer), before)
