"""Bytes: what one step loads from memory and stores to it, counted access by access in Triton's interpreter.

A kernel limited by memory is as fast as its traffic is small, and traffic can be counted without a GPU. Counted are all
elements that the masks let through, in every kernel: arrays, tables, partial sums, rows and steps; and what the host
sends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case
from kernel_tables import applied, decided, measured
from test_twins import RULES
from torch import Tensor

pytest.importorskip("triton")

from fusedlr.kernels import launch
from triton.runtime.interpreter import InterpreterBuilder

import fusedlr
from fusedlr import clipping
from fusedlr.backends import buckets as backend

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="accesses are counted in Triton's interpreter")

# Tensors as models have them, and some that are not whole blocks: 162,372 elements.
SHAPES = [(257, 301), (40_001,), (13, 7), (128, 128), (1,), (1023,), (16,), (1025,), (513, 49), (1337,)]


class Traffic:
    """Counts what the interpreter loads and stores, and what the host sends, from when it is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.accesses: list[tuple[bool, Any, int]] = []  # (whether it stores, addresses, bytes of each)
        self.sent = 0
        load, store, send = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, backend.send
        update, exchange = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

        # The unmasked ones call these.
        def loading(builder: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self._add(False, ptrs, mask)
            return load(builder, ptrs, mask, *rest, **named)

        def storing(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self._add(True, ptrs, mask)
            return store(builder, ptrs, value, mask, *rest, **named)

        def sending(array: Any, device: torch.device) -> Tensor:
            self.sent += array.nbytes
            return send(array, device)

        # An atomic access loads and stores.
        def updating(builder: Any, operation: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._add(False, ptrs, mask)
            self._add(True, ptrs, mask)
            return update(builder, operation, ptrs, value, mask, *rest)

        def exchanging(builder: Any, ptrs: Any, *rest: Any) -> Any:
            self._add(False, ptrs)
            self._add(True, ptrs)
            return exchange(builder, ptrs, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loading)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", storing)
        monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", updating)
        monkeypatch.setattr(InterpreterBuilder, "create_atomic_cas", exchanging)
        monkeypatch.setattr(backend, "send", sending)

    def _add(self, stores: bool, ptrs: Any, mask: Any = None) -> None:
        active = ptrs.data[np.broadcast_to(True if mask is None else mask.data, ptrs.data.shape)]
        self.accesses.append((stores, active.astype(np.int64), ptrs.get_element_ty().primitive_bitwidth // 8))

    @property
    def bytes(self) -> int:
        return self.sent + sum(addresses.size * size for _, addresses, size in self.accesses)

    def touched(self, array: Tensor, since: int = 0) -> tuple[set[int], set[int]]:
        """How many times the elements of a dense array were loaded and stored: {2} means each of them twice.

        ``since`` leaves out what came before the array was there: its memory may have been another's.
        """
        start, size = array.data_ptr(), array.element_size()
        times = []
        for kind in (False, True):
            addresses = np.concatenate(
                [a for stores, a, _ in self.accesses[since:] if stores == kind] or [np.zeros(0, int)]
            )
            inside = addresses[(addresses >= start) & (addresses < start + array.numel() * size)] - start
            assert (inside % size == 0).all(), "an access across elements"
            times.append(set(np.bincount(inside // size, minlength=array.numel()).tolist()))
        return times[0], times[1]


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    return Traffic(monkeypatch)


def parameters(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    return params


def check_arrays(traffic: Traffic, params: Sequence[Tensor], states: Sequence[Sequence[Tensor]], reads: int) -> None:
    """The floor: a gradient is read as often as said and never written, everything else is read and written once."""
    for p, state in zip(params, states, strict=True):
        assert p.grad is not None
        assert traffic.touched(p.grad) == ({reads}, {0})
        for array in (p, *state):
            assert traffic.touched(array.detach()) == ({1}, {1})


CLIP = clipping.GlobalNorm(1.0)
# The limits are the floor of the design (gradients read twice or once, all else read and written once) and 2 % more.
STEPS: dict[str, tuple[Any, dict[str, Any], torch.dtype, float]] = {
    "adamw-fp32-clip": (fusedlr.AdamW, {"clip": CLIP}, torch.float32, 32.7),
    "adamw-fp32": (fusedlr.AdamW, {}, torch.float32, 28.6),
    "sgd-momentum-fp32-clip": (fusedlr.SGD, {"momentum": 0.9, "clip": CLIP}, torch.float32, 24.5),
    "sgd-momentum-fp32": (fusedlr.SGD, {"momentum": 0.9}, torch.float32, 20.4),
    "adamw-bf16-clip": (fusedlr.AdamW, {"clip": CLIP}, torch.bfloat16, 16.4),
}
# With a trust ratio: what the direction is made of is read once more. (slots read, limit)
TRUSTS: dict[str, tuple[Any, dict[str, Any], torch.dtype, int, float]] = {
    "lamb-fp32-clip": (fusedlr.LAMB, {"clip": CLIP}, torch.float32, 2, 49.0),
    "lamb-fp32": (fusedlr.LAMB, {}, torch.float32, 2, 44.9),
    "lamb-bf16-clip": (fusedlr.LAMB, {"clip": CLIP}, torch.bfloat16, 2, 24.5),
    "lars-momentum-fp32-clip": (fusedlr.LARS, {"momentum": 0.9, "clip": CLIP}, torch.float32, 0, 32.7),
    "lars-momentum-fp32": (fusedlr.LARS, {"momentum": 0.9}, torch.float32, 0, 28.6),
}


@pytest.mark.parametrize("in_one", [False, True], ids=["three-launches", "one-launch"])
@pytest.mark.parametrize("name", STEPS)
def test_bytes_of_a_step(traffic: Traffic, monkeypatch: pytest.MonkeyPatch, name: str, in_one: bool) -> None:
    """The first step, in which all tables travel, by three launches and by one."""
    cls, options, dtype, limit = STEPS[name]
    monkeypatch.setenv("FUSEDLR_ONE_LAUNCH", str(int(in_one)))
    for other in ("launch_measure", "launch_decide", "launch_apply") if in_one else ("launch_step",):
        monkeypatch.setattr(launch, other, None)
    params = parameters(dtype)
    optimizer = cls(params, lr=1e-3, backend="triton", **options)
    optimizer.step()
    keys = [key for key, value in optimizer.state[params[0]].items() if value.shape == params[0].shape]
    assert len(keys) == (1 if cls is fusedlr.SGD else 2)
    check_arrays(traffic, params, [[optimizer.state[p][k] for k in keys] for p in params], 2 if "clip" in name else 1)
    if in_one:
        barrier = optimizer._plan.executors[0]._barrier
        assert traffic.touched(barrier) == ({3}, {3})  # one program arrives, releases and waits
    numel = sum(p.numel() for p in params)
    floor = params[0].element_size() * (3 + 2 * len(keys) + ("clip" in name))
    assert floor < traffic.bytes / numel <= limit


@pytest.mark.parametrize("name", TRUSTS)
def test_bytes_of_a_step_with_a_trust_ratio(traffic: Traffic, name: str) -> None:
    cls, options, dtype, read, limit = TRUSTS[name]
    params = parameters(dtype)
    optimizer = cls(params, lr=1e-3, backend="triton", **options)
    optimizer.step()
    state = [[v for v in optimizer.state[p].values() if v.shape == p.shape] for p in params if p.numel() > 1]
    clipped = "clip" in name
    for p, slots in zip((p for p in params if p.numel() > 1), state, strict=True):
        assert traffic.touched(p.grad) == ({2 + clipped}, {0})  # type: ignore[arg-type]
        assert traffic.touched(p.detach()) == ({2}, {1})
        assert all(traffic.touched(slot) == ({1 + (i < read)}, {1}) for i, slot in enumerate(slots))
    floor = params[0].element_size() * (5 + 2 * len(state[0]) + read + clipped)
    assert floor < traffic.bytes / sum(p.numel() for p in params) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_a_step_with_agc(traffic: Traffic, dtype: torch.dtype) -> None:
    """Gradients and parameters are read once more, by which 28 bytes become 36; the factors come from the cache."""
    shapes = [*SHAPES, (3, 5000), (300, 40), (2000, 3)]
    params = parameters(dtype, shapes)
    params += [torch.nn.Parameter(torch.randn(40, 170).to(dtype).t()), torch.nn.Parameter(torch.randn(9, 1).to(dtype))]
    for p in params[-2:]:
        p.grad = torch.randn_like(p)
    optimizer = fusedlr.AdamW(params, lr=1e-3, backend="triton", clip=clipping.AGC())
    optimizer.step()
    for p in params:
        assert p.grad is not None
        assert traffic.touched(p.grad) == ({2}, {0})
        assert traffic.touched(p.detach()) == ({2}, {1})
        for key in ("exp_avg", "exp_avg_sq"):
            assert traffic.touched(optimizer.state[p][key]) == ({1}, {1})
    (units,) = optimizer._plan.executors[0]._units  # type: ignore[union-attr, attr-defined]
    assert traffic.touched(units.factors)[1] == {1}
    # The norms of pieces are written once, and read twice: for the largest one, and for the sum.
    loaded, stored = traffic.touched(units.norms)
    assert loaded == {2} and stored == {1}
    assert units.norms.numel() * 24 < 0.25 * sum(p.numel() * p.element_size() for p in params) * 9


def test_bytes_of_bfloat16_parameters_with_float32_state(traffic: Traffic) -> None:
    """The three kernels of a clipped AdamW step, launched by hand."""
    rule, limit = RULES["adamw"], 24.5
    shapes = [(math.prod(shape),) for shape in SHAPES]
    params = parameters(torch.bfloat16, shapes)
    grads = [p.grad for p in params if p.grad is not None]
    moments = [[torch.zeros(shape), torch.zeros(shape)] for shape in shapes]
    counts = [-(-g.numel() // 1024) for g in grads]
    sums, scales = measured(grads)
    scalars = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    out = decided(
        rule,
        [[scalars[name] for name in rule.scalars]],
        [0.0] * len(params),
        partials=torch.stack([sums, scales]),
        counts=counts,
        factor="clip_factor",
        scope="global",
        clip=(1.0, 1e-6, math.inf),
        dtype=torch.bfloat16,
    )
    h, factor = out.rows[0, :-2].tolist(), float(out.rows[0, -2])
    assert 0.0 < factor < 1.0
    arrays = [[p.detach(), *state] for p, state in zip(params, moments, strict=True)]
    begin = len(traffic.accesses)
    placed = applied(rule, h, arrays, grads, factor=factor)
    for (p, *state), grad in zip(placed, grads, strict=True):
        assert traffic.touched(grad) == ({2}, {0})
        for array in (p, *state):
            assert traffic.touched(array.inside, begin) == ({1}, {1}) and array.untouched_around()
        assert state[0].inside.dtype == torch.float32 and p.inside.dtype == torch.bfloat16
    assert 24 < traffic.bytes / sum(p.numel() for p in params) <= limit


# Bytes an element: the floor, and 2 % more.
STORED: dict[str, tuple[fusedlr.Precision, dict[str, Any], float]] = {
    "fp32-clip": (fusedlr.Precision(state="fp32"), {"clip": CLIP}, 24.0),
    "fp32": (fusedlr.Precision(state="fp32"), {}, 22.0),
    "exact-clip": (fusedlr.Precision.exact(), {"clip": CLIP}, 28.0),
    "master-clip": (fusedlr.Precision(state="fp32", weights="fp32"), {"clip": CLIP}, 32.0),
    "stochastic-clip": (fusedlr.Precision(state="bf16", rounding="stochastic"), {"clip": CLIP}, 16.0),
    "int8-clip": (fusedlr.Precision(state="int8"), {"clip": CLIP}, 12.25),
    "compact-clip": (fusedlr.Precision.compact(), {"clip": CLIP}, 14.25),
}


@pytest.mark.parametrize("name", STORED)
def test_bytes_of_every_storage(traffic: Traffic, name: str) -> None:
    """A step of AdamW with bfloat16 parameters, all tables included; every array of the state is touched once."""
    precision, options, floor = STORED[name]
    # As models have them, and larger: a table's row of a tensor is then less than 0.1 % of its bytes.
    params = parameters(torch.bfloat16, [(257, 301), (40_001,), (13, 7), (512, 512), (1,), (1025,), (513, 49)])
    optimizer = fusedlr.AdamW(params, lr=1e-3, backend="triton", precision=precision, **options)
    optimizer.step()
    states = [[value for value in optimizer.state[p].values() if value.ndim] for p in params]
    assert len(states[0]) == 2 + 2 * (precision.state == "int8") + (precision.weights != "param")
    check_arrays(traffic, params, states, 2 if "clip" in name else 1)
    assert floor < traffic.bytes / sum(p.numel() for p in params) <= 1.02 * floor


# Random state may be none that a run leads to: centered RMSprop takes the root of a negative number then. Only the
# accesses count here.
@pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt:RuntimeWarning")
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=["param", "fp32"])
@pytest.mark.parametrize("name", RULES)
def test_apply_of_every_rule_touches_everything_once(traffic: Traffic, name: str, state_dtype: torch.dtype) -> None:
    rule = RULES[name]
    sizes = (5000, 1, 1039)
    arrays = [[torch.rand(n).bfloat16(), *(torch.rand(n).to(state_dtype) for _ in rule.slots)] for n in sizes]
    grads = [torch.rand(n).bfloat16() for n in sizes]
    placed = applied(rule, [0.5] * len(rule.hyper._fields), arrays, grads)
    for tensors, grad in zip(placed, grads, strict=True):
        assert traffic.touched(grad) == ({1}, {0})
        assert all(traffic.touched(array.inside) == ({1}, {1}) for array in tensors)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_of_every_case_touches_everything_once_and_once_for_a_trust_ratio(traffic: Traffic, case: Case) -> None:
    params = parameters(torch.float32, [(5, 8), (1,), (1025,)])
    optimizer = case.make(params, backend="triton", clip=CLIP)
    optimizer.step()
    states = [[optimizer.state[p][key] for key in case.state] for p in params]
    if not case.trust:
        check_arrays(traffic, params, states, 2)
        return
    for p, state in zip(params, states, strict=True):
        assert traffic.touched(p.grad) == ({3}, {0})  # type: ignore[arg-type]
        assert traffic.touched(p.detach()) == ({2}, {1})
        assert all(traffic.touched(slot) == ({1 + (case.fused is fusedlr.LAMB)}, {1}) for slot in state)


@pytest.mark.parametrize("cls", [fusedlr.AdamW, fusedlr.LAMB])
def test_a_skipped_step_reads_gradients_alone(traffic: Traffic, cls: Any) -> None:
    params = parameters(torch.float32, [(3000,), (7,)])
    params[1].grad[3] = math.nan  # type: ignore[index]
    optimizer = cls(params, backend="triton", nonfinite="skip")
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    for p in params:
        for array in (p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]):
            assert traffic.touched(array) == ({0}, {0})
    assert traffic.touched(params[0].grad) == ({1}, {0})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_chunks_of_extreme_magnitudes_are_measured_twice(traffic: Traffic, dtype: torch.dtype) -> None:
    """A plain sum of squares serves all others, zeros included."""
    sizes = {1.0: 1, 0.0: 1, 1e-10: 1, 1e6: 1, 1e-30: 2, 1e30: 2, math.inf: 2, math.nan: 2}
    for size, times in sizes.items():
        grad = torch.full((1030,), size).to(dtype)
        measured([grad], chunk_size=2048)
        assert traffic.touched(grad) == ({times}, {0}), size
        traffic.accesses.clear()
