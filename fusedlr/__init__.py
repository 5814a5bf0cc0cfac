"""fusedlr: torch.optim with schedule, clipping and update in one fused step on the device."""

from . import clipping, schedules
from .optimizer import FusedOptimizer
from .optimizers import LAMB, LARS, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Lion, NAdam, RAdam, RMSprop
from .precision import Precision

__all__ = ["LAMB", "LARS", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "FusedOptimizer", "Lion",
           "NAdam", "Precision", "RAdam", "RMSprop", "__version__", "clipping", "schedules"]  # fmt: skip
__version__ = "0.1.0"
