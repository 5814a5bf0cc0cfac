"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import fusedlr


def module_names() -> list[str]:
    names = ["fusedlr"]
    names += [info.name for info in pkgutil.walk_packages(fusedlr.__path__, "fusedlr.") if "__main__" not in info.name]
    return sorted(name for name in set(names) if not name.startswith("fusedlr.kernels"))


MODULES = module_names()


def examples_in(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for test in examples_in(name):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_every_public_class_has_an_example() -> None:
    # Their examples stand at then(), for_steps(), product(), per_epoch() and OneCycle.
    made_by_methods = {"Chain", "ForSteps", "Product", "PerEpoch", "MomentumCycle", "Schedule"}
    schedules = {name for name in fusedlr.schedules.__all__ if isinstance(getattr(fusedlr.schedules, name), type)}
    schedules = {name for name in schedules if issubclass(getattr(fusedlr.schedules, name), fusedlr.schedules.Schedule)}
    public = [getattr(fusedlr, name) for name in fusedlr.optimizers.__all__]
    public += [getattr(fusedlr.clipping, name) for name in set(fusedlr.clipping.__all__) - {"Clip"}]
    public += [getattr(fusedlr.schedules, name) for name in schedules - made_by_methods]
    public += [getattr(fusedlr.schedules, name) for name in ("Lambda", "product", "per_epoch", "from_torch")]
    assert len(public) >= 10 + 7 + 19 + 4
    assert [thing.__name__ for thing in public if ">>>" not in (thing.__doc__ or "")] == []
    assert ">>>" in (fusedlr.schedules.Schedule.then.__doc__ or "") + (fusedlr.schedules.Schedule.__doc__ or "")


def test_all_modules_are_looked_at() -> None:
    files = {path.stem for path in Path(fusedlr.__path__[0]).rglob("*.py")} - {"__init__", "__main__"}
    assert files <= {name.rpartition(".")[2] for name in MODULES}
