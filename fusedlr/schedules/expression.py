"""Schedules from text: what a user types on a command line, read without evaluating it as Python."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .base import Schedule
from .compose import per_epoch, product
from .cycles import CosineRestarts, Cyclic, OneCycle
from .decays import (
    ExponentialDecay,
    InverseTimeDecay,
    LinearDecay,
    MultiStepDecay,
    PowerDecay,
    SqrtDecay,
    StepDecay,
)
from .live import Plateau, TimeDecay
from .ramps import Constant, Cosine, Linear, Polynomial, Warmup
from .tables import Table
from .warmups import WSD, InverseSqrt, Noam

__all__ = ["parse"]

_MAKERS: dict[str, Callable[..., Schedule]] = {
    maker.__name__: maker
    for maker in (
        WSD, Constant, Cosine, CosineRestarts, Cyclic, ExponentialDecay, InverseSqrt, InverseTimeDecay, Linear,
        LinearDecay, MultiStepDecay, Noam, OneCycle, Plateau, Polynomial, PowerDecay, SqrtDecay, StepDecay, Table,
        TimeDecay, Warmup, per_epoch, product,
    )
}  # fmt: skip
_METHODS = ("then", "for_steps")
_LONGEST = 100_000


def parse(text: str) -> Schedule:
    """The schedule that an expression such as ``Warmup(100).then(Cosine(900))`` describes.

    Only the schedules of this package can be called, by their bare names, and ``then`` and ``for_steps`` on what they
    give; arguments are numbers, strings, True, False, None, lists, tuples and schedules. What a schedule prints can be
    read again, ``momentum_schedule()`` and a TimeDecay's clock aside.

    Args:
        text: the expression, at most 100,000 characters.

    Raises:
        ValueError: it is anything else; the message says where. Arguments outside their ranges raise the schedules'
            own errors.

    Example:
        >>> parse("Warmup(100).then(Cosine(900, min_lr=1e-3))")
        Warmup(100).then(Cosine(900, min_lr=0.001))
    """
    if len(text) > _LONGEST:
        raise ValueError(f"a schedule must have at most {_LONGEST} characters, but got {len(text)}")
    try:
        result = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        example = "Warmup(100).then(Cosine(900))"
        raise ValueError(f"expected a schedule such as {example!r}, but got {text!r}: {error}") from None
    if not isinstance(result, Schedule):
        raise ValueError(f"expected a schedule such as 'Cosine(900)', but got {text!r}, which is no schedule")
    return result


def _refuse(node: ast.AST, expected: str) -> ValueError:
    column = getattr(node, "col_offset", 0) + 1
    return ValueError(f"expected {expected} at character {column}, but got {ast.unparse(node)!r}")


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return _call(node)
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (bool, int, float, str))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _value(node.operand)
        if not isinstance(operand, bool) and isinstance(operand, (int, float)):
            return -operand
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    raise _refuse(node, "a schedule, a number, a string or a list of them")


def _call(node: ast.Call) -> Schedule:
    maker: Callable[..., Schedule]
    if isinstance(node.func, ast.Name):
        if node.func.id not in _MAKERS:
            raise _refuse(node.func, f"one of {', '.join(sorted(_MAKERS))}")
        maker = _MAKERS[node.func.id]
    elif isinstance(node.func, ast.Attribute):
        before = _value(node.func.value)
        if node.func.attr not in _METHODS or not isinstance(before, Schedule):
            raise _refuse(node.func, "a schedule followed by .then(...) or .for_steps(...)")
        maker = before.then if node.func.attr == "then" else before.for_steps
    else:
        raise _refuse(node.func, "the name of a schedule")
    arguments = [_value(argument) for argument in node.args]
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _refuse(keyword.value, "arguments one by one")
        named[keyword.arg] = _value(keyword.value)
    return maker(*arguments, **named)
