"""docs/optimizers.md and docs/optimizers/*.md, a page a family: from the docstrings, the signatures and the rules."""

from __future__ import annotations

import inspect
import textwrap
from itertools import combinations
from typing import Any, NamedTuple

import torch
from docstrings import arguments, code, example, items, markdown, sections, text_of

from fusedlr import FusedOptimizer, optimizers
from fusedlr.rule import Rule

__all__ = ["FAMILIES", "Variant", "family_page", "overview", "variants"]

HEAD = """# Optimizers

Every class takes the arguments of its torch.optim namesake and, by keyword, those that all optimizers here have. Its
page has the algorithm, the arguments, the state and what differs from torch.
"""

BYTES = """
*Bytes*: what a step reads and writes for each float32 parameter, counted from the rule: the gradient once, parameter
and state once and back, and what the clip measures before (here the norm of all gradients: the gradient once more). The
kernels' loads and stores are counted in the tests. What each clip reads is in [clipping.md](clipping.md). bfloat16 and
float16 parameters take half of it.
"""

# Arguments of torch.optim that choose nothing here, and differentiable, which must be False.
_INERT = {"foreach", "fused", "capturable", "differentiable"}


def _families() -> dict[str, list[type[FusedOptimizer]]]:
    found: dict[str, list[type[FusedOptimizer]]] = {}
    for name in sorted(optimizers.__all__, key=str.lower):
        cls = getattr(optimizers, name)
        found.setdefault(cls.__module__.rpartition(".")[2], []).append(cls)
    return found


FAMILIES = _families()


class Variant(NamedTuple):
    """A rule of a class and the options that choose it."""

    options: dict[str, Any]
    rule: Rule

    @property
    def label(self) -> str:
        return ", ".join(name if value else f"{name}=False" for name, value in self.options.items())


def _own_arguments(cls: type[FusedOptimizer]) -> list[inspect.Parameter]:
    """The arguments of a class that not all classes have."""
    shared = inspect.signature(FusedOptimizer).parameters
    return [p for name, p in inspect.signature(cls).parameters.items() if name not in shared]


def variants(cls: type[FusedOptimizer]) -> list[Variant]:
    """The rules of a class, each with the fewest options that lead to it."""
    own = _own_arguments(cls)
    flags = [p for p in own if isinstance(p.default, bool) and p.name not in _INERT | {"maximize"}]
    options: dict[str, Any] = {p.name: not p.default for p in flags}
    options |= {"momentum": 0.9} if any(p.name == "momentum" for p in own) else {}
    needed = {p.name: 0.1 for p in own if p.default is p.empty}
    found: dict[str, Variant] = {}
    for names in (chosen for n in range(len(options) + 1) for chosen in combinations(options, n)):
        chosen = {name: options[name] for name in names}
        try:
            optimizer = cls([torch.zeros(1)], **needed, **chosen)
        except ValueError:  # options that do not go together
            continue
        rule = optimizer._rule(optimizer.param_groups[0])
        found.setdefault(rule.name, Variant(chosen, rule))
    return list(found.values())


def traffic(rule: Rule, clipped: bool) -> int:
    """Bytes that a step moves for each float32 parameter."""
    # For a trust ratio parameter, gradient and state are read once more, for the norms.
    trust = 4 * (2 + len(rule.trust.slots)) if rule.trust is not None else 0
    return 4 * clipped + trust + 4 + 8 * (1 + len(rule.slots))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code_list(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _namesake(cls: type[FusedOptimizer]) -> str:
    namesake = getattr(cls, "_namesake", None)
    return f"`torch.optim.{namesake.__name__}`" if namesake is not None else "none"


def overview() -> str:
    """The text of docs/optimizers.md."""
    rows, formulas = [], []
    for family, classes in FAMILIES.items():
        for cls in classes:
            link = f"[{cls.__name__}](optimizers/{family}.md)"
            layouts = {variant.rule.slots: variant for variant in reversed(variants(cls))}
            for slots, variant in reversed(layouts.items()):
                rows.append([
                    f"{link}, {variant.label}" if variant.label else link,
                    _code_list(slots) or "none",
                    str(4 * len(slots)),
                    str(traffic(variant.rule, clipped=False)),
                    str(traffic(variant.rule, clipped=True)),
                    _namesake(cls),
                ])  # fmt: skip
            formulas.append(f"### {link}\n\n{text_of(cls)}")
    head = ["optimizer", "state of a parameter's shape", "bytes of it", "bytes moved", "with the norm", "in place of"]
    shared = sections(optimizers)
    members = [
        [f"`{name}`", code(" ".join(sections(member)[""].split("\n\n")[0].split()))]
        for name, member in vars(FusedOptimizer).items()
        if not name.startswith("_") and inspect.getdoc(member)
    ]
    parts = [
        HEAD.strip(),
        _table(head, rows),
        BYTES.strip(),
        "## A step",
        markdown(shared["Step"]),
        "## What differs from torch",
        code(shared["Differs from torch"]),
        "## What a user reads and calls",
        _table(["of the optimizer", ""], members),
        "## Formulas",
        *formulas,
    ]
    return "\n\n".join(parts)


def _algorithm(cls: type[FusedOptimizer], text: str) -> str:
    """The algorithm box: the arguments, the state at the start, and the step."""
    named = {p.name: p.default for p in _own_arguments(cls) if p.name not in _INERT}
    if "betas" in named:
        at = list(named).index("betas")
        betas = [("beta1", named["betas"][0]), ("beta2", named["betas"][1])]
        pairs = list(named.items())
        named = dict([*pairs[:at], *betas, *pairs[at + 1 :]])
    given = [name if value is inspect.Parameter.empty else f"{name}={value}" for name, value in named.items()]
    heads = [f"given: p, g, the clip's factor c, {', '.join(given)}", f"state: {', '.join(_states(cls).values())}"]
    lines = [textwrap.fill(head, 100, initial_indent="# ", subsequent_indent="#   ") for head in heads]
    return "```python\n" + "\n".join([*lines, text]) + "\n```"


def _states(cls: type[FusedOptimizer]) -> dict[str, str]:
    """The state at the start, an assignment a key, ``step`` first."""
    found = {"step": "step=0"}
    for variant in variants(cls):
        keys = (*variant.rule.slots, *variant.rule.carried)
        for key, start in zip(keys, variant.rule.start or (0.0,) * len(keys), strict=True):
            value = "initial_accumulator_value" if key == "sum" else f"{start:g}"
            found.setdefault(key, f"{key}={value}")
    return found


def _state_table(cls: type[FusedOptimizer]) -> str:
    found = variants(cls)
    rows = [["`step`", "a float32 number", "always"]]
    for key in list(_states(cls))[1:]:
        having = [v for v in found if key in (*v.rule.slots, *v.rule.carried)]
        shape = "a tensor like the parameter" if any(key in v.rule.slots for v in having) else "a float32 number"
        rows.append([f"`{key}`", shape, f"with {having[0].label}" if having[0].label else "always"])
    return _table(["key", "what", "when"], rows)


def _argument_table(cls: type[FusedOptimizer], text: str) -> str:
    parameters = inspect.signature(cls).parameters
    rows = []
    for name, told in items(text).items():
        default = parameters[name].default
        rows.append([f"`{name}`", "" if default is inspect.Parameter.empty else f"`{default!r}`", code(told)])
    return _table(["argument", "default", "meaning"], rows)


def _entry(cls: type[FusedOptimizer]) -> str:
    told = sections(cls)
    parts = [text_of(cls)]
    if "Algorithm" in told:
        parts += ["### Algorithm", _algorithm(cls, told["Algorithm"])]
    parts += ["### Arguments", _argument_table(cls, told["Args"])]
    parts += ["Raises:", arguments(told["Raises"])]
    parts += ["### State", _state_table(cls)]
    costs = {v.rule.slots: v for v in reversed(variants(cls))}
    for _, v in reversed(costs.items()):
        label = f" with {v.label}" if v.label else ""
        parts += [f"Bytes moved for a float32 parameter{label}: {traffic(v.rule, False)}, or {traffic(v.rule, True)} "
                  "with clipping by the norm of all gradients."]  # fmt: skip
    parts += ["### Differs from torch"]
    parts += [code(told["Differs from torch"])] if "Differs from torch" in told else []
    if any(v.rule.aten is not None for v in variants(cls)):
        parts += ["On the CPU float32 and float64 parameters are stepped by PyTorch's own fused operator."]
    parts += ["What differs for all optimizers: [optimizers.md](../optimizers.md#what-differs-from-torch)."]
    told_after = " ".join(told.get("Source", told.get("notes", "")).split())
    parts += ["### Source", code(told_after), "### Example", example(told["Example"])]
    return "\n\n".join(parts)


def family_page(family: str) -> str:
    """The text of the page of one file of fusedlr/optimizers."""
    classes = FAMILIES[family]
    parts = [f"# {', '.join(cls.__name__ for cls in classes)}", "[All optimizers](../optimizers.md)"]
    for cls in classes:
        parts += [f"## {cls.__name__}"] if len(classes) > 1 else []
        parts.append(_entry(cls))
    return "\n\n".join(parts)
