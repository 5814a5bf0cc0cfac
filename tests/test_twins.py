"""Twins: every reference has a kernel function of the same name, with the same arguments in the same order.

And what every reference must do: leave its arguments alone, but where it may write over them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusedlr
from fusedlr import clipping as host_clipping
from fusedlr import optimizers
from fusedlr import rule as host_rule
from fusedlr.backends import units as host_units
from fusedlr.clipping import adaptive as host_adaptive
from fusedlr.rule import Rule, overwriting

pytest.importorskip("triton")
device_rules: Any = importlib.import_module("fusedlr.kernels.rules")
trust_rules: Any = importlib.import_module("fusedlr.kernels.trust_rules")
device_clipping: Any = importlib.import_module("fusedlr.kernels.clipping")
device_adaptive: Any = importlib.import_module("fusedlr.kernels.adaptive")
device_units: Any = importlib.import_module("fusedlr.kernels.units")

# Kernel functions without a reference: what the skeleton does to an element, and a strategy without a norm.
SKELETON = {"clipped", "scale", "scale_and_clamp", "no_factor"}


def family_modules() -> list[Any]:
    return [
        importlib.import_module(f"fusedlr.optimizers.{info.name}") for info in pkgutil.iter_modules(optimizers.__path__)
    ]


def find_rules() -> dict[str, Rule]:
    """Every Rule that a module of fusedlr.optimizers holds, at top level or in a table."""
    found: dict[str, Rule] = {}
    for module in family_modules():
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else [value]
            found |= {rule.name: rule for rule in held if isinstance(rule, Rule)}
    return found


def arguments(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(getattr(function, "fn", function)).parameters)


RULES = find_rules()
FACTORS = {
    cls.factor.__name__: cls.factor
    for cls in (getattr(host_clipping, name) for name in host_clipping.__all__)
    if inspect.isclass(cls) and callable(cls.factor)  # AGC's is a number
}


def test_the_rules_are_found() -> None:
    assert set(RULES) == {
        "sgd", "sgd_momentum", "adam", "adam_amsgrad", "adamw", "adamw_amsgrad", "rmsprop", "rmsprop_momentum",
        "rmsprop_centered", "rmsprop_centered_momentum", "adagrad", "adadelta", "adamax", "nadam", "nadamw", "radam",
        "radamw", "lion", "lamb", "lars", "lars_momentum",
    }  # fmt: skip
    assert set(FACTORS) == {"clip_factor", "normalize_factor"}


@pytest.mark.parametrize("name", sorted(RULES))
def test_update_and_row_have_twins(name: str) -> None:
    rule = RULES[name]
    for reference in (rule.update, rule.row):
        twin = getattr(device_rules, reference.__name__)
        assert twin.__name__ == reference.__name__
        assert arguments(twin) == arguments(reference)


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_row_has_the_same_fields(name: str) -> None:
    hyper = RULES[name].hyper
    assert getattr(device_rules, hyper.__name__)._fields == hyper._fields


@pytest.mark.parametrize("name", sorted(RULES))
def test_arguments_are_the_scalars_and_the_state(name: str) -> None:
    rule = RULES[name]
    assert arguments(rule.row) == ["step", *rule.carried, *rule.scalars]
    assert arguments(rule.update) == ["p", "g", *rule.slots, "h"]


@pytest.mark.parametrize("name", sorted(RULES))
def test_what_a_tensor_carries_comes_first_in_its_row(name: str) -> None:
    rule = RULES[name]
    assert rule.hyper._fields[: len(rule.carried)] == rule.carried
    assert device_rules.CARRIED.get(rule.row.__name__, 0) == len(rule.carried)
    assert len(rule.start) in (0, len(rule.slots) + len(rule.carried))


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_tables_of_the_kernels_name_the_references(name: str) -> None:
    rule = RULES[name]
    assert device_rules.RULES[name] == (rule.hyper.__name__, rule.row.__name__)


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_reference_gives_its_own_fields_and_as_much_state_as_it_takes(name: str) -> None:
    rule = RULES[name]
    h = rule.row(1, *[0.5] * len((*rule.carried, *rule.scalars)))
    assert type(h) is rule.hyper
    x = torch.ones(3)
    assert len(rule.update(x, x, *[x] * len(rule.slots), h)) == 1 + len(rule.slots)


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_clip_factors_have_twins(name: str) -> None:
    twin = getattr(device_clipping, name)
    assert twin.__name__ == name
    assert arguments(twin) == arguments(FACTORS[name]) == ["norm", "max_norm", "eps"]


@pytest.mark.parametrize("name", device_adaptive.__all__)
def test_adaptive_thresholds_and_factors_have_twins(name: str) -> None:
    """The reference reads a tensor where the twin reads memory."""
    twin, reference = getattr(device_adaptive, name), getattr(host_adaptive, name)
    assert twin.__name__ == name
    assert [a.replace("record_ptr", "record") for a in arguments(twin)] == arguments(reference)
    thresholds = {cls.threshold.__name__ for cls in (host_clipping.ZClip, host_clipping.AutoClip)}
    assert set(device_adaptive.__all__) == thresholds | {"unit_factor"} <= set(host_adaptive.__all__)


def test_the_host_knows_how_the_kernels_join_pieces() -> None:
    for name in ("FEW", "FEW_UNITS", "MANY_UNITS"):
        assert getattr(host_units, name) == getattr(device_units, name).value


@pytest.mark.parametrize("name", ["expm1_log", "averaged", "averaged_square", "decayed"])
def test_the_shared_helpers_have_twins(name: str) -> None:
    assert arguments(getattr(device_rules, name)) == arguments(getattr(host_rule, name))


@pytest.mark.parametrize("name", sorted(name for name, rule in RULES.items() if rule.trust is not None))
def test_trust_ratios_have_twins(name: str) -> None:
    rule = RULES[name]
    assert rule.trust is not None
    direction, ratio = rule.trust.direction, rule.trust.ratio
    for reference in (direction, ratio):
        twin = getattr(device_rules, reference.__name__)
        assert twin.__name__ == reference.__name__
        assert arguments(twin) == arguments(reference)
    assert arguments(direction) == ["p", "g", *rule.trust.slots, "h"]
    assert rule.slots[: len(rule.trust.slots)] == rule.trust.slots
    assert arguments(ratio) == ["p_norm", "norm", "h"]
    assert rule.hyper._fields[-1] == "trust"
    assert trust_rules.TRUSTS[name] == (direction.__name__, ratio.__name__)


def test_the_rules_with_a_trust_ratio_are_the_same() -> None:
    assert set(trust_rules.TRUSTS) == {name for name, rule in RULES.items() if rule.trust is not None}


def test_no_public_kernel_function_is_without_a_reference() -> None:
    references = {f.__name__ for rule in RULES.values() for f in (rule.update, rule.row, rule.hyper)}
    trusts = [rule.trust for rule in RULES.values() if rule.trust is not None]
    references |= {f.__name__ for trust in trusts for f in (trust.direction, trust.ratio)}
    assert set(device_rules.__all__) == references
    assert set(device_clipping.__all__) - SKELETON == set(FACTORS)


def test_every_optimizer_runs_by_a_known_rule() -> None:
    for name in optimizers.__all__:
        optimizer = getattr(fusedlr, name)([torch.nn.Parameter(torch.ones(2))], lr=0.1, backend="torch")
        assert optimizer._rule(optimizer.param_groups[0]).name in RULES


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_gives_the_same_bits_where_its_results_belong(
    name: str, dtype: torch.dtype, weight_decay: float, seed: int
) -> None:
    """Over its parameter and state it must not write before it has read them for the last time."""
    rule = RULES[name]
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "alpha": 0.98, "rho": 0.9, "eps": 1e-8, "momentum": 0.8}
    numbers |= {"dampening": 0.1, "nesterov": 1.0, "lr_decay": 0.01, "momentum_decay": 0.004, "trust_coefficient": 0.01}
    scalars = {s: numbers.get(s, 1.0) for s in rule.scalars} | {"weight_decay": weight_decay}
    for step in (1.0, 2.0, 40.0):
        generator = torch.Generator().manual_seed(seed + int(step))
        tensors = [torch.rand(1003, dtype=dtype, generator=generator) + 0.5 for _ in range(2 + len(rule.slots))]
        p, g, *slots = tensors
        g -= 1.0
        h = rule.row(step, *[0.9] * len(rule.carried), **{s: v for s, v in scalars.items() if s in rule.scalars})
        h = h._replace(trust=0.7) if rule.trust is not None else h
        wanted = rule.update(p.clone(), g.clone(), *(slot.clone() for slot in slots), h)
        before = g.clone()
        with overwriting():
            got = rule.update(p, g, *slots, h)
        assert torch.equal(g, before), "the gradient was written"
        for new, expected, old in zip(got, wanted, (p, *slots), strict=True):
            torch.testing.assert_close(new, expected, rtol=0, atol=0, equal_nan=True)  # centred RMSprop may have NaN
            assert new is old or new.data_ptr() != old.data_ptr()
    again = rule.update(p.clone(), g, *(slot.clone() for slot in slots), h)
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(again, (p, *slots), strict=True)), "outside, it is pure"
