"""The three executors side by side: what a test takes as ``executor``, an optimizer whose steps show the clip, and
the watch over steps that must not wait for a GPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedlr
from fusedlr import optimizer as core
from fusedlr.backends.device import DeviceExecutor


def step_by_the_executor_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch backend of accelerators takes the steps, whatever the tensors lie on."""
    monkeypatch.setattr(core, "executors_for", lambda backend, leaves: [DeviceExecutor(leaves, None)])


@pytest.fixture(params=["host", "device", "triton"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The PyTorch backend of CPUs, that of accelerators run on CPU tensors, and Triton."""
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "device":
        step_by_the_executor_of_devices(monkeypatch)
    return str(request.param)


def place_of(executor: str) -> torch.device:
    return torch.device("cuda" if executor == "triton" and torch.cuda.is_available() else "cpu")


def backend_of(executor: str) -> str:
    return "triton" if executor == "triton" else "torch"


def sgd(params: Sequence[Tensor], clip: Any, executor: str, **options: Any) -> fusedlr.SGD:
    """With lr 1 a step takes the clipped gradient off the parameter."""
    return fusedlr.SGD(params, lr=1.0, clip=clip, backend=backend_of(executor), **options)


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """Waiting for the GPU is an error in here."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
