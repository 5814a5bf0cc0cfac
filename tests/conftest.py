"""What all tests share: where Triton runs, fresh random numbers, and a device for the triton backend."""

from __future__ import annotations

import importlib.util
import os
import random

import torch

# Without a GPU the kernels run in Triton's interpreter, which is chosen when they are defined: before any import.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

    if importlib.util.find_spec("triton") is not None:
        from interpreter import hasten

        hasten()

import pytest  # noqa: E402

# Processes that test side by side share the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed a test run, shown when the test fails; FUSEDLR_SEED repeats it."""
    value = int(os.environ.get("FUSEDLR_SEED", random.SystemRandom().randrange(2**31)))
    request.node.add_report_section("setup", "seed", f"FUSEDLR_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where the triton backend is tested: a GPU where there is one, else the CPU through the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")
