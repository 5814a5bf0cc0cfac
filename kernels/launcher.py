"""Launches after the first: the compiled kernel itself, without what Triton looks at anew in each launch.

``kernel[grid](...)`` binds, specialises and hashes the arguments and compares every global that the kernel uses with
what it was, which costs the host more than everything else in a step of a small model. What is found is the same
kernel again wherever compile-time arguments, types of arguments and device are: pointers are aligned, which is looked
at, and no int is specialised on.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

__all__ = ["Launcher"]


def _aligned(arguments: tuple[Any, ...]) -> bool:
    """Whether Triton may count on all tensors to begin at a multiple of 16 bytes."""
    bits = 0
    for argument in arguments:
        if isinstance(argument, Tensor):
            bits |= argument.data_ptr()
    return not bits & 15


class Launcher:
    """A kernel with its options: ``launcher(programs, arguments, constants)``.

    ``arguments`` are those of run time, in the kernel's order and before its compile-time ones. ``constants`` are the
    latter: a dict that is the same object for the same constants, as the functions behind ``functools.cache`` return.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel = kernel
        self._options = options
        self._compiled: dict[Any, tuple[Any, dict[str, Any], list[Any]]] = {}
        self._interpreted = not isinstance(kernel, triton.runtime.JITFunction)

    def __call__(self, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        grid = (programs, 1, 1)
        if self._interpreted:
            self.kernel[grid](*arguments, **constants, **self._options)
            return
        key = (triton.runtime.driver.active.get_current_device(), id(constants), *map(type, arguments))
        known = self._compiled.get(key)
        aligned = _aligned(arguments)
        if known is not None and aligned:
            compiled, _, rest = known
            compiled[grid](*arguments, *rest)
            return
        compiled = self.kernel[grid](*arguments, **constants, **self._options)
        if aligned and compiled is not None:
            # The constants are kept, so that no other dict gets their id.
            rest = [constants[name] for name in self.kernel.arg_names[len(arguments) :]]
            self._compiled[key] = compiled, constants, rest
