"""The demo: it ends well where both optimizers agree, with a table and a picture, and fails where they do not."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_char_gpt.py"


@pytest.fixture
def demo():
    """The script as a module; what its main() sets for the whole process is put back."""
    spec = importlib.util.spec_from_file_location("train_char_gpt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    sys.modules["train_char_gpt"] = module
    flash, efficient = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    spec.loader.exec_module(module)
    yield module
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    del sys.modules["train_char_gpt"]


def test_quick_run_prints_a_table_and_draws_a_picture(tmp_path):
    out = tmp_path / "demo.png"
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--device", "cpu", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        # The script is run as a user runs it, from an installed or a checked-out fusedlr.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    times = ("forward, backward, ms (p50)", "optimizer, ms a step (p50)")
    for line in ("final training loss", "final validation loss", *times, "largest difference"):
        assert line in ran.stdout
    assert "training both: 100%" in ran.stderr
    assert f"wrote {out}" in ran.stdout
    picture = out.read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_the_same_seed_gives_the_same_run(demo):
    def losses() -> list[float]:
        torch.manual_seed(3)
        model = demo.GPT(context=32, width=32, layers=1, heads=1)
        run = demo.fusedlr_run(model, 1e-3, 1e-4, 2, 6)
        generator = torch.Generator().manual_seed(3)
        train, _ = demo.read_text()
        for _ in range(6):
            run.step(demo.windows(train, 2, 32, generator))
        return run.losses

    assert losses() == losses()


def test_both_sides_use_the_same_learning_rates_and_see_the_same_norms(demo):
    runs = []
    for make in (demo.torch_run, demo.fusedlr_run):
        torch.manual_seed(0)
        runs.append(make(demo.GPT(context=32, width=32, layers=1, heads=1), 1e-3, 1e-4, 4, 12))
    generator = torch.Generator().manual_seed(0)
    train, _ = demo.read_text()
    for _ in range(12):
        batch = demo.windows(train, 2, 32, generator)
        for run in runs:
            run.step(batch)
    theirs, ours = runs
    assert ours.lrs == pytest.approx(theirs.lrs, rel=1e-12)  # a few roundings of float64
    assert ours.lrs[0] == 0.25e-3 and ours.lrs[3] == ours.lrs[4] == 1e-3 and ours.lrs[-1] > 1e-4
    # torch adds squares in float32, and the losses of the two runs agree to about seven digits
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-5)
    assert max(ours.norms) > demo.MAX_NORM, "without clipping this shows less than it says"


def test_curves_that_differ_are_an_error(demo, tmp_path, capsys, monkeypatch):
    right = demo.fusedlr_run
    monkeypatch.setattr(demo, "fusedlr_run", lambda model, lr, *rest: right(model, 1.1 * lr, *rest))
    out = tmp_path / "demo.png"
    with pytest.raises(SystemExit, match=r"the two loss curves are .* apart, more than the 1e-04"):
        demo.main(["--quick", "--device", "cpu", "--out", str(out)])
    assert out.exists()  # the picture is how one sees what went wrong
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1.0, 2.0], [1.0, 2.5], 0.5), ([1.0, math.nan], [1.0, 2.0], math.nan), ([1.0], [1.0], 0.0)],
)
def test_largest_difference(demo, a, b, expected):
    assert demo.largest_difference(a, b) == pytest.approx(expected, nan_ok=True)


def test_training_and_validation_text_are_real_and_disjoint(demo):
    train, valid = demo.read_text()
    assert train.numel() > 10 * valid.numel() > 1_000_000
    assert b"import" in bytes(valid[:1_000_000].tolist())


@pytest.mark.parametrize("arguments", [["--warmup", "250"], ["--width", "40"]])
def test_arguments_that_make_no_sense(demo, arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        demo.parse(arguments)
    assert exit_info.value.code == 2
    assert "expected" in capsys.readouterr().err
