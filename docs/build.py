"""Write the pages of docs/ that are made from docstrings, with their pictures.

    python docs/build.py            # write
    python docs/build.py --check    # exit with 1 if a page or picture is not what would be written

A page is a function of ``PAGES`` that returns its text and its pictures. A picture remembers the expression that it was
drawn from, so that checking needs no drawing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent
if str(DOCS) not in sys.path:  # imported by a test, this file does not bring its folder along
    sys.path.insert(0, str(DOCS))

from clipping_page import clipping_page  # noqa: E402
from docstrings import arguments, call, code, markdown, sections  # noqa: E402
from optimizer_pages import FAMILIES, family_page, overview  # noqa: E402
from schedule_peers import PEERS  # noqa: E402

from fusedlr import schedules  # noqa: E402

NOTE = "<!-- Made by docs/build.py from the docstrings: change those, and run it again. -->"


class Picture(NamedTuple):
    """A schedule to draw: into ``images/<name>.png``, so many steps of it, from a base of 1."""

    name: str
    expression: str
    steps: int

    @property
    def path(self) -> Path:
        return DOCS / "images" / f"{self.name}.png"

    @property
    def mark(self) -> str:
        """What the picture was drawn from, kept inside the file."""
        return f"{self.expression} for {self.steps} steps"

    def is_current(self) -> bool:
        return self.path.exists() and self.mark.encode() in self.path.read_bytes()

    def draw(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        schedule = eval(self.expression, {**vars(schedules), "math": math})
        figure, axes = pyplot.subplots(figsize=(4.6, 1.9), dpi=110)
        values = [schedule(t, 1.0) for t in range(self.steps)]
        axes.plot(range(self.steps), values, color="#1f5fa8", linewidth=1.6)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7, length=2)
        axes.set_xlabel(schedule._axis, fontsize=7)
        axes.set_title(self.expression, fontsize=7, family="monospace")
        self.path.parent.mkdir(exist_ok=True)
        figure.savefig(self.path, bbox_inches="tight", metadata={"Description": self.mark, "Software": None})
        pyplot.close(figure)


class Page(NamedTuple):
    """A page: its text and the pictures that it shows."""

    text: str
    pictures: list[Picture]


def entry(thing: Any, picture: Picture | None, level: str = "###") -> str:
    """The section of one class or function: its call, formula, picture, arguments, errors and source."""
    told = sections(thing)
    image = [f"![{picture.expression}](images/{picture.name}.png)"] if picture else []
    parts = [f"{level} {thing.__name__}", f"    {call(thing)}", markdown(told[""]), *image]
    parts += [arguments(told["Args"])] if "Args" in told else []
    parts += [f"Raises: {code(' '.join(told['Raises'].split()))}"] if "Raises" in told else []
    parts += [f"Source: {code(' '.join(told['Source'].split()))}"] if "Source" in told else []
    return "\n\n".join(parts)


SCHEDULES: dict[str, dict[str, tuple[str, int]]] = {
    "Over a number of steps": {
        "Warmup": ('Warmup(60, shape="cosine").then(Constant())', 100),
        "Linear": ("Linear(80, 1.0, 0.1)", 100),
        "Polynomial": ("Polynomial(80, power=2, min_lr=0.05)", 100),
        "Cosine": ("Cosine(80, min_lr=0.05)", 100),
        "Constant": ("Constant(0.3, steps=20).then(Constant())", 100),
        "Table": ("Table([1.0, 0.4, 0.7, 0.1], every=25, interpolate=True)", 100),
        "Lambda": ("Lambda(lambda t: (1 - math.tanh(t / 10 - 5)) / 2, 100)", 100),
    },
    "Without an end": {
        "StepDecay": ("StepDecay(30, gamma=0.5)", 120),
        "MultiStepDecay": ("MultiStepDecay([20, 50, 60], gamma=0.5)", 120),
        "ExponentialDecay": ("ExponentialDecay(0.05, min_lr=0.05)", 120),
        "LinearDecay": ("LinearDecay(0.012, min_lr=0.05)", 120),
        "SqrtDecay": ("SqrtDecay(0.1)", 120),
        "InverseTimeDecay": ("InverseTimeDecay(0.1)", 120),
        "PowerDecay": ("PowerDecay(0.1, 2.0)", 120),
        "TimeDecay": ('TimeDecay(0.1, unit="minutes")', 120),
        "Plateau": ("", 0),
    },
    "Recipes and cycles": {
        "WSD": ('WSD(15, 55, 30, decay="1-sqrt", min_lr=0.05)', 110),
        "InverseSqrt": ("InverseSqrt(20)", 200),
        "Noam": ("Noam(512, 40)", 300),
        "OneCycle": ("OneCycle(1.0, 100)", 110),
        "CosineRestarts": ("CosineRestarts(20, mult=2, decay=0.7, min_lr=0.05)", 140),
        "Cyclic": ('Cyclic(0.1, 1.0, 15, 25, mode="triangular2")', 160),
    },
    "Made of others": {
        "product": ("product(Warmup(30), StepDecay(25, 0.6))", 120),
        "per_epoch": ("per_epoch(Warmup(3).then(Cosine(9)), 10)", 130),
        "from_torch": ("", 0),
    },
}

SCHEDULES_HEAD = """# Schedules

    from fusedlr import schedules

    schedule = schedules.Warmup(2_000).then(schedules.Cosine(98_000, min_lr=3e-5))
    optimizer = fusedlr.AdamW(model.parameters(), lr=3e-4, schedule=schedule)

t is the 0-based count of optimizer steps, `base_lr` the base of the param group: its `lr` when the optimizer was made.
A `min_lr` is in the same unit, factors and values are multiples of the base. `schedule=` also takes a dict of schedules
for `lr`, `weight_decay`, `beta1`, `beta2`, `momentum` and `max_norm`; each starts from its scalar's own base.

A schedule is a value. `schedule(t, base_lr)` evaluates it, `repr` gives the code that makes it, schedules compare by
value and pickle, and `schedule.plot(steps)` draws. From a shell:

    python -m fusedlr plot 'Warmup(100).then(Cosine(900))' --steps 1000 --out lr.png

- `a.then(b)` is a, then b on its own clock: `b(t - a.length)`. It needs an a that ends.
- `a.for_steps(n)` gives an end to a schedule that has none: `a(min(t, n))`.
- `product(a, b)` and `per_epoch(a, n)` are described below. All of these nest in any order.
- Past its end a schedule holds its last value, also where the run is longer.

On a GPU the same formulas are evaluated in float64 by the kernel that decides a step, from t in device memory. On the
host and on the device the relative error is below 1e-12 for t up to 1e9: tests hold both against 50 digits, at every
boundary and its neighbours. So restarts and epochs are counted in integers, cosines are squared sines of what remains,
and powers are exponentials of logarithms.
"""


def peers_tables() -> str:
    """The schedules of other libraries, a table each."""
    parts = [
        "## From other libraries",
        "b is the base learning rate of the group, n the length, w the warm-up. Every row is tested against the "
        "formula in the library's source. torch's own schedulers are read by `from_torch`. What follows a metric, as "
        "transformers' `reduce_lr_on_plateau` and timm's `PlateauLRScheduler` do, has no curve, and no row: "
        "use `Plateau`.",
    ]
    for library, peers in PEERS.items():
        rows = [f"| `{peer.theirs}` | `{peer.ours}` | {peer.note} |" for peer in peers]
        parts += [f"### {library}", "\n".join(["| theirs | ours | |", "|---|---|---|", *rows])]
    return "\n\n".join(parts)


def schedules_page() -> Page:
    """docs/schedules.md: every schedule with its formula and curve, and those of other libraries."""
    parts, pictures = [NOTE, SCHEDULES_HEAD.strip()], []
    for title, members in SCHEDULES.items():
        parts.append(f"## {title}")
        for name, (expression, steps) in members.items():
            picture = Picture(f"schedule-{name.lower()}", expression, steps) if expression else None
            pictures += [picture] if picture else []
            parts.append(entry(getattr(schedules, name), picture))
    parts.append(peers_tables())
    return Page("\n\n".join(parts) + "\n", pictures)


def _texts(make: Callable[..., str], *args: str) -> Page:
    """A page without pictures."""
    return Page(f"{NOTE}\n\n{make(*args)}\n", [])


PAGES: dict[str, Callable[[], Page]] = {
    "schedules.md": schedules_page,
    "clipping.md": partial(_texts, clipping_page),
    "optimizers.md": partial(_texts, overview),
    **{f"optimizers/{family}.md": partial(_texts, family_page, family) for family in FAMILIES},
}


def stale(name: str) -> list[str]:
    """The files of a page that are not what would be written."""
    page, path = PAGES[name](), DOCS / name
    current = path.exists() and path.read_text(encoding="utf-8") == page.text
    files = [] if current else [name]
    return files + [f"images/{picture.path.name}" for picture in page.pictures if not picture.is_current()]


def write(name: str) -> None:
    """Write a page, and draw those of its pictures that are missing or of something else."""
    page = PAGES[name]()
    (DOCS / name).parent.mkdir(exist_ok=True)
    (DOCS / name).write_text(page.text, encoding="utf-8")
    for picture in page.pictures:
        if not picture.is_current():
            picture.draw()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    checking = parser.parse_args(argv).check
    for name in PAGES:
        if not checking:
            write(name)
    files = [file for name in PAGES for file in stale(name)]
    if files:
        print(f"not up to date: {', '.join(files)}; run python docs/build.py", file=sys.stderr)
    return 1 if files else 0


if __name__ == "__main__":
    sys.exit(main())
