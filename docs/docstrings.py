"""Docstrings as Markdown: their sections, formulas, arguments and examples."""

from __future__ import annotations

import inspect
import re
from typing import Any

__all__ = ["arguments", "call", "code", "example", "items", "markdown", "sections", "text_of"]

_SECTION = re.compile(r"^([A-Z][\w ]*):$")


def sections(thing: Any) -> dict[str, str]:
    """The parts of a docstring: "" for what comes first, "Args", "Raises" and so on; "notes" for text after them."""
    found: dict[str, list[str]] = {"": []}
    here = ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        title = _SECTION.match(line)
        if title:
            here = title[1]
        elif here and line and not line.startswith(" "):
            here = "notes"
        if not title:
            found.setdefault(here, []).append(line)
    return {name: inspect.cleandoc("\n" + "\n".join(lines)) for name, lines in found.items()}


def text_of(thing: Any) -> str:
    """What comes first in a docstring, as Markdown."""
    return markdown(sections(thing)[""])


def code(text: str) -> str:
    """Literals, formulas in the line and references."""
    text = re.sub(r":math:`([^`]*)`", lambda m: f"$`{_symbols(m[1])}`$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text)
    return text.replace("``", "`")


def _symbols(formula: str) -> str:
    return formula.replace(r"\operatorname{", r"\mathrm{")  # GitHub refuses the former


def markdown(text: str) -> str:
    """Paragraphs, with ``.. math::`` blocks as GitHub's."""
    parts = []
    for block in re.split(r"\n\n(?=\S)", text):
        if not block.startswith(".. math::"):
            parts.append(code(block))
            continue
        lines = [line.strip() for line in block.removeprefix(".. math::").strip().splitlines()]
        formula = _symbols("\n".join(lines))
        if "&" in formula or r"\\" in formula:
            formula = "\\begin{aligned}\n" + formula + "\n\\end{aligned}"
        parts.append(f"```math\n{formula}\n```")
    return "\n\n".join(parts)


def items(text: str) -> dict[str, str]:
    """The entries of a section ``name: what it is``, in a line each."""
    found = re.split(r'\n(?="?\w[\w, ]*"?: )', text)
    return {name: " ".join(rest.split()) for name, rest in (item.split(": ", 1) for item in found)}


def arguments(text: str) -> str:
    """The arguments, or the errors, as a list."""
    return "\n".join(f"- `{name}`: {code(told)}" for name, told in items(text).items())


def call(thing: Any) -> str:
    """How a class or function is called, without annotations."""
    parameters = inspect.signature(thing).parameters.values()
    text = f"{thing.__name__}({', '.join(str(p.replace(annotation=p.empty)) for p in parameters)})"
    return text.replace("<built-in function monotonic>", "time.monotonic")


def example(text: str) -> str:
    """A doctest as the code that it runs, with what it prints as comments."""
    lines = []
    for line in text.splitlines():
        prompted = line.startswith((">>>", "..."))
        lines.append(line[4:] if prompted else f"# {line}" if line else "")
    return "```python\n" + "\n".join(lines) + "\n```"
