"""python -m fusedlr: what it prints and draws, and that an expression is read and never run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import CASES
from test_schedules import ending, endless

import fusedlr
from fusedlr import comparison, schedules
from fusedlr.__main__ import main
from fusedlr.schedules import Schedule
from fusedlr.schedules.expression import parse


def test_what_a_schedule_prints_is_read_again() -> None:
    for case in CASES:
        if "momentum_schedule" not in repr(case.schedule):
            assert parse(repr(case.schedule)) == case.schedule


@settings(deadline=None, max_examples=50)
@given(ending(), st.one_of(ending(), endless()), st.integers(1, 9))
def test_compositions_are_read_again(a: Schedule, b: Schedule, n: int) -> None:
    schedule = schedules.per_epoch(a.then(schedules.product(b, a)), n).for_steps(50)
    assert parse(repr(schedule)) == schedule


def test_arguments_of_all_kinds() -> None:
    assert parse("  MultiStepDecay((1, 2,), gamma=.5) ") == schedules.MultiStepDecay([1, 2], 0.5)
    assert parse("Cosine(total_steps=1_000, periodic=True)") == schedules.Cosine(1000, periodic=True)
    assert parse("ExponentialDecay(-1e-3)") == schedules.ExponentialDecay(-1e-3)
    assert parse("Cyclic(0, 1, 5, None, mode='triangular2')") == schedules.Cyclic(0, 1, 5, mode="triangular2")


def test_every_schedule_that_text_can_describe_is_known() -> None:
    from fusedlr.schedules.expression import _MAKERS

    made_by_methods = {"Schedule", "Chain", "ForSteps", "PerEpoch", "Product", "MomentumCycle"}
    classes = {
        name
        for name in schedules.__all__
        if isinstance(getattr(schedules, name), type) and issubclass(getattr(schedules, name), Schedule)
    }
    assert set(_MAKERS) == classes - made_by_methods | {"per_epoch", "product"}


REFUSED = [
    "__import__('os').system('touch {touched}')",
    "open('{touched}', 'w')",
    "exec('open(chr(97))')",
    "Cosine.__init__.__globals__['__builtins__']['open']('{touched}', 'w')",
    "Cosine(9).__class__.__base__.__subclasses__()",
    "Cosine(9).plot(10)",
    "Cosine(9)._rows(1)",
    "Cosine(9).then.__self__",
    "Cosine(9)(3, 1.0)",
    "(lambda: open('{touched}', 'w'))()",
    "[open('{touched}', 'w') for _ in (1,)]",
    "Table([x for x in range(9)])",
    "Table([*range(9)])",
    "Table(*[[1]])",
    "Cosine(**{{'total_steps': 9}})",
    "Cosine(9 if open('{touched}', 'w') else 8)",
    "Cosine(f\"{{open('{touched}', 'w')}}\")",
    "Cosine(9) or open('{touched}', 'w')",
    "Cosine(x := 9)",
    "Cosine(10**10**10)",
    "Cosine(2 * 3)",
    "Cosine(+9)",
    "Cosine(~9)",
    "Cosine(-True)",
    "Cosine(9j)",
    "Cosine(b'9')",
    "Cosine(...)",
    "Constant",
    "schedules.Cosine(9)",
    "Lambda(print, 3)",
    "from_torch(1)",
    "Schedule()",
    "Chain([])",
    "3",
    "'Cosine(9)'",
    "[Cosine(9)]",
    "Cosine(9).then",
    "'a'.then(Cosine(9))",
    "(3).for_steps(2)",
    "Cosine(9); import os",
    "import os",
    "Cosine(9",
    "",
    "\x00",
    "(" * 5_000 + ")" * 5_000,
    "Constant()" + ".for_steps(9)" * 5_000,
    "Cosine(" + "9" * 200_000 + ")",
]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_nothing_else_is_read_and_nothing_runs(text: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    with pytest.raises(ValueError, match=r"expected|at most 100000 characters"):
        parse(text.replace("{touched}", str(touched)).replace("{{", "{").replace("}}", "}"))
    assert not touched.exists()


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40) | st.text("Cosine().thenWarmup[]{}0123456789,=*+-_'\" ", max_size=40))
def test_any_text_gives_a_schedule_or_an_error_of_ours(text: str) -> None:
    try:
        result = parse(text)
    except (ValueError, TypeError):
        return
    assert isinstance(result, Schedule)


def test_errors_say_where() -> None:
    with pytest.raises(ValueError, match=r"expected one of Constant, .* at character 16, but got 'Cosin'"):
        parse("Warmup(3).then(Cosin(9))")
    with pytest.raises(ValueError, match=r"expected a schedule, a number.* at character 8, but got '1 \+ 2'"):
        parse("Cosine(1 + 2)")
    with pytest.raises(ValueError, match=r"such as 'Cosine\(900\)', but got '3', which is no schedule"):
        parse("3")


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    out = tmp_path / "lr.png"
    try:
        assert main(["plot", "Warmup(100).then(Cosine(900))", "--steps", "1000", "--out", str(out)]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
        assert capsys.readouterr().out == f"wrote {out}\n"
        assert len(pyplot.gca().lines[0].get_xdata()) == 1_000
        svg = tmp_path / "lr.svg"
        assert main(["plot", "StepDecay(30)", "--base-lr", "0.5", "--log", "--out", str(svg)]) == 0
        assert "<svg" in svg.read_text()
        axes = pyplot.gca()
        assert (axes.get_yscale(), len(axes.lines[0].get_xdata()), axes.lines[0].get_ydata()[0]) == ("log", 1_000, 0.5)
        assert main(["plot", "Cosine(40)", "--out", str(out)]) == 0
        assert len(pyplot.gca().lines[0].get_xdata()) == 40
    finally:
        pyplot.close("all")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["plot", "Cosin(9)"], "expected one of"),
        (["plot", "Cosine(-9)"], "total_steps must be an integer >= 1 and <= 2**53, but got -9"),
        (["plot", "Cosine(9, foo=3)"], "foo"),
        (["plot", "Cosine(9, min_lr=2)"], "min_lr must be at most base_lr"),
        (["plot", "Cosine(9)", "--base-lr", "-1"], "base_lr must be a finite number >= 0, but got -1.0"),
        (["plot", "Cosine(9)", "--steps", "0"], "steps must be an integer >= 1"),
        (["plot", "Cosine(9)", "--steps", "many"], "invalid int value: 'many'"),
        (["plot", "Cosine(9)", "--out", "no/such/folder/lr.png"], "no/such/folder"),
        (["plot", "Cosine(9)", "--out", "lr.xyz"], "xyz"),
        (["plot"], "expression"),
        (["bench", "--steps", "0"], "expected at least 1, got 0"),
        (["bench", "--model", "3"], "expected 2 arguments"),
        (["bench", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["paint"], "invalid choice: 'paint'"),
        ([], "command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_exit_with_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stopped:  # argparse
        code = int(stopped.code or 0)
    finally:
        pyplot.close("all")
    assert code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not any(tmp_path.iterdir())


def test_bench_times_all_sides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", "--steps", "2", "--model", "5", "70000"]) == 0
    head, columns, row = capsys.readouterr().out.splitlines()
    assert "cpu, median of 2 steps" in head
    assert columns.split("  ")[0] == "AdamW, clipped, scheduled"
    name, numbers = row[:28].strip(), row[28:].replace("x", "").split()
    assert name == "5 tensors of 70000"
    ours, fused, fused_ratio, foreach, foreach_ratio = map(float, numbers)
    assert fused_ratio == pytest.approx(fused / ours, rel=0.02)
    assert foreach_ratio == pytest.approx(foreach / ours, rel=0.02)


def test_bench_says_where_the_sides_disagree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_MAX_NORM", 10.0)  # read when a side is built, by torch's sides when they step
    original = comparison._fusedlr

    def unclipped(params: list[torch.nn.Parameter]) -> Callable[[], None]:
        step = original(params)
        monkeypatch.setattr(comparison, "_MAX_NORM", 1e-9)
        return step

    monkeypatch.setitem(comparison._SIDES, "fusedlr", unclipped)
    assert main(["bench", "--device", "cpu", "--steps", "1", "--model", "2", "9"]) == 1
    assert "2 tensors of 9: after 3 steps, fusedlr and torch fused are" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["fusedlr"] == fusedlr.__version__
    assert told["torch"].split("+")[0] in __import__("torch").__version__
    assert told["backend torch"] == "yes"
    assert {"backend triton", "backend auto", "device cpu", "python", "numpy"} <= told.keys()
    for module in ("schedules", "clipping"):
        assert told[module].split(", ") == getattr(fusedlr, module).__all__
    assert {"SGD", "Adam", "AdamW"} <= set(told["optimizers"].split(", ")) and "Precision" not in told["optimizers"]
    assert "# 14 bytes a bfloat16 parameter of Adam" in told["precision exact()"]
    assert "# 7.125 bytes a bfloat16 parameter of Adam" in told["precision compact()"]


def test_a_backend_that_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FUSEDLR_BACKEND", "gpu")
    assert main(["info"]) == 0
    assert "backend auto: none: the environment variable FUSEDLR_BACKEND must be one of" in capsys.readouterr().out
    assert main(["bench", "--device", "cpu", "--steps", "1", "--model", "1", "10"]) == 1
    assert "bench: the environment variable FUSEDLR_BACKEND must be" in capsys.readouterr().err


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusedlr", "plot", "Cosin(9)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m fusedlr plot: expected one of")
    assert "Traceback" not in done.stderr
