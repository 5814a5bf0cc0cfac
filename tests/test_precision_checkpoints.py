"""Checkpoints of every precision: saved, loaded, converted, exported, copied; and what is wrong with one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import STATEFUL, Case, in_storages
from test_checkpoint import distributed_state, set_distributed_state
from torch import Tensor, nn
from training import COSINE, assert_same_model, assert_same_state, make_model, through_file, train

import fusedlr
from fusedlr import Precision
from fusedlr.conversion import full_slot

BF16 = torch.bfloat16
PRECISIONS = {
    "none": None,
    "fp32": Precision(state="fp32", rounding="stochastic"),
    "master": Precision(state="fp32", weights="fp32"),
    "exact": Precision.exact(),
    "bf16": Precision(state="bf16", weights="fp32"),
    "split8": Precision(state="fp32", weights="split", bits=8),
    "int8": Precision(state="int8", weights="split"),
    "compact": Precision.compact(),
}
STATE = [case for case in STATEFUL if "centered" not in case.name]
ADAM = next(case for case in STATEFUL if case.name == "adam-default")


def trained(case: Case, name: str, steps: int = 3, **own: Any) -> tuple[nn.Module, fusedlr.FusedOptimizer]:
    torch.manual_seed(2)
    model = make_model(BF16)
    optimizer = case.make(model.parameters(), precision=PRECISIONS[name], schedule=COSINE, **own)
    train(model, optimizer, range(steps))
    return model, optimizer


def weights(optimizer: fusedlr.FusedOptimizer) -> list[Tensor]:
    return list(optimizer.full_precision_parameters().values())


def numbers(optimizer: fusedlr.FusedOptimizer, case: Case) -> list[dict[str, Tensor]]:
    params = optimizer.full_precision_parameters()
    return [{key: full_slot(optimizer.state[p], key).float() for key in case.state} for p in params]


@pytest.mark.parametrize("how", ["file", "distributed", "distributed-flat", "deepcopy", "pickle"])
@pytest.mark.parametrize(("case", "name"), in_storages(STATE, PRECISIONS), ids=str)
def test_the_same_precision_continues_with_the_same_bits(case: Case, name: str, how: str) -> None:
    """The noise too: its seed travels along, even into an optimizer that was made with another."""
    model, optimizer = trained(case, name)
    if how in ("deepcopy", "pickle"):
        both = model, optimizer
        other, loaded = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    else:
        other = copy.deepcopy(model)
        given = PRECISIONS[name]
        precision = None if given is None else Precision(given.state, given.weights, given.rounding, given.bits, seed=7)
        loaded = case.make(other.parameters(), precision=precision, schedule=COSINE)
        if how == "file":
            loaded.load_state_dict(through_file(optimizer.state_dict()))
        else:
            flat = how == "distributed-flat"
            set_distributed_state(other, loaded, copy.deepcopy(distributed_state(model, optimizer, flat)), flat)
    assert_same_state(optimizer, loaded)
    train(model, optimizer, range(3, 6))
    train(other, loaded, range(3, 6))
    assert_same_model(model, other)
    assert_same_state(optimizer, loaded)


@pytest.mark.parametrize("target", PRECISIONS)
@pytest.mark.parametrize("source", PRECISIONS)
def test_every_precision_loads_every_other_through_float32(source: str, target: str) -> None:
    case = ADAM
    model, optimizer = trained(case, source)
    other = copy.deepcopy(model)
    loaded = case.make(other.parameters(), precision=PRECISIONS[target], schedule=COSINE)
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    assert_same_model(model, other)
    given, wanted = PRECISIONS[source] or Precision(), PRECISIONS[target] or Precision()
    for w, x, p in zip(weights(optimizer), weights(loaded), other.parameters(), strict=True):
        if wanted.weights == "param":
            assert torch.equal(x, p.detach().float())
        elif wanted.bits == 16:
            # All bits; of two in 2**16 weights, those half-way between two bfloat16, the last one may differ.
            assert ((x - w).abs() <= w.abs() * 2.0**-23).all()
            assert given.weights == "param" or torch.equal(x, w)
        else:
            assert ((x - w).abs() <= w.abs() * 2.0**-15).all()
    for was, now in zip(numbers(optimizer, case), numbers(loaded, case), strict=True):
        for key, x in was.items():
            bound = {"fp32": 0.0, "param": 2.0**-8, "bf16": 2.0**-8, "int8": 2.0**-4 * (1 + 1e-5)}[wanted.state]
            if given.state == wanted.state:
                bound = 0.0
            assert ((now[key] - x).abs() <= bound * (x.abs() + 2.0**-15 * x.abs().max())).all(), key
    # And it goes on, in the keys of its own storage.
    train(other, loaded, range(3, 5))
    fresh = trained(case, target)[1]
    for entry, like in zip(loaded.state.values(), fresh.state.values(), strict=True):
        assert {k: v.dtype for k, v in entry.items()} == {k: v.dtype for k, v in like.items()}


def test_float32_moments_survive_torchs_cast() -> None:
    """torch's own loader would round them to the bfloat16 of their parameter."""
    model, optimizer = trained(ADAM, "exact")
    loaded = ADAM.make(copy.deepcopy(model).parameters(), precision=PRECISIONS["exact"])
    loaded.load_state_dict(optimizer.state_dict())
    for was, now in zip(numbers(optimizer, ADAM), numbers(loaded, ADAM), strict=True):
        assert any(not torch.equal(x, x.bfloat16().float()) for x in was.values())
        assert all(torch.equal(x, now[key]) for key, x in was.items())


# What a checkpoint is made of are the arrays of the state, which both backends keep alike (their bits are compared in
# test_precision): Triton's interpreter, which takes its time, goes through all storages for one rule.
@pytest.mark.parametrize(
    ("case", "name", "backend"),
    [(*both, "torch") for both in in_storages(STATE, PRECISIONS)]
    + [(*both, "triton") for both in in_storages(STATE, PRECISIONS, [ADAM])],
    ids=str,
)
def test_torchs_format_loads_into_torch(case: Case, name: str, backend: str) -> None:
    model, optimizer = trained(case, name, backend=backend)
    saved = through_file(optimizer.state_dict(format="torch"))
    other = copy.deepcopy(model)
    oracle = case.make_oracle(other.parameters())
    oracle.load_state_dict(saved)
    expected = numbers(optimizer, case)
    for i, p in enumerate(other.parameters()):
        assert set(saved["state"][i]) == {"step", *case.state, *case.numbers}
        for key in case.state:
            assert saved["state"][i][key].dtype in (torch.float32, BF16)
            assert torch.equal(saved["state"][i][key].float(), expected[i][key])
            assert torch.equal(oracle.state[p][key], expected[i][key].bfloat16())
    train(other, oracle, range(3, 5))
    assert all(p.isfinite().all() for p in other.parameters())


def test_an_unknown_format_is_an_error() -> None:
    with pytest.raises(ValueError, match="format must be 'fusedlr' or 'torch', but got 'numpy'"):
        trained(ADAM, "compact")[1].state_dict(format="numpy")


@pytest.mark.parametrize("name", PRECISIONS)
def test_full_precision_parameters_are_float32_copies_in_order(name: str) -> None:
    model, optimizer = trained(ADAM, name)
    full = optimizer.full_precision_parameters()
    assert all(p is q for p, q in zip(full, model.parameters(), strict=True))
    for p, w in full.items():
        assert w.dtype == torch.float32 and w.shape == p.shape
        assert ((w - p.detach().float()).abs() <= p.detach().float().abs() * 2.0**-8).all()
        w.zero_()
    assert all(w.any() for w in weights(optimizer)), "what was exported is the optimizer's own"


def test_memory_order_stays() -> None:
    """Groups of 8-bit state run in the order of memory; a parameter laid out otherwise takes them over by value."""
    p = nn.Parameter(torch.randn(4, 6, 5, 5, dtype=BF16).contiguous(memory_format=torch.channels_last))
    optimizer = fusedlr.AdamW([p], precision=Precision.compact())
    for _ in range(2):
        p.grad = torch.randn_like(p)
        optimizer.step()
    q = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    loaded = fusedlr.AdamW([q], precision=Precision(state="fp32", weights="fp32"))
    loaded.load_state_dict(optimizer.state_dict())
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(loaded.state[q][key], full_slot(optimizer.state[p], key))
    (w,), (x,) = weights(optimizer), weights(loaded)
    assert torch.equal(w, x)
    back = fusedlr.AdamW([q], precision=Precision.compact())
    back.load_state_dict(optimizer.state_dict())
    difference = (full_slot(back.state[q], "exp_avg") - loaded.state[q]["exp_avg"]).abs()
    assert difference.max() <= loaded.state[q]["exp_avg"].abs().max() * 2.0**-4


def test_a_model_may_be_loaded_after_its_optimizer() -> None:
    """What is beside the weights does not depend on what the parameters happen to hold meanwhile."""
    for name in ("master", "exact", "compact"):
        model, optimizer = trained(ADAM, name)
        other = make_model(BF16)
        loaded = ADAM.make(other.parameters(), precision=PRECISIONS[name], schedule=COSINE)
        loaded.load_state_dict(optimizer.state_dict())
        other.load_state_dict(model.state_dict())
        for w, x in zip(weights(optimizer), weights(loaded), strict=True):
            assert torch.equal(w, x)


@pytest.mark.parametrize(("source", "target"), [("exact", "split8"), ("split8", "exact"), ("master", "exact")])
def test_a_model_may_be_loaded_after_an_optimizer_of_another_precision(source: str, target: str) -> None:
    """More or fewer missing bits are as good beside a parameter that is not there yet, and so are those of a master."""
    model, optimizer = trained(ADAM, source)
    if source == "master":  # half of these lie half-way between two bfloat16, which a cast has rounded to even
        for p in model.parameters():
            w = optimizer.state[p]["master"]
            ties = (w.view(torch.int32) & -0x10000 | 0x8000).view(torch.float32)
            w.copy_(torch.where(torch.rand_like(w) < 0.5, ties, w))
            p.data.copy_(w)
    others = []
    for model_first in (True, False):
        other = make_model(BF16)
        for p in other.parameters():
            p.data.zero_()
        loaded = ADAM.make(other.parameters(), precision=PRECISIONS[target], schedule=COSINE)
        if model_first:
            other.load_state_dict(model.state_dict())
        loaded.load_state_dict(optimizer.state_dict())
        if not model_first:
            other.load_state_dict(model.state_dict())
        others.append(weights(loaded))
    for w, x, y in zip(weights(optimizer), *others, strict=True):
        assert torch.equal(x, y)
        off = 2.0**-15 if target == "split8" else 2.0**-23  # beside an even neighbour a half is one float32 less
        assert ((x - w).abs() <= w.abs() * off).all()


# ---- what is wrong with one ------------------------------------------------------------------------------------------


def spoil(entry: dict[str, Any], how: str) -> None:
    if how == "truncated scale":
        entry["exp_avg_scale"] = entry["exp_avg_scale"][:0]
    elif how == "no scale":
        del entry["exp_avg_sq_scale"]
    elif how == "integer scale":
        entry["exp_avg_scale"] = entry["exp_avg_scale"].int()
    elif how == "negative scale":
        entry["exp_avg_scale"] = -entry["exp_avg_scale"] - 1
    elif how == "truncated codes":
        entry["exp_avg"] = entry["exp_avg"][:1]
    elif how == "other codes":
        entry["exp_avg_sq"] = entry["exp_avg_sq"].to(torch.int8)
    elif how == "no code":
        entry["exp_avg"] = torch.full_like(entry["exp_avg"], -128)
    elif how == "truncated low":
        entry["param_low"] = entry["param_low"].flatten()[:1]
    elif how == "float low":
        entry["param_low"] = entry["param_low"].float()
    elif how == "master of another shape":
        entry["master"] = torch.zeros(3)
    elif how == "master of integers":
        entry["master"] = torch.zeros_like(entry["param_low"])


WRONG = {
    "truncated scale": "needs a floating-point tensor of shape (1,) as 'exp_avg_scale', but got (0,)",
    "no scale": "needs a floating-point tensor of shape (1,) as 'exp_avg_sq_scale', but got NoneType",
    "integer scale": "needs a floating-point tensor of shape (1,) as 'exp_avg_scale'",
    "negative scale": "is corrupted: 'exp_avg_scale' holds a negative number",
    "truncated codes": "has 'exp_avg' of shape",
    "other codes": "has 'exp_avg_sq' of dtype torch.int8, but its 8-bit codes are torch.uint8",
    "no code": "is corrupted: 'exp_avg' holds the code -128",
    "truncated low": "needs as 'param_low' a tensor of shape (4, 5)",
    "float low": "needs as 'param_low' a tensor of shape (4, 5) and of one of the dtypes",
    "master of another shape": "needs as 'master' a tensor of shape (4, 5)",
    "master of integers": "needs as 'master' a tensor of shape (4, 5)",
}


@pytest.mark.parametrize("target", ["compact", "exact", "none"])
@pytest.mark.parametrize("how", WRONG)
def test_a_corrupted_checkpoint_changes_nothing(how: str, target: str) -> None:
    _, optimizer = trained(ADAM, "compact")
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved["state"][0], how)
    other, loaded = trained(ADAM, target, steps=2)
    before = copy.deepcopy((other.state_dict(), loaded.state_dict()))
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its message is compared without escapes
        loaded.load_state_dict(saved)
    assert "the state of parameter 0" in str(error.value) and WRONG[how] in str(error.value)
    after = other.state_dict(), loaded.state_dict()
    assert all(torch.equal(value, after[0][key]) for key, value in before[0].items())
    assert before[1]["param_groups"] == after[1]["param_groups"]
    for index, entry in before[1]["state"].items():
        assert all(torch.equal(value, after[1]["state"][index][key]) for key, value in entry.items())
