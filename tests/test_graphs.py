"""Captured steps: replays with moving numbers, what graphs outlive, what is refused, and what the host hears of them.

On a GPU of real graphs, elsewhere of their likeness (tests/graphs.py).
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
from executors import step_by_the_executor_of_devices
from graphs import DEVICE, Graph, Graphs, graphs  # noqa: F401  # a fixture

import fusedlr
from fusedlr import capture, groups, schedules

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    # A refused step leaves nothing in the graph.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]
COSINE = schedules.Warmup(3).then(schedules.Cosine(20, min_lr=0.0))


def settle() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def everything(optimizer: Any) -> list[Tensor]:
    return [t for p, entry in optimizer.state.items() for t in (p.detach(), *entry.values())]


def make_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(11)
    shapes = [(300, 70), (1025,), (), (4096,)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(DEVICE)) for s in shapes]


def fill(params: list[nn.Parameter], i: int) -> None:
    """The gradients of step i, into the memory that is there, if any is."""
    generator = torch.Generator().manual_seed(70 + i)
    for p in params:
        g = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def small(**options: Any) -> tuple[fusedlr.AdamW, nn.Parameter]:
    """An optimizer that has taken two steps."""
    p = nn.Parameter(torch.ones(5, device=DEVICE))
    p.grad = torch.ones_like(p)
    optimizer = fusedlr.AdamW([p], backend="triton", **{"lr": 0.1, "clip": 1.0, "schedule": COSINE, **options})
    for _ in range(2):
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("cls", [fusedlr.AdamW, fusedlr.LAMB])
@pytest.mark.parametrize(
    "precision", [fusedlr.Precision.compact(), fusedlr.Precision(state="bf16", rounding="stochastic")], ids=str
)
def test_stochastic_rounding_moves_between_replays(
    cls: Any, precision: fusedlr.Precision, graphs: Graphs  # noqa: F811
) -> None:
    """Eager steps and replays round alike, step by step, and so with other random bits each time."""
    outcomes = []
    for replays in (True, False):
        params = [nn.Parameter(p.detach().bfloat16()) for p in make_params()]
        options = {"clip": 1.0, "schedule": COSINE, "precision": precision, "backend": "triton"}
        optimizer = cls(params, lr=0.01, weight_decay=0.1, **options)
        graph: Graph = None
        seen = []
        for i in range(6):
            fill(params, i)
            if replays and i == 1:
                graph = graphs.capture(optimizer.step)
            optimizer.step() if graph is None else graph.replay()
            settle()
            seen.append([t.clone() for t in everything(optimizer)])
        outcomes.append(seen)
    assert all(all(map(torch.equal, a, b)) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("cls", [fusedlr.AdamW, fusedlr.SGD, fusedlr.NAdam])
def test_the_executor_of_devices_replays_without_a_schedule(
    cls: Any, graphs: Graphs, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    step_by_the_executor_of_devices(monkeypatch)
    outcomes = []
    for replays in (True, False):
        params = make_params()
        optimizer = cls(params, lr=0.01, weight_decay=0.1, clip=1.0, backend="torch")
        graph: Graph = None
        for i in range(5):
            fill(params, i)
            if replays and i == 2:
                graph = graphs.capture(optimizer.step)
            optimizer.step() if graph is None else graph.replay()
        settle()
        assert optimizer.steps_taken == 5
        outcomes.append([*everything(optimizer), optimizer.last_grad_norm])
    assert all(map(torch.equal, *outcomes))


def test_forward_backward_and_step_in_one_graph(graphs: Graphs) -> None:  # noqa: F811
    """The gradients then lie in the graph's memory: the pointer table changes in the captured step."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    outcomes = []
    for replays in (True, False):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 1)).to(DEVICE)
        optimizer = fusedlr.AdamW(model.parameters(), lr=0.01, clip=0.1, schedule=COSINE, backend="triton")

        def passes(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            model(x).square().mean().backward()
            optimizer.step()

        def warm_up(passes: Any = passes, optimizer: Any = optimizer) -> None:
            for _ in range(3):
                passes()
                optimizer.zero_grad(set_to_none=True)

        if DEVICE.type == "cuda":  # as torch's notes say
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                warm_up()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            warm_up()
        graph = graphs.capture(passes) if replays else None
        for i in range(6):
            if graph is None:
                optimizer.zero_grad(set_to_none=True)
                passes()
                continue
            graph.replay()
            # What is freed and allocated in between must not be what the graph reads.
            gc.collect()
            torch.full((1 << 20,), float(i), device=DEVICE)
        settle()
        assert optimizer.steps_taken == 9 and optimizer.last_lr == [COSINE(8, 0.01)]
        assert optimizer.state_dict()["param_groups"][0]["fusedlr"]["t"] == 9
        outcomes.append(everything(optimizer))
    for a, b in zip(*outcomes, strict=True):
        # The matrix products are cuBLAS's, which may choose another kernel in a graph.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_eager_steps_and_other_plans_between_replays(graphs: Graphs) -> None:  # noqa: F811
    outcomes = []
    for replays in (True, False):
        params = make_params()
        optimizer = fusedlr.AdamW(params, lr=0.1, clip=1.0, schedule=COSINE, backend="triton")
        fixed: list[Tensor] = []
        graph: Graph = None
        for i in range(9):
            if i in (4, 7):  # other gradients, and one parameter less
                for p in params:
                    p.grad = None
                fill(params[1:], i)
                optimizer.step()
                torch.full((1 << 20,), 7.0, device=DEVICE)
                continue
            if fixed:
                for p, g in zip(params, fixed, strict=True):
                    p.grad = g
            fill(params, i)
            fixed = fixed or [p.grad for p in params]  # type: ignore[misc]
            if i == 2 and replays:
                graph = graphs.capture(optimizer.step)
            if graph is None or i == 5:
                optimizer.step()
            else:
                graph.replay()
        settle()
        outcomes.append(everything(optimizer))
        assert optimizer.steps_taken == 9
    assert all(map(torch.equal, *outcomes))


def test_what_cannot_be_captured_is_refused(graphs: Graphs) -> None:  # noqa: F811
    params = make_params()
    optimizer = fusedlr.AdamW(params, lr=0.1, clip=1.0, backend="triton")
    fill(params, 0)
    with pytest.raises(RuntimeError, match="as the first step"):
        graphs.capture(optimizer.step)
    settle()
    params[0].grad = None
    optimizer.step()
    with pytest.raises(RuntimeError, match="parameters that require gradients have none"):
        graphs.capture(optimizer.step)
    settle()
    optimizer.step()
    assert int(optimizer.state[params[1]]["step"]) == 2 and optimizer.steps_taken == 2


def test_the_host_follows_replays(graphs: Graphs) -> None:  # noqa: F811
    optimizer, _ = small()
    graph = graphs.capture(optimizer.step)
    assert optimizer.steps_taken == 2
    for _ in range(6):
        graph.replay()
    settle()
    assert optimizer.steps_taken == 8
    assert optimizer.last_lr == [COSINE(7, 0.1)] == [optimizer.param_groups[0]["lr"]]
    assert optimizer.next_lr() == [COSINE(8, 0.1)]
    assert optimizer.state_dict()["param_groups"][0]["fusedlr"]["t"] == 8
    optimizer.step()
    assert optimizer.steps_taken == 9 and optimizer.last_lr == [COSINE(8, 0.1)]
    assert optimizer.state_dict()["param_groups"][0]["fusedlr"]["t"] == 9


@pytest.mark.parametrize("how", ["by hand", "add_param_group", "another optimizer"])
def test_no_parameter_is_moved_while_a_graph_is_captured(how: str, graphs: Graphs) -> None:  # noqa: F811
    """The copy would only be noted, and the parameter be what its new memory held."""
    optimizer, p = small()
    new = nn.Parameter(torch.full((6,), 3.0, device=DEVICE))
    new.grad = torch.ones_like(new)
    at = new.data_ptr()

    def captured() -> None:
        if how == "by hand":
            optimizer.param_groups[0]["params"].append(new)
        elif how == "add_param_group":
            optimizer.add_param_group({"params": [new]})
        else:
            fusedlr.SGD([new], lr=0.1)
        optimizer.step()

    with pytest.raises(capture.CaptureError, match="nothing has changed"):
        graphs.capture(captured)
    settle()
    assert new.data_ptr() == at and new.tolist() == [3.0] * 6 and optimizer.steps_taken == 2
    optimizer.step()
    stepped = how == "by hand"
    assert len(optimizer.param_groups) == 1 and len(optimizer.state) == 1 + stepped
    assert (new.tolist() != [3.0] * 6) == stepped and int(optimizer.state[p]["step"]) == 3


@pytest.mark.parametrize("how", ["load_state_dict", "amsgrad"])
def test_a_graph_keeps_the_state_that_it_writes(how: str, graphs: Graphs) -> None:  # noqa: F811
    """Where the optimizer takes other state: memory that a replay writes must not become somebody else's."""
    optimizer, p = small()
    empty = fusedlr.AdamW([nn.Parameter(torch.ones(5, device=DEVICE))], backend="triton", schedule=COSINE).state_dict()
    graph = graphs.capture(optimizer.step)
    graph.replay()
    held = [t.untyped_storage() for t in optimizer.state[p].values()]
    written = [s.data_ptr() for s in held]
    alive = [weakref.ref(slot) for leaf in optimizer._leaves for slot in leaf.bank.slots]  # type: ignore[union-attr]
    del held
    if how == "amsgrad":
        optimizer.param_groups[0]["amsgrad"] = True
    else:
        optimizer.load_state_dict(empty)
    optimizer.step()
    gc.collect()
    assert all(slot() is not None for slot in alive)
    assert not {t.data_ptr() for t in optimizer.state[p].values()} & set(written)
    before = [t.clone() for t in optimizer.state[p].values()]
    graph.replay()  # steps the parameter from the state that it was captured with
    settle()
    assert all(map(torch.equal, before, optimizer.state[p].values()))


def test_the_host_is_not_set_back_by_what_arrives_late(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """Eager steps after a replay, with a device two steps behind: last_lr is that of each step, as before."""
    optimizer, _ = small()
    graph = graphs.capture(optimizer.step)
    graph.replay()
    settle()
    assert optimizer.steps_taken == 3
    sent: list[Tensor] = []
    record = capture.ReplayedClock.record

    def late(replayed: Any, clock: Tensor, captures: bool) -> None:
        host = replayed._host
        replayed._host = torch.empty_like(host)
        record(replayed, clock, captures)
        settle()
        sent.append(replayed._host)
        replayed._host = host
        if len(sent) > 2:
            host.copy_(sent[-3])

    monkeypatch.setattr(capture.ReplayedClock, "record", late)
    for t in range(3, 11):
        optimizer.step()
        assert optimizer.last_lr == [COSINE(t, 0.1)] == [optimizer.param_groups[0]["lr"]]
        assert optimizer.steps_taken == t + 1
    monkeypatch.undo()
    assert int(optimizer._clock(DEVICE)[0]) == 11


def test_a_checkpoint_sets_aside_what_replays_have_sent(graphs: Graphs) -> None:  # noqa: F811
    optimizer, _ = small()
    saved = copy.deepcopy(optimizer.state_dict())
    graph = graphs.capture(optimizer.step)
    for _ in range(6):
        graph.replay()
    settle()
    optimizer.load_state_dict(saved)  # nobody has asked the optimizer since
    assert optimizer.steps_taken == 2 and optimizer.next_lr() == [COSINE(2, 0.1)]
    optimizer.step()
    assert optimizer.last_lr == [COSINE(2, 0.1)] and int(optimizer._clock(DEVICE)[0]) == 3
    graph.replay()
    settle()
    assert optimizer.steps_taken == 4 and optimizer.last_lr == [COSINE(3, 0.1)]


def test_no_graph_writes_a_tensor_in_which_the_lr_is_shown(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """At a second capture the host has news of the first graph's replays, and must not show them there."""
    # As with the tensor of a GPU, of which only identity and version are looked at.
    other = lambda s, current: current is not s._shown or current._version != s._version  # noqa: E731
    monkeypatch.setattr(groups.Scheduled, "overridden_by", other)
    lr = torch.tensor(0.1, device=DEVICE)
    optimizer, _ = small(lr=lr)
    shown = optimizer.param_groups[0]["lr"]
    for _ in range(2):
        graph = graphs.capture(optimizer.step)
        shown_before = shown.clone()
        graph.replay()
        settle()
        assert torch.equal(shown, shown_before)
        optimizer.step()
        graph.replay()
        settle()
    assert optimizer.steps_taken == 8 and float(shown) == pytest.approx(COSINE(7, 0.1))
