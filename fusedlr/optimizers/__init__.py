"""The optimizers, one file a family: the reference rules and the public classes.

Step:
    Gradients are read where autograd left them, and never written. Nothing waits for the device.

    1. *Measure*, if the clip or ``nonfinite`` asks for it: norms of the gradients, in float32 or wider.
    2. *Decide*, in float64: what the schedules give at t, the count of steps taken; whether the step is skipped; for
       each tensor its clip factor c, its own count of steps and the numbers of its rule.
    3. *Apply*, in one pass: read parameter, gradient and state, clip, update, store. The arithmetic is float32 (float64
       for float64 parameters).

Nonfinite:
    "propagate": as in torch, a NaN stays where it is, and with a norm in the clip makes every gradient of that norm
        NaN; an inf makes them 0, and itself NaN. Costs nothing.
    "skip": a step whose gradients hold an inf or NaN changes nothing: no parameter, no state, no count of steps, no
        schedule. ``skipped_steps`` grows by one. Nobody waits for the device. Costs one read of the gradients (4 bytes
        a float32 parameter) where the clip measures no norm, and nothing where it does.
    "raise": a FloatingPointError before anything has changed. Costs what "skip" costs, and on a GPU a wait for the
        device in every step.

Differs from torch:
    - Clipping happens inside the update: ``p.grad`` still holds the unclipped gradient after a step.
    - Numbers that all elements of a tensor share are taken in float64, whatever the parameter is.
    - bfloat16 and float16 parameters are computed in float32 and rounded once, when stored. torch's for-loop and
      foreach versions round after every operation. The state has the dtype of the parameter, as in torch, unless
      ``precision`` says otherwise.
    - Parameters are moved into flat buffers when the optimizer is made (``flatten=False`` leaves them where they are).
    - ``foreach``, ``fused`` and ``capturable`` choose nothing. ``differentiable=True``, complex parameters and sparse
      gradients are errors. So is a parameter that is given twice, which torch.optim steps twice after a warning, and a
      value outside its range in a param group, which torch.optim checks in its defaults only.
    - The same inputs give the same bits on every run, on the CPU for a fixed number of threads.
"""

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .lamb import LAMB
from .lars import LARS
from .lion import Lion
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["LAMB", "LARS", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Lion", "NAdam", "RAdam",
           "RMSprop"]  # fmt: skip
