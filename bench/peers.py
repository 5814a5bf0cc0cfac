"""The contenders: fusedlr, torch.optim and other libraries, each built from a case and its parameters."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection
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
# As torch.optim.AdamW has it by default.
ADAMW_EPS = 1e-8


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
    arguments = dict(case.arguments)
    if case.precision is not None:
        arguments["precision"] = fusedlr.Precision(**case.precision)
    make: Any = getattr(fusedlr, case.optimizer)
    optimizer = make(case.groups(params), schedule=schedule, clip=case.clip, **arguments)
    return Contender(optimizer, optimizer.step)


def build_torch(case: Case, params: list[Parameter], tensor_lr: bool = False, **flags: bool) -> Contender:
    """clip_grad_norm_, the optimizer of torch.optim with these flags, and LambdaLR."""
    optimizer, advance = _optimizer_and_scheduler(case, params, tensor_lr, **flags)
    return Contender(optimizer, _clip_and_step(case, params, optimizer), advance)


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


def build_torch_compile(case: Case, params: list[Parameter]) -> Contender:
    """Clipping and update in one compiled function; the lr is a tensor, so that a moving lr compiles nothing again.

    Source: docs.pytorch.org/tutorials/recipes/compiling_optimizer_lr_scheduler.html. The scheduler stays outside, as
    torch does not trace it anyway.
    """
    # On a GPU the step count has to be a tensor, too; torch has `capturable` for neither SGD nor CPUs.
    flags = {"capturable": True} if case.device == "cuda" and case.optimizer != "SGD" else {}
    optimizer, advance = _optimizer_and_scheduler(case, params, tensor_lr=True, **flags)
    return Contender(optimizer, torch.compile(_clip_and_step(case, params, optimizer)), advance)


def build_other(case: Case, params: list[Parameter], module: str, name: str, **settings: Any) -> Contender:
    """clip_grad_norm_, LambdaLR and the AdamW of another library, with the settings that make it compute AdamW."""
    make = getattr(importlib.import_module(module), name)
    optimizer: torch.optim.Optimizer = make(case.groups(params), **case.arguments, eps=ADAMW_EPS, **settings)
    return Contender(optimizer, _clip_and_step(case, params, optimizer), _scheduler(case, optimizer))


def build_optimi(case: Case, params: list[Parameter]) -> Contender:
    """optimi folds the bias corrections into the betas, the same in exact arithmetic; its own eps would be 1e-6."""
    return build_other(case, params, "optimi", "AdamW")


def build_flashoptim(case: Case, params: list[Parameter]) -> Contender:
    """With float32 state; its usual one has 8 bits, and takes less memory and less time."""
    return build_other(case, params, "flashoptim", "FlashAdamW", quantize=False, master_weight_bits=None)


def build_bitsandbytes(case: Case, params: list[Parameter]) -> Contender:
    """With float32 state; its usual one has 8 bits, and takes less memory and less time."""
    return build_other(case, params, "bitsandbytes.optim", "AdamW", optim_bits=32)


PEERS: dict[str, Build] = {
    "torch-fused": build_torch_fused,
    "torch-foreach": build_torch_foreach,
    "torch-fused-grad-scale": build_torch_fused_grad_scale,
    "torch-fused-graph": build_torch_fused_graph,
    "torch-compile": build_torch_compile,
    "optimi": build_optimi,
    "flashoptim": build_flashoptim,
    "bitsandbytes": build_bitsandbytes,
}
# Named as the modules that they are imported as.
OTHER_LIBRARIES = ("optimi", "flashoptim", "bitsandbytes")


def peers_of(case: Case, asked: Collection[str] = ()) -> list[str]:
    """The peers that compute what the case asks for, on its device: the usual ones, or those of them asked for."""
    fused = case.optimizer in ("AdamW", "SGD")  # of the cases' optimizers, those that torch has a fused operator for
    names = ["torch-fused"] if fused else []
    # In bfloat16, foreach rounds every intermediate result to 8 bits: another computation, not a slower one. Compiled
    # code and the other libraries round at places of their own.
    plain = case.dtype == torch.float32
    if plain:
        names.append("torch-foreach")
    if fused and case.clip is not None:
        names.append("torch-fused-grad-scale")
    if fused and case.device == "cuda":
        names.append("torch-fused-graph")
    # On a CPU it takes minutes to compile, so there only who asks gets it.
    if plain and (case.device == "cuda" or "torch-compile" in asked):
        names.append("torch-compile")
    if plain and case.device == "cuda" and case.optimizer == "AdamW":
        names += OTHER_LIBRARIES
    return [name for name in names if not asked or name in asked]


def is_installed(peer: str) -> bool:
    """Whether the library that a peer stands for can be imported; torch can."""
    return peer not in OTHER_LIBRARIES or importlib.util.find_spec(peer) is not None


def difference_of(peer: str, case: Case) -> float:
    """By how much of a parameter's movement a peer's rule differs from AdamW's, beyond rounding."""
    if peer != "bitsandbytes":
        return 0.0
    # Its CUDA kernel decays after the update, and so decays the update, too: by lr * weight_decay of it, where AdamW
    # decays first (github.com/bitsandbytes-foundation/bitsandbytes/issues/2010).
    return float(case.arguments["lr"] * case.arguments.get("weight_decay", 0.0))


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
    return optimizer, _scheduler(case, optimizer)


def _scheduler(case: Case, optimizer: torch.optim.Optimizer) -> Callable[[], object] | None:
    if case.schedule is None:
        return None
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: lr_factor(case.schedule, t)).step


def _clip_and_step(case: Case, params: list[Parameter], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def update() -> None:
        if case.clip is not None:
            clip_grad_norm_(params, case.clip)
        optimizer.step()

    return update
