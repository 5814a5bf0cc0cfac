"""The optimizers, one file a family: the reference rules and the public classes."""

from .adam import Adam, AdamW
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
