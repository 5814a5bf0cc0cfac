"""The algorithm in each optimizer's docstring, run as the code that it is, ends where the optimizer does."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BY_NAME, CASES, Case
from torch import Tensor

import fusedlr
from fusedlr import clipping

MAX_NORM, EPS = 0.5, 1e-6


def algorithm(cls: type) -> str:
    found = re.search(r"^Algorithm:\n((?:    .*\n|\n)+)", inspect.getdoc(cls) or "", re.MULTILINE)
    assert found is not None, f"{cls.__name__} has no algorithm in its docstring"
    return inspect.cleandoc("\n" + found[1])


def either(on_numbers: Callable[..., Any], on_tensors: Callable[..., Any]) -> Callable[..., Any]:
    """A function of numbers or of tensors."""
    return lambda *x: on_tensors(*x) if isinstance(x[0], Tensor) else on_numbers(*x)


FUNCTIONS = {
    "sqrt": either(lambda x: x**0.5, torch.sqrt),
    "max": either(max, torch.maximum),
    "min": min,
    "abs": torch.abs,
    "sign": torch.sign,
    "norm": lambda x: float(torch.linalg.vector_norm(x)),
}


def given(case: Case) -> dict[str, Any]:
    """The arguments of a case by the names of the algorithm."""
    values = {name: p.default for name, p in inspect.signature(case.fused).parameters.items()} | case.kwargs
    if "betas" in values:
        values["beta1"], values["beta2"] = values["betas"]
    return values


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_algorithm_is_what_the_optimizer_does(case: Case) -> None:
    code = compile(algorithm(case.fused), f"the algorithm of {case.fused.__name__}", "exec")
    generator = torch.Generator().manual_seed(7)
    p = torch.nn.Parameter(torch.randn(6, dtype=torch.float64, generator=generator))
    optimizer = case.make([p], clip=clipping.GlobalNorm(MAX_NORM, eps=EPS), backend="torch")
    rule = optimizer._rule(optimizer.param_groups[0])
    keys = (*rule.slots, *rule.carried)
    starts = dict(zip(keys, rule.start or (0.0,) * len(keys), strict=True))
    state: dict[str, Any] = {"step": 0, "p": p.detach().clone(), "max_exp_avg_sq": torch.zeros_like(p.detach())}
    state |= {key: torch.full_like(p.detach(), v) if key in rule.slots else v for key, v in starts.items()}
    # RAdam is rectified from the sixth step on, with the betas of some cases later.
    for _ in range(12):
        p.grad = torch.randn(6, dtype=torch.float64, generator=generator)
        c = min(1.0, MAX_NORM / (float(p.grad.norm()) + EPS))
        state = {**given(case), **state, "g": p.grad.clone(), "c": c, **FUNCTIONS}
        for key in rule.carried:  # the bank keeps them in float32
            state[key] = float(torch.tensor(state[key], dtype=torch.float32))
        exec(code, {}, state)
        optimizer.step()
    # Written with 1 - beta**step, the algorithm has torch's cancellation: 1e-10 for RAdam, 1e-12 for the others.
    close = dict(rtol=10 * case.oracle_error, atol=10 * case.oracle_error)
    torch.testing.assert_close(p.detach(), state["p"], **close)
    assert optimizer.state[p]["step"] == state["step"] == 12
    for key in rule.slots:
        torch.testing.assert_close(optimizer.state[p][key], state[key], **close)
    for key in rule.carried:
        assert float(optimizer.state[p][key]) == pytest.approx(state[key], rel=1e-6)


def test_every_optimizer_has_an_algorithm_and_a_case() -> None:
    classes = {getattr(fusedlr, name) for name in fusedlr.optimizers.__all__}
    assert {case.fused for case in CASES} == classes
    for cls in classes:
        lines = algorithm(cls).splitlines()
        assert lines[0] == "# once a tensor, in float64" and "# each element, in float32" in lines


def test_a_wrong_algorithm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = algorithm(fusedlr.AdamW)
    monkeypatch.setitem(globals(), "algorithm", lambda cls: right.replace("1 - beta2**step", "1 - beta2**(step + 1)"))
    with pytest.raises(AssertionError):
        test_the_algorithm_is_what_the_optimizer_does(BY_NAME["adamw-default"])
