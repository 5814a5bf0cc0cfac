"""The backends: one interface, three verbs (measure, decide, apply), and the choice between them."""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

# Not `import torch`: the module torch.py of this package takes that name here once it is imported.
from torch import Tensor, cuda, device, xpu

from ..clipping import Clip
from ..clipping.records import Records
from ..groups import Scheduled
from ..rule import Rule
from ..scaling import GradScale
from ..state import Leaf

__all__ = ["Backend", "Executor", "Knobs", "check_one_executor", "choose_backend", "executors_for"]

_T = TypeVar("_T")
_NAMES = ("auto", "triton", "torch")
_GPUS = ("cuda", "xpu")


@dataclass(slots=True)
class Knobs:
    """What varies from step to step.

    Args:
        scalars: the hyper-parameters of each group by name, schedules and outside writes taken into account.
        maximize: whether each group ascends.
        driven: the scalars of each group that a schedule drives in this step, for a backend that evaluates them on
            the device.
        scheduled: whether any scalar of a group has a schedule, driven by it or not.
        max_norm_schedule: the schedule of the clip's threshold, or None.
        t: the clock: steps taken so far, as far as the host knows.
        clip: the clipping strategy, or None.
        clip_numbers: its (max_norm, eps, limit) for this step.
        scale: what the gradients are divided by, and whether a scaler found an inf.
        nonfinite: "propagate", "skip" or "raise".
        may_skip: whether steps have been, or may be, skipped: then the clock of the device is the one that counts.
        advance: whether the clock counts this step.
        grad_norm: where the global norm goes, or None.
        clock: gives the int64 tensor of a device that begins with t and the skipped steps.
        records: what the clip keeps on each device.
        scope: over what a norm is needed: "global", "tensor", "unit", or None for no norm.
        measures: whether the gradients must be read before the update.
        norm_type: the p of the norm; looking for non-finite values alone takes the cheapest one.
    """

    scalars: list[dict[str, Any]]
    maximize: list[bool]
    driven: list[list[Scheduled]]
    scheduled: bool
    max_norm_schedule: Any
    t: int
    clip: Clip | None
    clip_numbers: tuple[float, float, float]
    scale: GradScale
    nonfinite: str
    may_skip: bool
    advance: bool
    grad_norm: Tensor | None
    clock: Callable[[device], Tensor]
    records: Records
    scope: str | None = field(init=False)
    measures: bool = field(init=False)
    norm_type: float = field(init=False)

    def __post_init__(self) -> None:
        self.scope = self.clip.scope if self.clip is not None else None
        self.measures = self.scope is not None or self.nonfinite != "propagate"
        self.norm_type = getattr(self.clip, "norm_type", 2.0)


class Executor(ABC):
    """Steps some of a plan's leaves by the three verbs; made anew whenever the plan is."""

    def __init__(self, leaves: list[Leaf], positions: list[int] | None) -> None:
        self.leaves = leaves
        self.positions = positions

    def part(self, values: Sequence[_T]) -> Sequence[_T]:
        """The entries of a per-leaf list that belong to this executor."""
        return values if self.positions is None else [values[i] for i in self.positions]

    @abstractmethod
    def prepare(self, rules: list[Rule]) -> None:
        """Allocate what the steps need; the leaves have their state now."""

    @abstractmethod
    def layout(self, ordered: Sequence[bool]) -> None:
        """Learn which gradients lie in memory in the order of their parameters."""

    @abstractmethod
    def measure(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        """Read the gradients once for what the clip and the non-finite policy need."""

    @abstractmethod
    def decide(self, knobs: Knobs) -> bool:
        """Norms, clip factors and the rows of numbers; whether the host knows that the step is skipped."""

    def arrived_clock(self) -> int | None:
        """The clock, where news of skipped steps has come from a device since it was last asked; never waits."""
        return None

    def captures(self) -> bool:
        """Whether this step is not taken but captured in a CUDA graph."""
        return False

    def hand_over(self) -> list[Any]:
        """What the graph of a captured step reads and writes; the next step makes anew what may change of it."""
        # Not the leaves: a checkpoint that is loaded, or other options, give those other state.
        return [held for leaf in self.leaves for held in (leaf.bank, leaf.flat)]

    def refresh(self) -> None:  # noqa: B027  # most executors read it from the host or where it is kept
        """Send what schedules follow beside the steps where it is used, after it changed between two steps."""

    @abstractmethod
    def apply(self, grads: Sequence[Tensor], knobs: Knobs) -> None:
        """Update parameters and state in one pass."""


@dataclass(frozen=True)
class Backend:
    """The user's choice: "auto", "triton" or "torch"."""

    name: str

    def for_device(self, device_type: str) -> str:
        """Which backend steps tensors of a device."""
        if self.name == "auto":
            return "triton" if device_type in _GPUS and triton_missing() is None else "torch"
        return self.name

    def explain(self, device_types: Sequence[str]) -> str:
        """What was chosen for each kind of device, and why."""
        because = "because no Triton is installed" if triton_missing() is not None else "by default"
        if self.name != "auto":
            because = "as asked"
        chosen = [f"{self.for_device(d)} for {d} tensors" for d in device_types]
        return f"{', '.join(chosen)} ({because})"


def triton_missing() -> str | None:
    """Why Triton cannot be imported, or None where it can."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # somebody's import hook, or what stands for a module that is not to be imported
        found = False
    return None if found else "Triton is not installed"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def choose_backend(name: str) -> Backend:
    """The backend meant by an argument; ``FUSEDLR_BACKEND`` overrides "auto".

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for "triton" where Triton cannot run.
    """
    source = "backend"
    if name == "auto" and os.environ.get("FUSEDLR_BACKEND"):
        name, source = os.environ["FUSEDLR_BACKEND"], "the environment variable FUSEDLR_BACKEND"
    if name not in _NAMES:
        raise ValueError(f"{source} must be one of {_NAMES}, but got {name!r}")
    if name == "triton":
        missing = triton_missing()
        if missing is not None:
            raise RuntimeError(f"{source}='triton', but {missing}; install triton or use backend='torch'")
        if not interpreting() and not (cuda.is_available() or xpu.is_available()):
            raise RuntimeError(
                f"{source}='triton', but there is no GPU here and the Triton interpreter is off; "
                "use backend='torch', or set TRITON_INTERPRET=1 before Triton is imported"
            )
    return Backend(name)


def executors_for(backend: Backend, leaves: list[Leaf]) -> list[Executor]:
    """The executors that share a plan's leaves, by device.

    Raises:
        RuntimeError: where the asked backend cannot step a leaf's device.
    """
    parts: dict[str, list[int]] = {}
    for i, leaf in enumerate(leaves):
        chosen = backend.for_device(leaf.device.type)
        if chosen == "triton" and leaf.device.type not in _GPUS and not interpreting():
            raise RuntimeError(
                f"backend='triton' cannot step parameter {leaf.index} on {leaf.device}: move it to a GPU, use "
                "backend='auto', or set TRITON_INTERPRET=1 before Triton is imported"
            )
        parts.setdefault(chosen if chosen == "triton" else f"torch-{leaf.device.type == 'cpu'}", []).append(i)
    executors: list[Executor] = []
    for kind, positions in parts.items():
        mine = [leaves[i] for i in positions]
        where = None if len(mine) == len(leaves) else positions
        if kind == "triton":
            from .triton import TritonExecutor

            executors.append(TritonExecutor(mine, where))
        elif kind == "torch-True":
            from .torch import HostExecutor

            executors.append(HostExecutor(mine, where))
        else:
            from .device import DeviceExecutor

            executors.append(DeviceExecutor(mine, where))
    return executors


def check_one_executor(executors: Sequence[Executor], needs_all: bool) -> None:
    """Raise an error where a decision about all gradients would have to be made by several executors."""
    if len(executors) > 1 and needs_all:
        raise ValueError(
            "clip, nonfinite and fold_grad_scale need all gradients on one kind of device: what both the CPU and a "
            "GPU decide would have to wait for the GPU in every step; use one optimizer for the parameters of each"
        )
