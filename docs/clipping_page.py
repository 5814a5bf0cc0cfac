"""docs/clipping.md: every strategy, those of other libraries, and what inf and NaN do; from the docstrings."""

from __future__ import annotations

import inspect
from typing import Any

from clip_peers import CLIP_PEERS
from docstrings import arguments, call, code, example, markdown, sections, text_of

from fusedlr import FusedOptimizer, clipping, optimizers

__all__ = ["STRATEGIES", "clipping_page"]

HEAD = """# Clipping

    optimizer = fusedlr.AdamW(model.parameters(), lr=3e-4, clip=fusedlr.clipping.GlobalNorm(1.0))  # or clip=1.0

A strategy is a value: it prints as the code that makes it, compares by value and pickles. It is one for the optimizer,
over all its param groups. The step multiplies a gradient by its factor where the update reads it, and never writes it;
norms are accumulated in float32 or wider, whatever the gradients are, and in a fixed order. A `max_norm` can be
scheduled: `schedule={"lr": ..., "max_norm": ...}`.

G is the norm of all gradients, n that of a tensor.
"""

# Bytes that are read before the update, by the scope of the norm: the gradients, and for AGC the weights.
MEASURED = {None: 0, "tensor": 4, "global": 4, "unit": 8}

STRATEGIES: list[type[clipping.Clip]] = [
    thing
    for thing in (getattr(clipping, name) for name in clipping.__all__)
    if inspect.isclass(thing) and issubclass(thing, clipping.Clip) and thing is not clipping.Clip
]


def _entry(cls: type[clipping.Clip]) -> str:
    told = sections(cls)
    cost = f"{MEASURED[cls.scope]} bytes a float32 parameter" if MEASURED[cls.scope] else "nothing"
    parts = [f"### {cls.__name__}", f"    {call(cls)}", text_of(cls), arguments(told["Args"])]
    parts += [f"Reads {cost} before the update."]
    parts += ["Raises:", arguments(told["Raises"])]
    parts += [markdown(told["notes"])] if "notes" in told else []
    return "\n\n".join([*parts, example(told["Example"])])


def _property(name: str) -> str:
    told: Any = getattr(FusedOptimizer, name)
    return f"- `optimizer.{name}`: {code(' '.join(sections(told)[''].split()))}"


def _peers() -> str:
    parts = []
    for library, peers in CLIP_PEERS.items():
        rows = [f"| `{peer.theirs}` | `{peer.ours}` | {peer.note} |" for peer in peers]
        parts += [f"### {library}", "\n".join(["| theirs | ours | |", "|---|---|---|", *rows])]
    return "\n\n".join(parts)


def clipping_page() -> str:
    """The text of docs/clipping.md."""
    parts = [HEAD.strip(), "## Strategies", *(_entry(cls) for cls in STRATEGIES)]
    parts += ["## Inf and NaN", "`nonfinite=` of every optimizer is one of three:"]
    parts += [arguments(sections(optimizers)["Nonfinite"])]
    parts += ["## What a step tells", "\n".join(map(_property, ("last_grad_norm", "skipped_steps", "clip")))]
    parts += [
        "## From other libraries",
        "M is a threshold of a norm, v of an element, r of a ratio. optax's `clip_by_block_rms(t)` is "
        "`TensorNorm(t * n**0.5, eps=0)` for tensors of n elements, so for one size only.",
        _peers(),
    ]
    return "\n\n".join(parts)
