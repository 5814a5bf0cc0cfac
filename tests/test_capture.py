"""CUDA graphs, as far as they can be tested without a GPU: what is refused, what is kept, how the host follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from executors import step_by_the_executor_of_devices
from fusedlr.kernels import launch, launch_trust

import fusedlr
from fusedlr import capture, schedules
from fusedlr import optimizer as core
from fusedlr.backends.device import DeviceExecutor
from fusedlr.backends.torch import HostExecutor
from fusedlr.backends.triton import TritonExecutor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_graphs.py captures real graphs")
COSINE = schedules.Cosine(10, min_lr=0.0)


class Graph:
    """While it is entered, CPU tensors look as if a graph of their work were captured."""

    on = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    graph = Graph()
    monkeypatch.setattr(capture, "capturing", lambda device: graph.on)
    monkeypatch.setattr(TritonExecutor, "captures", lambda executor: graph.on)
    return graph


def make(**options: Any) -> tuple[fusedlr.AdamW, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 5)]
    give(params)
    return fusedlr.AdamW(params, lr=0.1, **{"backend": "triton", "clip": 1.0, **options}), params


def give(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Gradients that lie elsewhere than any before; the caller keeps these."""
    before = [p.grad for p in params if p.grad is not None]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    return before


def snapshot(optimizer: Any) -> list[torch.Tensor]:
    return [t.clone() for p, entry in optimizer.state.items() for t in (p.detach(), *entry.values())]


def test_the_first_step_cannot_be_captured(graph: Graph) -> None:
    optimizer, params = make()
    with graph, pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph as the first step.*before"):
        optimizer.step()
    assert optimizer.state_dict()["state"] == {} and optimizer.steps_taken == 0
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)
    optimizer.step()
    with graph:
        optimizer.step()


def test_other_parameters_with_gradients_cannot_be_captured(graph: Graph) -> None:
    optimizer, params = make()
    optimizer.step()
    params[0].grad = None
    before = snapshot(optimizer)
    with graph, pytest.raises(RuntimeError, match="the first one after other parameters have gradients"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer), before)) and optimizer.steps_taken == 1


def test_a_parameter_that_no_replay_would_step_is_an_error(graph: Graph) -> None:
    optimizer, params = make()
    params[1].grad = None
    optimizer.step()
    before = snapshot(optimizer)
    with graph, pytest.raises(RuntimeError, match=r"1 parameters that require gradients.*parameter 1\).*zeros_"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer), before)) and optimizer.steps_taken == 1
    params[1].requires_grad_(False)  # a frozen one may be left out
    with graph:
        optimizer.step()


def test_parameters_on_the_cpu_would_be_stepped_once_only(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = make(clip=None)
    apart = lambda backend, leaves: [DeviceExecutor(leaves[:1], [0]), HostExecutor(leaves[1:], [1])]  # noqa: E731
    monkeypatch.setattr(core, "executors_for", apart)
    optimizer.step()
    before = snapshot(optimizer)
    with graph, pytest.raises(RuntimeError, match=r"on the CPU.*no replay.*optimizer of their own"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer), before)) and params[1].grad is not None


def test_raise_cannot_be_captured(graph: Graph) -> None:
    optimizer, _ = make(nonfinite="raise")
    optimizer.step()
    with graph, pytest.raises(RuntimeError, match=r"nonfinite='raise'.*use nonfinite='skip'"):
        optimizer.step()
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize("schedule", [COSINE, {"max_norm": COSINE}], ids=["lr", "max_norm"])
def test_a_schedule_of_the_host_cannot_be_captured(
    schedule: Any, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    step_by_the_executor_of_devices(monkeypatch)
    optimizer, _ = make(backend="torch", schedule=schedule)
    optimizer.step()
    before = snapshot(optimizer)
    with graph, pytest.raises(RuntimeError, match="a schedule does not move in a CUDA graph on the PyTorch backend"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer), before))


def test_the_executor_of_devices_is_captured_without_a_schedule(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    step_by_the_executor_of_devices(monkeypatch)
    optimizer, _ = make(backend="torch")
    optimizer.step()
    with graph:
        optimizer.step()
    assert optimizer.steps_taken == 1


def test_the_host_does_not_count_a_captured_step(graph: Graph) -> None:
    """On a GPU nothing runs while a graph is captured."""
    optimizer, _ = make(schedule=COSINE)
    optimizer.step()
    lr = optimizer.last_lr
    with graph:
        optimizer.step()
    assert optimizer.steps_taken == 1 and optimizer.last_lr == lr == [optimizer.param_groups[0]["lr"]]


def test_new_gradients_at_capture_take_a_table_of_their_own(graph: Graph) -> None:
    """As when backward is captured too: the gradients lie in the graph's memory."""
    optimizer, params = make()
    optimizer.step()
    (bucket,) = optimizer._plan.executors[0]._buckets  # type: ignore[union-attr, attr-defined]
    eager = bucket.segments
    held = [give(params)]
    with graph:
        optimizer.step()
    _, kept = optimizer._captured[0]
    tables = [t for t in kept if isinstance(t, torch.Tensor) and t.ndim == 2 and t.shape == eager.shape]
    pointers = [p.grad.data_ptr() for p in params]  # type: ignore[union-attr]
    # The table on the device, and the memory that each replay copies it from.
    assert len([t for t in tables if t[:, 1].tolist() == pointers]) == 2
    captured = next(t for t in tables if t[:, 1].tolist() == pointers)
    copies = [t.clone() for t in tables]
    # An eager step, with the same gradients and with others, leaves what the graph reads as it was.
    optimizer.step()
    assert bucket.segments is not captured and bucket.segments[:, 1].tolist() == pointers
    held.append(give(params))
    optimizer.step()
    assert bucket.segments[:, 1].tolist() == [p.grad.data_ptr() for p in params] != pointers  # type: ignore[union-attr]
    assert all(map(torch.equal, tables, copies)) and held


def test_what_a_graph_reads_outlives_its_plan(graph: Graph) -> None:
    optimizer, params = make()
    optimizer.step()
    with graph:
        optimizer.step()
    kept = {t.data_ptr() for t in optimizer._captured[0][1] if isinstance(t, torch.Tensor) and t.numel()}
    executor = optimizer._plan.executors[0]  # type: ignore[union-attr]
    (bucket,) = executor._buckets  # type: ignore[attr-defined]
    for table in (bucket.rows, bucket.skip, bucket.values, bucket.tensors, bucket.chunks, bucket.segments):
        assert table.data_ptr() in kept
    assert all(t.data_ptr() in kept for t in executor._partials.values())  # type: ignore[attr-defined]
    params[0].grad = None
    optimizer.step()  # another plan
    assert optimizer._plan.executors[0] is not executor and len(optimizer._captured) == 1  # type: ignore[union-attr]


def test_a_second_capture_with_other_gradients_needs_a_step_between(graph: Graph) -> None:
    optimizer, params = make()
    optimizer.step()
    held = [give(params)]
    with graph:
        optimizer.step()
        held.append(give(params))
        with pytest.raises(RuntimeError, match="no memory was set aside; take one step like the captured one before"):
            optimizer.step()
    optimizer.step()
    held.append(give(params))
    with graph:
        optimizer.step()
    assert len(optimizer._captured) == 2 and held


def test_numbers_that_moved_before_a_capture_are_captured(graph: Graph) -> None:
    """The lr of the captured step is what stands in the group then, not what the warm-up step had."""
    optimizer, _ = make()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    with graph:
        optimizer.step()
    (bucket,) = optimizer._plan.executors[0]._buckets  # type: ignore[union-attr, attr-defined]
    assert float(bucket.values[0]) == 0.25
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert float(bucket.values[0]) == 0.5


@pytest.mark.parametrize("other_plan", [False, True], ids=["same-plan", "another-plan"])
def test_reports_reach_what_graphs_read(graph: Graph, other_plan: bool) -> None:
    """After an eager step has tables of its own, too."""
    optimizer, params = make(schedule=schedules.Plateau(factor=0.5, patience=0))
    optimizer.step()
    with graph:
        optimizer.step()
    (bucket,) = optimizer._captured[0][0]._buckets  # type: ignore[attr-defined]
    ((captured, _, _),) = bucket._captured_cells
    if other_plan:
        params[0].grad = None
    optimizer.step()
    ((eager, _, _),) = optimizer._plan.executors[0]._buckets[0]._cells  # type: ignore[union-attr, attr-defined]
    assert eager.data_ptr() != captured.data_ptr()
    for value in (0.1, 0.05, 0.025):  # the first report is the best
        optimizer.report(1.0)
        assert captured.item() == eager.item() == pytest.approx(value)


def test_a_schedule_by_time_cannot_be_captured(graph: Graph) -> None:
    optimizer, _ = make(schedule=schedules.TimeDecay(0.1))
    optimizer.step()
    graph.on = True
    with pytest.raises(capture.CaptureError, match="TimeDecay does not move"):
        optimizer.step()


class Recorded:
    """The launches of one step, which can be run again with nothing but the arguments that they had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.on = False
        for module, names in (
            (launch, ("launch_measure", "launch_decide", "launch_apply")),
            (launch_trust, ("launch_trust",)),
        ):
            for name in names:
                monkeypatch.setattr(module, name, self.recording(getattr(module, name)))

    def recording(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            if self.on:
                self.calls.append((function, args, kwargs))
            function(*args, **kwargs)

        return call

    def replay(self) -> None:
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


MOVING = {
    "lr": schedules.Cosine(6, min_lr=0.01),
    "weight_decay": schedules.Cosine(5, min_lr=0.01),
    "max_norm": schedules.Cosine(4, min_lr=0.25),
}
PRECISIONS = {
    "none": None,
    "compact": fusedlr.Precision.compact(),
    "stochastic": fusedlr.Precision(state="bf16", rounding="stochastic", seed=3),
}


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("cls", [fusedlr.AdamW, fusedlr.LAMB])
def test_launches_with_the_same_arguments_take_the_next_step(
    cls: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that moves is read from the device: lr, decay, threshold, clip factor, step count, stochastic rounding.

    A graph replays its launches with the arguments that they were captured with. The same is done here by hand, beside
    an optimizer that takes the same steps by ``step()``, over gradients that change in place.
    """
    recorded = Recorded(monkeypatch)
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator).bfloat16()) for n in (200, 1000)]
        for p in params:
            p.grad = torch.zeros_like(p)
        options = {"schedule": MOVING, "clip": 0.5, "backend": "triton", "precision": PRECISIONS[name]}
        runs.append((cls(params, lr=0.1, weight_decay=0.1, **options), params))
    (eager, theirs), (replayed, ours) = runs
    changed = []
    for i in range(6):
        generator = torch.Generator().manual_seed(i)
        for p, q in zip(theirs, ours, strict=True):
            assert p.grad is not None and q.grad is not None
            p.grad.copy_(torch.randn(p.shape, generator=generator) * (i + 1))
            q.grad.copy_(p.grad)
        eager.step()
        if i < 2:
            recorded.on = i == 1
            replayed.step()
            recorded.on = False
        else:
            recorded.replay()
        now = snapshot(replayed)
        assert all(map(torch.equal, snapshot(eager), now)), f"step {i}"
        changed.append(now[0])
    assert len(recorded.calls) >= 3 and not any(map(torch.equal, changed, changed[1:]))
