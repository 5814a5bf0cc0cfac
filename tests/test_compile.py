"""torch.compile: a training step that holds optimizer.step() compiles, once, whatever the lr does."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import BACKENDS
from torch import Tensor, nn

import fusedlr
from fusedlr import schedules

# Dynamo asks every tensor that it meets for its gradient, and hides the warning from all but pytest.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
SCHEDULE = schedules.Warmup(3).then(schedules.Cosine(9, min_lr=0.0))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing compiled before, and nothing left behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def trainer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], Tensor]:
    def train_step(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return train_step


def run(step: Callable[[Tensor], Tensor], n: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [step(torch.randn(4, 6, generator=generator)) for _ in range(n)]


@pytest.mark.parametrize("lr", ["schedule", "float", "tensor", "LambdaLR"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_compiles_once_while_the_lr_moves(backend: str, lr: str) -> None:
    from torch._dynamo.testing import CompileCounter

    outcomes = []
    for compiled in (True, False):
        model = make_model()
        first = torch.tensor(0.1) if lr == "tensor" else 0.1
        options: dict[str, Any] = {"schedule": SCHEDULE} if lr == "schedule" else {}
        optimizer = fusedlr.AdamW(model.parameters(), lr=first, clip=0.5, backend=backend, **options)
        scheduler = None
        if lr == "LambdaLR":
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 / (1 + t))
        counter = CompileCounter()
        step = trainer(model, optimizer)
        step = torch.compile(step, backend=counter) if compiled else step
        frames, losses = [], []
        for i, x in enumerate(torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(2))):
            losses.append(step(x))
            frames.append(counter.frame_count)
            if lr == "float":
                optimizer.param_groups[0]["lr"] = 0.1 / (i + 2)
            elif lr == "tensor":
                optimizer.param_groups[0]["lr"].fill_(0.1 / (i + 2))
            elif scheduler is not None:
                scheduler.step()
        if compiled:
            assert frames[0] > 0, "nothing was compiled"
            # The second step finds gradients that are None again and state that is there; from then on nothing is new.
            assert frames[1:] == [frames[1]] * 5, frames
        outcomes.append([*losses, *(p.detach() for p in model.parameters())])
        assert optimizer.steps_taken == 6
    # The compiled forward and backward are the same operators, and the step is the same code.
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_breaks_the_graph_once_and_is_not_traced(backend: str) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1, clip=0.5, schedule=SCHEDULE, backend=backend)

    def only_the_step(x: Tensor) -> Tensor:
        y = x * 2
        optimizer.step()
        return y + 1

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    told = torch._dynamo.explain(only_the_step)(torch.ones(3))
    assert told.graph_break_count == 1 and told.graph_count == 2, told
    assert optimizer.steps_taken == 1


def test_a_closure_and_the_state_dict_work_beside_compiled_steps() -> None:
    model = make_model()
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.ones(4, 6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    step = torch.compile(lambda: optimizer.step(closure), backend="eager")
    losses = [step().detach() for _ in range(3)]
    assert losses[2] < losses[0] and optimizer.steps_taken == 3
    other = fusedlr.SGD(copy.deepcopy(model).parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    assert other.steps_taken == 3


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what inductor imports
def test_inductor() -> None:
    model = make_model()
    other = copy.deepcopy(model)
    optimizers = [fusedlr.AdamW(m.parameters(), lr=0.1, clip=0.5, schedule=SCHEDULE) for m in (model, other)]
    compiled = run(torch.compile(trainer(model, optimizers[0])), 4)
    eager = run(trainer(other, optimizers[1]), 4)
    # Fused float32 arithmetic of a small model; four steps of Adam.
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_fusedlr_does_not_import_dynamo() -> None:
    """It takes seconds. (torch.optim's constructor imports it.)"""
    code = (
        "import sys, torch\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "import fusedlr, fusedlr.backends.torch\n"
        "assert before or 'torch._dynamo' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
