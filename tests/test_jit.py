"""The launches as a GPU sees them, without one: Triton binds, specialises and compiles, and runs nothing.

The ahead-of-time tests compile what they are told; this holds that the backend's own calls can be compiled, which the
interpreter says nothing about. The driver is a stand-in that names a target; ``warmup`` stops before the launch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

from fusedlr.kernels import launch

SCRIPT = """
import json, os, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class NoGPU:
    def get_current_device(self): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_stream(self, device=0): return 0
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(NoGPU())
launched, compiled, steps_compiled = [], set(), []
run = JITFunction.run

def warm(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    launched.append(kernel.metadata.name)
    if id(kernel) not in compiled and "_step_" in kernel.metadata.name:
        steps_compiled.append(
            {"cooperative": kernel.metadata.launch_cooperative_grid, "shared": kernel.metadata.shared,
             "ptx": kernel.asm["ptx"]}
        )
    compiled.add(id(kernel))
    return kernel

JITFunction.run = warm
import fusedlr
from fusedlr import backends, clipping, schedules
from fusedlr.kernels import launch
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
        launched.clear(); known = len(compiled)
        optimizer.step()
        optimizer.param_groups[0]["weight_decay"] = 0.1 * n
        steps.append({"launched": list(launched), "new": len(compiled) - known})
    report.append(steps)
print(json.dumps([report, steps_compiled]))
"""

CASES = [
    ("AdamW", {"clip": "1.0", "schedule": "schedules.Warmup(3).then(schedules.Cosine(5))", "nonfinite": "'skip'"}),
    ("Adam", {"amsgrad": "True", "clip": "clipping.Value(1.0)"}),
    ("SGD", {"momentum": "0.9", "clip": "clipping.TensorNorm(1.0, norm_type='inf')"}),
    ("SGD", {"clip": "clipping.GlobalNorm(1.0, norm_type=3)"}),
    ("NAdam", {"clip": "1.0", "nonfinite": "'skip'", "schedule": "{'beta1': schedules.Linear(5, 1.0, 0.9)}"}),
    ("RAdam", {"clip": "clipping.Value(1.0)", "decoupled_weight_decay": "True"}),
]


def compiled(cases: list[tuple[str, dict[str, str]]], one_launch: bool) -> tuple[Any, Any]:
    """What each step of each case launched, and the kernels of whole steps that were compiled."""
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
    report, kernels = json.loads(done.stdout.splitlines()[-1])
    return report, kernels


def test_every_launch_compiles_for_a_gpu_and_only_once() -> None:
    report, whole = compiled(CASES, one_launch=False)
    assert whole == []
    for (name, arguments), steps in zip(CASES, report, strict=True):
        measures = "Value" not in arguments["clip"]
        for step in steps:
            # Two buckets (float32 and bfloat16), each with at most three launches.
            assert len(step["launched"]) == 2 * (3 if measures else 2), (name, step)
            kinds = [kernel.split("_")[1] for kernel in step["launched"]]
            assert kinds == ["measure"] * (2 if measures else 0) + ["decide"] * 2 + ["apply"] * 2
        assert steps[0]["new"] > 0
        # A moving lr, weight decay and clock are numbers in memory: nothing is compiled for them again.
        assert [step["new"] for step in steps[1:]] == [0, 0], name


def test_a_step_in_one_launch_compiles_and_orders_its_memory() -> None:
    cases = CASES[:2]
    report, kernels = compiled(cases, one_launch=True)
    for (name, _), steps in zip(cases, report, strict=True):
        assert [[kernel.split("_")[1] for kernel in step["launched"]] for step in steps] == [["step"]] * 3, name
        assert [step["new"] for step in steps] == [1, 0, 0]
    assert len(kernels) == len(cases)
    for kernel in kernels:
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
