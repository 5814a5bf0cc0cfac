"""Gather: which parameters have gradients in this step, how those lie, and whether all of it is fit to be stepped.

A *plan* is what stays the same while the same parameters have gradients and nothing moved; a step that finds its plan
still true costs a few list comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .state import Leaf

if TYPE_CHECKING:
    from .backends import Executor, Knobs

__all__ = ["Plan", "check_gradients"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Comparison = Callable[[Sequence[Any]], bool]


class Plan:
    """The active leaves, and the executors that step them."""

    __slots__ = ("_same", "_stays", "active", "all_active", "executors", "groups", "leaves", "movable", "ptrs")

    def __init__(
        self, leaves: list[Leaf], active: list[bool], ptrs: list[int], executors: list[Executor]
    ) -> None:
        self.leaves = leaves
        self.groups = sorted({leaf.group for leaf in leaves})
        self.active = active
        self.all_active = all(active)
        self.ptrs = ptrs
        self.executors = executors
        self._same: Comparison = never
        # What can become another view of memory that begins where it lies: nothing else shows that. A vector in a slice
        # that is as long as it is can not.
        self.movable = [leaf.param for leaf in leaves if sum(n > 1 for n in leaf.shape) > (leaf.home is not None)]
        self._stays: Comparison = never

    def same_layout(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether gradients and parameters have the shapes, strides and dtypes that they had when last checked."""
        return self._same(grads) and (not self.movable or self._stays(self.movable))

    def still_fits(self, grads: list[Tensor]) -> bool:
        """Whether the parameters lie where they did, and the gradients have the dtypes that they had."""
        pairs = zip(self.leaves, grads, strict=True)
        return not any(leaf.moved() or g.dtype != leaf.grad_dtype for leaf, g in pairs)

    def layout(self, grads: list[Tensor]) -> None:
        """Check the gradients one by one, and tell the executors which lie in their parameter's order."""
        check_gradients(self.leaves, grads)
        self._same = comparison_with(grads)
        self._stays = comparison_with(self.movable) if self.movable else never
        ordered = [lies_like(g, leaf) for g, leaf in zip(grads, self.leaves, strict=True)]
        for executor in self.executors:
            executor.layout(executor.part(ordered))

    def run(self, grads: list[Tensor], knobs: Knobs) -> bool:
        """Measure, decide, apply; whether the host knows that the step was skipped."""
        if knobs.measures:
            for executor in self.executors:
                executor.measure(executor.part(grads), knobs)
        skipped = False
        for executor in self.executors:
            skipped = executor.decide(knobs) or skipped
        for executor in self.executors:
            executor.apply(executor.part(grads), knobs)
        return skipped


def never(grads: Sequence[Any]) -> bool:
    """No gradients have been checked yet."""
    return False


def comparison_with(grads: Sequence[Tensor]) -> Comparison:
    """Whether other tensors have the shapes, strides, dtypes and devices of these; False for what is no tensor.

    torch.compile's guards compare thousands of tensors in C++ in the time that Python takes to ask each one question.
    """
    sizes: Any = [list(g.shape) for g in grads]
    strides: Any = [list(g.stride()) for g in grads]
    try:
        from torch._C._dynamo.guards import TensorGuards

        check = TensorGuards(*grads, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        if check(*grads):
            return lambda others: bool(check(*others))
    except (ImportError, TypeError, SystemError):  # these guards are torch's own affair
        pass
    looks = _looks(grads)
    return lambda others: _looks(others) == looks


_described = attrgetter("shape", "dtype", "device", "layout")


def _looks(grads: Sequence[Any]) -> Any:
    try:
        lazy = [*map(Tensor.is_neg, grads), *map(Tensor._is_zerotensor, grads)]
        return list(map(_described, grads)), list(map(Tensor.stride, grads)), lazy
    except (AttributeError, RuntimeError, TypeError):  # None; a sparse gradient has no strides
        return None


def lies_like(g: Tensor, leaf: Leaf) -> bool:
    """Whether the elements of a gradient lie in memory as those of its parameter's state do."""
    if g.is_neg() or g._is_zerotensor():  # autograd's lazy forms: what lies there is the negative, or nothing at all
        return False
    if g.stride() == leaf.strides:
        return True
    # The stride of a dimension of size 1 says nothing.
    return all(n == 1 or s == t for n, s, t in zip(leaf.shape, g.stride(), leaf.strides, strict=True))


def in_order(g: Tensor, leaf: Leaf) -> Tensor:
    """The elements of a gradient as one dimension in its parameter's order, copied only where they lie otherwise."""
    if not lies_like(g, leaf):
        g = torch.empty_strided(leaf.shape, leaf.strides, dtype=g.dtype, device=g.device).copy_(g)
    return g.as_strided((leaf.numel,), (1,))


def _permitted(param: Tensor, dtype: torch.dtype) -> bool:
    """Whether the user told torch that a gradient may have a dtype that its parameter has not."""
    meant = getattr(param, "grad_dtype", param.dtype)
    return dtype in _DTYPES and (meant is None or meant == dtype)


def check_gradients(leaves: Sequence[Leaf], grads: Sequence[Any]) -> None:
    """Raise an error that says which gradient is not what its parameter needs."""
    for leaf, g in zip(leaves, grads, strict=True):
        where = f"the gradient of parameter {leaf.index} (shape {tuple(leaf.shape)}, {leaf.dtype}, {leaf.device})"
        if g.layout != torch.strided:
            raise RuntimeError(
                f"{where} is sparse ({g.layout}), and sparse gradients are not supported; "
                "use sparse=False in the embedding, or torch.optim.SparseAdam or torch.optim.SGD for this parameter"
            )
        if not leaf.param.dtype.is_floating_point:
            raise ValueError(f"{where}: only real floating-point parameters can be stepped")
        if g.shape != leaf.shape:
            raise ValueError(f"{where} has shape {tuple(g.shape)}; a gradient must have the shape of its parameter")
        if g.dtype != leaf.dtype and not _permitted(leaf.param, g.dtype):
            raise ValueError(
                f"{where} has dtype {g.dtype}; cast the gradient to the dtype of its parameter, or say by "
                "parameter.grad_dtype, where torch has that, that it is meant"
            )
        if g.device != leaf.device:
            raise ValueError(f"{where} lies on {g.device}; move the gradient to the device of its parameter")
        if type(leaf.param.data) is not Tensor:
            raise ValueError(
                f"parameter {leaf.index} is a {type(leaf.param.data).__name__}, but only plain tensors can be stepped; "
                "use torch.optim for tensor subclasses such as DTensor"
            )
