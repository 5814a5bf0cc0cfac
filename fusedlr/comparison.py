"""How long a step takes on this machine, beside torch.optim's: what ``python -m fusedlr bench`` prints.

Each side clips by the global norm, sets the scheduled lr and updates; the sides take their steps in turn, from equal
gradients that lie where autograd would put them. Before anything is timed, all sides must have come to equal weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .optimizers import AdamW
from .schedules import Cosine

__all__ = ["MODELS", "Comparison", "Model", "compare", "table"]

_Builder = Callable[[list[Parameter]], Callable[[], None]]

_STEPS = 10_000  # of the schedule
_MAX_NORM = 1.0
# Weights after three steps; an update is about as large as the lr, 1e-3, and torch's norm is up to 3e-4 off.
_RTOL, _ATOL = 1e-5, 2e-6


class Model(NamedTuple):
    """So many tensors of so many elements."""

    tensors: int
    numel: int

    def __str__(self) -> str:
        """In words."""
        return f"{self.tensors} tensors of {self.numel}"


MODELS = (Model(150, 512), Model(2000, 64), Model(100, 100_000), Model(32, 1 << 20))


class Comparison(NamedTuple):
    """Milliseconds of a step, the median of the timed ones, by side; fusedlr comes first."""

    model: Model
    milliseconds: dict[str, float]


class _Side:
    """One optimizer and its parameters."""

    def __init__(self, model: Model, device: torch.device, build: _Builder) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.params = [
            Parameter(torch.randn(model.numel, generator=generator, device=device)) for _ in range(model.tensors)
        ]
        self.step = build(self.params)
        self.times: list[float] = []

    def take(self, grads: list[Tensor]) -> None:
        """A timed step, from copies of the gradients: torch's clipping writes them."""
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.clone()
        _wait(grads[0].device)
        start = time.perf_counter()
        self.step()
        _wait(grads[0].device)
        self.times.append(1e3 * (time.perf_counter() - start))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fusedlr(params: list[Parameter]) -> Callable[[], None]:
    optimizer = AdamW(params, lr=1e-3, clip=_MAX_NORM, schedule=Cosine(_STEPS))
    return lambda: optimizer.step()


def _torch(**options: Any) -> _Builder:
    def build(params: list[Parameter]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(params, lr=1e-3, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: Cosine(_STEPS)(t, 1.0))

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, _MAX_NORM)
            optimizer.step()
            scheduler.step()

        return step

    return build


_SIDES: dict[str, _Builder] = {
    "fusedlr": _fusedlr,
    "torch fused": _torch(fused=True),
    "torch foreach": _torch(foreach=True),
}


def compare(models: tuple[Model, ...], device: torch.device, steps: int) -> Iterator[Comparison]:
    """Time all sides on each model.

    Args:
        models: what to step.
        device: where.
        steps: timed steps of each side, at least 1.

    Raises:
        RuntimeError: the sides disagree about the weights.
    """
    for model in models:
        sides = {name: _Side(model, device, build) for name, build in _SIDES.items()}
        generator = torch.Generator(device).manual_seed(1)
        grads = [torch.randn(model.numel, generator=generator, device=device) for _ in range(model.tensors)]
        for i in range(3 + steps):
            if i == 3:
                _check(model, sides)
            for side in sides.values():
                side.take(grads)
        yield Comparison(model, {name: statistics.median(side.times[3:]) for name, side in sides.items()})


def _check(model: Model, sides: dict[str, _Side]) -> None:
    ours = sides["fusedlr"].params
    for name, side in sides.items():
        for i, (p, q) in enumerate(zip(ours, side.params, strict=True)):
            if not torch.allclose(p, q, rtol=_RTOL, atol=_ATOL):
                apart = (p - q).abs().max().item()
                raise RuntimeError(f"{model}: after 3 steps, fusedlr and {name} are {apart:.3g} apart in tensor {i}")


def table(comparisons: Iterator[Comparison]) -> Iterator[str]:
    """The lines of a table, each as soon as its numbers are there."""
    first, *others = _SIDES
    yield f"{'AdamW, clipped, scheduled':28}{first + ' ms':>14}" + "".join(
        f"{name + ' ms':>18}{'ratio':>8}" for name in others
    )
    for model, milliseconds in comparisons:
        own = milliseconds[first]
        cells = (f"{milliseconds[name]:18.3f}{milliseconds[name] / own:7.2f}x" for name in others)
        yield f"{model!s:28}{own:14.3f}" + "".join(cells)
