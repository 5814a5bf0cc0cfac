"""On a GPU: captured steps with moving numbers, what graphs outlive, and loss scales without a wait."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import pytest
import torch
from executors import never_waiting
from torch import Tensor, nn

import fusedlr
from fusedlr import schedules
from fusedlr.clipping import TensorNorm, Value

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
pytest.importorskip("triton")
COSINE = schedules.Warmup(3).then(schedules.Cosine(20, min_lr=0.0))


def make_model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 1)).cuda()


def everything(optimizer: Any) -> list[Tensor]:
    return [t for p, entry in optimizer.state.items() for t in (p.detach(), *entry.values())]


def make_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(11)
    shapes = [(300, 70), (1025,), (), (4096,)]
    return [nn.Parameter(torch.randn(s, generator=generator).cuda()) for s in shapes]


def fill(params: list[nn.Parameter], i: int, times: float = 1.0) -> None:
    """The gradients of step i, into the memory that is there, if any is."""
    generator = torch.Generator().manual_seed(70 + i)
    for p in params:
        g = (torch.randn(p.shape, generator=generator) * times).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def captured(optimizer: Any) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def step_or_replay(optimizer: Any, graph: torch.cuda.CUDAGraph | None, captures: bool) -> torch.cuda.CUDAGraph | None:
    """One step: eager, or a replay once there is a graph, which is captured first where asked. The graph, if any."""
    graph = captured(optimizer) if captures else graph
    if graph is None:
        optimizer.step()
    else:
        graph.replay()
    return graph


def test_numbers_in_tensors_move_between_replays() -> None:
    """lr, weight decay and the divisor of the gradients, all read from the device by each replay."""
    numbers = [(0.1, 0.0, 1.0), (0.05, 0.1, 2.0), (0.02, 0.2, 4.0), (0.01, 0.3, 8.0)]
    outcomes = []
    for replays in (True, False):
        params = make_params()
        lr, decay, divisor = (torch.tensor(x, device="cuda") for x in numbers[0])
        optimizer = fusedlr.SGD(params, lr=lr, momentum=0.9, weight_decay=decay, clip=1.0, backend="triton")
        optimizer.grad_divisor = divisor
        graph = None
        for i, values in enumerate(numbers):
            fill(params, i)
            for tensor, value in zip((lr, decay, divisor), values, strict=True):
                tensor.fill_(value)
            graph = step_or_replay(optimizer, graph, replays and i == 1)
        torch.cuda.synchronize()
        outcomes.append([*everything(optimizer), optimizer.last_grad_norm])
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("cls", [fusedlr.AdamW, fusedlr.LAMB])
@pytest.mark.parametrize(
    "precision", [fusedlr.Precision.compact(), fusedlr.Precision(state="bf16", rounding="stochastic")], ids=str
)
def test_stochastic_rounding_moves_between_replays(cls: Any, precision: fusedlr.Precision) -> None:
    """Eager steps and replays round alike, step by step, and so with other random bits each time."""
    outcomes = []
    for replays in (True, False):
        params = [nn.Parameter(p.detach().bfloat16()) for p in make_params()]
        optimizer = cls(params, lr=0.01, weight_decay=0.1, clip=1.0, schedule=COSINE, precision=precision)
        graph = None
        seen = []
        for i in range(6):
            fill(params, i)
            graph = step_or_replay(optimizer, graph, replays and i == 1)
            torch.cuda.synchronize()
            seen.append([t.clone() for t in everything(optimizer)])
        outcomes.append(seen)
    assert all(all(map(torch.equal, a, b)) for a, b in zip(*outcomes, strict=True))


def test_forward_backward_and_step_in_one_graph() -> None:
    """The gradients then lie in the graph's memory: the pointer table changes in the captured step."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(5)).cuda()
    outcomes = []
    for replays in (True, False):
        model = make_model()
        optimizer = fusedlr.AdamW(model.parameters(), lr=0.01, clip=0.1, schedule=COSINE)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())

        def train(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            optimizer.step()

        with torch.cuda.stream(stream):
            for _ in range(3):
                train()
        torch.cuda.current_stream().wait_stream(stream)
        if replays:
            optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(x).square().mean().backward()
                optimizer.step()
            for i in range(6):
                graph.replay()
                # What is freed and allocated in between must not be what the graph reads.
                gc.collect()
                torch.full((1 << 20,), float(i), device="cuda")
        else:
            for _ in range(6):
                train()
        torch.cuda.synchronize()
        assert optimizer.steps_taken == 9 and optimizer.last_lr == [COSINE(8, 0.01)]
        assert optimizer.state_dict()["param_groups"][0]["fusedlr"]["t"] == 9
        outcomes.append(everything(optimizer))
    for a, b in zip(*outcomes, strict=True):
        # The matrix products are cuBLAS's, which may choose another kernel in a graph.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_eager_steps_and_other_plans_between_replays() -> None:
    outcomes = []
    for replays in (True, False):
        params = make_params()
        optimizer = fusedlr.AdamW(params, lr=0.1, clip=1.0, schedule=COSINE, backend="triton")
        fixed: list[Tensor] = []
        graph = None
        for i in range(9):
            if i in (4, 7):  # other gradients, and one parameter less
                for p in params:
                    p.grad = None
                fill(params[1:], i)
                optimizer.step()
                torch.full((1 << 20,), 7.0, device="cuda")
                continue
            if fixed:
                for p, g in zip(params, fixed, strict=True):
                    p.grad = g
            fill(params, i)
            fixed = fixed or [p.grad for p in params]  # type: ignore[misc]
            if i == 2 and replays:
                graph = captured(optimizer)
            if graph is None or i == 5:
                optimizer.step()
            else:
                graph.replay()
        torch.cuda.synchronize()
        outcomes.append(everything(optimizer))
        assert optimizer.steps_taken == 9
    assert all(map(torch.equal, *outcomes))


# A refused step leaves nothing in the graph.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_what_cannot_be_captured_is_refused() -> None:
    params = make_params()
    optimizer = fusedlr.AdamW(params, lr=0.1, clip=1.0)
    fill(params, 0)
    with pytest.raises(RuntimeError, match="as the first step"):
        captured(optimizer)
    torch.cuda.synchronize()
    params[0].grad = None
    optimizer.step()
    with pytest.raises(RuntimeError, match="parameters that require gradients have none"):
        captured(optimizer)
    torch.cuda.synchronize()
    optimizer.step()
    assert int(optimizer.state[params[1]]["step"]) == 2 and optimizer.steps_taken == 2


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("clip", [None, 1.0, TensorNorm(0.5), Value(0.3)], ids=repr)
def test_a_folded_loss_scale_waits_for_nothing(clip: Any, backend: str) -> None:
    outcomes = []
    for fold in (True, False):
        params = make_params()
        schedule = COSINE if backend == "triton" else None
        optimizer = fusedlr.AdamW(params, lr=0.1, clip=clip, backend=backend, schedule=schedule)
        optimizer.fold_grad_scale = fold
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        scaler.scale(torch.ones((), device="cuda"))
        for i, bad in enumerate([None, math.inf, None, None]):
            fill(params, i, scaler.get_scale())
            if bad is not None:
                params[1].grad[-1] = bad  # type: ignore[index]
            if fold:
                with never_waiting():
                    scaler.step(optimizer)
                    scaler.update()
            else:
                scaler.step(optimizer)
                scaler.update()
        marks = optimizer.state_dict()["param_groups"][0]["fusedlr"]
        assert marks["t"] == optimizer.steps_taken == 3
        assert int(optimizer.skipped_steps) == (1 if fold else 0)
        outcomes.append(everything(optimizer))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # powers of two; norms of scaled squares


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch refuses gradients of another dtype")
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_another_dtype(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    outcomes = []
    for wanted in (grad_dtype, dtype):
        params = [nn.Parameter(p.detach().to(dtype)) for p in make_params()]
        optimizer = fusedlr.AdamW(params, lr=0.1, clip=1.0, backend="triton")
        for i in range(3):
            generator = torch.Generator().manual_seed(i)
            for p in params:
                p.grad_dtype = None
                p.grad = (torch.randint(-15, 16, p.shape, generator=generator) / 8).to(wanted).cuda()
            optimizer.step()
        outcomes.append(everything(optimizer))
    for a, b in zip(*outcomes, strict=True):
        rtol = 1e-5 if dtype == torch.float32 else 2.0**-6  # norms of float64 gradients are summed another way
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def test_a_compiled_training_step() -> None:
    from torch._dynamo.testing import CompileCounter

    model = make_model()
    other = copy.deepcopy(model)
    x = torch.ones(8, 64, device="cuda")
    counter = CompileCounter()
    outcomes = []
    for m, compiled in ((model, True), (other, False)):
        optimizer = fusedlr.AdamW(m.parameters(), lr=0.01, clip=0.1, schedule=COSINE)

        def train(m: nn.Module = m, optimizer: Any = optimizer) -> None:
            m(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step = torch.compile(train, backend=counter) if compiled else train
        frames = []
        for _ in range(5):
            step()
            frames.append(counter.frame_count)
        assert frames[1:] == [frames[1]] * 4
        outcomes.append(everything(optimizer))
    assert counter.frame_count > 0
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
