"""What an update rule is: the one description from which both backends run an optimizer."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["UNSIGNED", "AtenRule", "Rule", "Trust", "averaged", "averaged_square", "decayed", "expm1_log", "minus",
           "minus_ratio", "overwriting", "scaled", "sqrt", "where"]  # fmt: skip

# Slots that hold sums or averages of squares, or largest magnitudes: nothing negative. Eight bits hold them better
# without a sign; a slot that is not named here is stored with one.
UNSIGNED = frozenset({"acc_delta", "exp_avg_sq", "exp_inf", "max_exp_avg_sq", "square_avg", "sum"})

# (params, grads, [state lists in slot order], step, scalars by name, maximize, grad_scale) -> None, in place. Gradients
# are divided by ``grad_scale``, a float32 tensor, and written, if it is not None.
AtenRule = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[Sequence[Tensor]], Tensor, Mapping[str, Any], bool, Tensor | None],
    None,
]


@dataclass(frozen=True)
class Trust:
    """A trust ratio: how far a tensor moves, by its own norm beside that of a direction.

    Between the row and the update, the backends find the Euclidean norms of each tensor and of its direction, and
    replace the last field of the tensor's row, ``trust``, by their ratio. Both functions have twins in
    ``kernels/trust_rules.py``.

    Args:
        direction: ``direction(p, g, *slots, h)`` gives a tensor like ``p``; pure, as ``update`` is.
        ratio: ``ratio(p_norm, norm, h)`` gives the trust ratio, in float64.
        slots: the keys of the state tensors that ``direction`` takes, the first of the rule's.
    """

    direction: Callable[..., Tensor]
    ratio: Callable[..., Any]
    slots: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """An update rule: pure arithmetic, with the storage left to the backends.

    ``update(p, g, *state, h)`` returns ``(p, *state)`` in the dtype it was given (float32, or float64 for float64
    parameters); ``row(step, *carried, *scalars)`` computes, in float64, the numbers ``h`` that are the same for all
    elements of one tensor. Both have a twin of the same name, argument names and argument order in
    ``kernels/rules.py``.

    What a tensor *carries* from step to step beside its count is a number of its own (NAdam's ``mu_product``): the row
    takes the old ones after ``step``, and the first fields of the NamedTuple it returns are the new ones.

    Args:
        update: the reference rule; its name is the name of the rule.
        row: the reference of the row; ``step`` is the 1-based count of the tensor's own steps.
        hyper: the NamedTuple that ``row`` returns and ``update`` takes as ``h``.
        scalars: the hyper-parameters that ``row`` takes last, by their names in a param group
            (``beta1`` and ``beta2`` are the two ``betas``).
        slots: the keys of the state tensors, in the order ``update`` takes them.
        aten: PyTorch's own fused CPU operator for the same rule, or None.
        carried: the keys of the numbers that a tensor carries, in the order ``row`` takes and returns them.
        start: what each slot, then each carried number, is before the first step; empty for zeros.
        fold: other scalars with which ``aten`` makes of the gradients what it makes of ``factor`` times them with
            these; ``fold(step, factor, scalars)`` is None where there are none. Saves a pass over large gradients.
        trust: the trust ratio that becomes the last field of the row before ``update`` sees it, or None.
        cancels: whether ``update`` subtracts one state tensor from another, so that neither may be rounded coarsely.
    """

    update: Callable[..., tuple[Tensor, ...]]
    row: Callable[..., Any]
    hyper: type[Any]
    scalars: tuple[str, ...]
    slots: tuple[str, ...]
    aten: AtenRule | None = None
    carried: tuple[str, ...] = ()
    start: tuple[float, ...] = ()
    fold: Callable[[float, float, dict[str, float]], dict[str, float] | None] | None = None
    trust: Trust | None = None
    cancels: bool = False

    @property
    def unsigned(self) -> tuple[bool, ...]:
        """Which slots never hold a negative number."""
        return tuple(name in UNSIGNED for name in self.slots)

    @property
    def name(self) -> str:
        """The name of the update function, shared with its twin in ``kernels/rules.py``."""
        return self.update.__name__


def expm1_log(count: Any, base: Any) -> Any:
    """``base**count - 1`` without cancellation, as ``expm1(count*log(base))``; base 0 gives -1.

    The bias corrections are ``1 - beta**step``; computed directly in float32 they are 1.3e-5 off for
    beta 0.999 at the first step.
    """
    if isinstance(count, Tensor) or isinstance(base, Tensor):
        # A number becomes a tensor on the CPU, wherever the count is: a copy to a GPU would wait for it.
        base = base.double() if isinstance(base, Tensor) else torch.tensor(base, dtype=torch.float64, device="cpu")
        return torch.expm1(count * torch.log(base))
    return math.expm1(count * math.log(base)) if base > 0 else -1.0


def decayed(g: Tensor, p: Tensor, weight_decay: Any) -> Tensor:
    """``g + weight_decay*p``: the gradient with the L2 penalty.

    Without decay nothing is added, not 0*p: an infinite weight would turn the gradient into NaN. Whether a tensor is
    zero is asked on its device, for which nobody waits.
    """
    if isinstance(weight_decay, Tensor):
        return torch.where(weight_decay != 0, g + weight_decay * p, g)
    return g + weight_decay * p if weight_decay != 0 else g


class _Mode(threading.local):
    overwrites = False


_mode = _Mode()


@contextlib.contextmanager
def overwriting() -> Iterator[None]:
    """Let ``averaged``, ``averaged_square``, ``scaled``, ``minus`` and ``minus_ratio`` write over their first argument.

    A rule gives them what it replaces: a parameter or state that it reads no more, or a result of its own. So it may
    run where its results belong, which saves the copies: a quarter of the time on a CPU.
    """
    _mode.overwrites = True
    try:
        yield
    finally:
        _mode.overwrites = False


def averaged(avg: Tensor, x: Tensor, weight: Any) -> Tensor:
    """``avg + (x-avg)*weight``, counted from ``x`` where the weight is half or more, in one pass over memory."""
    weight = weight.to(avg.dtype) if isinstance(weight, Tensor) else weight
    return avg.lerp_(x, weight) if _mode.overwrites else torch.lerp(avg, x, weight)


def averaged_square(avg: Tensor, g: Tensor, decay: Any, weight: Any) -> Tensor:
    """``avg*decay + weight*g*g``, from left to right: g*g may leave the range where the whole does not."""
    if isinstance(weight, Tensor):
        return scaled(avg, decay).add_(weight * g * g)
    return scaled(avg, decay).addcmul_(g, g, value=weight)


def scaled(x: Tensor, factor: Any) -> Tensor:
    """``x*factor``, which the caller may write into."""
    return x.mul_(factor) if _mode.overwrites else x * factor


def minus(p: Tensor, update: Tensor, factor: Any) -> Tensor:
    """``p - factor*update``; a factor on the host goes with the operator, without a product of its own."""
    if isinstance(factor, Tensor):
        return p - factor * update
    return p.sub_(update, alpha=factor) if _mode.overwrites else torch.sub(p, update, alpha=factor)


def minus_ratio(p: Tensor, numerator: Tensor, denominator: Tensor, factor: Any) -> Tensor:
    """``p - factor*numerator/denominator``."""
    if isinstance(factor, Tensor):
        return p - factor * numerator / denominator
    if _mode.overwrites:
        return p.addcdiv_(numerator, denominator, value=-factor)
    return torch.addcdiv(p, numerator, denominator, value=-factor)


def sqrt(x: Any) -> Any:
    """Square root of a float or a tensor."""
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def where(condition: Any, yes: Any, no: Any) -> Any:
    """``yes`` or ``no``, of floats or of tensors."""
    if not isinstance(condition, Tensor):
        return yes if condition else no
    return torch.where(condition, yes, no)
