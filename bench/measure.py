"""One comparison: two contenders from equal parameters and gradients, checked against each other, timed in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from bench.cases import Case
from bench.peers import PEERS, Build, Contender, build_fusedlr, difference_of, replays_graph

# Norms of the gradients from step to step, in units of the threshold: below, far above, a little above. They vary so
# that a wrong clip factor shows: to a constant factor alone Adam is blind.
GRADIENT_NORMS = (0.5, 4.0, 1.7)
CHECKED_STEPS = len(GRADIENT_NORMS)
MINIMUM_ROUNDS = 20
# How often both sides are built anew on a CPU, each build with its share of the rounds. The physical memory that a side
# happens to get decides whether a large model's step takes 40 ms or 66 ms (the peer's 55 ms or 76 ms), for as long as
# it is held.
BUILDS = 4

# Enough to push everything out of the L2 cache of current GPUs.
FLUSH_BYTES = 256 * 2**20


class DisagreementError(AssertionError):
    """The two sides did not compute the same: there is nothing to time."""


@dataclass(frozen=True)
class Times:
    """Milliseconds per step of both sides, one number a round; the rounds of one build follow each other.

    On a CPU also those of the backward passes before the steps: a faster step must not be paid for there.
    """

    fusedlr: list[float]
    peer: list[float]
    builds: int = 1
    fusedlr_backward: list[float] = field(default_factory=list)
    peer_backward: list[float] = field(default_factory=list)

    def percentiles(self, milliseconds: list[float]) -> tuple[float, float, float]:
        """The 20th, 50th and 80th, found within each build, then averaged over the builds.

        Within a build steps take equally long but for outliers, so medians. From build to build times fall into two
        heaps: a median of both would be one or the other by chance, for each side on its own.
        """
        parts = np.array_split(np.array(milliseconds), self.builds)
        p20, p50, p80 = np.mean([np.percentile(part, (20, 50, 80)) for part in parts], axis=0)
        return float(p20), float(p50), float(p80)


class Comparison:
    """fusedlr and one peer on the same case.

    Both sides own their parameters and gradients. Before every step each parameter gets its gradient in a new tensor:
    on a CPU from a backward pass after `zero_grad()`, on a GPU at another address than before; that is not part of a
    step's time.
    """

    def __init__(
        self, case: Case, peer: str, build_peer: Build | None = None, peer_first: bool = False
    ) -> None:
        self.case = case
        self.peer_name = peer
        generator = torch.Generator(case.device).manual_seed(0)
        self.initial = self._tensors(generator, 0.02)
        self.gradients = self._tensors(generator, 1.0)
        norm = torch.stack([g.double().norm() for g in self.gradients]).norm().item()
        self.unit = (1.0 if case.clip is None else case.clip) / norm
        # torch adds up the squares of a float32 tensor in float32: 3e-4 off for 9 million elements on a CPU, and so
        # are the clipped gradients of every peer.
        self.norm_error = 0.0 if case.clip is None else abs(get_total_norm(self.gradients).item() / norm - 1.0)
        # Who allocates first: parameters here, state in the first step.
        self.order = (1, 0) if peer_first else (0, 1)
        builds = (build_fusedlr, build_peer or PEERS[peer])
        sides: dict[int, tuple[list[Parameter], Contender]] = {}
        for side in self.order:
            params = [Parameter(p.clone()) for p in self.initial]
            sides[side] = params, builds[side](case, params)
        self.sides = [sides[0], sides[1]]
        self.steps = 0
        self.backward_ms: tuple[list[float], list[float]] = ([], [])
        self._trash = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=case.device)

    def check_then_time(self, rounds: int) -> Times:
        """Times of both sides; raises DisagreementError if parameters differ before or after the timed steps."""
        self.check()
        if replays_graph(self.peer_name):
            for _, contender in self.sides:
                contender.capture()
        times: tuple[list[float], list[float]] = ([], [])
        self.backward_ms = ([], [])
        for i in range(rounds):
            for side in self.order if i % 2 == 0 else reversed(self.order):
                self.prepare(side)
                times[side].append(self._timed(self.sides[side][1].step))
            self.steps += 1
        self.compare()
        ours, theirs = self.backward_ms
        return Times(*times, fusedlr_backward=ours, peer_backward=theirs)

    def check(self) -> None:
        """Take a few steps on both sides and compare."""
        for _ in range(CHECKED_STEPS):
            for side in self.order:
                self.write_gradients(side)
                self.sides[side][1].step()
            self.steps += 1
        self.compare()

    @torch.no_grad()
    def write_gradients(self, side: int) -> None:
        """Give the parameters of one side the gradients of this step."""
        scale = self._scale()
        for p, g in zip(self.sides[side][0], self.gradients, strict=True):
            if p.grad is not None and replays_graph(self.peer_name):
                # A captured graph reads the addresses that it was captured with.
                torch.mul(g, scale, out=p.grad)
            else:
                # The new tensor is made while the old one is there, so no allocator can give it the same address.
                p.grad = g * scale

    def backward(self, side: int) -> None:
        """Leave the gradients of this step as a training step does: by a forward and a backward pass."""
        params = self.sides[side][0]
        for p in params:
            p.grad = None
        outputs = torch.stack([(p * g).sum() for p, g in zip(params, self.gradients, strict=True)])
        # Not the forward pass: its time is mostly that of memory which malloc gave back to the system or did not, and
        # which side's that is hangs on how their tensors lie mixed here.
        backward = partial(outputs.sum().backward, outputs.new_tensor(self._scale()))
        self.backward_ms[side].append(self._timed(backward))

    def _scale(self) -> float:
        return float(self.unit * GRADIENT_NORMS[self.steps % len(GRADIENT_NORMS)])

    def flush_caches(self) -> None:
        self._trash.fill_(self.steps % 251)

    def prepare(self, side: int) -> None:
        """What comes before a step and is not part of its time: see "What is timed" in README.md."""
        if self.case.device == "cuda":
            self.write_gradients(side)
            self.flush_caches()
        else:
            self.backward(side)

    @torch.no_grad()
    def compare(self) -> None:
        """Raise DisagreementError unless both sides' parameters have moved and agree, up to rounding."""
        # Every step rounds a parameter once when it decays and once when it is updated, on either side: four halves of
        # a unit in the last place. As for the update itself, torch's fused kernel takes beta from float32, which makes
        # 1 - beta2**t, and so the update, off by up to 1e-5 in the first steps. In bfloat16, torch also rounds the norm
        # and the clipped gradients to 8 bits, and both sides round the state, each worth 2**-9 to 2**-8 of an update.
        per_step, of_movement = {torch.float32: (2.0**-22, 2e-5), torch.bfloat16: (2.0**-7, 2.0**-5)}[self.case.dtype]
        of_movement += difference_of(self.peer_name, self.case) + 2.0 * self.norm_error
        (ours, _), (theirs, _) = self.sides
        for i, (a, b, start) in enumerate(zip(ours, theirs, self.initial, strict=True)):
            mine, other, before = a.float(), b.float(), start.float()
            moved = (other - before).abs().max().item()
            apart = (mine - other).abs()
            allowed = self.steps * per_step * other.abs() + of_movement * moved
            excess = (apart - allowed).max().item()
            if not moved > 0:
                raise DisagreementError(f"{self._where(i)}: {self.peer_name} has not moved it in {self.steps} steps")
            if not excess <= 0:  # a NaN on either side is a disagreement, too
                raise DisagreementError(
                    f"{self._where(i)}: fusedlr and {self.peer_name} are {apart.max().item():.3e} apart after "
                    f"{self.steps} steps that moved it by {moved:.3e}, {excess:.1e} more than rounding explains"
                )

    def _where(self, i: int) -> str:
        return f"case {self.case.name}, tensor {i} of shape {tuple(self.initial[i].shape)}"

    def _tensors(self, generator: torch.Generator, std: float) -> list[Tensor]:
        def make(shape: tuple[int, ...]) -> Tensor:
            tensor = torch.empty(shape, dtype=self.case.dtype, device=self.case.device)
            return tensor.normal_(std=std, generator=generator)

        return [make(shape) for shape in self.case.shapes()]

    def _timed(self, step: Callable[[], None]) -> float:
        if self.case.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The device is idle when the step begins, so its time holds what the host takes to launch it.
            torch.cuda.synchronize()
            begin.record()
            step()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end))
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3


def time_builds(case: Case, peer: str, rounds: int) -> Times:
    """Times of all rounds, on a CPU over several builds, in every second of which the peer allocates first."""
    builds = BUILDS if case.device == "cpu" else 1
    times = Times([], [], builds)
    for i in range(builds):
        share = rounds // builds + (i < rounds % builds)
        part = Comparison(case, peer, peer_first=i % 2 == 1).check_then_time(share)
        times.fusedlr.extend(part.fusedlr)
        times.peer.extend(part.peer)
        times.fusedlr_backward.extend(part.fusedlr_backward)
        times.peer_backward.extend(part.peer_backward)
        gc.collect()  # the next build needs the memory of this one
    return times


def copy_gbps(device: str) -> float:
    """Bytes read plus bytes written per second, / 1e9, by `y.copy_(x)` of 1 GiB: the median of ten."""
    x = torch.ones(2**28, dtype=torch.float32, device=device)
    y = torch.zeros_like(x)
    seconds = []
    for _ in range(12):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            y.copy_(x)
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            y.copy_(x)
            seconds.append(time.perf_counter() - start)
    # The first two pay for what is set up only once.
    return 2 * x.numel() * x.element_size() / float(np.median(seconds[2:])) / 1e9
