"""Triton's interpreter, without what it does in vain: most of its time.

A launch replaces the builtins of triton.language and puts them back at its end. Functions that the kernel calls replace
them once more, which changes nothing but takes half of the time of a step: the members of five namespaces are listed
for each of some two hundred calls. And each sum and product of integers is computed again in 64 bits, for an assertion
that is dropped unless Triton is debugged: a third of what remains where a kernel computes addresses in a loop.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

__all__ = ["hasten"]


def hasten() -> None:
    """Leave out both."""
    _patch_once_a_launch()
    _compute_integers_once()


def _compute_integers_once() -> None:
    builder = interpreter.interpreter_builder
    options = getattr(builder, "options", None)
    if hasattr(options, "sanitize_overflow") and not options.debug:
        builder.options = replace(options, sanitize_overflow=False)


def _patch_once_a_launch() -> None:
    """Let functions find the builtins as the launch, or a function before them, has replaced them."""
    scope_class = getattr(interpreter, "_LangPatchScope", None)
    if scope_class is None:  # a Triton whose interpreter is built in another way, and as fast as it is
        return
    patch = interpreter._patch_lang
    patched: set[int] = set()  # the namespaces in which the present launch has replaced the builtins

    class Scope(scope_class):  # type: ignore[misc, valid-type]
        def restore(self) -> None:
            patched.clear()
            super().restore()

    def patch_once(fn: Any) -> Any:
        seen = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if seen and seen <= patched:
            return Scope()
        patched.update(seen)
        return patch(fn)

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = patch_once
