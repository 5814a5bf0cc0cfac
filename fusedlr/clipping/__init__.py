"""Gradient clipping: specifications, and the reference of what each does to a gradient."""

from .adaptive import AGC, AutoClip, ZClip
from .fixed import Clip, GlobalNorm, Normalize, TensorNorm, Value

__all__ = ["AGC", "AutoClip", "Clip", "GlobalNorm", "Normalize", "TensorNorm", "Value", "ZClip"]
