"""The benchmark's cases: what is stepped, on which device, with which optimizer, clip and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Shapes = list[tuple[int, ...]]

# Of the one schedule that cases use: long enough that no run reaches its end, short enough to move at every step.
WARMUP_STEPS = 10
COSINE_STEPS = 10_000

# State tensors in a parameter's shape, beside the momentum of those that have one.
STATE_TENSORS = {"AdamW": 2, "SGD": 0, "RMSprop": 1, "Adadelta": 2, "Adamax": 2, "NAdam": 2, "RAdam": 2}


@dataclass(frozen=True)
class Case:
    """One row of the benchmark; see bench/README.md for what the numbers made from it mean."""

    name: str
    device: str
    shapes: Callable[[], Shapes]
    optimizer: str = "AdamW"
    arguments: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1})
    clip: float | None = 1.0
    schedule: str | None = "cosine"
    dtype: torch.dtype = torch.float32
    # How fusedlr stores state and weights: the arguments of its Precision; None: as torch.optim stores them.
    precision: dict[str, Any] | None = None
    n_groups: int = 1
    # A point on the plots of time against size: left out by --quick, and by pytest.
    sweep: bool = False

    @property
    def n_params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes())

    @property
    def n_tensors(self) -> int:
        return len(self.shapes())

    @property
    def state_dtype(self) -> torch.dtype:
        state = (self.precision or {}).get("state", "param")
        return {"param": self.dtype, "fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[state]

    @property
    def bytes_per_param_floor(self) -> int:
        """Least memory traffic of a step: the gradient is read twice with clipping and never written."""
        state_tensors = STATE_TENSORS[self.optimizer] + bool(self.arguments.get("momentum"))
        param_and_gradient = (2 + (1 if self.clip is None else 2)) * self.dtype.itemsize
        return param_and_gradient + 2 * state_tensors * self.state_dtype.itemsize

    def groups(self, params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        """The parameters as one group, or as two: matrices that decay and vectors that do not."""
        if self.n_groups == 1:
            return [{"params": params}]
        return [
            {"params": [p for p in params if p.dim() >= 2]},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]


def lr_factor(schedule: str | None, t: int) -> float:
    """The lr of step t as a multiple of the base lr, written for torch's LambdaLR, independently of fusedlr."""
    if schedule is None:
        return 1.0
    if t < WARMUP_STEPS:
        return (t + 1) / WARMUP_STEPS
    return (1 + math.cos(math.pi * min((t - WARMUP_STEPS) / COSINE_STEPS, 1.0))) / 2


def same(count: int, *shape: int) -> Callable[[], Shapes]:
    return lambda: [shape] * count


def transformer(vocabulary: int, positions: int, width: int, layers: int, final_norm: bool = True) -> Shapes:
    """The parameters of a GPT-2 in the order of its modules; biases everywhere, the output tied to the embedding."""
    shapes: Shapes = [(vocabulary, width), (positions, width)]
    for _ in range(layers):
        shapes += [(width,), (width,)]
        shapes += [(width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,)]
        shapes += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return shapes + ([(width,), (width,)] if final_norm else [])


def gpt2() -> Shapes:
    """GPT-2 small: 124,439,808 parameters in 148 tensors."""
    return transformer(50_257, 1_024, 768, 12)


def gpt_95m() -> Shapes:
    """GPT-2 small with a vocabulary of 12,288: 95.3 million parameters in 146 tensors."""
    return transformer(12_288, 1_024, 768, 12, final_norm=False)


def gpt_3m() -> Shapes:
    """3.3 million parameters in 52 tensors: with their gradients and state, more than most caches hold."""
    return transformer(256, 128, 256, 4)


def resnet50() -> Shapes:
    """torchvision's ResNet-50: 25,557,032 parameters in 161 tensors."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1_000, 2_048), (1_000,)]


def gpt_of(n_params: int) -> Callable[[], Shapes]:
    """A GPT-2 of 8 layers, 100 tensors, whose width brings it near that many parameters."""

    def shapes(width: int) -> Shapes:
        return transformer(16 * width, 4 * width, width, 8)

    def distance(width: int) -> int:
        return abs(sum(math.prod(shape) for shape in shapes(width)) - n_params)

    return lambda: shapes(min(range(4, 4_096, 4), key=distance))


def sweep(device: str, sizes: tuple[str, ...]) -> list[Case]:
    return [Case(f"{device}-sweep-{size}", device, gpt_of(int(float(size))), n_groups=2, sweep=True) for size in sizes]


def by_rule(optimizer: str, **arguments: Any) -> list[Case]:
    """An optimizer without a fused operator in PyTorch: large tensors, and small ones."""
    name = optimizer.lower()
    large = Case(f"cpu-gpt-30m-{name}", "cpu", gpt_of(30_000_000), optimizer=optimizer, arguments=arguments, n_groups=2)
    return [large, Case(f"cpu-150x512-{name}", "cpu", same(150, 512), optimizer=optimizer, arguments=arguments)]


SIZES = ("1e5", "3e5", "1e6", "3e6", "1e7", "3e7", "1e8", "3e8", "1e9")
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}

CASES = (
    Case("cpu-gpt-95m", "cpu", gpt_95m, n_groups=2),
    Case("cpu-gpt-95m-unclipped", "cpu", gpt_95m, clip=None, n_groups=2),
    Case("cpu-gpt-3m", "cpu", gpt_3m, n_groups=2),
    Case("cpu-150x512", "cpu", same(150, 512)),
    Case("cpu-2000x64", "cpu", same(2_000, 64)),
    Case("cpu-gpt-95m-sgd", "cpu", gpt_95m, optimizer="SGD", arguments=SGD, n_groups=2),
    Case("cpu-gpt-95m-sgd-unclipped", "cpu", gpt_95m, optimizer="SGD", arguments=SGD, clip=None, n_groups=2),
    Case("cpu-resnet50-sgd", "cpu", resnet50, optimizer="SGD", arguments=SGD),
    Case("cpu-resnet50-sgd-unclipped", "cpu", resnet50, optimizer="SGD", arguments=SGD, clip=None),
    Case("cpu-gpt-3m-sgd", "cpu", gpt_3m, optimizer="SGD", arguments=SGD, n_groups=2),
    Case("cpu-150x512-sgd", "cpu", same(150, 512), optimizer="SGD", arguments=SGD),
    Case("cpu-2000x64-sgd", "cpu", same(2_000, 64), optimizer="SGD", arguments=SGD),
    *by_rule("RMSprop", lr=1e-3, momentum=0.9),
    *by_rule("Adadelta", lr=1.0),
    *by_rule("Adamax", lr=1e-3),
    *by_rule("NAdam", lr=1e-3),
    *by_rule("RAdam", lr=1e-3),
    *sweep("cpu", SIZES[:7]),
    Case("cuda-1g", "cuda", same(300, 2_048, 1_628)),
    Case("cuda-1g-unclipped", "cuda", same(300, 2_048, 1_628), clip=None),
    Case("cuda-1g-bf16", "cuda", same(300, 2_048, 1_628), dtype=torch.bfloat16),
    Case("cuda-gpt2", "cuda", gpt2, n_groups=2),
    Case("cuda-gpt2-unclipped", "cuda", gpt2, clip=None, n_groups=2),
    Case("cuda-gpt2-constant-lr", "cuda", gpt2, schedule=None, n_groups=2),
    Case("cuda-gpt-1m", "cuda", lambda: transformer(256, 128, 160, 3), n_groups=2),
    Case("cuda-2000x4096", "cuda", same(2_000, 4_096)),
    Case("cuda-resnet50", "cuda", resnet50),
    Case("cuda-resnet50-sgd", "cuda", resnet50, optimizer="SGD", arguments=SGD),
    *sweep("cuda", SIZES),
)
