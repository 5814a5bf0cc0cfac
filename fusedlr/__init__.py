"""fusedlr: torch.optim with schedule, clipping and update in one fused step on the device."""

from . import clipping, schedules
from .optimizer import FusedOptimizer
from .optimizers import SGD, Adam, AdamW

__all__ = ["SGD", "Adam", "AdamW", "FusedOptimizer", "__version__", "clipping", "schedules"]
__version__ = "0.1.0"
