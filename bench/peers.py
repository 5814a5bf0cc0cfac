"""The contenders: fusedlr, and the ways to do the same with torch.optim, each built from a case and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, get_total_norm

import fusedlr
from bench.cases import COSINE_STEPS, WARMUP_STEPS, Case, lr_factor
from fusedlr import schedules

# As torch.nn.utils.clip_grad_norm_ adds it to the norm.
EPS = 1e-6


@dataclass
class Contender:
    """One side of a comparison. What is timed is `step()`: clipping, update and schedule.

    `update` may be captured in a CUDA graph; `advance` is the part of the schedule that runs on the host.
    """

    optimizer: torch.optim.Optimizer
    update: Callable[[], object]
    advance: Callable[[], object] | None = None

    def step(self) -> None:
        self.update()
        if self.advance is not None:
            self.advance()

    def capture(self) -> None:
        """Replace `update` by the replay of a graph of it. The optimizer's state must be there already."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.update()
        self.update = graph.replay


Build = Callable[[Case, list[Parameter]], Contender]


def build_fusedlr(case: Case, params: list[Parameter]) -> Contender:
    schedule = None
    if case.schedule == "cosine":
        schedule = schedules.Warmup(WARMUP_STEPS).then(schedules.Cosine(COSINE_STEPS))
    make: Any = getattr(fusedlr, case.optimizer)
    optimizer = make(case.groups(params), schedule=schedule, clip=case.clip, **case.arguments)
    return Contender(optimizer, optimizer.step)


def build_torch(case: Case, params: list[Parameter], tensor_lr: bool = False, **flags: bool) -> Contender:
    """clip_grad_norm_, the optimizer of torch.optim with these flags, and LambdaLR."""
    optimizer, advance = _optimizer_and_scheduler(case, params, tensor_lr, **flags)

    def update() -> None:
        if case.clip is not None:
            clip_grad_norm_(params, case.clip)
        optimizer.step()

    return Contender(optimizer, update, advance)


def build_torch_fused(case: Case, params: list[Parameter]) -> Contender:
    return build_torch(case, params, fused=True)


def build_torch_foreach(case: Case, params: list[Parameter]) -> Contender:
    return build_torch(case, params, foreach=True)


def build_torch_fused_graph(case: Case, params: list[Parameter]) -> Contender:
    """For capture: the scheduler writes the lr, a tensor on the device, from outside of the graph."""
    # SGD keeps no step count, so torch has no `capturable` for it: its fused form may be captured as it is.
    flags = {} if case.optimizer == "SGD" else {"capturable": True}
    return build_torch(case, params, tensor_lr=True, fused=True, **flags)


def build_torch_fused_grad_scale(case: Case, params: list[Parameter]) -> Contender:
    """Like torch-fused without the pass that clips: the fused kernel divides by `optimizer.grad_scale`.

    That attribute is there for GradScaler. It is what a careful user of torch.optim can do to save that pass.
    """
    if case.clip is None:
        raise ValueError(f"torch-fused-grad-scale clips, and the case {case.name} does not: choose another peer")
    optimizer, advance = _optimizer_and_scheduler(case, params, fused=True)
    max_norm = case.clip

    def update() -> None:
        norm = get_total_norm([p.grad for p in params if p.grad is not None])
        optimizer.grad_scale = ((norm.float() + EPS) / max_norm).clamp_(min=1.0)  # type: ignore[attr-defined]
        optimizer.step()

    return Contender(optimizer, update, advance)


PEERS: dict[str, Build] = {
    "torch-fused": build_torch_fused,
    "torch-foreach": build_torch_foreach,
    "torch-fused-grad-scale": build_torch_fused_grad_scale,
    "torch-fused-graph": build_torch_fused_graph,
}


def peers_of(case: Case) -> list[str]:
    """The peers that compute what the case asks for, on its device."""
    names = ["torch-fused"]
    # In bfloat16, foreach rounds every intermediate result to 8 bits: another computation, not a slower one.
    if case.dtype == torch.float32:
        names.append("torch-foreach")
    if case.clip is not None:
        names.append("torch-fused-grad-scale")
    if case.device == "cuda":
        names.append("torch-fused-graph")
    return names


def replays_graph(peer: str) -> bool:
    """Whether a comparison with this peer replays CUDA graphs, on both sides."""
    return peer.endswith("-graph")


def _optimizer_and_scheduler(
    case: Case, params: list[Parameter], tensor_lr: bool = False, **flags: bool
) -> tuple[torch.optim.Optimizer, Callable[[], object] | None]:
    arguments = dict(case.arguments)
    if tensor_lr:
        arguments["lr"] = torch.tensor(arguments["lr"], device=params[0].device)
    make: Any = getattr(torch.optim, case.optimizer)
    optimizer: torch.optim.Optimizer = make(case.groups(params), **arguments, **flags)
    if case.schedule is None:
        return optimizer, None
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: lr_factor(case.schedule, t)).step
