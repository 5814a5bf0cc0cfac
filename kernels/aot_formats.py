"""The storage formats that are compiled ahead of time, by their names in the names of kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import formats

__all__ = ["COMPILED", "FORMATS", "Format"]

FP32, FP64, BF16, FP16, INT8 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8


class Format(NamedTuple):
    """A storage: the dtype of the state (None: the parameter's), its kind, that of the weights, and whose it is."""

    held: torch.dtype | None
    state: str
    weights: str
    dtypes: tuple[torch.dtype, ...]

    def storage(self, slots: int) -> tuple[str, str, tuple[bool, ...]]:
        """The argument ``storage`` of the launches, all slots but the first taken as second moments."""
        return self.state, self.weights, tuple(i > 0 for i in range(slots))

    def bytes_of_slot(self, dtype: torch.dtype) -> float:
        """Bytes of an element of a slot, its share of the scale included."""
        return (self.held or dtype).itemsize + (4 / formats.GROUP.value if self.state == "int8" else 0)

    @property
    def extra(self) -> int:
        """Bytes of an element of what completes the weight."""
        return sum(formats.EXTRA_BYTES[self.weights])


# The storages that differ in their code. 8-bit weights are compiled with stochastic rounding, which takes more.
FORMATS = {
    "param": Format(None, "plain", "plain", (FP32, BF16, FP16, FP64)),
    "fp32": Format(FP32, "plain", "plain", (BF16, FP16)),
    "noisy": Format(None, "plain", "noisy", (BF16, FP16)),
    "fp32_master": Format(FP32, "plain", "master", (BF16, FP16)),
    "fp32_split16": Format(FP32, "plain", "split16", (BF16,)),
    "bf16_noisy": Format(BF16, "noisy", "noisy", (BF16,)),
    "bf16_split16": Format(BF16, "noisy", "split16", (BF16,)),
    "int8": Format(INT8, "int8", "plain", (FP32, BF16)),
    "int8_noisy": Format(INT8, "int8", "noisy", (BF16,)),
    "int8_master": Format(INT8, "int8", "master", (BF16,)),
    "int8_split16": Format(INT8, "int8", "split16", (BF16,)),
    "int8_split8": Format(INT8, "int8", "noisy8", (BF16,)),
}
# Every rule is compiled in the first two; a rule of two slots in all, and some others in the one that takes most.
COMPILED = {"adamw": tuple(FORMATS)} | dict.fromkeys(
    ("sgd_momentum", "adam_amsgrad", "adadelta", "nadam"), ("param", "fp32", "int8_split8")
)
