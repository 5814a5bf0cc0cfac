"""What is aimed at, and what limits each case: the words and numbers of docs/performance.md that no record holds."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """The peer takes at least `ratio` times as long in this case; with `strict`, more than that."""

    case: str
    peer: str
    ratio: float
    strict: bool = False


class BandwidthTarget(NamedTuple):
    """The step moves at least this part of what a copy moves, on a GPU."""

    case: str
    fraction: float


# Optimizers whose reference rule is run on a CPU, as torch has no fused operator for them.
_BY_RULE = ("rmsprop", "adadelta", "adamax", "nadam", "radam")
TARGETS = (
    Target("cpu-gpt-95m", "torch-fused", 1.15),
    Target("cpu-gpt-95m", "torch-foreach", 2.0),
    Target("cpu-gpt-95m-unclipped", "torch-fused", 1.2),
    Target("cpu-gpt-95m-unclipped", "torch-foreach", 2.0),
    Target("cpu-150x512", "torch-fused", 6.0),
    Target("cpu-2000x64", "torch-fused", 10.0),
    Target("cpu-gpt-95m-sgd", "torch-fused", 1.0, strict=True),
    Target("cpu-gpt-95m-sgd-unclipped", "torch-fused", 1.0, strict=True),
    Target("cpu-resnet50-sgd", "torch-fused", 1.0, strict=True),
    Target("cpu-resnet50-sgd-unclipped", "torch-fused", 1.0, strict=True),
    Target("cpu-gpt-3m-sgd", "torch-fused", 1.0, strict=True),
    Target("cpu-150x512-sgd", "torch-fused", 1.0, strict=True),
    Target("cpu-2000x64-sgd", "torch-fused", 1.0, strict=True),
    *(Target(f"cpu-gpt-30m-{name}", "torch-foreach", 1.0, strict=True) for name in _BY_RULE),
    *(Target(f"cpu-150x512-{name}", "torch-foreach", 5.0) for name in _BY_RULE),
    Target("cuda-1g", "torch-fused", 1.35),
    Target("cuda-1g", "torch-fused-grad-scale", 1.2),
    Target("cuda-2000x4096", "torch-fused", 3.0),
    Target("cuda-gpt-1m", "torch-fused", 3.0),
)
BANDWIDTH_TARGETS = (BandwidthTarget("cuda-1g", 0.92),)

# No case may be slower than any peer: this holds for all that are not named above.
NEVER_SLOWER = 1.0

# Of these, the first one recorded is the number on the front page, against torch-fused.
FRONT_PAGE = ("cuda-1g", "cuda-gpt2", "cpu-gpt-95m")

# By the start of a case's name, the longest that fits. Bytes a parameter: fusedlr's step, then torch-fused's.
_CLIPPED_ADAMW = "memory: 32 bytes a parameter against 40, so 1.25x if both use the memory equally well"
_ADAMW = "memory: 28 bytes a parameter on both sides, so only a better use of the memory can gain"
_CLIPPED_SGD = "memory: 24 bytes a parameter against 32, so 1.33x if both use the memory equally well"
_SGD = "memory: 20 bytes a parameter on both sides, so only a better use of the memory can gain"
_HOST = "the host: reading every `.grad`, and the calls around little arithmetic"
LIMITS = {
    "cpu-gpt-95m": _CLIPPED_ADAMW,
    "cpu-gpt-95m-unclipped": _ADAMW,
    "cpu-gpt-95m-sgd": _CLIPPED_SGD,
    "cpu-gpt-95m-sgd-unclipped": _SGD,
    "cpu-gpt-3m": "memory for the matrices, calls for the vectors between them",
    "cpu-150x512": _HOST,
    "cpu-2000x64": _HOST,
    "cpu-resnet50-sgd": _CLIPPED_SGD + "; calls for its 107 vectors",
    "cpu-resnet50-sgd-unclipped": _SGD + "; calls for its 107 vectors",
    "cpu-gpt-30m": "the arithmetic of the rule: an operator at a time, over pieces that stay in the cache",
    "cpu-sweep": "small models: the host; large ones: memory, 32 bytes a parameter against 40",
    "cuda-1g": _CLIPPED_ADAMW,
    "cuda-1g-unclipped": _ADAMW,
    "cuda-1g-bf16": "memory: 16 bytes a parameter against 20, so 1.25x if both use the memory equally well",
    "cuda-gpt2": _CLIPPED_ADAMW,
    "cuda-gpt2-unclipped": _ADAMW,
    "cuda-gpt-1m": "the host: launches, and reading every `.grad`",
    "cuda-2000x4096": "the host: reading 2000 `.grad`, and sending their addresses",
    "cuda-resnet50": "the host on a fast GPU, or memory: 32 bytes a parameter against 40",
    "cuda-resnet50-sgd": "the host on a fast GPU, or memory: 24 bytes a parameter against 32",
    "cuda-sweep": "small models: the host; large ones: memory, 32 bytes a parameter against 40",
}


def limit_of(case: str) -> str | None:
    """One line on what keeps a case from being faster, or None for one that is in the table no more."""
    names = [name for name in LIMITS if f"{case}-".startswith(f"{name}-")]
    return LIMITS[max(names, key=len)] if names else None
