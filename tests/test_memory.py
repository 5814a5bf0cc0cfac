"""Peak memory: constructing an optimizer and its first step cost the state and at most a quarter of the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MiB = 1 << 20

# ru_maxrss is the highest that memory ever was, so nothing before the measured part may reach higher than what stays.
SCRIPT = """
import resource, sys, torch, fusedlr
from bench.cases import transformer

torch.set_num_threads(1)
name, flatten = sys.argv[1], sys.argv[2] == "True"
arguments = {"momentum": 0.9} if name == "SGD" else {}

def optimizer(params):
    return getattr(fusedlr, name)(params, lr=0.1, clip=1.0, flatten=flatten, backend="torch", **arguments)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small = [torch.nn.Parameter(torch.ones(8)) for _ in range(3)]
warm = optimizer(small)  # what is imported and started once is no cost of a model
for p in small:
    p.grad = torch.ones_like(p)
warm.step()
shapes = transformer(12_288, 1_024, 640, 12)
params = [torch.nn.Parameter(torch.empty(shape).fill_(0.01)) for shape in shapes]
for p in params:
    (0.01 * p.sum()).backward()  # one by one: the gradients are autograd's, and no activations raise the peak
before = peak()
ours = optimizer(params)
built = peak()
ours.step()
after = peak()
model = sum(p.numel() for p in params) * 4
state = sum(t.numel() * 4 for s in ours.state.values() for key, t in s.items() if key != "step")
print(sum(leaf.home is not None for leaf in ours._leaves), model, state, built - before, after - before)
"""

# Chunks of scaled gradients, Python objects of 148 parameters, code that is only now paged in.
SLACK = 8 * MiB


# With malloc as it is by default, whose heap keeps some of the tensors that moving parameters frees, and with one that
# gives everything back at once, which shows what is ours.
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is counted in KiB on Linux only")
@pytest.mark.parametrize("malloc", [{}, {"MALLOC_MMAP_THRESHOLD_": "65536"}], ids=["default", "trimmed"])
@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "in place"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_constructing_and_stepping_needs_the_state_and_a_quarter_of_the_model(
    name: str, flatten: bool, malloc: dict[str, str]
) -> None:
    environment = os.environ | malloc | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-c", SCRIPT, name, str(flatten)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    moved, model, state, built, stepped = (int(x) for x in done.stdout.split())
    assert moved == (148 if flatten else 0) and model > 250 * MiB
    assert state == model * (2 if name == "AdamW" else 1)
    assert built <= model // 4 + SLACK
    assert stepped <= state + model // 4 + SLACK
