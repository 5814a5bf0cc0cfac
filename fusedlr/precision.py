"""How parameters and state are stored: what a user asks for, and what it means for one parameter.

Arithmetic is float32 whatever the storage (float64 for float64 parameters). The formats themselves, as bits, are in
``codecs.py``; their twins in ``kernels/formats.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from numbers import Integral
from typing import NamedTuple

import torch

from .rule import Rule

__all__ = ["GROUP", "Precision", "Storage", "as_precision", "check_precision", "storage_of"]

# Elements that share a scale, in the order of memory. With a float32 scale that is 1/16 byte an element.
GROUP = 64

_STATES = ("param", "fp32", "bf16", "int8")
_WEIGHTS = ("param", "fp32", "split")
_ROUNDINGS = ("nearest", "stochastic")
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, repr=False)
class Precision:
    r"""How an optimizer stores the weights and its state; the update itself is computed in float32.

    Args:
        state: "param", the parameter's dtype as in torch.optim; "fp32"; "bf16", stochastically rounded; or "int8",
            8-bit codes in groups of 64 elements that share a float32 scale. The step count stays a float32.
        weights: "param", the parameter alone; "fp32", a float32 master copy in the state (``master``); "split", for
            bfloat16 parameters: the bits of the float32 weight that bfloat16 lacks (``param_low``). float32 parameters
            among them lack nothing and stay alone.
        rounding: "nearest" or "stochastic": how a result is rounded to a 16-bit parameter without further bits, and to
            the weight of 24 bits that ``weights="split", bits=8`` keeps. The parameter beside a master copy, or beside
            16 bits, is the nearest to the float32 weight. Stochastic: up or down with the probabilities that make the
            expectation exact.
        bits: of "split": 16, which make a float32 of the bfloat16; or 8.
        seed: of the stochastic roundings, at least 0; part of the checkpoint.

    Random bits are a function of (seed, the tensor's step, the number of the tensor in the optimizer, element), so
    runs can be repeated, on either backend and whatever the grid.

    Raises:
        ValueError: for an unknown name, another number of bits, or a negative seed.

    Sources: split weights and companded 8-bit state after FlashOptim (2026) and Dettmers et al., "8-bit Optimizers via
    Block-wise Quantization" (2022); stochastic rounding of bfloat16 weights after Zamirai et al., "Revisiting
    BFloat16 Training" (2020).

    Example:
        >>> import torch, fusedlr
        >>> model = torch.nn.Linear(4, 2, dtype=torch.bfloat16)
        >>> optimizer = fusedlr.AdamW(model.parameters(), precision=fusedlr.Precision.compact())
        >>> model(torch.ones(3, 4, dtype=torch.bfloat16)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_scale', 'exp_avg_sq', 'exp_avg_sq_scale', 'param_low', 'step']
        >>> fusedlr.Precision.exact()
        Precision(state='fp32', weights='split')  # 14 bytes a bfloat16 parameter of Adam, its gradient included
    """

    state: str = "param"
    weights: str = "param"
    rounding: str = "nearest"
    bits: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("state", _STATES), ("weights", _WEIGHTS), ("rounding", _ROUNDINGS), ("bits", (16, 8))):
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool):
                raise ValueError(f"{name} must be one of {allowed}, but got {value!r}")
        if self.bits != 16 and self.weights != "split":
            raise ValueError(f"bits={self.bits} belongs to weights='split', but weights is {self.weights!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, but got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))

    @classmethod
    def exact(cls) -> Precision:
        """The bits of float32 training with bfloat16 parameters: float32 state, and the weights' missing 16 bits.

        A master copy would do the same with 2 bytes a parameter more.
        """
        return cls(state="fp32", weights="split")

    @classmethod
    def compact(cls) -> Precision:
        """About 7 bytes a bfloat16 parameter with its gradient: 8-bit state, and 8 of the weights' missing bits."""
        return cls(state="int8", weights="split", rounding="stochastic", bits=8)

    def bytes_per_parameter(self, dtype: torch.dtype = torch.bfloat16, slots: int = 2) -> float:
        """Bytes of memory for one element: parameter, gradient and state.

        Args:
            dtype: of the parameter and its gradient.
            slots: state tensors of the optimizer: 2 for Adam, 1 for Lion and SGD with momentum.
        """
        held = {"param": dtype.itemsize, "fp32": 4, "bf16": 2, "int8": 1 + 4 / GROUP}[self.state]
        split = self.bits // 8 if dtype == torch.bfloat16 else 0
        missing = {"param": 0, "fp32": 4 if dtype in _NARROW else 0, "split": split}[self.weights]
        return 2 * dtype.itemsize + slots * held + missing

    def __repr__(self) -> str:
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        given = ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)
        size = f"{self.bytes_per_parameter():g} bytes a bfloat16 parameter of Adam, its gradient included"
        return f"Precision({given})  # {size}"


def as_precision(precision: Precision | None) -> Precision:
    """The precision meant by the argument ``precision``; None is the storage of torch.optim."""
    if precision is None:
        return Precision()
    if not isinstance(precision, Precision):
        raise TypeError(
            f"precision must be a fusedlr.Precision or None, but got {precision!r} ({type(precision).__name__}); "
            "pass for example precision=fusedlr.Precision(state='fp32')"
        )
    return precision


class Storage(NamedTuple):
    """The arrays of one parameter: the dtype of its slots, and what is kept of its weight beside it.

    ``state`` is "plain", "noisy" (stochastically rounded) or "int8"; ``weights`` is "plain", "noisy", "master",
    "split16", "split8" or "noisy8".
    """

    dtype: torch.dtype
    state: str
    weights: str

    @property
    def plain(self) -> bool:
        """Whether numbers are stored as torch rounds them, with nothing beside them."""
        return self.state == "plain" and self.weights == "plain"

    @property
    def noisy(self) -> bool:
        """Whether a step needs random bits."""
        return self.state == "noisy" or self.weights in ("noisy", "noisy8")

    @property
    def extra(self) -> tuple[str, torch.dtype] | None:
        """The state key and dtype of what completes the weight."""
        if self.weights == "master":
            return "master", torch.float32
        if self.weights == "split16":
            return "param_low", torch.int16
        return ("param_low", torch.int8) if self.weights in ("split8", "noisy8") else None


@functools.lru_cache(maxsize=1024)
def storage_of(precision: Precision, dtype: torch.dtype, stateful: bool) -> Storage:
    """What a precision means for a parameter of a dtype, under a rule with or without state."""
    held = {"param": dtype, "fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[precision.state]
    state = "int8" if held == torch.int8 else "noisy" if precision.state == "bf16" else "plain"
    noisy = precision.rounding == "stochastic"
    if precision.weights == "split" and dtype == torch.bfloat16:  # a float32 has all its bits
        weights = "split16" if precision.bits == 16 else "noisy8" if noisy else "split8"
    elif precision.weights == "fp32" and dtype in _NARROW:
        weights = "master"
    else:
        weights = "noisy" if noisy and dtype in _NARROW else "plain"
    return Storage(held, state, weights) if stateful else Storage(dtype, "plain", weights)


def check_precision(precision: Precision, dtype: torch.dtype, rule: Rule) -> None:
    """Raise a ValueError for a precision that a parameter of this dtype cannot have under this rule."""
    plain = precision.state == "param" and precision.weights == "param"
    if dtype == torch.float64 and not plain:
        raise ValueError(
            f"state={precision.state!r}, weights={precision.weights!r} is not possible for a float64 parameter, whose "
            "state and arithmetic are float64; give it an optimizer without precision, or convert it to float32"
        )
    if precision.weights == "split" and dtype == torch.float16:
        raise ValueError(
            "weights='split' keeps the bits that bfloat16 lacks, but a parameter is torch.float16; use weights='fp32', "
            "which keeps a master copy of 16-bit parameters, or bfloat16 parameters"
        )
    if precision.state in ("bf16", "int8") and rule.cancels:
        raise ValueError(
            f"state={precision.state!r} is not possible for {rule.name}: it takes the root of a difference of two "
            "state tensors, which their roundings would turn negative; use state='fp32'"
        )
