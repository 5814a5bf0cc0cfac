"""On a GPU: numbers in tensors of its own, and loss scales without a wait. tests/test_graphs.py captures more."""

from __future__ import annotations

import copy
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
