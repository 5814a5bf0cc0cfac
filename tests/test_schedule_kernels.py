"""Schedules on the device: the same formulas as on the host, exact, in one launch, and compiled without a GPU.

Runs on a GPU where there is one, and elsewhere under Triton's interpreter.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import CASES, RELATIVE, agrees
from test_schedules import composed, ending, endless

from fusedlr.schedules import Schedule, Table
from fusedlr.schedules import program as host
from fusedlr.schedules.program import NUMBERS, Kind, Packed, Row, pack, value

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
device_code: Any = importlib.import_module("fusedlr.kernels.schedules")
schedule_value = device_code.schedule_value

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def evaluate(rows_ptr, values_ptr, first_ptr, count_ptr, t_ptr, out_ptr, n, max_rows, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    first = tl.load(first_ptr + lane, mask=lane < n, other=0)
    count = tl.load(count_ptr + lane, mask=lane < n, other=0)
    t = tl.load(t_ptr + tl.program_id(0))
    result = schedule_value(rows_ptr, values_ptr, first, count, t, max_rows)
    tl.store(out_ptr + tl.program_id(0) * LANES + lane, result)


def launch(packed: Packed, times: list[int]) -> np.ndarray:
    """[times, programs] of values, all programs in every launch."""
    n = len(packed.first)
    lanes = triton.next_power_of_2(max(n, 2))
    rows, values, first, count = (
        torch.from_numpy(array).to(DEVICE) for array in (packed.rows, packed.values, packed.first, packed.count)
    )
    out = torch.full((len(times), lanes), math.nan, dtype=torch.float64, device=DEVICE)
    t = torch.tensor(times, dtype=torch.int64, device=DEVICE)
    max_rows = int(packed.count.max())
    evaluate[(len(times),)](rows, values, first, count, t, out, n, max_rows, LANES=lanes, enable_fp_fusion=False)
    return out[:, :n].cpu().numpy()


@triton.jit
def evaluate_pairs(rows_ptr, values_ptr, first_ptr, count_ptr, t_ptr, out_ptr, max_rows, LANES: tl.constexpr):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    first, count, t = tl.load(first_ptr + lane), tl.load(count_ptr + lane), tl.load(t_ptr + lane)
    tl.store(out_ptr + lane, schedule_value(rows_ptr, values_ptr, first, count, t, max_rows))


def test_all_schedules_in_one_launch_are_exact() -> None:
    packed = pack([case.schedule.rows(case.base) for case in CASES])
    pairs = [(i, t) for i, case in enumerate(CASES) for t in case.times]
    lanes = 256
    which = np.array([i for i, _ in pairs] + [0] * (-len(pairs) % lanes))
    times = np.array([t for _, t in pairs] + [0] * (-len(pairs) % lanes), dtype=np.int64)
    arrays = (packed.rows, packed.values, packed.first[which], packed.count[which], times)
    out = torch.full((len(which),), math.nan, dtype=torch.float64, device=DEVICE)
    evaluate_pairs[(len(which) // lanes,)](
        *(torch.from_numpy(array).to(DEVICE) for array in arrays),
        out, int(packed.count.max()), LANES=lanes, enable_fp_fusion=False,
    )  # fmt: skip
    failures = [
        (repr(CASES[i].schedule), t, got)
        for (i, t), got in zip(pairs, out.tolist(), strict=False)
        if not agrees(got, CASES[i].exact(t))
    ]
    assert not failures


def test_one_clock_for_all_schedules() -> None:
    """As a step evaluates them: all programs at one t; the host's own exactness test_schedules.py holds."""
    times = [0, 7, 100, 10**9]
    got = launch(pack([case.schedule.rows(case.base) for case in CASES]), times)
    expected = np.array([[case.schedule(t, case.base) for case in CASES] for t in times])
    np.testing.assert_allclose(got, expected, rtol=RELATIVE, atol=1e-290)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(ending(), min_size=1, max_size=3), min_size=1, max_size=4),
    st.one_of(ending(), endless(), composed()),
    st.lists(st.integers(0, 200) | st.integers(0, 2**31 - 1), min_size=1, max_size=3),
)
def test_random_programs_side_by_side(chains: list[list[Schedule]], last: Schedule, times: list[int]) -> None:
    built = [last]
    for parts in chains:
        chain = parts[0]
        for part in parts[1:]:
            chain = chain.then(part)
        built.append(chain)
    got = launch(pack([schedule.rows(1.0) for schedule in built]), times)
    expected = [[schedule(t, 1.0) for schedule in built] for t in times]
    np.testing.assert_allclose(got, expected, rtol=RELATIVE, atol=1e-290)


def test_a_held_table_is_held_to_the_last_bit() -> None:
    assert set(launch(pack([Table([0.375], 5, interpolate=True).rows(1.0)]), list(range(20)))[:, 0]) == {0.375}


def test_lanes_without_a_program_are_zero_and_read_nothing() -> None:
    packed = pack([CASES[0].schedule.rows(1.0), [], CASES[0].schedule.rows(2.0), []])
    packed.first[packed.count == 0] = 2**40  # whoever reads there crashes
    assert launch(packed, [0, 5]).tolist() == [[0.3, 0.0, 0.6, 0.0]] * 2
    nothing = Packed(packed.rows[:0], packed.values, packed.first, packed.count * 0, packed.live)
    assert launch(nothing, [7]).tolist() == [[0.0] * 4]


def test_rows_beyond_a_program_are_not_read_as_its_own() -> None:
    short, long = [Row(0, math.inf, 0, Kind.CONST, 1.0)], [Row(i, math.inf, 0, Kind.CONST, 2.0 + i) for i in range(5)]
    packed = pack([short, long, short])
    packed.rows[0, 0] = 0.0
    assert launch(packed, [0, 3, 100]).tolist() == [[1.0, 2.0, 1.0], [1.0, 5.0, 1.0], [1.0, 6.0, 1.0]]


def test_factors_that_begin_late_and_clocks_that_go_slower() -> None:
    rows = [
        Row(0, 10, 0, Kind.LINEAR, 0.0, 1.0),
        Row(10, math.inf, 0, Kind.CONST, 1.0),
        Row(4, math.inf, 0, Kind.CONST, 0.5, factor=1),
        Row(6, 2.5, 0.25, Kind.COSINE, 1.0, 0.1, stride=3, factor=2),
        Row(8, math.inf, 0, Kind.CONST, 0.25, factor=1),
    ]
    single = [Row(0, math.inf, 0, Kind.CONST, 7.0)]
    times = [*range(20), 1_000]
    got = launch(pack([single, rows, []]), times)
    np.testing.assert_allclose(got[:, 1], [value(rows, t) for t in times], rtol=RELATIVE, atol=0)
    assert got[4, 1] == 0.4 * 0.5
    assert got[:, 0].tolist() == [7.0] * len(times)
    assert got[:, 2].tolist() == [0.0] * len(times)


def test_a_live_number_may_change_between_steps() -> None:
    rows = [Row(0, 4, 0, Kind.LINEAR, 1.0, 0.0), Row(0, math.inf, 0, Kind.LIVE, 2.0, 0.25, factor=1, values=(0.5,))]
    packed = pack([Table([0.5]).rows(1.0), rows, rows])
    # Equal tables are shared, live numbers never: each program has its own.
    assert packed.values.tolist() == [0.5, 0.5, 0.5]
    assert packed.live.tolist() == [1, 2]
    assert launch(packed, [1]).tolist() == [[0.5, 0.75, 0.75]]
    packed.values[packed.live[0]] = 0.0
    assert launch(packed, [1]).tolist() == [[0.5, 0.75 * 0.25, 0.75]]
    rows[1] = rows[1]._replace(values=(0.0,))
    assert value(rows, 1) == 0.75 * 0.25


def names(function: Any) -> list[str]:
    return list(inspect.signature(getattr(function, "fn", function)).parameters)


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_twins_have_one_name_one_code_and_the_same_arguments(kind: Kind) -> None:
    assert getattr(device_code, kind.name).value == int(kind)
    assert names(getattr(host, kind.name.lower())) == names(getattr(device_code, kind.name.lower()))


def test_the_device_knows_no_other_kinds_and_the_same_rows() -> None:
    codes = {name for name, item in vars(device_code).items() if isinstance(item, tl.constexpr)}
    assert codes == {kind.name for kind in Kind} | {"ROW_WIDTH", "HALF_PI"}
    assert device_code.ROW_WIDTH.value == pack([[Row(0, math.inf, 0, Kind.CONST, 1.0)]]).rows.shape[1]
    assert device_code.HALF_PI.value == 0.5 * math.pi
    assert Row._fields[:-1] == NUMBERS
    assert NUMBERS == ("start", "length", "offset", "kind", "a", "b", "p0", "p1", "p2", "stride", "factor")


COMPILE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fusedlr.kernels.schedules import schedule_value


@triton.jit
def evaluate(rows_ptr, values_ptr, first_ptr, count_ptr, t_ptr, out_ptr, max_rows, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    first = tl.load(first_ptr + lane)
    count = tl.load(count_ptr + lane)
    tl.store(out_ptr + lane, schedule_value(rows_ptr, values_ptr, first, count, tl.load(t_ptr), max_rows))


signature = {
    "rows_ptr": "*fp64", "values_ptr": "*fp64", "first_ptr": "*i64", "count_ptr": "*i64", "t_ptr": "*i64",
    "out_ptr": "*fp64", "max_rows": "i32", "LANES": "constexpr",
}
source = ASTSource(evaluate, signature=signature, constexprs={"LANES": 32})
target = GPUTarget("cuda", int(sys.argv[1]), 32)
kernel = triton.compile(source, target=target, options={"enable_fp_fusion": False, "num_warps": 1})
assert len(kernel.asm["cubin"]) > 0
print(kernel.asm["ttir"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings ptxas on Linux only")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_without_a_gpu_and_stays_in_float64(architecture: int, tmp_path: Any) -> None:
    script = tmp_path / "compile_schedules.py"  # Triton reads the source of a kernel from its file
    script.write_text(COMPILE)
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(script), str(architecture)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # Not one operation of the kernel is in float32: it would cost half of the digits.
    assert "f64" in done.stdout
    assert "f32" not in done.stdout
