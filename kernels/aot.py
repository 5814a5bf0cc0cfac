"""Compile every kernel for a GPU that is not there, and report on the machine code.

    python -m fusedlr.kernels.aot --arch sm_90 --out DIR

writes one cubin a kernel (for an AMD target such as gfx942 one .hsaco), named kernel-rule-dtype[-format], and
``table.json``, and prints the same table. It needs no GPU: Triton compiles for a named target, and the tools inside its
package show the result (``aot_code``). ``apply-adamw-bf16`` has bfloat16 parameters with bfloat16 state,
``apply-adamw-bf16-fp32`` bfloat16 parameters with float32 state, ``...-int8_split8`` 8-bit state and 8 of the weights'
missing bits. The columns:

    registers           of a thread (on AMD its vector registers)
    shared              bytes of shared memory of a program: reductions need some, apply none
    local               accesses to local memory, LDL and STL (on AMD to scratch, and its bytes a thread)
    loads_128           loads from global memory of 16 bytes or more; loads_64 of 8; loads_32 of 4 or fewer
    stores_128 ...      likewise for stores
    fp64                instructions of float64 arithmetic
    bytes_per_element   what the pass has to move for one element (0 for decide, which treats tensors)
    loops               the main loops, each as bits of its narrowest access to global memory, bytes a thread moves in
                        one iteration, and instructions of one iteration; in ``table.json`` also its bytes stored, and
                        local and fp64 as above

A main loop is an innermost loop with 16-byte accesses. The compiler may unroll it, and what remains is a main loop as
well: each one moves whole multiples of a block, and has no narrower access (but one of 8 bytes to a 16-bit array beside
those of 16 to a float32 one). Its instructions include what is for rare cases only, such as the root of a denormal
number. The accesses outside the main loops are the tables', the tails' and those of tensors at odd addresses.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import launch, launch_trust, launch_units, rules
from .aot_code import Code, read_amdgcn, read_cubins
from .aot_formats import COMPILED, FORMATS
from .apply import apply
from .decide import decide
from .measure import EUCLID, LARGEST, POWER, measure
from .step import step
from .trust import trust_norms, trust_ratios
from .units import unit_fold, unit_measure

__all__ = ["FORMATS", "Kernel", "Loop", "Report", "compile_all", "compile_kernel", "kernel_name", "kernels"]

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", FP64: "fp64", BF16: "bf16", FP16: "fp16"}
_MODES = {int(EUCLID.value): "euclid", int(LARGEST.value): "largest", int(POWER.value): "power"}


class Kernel(NamedTuple):
    """A kernel with its compile-time arguments, ready to be compiled."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    threads: int
    fp_fusion: bool
    bytes_per_element: float
    most_registers: int | None = None  # a bound that the compiler is given; on NVIDIA only


class Loop(NamedTuple):
    """A main loop: bits of its narrowest access, and what a thread moves and does in one iteration."""

    narrowest: int
    bytes: int
    instructions: int
    stored: int  # of the bytes
    local: int
    fp64: int


class Report(NamedTuple):
    """What the machine code of a kernel holds."""

    name: str
    registers: int
    shared: int
    local: int
    loads_128: int
    loads_64: int
    loads_32: int
    stores_128: int
    stores_64: int
    stores_32: int
    fp64: int
    bytes_per_element: float
    loops: list[Loop]


def kernel_name(kernel: str, rule: str, dtype: torch.dtype, form: str = "param") -> str:
    """kernel-rule-dtype[-format]; the format "param", torch's own storage, goes unsaid."""
    return "-".join([kernel, rule, _SHORT[dtype], *([form] if form != "param" else [])])


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
    name = kernel_name("measure", _MODES[mode], dtype)
    signature = _signature(measure, types, constants)
    return Kernel(name, measure, signature, constants, launch.THREADS, True, dtype.itemsize)


def _unit_measure(dtype: torch.dtype) -> Kernel:
    types = {"segments_ptr": "*i64", "units_ptr": "*i64", "pieces_ptr": "*i32", "norms_ptr": "*fp64"}
    constants = launch_units.unit_measure_constants(dtype, dtype, 5)
    signature = _signature(unit_measure, types | {"weights_offset": "i32"}, constants)
    return Kernel(kernel_name("units", "measure", dtype), unit_measure, signature, constants, launch.THREADS, True, 0.0)


def _unit_fold(dtype: torch.dtype) -> Kernel:
    pointers = {"units": "*i64", "blocks": "*i32", "norms": "*fp64", "record": "*fp64", "partials": "*fp64"}
    types = {f"{name}_ptr": kind for name, kind in pointers.items()}
    types |= {"factors_ptr": "*fp64" if dtype == FP64 else "*fp32"}
    types |= dict.fromkeys(("weights_offset", "first_partial", "scale_offset"), "i32")
    constants = launch_units.unit_fold_constants(dtype)
    signature = _signature(unit_fold, types, constants)
    return Kernel(kernel_name("units", "fold", dtype), unit_fold, signature, constants, launch.THREADS, True, 0.0)


def _decide(
    rule: str, dtype: torch.dtype, scope: str | None, factor: str, guard: bool, threshold: str | None = None
) -> Kernel:
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
        threshold_name=threshold,
    )
    wide = "*fp64" if dtype == FP64 else "*fp32"
    pointers = {"partials": "*fp64", "tensors": "*i64", "scalars": "*fp64", "addresses": "*i64", "values": "*fp64"}
    pointers |= {"tracks": "*i64", "program": "*fp64", "table": "*fp64", "clock": "*i64", "rows": wide, "norm": "*fp32"}
    types = {f"{name}_ptr": kind for name, kind in {**pointers, "skip": "*i32"}.items()}
    if threshold is None:
        constants = constants | {"record_ptr": None}
    else:
        types["record_ptr"] = "*fp64"
    types |= {name: "i32" for name in decide.arg_names if name not in types} | {"norm_type": "fp32"}
    form = threshold.removesuffix("_threshold") if threshold else scope or "none"
    name = kernel_name("decide", row.removesuffix("_row"), dtype, f"{form}{'-guard' if guard else ''}")
    return Kernel(name, decide, _signature(decide, types, constants), constants, launch.DECIDE_THREADS, False, 0.0)


def _slots(rule: str) -> int:
    return len(getattr(rules, rule).arg_names) - 3  # all but p, g and h


def _apply(rule: str, dtype: torch.dtype, state: str = "param", clamp: bool = False, units: bool = False) -> Kernel:
    hyper, _ = rules.RULES[rule]
    form, slots = FORMATS[state], _slots(rule)
    held = form.held or dtype
    constants = launch.apply_constants(
        rule,
        hyper,
        clamp=clamp,
        dtype=dtype,
        grad_dtype=dtype,
        state_dtypes=(held,) * slots,
        storage=form.storage(slots),
        units=units,
    )
    types = {
        "segments_ptr": "*i64",
        "chunks_ptr": "*i32",
        "rows_ptr": "*fp64" if dtype == FP64 else "*fp32",
        "skip_ptr": "*i32",
        "n_chunks": "i32",
        "chunk_size": "i32",
    }
    if units:
        types |= {"units_ptr": "*i64", "factors_ptr": "*fp64" if dtype == FP64 else "*fp32"}
    else:
        constants = constants | {"units_ptr": None, "factors_ptr": None}
    name = kernel_name("units-apply" if units else "apply", rule, dtype, "clamp" if clamp else state)
    moved = 3 * dtype.itemsize + 2 * slots * form.bytes_of_slot(dtype) + 2 * form.extra
    return Kernel(name, apply, _signature(apply, types, constants), constants, launch.THREADS, True, moved)


def _trust(rule: str, dtype: torch.dtype, state: str = "param", clamp: bool = False) -> Iterator[Kernel]:
    """The two launches of a rule's trust ratio."""
    hyper, _ = rules.RULES[rule]
    form, slots = FORMATS[state], _slots(rule)
    held = form.held or dtype
    norms, ratios = launch_trust.trust_constants(
        rule,
        hyper,
        clamp=clamp,
        dtype=dtype,
        grad_dtype=dtype,
        state_dtypes=(held,) * slots,
        storage=form.storage(slots),
    )
    types = dict.fromkeys((*trust_norms.arg_names, *trust_ratios.arg_names), "i32")
    types |= {"segments_ptr": "*i64", "chunks_ptr": "*i32", "tensors_ptr": "*i64", "sums_ptr": "*fp64"}
    types |= {"rows_ptr": "*fp64" if dtype == FP64 else "*fp32", "skip_ptr": "*i32"}
    moved = 2 * dtype.itemsize + norms["SLOTS"] * form.bytes_of_slot(dtype) + form.extra
    name = kernel_name("norms", rule, dtype, "clamp" if clamp else state)
    signature = _signature(trust_norms, types, norms)
    yield Kernel(name, trust_norms, signature, norms, launch.THREADS, True, moved)
    if state == "param" and not clamp and dtype.itemsize >= 4:  # those of narrower dtypes are float32's
        name, signature = kernel_name("ratios", rule, dtype), _signature(trust_ratios, types, ratios)
        yield Kernel(name, trust_ratios, signature, ratios, launch.THREADS, False, 0.0)


def _step(rule: str, dtype: torch.dtype) -> Kernel:
    parts = _measure(dtype, int(EUCLID.value)), _decide(rule, dtype, "global", "clip_factor", True), _apply(rule, dtype)
    pointers = {"record_ptr", "units_ptr", "factors_ptr"}  # of clips that step leaves to the other kernels
    constants = launch.step_constants(*({n: c for n, c in p.constants.items() if n not in pointers} for p in parts))
    types = {"barrier_ptr": "*i64"} | {n: t for part in parts for n, t in part.signature.items() if t != "constexpr"}
    moved = sum(part.bytes_per_element for part in parts)
    name = kernel_name("step", rule, dtype)
    signature = _signature(step, types, constants)
    return Kernel(name, step, signature, constants, launch.THREADS, True, moved, launch.STEP_REGISTERS)


def kernels(target: GPUTarget) -> Iterator[Kernel]:
    """Every kernel that a step can launch on a target, for the dtypes that are stepped."""
    for dtype in (FP32, BF16, FP16):
        yield _measure(dtype, int(EUCLID.value))
    for dtype in (FP32, FP64):
        yield _measure(dtype, int(LARGEST.value))
        yield _measure(dtype, int(POWER.value))
    rows = {row: rule for rule, (_, row) in reversed(rules.RULES.items())}
    for rule in reversed(rows.values()):
        yield _decide(rule, FP32, None, "no_factor", guard=False)
        yield _decide(rule, FP32, "global", "clip_factor", guard=True)
        yield _decide(rule, FP32, "tensor", "normalize_factor", guard=False)
    yield _decide("adam", FP64, "global", "clip_factor", guard=False)
    for rule in rules.RULES:
        for dtype in (FP32, BF16, FP16, FP64):
            for name, form in FORMATS.items():
                # A rule without state has the formats of its weights alone.
                differs = form.state == "plain" and form.held is None
                asked = name in COMPILED.get(rule, ("param", "fp32"))
                if dtype in form.dtypes and asked and (_slots(rule) or differs):
                    yield _apply(rule, dtype, name)
    yield _apply("adamw", FP32, clamp=True)
    for rule in ("lamb", "lars"):  # lars_momentum's are those of lars
        for dtype in (FP32, BF16, FP16, FP64):
            yield from _trust(rule, dtype)
    for dtype in (BF16, FP16):
        yield from _trust("lamb", dtype, "fp32")
    for state in ("fp32_split16", "int8_split8"):
        yield from _trust("lamb", BF16, state)
    yield from _trust("lamb", FP32, clamp=True)
    for dtype in (FP32, BF16, FP16, FP64):
        yield _unit_measure(dtype)
        for rule in ("adamw", "sgd_momentum"):
            yield _apply(rule, dtype, units=True)
    for dtype in (FP32, FP64):
        yield _unit_fold(dtype)
    for rule in ("adamw", "sgd_momentum", "nadam"):
        for threshold in ("zclip_threshold", "autoclip_threshold"):
            yield _decide(rule, FP32, "global", "clip_factor", guard=True, threshold=threshold)
    for rule in ("adamw", "sgd_momentum") if target.backend == "cuda" else ():
        for dtype in (FP32, BF16):
            yield _step(rule, dtype)


def _dtype_of(name: str) -> list[str]:
    """The dtype of the parameters in a kernel's name, which those of its format may follow."""
    return [part for part in name.split("-") if part in _SHORT.values()][:1]


def target_of(arch: str) -> GPUTarget:
    """The target of "sm_90", "gfx942" and the like."""
    if re.fullmatch(r"sm_\d+", arch):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    if re.fullmatch(r"gfx9\w+", arch):
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"expected an architecture such as sm_90 or gfx942, but got {arch!r}")


def compile_kernel(kernel: Kernel, target: GPUTarget, out: Path) -> Any:
    """Compile one kernel into ``out``, as ``kernel.name`` with the suffix of its machine code; what Triton returns."""
    if launch.INTERPRETED:
        raise RuntimeError(
            "kernels that were defined under TRITON_INTERPRET=1 cannot be compiled; unset it and start Python anew"
        )
    source = ASTSource(fn=kernel.function, signature=kernel.signature, constexprs=kernel.constants)
    options = {"num_warps": kernel.threads // target.warp_size, "enable_fp_fusion": kernel.fp_fusion}
    if kernel.most_registers is not None:
        options["maxnreg"] = kernel.most_registers
    compiled = triton.compile(source, target=target, options=options)
    binary = "cubin" if target.backend == "cuda" else "hsaco"
    (out / f"{kernel.name}.{binary}").write_bytes(compiled.asm[binary])
    return compiled


def compile_all(chosen: Sequence[Kernel], arch: str, out: Path) -> list[Report]:
    """Compile kernels for "sm_90" or the like into ``out``, and read their machine code."""
    target = target_of(arch)
    compiled = [compile_kernel(kernel, target, out) for kernel in chosen]
    if target.backend == "cuda":
        codes = read_cubins([out / f"{kernel.name}.cubin" for kernel in chosen], arch)
    else:
        codes = [read_amdgcn(kernel.asm["amdgcn"]) for kernel in compiled]
    return [_report(kernel, code) for kernel, code in zip(chosen, codes, strict=True)]


def _widest(kernel: Kernel) -> int:
    """Bits of the widest access of a main loop: a tail treats single elements."""
    constants = kernel.constants
    bits = max(constants[name].primitive_bitwidth for name in ("P", "G", "S") if name in constants)
    return int(min(128, constants["BLOCK"] // kernel.threads * bits))


def _report(kernel: Kernel, code: Code) -> Report:
    def count(stores: bool, least: int, most: int) -> int:
        return sum(is_store == stores and least <= bits <= most for _, is_store, bits in code.accesses)

    loops = []
    for first, last in sorted(code.loops):
        inside = range(first, last + 1)
        within = [bits for place, _, bits in code.accesses if place in inside]
        stored = [bits for place, stores, bits in code.accesses if place in inside and stores]
        innermost = not any(first <= a and b <= last and (a, b) != (first, last) for a, b in code.loops)
        if innermost and kernel.bytes_per_element and max(within, default=0) >= _widest(kernel):
            local, fp64 = (sum(place in inside for place in places) for places in (code.local, code.fp64))
            loops.append(Loop(min(within), sum(within) // 8, len(inside), sum(stored) // 8, local, fp64))
    return Report(
        name=kernel.name,
        registers=code.registers,
        shared=code.shared,
        local=len(code.local) + code.scratch,
        loads_128=count(False, 128, 256),
        loads_64=count(False, 64, 127),
        loads_32=count(False, 0, 63),
        stores_128=count(True, 128, 256),
        stores_64=count(True, 64, 127),
        stores_32=count(True, 0, 63),
        fp64=len(code.fp64),
        bytes_per_element=kernel.bytes_per_element,
        loops=loops,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fusedlr.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", default="sm_90", help="target, such as sm_80, sm_90, sm_100 or gfx942 (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder for the results (default: a temporary one)")
    parser.add_argument("--only", default="", help="compile the kernels whose names contain this")
    every = ",".join(_SHORT.values())
    parser.add_argument("--dtypes", default=every, help="compile for parameters of these dtypes (default: %(default)s)")
    options = parser.parse_args(arguments)
    wanted = set(options.dtypes.split(","))
    if not wanted <= set(_SHORT.values()):
        parser.error(f"--dtypes must be some of {every}, but got {options.dtypes!r}")
    try:
        target = target_of(options.arch)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        chosen = [k for k in kernels(target) if options.only in k.name and wanted.intersection(_dtype_of(k.name))]
        if not chosen:
            parser.error(f"no kernel for {options.dtypes} has a name that contains {options.only!r}")
        reports = compile_all(chosen, options.arch, out)
        rows = [r._asdict() | {"loops": [loop._asdict() for loop in r.loops]} for r in reports]
        table = {"arch": options.arch, "triton": triton.__version__, "kernels": rows}
        (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"{'kernel':36}" + "".join(f"{field:>11}" for field in Report._fields[1:-2]) + f"{'bytes':>7}  loops")
    for report in reports:
        loops = " ".join(f"{loop.narrowest}b/{loop.bytes}B/{loop.instructions}i" for loop in report.loops)
        numbers = "".join(f"{value:>11}" for value in report[1:-2])
        print(f"{report.name:36}{numbers}{report.bytes_per_element:>7.4g}  {loops}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
