"""README.md: its code runs, its tables name what exists with its arguments, its links and commands lead somewhere."""

from __future__ import annotations

import inspect
import re
import time
from pathlib import Path

import matplotlib
import pytest

import fusedlr
from fusedlr import clipping, schedules

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# Rows of the tables: | `Name(arguments)` | ...
ROWS = re.findall(r"^\| `([A-Z]\w+)\((.*?)\)` \|", README, re.MULTILINE)

matplotlib.use("Agg")


def test_there_is_something_to_run():
    assert len(BLOCKS) >= 4
    assert len(BLOCKS[0].splitlines()) <= 20, "the first example is meant to be read at a glance"


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_code_runs(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_first_example_learns(capsys):
    exec(compile(BLOCKS[0], "README.md", "exec"), {"__name__": "readme"})
    loss, lr, norm = re.fullmatch(r"loss (\S+), lr (\S+), gradient norm (\S+)\n", capsys.readouterr().out).groups()
    # The sum of eight standard normal numbers has variance 8: that is the loss of a model that learned nothing.
    assert float(loss) < 0.5
    # The last step is step 199: one before the end of a cosine from 1e-2 to 1e-4 over 180 steps.
    assert float(lr) == pytest.approx(1e-4, rel=0.02)
    assert float(norm) > 0


@pytest.mark.parametrize(("name", "arguments"), ROWS, ids=[name for name, _ in ROWS])
def test_tables_give_the_arguments_of_each_class(name, arguments):
    cls = getattr(schedules, name, None) or getattr(clipping, name)
    told = inspect.signature(eval(f"lambda {arguments}: None", {"time": time})).parameters
    actual = inspect.signature(cls).parameters
    assert [(p.name, p.default) for p in told.values()] == [(p.name, p.default) for p in actual.values()]


def test_tables_name_everything_public():
    names = {name for name, _ in ROWS}
    # What a.then(b), product(a, b) and so on return; the table has rows for these.
    made_by_methods = {"Chain", "ForSteps", "Product", "PerEpoch", "MomentumCycle"}
    for module, base in ((schedules, schedules.Schedule), (clipping, clipping.Clip)):
        classes = [getattr(module, name) for name in module.__all__ if inspect.isclass(getattr(module, name))]
        public = {cls.__name__ for cls in classes if issubclass(cls, base) and cls is not base} - made_by_methods
        assert public and public <= names, f"README.md does not mention {sorted(public - names)} of {module.__name__}"
    classes = {name for name in fusedlr.__all__ if inspect.isclass(getattr(fusedlr, name))}
    optimizers = classes - {"FusedOptimizer", "Precision"}
    assert optimizers == set(re.findall(r"`(\w+)`", README.split("**Optimizers**")[1].splitlines()[0]))


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    for target in commands:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
