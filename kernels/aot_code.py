"""What the machine code of kernels holds, read with the tools that are inside the triton package.

NVIDIA's is disassembled by nvdisasm, and cuobjdump says how many registers it needs; AMD's comes as assembly.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import triton

__all__ = ["Code", "read_amdgcn", "read_cubins"]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = 16  # bytes, on every GPU since sm_70


class Code(NamedTuple):
    """The machine code of a kernel, as far as a report needs it.

    ``accesses`` to global memory are (place, whether it stores, bits), ``loops`` (first place, last place), ``local``
    and ``fp64`` places; a place is the number of an instruction. ``scratch`` is bytes of local memory a thread, where
    the compiler says how many.
    """

    registers: int
    shared: int
    scratch: int
    local: list[int]
    fp64: list[int]
    accesses: list[tuple[int, bool, int]]
    loops: list[tuple[int, int]]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], check=True, capture_output=True, text=True).stdout


def _largest(pattern: str, text: str) -> int:
    return max((int(number) for number in re.findall(pattern, text)), default=0)


def read_cubins(paths: Sequence[Path], arch: str) -> list[Code]:
    """The machine code of kernels for "sm_90" or the like, one a file.

    nvdisasm takes half a second to start and no time to run: it is given the instructions of all kernels at once.
    """
    if not paths:
        return []
    codes = [_instructions(path.read_bytes()) for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / "joined.bin"
        joined.write_bytes(b"".join(codes))
        text = _run("nvdisasm", "--binary", arch.replace("sm_", "SM"), str(joined))
    found = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[\dT]+\s+)?([A-Z][A-Z0-9_.]*)(.*)", text, flags=re.MULTILINE)
    ends = list(accumulate(len(code) // _INSTRUCTION for code in codes))
    if len(found) != ends[-1]:
        raise RuntimeError(f"expected {ends[-1]} instructions from nvdisasm, but got {len(found)}")
    usages = [_run("cuobjdump", "-res-usage", str(path)) for path in paths]
    return [_read_sass(found[a:b], a, usage) for (a, b), usage in zip(pairwise([0, *ends]), usages, strict=True)]


def _instructions(cubin: bytes) -> bytes:
    """The one section of a cubin, an ELF file, that holds code."""
    table, size, n, names = struct.unpack_from("<Q", cubin, 0x28) + struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(n)]
    strings = sections[names][4]
    (code,) = (cubin[s[4] : s[4] + s[5]] for s in sections if cubin.startswith(b".text.", strings + s[0]))
    return code


def _read_sass(code: list[tuple[str, str]], first: int, usage: str) -> Code:
    """From (operation, operands), instruction ``first`` and those behind, and what cuobjdump says of the registers."""
    accesses, loops = [], []
    for i, (op, rest) in enumerate(code):
        if op.startswith(("LDG", "STG")):
            bits = re.search(r"\.(64|128|256)\b", op)
            accesses.append((i, op.startswith("STG"), int(bits[1]) if bits else 32))
        target = re.match(r"\s+(?:!?U?P\d+,\s*)?0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and (place := int(target[1], 16) // _INSTRUCTION - first) < i:
            loops.append((place, i))
    operations = [op for op, _ in code]
    doubles = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|.*\.F64")
    return Code(
        registers=_largest(r"\bREG:(\d+)", usage),
        shared=_largest(r"\bSHARED:(\d+)", usage),
        scratch=0,
        local=[i for i, op in enumerate(operations) if op.startswith(("LDL", "STL"))],
        fp64=[i for i, op in enumerate(operations) if doubles.match(op)],
        accesses=accesses,
        loops=loops,
    )


def read_amdgcn(text: str) -> Code:
    """The machine code of a kernel for an AMD GPU, from its assembly."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for label, op, rest in re.findall(r"^(?:(\.\w+):|\t([a-z]\w+)(.*))", text, flags=re.MULTILINE):
        if label:
            labels[label] = len(code)
        else:
            code.append((op, rest))
    sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64}
    accesses, loops = [], []
    for i, (op, rest) in enumerate(code):
        access = re.fullmatch(r"(?:global|buffer|flat)_(load|store)_(\w+)", op)
        if access:
            accesses.append((i, access[1] == "store", sizes.get(access[2], 32)))
        target = labels.get(rest.strip(), i + 1) if op.startswith(("s_cbranch", "s_branch")) else i + 1
        if target <= i:
            loops.append((target, i))
    return Code(
        registers=_largest(r"\.vgpr_count:\s*(\d+)", text),
        shared=_largest(r"\.group_segment_fixed_size:\s*(\d+)", text),
        scratch=_largest(r"\.private_segment_fixed_size:\s*(\d+)", text),
        local=[i for i, (op, _) in enumerate(code) if op.startswith("scratch_")],
        fp64=[i for i, (op, _) in enumerate(code) if re.search(r"^v_\w*f64", op)],
        accesses=accesses,
        loops=loops,
    )
