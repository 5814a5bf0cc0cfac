"""The launches as a GPU sees them, without one: Triton binds, specialises and compiles, and runs nothing.

The ahead-of-time tests compile what they are told; this holds that the backend's own calls can be compiled, which the
interpreter says nothing about, and that a kernel which is launched again gets what Triton would give it. The driver is
a stand-in that names a target and launches nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

from fusedlr.kernels import launch

SCRIPT = """
import json, os, sys, timeit
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

calls = []  # (name of the kernel, what the driver is given)

class Launch:
    def __init__(self, source, metadata): self.name = metadata.name
    def __call__(self, *given): calls.append((self.name, given))

class Utils:
    def load_binary(self, name, kernel, shared, device):  # Triton 3.3 does not ask how many threads fit
        return (object(), object(), 32, 0, 1024)[: 4 if triton.__version__.startswith("3.3.") else 5]
    def unload_module(self, module): pass
    def get_device_properties(self, device): return {"max_shared_mem": 232448}

class NoGPU:
    utils, launcher_cls = Utils(), Launch
    def get_current_device(self): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_stream(self, device=0): return 0
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(NoGPU())
compiled, steps_compiled, looked = set(), [], 0
run = JITFunction.run

def counting(self, *args, **options):
    global looked
    looked += 1
    kernel = run(self, *args, **options)
    if id(kernel) not in compiled and "_step_" in kernel.metadata.name:
        steps_compiled.append(
            {"cooperative": kernel.metadata.launch_cooperative_grid, "shared": kernel.metadata.shared,
             "ptx": kernel.asm["ptx"]}
        )
    compiled.add(id(kernel))
    return kernel

JITFunction.run = counting
import fusedlr
from fusedlr import backends, clipping, schedules
from fusedlr.kernels import launch
from fusedlr.kernels.launcher import Launcher

def same(a, b):
    if isinstance(a, torch.Tensor):
        return a is b
    # What profilers are told is made for each launch.
    return type(a) is type(b) and (a.data == b.data if type(a).__name__ == "LazyDict" else a == b)

unequal, specialised = [], []
call = Launcher.__call__

def twice(launcher, programs, arguments, constants):
    # As the library launches, and as Triton does, which changes nothing but what is counted: the driver gets the same.
    global looked
    call(launcher, programs, arguments, constants)
    before = looked
    launcher.kernel[(programs, 1, 1)](*arguments, **constants, **launcher._options)
    looked = before
    (_, theirs), (name, ours) = calls.pop(), calls[-1]
    if len(ours) != len(theirs) or not all(map(same, ours, theirs)):
        unequal.append(name)
    for argument, parameter in zip(arguments, launcher.kernel.params):
        if type(argument) is int and not parameter.do_not_specialize:
            specialised.append((name, parameter.name))

Launcher.__call__ = twice
launch._programs_at_once = lambda device: 660
launch.can_launch_step = lambda device, dtype: True
backends.interpreting = lambda: True  # the CPU's tensors stand in for a GPU's
report = []
launch_once = os.environ.get("FUSEDLR_ONE_LAUNCH") == "1"
for name, arguments in json.loads(sys.argv[1]):
    arguments = {k: eval(v, {"clipping": clipping, "schedules": schedules}) for k, v in arguments.items()}
    tensors = [torch.randn(3000), torch.randn(7), torch.randn(1)]
    if not launch_once:
        tensors.append(torch.randn(5).bfloat16())
    params = [torch.nn.Parameter(x) for x in tensors]
    optimizer = getattr(fusedlr, name)(params, backend="triton", **arguments)
    steps = []
    for n in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        calls.clear(); known, looked = len(compiled), 0
        optimizer.step()
        optimizer.param_groups[0]["weight_decay"] = 0.1 * n
        steps.append({"launched": [name for name, _ in calls], "new": len(compiled) - known, "looked": looked})
    report.append(steps)

# What begins at an odd address is no kernel's that was compiled for even ones, and is launched all the same.
misaligned = []
segments, chunks = torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int32)
partials, constants = torch.zeros(2, 3, dtype=torch.float64), launch.measure_constants(torch.float32, 0, 5)
call(launch._measure, 1, (segments, chunks, partials, 3, 0, 1024, 2.0), constants)
for table in (segments, segments.flatten()[1:].unsqueeze(0), segments):
    calls.clear(); looked = 0
    call(launch._measure, 1, (table, chunks, partials, 3, 0, 1024, 2.0), constants)
    ((_, given),) = calls
    misaligned.append((looked, id(given[4])))

# Seconds of the host for a launch that it knows, and for the same by Triton's own way.
arguments, times = (segments, chunks, partials, 3, 0, 1024, 2.0), []
for way in (
    lambda: call(launch._measure, 1, arguments, constants),
    lambda: launch._measure.kernel[(1, 1, 1)](*arguments, **constants, **launch._measure._options),
):
    times.append(min(timeit.repeat(way, number=1, repeat=300)))
print(json.dumps([report, steps_compiled, unequal, specialised, misaligned, times]))
"""

CASES = [
    ("AdamW", {"clip": "1.0", "schedule": "schedules.Warmup(3).then(schedules.Cosine(5))", "nonfinite": "'skip'"}),
    ("Adam", {"amsgrad": "True", "clip": "clipping.Value(1.0)"}),
    ("SGD", {"momentum": "0.9", "clip": "clipping.TensorNorm(1.0, norm_type='inf')"}),
    ("SGD", {"clip": "clipping.GlobalNorm(1.0, norm_type=3)"}),
    ("NAdam", {"clip": "1.0", "nonfinite": "'skip'", "schedule": "{'beta1': schedules.Linear(5, 1.0, 0.9)}"}),
    ("RAdam", {"clip": "clipping.Value(1.0)", "decoupled_weight_decay": "True"}),
]


class Outcome(NamedTuple):
    """What the script found."""

    report: list[list[dict[str, Any]]]  # what each step of each case launched
    steps_compiled: list[dict[str, Any]]  # kernels of whole steps
    unequal: list[str]  # launches that were other than Triton's own
    specialised: list[list[str]]  # ints that another number would compile another kernel for
    misaligned: list[list[int]]  # launches of an even, an odd and an even table: whether Triton looked, which kernel
    times: list[float]  # of the host for a launch, and by Triton's own way


def compiled(cases: list[tuple[str, dict[str, str]]], one_launch: bool) -> Outcome:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["FUSEDLR_ONE_LAUNCH"] = str(int(one_launch))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT), json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    outcome = Outcome(*json.loads(done.stdout.splitlines()[-1]))
    assert outcome.unequal == [] and outcome.specialised == []
    return outcome


def test_every_launch_compiles_for_a_gpu_and_only_once() -> None:
    outcome = compiled(CASES, one_launch=False)
    assert outcome.steps_compiled == []
    for (name, arguments), steps in zip(CASES, outcome.report, strict=True):
        measures = "Value" not in arguments["clip"]
        for step in steps:
            # Two buckets (float32 and bfloat16), each with at most three launches.
            assert len(step["launched"]) == 2 * (3 if measures else 2), (name, step)
            kinds = [kernel.split("_")[1] for kernel in step["launched"]]
            assert kinds == ["measure"] * (2 if measures else 0) + ["decide"] * 2 + ["apply"] * 2
        assert steps[0]["new"] > 0
        # A moving lr, weight decay and clock are numbers in memory: nothing is compiled for them again.
        assert [step["new"] for step in steps[1:]] == [0, 0], name
        # Nor does Triton look at the arguments of a launch again.
        assert [step["looked"] for step in steps[1:]] == [0, 0] and steps[0]["looked"] > 0, name
    (once, even), (odd_looked, odd), (again, same) = outcome.misaligned
    assert (once, odd_looked, again) == (0, 1, 0) and even == same != odd
    direct, by_triton = outcome.times
    assert direct < 0.5 * by_triton  # a sixth where this was measured


def test_launches_of_trust_ratios_units_and_records_are_looked_at_once() -> None:
    cases = [
        ("LAMB", {"clip": "1.0"}),
        ("AdamW", {"clip": "clipping.AGC(0.01)"}),
        ("SGD", {"momentum": "0.9", "clip": "clipping.AutoClip()"}),
    ]
    for (name, _), steps in zip(cases, compiled(cases, one_launch=False).report, strict=True):
        assert steps[0]["looked"] > 0 and len(steps[0]["launched"]) >= 6, name
        assert [(step["new"], step["looked"]) for step in steps[1:]] == [(0, 0)] * 2, name


def test_a_step_in_one_launch_compiles_and_orders_its_memory() -> None:
    cases = CASES[:2]
    outcome = compiled(cases, one_launch=True)
    for (name, _), steps in zip(cases, outcome.report, strict=True):
        assert [[kernel.split("_")[1] for kernel in step["launched"]] for step in steps] == [["step"]] * 3, name
        assert [step["new"] for step in steps] == [1, 0, 0]
    assert len(outcome.steps_compiled) == len(cases)
    for kernel in outcome.steps_compiled:
        assert kernel["cooperative"]
        # The programs that are to be there at once share 64 KiB on the smallest multiprocessor; each takes 1 KiB more.
        assert launch.STEP_BLOCKS * (kernel["shared"] + 1024) <= 64 * 1024
        # In the order of the code: arrive with what was written and see what others wrote, decide, release, wait.
        words = re.findall(r"bar\.sync|(?:atom|red|ld)\.[a-z.]*(?:acq_rel|release|acquire)[.a-z]*", kernel["ptx"])
        orders = [next(o for o in ("acq_rel", "release", "acquire", "bar.sync") if o in word) for word in words]
        assert [order for order in orders if order != "bar.sync"] == ["acq_rel", "release", "acquire"]
        assert all(".gpu" in word or word == "bar.sync" for word in words), words
        # All threads meet before one of them arrives or releases, and after one has arrived or come back.
        arrived, let_go, came_back = (orders.index(order) for order in ("acq_rel", "release", "acquire"))
        assert orders[arrived - 1] == orders[arrived + 1] == orders[let_go - 1] == orders[came_back + 1] == "bar.sync"
