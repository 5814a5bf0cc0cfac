"""How often the Triton backend launches kernels and sends tables, and what it keeps apart."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from cases import CASES, CLIPS, Case

pytest.importorskip("triton")

from fusedlr.kernels import launch, launch_trust, launch_units

import fusedlr
from fusedlr import schedules
from fusedlr.backends import buckets as backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = ("launch_measure", "launch_decide", "launch_trust", "launch_apply")


class Watch:
    """Counts launches and tables sent to the device since it was last cleared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: Counter[str] = Counter()
        self.sent: list[Any] = []
        self.run = True
        for name in KERNELS:
            self._wrap(monkeypatch, name, launch_trust if name == "launch_trust" else launch)
        send = backend.send

        def sending(array: Any, device: torch.device) -> torch.Tensor:
            self.sent.append(array.copy())
            return send(array, device)

        monkeypatch.setattr(backend, "send", sending)

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, name: str, module: Any) -> None:
        original = getattr(module, name)

        def launching(*args: Any, **kwargs: Any) -> None:
            self.launches[name.removeprefix("launch_")] += 1
            if self.run:
                original(*args, **kwargs)

        monkeypatch.setattr(module, name, launching)

    def clear(self) -> None:
        self.launches.clear()
        self.sent.clear()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def parameters(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(n).to(dtype).to(DEVICE)) for n in sizes]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def adamw(params: Any, **options: Any) -> fusedlr.AdamW:
    return fusedlr.AdamW(params, backend="triton", **options)


def test_three_launches_however_many_tensors_and_groups(watch: Watch) -> None:
    watch.run = False  # 400 tensors take the interpreter too long, and only the counts matter here
    params = parameters(*range(1, 401))
    groups = [{"params": params[i : i + 8], "lr": 0.1 + i, "weight_decay": 0.01 * i} for i in range(0, 400, 8)]
    optimizer = adamw(groups, clip=1.0, nonfinite="propagate", schedule=schedules.Cosine(10, min_lr=0.0))
    for _ in range(3):
        optimizer.step()
        assert watch.launches == {"measure": 1, "decide": 1, "apply": 1}
        watch.clear()


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("clip", CLIPS, ids=repr)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_most_three_launches_for_every_rule_and_clip(watch: Watch, case: Case, clip: Any, nonfinite: str) -> None:
    """And those of the trust ratio where the rule has one."""
    watch.run = False
    optimizer = case.make(parameters(3, 2000, 1), backend="triton", clip=clip, nonfinite=nonfinite)
    measures = nonfinite != "propagate" or not (clip is None or isinstance(clip, fusedlr.clipping.Value))
    wanted = {"measure": int(measures), "decide": 1, "trust": int(case.trust), "apply": 1}
    for _ in range(2):
        optimizer.step()
        assert watch.launches == Counter(wanted)
        watch.clear()


@pytest.mark.parametrize("cls", [fusedlr.LAMB, fusedlr.LARS])
def test_a_trust_ratio_takes_two_launches_however_many_tensors(monkeypatch: pytest.MonkeyPatch, cls: Any) -> None:
    grids: dict[str, list[tuple[int, ...]]] = {}

    class Counting:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.setdefault(self.name, []).append(grid)
            return self.kernel[grid]

    launchers = {"measure": launch._measure, "decide": launch._decide, "apply": launch._apply}
    launchers |= {"trust_norms": launch_trust._norms, "trust_ratios": launch_trust._ratios}
    for name, launcher in launchers.items():
        monkeypatch.setattr(launcher, "kernel", Counting(name, launcher.kernel))
    params = parameters(3, 2000, 1, 0)
    groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 0.1}]
    cls(groups, lr=0.1, backend="triton", clip=1.0).step()
    # A program a chunk of 1024 elements, and one a tensor.
    every = ("measure", "trust_norms", "trust_ratios", "apply")
    assert grids == {"decide": [(1, 1, 1)]} | {name: [(4, 1, 1)] for name in every}


@pytest.mark.parametrize("clip", [fusedlr.clipping.ZClip(), fusedlr.clipping.AutoClip()], ids=repr)
def test_norms_that_are_remembered_take_no_launch_more_and_travel_once(watch: Watch, clip: Any) -> None:
    optimizer = adamw(parameters(3, 2000), clip=clip)
    for step in range(3):
        optimizer.step()
        assert watch.launches == {"measure": 1, "decide": 1, "apply": 1}
        assert bool(watch.sent) == (step == 0)
        watch.clear()


def test_four_launches_where_units_have_factors(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("launch_unit_measure", "launch_unit_fold"):
        watch._wrap(monkeypatch, name, launch_units)
    narrow, empty = parameters(3, 2000, 1), torch.nn.Parameter(torch.zeros(0, 3, device=DEVICE))
    empty.grad = torch.zeros_like(empty)
    optimizer = adamw([*narrow, empty], clip=fusedlr.clipping.AGC())
    for step in range(3):
        optimizer.step()
        assert watch.launches == {"unit_measure": 1, "unit_fold": 1, "decide": 1, "apply": 1}
        assert bool(watch.sent) == (step == 0)
        watch.clear()


def test_a_bucket_for_each_dtype_and_rule(watch: Watch) -> None:
    narrow, wide, plain = parameters(3, 5), parameters(4, dtype=torch.float64), parameters(6, 7)
    adamw([{"params": narrow + wide}, {"params": plain, "amsgrad": True}], clip=1.0).step()
    assert watch.launches == {"measure": 3, "decide": 3, "apply": 3}


def test_empty_parameters_launch_no_programs(watch: Watch) -> None:
    empty = torch.nn.Parameter(torch.zeros(0, 3, device=DEVICE))
    empty.grad = torch.zeros_like(empty)
    optimizer = adamw([empty], clip=1.0)
    optimizer.step()
    assert watch.launches == {"decide": 1}
    assert int(optimizer.state[empty]["step"]) == 1 and float(optimizer.last_grad_norm) == 0.0  # type: ignore[arg-type]


def test_nothing_is_sent_while_nothing_but_the_schedule_moves(watch: Watch) -> None:
    params = parameters(3, 2000)
    scheduled = {"lr": schedules.Cosine(10, min_lr=0.0), "weight_decay": schedules.Linear(5, 1.0, 0.5)}
    optimizer = adamw(params, clip=1.0, schedule=scheduled)
    optimizer.step()
    assert watch.sent
    watch.clear()
    rates = set()
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        rates.add(optimizer.last_lr[0])
    assert len(rates) == 3
    assert watch.sent == []


def test_the_pointer_table_is_sent_when_a_gradient_lies_elsewhere(watch: Watch) -> None:
    params = parameters(3, 2000, 4)
    optimizer = adamw(params, clip=1.0)
    optimizer.step()
    watch.clear()
    kept = params[1].grad  # or its memory would be used again
    params[1].grad = torch.full_like(params[1], 2.0)
    optimizer.step()
    (table,) = watch.sent
    assert table[:, 1].tolist() == [p.grad.data_ptr() for p in params]  # type: ignore[union-attr]
    assert table[:, 2].tolist() == [3, 2000, 4]
    watch.clear()
    optimizer.step()
    assert watch.sent == [] and kept is not None


def test_the_scalars_are_sent_when_somebody_writes_one(watch: Watch) -> None:
    optimizer = adamw(parameters(3, 5), lr=0.1)
    optimizer.step()
    watch.clear()
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    (scalars,) = watch.sent
    assert scalars[0] == 0.2
    watch.clear()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    assert watch.sent == []


def test_a_divisor_of_the_gradients_costs_no_launch_and_one_table(watch: Watch) -> None:
    optimizer = adamw(parameters(3, 5), lr=0.1, clip=1.0)
    optimizer.step()
    watch.clear()
    optimizer.grad_divisor = 4
    optimizer.step()
    (scalars,) = watch.sent
    assert scalars[-3:].tolist() == [4.0, 1.0, 0.0]
    assert watch.launches == {"measure": 1, "decide": 1, "apply": 1}
    watch.clear()
    optimizer.step()
    assert watch.sent == []


def test_an_outside_write_against_a_schedule_is_sent_once(watch: Watch) -> None:
    optimizer = adamw(parameters(3), lr=0.1, schedule=schedules.Cosine(10, min_lr=0.0))
    optimizer.step()
    watch.clear()
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.step()
    assert optimizer.last_lr == [0.7] and len(watch.sent) > 0
    watch.clear()
    optimizer.step()
    assert watch.sent == []


def test_parameters_without_gradients_make_another_plan(watch: Watch) -> None:
    params = parameters(3, 2000)
    optimizer = adamw(params)
    optimizer.step()
    params[0].grad = None
    watch.clear()
    optimizer.step()
    assert watch.launches == {"decide": 1, "apply": 1}
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 2]


Spans = list[tuple[int, int]]
SHARED: dict[str, tuple[Spans, int]] = {
    "apart": ([(0, 40), (40, 80)], 1),
    "one overlap": ([(0, 40), (30, 80), (80, 120)], 2),
    "the later one first": ([(30, 80), (0, 40)], 2),
    "a chain in any order": ([(60, 100), (0, 40), (30, 70)], 2),
    "one within another": ([(10, 20), (0, 120), (50, 60)], 3),
    "thrice the same": ([(5, 25), (5, 25), (5, 25)], 3),
}


def sharing(spans: Spans) -> tuple[list[torch.nn.Parameter], torch.Tensor]:
    """Parameters that are parts of one buffer."""
    memory = torch.linspace(-1, 1, 120, device=DEVICE)
    params = [torch.nn.Parameter(memory[a:b]) for a, b in spans]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 1.0 - 2.0 * i)
    return params, memory


@pytest.mark.parametrize("name", SHARED)
def test_parameters_that_overlap_are_stepped_in_their_order(watch: Watch, name: str) -> None:
    spans, waves = SHARED[name]
    params, memory = sharing(spans)
    optimizer = fusedlr.SGD(params, lr=0.5, weight_decay=0.5, momentum=0.9, backend="triton")
    theirs, their_memory = sharing(spans)
    reference = torch.optim.SGD(theirs, lr=0.5, weight_decay=0.5, momentum=0.9, foreach=False)
    for _ in range(3):
        optimizer.step()
        reference.step()
        assert watch.launches == {"decide": waves, "apply": waves}
        watch.clear()
    # A few float32 roundings a step, on numbers of a few units.
    torch.testing.assert_close(memory, their_memory, rtol=1e-6, atol=1e-5)


def test_waves_keep_their_order_across_rules(watch: Watch) -> None:
    """The second wave of one rule must not run before the first wave of another."""
    spans = [(0, 40), (30, 60), (60, 90), (80, 120)]
    params, memory = sharing(spans)
    theirs, their_memory = sharing(spans)
    for cls, ps, options in (
        (fusedlr.SGD, params, {"backend": "triton"}), (torch.optim.SGD, theirs, {"foreach": False})
    ):  # fmt: skip
        momentum = [
            {"params": [ps[0], ps[1]], "momentum": 0.9},
            {"params": [ps[2]]},
            {"params": [ps[3]], "momentum": 0.9},
        ]
        optimizer = cls(momentum, lr=0.5, weight_decay=0.5, **options)
        for _ in range(2):
            optimizer.step()
    assert watch.launches["apply"] == 2 * 3
    torch.testing.assert_close(memory, their_memory, rtol=1e-6, atol=1e-5)


def test_the_same_parameter_twice_is_an_error_as_in_torch() -> None:
    (p,) = parameters(3)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        adamw([{"params": [p]}, {"params": [p]}])


def test_tied_storages_are_stepped_twice_as_torch_does(watch: Watch) -> None:
    p = parameters(30)[0]
    tie = torch.nn.Parameter(p.data)
    tie.grad = torch.full_like(p, -3.0)
    q = torch.nn.Parameter(p.detach().clone())
    also = torch.nn.Parameter(q.data)
    q.grad, also.grad = torch.ones_like(q), torch.full_like(q, -3.0)
    optimizer = fusedlr.SGD([p, tie], lr=0.1, weight_decay=0.1, backend="triton")
    reference = torch.optim.SGD([q, also], lr=0.1, weight_decay=0.1, foreach=False)
    optimizer.step()
    reference.step()
    assert watch.launches["apply"] == 2
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)


def test_chunks_grow_with_the_model() -> None:
    sizes = [launch.chunk_size_for(n) for n in (1, 2**22, 2**22 + 1, 2**25, 2**27, 2**40)]
    assert sizes == sorted(sizes) and sizes[0] == launch.BLOCK and sizes[-1] == 32 * launch.BLOCK
    assert all(size % launch.BLOCK == 0 for size in sizes)
    # Never more programs than 4096 for each doubling of the chunk, until chunks are as large as they get.
    assert all(-(-n // launch.chunk_size_for(n)) <= 4096 for n in (2**20, 2**23, 2**26, 2**27))
