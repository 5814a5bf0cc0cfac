"""CUDA graphs for tests: real ones on a GPU, and elsewhere their likeness on CPU tensors.

What a capture means is the same in both. Nothing runs; kernels and operators are noted with the addresses that they
read and write, and each replay does them, whatever lies at those addresses by then. Memory that is allocated meanwhile
belongs to the graph. What the likeness lacks is a device that is behind the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusedlr.kernels.launcher import Launcher
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fusedlr import capture
from fusedlr import optimizer as core
from fusedlr.backends.device import DeviceExecutor
from fusedlr.backends.triton import TritonExecutor

__all__ = ["DEVICE", "Graph", "graphs"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Address:
    """Where a tensor lies, and how to read it there."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._first, self._bytes = storage.data_ptr(), storage.nbytes()
        self._dtype = tensor.dtype
        self._view = tensor.shape, tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        if not self._bytes:
            return torch.empty(self._view[0], dtype=self._dtype)
        memory = (ctypes.c_char * self._bytes).from_address(self._first)
        return torch.frombuffer(memory, dtype=torch.uint8).view(self._dtype).as_strided(*self._view)


def _addresses(arguments: Any) -> Any:
    return tree_map(lambda x: Address(x) if isinstance(x, Tensor) else x, arguments)


def _tensors(arguments: Any) -> Any:
    return tree_map(lambda x: x.tensor() if isinstance(x, Address) else x, arguments)


class Likeness:
    """What a capture has noted."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.memory: list[Tensor] = []  # the graph's own
        self.written: list[str] = []  # the operators that write what they are given

    def replay(self) -> None:
        with torch.no_grad():
            for do in self.work:
                do()


class Noting(TorchDispatchMode):
    """Notes operators instead of running them."""

    def __init__(self, graph: Likeness, spares: list[Tensor]) -> None:
        super().__init__()
        self._graph = graph
        self._spares = spares

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written:
            if any(named[written[0]] is spare for spare in self._spares):  # the host writes its own memory
                return func(*args, **kwargs)
            at, by_name = _addresses(list(args)), _addresses(kwargs)
            self._graph.work.append(lambda: func(*_tensors(at), **_tensors(by_name)))
            self._graph.written.append(str(func))
            return named[written[0]]
        given = func(*args, **kwargs)  # for the shape and the memory of what it returns
        if "lift_fresh" in func._schema.name:  # a number of the host's, which a launch takes along
            self._graph.memory.append(given)
        if any(result.alias_info is not None for result in func._schema.returns) or not _is_new(given):
            return given
        results = list(given) if isinstance(given, (tuple, list)) else [given]
        self._graph.memory += results
        if "empty" not in func._schema.name:
            at, by_name, out = _addresses(list(args)), _addresses(kwargs), _addresses(results)

            def again() -> None:
                now = func(*_tensors(at), **_tensors(by_name))
                for old, new in zip(_tensors(out), now if isinstance(now, (tuple, list)) else [now], strict=True):
                    old.copy_(new)

            self._graph.work.append(again)
        return given


def _is_new(given: Any) -> bool:
    """Whether an operator returned tensors, and no number, which the host reads from its own memory."""
    return all(isinstance(x, Tensor) for x in (given if isinstance(given, (tuple, list)) else [given]))


Graph = Any  # torch.cuda.CUDAGraph or Likeness


class Graphs:
    """``capture(function)`` gives a graph of its work, which ``replay()`` does."""

    def __init__(self) -> None:
        self.noting: Likeness | None = None
        self.spares: list[Tensor] = []  # host memory, from which tables are copied in a graph

    def capture(self, function: Callable[[], object]) -> Graph:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            return graph
        self.noting = likeness = Likeness()
        try:
            with Noting(likeness, self.spares):
                function()
        finally:
            self.noting = None
        return likeness


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    made = Graphs()
    if DEVICE.type == "cuda":
        return made
    launch, provide, replan = Launcher.__call__, capture.Spare.provide, core.FusedOptimizer._replan

    def noted(launcher: Launcher, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        if made.noting is None:
            launch(launcher, programs, arguments, constants)
            return
        at = _addresses(list(arguments))
        made.noting.work.append(lambda: launch(launcher, programs, tuple(_tensors(at)), constants))

    def provided(spare: Any, like: Tensor, device: torch.device) -> None:
        provide(spare, like, device)
        made.spares.append(spare._memory)

    def planned(optimizer: Any, *args: Any) -> Any:
        plan = replan(optimizer, *args)
        if optimizer._replayed is None:  # as a GPU has it
            optimizer._replayed = capture.ReplayedClock(DEVICE)
        return plan

    capturing = lambda *_: made.noting is not None  # noqa: E731
    monkeypatch.setattr(Launcher, "__call__", noted)
    monkeypatch.setattr(capture.Spare, "provide", provided)
    monkeypatch.setattr(core.FusedOptimizer, "_replan", planned)
    monkeypatch.setattr(capture, "capturing", capturing)
    monkeypatch.setattr(TritonExecutor, "captures", capturing)
    monkeypatch.setattr(DeviceExecutor, "captures", capturing)
    return made
