"""What users and frameworks do to ``param_groups``, ``state`` and parameters between steps, without telling anybody."""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import pytest
import torch
from cases import BACKENDS
from torch import Tensor
from torch.nn import Parameter

import fusedlr
from fusedlr import clipping, schedules

OPTIMIZERS = ["SGD", "AdamW", "RMSprop", "Adagrad"]
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def pair(shapes: list[tuple[int, ...]]) -> tuple[list[Parameter], list[Parameter]]:
    """The same float64 parameters twice."""
    ours = [Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    return ours, copy.deepcopy(ours)


def give(*sides: list[Parameter]) -> None:
    """Equal fresh gradients on all sides."""
    for same in zip(*sides, strict=True):
        g = torch.randn_like(same[0])
        for p in same:
            p.grad = g.clone()


def assert_same(ours: list[Parameter], theirs: list[Parameter]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **EXACT)


def both(name: str, ours: Any, theirs: Any, backend: str = "torch", **options: Any) -> tuple[Any, Any]:
    return getattr(fusedlr, name)(ours, backend=backend, **options), getattr(torch.optim, name)(theirs, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_that_change_groups_follow_the_numbers_of_their_new_group(name: str, seed: int) -> None:
    shapes = [(3,), (2, 2), (), (5,), (4,), (1, 3)]
    ours, theirs = pair(shapes)

    def grouped(params: list[Parameter]) -> list[dict[str, Any]]:
        lrs = (0.01, 0.1, 0.02)
        return [{"params": params[2 * i : 2 * i + 2], "lr": lr} for i, lr in enumerate(lrs)]

    optimizer, oracle = both(name, grouped(ours), grouped(theirs))
    for _ in range(12):
        give(ours, theirs)
        optimizer.step()
        oracle.step()
        source, target = random.sample(range(3), 2)
        for each in (optimizer, oracle):
            if each.param_groups[source]["params"]:
                moved = each.param_groups[source]["params"].pop()
                each.param_groups[target]["params"].insert(0, moved)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_may_be_split_and_joined_by_hand(name: str, seed: int) -> None:
    ours, theirs = pair([(3,), (2, 2), (4,)])
    optimizer, oracle = both(name, ours, theirs, lr=0.01)
    for cut in (0, 1, 2, 0):
        for each, params in ((optimizer, ours), (oracle, theirs)):
            (first, *_) = each.param_groups
            parts = [params] if cut == 0 else [params[:cut], params[cut:]]
            each.param_groups[:] = [{**first, "params": part, "lr": 0.01 * (i + 1)} for i, part in enumerate(parts)]
        for _ in range(2):
            give(ours, theirs)
            optimizer.step()
            oracle.step()
    assert_same(ours, theirs)


def test_a_group_made_by_hand_gets_what_is_missing(seed: int) -> None:
    ours, theirs = pair([(3,), (4,)])
    optimizer, oracle = both("AdamW", ours[:1], theirs[:1], lr=0.01)
    for each, params in ((optimizer, ours), (oracle, theirs)):
        defaults = {k: v for k, v in each.param_groups[0].items() if k in oracle.defaults}
        each.param_groups.append({**defaults, "params": params[1:], "lr": 0.1})
    give(ours, theirs)
    optimizer.step()
    oracle.step()
    assert_same(ours, theirs)
    assert optimizer.last_lr == [0.01, 0.1]
    assert len(optimizer.state_dict()["param_groups"]) == 2


def test_a_replaced_group_still_has_its_schedule_and_its_overrides(seed: int) -> None:
    p = Parameter(torch.ones(3))
    optimizer = fusedlr.SGD([p], lr=0.1, schedule=schedules.Linear(10, 1.0, 0.0))
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0] = {**optimizer.param_groups[0]}
    optimizer.step()
    assert optimizer.last_lr == [pytest.approx(0.09)] == [optimizer.param_groups[0]["lr"]]
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 5.0}
    optimizer.step()
    assert optimizer.last_lr == [5.0]


def test_a_schedule_put_into_a_group_rules_from_the_next_step_on() -> None:
    p = Parameter(torch.ones(3))
    optimizer = fusedlr.SGD([p], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["schedule"] = schedules.Linear(10, 1.0, 0.0)
    optimizer.step()
    assert optimizer.last_lr == [pytest.approx(0.09)]
    optimizer.param_groups[0]["schedule"] = "soon"
    with pytest.raises(TypeError, match="schedule must be a schedule"):
        optimizer.step()
    assert optimizer.steps_taken == 2


def test_a_group_that_cannot_be_added_leaves_the_optimizer_as_it_was() -> None:
    p = Parameter(torch.ones(2))
    optimizer = fusedlr.SGD([p], lr=0.1)
    with pytest.raises(ValueError, match="min_lr"):
        optimizer.add_param_group(
            {"params": [Parameter(torch.ones(2))], "schedule": schedules.Plateau(min_lr=(0.0, 0.0, 0.0))}
        )
    assert len(optimizer.param_groups) == 1
    p.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize(
    "other", [{"precision": fusedlr.Precision.exact()}, {"nonfinite": "skip"}, {"clip": 2.0}], ids=str
)
def test_what_is_one_for_the_optimizer_is_not_for_a_group_to_say(other: dict[str, Any]) -> None:
    p = Parameter(torch.ones(2, dtype=torch.bfloat16))
    (name,) = other
    with pytest.raises(ValueError, match=f"a param group has {name}=.* the optimizer has {name}=.*constructor only"):
        fusedlr.Adam([{"params": [p], **other}])
    optimizer = fusedlr.Adam([{"params": [p], **other}], **other)  # torch's ZeRO writes it there
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    copy.deepcopy(optimizer).step()
    again = fusedlr.Adam([p], **other)
    again.load_state_dict(torch.load(saved, weights_only=True))
    again.step()
    assert again.steps_taken == 2 and again.param_groups[0].keys() - optimizer.param_groups[0].keys() == set()


@pytest.mark.parametrize("name", ["Adam", "Adagrad"])  # Adagrad has state from the start
def test_the_clock_begins_where_state_was_put(name: str) -> None:
    p, schedule = Parameter(torch.ones(2)), schedules.Linear(10, 1.0, 0.0)
    p.grad = torch.ones(2)
    first = getattr(fusedlr, name)([p], lr=0.1, schedule=schedule)
    for _ in range(3):
        first.step()
    optimizer = getattr(fusedlr, name)([p], lr=0.1, schedule=schedule)
    optimizer.state[p] = {key: value.clone() for key, value in first.state[p].items()}
    optimizer.step()
    assert optimizer.last_lr == [schedule(3, 0.1)] and optimizer.steps_taken == 4


def test_the_hidden_step_is_none_where_its_state_moves_on() -> None:
    """torch's distributed checkpoints take it; state of another form is then made from what it left."""
    p, schedule = Parameter(torch.ones(2)), schedules.Linear(10, 1.0, 0.0)
    optimizer = fusedlr.Adam([p], lr=0.1, schedule=schedule)
    lr = optimizer.param_groups[0]["lr"]
    p.grad = torch.zeros(2)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.param_groups[0]["amsgrad"] = True
    p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.last_lr == [0.1] and optimizer.steps_taken == 1


def test_the_clip_of_a_saved_group_is_that_of_another_run() -> None:
    """torch's ZeRO, and others, write groups of a checkpoint over those that are there."""
    p = Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    saving = fusedlr.SGD([{"params": [p], "nonfinite": "skip"}], lr=1.0, clip=1.0, nonfinite="skip")
    saving.step()
    optimizer = fusedlr.SGD([p], lr=1.0, clip=clipping.Value(0.5))
    optimizer.step()
    before = p.detach().clone()
    saved = saving.state_dict()["param_groups"][0]
    optimizer.param_groups[0].update({key: value for key, value in saved.items() if key not in ("params", "schedule")})
    optimizer.step()
    assert torch.equal(p, before - 0.5) and optimizer.param_groups[0]["clip"] == clipping.Value(0.5)
    for other in (optimizer, copy.deepcopy(optimizer)):
        other.add_param_group({"params": [Parameter(torch.ones(3))]})
        other.param_groups[0].pop("norm_group")
        other.step()


def test_a_group_added_later_begins_with_the_lr_that_was_given() -> None:
    for lr in (0.1, torch.tensor(0.1)):
        p = Parameter(torch.ones(2))
        optimizer = fusedlr.SGD([p], lr=lr, schedule=schedules.Linear(10, 1.0, 0.0))
        p.grad = torch.ones(2)
        for _ in range(5):
            optimizer.step()
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
        assert optimizer.next_lr() == pytest.approx([0.05, 0.05])
        assert optimizer.last_lr == pytest.approx([0.06, 0.1])  # the new group's own, until it has been stepped
    kept = torch.tensor(0.1)
    assert fusedlr.SGD([p], lr=kept).param_groups[0]["lr"] is kept


def test_the_last_lr_is_that_of_the_last_step() -> None:
    p, lr = Parameter(torch.ones(2)), torch.tensor(0.1)
    optimizer = fusedlr.SGD([p], lr=lr)
    p.grad = torch.ones(2)
    optimizer.step()
    lr.fill_(0.5)
    assert optimizer.last_lr == pytest.approx([0.1])
    other = fusedlr.SGD([p], lr=0.3)
    other.step()
    other.load_state_dict(optimizer.state_dict())
    assert other.last_lr == pytest.approx([0.5])


def test_a_group_of_adamw_may_have_its_decay_coupled(seed: int) -> None:
    ours, theirs = pair([(3,), (4,)])
    groups = [[{"params": side[:1]}, {"params": side[1:], "decoupled_weight_decay": False}] for side in (ours, theirs)]
    optimizer, oracle = both("AdamW", *groups, lr=0.1, weight_decay=0.3)
    if "decoupled_weight_decay" not in oracle.defaults:
        pytest.skip("this version of torch has an AdamW that is no Adam")
    for _ in range(3):
        give(ours, theirs)
        optimizer.step()
        oracle.step()
    assert_same(ours, theirs)


WRONG: list[dict[str, Any]] = [
    {"eps": "x"}, {"lr": None}, {"betas": (0.9, 1.5)}, {"betas": (0.9,)}, {"clip": 1.0}, {"clip": None},
    {"norm_group": "world"},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("started", [False, True])
def test_a_group_that_cannot_be_stepped_keeps_all_groups_as_they_were(wrong: dict[str, Any], started: bool) -> None:
    ours, _ = pair([(3,), (4,)])
    ours = [Parameter(p.detach().bfloat16()) for p in ours]  # by the rule, whose numbers are found on the host
    clip = clipping.AutoClip(0.5)
    optimizer = fusedlr.Adam([{"params": ours[:1]}, {"params": ours[1:]}], lr=0.1, clip=clip, backend="torch")
    give(ours)
    if started:
        optimizer.step()
    params, state = copy.deepcopy(ours), copy.deepcopy(optimizer.state_dict()["state"])
    right = {key: optimizer.param_groups[1][key] for key in wrong}
    optimizer.param_groups[1].update(wrong)
    for _ in range(3):
        with pytest.raises((TypeError, ValueError, IndexError)):
            optimizer.step()
    optimizer.param_groups[1].update(right)
    torch.testing.assert_close(ours, params, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    assert optimizer.steps_taken == int(started)
    optimizer.step()


def test_a_first_step_with_a_momentum_that_a_schedule_brings(seed: int) -> None:
    """torch's OneCycleLR and CyclicLR move a momentum that begins at 0."""
    for name in ("SGD", "RMSprop"):
        ours, theirs = pair([(3,), (4,)])
        optimizer = getattr(fusedlr, name)(ours, lr=0.1, schedule=schedules.OneCycle(0.1, 10, cycle_momentum=True))
        oracle = getattr(torch.optim, name)(theirs, lr=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(oracle, 0.1, 10)
        for _ in range(8):
            give(ours, theirs)
            optimizer.step()
            oracle.step()
            scheduler.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


# ---- parameters, gradients and state ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["t_", "data"])
def test_a_matrix_that_is_transposed_where_it_lies_is_noticed(how: str, backend: str, seed: int) -> None:
    ours, theirs = pair([(3, 3), (5,)])
    optimizer, oracle = both("SGD", ours, theirs, backend, lr=0.1, momentum=0.0)
    for _ in range(3):
        give(ours, theirs)
        optimizer.step()
        oracle.step()
        for side in (ours, theirs):
            if how == "t_":
                with torch.no_grad():
                    side[0].t_()
            else:
                side[0].data = side[0].data.t()
    assert_same(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_gradients_that_autograd_negates_lazily(shape: tuple[int, ...], backend: str, seed: int) -> None:
    sides = [[Parameter(torch.full(shape, 0.5)) for _ in range(2)] for _ in range(2)]
    optimizer = fusedlr.SGD(sides[0], lr=0.05, backend=backend)
    oracle = torch.optim.SGD(sides[1], lr=0.05)
    lazy = False
    for step in range(6):
        for (a, b), each in zip(sides, (optimizer, oracle), strict=True):
            each.zero_grad()
            z = torch.complex(a, b) if step == 0 else torch.complex(a, b).conj()  # it begins in a later step
            (z - torch.tensor(1 - 1j)).abs().square().sum().backward()
            assert b.grad is not None
            lazy = lazy or b.grad.is_neg()
            each.step()
    assert lazy
    torch.testing.assert_close(sides[0], sides[1])


def test_swapped_tensors_are_stepped(seed: int) -> None:
    """``module.to`` swaps them where torch is told to, which a weak reference would forbid."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = torch.nn.Linear(3, 3)
        optimizer = fusedlr.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.double()
        model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
        weight = model.weight.detach().clone()
        optimizer.step()
        assert model.weight.dtype == torch.float64
        assert not torch.equal(model.weight, weight)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_state_can_be_kept_and_put_back(seed: int) -> None:
    ours, theirs = pair([(3,), (2, 2)])
    optimizer, oracle = both("AdamW", ours, theirs, lr=0.01)
    give(ours, theirs)
    for each in (optimizer, oracle):
        each.step()
        shallow, copied = each.state.copy(), copy.copy(each.state)
        kept = copy.deepcopy(each.state)
        each.step()
        shallow[ours[0]] = copied[ours[0]] = {}
        # The deep copy has copies of the parameters as its keys.
        each.state = type(shallow)(dict, zip(each.param_groups[0]["params"], kept.values(), strict=True))
        each.step()
    assert_same(ours, theirs)


def test_parameters_of_a_lazy_module_are_an_error() -> None:
    with pytest.raises(ValueError, match="run the model once"):
        fusedlr.SGD(torch.nn.LazyLinear(3).parameters(), lr=0.1)


# ---- what torch can be set to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_no_number(dtype: torch.dtype, backend: str, seed: int) -> None:
    def trained() -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(seed)
        params = [Parameter(torch.randn(n, dtype=torch.float32)) for n in (3, 7)]
        optimizer = fusedlr.AdamW(params, lr=0.1, clip=1.0, schedule=schedules.Cosine(9), backend=backend)
        for _ in range(3):
            give(params)
            optimizer.step()
        assert optimizer.last_grad_norm is not None
        return list(params), optimizer.last_grad_norm

    expected = trained()
    torch.set_default_dtype(dtype)
    try:
        got = trained()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("clip", "precision"),
    [(None, None), (1.0, fusedlr.Precision.exact()), (clipping.AGC(), None), (clipping.AutoClip(0.5), None)],
    ids=str,
)
def test_the_default_device_is_not_where_a_step_works(clip: Any, precision: Any, backend: str, seed: int) -> None:
    dtype = torch.float32 if precision is None else torch.bfloat16
    shapes = ((3,), (4, 5), (70_000,) if backend == "torch" else (7,))  # alone where it is large
    params = [Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    with torch.device("meta"):
        optimizer = fusedlr.AdamW(params, lr=0.1, clip=clip, precision=precision, backend=backend)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        other = fusedlr.LAMB(params, lr=0.1, schedule={"lr": schedules.Plateau()}, backend=backend)
        other.step()
        other.report(1.0)
        other.step()
    assert optimizer.steps_taken == other.steps_taken == 2
