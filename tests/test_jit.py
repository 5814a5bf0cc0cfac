"""The launches as a GPU sees them, without one: Triton binds, specialises and compiles, and runs nothing.

The ahead-of-time tests compile what they are told; this holds that the backend's own calls can be compiled, which the
interpreter says nothing about. The driver is a stand-in that names a target; ``warmup`` stops before the launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

SCRIPT = """
import json, sys
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
launched, compiled = [], set()
run = JITFunction.run

def warm(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    launched.append(kernel.metadata.name)
    compiled.add(id(kernel))
    return kernel

JITFunction.run = warm
import fusedlr
from fusedlr import backends, clipping, schedules
backends.interpreting = lambda: True  # the CPU's tensors stand in for a GPU's
report = []
for name, arguments in json.loads(sys.argv[1]):
    arguments = {k: eval(v, {"clipping": clipping, "schedules": schedules}) for k, v in arguments.items()}
    tensors = [torch.randn(3000), torch.randn(7), torch.randn(1), torch.randn(5).bfloat16()]
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
print(json.dumps(report))
"""

CASES = [
    ("AdamW", {"clip": "1.0", "schedule": "schedules.Warmup(3).then(schedules.Cosine(5))", "nonfinite": "'skip'"}),
    ("Adam", {"amsgrad": "True", "clip": "clipping.Value(1.0)"}),
    ("SGD", {"momentum": "0.9", "clip": "clipping.TensorNorm(1.0, norm_type='inf')"}),
    ("SGD", {"clip": "clipping.GlobalNorm(1.0, norm_type=3)"}),
    ("NAdam", {"clip": "1.0", "nonfinite": "'skip'", "schedule": "{'beta1': schedules.Linear(5, 1.0, 0.9)}"}),
    ("RAdam", {"clip": "clipping.Value(1.0)", "decoupled_weight_decay": "True"}),
]


def test_every_launch_compiles_for_a_gpu_and_only_once() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT), json.dumps(CASES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for (name, arguments), steps in zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        measures = "Value" not in arguments["clip"]
        for step in steps:
            # Two buckets (float32 and bfloat16), each with at most three launches.
            assert len(step["launched"]) == 2 * (3 if measures else 2), (name, step)
            kinds = [kernel.split("_")[1] for kernel in step["launched"]]
            assert kinds == ["measure"] * (2 if measures else 0) + ["decide"] * 2 + ["apply"] * 2
        assert steps[0]["new"] > 0
        # A moving lr, weight decay and clock are numbers in memory: nothing is compiled for them again.
        assert [step["new"] for step in steps[1:]] == [0, 0], name
