"""Schedules: how a learning rate, or any other scalar, moves with the steps.

A schedule is a value: ``schedule(t, base_lr)`` evaluates it on the host, ``a.then(b)`` and ``a.for_steps(n)`` compose,
``schedule.plot(steps)`` draws it, and ``schedule.rows(base_lr)`` is the program that a device evaluates.
"""

from .base import Chain, ForSteps, Schedule
from .compose import PerEpoch, Product, per_epoch, product
from .cycles import CosineRestarts, Cyclic, MomentumCycle, OneCycle
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
from .tables import Lambda, Table
from .torch_schedulers import from_torch
from .warmups import WSD, InverseSqrt, Noam

__all__ = [
    "WSD",
    "Chain",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Cyclic",
    "ExponentialDecay",
    "ForSteps",
    "InverseSqrt",
    "InverseTimeDecay",
    "Lambda",
    "Linear",
    "LinearDecay",
    "MomentumCycle",
    "MultiStepDecay",
    "Noam",
    "OneCycle",
    "PerEpoch",
    "Plateau",
    "Polynomial",
    "PowerDecay",
    "Product",
    "Schedule",
    "SqrtDecay",
    "StepDecay",
    "Table",
    "TimeDecay",
    "Warmup",
    "from_torch",
    "per_epoch",
    "product",
]
