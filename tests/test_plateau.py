"""Plateau beside torch's ReduceLROnPlateau, in all modes and on both backends, and what keeps its state."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
from typing import Any

import pytest
import torch
from cases import BACKENDS
from executors import never_waiting, step_by_the_executor_of_devices
from test_device_executor import NoWait
from torch.optim.lr_scheduler import ReduceLROnPlateau
from training import gradients, make_model, split_groups, through_file, train

import fusedlr
from fusedlr import schedules as s

LRS = (0.8, 0.3)


def metrics(seed: int, n: int) -> list[float]:
    """A noisy curve with repetitions, NaN, infinities and negative numbers: no comparison is left out."""
    generator = random.Random(seed)
    found: list[float] = []
    for i in range(n):
        kind = generator.random()
        if kind < 0.1:
            found.append(generator.choice([math.nan, math.inf, -math.inf, 0.0]) if i > n // 2 else math.nan)
        elif found and kind < 0.3:
            found.append(generator.choice(found) * (1 + generator.choice([0.0, 1e-4, -1e-4, 0.1, -0.1])))
        else:
            found.append(generator.uniform(-1, 3))
    return found


def groups(n: int = 2) -> list[dict[str, Any]]:
    return [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": lr} for lr in LRS[:n]]


def step(optimizer: torch.optim.Optimizer) -> list[float]:
    """Take a step of SGD with gradients of one; what each group's parameters were lowered by."""
    params = [group["params"][0] for group in optimizer.param_groups]
    for p in params:
        p.data.zero_()
        p.grad = torch.ones_like(p)
    optimizer.step()
    return [-float(p.detach()[0]) for p in params]


MODES = list(itertools.product(["min", "max"], ["rel", "abs"]))


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode, threshold_mode", MODES)
def test_the_same_as_in_torch(mode: str, threshold_mode: str, backend: str, kind: Any) -> None:
    generator = random.Random(f"{mode}{threshold_mode}")
    n = 60 if backend == "torch" else 16
    for trial in range(8 if backend == "torch" else 2):
        arguments: dict[str, Any] = {
            "mode": mode, "threshold_mode": threshold_mode, "factor": generator.choice([0.5, 0.1, 0.9, 0.0]),
            "patience": generator.choice([0, 1, 3]), "cooldown": generator.choice([0, 1, 4]),
            "threshold": generator.choice([0.0, 1e-4, 0.2, 1.0]), "eps": generator.choice([1e-8, 0.05]),
            "min_lr": generator.choice([0.0, 0.02, [0.4, 0.001]]),
        }  # fmt: skip
        optimizer = fusedlr.SGD(groups(), lr=1.0, schedule=s.Plateau(**arguments), backend=backend)
        oracle = torch.optim.SGD(groups(), lr=1.0)
        scheduler = ReduceLROnPlateau(oracle, **arguments)
        for metric in metrics(trial, n):
            lowered = step(optimizer)
            expected = [group["lr"] for group in oracle.param_groups]
            # The same operations on float64: not a bit may differ.
            assert optimizer.last_lr == expected, arguments
            assert lowered == [float(torch.tensor(lr)) for lr in expected], arguments
            given = kind(metric) if kind is float else torch.tensor(metric, dtype=torch.float64)
            optimizer.report(given)
            scheduler.step(metric)
        assert optimizer.next_lr() == [group["lr"] for group in oracle.param_groups]


def test_the_random_runs_reduce_and_cool_down() -> None:
    """What the test above compares is not a flat line."""
    optimizer = fusedlr.SGD(groups(1), lr=1.0, schedule=s.Plateau(patience=1, cooldown=2, factor=0.9))
    seen = set()
    for metric in metrics(0, 60):
        step(optimizer)
        optimizer.report(metric)
        seen.update(optimizer.next_lr())
    assert len(seen) > 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_a_warm_up_only_its_own_reports_count(backend: str) -> None:
    schedule = s.Warmup(4).then(s.Plateau(factor=0.5, patience=1).for_steps(5)).then(s.Constant(0.25))
    optimizer = fusedlr.SGD(groups(1), lr=0.8, schedule=schedule, backend=backend)
    used = []
    for _ in range(12):
        used += step(optimizer)
        optimizer.report(1.0)
    # Reports count from t = 4: the first is the best, bad ones at t = 5, 6 halve the lr, those at 7, 8 do it again.
    assert used == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_composed(backend: str) -> None:
    halving = s.Plateau(factor=0.5, patience=0)
    for schedule, expected in [
        (s.product(s.Linear(4, 1.0, 0.0), halving), [0.8, 0.6, 0.2, 0.05, 0.0]),
        (s.per_epoch(s.Warmup(1).then(halving), 2), [0.8, 0.8, 0.8, 0.4, 0.2]),
        (halving.for_steps(2), [0.8, 0.8, 0.4, 0.4, 0.4]),
        (s.product(s.Linear(4, 1.0, 0.0), halving).for_steps(2), [0.8, 0.6, 0.2, 0.2, 0.2]),
    ]:
        optimizer = fusedlr.SGD(groups(1), lr=0.8, schedule=schedule, backend=backend)
        used = []
        for _ in range(5):
            used += step(optimizer)
            optimizer.report(1.0)
        assert used == pytest.approx(expected, rel=1e-6), schedule


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_scalars_and_groups_have_their_own(backend: str, seed: int) -> None:
    model, other = make_model(), make_model()
    other.load_state_dict(model.state_dict())
    decay = {"weight_decay": s.Plateau(factor=0.5, patience=0), "lr": s.Plateau(patience=1)}
    optimizer = fusedlr.AdamW(
        split_groups(model, schedule={"lr": s.Plateau(mode="max", patience=0)}, weight_decay=0.1),
        lr=0.1, weight_decay=0.3, schedule=decay, clip=1.0, backend=backend,
    )  # fmt: skip
    oracle = torch.optim.AdamW(split_groups(other, weight_decay=0.1), lr=0.1, weight_decay=0.3)
    for t in range(5):
        # Better once, then worse for "min" and better for "max".
        oracle.param_groups[0]["weight_decay"] = 0.3 * 0.5 ** max(t - 1, 0)
        oracle.param_groups[0]["lr"] = 0.1 * 0.1 ** (max(t - 1, 0) // 2)
        gradients(model, t)
        gradients(other, t)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        oracle.step()
        optimizer.report(float(t))
        for ours, theirs in zip(optimizer.param_groups, oracle.param_groups, strict=True):
            assert ours["weight_decay"] == pytest.approx(theirs["weight_decay"], rel=1e-12)
            assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-12)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_override_rules_until_it_is_set_back(backend: str) -> None:
    optimizer = fusedlr.SGD(groups(1), lr=0.8, schedule=s.Plateau(factor=0.5, patience=0), backend=backend)
    assert step(optimizer) == pytest.approx([0.8])
    optimizer.report(1.0)
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.report(1.0)
    assert step(optimizer) == pytest.approx([0.7])
    optimizer.param_groups[0]["lr"] = 0.8
    assert step(optimizer) == pytest.approx([0.4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_steps_move_no_clock(backend: str) -> None:
    schedule = s.Warmup(2).then(s.Plateau(factor=0.5, patience=0))
    optimizer = fusedlr.SGD(groups(1), lr=0.8, nonfinite="skip", schedule=schedule, backend=backend)
    p = optimizer.param_groups[0]["params"][0]
    step(optimizer)
    for _ in range(3):
        p.grad = torch.full_like(p, math.nan)
        optimizer.step()
        optimizer.report(1.0)
    assert step(optimizer) == pytest.approx([0.8])
    assert optimizer.steps_taken == 2
    optimizer.report(1.0)
    optimizer.report(1.0)
    assert step(optimizer) == pytest.approx([0.4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy", "pickle", "rewound"])
def test_the_state_survives(how: str, backend: str) -> None:
    def make() -> Any:
        schedule = s.Warmup(2).then(s.Plateau(factor=0.5, patience=2, cooldown=3))
        return fusedlr.SGD(groups(), lr=1.0, schedule=schedule, backend=backend)

    reported = metrics(5, 24)
    optimizer = make()
    for metric in reported[:12]:
        step(optimizer)
        optimizer.report(metric)
    if how == "deepcopy":
        other = copy.deepcopy(optimizer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(optimizer))
    else:
        saved = optimizer.state_dict()
        assert all(type(x) is float for x in saved["param_groups"][0]["fusedlr"]["live"]["lr"].values())
        other = optimizer if how == "rewound" else make()
        expected = copy.deepcopy(optimizer) if how == "rewound" else optimizer
        if how == "rewound":
            for _ in range(7):
                step(other)
                other.report(100.0)
        other.load_state_dict(through_file(saved) if how == "file" else saved)
        optimizer = expected
    for metric in reported[12:]:
        assert step(other) == step(optimizer)
        other.report(metric)
        optimizer.report(metric)
        assert other.next_lr() == optimizer.next_lr()
    marks = [o.state_dict()["param_groups"][1]["fusedlr"] for o in (other, optimizer)]
    for each in marks:
        each.pop("steps")  # those in a state_dict that was not copied went on with the optimizer that made it
    assert marks[0] == marks[1]
    assert marks[0]["live"]["lr"]["value"] < LRS[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fresh_state_replaces_one_that_was_used(backend: str) -> None:
    optimizer = fusedlr.SGD(groups(1), lr=0.8, schedule=s.Plateau(factor=0.5, patience=0), backend=backend)
    fresh = optimizer.state_dict()
    for _ in range(3):
        step(optimizer)
        optimizer.report(1.0)
    optimizer.load_state_dict(fresh)
    assert step(optimizer) == pytest.approx([0.8])


def test_a_group_added_later(seed: int) -> None:
    optimizer = fusedlr.SGD(groups(1), lr=0.8, schedule=s.Plateau(factor=0.5, patience=0))
    optimizer.report(1.0)
    optimizer.report(1.0)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.3})
    assert step(optimizer) == pytest.approx([0.4, 0.3])
    with pytest.raises(ValueError, match=r"min_lr must have .* every param group, but got 1 for param group 2"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "schedule": s.Plateau(min_lr=[0.1])})
    assert len(optimizer.param_groups) == 2


def test_no_wait_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors in the accelerator's executor, with a state that is taken for a device's."""
    from fusedlr.live import Metered

    step_by_the_executor_of_devices(monkeypatch)
    held = property(lambda self: value if isinstance(value := self.state.get("value"), torch.Tensor) else None)
    monkeypatch.setattr(Metered, "device_value", held)
    optimizer = fusedlr.SGD(groups(), lr=1.0, schedule=s.Warmup(2).then(s.Plateau(factor=0.5, patience=0)))
    used = []
    for _ in range(5):
        used.append(step(optimizer))
        with NoWait():
            optimizer.report(1.0)
            params = [group["params"][0] for group in optimizer.param_groups]
            optimizer.last_lr  # noqa: B018
        assert len(params) == 2
    # The host never learns here what the device holds; the parameters move by it all the same.
    assert used == [pytest.approx([f * lr for lr in LRS]) for f in (0.5, 1.0, 1.0, 0.5, 0.25)]
    assert optimizer.last_lr == list(LRS)
    # A checkpoint has it from the device, and what the host knows by then it does not forget.
    optimizer.load_state_dict(optimizer.state_dict())
    expected = [pytest.approx(0.125 * lr) for lr in LRS]
    assert optimizer.next_lr() == expected
    assert step(optimizer) == expected
    with NoWait():
        optimizer.report(1.0)
        assert optimizer.next_lr() == expected
    assert step(optimizer) == [pytest.approx(0.0625 * lr) for lr in LRS]


def test_errors(seed: int) -> None:
    plain = fusedlr.SGD(groups(), lr=1.0, schedule=s.Cosine(9))
    with pytest.raises(ValueError, match=r"report\(metric\) needs a schedules.Plateau, but no scalar"):
        plain.report(1.0)
    optimizer = fusedlr.SGD(groups(), lr=1.0, schedule=s.Plateau())
    for bad in ("1.0", None, 1j, True, torch.ones(2), torch.tensor(1j), torch.tensor(True), [1.0]):
        with pytest.raises(TypeError, match="metric must be a number or a "):
            optimizer.report(bad)  # type: ignore[arg-type]
    assert optimizer.state_dict()["param_groups"][0]["fusedlr"]["live"] == {"lr": {}}
    with pytest.raises(ValueError, match=r"min_lr must have .* each of 2 param groups, but got \(0.1, 0.2, 0.3"):
        fusedlr.SGD(groups(), lr=1.0, schedule=s.Plateau(min_lr=[0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match=r"min_lr must have .* every param group, but got 1 for param group 1"):
        fusedlr.SGD(groups(), lr=1.0, schedule=s.Plateau(min_lr=[0.1]))
    with pytest.raises(ValueError, match="can follow one Plateau or TimeDecay, but got 2"):
        fusedlr.SGD(groups(), lr=1.0, schedule=s.product(s.Plateau(), s.TimeDecay(0.1)))
    with pytest.raises(ValueError, match=r"schedule\['max_norm'\] cannot follow a metric or the time"):
        fusedlr.SGD(groups(), lr=1.0, clip=1.0, schedule={"max_norm": s.Plateau()})


def test_a_value() -> None:
    schedule = s.Plateau("max", 0.5, 3, min_lr=[0.1, 0.2])
    assert repr(schedule) == "Plateau('max', factor=0.5, patience=3, min_lr=(0.1, 0.2))"
    assert repr(s.Plateau()) == "Plateau()"
    assert eval(repr(schedule), vars(s)) == schedule == pickle.loads(pickle.dumps(schedule))
    assert hash(schedule) == hash(s.Plateau("max", 0.5, 3, min_lr=(0.1, 0.2)))
    assert schedule(10, 0.3) == s.Warmup(3).then(schedule)(10, 0.3) == 0.3
    with pytest.raises(ValueError, match="has no end"):
        schedule.then(s.Cosine(5))


def test_as_with_torch_checkpoints(seed: int) -> None:
    model = make_model()
    theirs = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, theirs, range(2))
    optimizer = fusedlr.Adam(model.parameters(), lr=0.1, schedule=s.Plateau(factor=0.5, patience=0))
    optimizer.load_state_dict(theirs.state_dict())
    optimizer.report(1.0)
    optimizer.report(1.0)
    assert optimizer.next_lr() == [0.05]
    theirs.load_state_dict(optimizer.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_reports_between_the_replays_of_a_graph(nonfinite: str) -> None:
    p = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    p.grad = torch.ones_like(p)
    schedule = s.Warmup(4).then(s.Plateau(factor=0.5, patience=0))
    optimizer = fusedlr.SGD([p], lr=0.8, schedule=schedule, nonfinite=nonfinite, backend="triton")
    metric = torch.ones((), device="cuda")
    with never_waiting():
        optimizer.step()
        optimizer.report(metric)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    used = []
    for _ in range(6):
        before = float(p.detach()[0])
        graph.replay()
        with never_waiting():
            optimizer.report(metric)
        used.append(before - float(p.detach()[0]))
    # Reports count from t = 4 on; the first is the best.
    assert used == pytest.approx([0.4, 0.6, 0.8, 0.8, 0.4, 0.2], rel=1e-5)
    assert optimizer.state_dict()["param_groups"][0]["fusedlr"]["live"]["lr"]["value"] == pytest.approx(0.1)
