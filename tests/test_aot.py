"""The machine code of every kernel, compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_twins import RULES

pytest.importorskip("triton")
from fusedlr.kernels import launch

# The dtypes that are compiled. To a compiler fp16 is what bf16 is, and float64 is there to be right: once is enough.
# Each text is for a process of its own: sm_90, which has most, would otherwise keep one core busy while others wait.
ARCHITECTURES = {
    "sm_90": ("fp32,bf16", "fp16,fp64"), "sm_80": ("fp32,bf16",), "sm_100": ("fp32,bf16",), "gfx942": ("fp32,bf16",)
}  # fmt: skip
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
# Formats: bytes of an element of the state (None: the parameter's), and of what completes the weight.
FORMATS: dict[str, tuple[int | None, int]] = {
    "fp32": (4, 0), "noisy": (None, 0), "fp32_master": (4, 4), "fp32_split16": (4, 2), "bf16_noisy": (2, 0),
    "bf16_split16": (2, 2), "int8": (1, 0), "int8_noisy": (1, 0), "int8_master": (1, 4), "int8_split16": (1, 2),
    "int8_split8": (1, 1),
}  # fmt: skip
COMPACT = ("adamw", "sgd_momentum", "adam_amsgrad", "adadelta", "nadam")  # rules compiled as int8_split8

COMMAND = [sys.executable, "-m", "fusedlr.kernels.aot"]
# For sm_90 every kernel is compiled. A compiler's target changes how wide the accesses are, the registers and the
# mathematical functions, which a product of all storages, rules and clips with all targets shows no better than: every
# rule in its parameters' dtype and beside float32 state, AdamW in the two storages furthest apart, the most slots in 8
# bits, every row in the longest decide, and every decide of one row. So the other targets leave out the rest.
LEFT_OUT = re.compile(
    r"apply-adamw-(fp32-int8|bf16-(noisy|fp32_master|bf16_\w+|int8|int8_(noisy|master|split16)))"
    r"|apply-(sgd_momentum|adadelta|nadam)-bf16-int8_split8"
    r"|decide-(?!adam-)\w+-fp32-(none|tensor|zclip-guard|autoclip-guard)"
)
# The same command without them.
SOME = f"""
import re, sys
from fusedlr.kernels import aot
every = aot.kernels
aot.kernels = lambda target: (k for k in every(target) if not re.fullmatch({LEFT_OUT.pattern!r}, k.name))
sys.exit(aot.main())
"""

Table = dict[str, dict[str, Any]]


class Compiling:
    """The compiler at work on all architectures side by side, in processes where Triton does not interpret.

    It is started once: processes that test side by side (``make test``) share the folder, and wait for whoever began.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[subprocess.Popen[bytes]] = []
        self.printed: dict[str, str] = {}
        try:
            folder.mkdir()
        except FileExistsError:
            return
        environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        for arch, jobs in ARCHITECTURES.items():
            program = COMMAND if arch == "sm_90" else [sys.executable, "-c", SOME]
            for dtypes in jobs:
                job = f"{arch}-{dtypes}"
                command = shlex.join([*program, "--arch", arch, "--dtypes", dtypes, "--out", str(folder / job)])
                script = f"{command} > {job}.out 2> {job}.err; echo $? > {job}.new; mv {job}.new {job}.status"
                self.jobs.append(subprocess.Popen(["sh", "-c", script], env=environment, cwd=folder))

    def table(self, arch: str) -> Table:
        """The report on one architecture, as soon as it is there."""
        table: Table = {}
        self.printed[arch] = ""
        for job in (f"{arch}-{dtypes}" for dtypes in ARCHITECTURES[arch]):
            status, end = self.folder / f"{job}.status", time.monotonic() + 1800
            while not status.exists():
                assert time.monotonic() < end, f"{job} is still being compiled"
                time.sleep(0.2)
            assert status.read_text() == "0\n", (self.folder / f"{job}.err").read_text()
            self.printed[arch] += (self.folder / f"{job}.out").read_text()
            written = json.loads((self.folder / job / "table.json").read_text())
            assert written["arch"] == arch
            table |= {kernel["name"]: kernel for kernel in written["kernels"]}
        return table

    def binaries(self, arch: str) -> dict[str, Path]:
        """The machine code written for one architecture, by the names of the kernels."""
        suffix = ".hsaco" if arch.startswith("gfx") else ".cubin"
        files = [path for dtypes in ARCHITECTURES[arch] for path in (self.folder / f"{arch}-{dtypes}").iterdir()]
        assert {path.suffix for path in files} == {suffix, ".json"}
        return {path.stem: path for path in files if path.suffix == suffix}


@pytest.fixture(scope="module")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiling]:
    own = tmp_path_factory.getbasetemp()
    work = Compiling((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "aot")
    yield work
    for job in work.jobs:
        job.wait()


def dtypes_of(arch: str) -> list[str]:
    return ",".join(ARCHITECTURES[arch]).split(",")


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def table(compiling: Compiling, arch: str) -> Table:
    return compiling.table(arch)


def narrow(table: Table, prefix: str) -> dict[str, dict[str, Any]]:
    """The kernels of float32 and narrower whose names start so."""
    return {name: k for name, k in table.items() if name.startswith(prefix) and "fp64" not in name}


def form_of(name: str) -> str:
    """The storage format in a kernel's name, "" for torch's own."""
    *_, last = name.split("-")
    return last if last in FORMATS else ""


def arrays_of(name: str) -> tuple[list[int], list[int]]:
    """Bytes of an element in each array that an apply kernel loads (parameter, gradient, state), and that it stores.

    The scales of 8-bit state, a float32 a group, are left out.
    """
    _, rule, dtype, *_ = name.split("-")
    held, extra = FORMATS.get(form_of(name), (None, 0))
    state = [held or DTYPES[dtype]] * len(RULES[rule].slots) + [extra] * bool(extra)
    return [DTYPES[dtype]] * 2 + state, [DTYPES[dtype], *state]


def elements_of(name: str) -> int:
    """Elements that a thread treats in a block of apply: launch.BLOCK or launch.HALF_BLOCK over 128 threads."""
    sizes = set(arrays_of(name)[0])
    busy = name.split("-")[1] in launch.WIDE_RULES or form_of(name).startswith(("bf16", "int8"))
    return 4 if len(sizes) > 1 or 8 in sizes or busy else 8


def is_int8(name: str) -> bool:
    return form_of(name).startswith("int8")


def test_every_kernel_compiles(table: Table, compiling: Compiling, arch: str) -> None:
    wanted = {f"apply-{rule}-{dtype}" for rule in RULES for dtype in DTYPES} | {"apply-adamw-fp32-clamp"}
    stateful = [name for name, rule in RULES.items() if rule.slots]
    wanted |= {f"apply-{rule}-{dtype}-fp32" for rule in stateful for dtype in ("bf16", "fp16")}
    wanted |= {f"apply-adamw-bf16-{form}" for form in FORMATS} | {"apply-adamw-fp32-int8", "apply-adamw-fp16-noisy"}
    wanted |= {f"apply-{rule}-bf16-int8_split8" for rule in COMPACT}
    directions = {rule.trust.direction.__name__.removesuffix("_direction") for rule in RULES.values() if rule.trust}
    wanted |= {f"norms-{direction}-{dtype}" for direction in directions for dtype in DTYPES}
    wanted |= {f"ratios-{direction}-{dtype}" for direction in directions for dtype in ("fp32", "fp64")}
    wanted |= {f"norms-lamb-{dtype}-fp32" for dtype in ("bf16", "fp16")}
    wanted |= {"norms-lamb-bf16-int8_split8", "norms-lamb-bf16-fp32_split16", "norms-lamb-fp32-clamp"}
    wanted |= {f"measure-euclid-{dtype}" for dtype in ("fp32", "bf16", "fp16")}
    wanted |= {f"measure-{mode}-{dtype}" for mode in ("largest", "power") for dtype in ("fp32", "fp64")}
    rows = {rule.row.__name__.removesuffix("_row") for rule in RULES.values()}
    wanted |= {f"decide-{row}-fp32-{form}" for row in rows for form in ("none", "global-guard", "tensor")}
    chosen = dtypes_of(arch)
    if arch != "sm_90":
        assert not any(LEFT_OUT.fullmatch(name) for name in table)
        wanted = {name for name in wanted if not LEFT_OUT.fullmatch(name)}
    wanted = {name for name in wanted if next(part for part in name.split("-") if part in DTYPES) in chosen}
    assert wanted <= set(table)
    assert {next(part for part in name.split("-") if part in DTYPES) for name in table} == set(chosen)
    assert set(table) == set(compiling.binaries(arch))
    for name in table:
        assert name in compiling.printed[arch]


def test_apply_moves_16_bytes_at_once(table: Table) -> None:
    """Every array in the main loops, which move what a block needs and nothing else."""
    for name, kernel in table.items():
        if not name.startswith("apply-"):
            continue
        loads, stores = arrays_of(name)
        elements = elements_of(name)
        scales = len(RULES[name.split("-")[1]].slots) if is_int8(name) else 0
        # 4 elements of a 16-bit array beside a float32 one are 8 bytes; a scale is 4, of a whole group.
        narrowest = min(128, 8 * elements * min(loads), 32 if scales else 128)
        assert kernel["loops"], kernel
        for loop in kernel["loops"]:
            assert loop["narrowest"] == narrowest, kernel
            block = elements * sum(loads + stores) + 2 * scales * 4
            assert loop["bytes"] >= block and loop["bytes"] % block == 0, kernel
        assert kernel["bytes_per_element"] == sum(loads + stores) + 2 * scales * 4 / 64
        # Unrolled or not, each array has its accesses: as many more loads as there are more stores.
        wide_loads = sum(elements * size // 16 for size in loads)
        wide_stores = sum(elements * size // 16 for size in stores)
        if not wide_stores:  # 8 bytes an array: so are the pointers of the table
            continue
        assert kernel["loads_128"] >= wide_loads and kernel["loads_128"] % wide_loads == 0, kernel
        assert kernel["stores_128"] >= wide_stores and kernel["stores_128"] % wide_stores == 0, kernel
        assert kernel["loads_128"] // wide_loads == kernel["stores_128"] // wide_stores, kernel


def test_apply_fits_in_64_registers_and_spills_nothing(table: Table) -> None:
    """8-bit state has more pointers and a reduction: 96, with which 5 programs of 4 warps fit a multiprocessor."""
    for name, kernel in narrow(table, "apply-").items():
        assert 0 < kernel["registers"] <= (96 if is_int8(name) else 64), kernel
        assert kernel["local"] == 0, kernel
    for name, kernel in table.items():
        if name.startswith("apply-") and "fp64" in name:  # two registers a number
            assert kernel["registers"] <= 96 and kernel["local"] == 0, kernel


def test_apply_exchanges_nothing_between_threads(table: Table) -> None:
    """No shared memory: all arrays of a block are laid out over the threads alike.

    But the scales of 8-bit state, one for 16 threads or more, which the threads that store them get from the others.
    """
    for name, kernel in table.items():
        if name.startswith("apply-"):
            assert kernel["shared"] <= (1024 if is_int8(name) else 0), kernel


def test_apply_has_no_float64_but_for_float64(table: Table, arch: str) -> None:
    assert all(kernel["fp64"] == 0 for kernel in narrow(table, "apply-").values())
    wide = [k["fp64"] for name, k in table.items() if name.startswith("apply-") and "fp64" in name]
    assert all(wide) and bool(wide) == ("fp64" in dtypes_of(arch))


def test_measure_reads_16_bytes_at_once_and_spills_nothing(table: Table) -> None:
    for name, kernel in table.items():
        if name.startswith("measure-"):
            assert kernel["local"] == 0, kernel
        if name.startswith("measure-euclid-"):
            size = DTYPES[name.split("-")[2]]
            # The plain loop has two blocks on their way. That for extreme magnitudes has one, or is unrolled.
            plain, *scaled = (loop["bytes"] for loop in kernel["loops"])
            assert plain == 16 * size and scaled and all(moved % (8 * size) == 0 for moved in scaled), kernel
            assert all(loop["narrowest"] == 128 for loop in kernel["loops"]), kernel
            assert kernel["registers"] <= 64, kernel


def test_the_norms_of_a_trust_ratio_read_16_bytes_at_once_and_spill_nothing(table: Table, arch: str) -> None:
    """What the direction is made of, in the plain loop and in that for extreme magnitudes; nothing is stored."""
    names = [name for name in table if name.startswith("norms-")]
    assert names
    for name in names:
        kernel, (_, rule, dtype, *form) = table[name], name.split("-")
        trust = RULES[rule].trust
        assert trust is not None
        held, extra = FORMATS.get(form_of(name), (None, 0))
        loads = [DTYPES[dtype]] * 2 + [held or DTYPES[dtype]] * len(trust.slots) + [extra] * bool(extra)
        elements = 4 if len(set(loads)) > 1 or 8 in loads else 8
        scales = len(trust.slots) if is_int8(name) else 0
        assert kernel["bytes_per_element"] == sum(loads) + scales * 4 / 64
        # Where code is placed behind the end, to be returned from, the two stores of sums seem to lie in a loop.
        loops = [loop for loop in kernel["loops"] if loop["bytes"] > loop["stored"]]
        assert len(loops) == 2, kernel
        for loop in loops:
            assert loop["narrowest"] == min(128, 8 * elements * min(loads)), kernel
            assert loop["bytes"] % (elements * sum(loads) + 4 * scales) == 0 and loop["stored"] == 0, kernel
            assert loop["local"] == 0 and (loop["fp64"] == 0 or dtype == "fp64"), kernel
        # With the clamp AMD's compiler takes some more: seven waves fit at once, and not eight.
        most = 96 if dtype == "fp64" else 72 if arch.startswith("gfx") and form == ["clamp"] else 64
        assert kernel["registers"] <= (96 if scales else most) and kernel["local"] == 0, kernel


def test_the_ratios_are_taken_in_float64_and_spill_nothing(table: Table) -> None:
    ratios = [kernel for name, kernel in table.items() if name.startswith("ratios-")]
    assert ratios and all(kernel["fp64"] > 0 and kernel["local"] == 0 for kernel in ratios)


def test_clips_that_follow_the_training_spill_nothing(table: Table, arch: str) -> None:
    """As other clips' kernels; the units' factors cost apply no register more than 64."""
    dtypes = [dtype for dtype in dtypes_of(arch) if dtype != "fp64"]
    applying = {f"units-apply-{rule}-{dtype}" for rule in ("adamw", "sgd_momentum") for dtype in dtypes}
    measuring = {f"units-measure-{dtype}" for dtype in dtypes} | {"units-fold-fp32"}
    rows = ("adam", "sgd", "nadam") if arch == "sm_90" else ("adam",)
    deciding = {f"decide-{row}-fp32-{form}-guard" for row in rows for form in ("zclip", "autoclip")}
    assert applying | measuring | deciding <= set(table)
    for name in applying:
        kernel = table[name]
        assert kernel["registers"] <= 64 and kernel["local"] == kernel["shared"] == kernel["fp64"] == 0, kernel
        loads, stores = arrays_of(name.removeprefix("units-"))
        for loop in kernel["loops"]:
            assert loop["stored"] % (8 * sum(stores)) == 0 and loop["bytes"] >= 8 * sum(loads + stores), kernel
    for name in measuring:
        assert table[name]["local"] == 0 and table[name]["registers"] <= 128, table[name]


def test_a_step_in_one_launch_fits_as_often_as_it_is_launched(table: Table, arch: str) -> None:
    steps = {name: kernel for name, kernel in table.items() if name.startswith("step-")}
    assert len(steps) == (0 if arch.startswith("gfx") else 4)  # it is launched on NVIDIA's GPUs alone
    for name, kernel in steps.items():
        assert kernel["registers"] <= launch.STEP_REGISTERS, kernel
        # A multiprocessor has 65536 registers on every architecture; a warp takes them in units of 256.
        a_warp = -(-32 * kernel["registers"] // 256) * 256
        assert 65536 // (launch.THREADS // 32 * a_warp) >= launch.STEP_BLOCKS, kernel
        # Only the sine of decide goes through local memory, by an indexed array that no register bound changes.
        assert all(loop["narrowest"] == 128 and loop["local"] == loop["fp64"] == 0 for loop in kernel["loops"]), kernel
        # The loops are those of the kernels whose work it does.
        size = DTYPES[name.split("-")[2]]
        loads, stores = (8 * sum(sizes) for sizes in arrays_of(name))
        measuring = [loop["bytes"] for loop in kernel["loops"] if not loop["stored"]]
        applying = [(loop["bytes"], loop["stored"]) for loop in kernel["loops"] if loop["stored"]]
        assert measuring and measuring[0] == 16 * size, kernel
        assert all(moved % (8 * size) == 0 for moved in measuring), kernel
        assert applying and all(moved % (loads + stores) == 0 for moved, _ in applying), kernel
        assert all(stored * (loads + stores) == moved * stores for moved, stored in applying), kernel


def test_memory_limits_the_loops_and_not_instructions(table: Table, arch: str) -> None:
    """An H200 issues 4 * 132 instructions of a warp in each of 1.75e9 cycles a second while it moves 4.8e12 bytes.

    That is 6 instructions a thread for each byte; an H100, with 3.35e12 bytes, has 9. A fifth is left for waiting, but
    not where LAMB's norms have a root and a division for 8 bytes of 16-bit numbers; an eighth of their instructions are
    for the root of a denormal number, and hardly ever run; nor where three arrays of 16 bits take random bits, or one
    of float16, whose subnormal numbers have a spacing of their own. 8-bit state moves so little that instructions limit
    it on an H200: but those of an element stay below the 144 that 24 bytes, the same step with float32 state, take
    there.
    """
    for name, kernel in table.items() if arch == "sm_90" else ():
        if kernel["loops"] and "fp64" not in name:
            least = min(kernel["loops"], key=lambda loop: loop["instructions"] / loop["bytes"])
            if is_int8(name):
                elements = least["bytes"] / kernel["bytes_per_element"]
                assert least["instructions"] / elements < 144 and least["instructions"] / least["bytes"] < 9, kernel
            else:
                busy = form_of(name) == "bf16_noisy" or name in (
                    "norms-lamb-bf16",
                    "norms-lamb-fp16",
                    "apply-adamw-fp16-noisy",
                )
                most = 6 if busy else 5
                assert least["instructions"] / least["bytes"] < most, kernel


def test_decide_computes_in_float64(table: Table) -> None:
    assert all(kernel["fp64"] > 100 for name, kernel in table.items() if name.startswith("decide-"))


def test_bytes_of_an_element_are_those_of_the_design(table: Table) -> None:
    """Parameter read and written, gradient read, state read and written: 28 for float32 Adam, 4 more where measured."""
    assert table["apply-adam-fp32"]["bytes_per_element"] == 28
    assert table["measure-euclid-fp32"]["bytes_per_element"] == 4
    assert table["apply-sgd-bf16"]["bytes_per_element"] == 6


def test_a_profiler_sees_what_runs(table: Table, compiling: Compiling, arch: str) -> None:

    def binary(name: str) -> bytes:
        return compiling.binaries(arch)[name].read_bytes()

    for kernel, rule, dtype in (("apply", "adamw", "fp32"), ("apply", "sgd_momentum", "bf16")):
        code = binary(f"{kernel}-{rule}-{dtype}")
        assert f"fused_{kernel}_{rule}_{dtype}".encode() in code
    assert b"fused_measure_fp32" in binary("measure-euclid-fp32")
    assert b"fused_decide_adam_row" in binary("decide-adam-fp32-global-guard")


def test_interpreted_kernels_cannot_be_compiled(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fusedlr.kernels.aot", "--only", "apply-sgd-fp32", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "unset it and start Python anew" in done.stderr


def test_an_unknown_architecture_is_an_error(tmp_path: Path) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "fusedlr.kernels.aot", "--arch", "h100", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "expected an architecture such as sm_90 or gfx942, but got 'h100'" in done.stderr
