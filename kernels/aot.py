"""Compile every kernel for a GPU that is not there, and report on the machine code.

    python -m fusedlr.kernels.aot --arch sm_90 --out DIR

writes one cubin a kernel, named kernel-rule-dtype, and ``table.json``, and prints the same table: registers, shared
memory, local memory accesses (LDL, STL), 128-bit accesses to global memory, and fp64 instructions. It needs no GPU:
Triton compiles for a named target, and its own cuobjdump and nvdisasm show the result.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import launch, rules
from .apply import apply
from .decide import decide
from .measure import EUCLID, LARGEST, POWER, measure

__all__ = ["Kernel", "Report", "compile_kernel", "kernels"]

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", FP64: "fp64", BF16: "bf16", FP16: "fp16"}
_MODES = {int(EUCLID.value): "euclid", int(LARGEST.value): "largest", int(POWER.value): "power"}


class Kernel(NamedTuple):
    """A kernel with its compile-time arguments, ready to be compiled."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    fp_fusion: bool
    bytes_per_element: float


class Report(NamedTuple):
    """What the machine code of a kernel holds."""

    name: str
    registers: int
    shared: int
    local: int
    loads_128: int
    loads_narrower: int
    stores_128: int
    stores_narrower: int
    fp64: int
    bytes_per_element: float


def _signature(function: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    return {name: "constexpr" if name in constants else types[name] for name in function.arg_names}


def _measure(dtype: torch.dtype, mode: int) -> Kernel:
    constants = launch.measure_constants(dtype, mode, 5)
    types = {
        "segments_ptr": "*i64",
        "chunks_ptr": "*i32",
        "partials_ptr": "*fp64",
        "scale_offset": "i32",
        "first_partial": "i32",
        "chunk_size": "i32",
        "norm_type": "fp32",
    }
    name = f"measure-{_MODES[mode]}-{_SHORT[dtype]}"
    signature = _signature(measure, types, constants)
    return Kernel(name, measure, signature, constants, launch.NUM_WARPS, True, dtype.itemsize)


def _decide(rule: str, dtype: torch.dtype, scope: str | None, factor: str, guard: bool) -> Kernel:
    hyper, row = rules.RULES[rule]
    constants = launch.decide_constants(
        row,
        factor,
        scope,
        launch.mode_for(2.0, [dtype]),
        guard=guard,
        count=guard,
        last=True,
        n_row_scalars=len(getattr(rules, row).arg_names) - 1 - rules.CARRIED.get(row, 0),  # all but step
        n_fields=len(getattr(rules, hyper)._fields),
        dtype=dtype,
    )
    wide = "*fp64" if dtype == FP64 else "*fp32"
    pointers = {"partials": "*fp64", "tensors": "*i64", "scalars": "*fp64", "addresses": "*i64", "values": "*fp64"}
    pointers |= {"tracks": "*i64", "program": "*fp64", "table": "*fp64", "clock": "*i64", "rows": wide, "norm": "*fp32"}
    types = {f"{name}_ptr": kind for name, kind in {**pointers, "skip": "*i32"}.items()}
    types |= {name: "i32" for name in decide.arg_names if name not in types} | {"norm_type": "fp32"}
    name = f"decide-{rule}-{_SHORT[dtype]}-{scope or 'none'}{'-guard' if guard else ''}"
    return Kernel(name, decide, _signature(decide, types, constants), constants, launch.DECIDE_WARPS, False, 0.0)


def _apply(rule: str, dtype: torch.dtype, clamp: bool = False) -> Kernel:
    hyper, _ = rules.RULES[rule]
    slots = len(getattr(rules, rule).arg_names) - 3  # all but p, g and h
    constants = launch.apply_constants(
        rule, hyper, clamp=clamp, dtype=dtype, grad_dtype=dtype, state_dtypes=(dtype,) * slots
    )
    types = {
        "segments_ptr": "*i64",
        "chunks_ptr": "*i32",
        "rows_ptr": "*fp64" if dtype == FP64 else "*fp32",
        "skip_ptr": "*i32",
        "n_chunks": "i32",
        "chunk_size": "i32",
    }
    name = f"apply-{rule}-{_SHORT[dtype]}{'-clamp' if clamp else ''}"
    moved = dtype.itemsize * (3 + 2 * slots)
    return Kernel(name, apply, _signature(apply, types, constants), constants, launch.NUM_WARPS, True, moved)


def kernels() -> Iterator[Kernel]:
    """Every kernel that a step can launch, for the dtypes that are stepped."""
    for dtype in (FP32, BF16, FP16):
        yield _measure(dtype, int(EUCLID.value))
    for dtype in (FP32, FP64):
        yield _measure(dtype, int(LARGEST.value))
        yield _measure(dtype, int(POWER.value))
    for rule in ("sgd", "adam"):
        yield _decide(rule, FP32, None, "no_factor", guard=False)
        yield _decide(rule, FP32, "global", "clip_factor", guard=True)
        yield _decide(rule, FP32, "tensor", "normalize_factor", guard=False)
    for rule in ("rmsprop", "adagrad", "adadelta", "adamax", "nadam", "radam", "lion"):
        yield _decide(rule, FP32, "global", "clip_factor", guard=True)
    yield _decide("adam", FP64, "global", "clip_factor", guard=False)
    for rule in rules.RULES:
        for dtype in (FP32, BF16, FP16, FP64):
            yield _apply(rule, dtype)
    yield _apply("adamw", FP32, clamp=True)


@functools.cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_kernel(kernel: Kernel, arch: str, out: Path) -> Report:
    """Compile one kernel for "sm_90" or the like into ``out`` and read its machine code."""
    if launch.INTERPRETED:
        raise RuntimeError(
            "kernels that were defined under TRITON_INTERPRET=1 cannot be compiled; unset it and start Python anew"
        )
    source = ASTSource(fn=kernel.function, signature=kernel.signature, constexprs=kernel.constants)
    options = {"num_warps": kernel.num_warps, "enable_fp_fusion": kernel.fp_fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32), options=options)
    path = out / f"{kernel.name}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    usage = _run(_tool("cuobjdump"), "-res-usage", str(path))
    code = _run(_tool("cuobjdump"), "-sass", str(path))
    return _report(kernel, usage, code)


def _report(kernel: Kernel, usage: str, code: str) -> Report:
    def used(what: str) -> int:
        return max((int(n) for n in re.findall(rf"\b{what}:(\d+)", usage)), default=0)

    operations = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", code, flags=re.MULTILINE)
    loads = [op for op in operations if op.startswith("LDG")]
    stores = [op for op in operations if op.startswith("STG")]
    return Report(
        name=kernel.name,
        registers=used("REG"),
        shared=used("SHARED"),
        local=sum(op.startswith(("LDL", "STL")) for op in operations),
        loads_128=sum(".128" in op for op in loads),
        loads_narrower=sum(".128" not in op for op in loads),
        stores_128=sum(".128" in op for op in stores),
        stores_narrower=sum(".128" not in op for op in stores),
        fp64=sum(bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b", op)) or ".F64" in op for op in operations),
        bytes_per_element=kernel.bytes_per_element,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fusedlr.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90", help="target, such as sm_80, sm_90, sm_100 (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the cubins and table.json (default: a temporary one)")
    parser.add_argument("--only", default="", help="compile the kernels whose names contain this")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        reports = [compile_kernel(k, options.arch, out) for k in kernels() if options.only in k.name]
        table = {"arch": options.arch, "triton": triton.__version__, "kernels": [r._asdict() for r in reports]}
        (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"{'kernel':36}" + "".join(f"{field:>16}" for field in Report._fields[1:]))
    for report in reports:
        print(f"{report.name:36}" + "".join(f"{value:>16}" for value in report[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
