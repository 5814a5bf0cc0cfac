"""Schedules: how a learning rate, or any other scalar, moves with the steps.

A schedule is a value: ``schedule(t, base_lr)`` evaluates it on the host, ``a.then(b)`` and ``a.for_steps(n)`` compose,
``schedule.plot(steps)`` draws it, and ``schedule.rows(base_lr)`` is the program that a device evaluates.
"""

from .base import Chain, ForSteps, Schedule
from .decays import (
    ExponentialDecay,
    InverseTimeDecay,
    LinearDecay,
    MultiStepDecay,
    PowerDecay,
    SqrtDecay,
    StepDecay,
)
from .program import Kind, Packed, Row, pack, value
from .ramps import Constant, Cosine, Linear, Polynomial, Table, Warmup

__all__ = [
    "Chain",
    "Constant",
    "Cosine",
    "ExponentialDecay",
    "ForSteps",
    "InverseTimeDecay",
    "Kind",
    "Linear",
    "LinearDecay",
    "MultiStepDecay",
    "Packed",
    "Polynomial",
    "PowerDecay",
    "Row",
    "Schedule",
    "SqrtDecay",
    "StepDecay",
    "Table",
    "Warmup",
    "pack",
    "value",
]
