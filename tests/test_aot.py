"""The machine code of every kernel, compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_twins import RULES

pytest.importorskip("triton")

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
# A thread treats 8 elements a block (launch.BLOCK over 128 threads): this many accesses of 16 bytes an array.
ACCESSES = {name: max(1, 8 * size // 16) for name, size in DTYPES.items()}

Table = dict[str, dict[str, Any]]


class Compiling:
    """The compiler at work on all architectures side by side, in processes where Triton does not interpret."""

    def __init__(self, folder: Path) -> None:
        environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        self.folder = folder
        self.jobs = {
            arch: subprocess.Popen(
                [sys.executable, "-m", "fusedlr.kernels.aot", "--arch", arch, "--out", str(folder / arch)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for arch in ARCHITECTURES
        }
        self.printed: dict[str, str] = {}

    def table(self, arch: str) -> Table:
        """The report on one architecture, as soon as it is there."""
        if arch not in self.printed:
            job = self.jobs[arch]
            out, err = job.communicate(timeout=500)
            assert job.returncode == 0, err
            self.printed[arch] = out
        written = json.loads((self.folder / arch / "table.json").read_text())
        assert written["arch"] == arch
        return {kernel["name"]: kernel for kernel in written["kernels"]}


@pytest.fixture(scope="module")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiling]:
    work = Compiling(tmp_path_factory.mktemp("aot"))
    yield work
    for job in work.jobs.values():
        if job.poll() is None:
            job.kill()
        job.communicate()


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def table(compiling: Compiling, arch: str) -> Table:
    return compiling.table(arch)


def narrow(table: Table, prefix: str) -> dict[str, dict[str, Any]]:
    """The kernels of float32 and narrower whose names start so."""
    return {name: k for name, k in table.items() if name.startswith(prefix) and "fp64" not in name}


def dtype_of(name: str) -> str:
    return next(dtype for dtype in DTYPES if dtype in name.split("-"))


def test_every_kernel_compiles(table: Table, compiling: Compiling, arch: str) -> None:
    wanted = {f"apply-{rule}-{dtype}" for rule in RULES for dtype in DTYPES} | {"apply-adamw-fp32-clamp"}
    wanted |= {f"measure-euclid-{dtype}" for dtype in ("fp32", "bf16", "fp16")}
    wanted |= {f"measure-{mode}-{dtype}" for mode in ("largest", "power") for dtype in ("fp32", "fp64")}
    assert wanted <= set(table)
    rows = {rule.row.__name__.removesuffix("_row") for rule in RULES.values()}
    assert rows <= {name.split("-")[1] for name in table if name.startswith("decide-")}
    assert {f"{name}.cubin" for name in table} == {path.name for path in (compiling.folder / arch).glob("*.cubin")}
    for name in table:
        assert name in compiling.printed[arch]


def test_apply_moves_16_bytes_at_once(table: Table) -> None:
    """Every array of the main loop, not just some: the counts are whole multiples of a block's."""
    for name, kernel in table.items():
        if not name.startswith("apply-"):
            continue
        slots = len(RULES[name.split("-")[1]].slots)
        loads, stores = (2 + slots) * ACCESSES[dtype_of(name)], (1 + slots) * ACCESSES[dtype_of(name)]
        assert kernel["loads_128"] >= loads and kernel["loads_128"] % loads == 0, kernel
        assert kernel["stores_128"] >= stores and kernel["stores_128"] % stores == 0, kernel
        assert kernel["loads_128"] // loads == kernel["stores_128"] // stores, kernel


# Five arrays, or two roots, are alive at once: a multiprocessor holds seven such blocks instead of eight. Held to 64
# registers, the compiler spills 2 to 14 of them.
WIDEST = ("rmsprop_centered_momentum", "adadelta")


def test_apply_fits_in_64_registers_and_spills_nothing(table: Table) -> None:
    for name, kernel in narrow(table, "apply-").items():
        assert 0 < kernel["registers"] <= (72 if name.split("-")[1] in WIDEST else 64), kernel
        assert kernel["local"] == 0, kernel
    for name, kernel in table.items():
        if name.startswith("apply-") and "fp64" in name:  # two registers a number
            limit = 144 if name.split("-")[1] in WIDEST else 128
            assert kernel["registers"] <= limit and kernel["local"] == 0, kernel


def test_apply_has_no_float64_but_for_float64(table: Table) -> None:
    assert all(kernel["fp64"] == 0 for kernel in narrow(table, "apply-").values())
    assert all(k["fp64"] > 0 for name, k in table.items() if name.startswith("apply-") and "fp64" in name)


def test_measure_reads_16_bytes_at_once_and_spills_nothing(table: Table) -> None:
    for name, kernel in table.items():
        if name.startswith("measure-"):
            assert kernel["local"] == 0, kernel
        if name.startswith("measure-euclid-"):
            assert kernel["loads_128"] % ACCESSES[dtype_of(name)] == 0 and kernel["loads_128"] > 0, kernel
            assert kernel["registers"] <= 64, kernel


def test_decide_computes_in_float64(table: Table) -> None:
    assert all(kernel["fp64"] > 100 for name, kernel in table.items() if name.startswith("decide-"))


def test_bytes_of_an_element_are_those_of_the_design(table: Table) -> None:
    """Parameter read and written, gradient read, state read and written: 28 for float32 Adam, 4 more where measured."""
    assert table["apply-adam-fp32"]["bytes_per_element"] == 28
    assert table["measure-euclid-fp32"]["bytes_per_element"] == 4
    assert table["apply-sgd-bf16"]["bytes_per_element"] == 6


def test_a_profiler_sees_what_runs(table: Table, compiling: Compiling, arch: str) -> None:
    for kernel, rule, dtype in (("apply", "adamw", "fp32"), ("apply", "sgd_momentum", "bf16")):
        code = (compiling.folder / arch / f"{kernel}-{rule}-{dtype}.cubin").read_bytes()
        assert f"fused_{kernel}_{rule}_{dtype}".encode() in code
    assert b"fused_measure_fp32" in (compiling.folder / arch / "measure-euclid-fp32.cubin").read_bytes()
    assert b"fused_decide_adam_row" in (compiling.folder / arch / "decide-adam-fp32-global-guard.cubin").read_bytes()


def test_interpreted_kernels_cannot_be_compiled(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fusedlr.kernels.aot", "--only", "apply-sgd-fp32", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "unset it and start Python anew" in done.stderr
