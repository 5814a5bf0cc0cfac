"""Training in the presets stays within what the seed changes: in the record, and in a tiny run made here."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the demo, whose model is trained here, draws pictures")

from bench import quality
from bench.quality import FLOAT32, PAGE, PRECISIONS, RECORD, Setting, compare, curve, page_of, train, written
from examples.train_char_gpt import read_text

PRESETS = ("Precision.exact()", "Precision.compact()")
TINY = Setting(steps=40, warmup=5, batch_size=4, context=64, width=64, layers=2, lr=1e-3, held_out=16)


def within_the_spread(runs: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    comparison = compare(runs)
    for row in comparison.rows:
        if row.name in names:
            assert max(map(abs, row.apart)) < comparison.spread, row
            assert row.curves_apart < comparison.curves_spread, row


def test_the_record_holds_the_presets_within_the_spread_of_float32() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert not record["dirty"] and Setting(**record["setting"]) == Setting()
    assert {(run["precision"], run["seed"]) for run in record["runs"]} >= {(n, s) for n in PRECISIONS for s in range(3)}
    # It learned: bytes that are all equally likely have a loss of 5.5, and each run ends far below where it began.
    assert all(curve(run)[-1] < 0.7 * curve(run)[0] for run in record["runs"])
    within_the_spread(record["runs"], PRESETS)


def test_the_page_is_made_from_the_record() -> None:
    record, page = json.loads(RECORD.read_text(encoding="utf-8")), PAGE.read_text(encoding="utf-8")
    assert written(page, page_of(record)) == page, "docs/precision.md is old; run python bench/quality.py --report"


def test_the_presets_train_a_tiny_model_as_float32_does() -> None:
    text = read_text()
    runs = [train(FLOAT32, seed, TINY, text) for seed in range(4)]
    runs += [train(name, seed, TINY, text) for seed in range(2) for name in PRESETS]
    rest = [{**run, "precision": name} for run in runs if run["precision"] == FLOAT32 for name in PRECISIONS]
    others = [run for run in rest if run["precision"] not in (FLOAT32, *PRESETS)]
    within_the_spread(runs + others, PRESETS)
    assert all(curve(run)[-1] < 0.9 * curve(run)[0] for run in runs)


def test_a_precision_that_trains_worse_is_seen() -> None:
    def runs(worse: float) -> list[dict[str, Any]]:
        return [
            {
                "precision": name,
                "seed": seed,
                "losses": [3.0 - 0.01 * i + 0.02 * seed + (worse if name in PRESETS else 0.0) for i in range(40)],
                "validation": 2.5 + 0.02 * seed + (worse if name in PRESETS else 0.0),
            }
            for name in PRECISIONS
            for seed in range(2)
        ]

    within_the_spread(runs(0.01), PRESETS)
    with pytest.raises(AssertionError):
        within_the_spread(runs(0.03), PRESETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "give either --out FILE or --report"), (["--seeds", "1", "--out", "x"], "--seeds of at least 2")],
)
def test_the_command_says_what_it_needs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quality.main(arguments)
    assert message in capsys.readouterr().err
